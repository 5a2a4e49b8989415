"""The chunks of one checkpoint on their way to the ranks of this machine.

If the whole blob lies in a file or arena here, ranks read it there: no copy is
made. Such a place is shared, others can write to it. A rank that verifies what it
has read is just told the place; if it found other bytes than were committed, this
side looks for itself and tells it the next place. For a rank that cannot, the chunks
are verified where they are, the rank copies what it needs and has the same chunks
verified *again*: bytes that were right before and after were right in between.

Where nothing lies here, or something of it is wrong, the blob's chunks come
into a memfd that nobody else writes to, each once for all ranks, verified there or
on its way, from the nearest tier whose bytes fit.
"""

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from dtrain.agent.transfer_tiers import Standing, Tier
from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry, Manifest
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ranklink import BlobPlace, Held, Need
from dtrain.storage.blobs import digest

LANES = min(8, max(4, os.cpu_count() or 1))
"""Chunks under way at once for one checkpoint: what bounds the memory beside the memfd, at one chunk each."""

Read = Callable[[BlobEntry, int, memoryview], None]
"""Fills the buffer with one chunk from the store, verified there; raises what ends the restore."""


class _Blob:
    """One blob. Guarded by the lock of its ``Chunks``."""

    def __init__(self, entry: BlobEntry, target: int) -> None:
        self.entry = entry
        self.target = target
        """Offset in the memfd."""
        self.places: list[Standing] | None = None
        """Where it lies here; None: nobody has looked yet."""
        self.shared: Standing | None = None
        """The place where ranks read it; None: the memfd."""
        self.version = 0
        """Raised whenever ``shared`` changes: what was verified in the former place counts no more."""
        self.tasks: dict[int, Future[None]] = {}
        """By chunk, of this version."""
        self.checks: dict[int, Future[bool]] = {}
        """Second looks that have not begun: whoever asks meanwhile shares them."""

    def numbers(self) -> range:
        return range(len(self.entry.chunks))

    def length(self, number: int) -> int:
        return min(CHUNK_BYTES, self.entry.bytes - number * CHUNK_BYTES)


class Chunks:
    """Brings chunks; safe to use from several threads.

    ``fd`` is the memfd, in which blobs begin at ``targets``. Not ``in_place``:
    nothing is read from shared places, all comes into the memfd.
    """

    def __init__(
        self,
        manifest: Manifest,
        fd: int,
        targets: Sequence[int],
        *,
        look: Callable[[BlobEntry], list[Standing]],
        read: Read,
        in_place: bool,
    ) -> None:
        self._manifest = manifest
        self._fd = fd
        self._path = f"/proc/{os.getpid()}/fd/{fd}"
        self._blobs = [_Blob(entry, at) for entry, at in zip(manifest.blobs, targets, strict=True)]
        self._look = look
        self._read = read
        self._in_place = in_place
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="lane")
        self._counted: dict[tuple[int, int], Tier] = {}
        self._counted_bytes = 0
        self._wanted: set[tuple[int, int]] = set()
        """Chunks that somebody asked for or that were begun with: every one counted is among them."""
        self._wanted_bytes = 0
        self._closed = False

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes supplied to the ranks so far, by the tier they came from."""
        with self._lock:
            found = dict.fromkeys((str(tier) for tier in Tier), 0)
            for (blob, number), tier in self._counted.items():
                found[tier] += self._blobs[blob].length(number)
        return found

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are at hand, and those that are wanted so far."""
        with self._lock:
            return self._counted_bytes, self._wanted_bytes

    def bring(self, blobs: Iterable[int]) -> None:
        """Begin with all chunks of these blobs, without waiting: a failure comes up when they are needed.

        What lies here is read from its disk, but not verified: most ranks do that themselves.
        """
        for index in blobs:
            blob = self._blobs[index]
            with self._lock:
                self._find(blob)
                shared = blob.shared
            if shared is None:
                self._begin(index, blob.numbers())
                continue
            for number in blob.numbers():  # on lanes: a slow disk may hold the caller up
                self._pool.submit(shared.expect, number * CHUNK_BYTES, blob.length(number))

    def supply(self, need: Need, *, private: bool = False) -> tuple[Held, ...]:
        """Return where the wanted chunks are once all of them are verified.

        ``need.unverified``: without looking at those that lie in shared places.

        Raises:
            Refused: BAD_RECORD; there is no such chunk.
            Exception: what the ``read`` of the store raised.
        """
        wanted = self._chunks(need)
        if private:
            for blob in wanted:
                self._turn_private(blob)
        while True:
            with self._lock:
                as_it_is = {blob for blob in wanted if need.unverified and self._lies_here(blob)}
            brought = {blob: numbers for blob, numbers in wanted.items() if blob not in as_it_is}
            tasks = [task for blob, numbers in brought.items() for task in self._begin(blob, numbers)]
            wait(tasks, return_when=FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
            with self._lock:
                # A bad chunk moves its whole blob to another place, and then nothing before counts.
                if all(self._is_there(blob, numbers) for blob, numbers in brought.items()) and all(
                    self._lies_here(blob) for blob in as_it_is
                ):
                    for blob in as_it_is:
                        self._count_unverified(blob, wanted[blob])
                    return tuple(self._held(blob) for blob in wanted)

    def check_again(self, need: Need, given: Sequence[Held]) -> bool:
        """Verify what a rank has read in shared places. False: it may have read something else.

        ``given`` is what ``supply`` had answered it. Of a blob that is damaged the next place
        is told then: to ranks that verify for themselves, else one that nobody else writes to.
        """
        wanted = self._chunks(need)
        checks: list[Future[bool]] = []
        with self._lock:
            for held in given:
                blob = self._blobs[held.blob]
                if not held.shared or held.blob not in wanted:
                    continue
                if blob.shared is None or blob.shared.path != held.place.path:
                    return False
                numbers = wanted[held.blob]
                checks += [self._check(held.blob, number, need.unverified) for number in numbers]
        # Wait for all of them: each may move its blob.
        results = [check.result() for check in checks]
        return all(results)

    def copies(self) -> list[tuple[BlobEntry, int]]:
        """Blobs that lie whole in the memfd and came from the store, with their offsets there."""
        with self._lock:
            return [
                (blob.entry, blob.target)
                for index, blob in enumerate(self._blobs)
                if blob.shared is None
                and blob.tasks
                and self._is_there(index, blob.numbers())
                and all(self._counted.get((index, number)) is Tier.STORE for number in blob.numbers())
            ]

    def close(self) -> None:
        """Stop. What ranks have mapped stays valid."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        for blob in self._blobs:
            for place in blob.places or ():
                place.close()

    # All below under the lock, or on a lane.

    def _chunks(self, need: Need) -> dict[int, range | list[int]]:
        if need.whole:
            return {index: blob.numbers() for index, blob in enumerate(self._blobs)}
        found: dict[int, set[int]] = {}
        for span in need.chunks:
            if not 0 <= span.blob < len(self._blobs):
                raise Refused(ErrorCode.BAD_RECORD, f"a rank asks for blob {span.blob}, which is not there")
            numbers = range(span.first, span.first + span.count)
            if numbers and not set(numbers) <= set(self._blobs[span.blob].numbers()):
                raise Refused(ErrorCode.BAD_RECORD, f"a rank asks for chunks beyond blob {span.blob}")
            found.setdefault(span.blob, set()).update(numbers)
        return {index: sorted(numbers) for index, numbers in sorted(found.items())}

    def _begin(self, index: int, numbers: Iterable[int]) -> list[Future[None]]:
        blob = self._blobs[index]
        with self._lock:
            self._find(blob)
            tasks = []
            for number in numbers:
                self._want(index, number)
                task = blob.tasks.get(number)
                if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
                    task = blob.tasks[number] = self._pool.submit(self._bring, index, number, blob.version)
                tasks.append(task)
        return tasks

    def _find(self, blob: _Blob) -> None:
        if blob.places is None:
            blob.places = self._look(blob.entry)
            if self._in_place and blob.places:
                blob.shared = blob.places[0]

    def _lies_here(self, index: int) -> bool:
        blob = self._blobs[index]
        self._find(blob)
        return blob.shared is not None

    def _count_unverified(self, index: int, numbers: Iterable[int]) -> None:
        shared = self._blobs[index].shared
        assert shared is not None
        for number in numbers:
            self._want(index, number)
            self._count_locked(index, number, shared.tier)

    def _turn_private(self, index: int) -> None:
        blob = self._blobs[index]
        with self._lock:
            self._find(blob)
            if blob.shared is not None:
                self._move(blob, None)

    def _move(self, blob: _Blob, to: Standing | None) -> None:
        blob.shared = to
        blob.version += 1
        blob.tasks = {}
        blob.checks = {}

    def _is_there(self, index: int, numbers: Iterable[int]) -> bool:
        tasks = self._blobs[index].tasks
        return all(
            number in tasks and tasks[number].done() and tasks[number].exception() is None
            for number in numbers
        )

    def _held(self, index: int) -> Held:
        blob = self._blobs[index]
        if blob.shared is not None:
            place = BlobPlace(blob.shared.path, blob.shared.offset, blob.entry.bytes)
            return Held(index, place, shared=True)
        return Held(index, BlobPlace(self._path, blob.target, blob.entry.bytes))

    def _bring(self, index: int, number: int, version: int) -> None:
        """On a lane: have one chunk verified where the blob is read."""
        blob = self._blobs[index]
        with self._lock:
            shared, places = blob.shared, list(blob.places or ())
            if blob.version != version:
                return  # nobody counts this task any more
        if shared is not None:
            if self._fits(blob, number, shared):
                self._count(index, number, shared.tier)
            else:
                with self._lock:
                    if blob.version == version:
                        self._move(blob, self._next(blob, shared))
            return
        for place in places:
            # A copy first, and then its digest: the place itself may change in between.
            data = place.copy_at(number * CHUNK_BYTES, blob.length(number))
            if digest.to_hex(digest.crc32c(data)) == blob.entry.chunks[number]:
                write_all(self._fd, data, blob.target + number * CHUNK_BYTES)
                self._count(index, number, place.tier)
                return
        self._read(blob.entry, number, self._private(blob, number))
        self._count(index, number, Tier.STORE)

    def _next(self, blob: _Blob, place: Standing) -> Standing | None:
        places = blob.places or []
        after = places.index(place) + 1
        return places[after] if after < len(places) else None

    def _check(self, index: int, number: int, onward: bool) -> Future[bool]:
        blob = self._blobs[index]
        check = blob.checks.get(number)
        if check is None:
            check = self._pool.submit(self._look_again, index, number, blob.version, onward)
            blob.checks[number] = check
        return check

    def _look_again(self, index: int, number: int, version: int, onward: bool) -> bool:
        blob = self._blobs[index]
        with self._lock:
            if blob.version != version or blob.shared is None:
                return False
            # From here on it is too early for whoever asks now.
            blob.checks.pop(number, None)
            shared = blob.shared
        if onward:
            # Maybe it was cut short, and then a look through the mapping would end this process.
            data = shared.copy_at(number * CHUNK_BYTES, blob.length(number))
            fits = digest.to_hex(digest.crc32c(data)) == blob.entry.chunks[number]
        else:
            fits = self._fits(blob, number, shared)
        if fits:
            return True
        with self._lock:
            if blob.version == version:
                self._move(blob, self._next(blob, shared) if onward else None)
        return False

    def _fits(self, blob: _Blob, number: int, place: Standing) -> bool:
        view = place.bytes_at(number * CHUNK_BYTES, blob.length(number))
        return digest.to_hex(digest.crc32c(view)) == blob.entry.chunks[number]

    def _private(self, blob: _Blob, number: int) -> memoryview:
        """The chunk's own place in the memfd: nobody looks there before the chunk is announced.

        It is unmapped with the last view of it.
        """
        mapping = mmap.mmap(self._fd, blob.length(number), offset=blob.target + number * CHUNK_BYTES)
        return memoryview(mapping)

    def _count(self, index: int, number: int, tier: Tier) -> None:
        with self._lock:
            self._count_locked(index, number, tier)

    def _count_locked(self, index: int, number: int, tier: Tier) -> None:
        if (index, number) not in self._counted:
            self._counted_bytes += self._blobs[index].length(number)
        self._counted[index, number] = tier

    def _want(self, index: int, number: int) -> None:
        if (index, number) not in self._wanted:
            self._wanted.add((index, number))
            self._wanted_bytes += self._blobs[index].length(number)


def laid_out(manifest: Manifest, first: int) -> tuple[list[int], int]:
    """Return where each blob begins from ``first`` on, and where the last one ends.

    Blobs begin on pages, so that ranks can map each by itself.
    """
    targets, offset = [], -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    for blob in manifest.blobs:
        targets.append(offset)
        offset += -(-blob.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return targets, offset


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write at an offset, however many calls it takes."""
    written = 0
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)
