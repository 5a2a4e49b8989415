"""Where a restoring rank gets verified bytes from: it says once what it needs, then looks at it.

``restore.load`` walks the tracked state and collects the ranges of the checkpoint's
blobs that this rank needs. A source with a ``filler`` reads them straight into their
destinations and verifies them there. From any other one they are wanted once, each
region is copied from a ``view``, and used if all ``is_still_good``.
"""

import contextlib
import logging
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dtrain.protocol import checksum, codec
from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ranklink import BlobPlace, ChunkSpan, Have, Held, RestorePlan
from dtrain.trainer.checkpoint.reading import Chunk, Into, Place, Reader, by_chunk

SPANS_MAX = 8192
"""Beyond, all of the checkpoint is asked for: a report must fit its line."""

OTHER_PLAN_S = 120.0
"""How long an agent that went away may take to come back with another plan."""

READS_MAX = 6
"""How often bytes that are not the committed ones are read: each time from the next place that has them."""

log = logging.getLogger("dtrain.trainer")


@dataclass(frozen=True, slots=True)
class Range:
    """``length`` bytes from ``offset`` of blob ``blob`` of the manifest."""

    blob: int
    offset: int
    length: int


class Filler(Protocol):
    """Reads bytes to where they belong and verifies them there."""

    def expect(self, ranges: Sequence[Range]) -> None:
        """Say what will be filled, so that all of it can be on its way from the first ``fill`` on."""
        ...

    def fill(self, parts: Sequence[Into]) -> None:
        """Return when all of them hold what was committed. No two may share bytes.

        Raises:
            Refused: RESTORE_FAILED; it cannot be had. The parts hold anything then.
        """
        ...


class Source(Protocol):
    """The bytes of one checkpoint."""

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint holds.

        Raises:
            Refused: RESTORE_FAILED.
        """
        ...

    @property
    def filler(self) -> "Filler | None":
        """Who reads straight into the destinations, in place of all that follows; None: nobody here."""
        ...

    def want(self, ranges: Sequence[Range]) -> None:
        """Return when all of them are there and verified. Empty ranges and repeated calls are fine.

        Raises:
            Refused: RESTORE_FAILED; they cannot be had, or reach beyond their blob.
        """
        ...

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        """Read-only, without a copy; inside of what was wanted.

        Valid for as long as somebody holds it.

        Raises:
            Refused: RESTORE_FAILED; these bytes were not wanted.
        """
        ...

    def is_still_good(self) -> bool:
        """Whether all that was viewed so far was right all the time.

        If not, nothing that was copied may be used: want, view and copy all of it anew.
        """
        ...


class _Gone(Refused):
    """The process that held the bytes has ended; its successor will have them again."""


class Asker(Protocol):
    """The rank's side of the link: see ``session.Session``."""

    def ask(
        self,
        token: str,
        chunks: Sequence[ChunkSpan],
        *,
        whole: bool = False,
        again: bool = False,
        unverified: bool = False,
    ) -> Have | None: ...

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None: ...


class PlanSource:
    """The bytes behind a ``RestorePlan`` that has them all, mapped: ranks of one machine share the pages."""

    def __init__(self, plan: RestorePlan) -> None:
        self._plan = plan
        self._manifest: Manifest | None = None
        self._maps: dict[int, memoryview] = {}
        self._wanted: set[tuple[int, int]] = set()

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = _read_manifest(self._plan)
            if len(self._plan.blobs) != len(self._manifest.blobs):
                raise Refused(
                    ErrorCode.RESTORE_FAILED,
                    f"{len(self._plan.blobs)} blobs came for the manifest's {len(self._manifest.blobs)}",
                )
        return self._manifest

    @property
    def filler(self) -> None:
        return None

    def want(self, ranges: Sequence[Range]) -> None:
        for one in ranges:
            self._wanted.update((one.blob, number) for number in chunks_of(self.manifest, one))

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        _check_wanted(self.manifest, self._wanted, blob, offset, length)
        if length == 0:
            return memoryview(b"")
        found = self._maps.get(blob)
        if found is None:
            found = self._maps[blob] = _mapped(self._plan.blobs[blob])
        return found[offset : offset + length]

    def is_still_good(self) -> bool:
        """It is: these bytes were copied for this restore alone."""
        return True


class DemandSource:
    """Asks the agent for what is wanted, and reads it where it lies.

    That may be a place which others can write to. So ``fill`` verifies what it has
    read. Without a CRC32C in this process everything is mapped, the agent verifies,
    and whoever has copied what it needs must ask ``is_still_good``.
    """

    def __init__(self, plan: RestorePlan, asker: Asker) -> None:
        self._plan = plan
        self._asker = asker
        self._manifest: Manifest | None = None
        self._wanted: set[tuple[int, int]] = set()
        self._places: dict[int, Held] = {}
        self._maps: dict[int, memoryview] = {}
        self._moved = False
        self._expected: set[Chunk] = set()
        self._told: dict[Chunk, BlobPlace] = {}

    @property
    def manifest(self) -> Manifest:
        while self._manifest is None:
            try:
                self._manifest = _read_manifest(self._plan)
            except _Gone as error:
                self._follow(error)
        return self._manifest

    @property
    def filler(self) -> "DemandSource | None":
        return None if checksum.provided() is None else self

    def expect(self, ranges: Sequence[Range]) -> None:
        for one in ranges:
            self._expected.update((one.blob, number) for number in chunks_of(self.manifest, one))

    def fill(self, parts: Sequence[Into]) -> None:
        crc32c = checksum.provided()
        assert crc32c is not None, "see filler"
        reader = Reader(self.manifest, crc32c)
        left = by_chunk(self.manifest, parts)
        reads = 0
        while left:
            try:
                self._locate(left)
                with contextlib.ExitStack() as files:
                    bad = reader.read(left, self._opened(left, files))
                left = {chunk: left[chunk] for chunk in bad}
                reads += 1
                if bad:
                    self._report(bad, last=reads == READS_MAX)
            except _Gone as error:
                self._told = {}
                self._follow(error)

    def want(self, ranges: Sequence[Range]) -> None:
        for one in ranges:
            self._wanted.update((one.blob, number) for number in chunks_of(self.manifest, one))
        if not self._wanted:
            return
        spans = spans_of(self._wanted)
        while True:
            whole = len(spans) > SPANS_MAX
            have = self._asker.ask(self._plan.token, () if whole else spans, whole=whole)
            try:
                if have is None:
                    raise _Gone(ErrorCode.RESTORE_FAILED, "the agent no longer holds the checkpoint")
                self._take(have)
            except _Gone as error:
                self._follow(error)
            else:
                return

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        _check_wanted(self.manifest, self._wanted, blob, offset, length)
        return self._maps[blob][offset : offset + length] if length else memoryview(b"")

    def is_still_good(self) -> bool:
        shared = any(held.shared for held in self._places.values())
        if shared and not self._moved:
            spans = spans_of(self._wanted)
            whole = len(spans) > SPANS_MAX
            have = self._asker.ask(self._plan.token, () if whole else spans, whole=whole, again=True)
            self._moved = have is None or not have.good
        moved, self._moved = self._moved, False
        if moved:
            self._places, self._maps = {}, {}
        return not moved

    def _ask(self, chunks: Iterable[Chunk], *, again: bool = False) -> Have:
        spans = spans_of(chunks)
        whole = len(spans) > SPANS_MAX
        have = self._asker.ask(
            self._plan.token, () if whole else spans, whole=whole, again=again, unverified=True
        )
        if have is None:
            raise _Gone(ErrorCode.RESTORE_FAILED, "the agent no longer holds the checkpoint")
        return have

    def _locate(self, wanted: Mapping[Chunk, object]) -> None:
        """Know where these chunks lie. The first time, everything that is expected is asked for with them."""
        if wanted.keys() <= self._told.keys():
            return
        asked = (self._expected | wanted.keys()) - self._told.keys()
        places = {held.blob: held.place for held in self._ask(asked).blobs}
        for blob, number in asked:
            if blob not in places:
                raise Refused(ErrorCode.RESTORE_FAILED, f"the agent does not say where blob {blob} is")
            self._told[blob, number] = places[blob]

    def _opened(self, wanted: Iterable[Chunk], files: contextlib.ExitStack) -> dict[Chunk, Place]:
        """Where the blobs of these chunks begin; ``files`` closes them."""
        fds: dict[str, int] = {}
        found: dict[Chunk, Place] = {}
        for chunk in wanted:
            place = self._told[chunk]
            fd = fds.get(place.path)
            if fd is None:
                fd = fds[place.path] = _open(place.path)
                files.callback(os.close, fd)
            found[chunk] = Place(fd, place.offset)
        return found

    def _report(self, bad: Sequence[Chunk], *, last: bool) -> None:
        """Have the agent look at them: it tells another place, or ends the restore if there is none."""
        blob, number = bad[0]
        what = f"chunk {number} of {self.manifest.blobs[blob].key}, read from {self._told[bad[0]].path},"
        log.warning("%s and %d more are not what was committed", what, len(bad) - 1)
        if last:
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"{what} was not what was committed, {READS_MAX} times and wherever it lies",
                fix="have the memory of this machine checked",
            )
        for chunk in bad:
            del self._told[chunk]
        self._ask(bad, again=True)

    def _take(self, have: Have) -> None:
        for held in have.blobs:
            known = self._places.get(held.blob)
            if known == held:
                continue
            # What was viewed in the place before is not looked at again by anybody.
            self._moved = self._moved or (known is not None and known.shared)
            self._maps[held.blob] = _mapped(held.place)
            self._places[held.blob] = held

    def _follow(self, error: Refused) -> None:
        """Go on with the plan that replaces this one, if there is one: an agent may come back in between."""
        plan = self._asker.await_other_plan(self._plan.token, OTHER_PLAN_S)
        if plan is None or plan.seq != self._plan.seq or not plan.on_demand:
            raise error
        self._plan = plan


def chunks_of(manifest: Manifest, wanted: Range) -> range:
    """Numbers of the chunks, the units of verification, that hold these bytes.

    Raises:
        Refused: RESTORE_FAILED; they reach beyond the blob.
    """
    if not 0 <= wanted.blob < len(manifest.blobs):
        raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint has no blob {wanted.blob}")
    end = wanted.offset + wanted.length
    if wanted.offset < 0 or wanted.length < 0 or end > manifest.blobs[wanted.blob].bytes:
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"bytes {wanted.offset}..{end} reach beyond blob {wanted.blob}",
        )
    if wanted.length == 0:
        return range(0)
    return range(wanted.offset // manifest.chunk_bytes, (end - 1) // manifest.chunk_bytes + 1)


def spans_of(chunks: Iterable[tuple[int, int]]) -> list[ChunkSpan]:
    """Neighbouring chunks, each a (blob, number), put together."""
    found: list[ChunkSpan] = []
    for blob, number in sorted(chunks):
        last = found[-1] if found else None
        if last is not None and (last.blob, last.first + last.count) == (blob, number):
            found[-1] = ChunkSpan(blob, last.first, last.count + 1)
        else:
            found.append(ChunkSpan(blob, number, 1))
    return found


def _check_wanted(
    manifest: Manifest, wanted: set[tuple[int, int]], blob: int, offset: int, length: int
) -> None:
    asked = chunks_of(manifest, Range(blob, offset, length))
    if any((blob, number) not in wanted for number in asked):
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"bytes {offset}..{offset + length} of blob {blob} were not asked for",
        )


def _read_manifest(plan: RestorePlan) -> Manifest:
    place = BlobPlace(plan.manifest_path, plan.manifest_offset, plan.manifest_bytes)
    try:
        return codec.decode(Manifest, bytes(_mapped(place)), bytes_max=max(1, plan.manifest_bytes))
    except DtrainError as error:
        if error.code is ErrorCode.RESTORE_FAILED:
            raise
        message = f"the manifest of checkpoint {plan.seq}: {error}"
        raise Refused(ErrorCode.RESTORE_FAILED, message, fix=error.fix) from error


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _Gone(
            ErrorCode.RESTORE_FAILED, f"cannot open the fetched bytes at {path}: {error.strerror}"
        ) from error


def _mapped(place: BlobPlace) -> memoryview:
    """The bytes of ``place`` of a file or memfd, read-only; the mapping goes with the last view of it."""
    if place.size_bytes == 0:
        return memoryview(b"")
    start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
    try:
        fd = _open(place.path)
        try:
            if os.fstat(fd).st_size < place.offset + place.size_bytes:
                raise Refused(ErrorCode.RESTORE_FAILED, f"{place.path} is shorter than announced")
            length = place.offset - start + place.size_bytes
            mapping = mmap.mmap(fd, length, offset=start, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
    except OSError as error:
        raise _Gone(
            ErrorCode.RESTORE_FAILED, f"cannot open the fetched bytes at {place.path}: {error.strerror}"
        ) from error
    skip = place.offset - start
    return memoryview(mapping)[skip : skip + place.size_bytes]
