"""Where a restoring rank gets verified bytes from: it says once what it needs, then looks at it.

``restore.load`` walks the tracked state, collects the ranges of the checkpoint's
blobs that this rank needs, calls ``want`` once, and copies each region straight
from a ``view`` into its destination.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ranklink import BlobPlace, RestorePlan


@dataclass(frozen=True, slots=True)
class Range:
    """``length`` bytes from ``offset`` of blob ``blob`` of the manifest."""

    blob: int
    offset: int
    length: int


class Source(Protocol):
    """The bytes of one checkpoint."""

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint holds.

        Raises:
            Refused: RESTORE_FAILED.
        """
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


class PlanSource:
    """The bytes behind a ``RestorePlan``, mapped: ranks of one machine share the pages."""

    def __init__(self, plan: RestorePlan) -> None:
        self._plan = plan
        self._manifest: Manifest | None = None
        self._maps: dict[int, memoryview] = {}
        self._wanted: set[tuple[int, int]] = set()

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            plan = self._plan
            place = BlobPlace(plan.manifest_path, plan.manifest_offset, plan.manifest_bytes)
            try:
                text = bytes(_mapped(place))
                manifest = codec.decode(Manifest, text, bytes_max=max(1, plan.manifest_bytes))
            except DtrainError as error:
                if error.code is ErrorCode.RESTORE_FAILED:
                    raise
                message = f"the manifest of checkpoint {plan.seq}: {error}"
                raise Refused(ErrorCode.RESTORE_FAILED, message, fix=error.fix) from error
            if len(plan.blobs) != len(manifest.blobs):
                raise Refused(
                    ErrorCode.RESTORE_FAILED,
                    f"{len(plan.blobs)} blobs came for the manifest's {len(manifest.blobs)}",
                )
            self._manifest = manifest
        return self._manifest

    def want(self, ranges: Sequence[Range]) -> None:
        for one in ranges:
            self._wanted.update((one.blob, number) for number in chunks_of(self.manifest, one))

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        asked = chunks_of(self.manifest, Range(blob, offset, length))
        if any((blob, number) not in self._wanted for number in asked):
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"bytes {offset}..{offset + length} of blob {blob} were not asked for",
            )
        if length == 0:
            return memoryview(b"")
        found = self._maps.get(blob)
        if found is None:
            found = self._maps[blob] = _mapped(self._plan.blobs[blob])
        return found[offset : offset + length]


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


def _mapped(place: BlobPlace) -> memoryview:
    """The bytes of ``place`` of a file or memfd, read-only; the mapping goes with the last view of it."""
    if place.size_bytes == 0:
        return memoryview(b"")
    start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
    try:
        fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < place.offset + place.size_bytes:
                raise Refused(ErrorCode.RESTORE_FAILED, f"{place.path} is shorter than announced")
            length = place.offset - start + place.size_bytes
            mapping = mmap.mmap(fd, length, offset=start, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
    except OSError as error:
        raise Refused(
            ErrorCode.RESTORE_FAILED, f"cannot open the fetched bytes at {place.path}: {error.strerror}"
        ) from error
    skip = place.offset - start
    return memoryview(mapping)[skip : skip + place.size_bytes]
