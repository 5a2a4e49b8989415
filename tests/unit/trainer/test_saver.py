"""The snapshot in the arena, and the memory that it lies in."""

import dataclasses
import errno
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.unit.trainer import pipeline

from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import Begin, Outcome, Sealed
from dtrain.trainer.checkpoint import arena as arenas
from dtrain.trainer.checkpoint import cuda, state
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.session import Session

MIB = 1024 * 1024


def begin(seq: int) -> Begin:
    return Begin(Seq(seq), pipeline.NONCE, Step(seq * 10))


def blob(saver: Saver, sealed: Sealed) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(bytes(saver._arena.memory[: sealed.size_bytes]))


def index(saver: Saver, sealed: Sealed) -> Any:
    end = sealed.index_offset + sealed.index_bytes
    return codec.loads(bytes(saver._arena.memory[sealed.index_offset : end]), bytes_max=1 << 24)


def test_every_snapshot_has_the_values_of_its_step() -> None:
    weights = [torch.zeros(5) for _ in range(100)]
    tracked = {"h": {f"w{i}": weight for i, weight in enumerate(weights)}, "n": {"steps": 0}}
    saver = Saver(tracked, 0, 1, pipeline.new_arena())
    saver.prepare()
    for step in range(1, 5):
        for weight in weights:
            weight.add_(1)
        tracked["n"]["steps"] = step  # type: ignore[assignment]
        sealed = saver.seal(begin(step))
        found = blob(saver, sealed)
        assert all((found[f"h.w{i}"] == step).all() for i in range(100))
        assert index(saver, sealed)["objects"]["n"]["value"] == {"steps": step}


def test_a_state_that_grows_or_changes_form_is_laid_out_anew() -> None:
    tracked: dict[str, Any] = {"h": {"a": torch.ones(3)}}
    saver = Saver(tracked, 0, 1, pipeline.new_arena())
    for count, value in enumerate(
        [torch.ones(3).double(), torch.ones(4, dtype=torch.bfloat16), torch.ones(3 * MIB), torch.ones(2)], 1
    ):
        tracked["h"][f"b{count}"] = value
        sealed = saver.seal(begin(count))
        found = blob(saver, sealed)
        for name, tensor in tracked["h"].items():
            assert found[f"h.{name}"].dtype == tensor.dtype
            assert torch.equal(found[f"h.{name}"], tensor)
        assert set(index(saver, sealed)["tensors"]) == set(found)


def test_whole_cache_lines_come_first_and_every_block_is_aligned_to_its_items() -> None:
    tracked = {"h": {"odd": torch.ones(7, dtype=torch.int64), "a": torch.ones(64), "c": torch.ones(3, 16)}}
    saver = Saver(tracked, 0, 1, pipeline.new_arena())
    saver.seal(begin(1))
    lines = {item.block.spec.name: item.offset % 64 for _, item in saver._placed}
    assert lines["h.a"] == lines["h.c"] == 0
    for number, item in saver._placed:
        assert item.offset % saver._views[number].element_size() == 0 or item.block.size_bytes == 0


def test_a_second_save_encodes_no_tensor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar of a snapshot of thousands of tensors: what it costs is their copies."""
    tracked = {"h": {f"w{i}": torch.zeros(4) for i in range(50)}}
    saver = Saver(tracked, 0, 1, pipeline.new_arena())
    saver.prepare()
    encoded: list[str] = []
    real = state._Encoder._tensor

    def spy(self: Any, value: Any, path: str, numpy: str) -> Any:
        encoded.append(path)
        return real(self, value, path, numpy)

    monkeypatch.setattr(state._Encoder, "_tensor", spy)
    saver.seal(begin(1))
    assert encoded
    assert not [path for path in encoded if not path.startswith("rng/")]


# The arena --------------------------------------------------------------------


def test_memory_touched_ahead_is_what_the_snapshot_gets() -> None:
    fd = os.memfd_create("test")
    arena = Arena(fd)
    arena.reserve_soon(3 * MIB)
    assert arena.reserve(3 * MIB)
    assert arena.size_bytes == 4 * MIB
    assert os.fstat(fd).st_blocks * 512 == 4 * MIB
    assert not arena.reserve(4 * MIB)


def test_more_than_was_touched_ahead_is_reserved_then() -> None:
    arena = Arena(os.memfd_create("test"))
    arena.reserve_soon(1 * MIB)
    assert arena.reserve(9 * MIB)
    assert arena.size_bytes >= 9 * MIB


def test_an_arena_of_before_is_mapped_whole() -> None:
    """A restarted rank inherits the memory of the one before; a reader of it must not fault."""
    fd = os.memfd_create("test")
    Arena(fd).reserve(8 * MIB)
    after = Arena(fd)
    after.reserve_soon(1 * MIB)
    assert after.reserve(1 * MIB)
    assert after.size_bytes == 8 * MIB


def test_missing_memory_is_told_by_the_save_and_not_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    arena = Arena(os.memfd_create("test"))
    arena.reserve_soon(1 * MIB)
    with pytest.raises(Refused) as caught:
        arena.reserve(1 * MIB)
    assert caught.value.code is ErrorCode.STATE_NOT_SAVABLE
    monkeypatch.undo()
    assert arena.reserve(1 * MIB)  # there is memory again: the next save succeeds


def test_a_kernel_without_populate_write_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "_MADV_POPULATE_WRITE", 9999)
    arena = Arena(os.memfd_create("test"))
    assert arena.reserve(1 * MIB)
    arena.memory[:4] = b"here"


# Behind training --------------------------------------------------------------


class Held(cuda.Overlap):
    """An overlap whose copy is done when the test says so."""

    def __init__(self) -> None:
        super().__init__(streams=None)  # type: ignore[arg-type]
        self.done: Callable[[Exception | None], None] | None = None

    def start(
        self, tracked: Any, targets: Any, sources: Any, done: Callable[[Exception | None], None]
    ) -> bool:
        del tracked
        cuda.copy_and_wait(targets, sources)
        self.done = done
        return True


def session_at(step: int, *, seq: int) -> Session:
    session = Session(0, lambda: None)
    session.restored(step - 1)
    session.handle(Begin(Seq(seq), pipeline.NONCE, Step(step)))
    assert session.complete(step) is not None
    return session


def held_saver() -> tuple[Saver, Held]:
    saver = Saver({"h": {"w": torch.ones(3)}}, 0, 1, pipeline.new_arena())
    saver._overlap = held = Held()
    return saver, held


def seal_behind(saver: Saver, session: Session, order: Begin) -> None:
    def done(sealed: Sealed, error: Exception | None) -> None:
        if error is None:
            session.keep(sealed)
        else:
            session.give_up(order, str(error))

    assert saver.seal_behind(order, done, lambda: session.taking(order))


def test_a_snapshot_behind_training_is_announced_when_it_is_whole() -> None:
    session, order = session_at(10, seq=1), begin(1)
    saver, held = held_saver()
    seal_behind(saver, session, order)
    assert session.complete(11) is None  # the next step is not late for it
    assert session.report().sealed is None
    assert session.report().problem is None
    assert held.done is not None
    thread = threading.Thread(target=held.done, args=(None,))
    thread.start()
    thread.join()
    sealed = session.report().sealed
    assert sealed is not None
    assert sealed.seq == 1


def test_a_checkpoint_aborted_while_it_is_copied_is_never_announced() -> None:
    session, order = session_at(10, seq=1), begin(1)
    saver, held = held_saver()
    seal_behind(saver, session, order)
    session.handle(Outcome(Seq(1), committed=False, final=False, why="too slow"))
    assert held.done is not None
    held.done(None)
    assert session.report().sealed is None


def test_another_snapshot_is_refused_while_one_is_copied() -> None:
    session, order = session_at(10, seq=1), begin(1)
    saver, held = held_saver()
    seal_behind(saver, session, order)
    session.handle(Outcome(Seq(1), committed=False, final=False))
    session.handle(Begin(Seq(2), "n2", Step(12)))
    assert session.complete(12) is None
    problem = session.report().problem
    assert problem is not None
    assert (problem.seq, problem.rank, problem.late) == (2, Rank(0), False)
    assert held.done is not None
    held.done(None)
    session.handle(Begin(Seq(3), "n3", Step(14)))
    assert session.complete(14) is not None


def test_a_copy_that_failed_is_a_problem_of_its_checkpoint() -> None:
    session, order = session_at(10, seq=1), begin(1)
    saver, held = held_saver()
    seal_behind(saver, session, order)
    assert held.done is not None
    held.done(RuntimeError("an illegal address"))
    problem = session.report().problem
    assert problem is not None
    assert problem.seq == 1
    assert "illegal" in problem.message
    assert session.report().sealed is None


# The manifest of a rank ---------------------------------------------------------


def test_an_index_that_is_no_object_is_refused_and_nothing_stays_stored(tmp_path: Path) -> None:
    from dtrain.agent.transfer_upload import Uploader
    from dtrain.storage.blobs.local import LocalBlobs

    saver = Saver({"h": {"w": torch.ones(3)}}, 0, 1, pipeline.new_arena())
    sealed = saver.seal(begin(1))
    saver._arena.memory[sealed.index_offset : sealed.index_offset + 1] = b"?"
    store = LocalBlobs(tmp_path)
    with pytest.raises(Refused) as caught:
        Uploader(lambda _uri: store, [].append).run(pipeline.upload_order(sealed, 0, 1, store.uri))
    assert caught.value.code is ErrorCode.BAD_RECORD
    assert not list(store.list("c1/"))


def test_an_index_that_repeats_a_field_of_the_agent_is_refused_by_the_leader(tmp_path: Path) -> None:
    """The agent does not read the index, so nothing in it may pass for what the agent says."""
    from dtrain.agent.transfer_upload import Uploader
    from dtrain.agent.transferring import TransferReport, Uploaded
    from dtrain.storage.blobs.local import LocalBlobs

    saver = Saver({"h": {"w": torch.ones(3)}}, 0, 1, pipeline.new_arena())
    sealed = saver.seal(begin(1))
    start, end = sealed.index_offset, sealed.index_offset + sealed.index_bytes
    forged = bytes(saver._arena.memory[start:end]).replace(b'"layout"', b'"rank" ', 1)
    forged = forged[:9] + b" " * (end - start - len(forged)) + forged[9:]
    saver._arena.memory[start:end] = forged
    sealed = dataclasses.replace(sealed, index_crc=f"{zlib.crc32(forged):08x}")
    store = LocalBlobs(tmp_path)
    reports: list[TransferReport] = []
    Uploader(lambda _uri: store, reports.append).run(pipeline.upload_order(sealed, 0, 1, store.uri))
    (report,) = reports
    assert isinstance(report, Uploaded)
    with pytest.raises(Refused, match="twice"):
        pipeline.read_rank_manifest(store, report.part)
