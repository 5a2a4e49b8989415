"""What the transfer process tells of bytes on their way: counted where they move, told while they do."""

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.unit.agent.test_transfer import JOB, UID, sealed, upload
from tests.unit.agent.test_transfer_demand import SIZE, Machine

from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transfer_moves import QUIET_AFTER_S, Observer
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import FetchMoved, Moved, PartMoved
from dtrain.protocol.checkpoint import CHUNK_BYTES
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.protocol.ids import Rank, Seq
from dtrain.protocol.ranklink import ChunkSpan, Sealed
from dtrain.storage.blobs.flow import PIECE_BYTES, Flow, Stopped
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobInfo

__all__ = ["sealed"]


class Stepping(MemoryBlobs):
    """Takes a blob piece by piece, each when it is let, and fails where it is told to."""

    def __init__(self, *sizes: int) -> None:
        super().__init__("stepping")
        self.sizes = list(sizes)
        """What each try takes before it fails; then all is taken."""
        self.taken = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        assert flow is not None
        if self.sizes:
            flow.confirmed(self.sizes.pop(0))
            self.taken.release()
            assert self.go.acquire(timeout=20)
            raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "down")
        return super().put(key, parts, chunk_crcs=chunk_crcs, flow=flow)


def test_a_try_that_begins_anew_does_not_take_back_what_was_told(sealed: Sealed) -> None:
    store = Stepping(1000, 10, 1500)
    uploader = Uploader(lambda _uri: store, lambda _report: None)
    thread = threading.Thread(target=uploader.run, args=(upload(sealed),))
    thread.start()
    told = []
    for _ in range(3):
        assert store.taken.acquire(timeout=20)
        told.append(uploader.progress())
        store.go.release()
    thread.join(20)
    assert told == [(PartMoved(JOB, UID, Seq(7), Rank(0), size),) for size in (1000, 1000, 1500)]
    assert uploader.progress() == ()


def test_a_folder_tells_of_bytes_before_the_blob_is_whole(sealed: Sealed, tmp_path: Path) -> None:
    seen: list[int] = []
    uploader = Uploader(lambda _uri: LocalBlobs(tmp_path), lambda _report: None)

    def pace(_size: int) -> float:
        seen.extend(part.done_bytes for part in uploader.progress())
        return 0.0

    uploader._pace = lambda _order: pace  # type: ignore[method-assign]
    uploader.run(upload(sealed))
    assert seen[:3] == [0, PIECE_BYTES, 2 * PIECE_BYTES]
    assert seen == sorted(seen)
    # What is last is the manifest: it is not of the snapshot's bytes.
    assert seen[-1] == sealed.size_bytes


def test_more_than_there_is_is_never_told(sealed: Sealed) -> None:
    store = Stepping(10 * sealed.size_bytes)
    uploader = Uploader(lambda _uri: store, lambda _report: None)
    thread = threading.Thread(target=uploader.run, args=(upload(sealed),))
    thread.start()
    assert store.taken.acquire(timeout=20)
    assert [part.done_bytes for part in uploader.progress()] == [sealed.size_bytes]
    store.go.release()
    thread.join(20)


def test_a_stopped_upload_is_told_no_more(sealed: Sealed) -> None:
    uploader = Uploader(lambda _uri: MemoryBlobs("m"), lambda _report: None)

    def pace(_size: int) -> float:
        raise Stopped

    uploader._pace = lambda _order: pace  # type: ignore[method-assign]
    with contextlib.suppress(Exception):
        uploader.run(upload(sealed))
    assert uploader.progress() == ()


def test_a_fetch_counts_each_chunk_once_however_many_ranks_ask(tmp_path: Path) -> None:
    machine = Machine(MemoryBlobs("counted"))
    machine.order = replace(machine.order, world=9)
    machine.fetch()
    # All of a small checkpoint is begun with; who asks waits for it.
    machine.supplied(ChunkSpan(0, 0, 3))
    whole = (FetchMoved("f1", SIZE, SIZE),)
    assert machine.fetcher.progress() == whole
    machine.supplied(ChunkSpan(0, 1, 1), rank=1)
    assert machine.fetcher.progress() == whole
    machine.fetcher.release("f1")()
    assert machine.fetcher.progress() == ()


def test_what_lies_here_counts_when_a_rank_is_told_the_place(tmp_path: Path) -> None:
    machine = Machine(MemoryBlobs("local"), Cache(tmp_path / "cache", 10 * SIZE))
    machine.fetch(kept=machine.kept)
    assert machine.fetcher.progress() == ()
    machine.supplied(ChunkSpan(0, 0, 1), unverified=True)
    assert machine.fetcher.progress() == (FetchMoved("f1", CHUNK_BYTES, CHUNK_BYTES),)
    machine.supplied(ChunkSpan(0, 1, 2), unverified=True)
    assert machine.fetcher.progress() == (FetchMoved("f1", SIZE, SIZE),)


def test_it_is_told_while_something_moves_and_for_a_while_after() -> None:
    now, found = 100.0, Moved()
    observer = Observer(lambda: found, lambda: now)
    assert observer.news() is None
    found = Moved((PartMoved(JOB, UID, Seq(7), Rank(0), 1),))
    assert observer.news() == found
    now += QUIET_AFTER_S
    assert observer.news() == found
    now += 1.0
    assert observer.news() is None
    found = Moved((PartMoved(JOB, UID, Seq(7), Rank(0), 2),))
    assert observer.news() == found
    found = Moved()
    assert observer.news() is None
