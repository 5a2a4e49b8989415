"""Chunks on demand: from the nearest tier whose bytes fit, each once, and never unverified."""

import gzip
import json
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.trainer.pipeline import merge

from dtrain.agent import transfer_chunks, transfer_fetch, transfer_tiers
from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import (
    CancelUpload,
    Demand,
    Fetch,
    Fetched,
    FetchFailed,
    KeepManifest,
    KeptBlob,
    Supplied,
    TransferReport,
    Upload,
    Uploaded,
)
from dtrain.protocol import checksum
from dtrain.protocol.checkpoint import CHUNK_BYTES
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import ChunkSpan, Have, Held, Need, RestorePlan, Sealed
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobStore
from dtrain.trainer.checkpoint.reading import Into
from dtrain.trainer.checkpoint.source import DemandSource, Range

JOB, UID = JobName("j1"), Uid("u1")
SIZE = CHUNK_BYTES * 5 // 2
WHOLE = (ChunkSpan(0, 0, 3),)
_MIB = random.Random(1).randbytes((1 << 20) - 8)
VALUES = b"".join(struct.pack("<Q", number) + _MIB for number in range(SIZE >> 20))[: SIZE - 128]


class Counting(MemoryBlobs):
    """Remembers which ranges were read."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.reads: list[tuple[str, int]] = []

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self.reads.append((key, offset // CHUNK_BYTES))
        return super().get(key, offset=offset, length=length)


class Machine:
    """One checkpoint of one blob of three chunks, its arena, and a fetcher."""

    def __init__(self, store: BlobStore, cache: Cache | None = None) -> None:
        self.store = store
        self.cache = cache or Cache()
        self.arena = os.memfd_create("dtrain-arena-0")
        self.reports: list[TransferReport] = []
        values = VALUES
        entry = {"dtype": "U8", "shape": [len(values)], "chunks": [
            {"o": [0], "s": [len(values)], "b": 0, "off": 128, "len": len(values)}]}  # fmt: skip
        header = json.dumps({"x": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}})
        self.blob = struct.pack("<Q", 120) + header.encode().ljust(120) + values
        index = json.dumps({"layout": "h", "objects": {}, "tensors": {"x": entry}}).encode()
        os.pwrite(self.arena, self.blob + index, 0)
        path = f"/proc/{os.getpid()}/fd/{self.arena}"
        self.sealed = Sealed(Seq(7), "n1", Step(40), path, 0, SIZE, SIZE, len(index))
        upload = Upload(ClusterName("c1"), JOB, UID, store.uri, Attempt(2), Rank(0), 1, Step(40), self.sealed)
        Uploader(lambda _uri: store, self.reports.append, cache=cache).run(upload)
        uploaded = self.reports.pop()
        assert isinstance(uploaded, Uploaded)
        self.kept = uploaded.kept
        key, sha = merge(store, [uploaded.part])
        self.order = Fetch("f1", JOB, UID, store.uri, Seq(7), Step(40), key, sha, on_demand=True)
        self.fetcher = self.restarted()

    def restarted(self) -> Fetcher:
        """What a new transfer process has."""
        self.fetcher = Fetcher(lambda _uri: self.store, self.reports.append, cache=self.cache, deadline_s=0.5)
        return self.fetcher

    def fetch(self, *, kept: tuple[KeptBlob, ...] = (), ident: str = "f1") -> RestorePlan:
        self.id = ident
        self.fetcher.run(replace(self.order, id=ident, kept=kept))
        report = self.reports.pop()
        assert isinstance(report, Fetched), report
        self.plan = report.plan
        return report.plan

    def demand(
        self, *chunks: ChunkSpan, rank: int = 0, private: bool = False, **more: bool
    ) -> TransferReport:
        need = Need(self.plan.token, 1, chunks, **more)
        self.fetcher.demand(Demand(self.id, Rank(rank), need, private))
        return self.reports.pop()

    def supplied(self, *chunks: ChunkSpan, **more: Any) -> tuple[Held, dict[str, int]]:
        report = self.demand(*chunks, **more)
        assert isinstance(report, Supplied), report
        (held,) = report.have.blobs
        return held, {tier: size for tier, size in report.tiers.items() if size}

    def shared_path(self) -> str:
        """Where ranks read the blob now."""
        blob = self.fetcher._held[self.id].chunks._blobs[0]
        assert blob.shared is not None
        return blob.shared.path

    # What the link of a rank does.

    def ask(
        self,
        token: str,
        chunks: object,
        *,
        whole: bool = False,
        again: bool = False,
        unverified: bool = False,
    ) -> Have | None:
        del token
        report = self.demand(*chunks, whole=whole, again=again, unverified=unverified)  # type: ignore[misc]
        assert isinstance(report, Supplied), report
        return report.have

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None:
        return None


def content(held: Held) -> bytes:
    with Path(held.place.path).open("rb") as file:
        file.seek(held.place.offset)
        return file.read(held.place.size_bytes)


def flip(machine: Machine, offset: int) -> None:
    byte = os.pread(machine.arena, 1, offset)
    os.pwrite(machine.arena, bytes([byte[0] ^ 1]), offset)


@pytest.fixture
def far() -> Iterator[Machine]:
    """With a store that is not a local folder."""
    machine = Machine(Counting())
    yield machine
    machine.fetcher.release(machine.order.id)()
    os.close(machine.arena)


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Machine]:
    """With a store that is a local folder."""
    (tmp_path / "store").mkdir()
    machine = Machine(LocalBlobs(tmp_path / "store"))
    yield machine
    machine.fetcher.release(machine.order.id)()
    os.close(machine.arena)


def reads(machine: Machine) -> list[int]:
    """Chunks of blobs read from the store, in order."""
    assert isinstance(machine.store, Counting)
    return sorted(chunk for key, chunk in machine.store.reads if key.endswith(".st"))


def blob_file(machine: Machine) -> Path:
    assert isinstance(machine.store, LocalBlobs)
    return machine.store.file_of(machine.kept[0].key)


# Which tier ---------------------------------------------------------------------


def test_what_lies_in_an_arena_is_not_read_from_the_store(far: Machine) -> None:
    far.fetch(kept=far.kept)
    held, tiers = far.supplied(*WHOLE)
    assert tiers == {"arena": SIZE}
    assert (held.shared, content(held)) == (True, far.blob)
    assert reads(far) == []


def test_an_arena_that_was_written_over_in_part_gives_the_rest(far: Machine) -> None:
    flip(far, CHUNK_BYTES + 5)
    far.fetch(kept=far.kept)
    held, tiers = far.supplied(*WHOLE)
    assert tiers == {"arena": SIZE - CHUNK_BYTES, "store": CHUNK_BYTES}
    assert (held.shared, content(held)) == (False, far.blob)
    assert reads(far) == [1]


def test_an_arena_that_is_gone_or_something_else_by_now_is_left_alone(far: Machine) -> None:
    reader, writer = os.pipe()
    foreign = os.memfd_create("something-else")
    os.pwrite(foreign, far.blob, 0)
    for number, fd in enumerate((999_999, reader, foreign)):
        kept = replace(far.kept[0], path=f"/proc/{os.getpid()}/fd/{fd}")
        far.fetch(kept=(kept,), ident=f"f{number}")
        held, tiers = far.supplied(*WHOLE)
        assert (tiers, content(held)) == ({"store": SIZE}, far.blob)
        far.fetcher.release(f"f{number}")()
    for fd in (reader, writer, foreign):
        os.close(fd)


def test_a_file_of_a_local_store_is_read_where_it_is(near: Machine) -> None:
    near.fetch()
    held, tiers = near.supplied(*WHOLE)
    assert tiers == {"store": SIZE}
    assert (held.shared, content(held)) == (True, near.blob)


def test_over_a_network_nothing_is_mapped(near: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_tiers, "lies_here", lambda device: False)
    near.fetch()
    held, _ = near.supplied(*WHOLE)
    assert (held.shared, content(held)) == (False, near.blob)


def test_file_systems_are_told_apart_by_their_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "36 35 98:0 / / rw,noatime master:1 - ext4 /dev/root rw\n"
        "40 36 0:45 / /nfs rw - nfs4 host:/export rw\n"
    )
    assert transfer_tiers.lies_here(os.makedev(98, 0), mounts)
    assert not transfer_tiers.lies_here(os.makedev(0, 45), mounts)
    assert not transfer_tiers.lies_here(os.makedev(0, 99), mounts)


def test_a_bad_chunk_in_a_local_store_is_named_with_its_evidence(near: Machine) -> None:
    data = bytearray(near.blob)
    data[2 * CHUNK_BYTES] ^= 1
    blob_file(near).write_bytes(data)
    near.fetch()
    failed = near.demand(*WHOLE)
    assert isinstance(failed, FetchFailed)
    assert failed.bad is not None
    assert (failed.bad.seq, failed.bad.chunk, failed.bad.blob) == (7, 2, near.kept[0].key)


def test_a_bad_chunk_that_nobody_needs_harms_nobody(near: Machine) -> None:
    data = bytearray(near.blob)
    data[2 * CHUNK_BYTES] ^= 1
    blob_file(near).write_bytes(data)
    near.fetch()
    held, _ = near.supplied(ChunkSpan(0, 0, 2))
    assert content(held)[: 2 * CHUNK_BYTES] == near.blob[: 2 * CHUNK_BYTES]


def test_a_bad_store_does_not_matter_while_the_arena_is_good(near: Machine) -> None:
    blob_file(near).unlink()
    near.fetch(kept=near.kept)
    held, tiers = near.supplied(*WHOLE)
    assert (tiers, content(held)) == ({"arena": SIZE}, near.blob)


# Only what is needed, once ---------------------------------------------------------


def test_only_the_chunks_that_are_needed_are_read(far: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_fetch, "PREFETCH_BYTES_MAX", 0)
    far.fetch()
    held, tiers = far.supplied(ChunkSpan(0, 2, 1))
    assert tiers == {"store": SIZE - 2 * CHUNK_BYTES}
    assert content(held)[2 * CHUNK_BYTES :] == far.blob[2 * CHUNK_BYTES :]
    assert reads(far) == [2]


def test_a_chunk_that_several_ranks_need_is_read_once(far: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_fetch, "PREFETCH_BYTES_MAX", 0)
    far.fetch()
    need = Need(far.plan.token, 1, WHOLE)
    threads = [
        threading.Thread(target=far.fetcher.demand, args=(Demand("f1", Rank(rank), need),))
        for rank in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([report for report in far.reports if isinstance(report, Supplied)]) == 4
    assert reads(far) == [0, 1, 2]


def test_a_small_checkpoint_is_on_its_way_before_anyone_asks(far: Machine) -> None:
    far.fetch()
    far.supplied(ChunkSpan(0, 0, 1))
    far.supplied(*WHOLE)
    assert reads(far) == [0, 1, 2]


def test_of_a_large_one_that_was_written_here_what_its_ranks_wrote_comes_first(
    far: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_fetch, "PREFETCH_BYTES_MAX", 0)
    monkeypatch.setattr(transfer_fetch.Chunks, "bring", lambda self, blobs: began.append(list(blobs)))
    began: list[list[int]] = []
    for world, ranks in ((1, (0,)), (1, (1,)), (2, (0,))):
        order = replace(far.order, id=f"f{len(began)}", world=world, ranks=tuple(Rank(r) for r in ranks))
        far.fetcher.run(order)
        far.fetcher.release(order.id)()
    assert began == [[0], [], []]


def test_demands_that_mean_nothing_are_refused_or_ignored(far: Machine) -> None:
    far.fetch()
    for span in (ChunkSpan(1, 0, 1), ChunkSpan(0, 2, 2), ChunkSpan(0, -1, 1), ChunkSpan(-1, 0, 1)):
        with pytest.raises(Exception, match="asks for"):
            far.demand(span)
    far.fetcher.demand(Demand("f1", Rank(0), Need("of another life", 1, WHOLE)))
    far.fetcher.demand(Demand("gone", Rank(0), Need(far.plan.token, 1, WHOLE)))
    assert far.reports == []


# Places that others can write to ---------------------------------------------------


def test_what_was_written_over_while_it_was_read_is_noticed(far: Machine) -> None:
    far.fetch(kept=far.kept)
    far.supplied(*WHOLE)
    good = far.demand(*WHOLE, again=True)
    assert isinstance(good, Supplied)
    assert good.have.good
    flip(far, 2 * CHUNK_BYTES + 1)
    bad = far.demand(*WHOLE, again=True)
    assert isinstance(bad, Supplied)
    assert not bad.have.good
    held, _ = far.supplied(*WHOLE)
    assert (held.shared, content(held)) == (False, far.blob)


def test_a_change_outside_of_what_a_rank_needs_is_none_of_its_business(far: Machine) -> None:
    far.fetch(kept=far.kept)
    far.supplied(ChunkSpan(0, 0, 1))
    flip(far, 2 * CHUNK_BYTES + 1)
    again = far.demand(ChunkSpan(0, 0, 1), again=True)
    assert isinstance(again, Supplied)
    assert again.have.good


def test_a_rank_of_which_nothing_is_known_must_load_anew(far: Machine) -> None:
    far.fetch(kept=far.kept)
    far.supplied(*WHOLE)
    again = far.demand(*WHOLE, rank=3, again=True)
    assert isinstance(again, Supplied)
    assert not again.have.good


def test_a_file_that_takes_the_name_of_a_verified_one_is_not_looked_at(near: Machine) -> None:
    near.fetch()
    held, _ = near.supplied(*WHOLE)
    path = blob_file(near)
    path.unlink()
    path.write_bytes(bytes(SIZE))
    assert content(held) == near.blob


def test_a_rank_that_cannot_look_again_gets_a_copy(far: Machine) -> None:
    far.fetch(kept=far.kept)
    held, tiers = far.supplied(private=True, whole=True)
    assert (held.shared, tiers, content(held)) == (False, {"arena": SIZE}, far.blob)
    flip(far, 9)
    assert content(held) == far.blob


def test_an_arena_that_is_written_all_the_time_never_yields_other_bytes(far: Machine) -> None:
    """Ranks of a new attempt may fill their slot while another one still restores out of it."""
    stop = threading.Event()
    rng = random.Random(5)

    def scribble() -> None:
        while not stop.wait(rng.random() / 50):
            flip(far, rng.randrange(SIZE))

    writer = threading.Thread(target=scribble)
    writer.start()
    loaded = 0
    try:
        for number in range(12):
            os.pwrite(far.arena, far.blob, 0)
            source = DemandSource(far.fetch(kept=far.kept, ident=f"f{number}"), far)
            for _ in range(3):
                source.want([Range(0, 0, SIZE)])
                copied = bytes(source.view(0, 0, SIZE))
                if source.is_still_good():
                    assert copied == far.blob
                    loaded += 1
                    break
            far.fetcher.release(f"f{number}")()
    finally:
        stop.set()
        writer.join()
    assert loaded == 12


# Ranks that verify what they read ----------------------------------------------------


def test_a_rank_that_verifies_is_told_the_place_as_it_is(near: Machine) -> None:
    flip(near, 5)
    near.fetch(kept=near.kept)
    held, tiers = near.supplied(*WHOLE, unverified=True)
    assert (held.shared, held.place.path, tiers) == (True, near.shared_path(), {"arena": SIZE})


def test_a_place_that_such_a_rank_finds_good_stays_even_if_it_doubts_it(near: Machine) -> None:
    near.fetch(kept=near.kept)
    near.supplied(*WHOLE, unverified=True)
    said = near.demand(ChunkSpan(0, 1, 1), again=True, unverified=True)
    assert isinstance(said, Supplied)
    assert said.have.good
    assert near.supplied(*WHOLE, unverified=True)[0].place.path == near.shared_path()


def test_bytes_that_such_a_rank_found_bad_come_from_the_next_tier_and_the_next(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    machine = cached(tmp_path, LocalBlobs(tmp_path / "store"))
    flip(machine, CHUNK_BYTES)
    (kept,) = cache_files(tmp_path)
    kept.write_bytes(bytes(SIZE))
    machine.fetch(kept=machine.kept)
    bad = ChunkSpan(0, 1, 1)
    machine.supplied(*WHOLE, unverified=True)
    seen = []
    for _ in range(2):
        again = machine.demand(bad, again=True, unverified=True)
        assert isinstance(again, Supplied)
        assert not again.have.good
        held, tiers = machine.supplied(bad, unverified=True)
        seen.append(tiers)
    # What came before the bad chunk was right, and is not fetched anew.
    rest = SIZE - CHUNK_BYTES
    assert seen == [{"arena": rest, "cache": CHUNK_BYTES}, {"arena": rest, "store": CHUNK_BYTES}]
    assert (held.shared, content(held)) == (True, machine.blob)


def test_where_no_tier_is_good_the_evidence_names_the_chunk_in_the_store(near: Machine) -> None:
    data = bytearray(near.blob)
    data[2 * CHUNK_BYTES] ^= 1
    blob_file(near).write_bytes(data)
    near.fetch()
    bad = ChunkSpan(0, 2, 1)
    near.supplied(*WHOLE, unverified=True)
    again = near.demand(bad, again=True, unverified=True)
    assert isinstance(again, Supplied)
    assert not again.have.good
    failed = near.demand(bad, unverified=True)
    assert isinstance(failed, FetchFailed)
    assert failed.bad is not None
    assert (failed.bad.seq, failed.bad.chunk, failed.bad.blob) == (7, 2, near.kept[0].key)


def test_a_file_that_is_cut_short_under_way_ends_nobody(near: Machine) -> None:
    """Looked at through a mapping, it would end the transfer process."""
    near.fetch()
    near.supplied(*WHOLE, unverified=True)
    os.truncate(blob_file(near), CHUNK_BYTES)
    again = near.demand(*WHOLE, again=True, unverified=True)
    assert isinstance(again, Supplied)
    assert not again.have.good
    failed = near.demand(ChunkSpan(0, 2, 1), unverified=True)
    assert isinstance(failed, FetchFailed)
    assert failed.bad is not None
    assert (failed.bad.chunk, failed.bad.found) == (2, "short")


def test_another_rank_is_sent_on_from_a_place_that_was_given_up(near: Machine) -> None:
    near.fetch(kept=near.kept)
    near.supplied(*WHOLE, unverified=True, rank=0)
    near.supplied(*WHOLE, unverified=True, rank=1)
    flip(near, 5)
    for rank in (0, 1):
        again = near.demand(ChunkSpan(0, 0, 1), rank=rank, again=True, unverified=True)
        assert isinstance(again, Supplied)
        assert not again.have.good
        held, _ = near.supplied(ChunkSpan(0, 0, 1), rank=rank, unverified=True)
        assert content(held) == near.blob


def test_what_is_nowhere_near_is_verified_on_its_way_for_every_rank(far: Machine) -> None:
    far.fetch()
    held, tiers = far.supplied(*WHOLE, unverified=True)
    assert (held.shared, content(held), tiers) == (False, far.blob, {"store": SIZE})


def test_nothing_that_lies_here_is_verified_before_a_rank_has_asked(
    near: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_chunks.Chunks, "_fits", lambda *_: pytest.fail("it was looked at"))
    near.fetch()
    held, tiers = near.supplied(*WHOLE, unverified=True)
    assert (held.shared, tiers) == (True, {"store": SIZE})


def test_an_arena_that_is_written_all_the_time_fills_no_rank_with_other_bytes(
    far: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "_provided", digest.crc32c)
    stop = threading.Event()
    rng = random.Random(5)

    def scribble() -> None:
        while not stop.wait(rng.random() / 50):
            flip(far, rng.randrange(SIZE))

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        for number in range(12):
            os.pwrite(far.arena, far.blob, 0)
            source = DemandSource(far.fetch(kept=far.kept, ident=f"f{number}"), far)
            held = bytearray(SIZE)
            source.fill([Into(0, 0, memoryview(held))])
            assert held == far.blob
            far.fetcher.release(f"f{number}")()
    finally:
        stop.set()
        writer.join()


# The cache -----------------------------------------------------------------------


def cached(tmp_path: Path, store: BlobStore, size: int = 4 * SIZE) -> Machine:
    return Machine(store, Cache(tmp_path / "cache", size))


def cache_files(tmp_path: Path, part: str = "blobs") -> list[Path]:
    return sorted((tmp_path / "cache" / part).glob("[!.]*"))


def test_a_blob_is_kept_beside_its_upload_and_found_when_the_arena_is_gone(tmp_path: Path) -> None:
    machine = cached(tmp_path, Counting())
    machine.fetch()
    held, tiers = machine.supplied(*WHOLE)
    assert (tiers, content(held)) == ({"cache": SIZE}, machine.blob)
    assert reads(machine) == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_a_harmed_cache_costs_a_read_and_nothing_else(tmp_path: Path, harm: str) -> None:
    machine = cached(tmp_path, Counting())
    (path,) = cache_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[CHUNK_BYTES] ^= 1
    changes: dict[str, Callable[[], object]] = {
        "flip": lambda: path.write_bytes(data),
        "truncate": lambda: path.write_bytes(machine.blob[:-1]),
        "empty": lambda: path.write_bytes(b""),
        "delete": path.unlink,
    }
    changes[harm]()
    machine.fetch()
    held, tiers = machine.supplied(*WHOLE)
    assert content(held) == machine.blob
    assert tiers == (
        {"cache": SIZE - CHUNK_BYTES, "store": CHUNK_BYTES} if harm == "flip" else {"store": SIZE}
    )


def test_what_came_from_the_store_is_kept_for_the_next_time(tmp_path: Path) -> None:
    machine = cached(tmp_path, Counting())
    for path in cache_files(tmp_path):
        path.unlink()
    machine.fetch()
    machine.supplied(*WHOLE)
    machine.fetcher.release("f1")()
    (path,) = cache_files(tmp_path)
    assert path.read_bytes() == machine.blob
    machine.fetch(ident="f2")
    assert machine.supplied(*WHOLE)[1] == {"cache": SIZE}


def test_the_oldest_blobs_go_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 250)
    for number in range(5):
        cache.keep(f"c/j/u/blobs/{number:020d}/1-n/0.st", [bytes(100)], 100)
        for order, path in enumerate(cache_files(tmp_path)):
            os.utime(path, ns=(order, order))
    found = [cache.find(f"c/j/u/blobs/{number:020d}/1-n/0.st") is not None for number in range(5)]
    assert found == [False, False, False, True, True]
    cache.keep("c/j/u/blobs/9/1-n/0.st", [bytes(251)], 251)
    assert cache.find("c/j/u/blobs/9/1-n/0.st") is None


def test_a_smaller_bound_holds_from_the_start(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    for number in range(5):
        cache.keep(f"c/j/u/blobs/{number:020d}/1-n/0.st", [bytes(100)], 100)
    (tmp_path / "cache" / "blobs" / ".incoming-0000").write_bytes(b"half")
    Cache(tmp_path / "cache", 300)
    assert len(list((tmp_path / "cache" / "blobs").iterdir())) == 3
    Cache(tmp_path / "cache", 0)
    assert not list((tmp_path / "cache" / "blobs").iterdir())


def test_blobs_of_an_aborted_checkpoint_do_not_stay(tmp_path: Path) -> None:
    machine = cached(tmp_path, Counting())
    order = CancelUpload(JOB, UID, Seq(8))
    machine.cache.forget(order.uid, order.seq)
    assert len(cache_files(tmp_path)) == 1
    machine.cache.forget(UID, Seq(7))
    assert cache_files(tmp_path) == []


def test_without_room_no_blob_is_kept(tmp_path: Path) -> None:
    machine = cached(tmp_path, Counting(), 0)
    assert cache_files(tmp_path) == []
    machine.fetch()
    assert machine.supplied(*WHOLE)[1] == {"store": SIZE}


def test_a_cache_that_cannot_be_written_costs_nothing_but_itself(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    machine = cached(tmp_path, Counting())
    machine.fetch()
    assert machine.supplied(*WHOLE)[1] == {"store": SIZE}


def test_a_manifest_is_kept_at_the_commit_and_read_once(tmp_path: Path) -> None:
    machine = cached(tmp_path, Counting())
    order = KeepManifest(machine.store.uri, machine.order.manifest, machine.order.digest)
    machine.fetcher.keep_manifest(order)
    machine.store.delete(machine.order.manifest)
    machine.fetcher.keep_manifest(order)
    machine.fetch()
    machine.supplied(*WHOLE)


def test_another_manifest_than_the_committed_one_is_neither_kept_nor_used(tmp_path: Path) -> None:
    machine = cached(tmp_path, Counting())
    machine.fetcher.keep_manifest(KeepManifest(machine.store.uri, machine.order.manifest, "0" * 64))
    assert cache_files(tmp_path, "manifests") == []
    machine.fetch()
    (path,) = cache_files(tmp_path, "manifests")
    path.write_bytes(gzip.compress(b"{}"))
    machine.fetch(ident="f2")
    assert machine.supplied(*WHOLE)[1] == {"cache": SIZE}
    assert [key for key, _ in machine.store.reads if "manifests" in key] == [machine.order.manifest] * 3  # type: ignore[attr-defined]


def test_manifests_are_bounded(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for number in range(40):
        cache.keep_manifest(f"{number:064x}", b"x")
    assert len(cache_files(tmp_path, "manifests")) == 16
