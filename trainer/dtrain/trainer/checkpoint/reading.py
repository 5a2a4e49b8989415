"""Bytes of a checkpoint from a file straight into the memory they are for, and verified there.

The digest is computed from the destination, block by block right after each was
read: no bytes but those that training will use are looked at, once, while they
are still in the core's own cache. Nobody can change them in between, whoever
else may write to the file.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.checksum import Crc32c
from dtrain.protocol.errors import ErrorCode, Refused

BLOCK_BYTES = 512 * 1024
"""Read and then verified at a time."""

LANES = min(4, os.cpu_count() or 1)
LANES_FROM_BYTES = 64 * 1024**2

_BUFFERS_MAX = 512  # of one system call; Linux takes 1024

Chunk = tuple[int, int]
"""Number of the blob, number of the chunk in it."""


@dataclass(frozen=True, slots=True)
class Into:
    """The bytes of blob ``blob`` from ``offset`` on, as many as ``memory`` holds, belong there."""

    blob: int
    offset: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class Piece:
    """As ``Into``, counted from the start of a chunk."""

    start: int
    memory: memoryview


def by_chunk(manifest: Manifest, parts: Sequence[Into]) -> dict[Chunk, list[Piece]]:
    """Cut the parts at the chunks, the units of verification.

    Raises:
        Refused: RESTORE_FAILED; a part reaches beyond its blob, or shares bytes with another one.
    """
    size = manifest.chunk_bytes
    found: dict[Chunk, list[Piece]] = {}
    blob, end = -1, 0
    for part in sorted(parts, key=lambda one: (one.blob, one.offset)):
        begin = 0 if part.blob != blob else end
        blob, end = part.blob, part.offset + len(part.memory)
        if not 0 <= blob < len(manifest.blobs) or part.offset < begin or end > manifest.blobs[blob].bytes:
            raise Refused(
                ErrorCode.RESTORE_FAILED, f"bytes {part.offset}..{end} of blob {blob} cannot be read"
            )
        at = part.offset
        while at < end:
            number = at // size
            stop = min(end, (number + 1) * size)
            memory = part.memory[at - part.offset : stop - part.offset]
            found.setdefault((blob, number), []).append(Piece(at - number * size, memory))
            at = stop
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a blob begins in an open file."""

    fd: int
    offset: int


class Reader:
    """Reads chunks of one checkpoint, on a few threads if there is much to read."""

    def __init__(self, manifest: Manifest, crc32c: Crc32c) -> None:
        self._manifest = manifest
        self._crc32c = crc32c

    def read(self, wanted: dict[Chunk, list[Piece]], places: dict[Chunk, Place]) -> list[Chunk]:
        """Fill all pieces; return the chunks that are not what was committed.

        ``places`` tells of each chunk where its blob begins.
        """
        size_bytes = len(wanted) * self._manifest.chunk_bytes
        lanes = LANES if size_bytes >= LANES_FROM_BYTES else 1
        if lanes == 1:
            spare = memoryview(bytearray(BLOCK_BYTES))
            return [chunk for chunk in wanted if not self._is_good(chunk, wanted, places, spare)]
        chunks = iter(wanted)  # each thread takes the next one: no two get the same
        with ThreadPoolExecutor(lanes, thread_name_prefix="restore") as pool:
            bad = [pool.submit(self._work, chunks, wanted, places) for _ in range(lanes)]
        return sorted(chunk for lane in bad for chunk in lane.result())

    def _work(
        self, chunks: Iterator[Chunk], wanted: dict[Chunk, list[Piece]], places: dict[Chunk, Place]
    ) -> list[Chunk]:
        spare = memoryview(bytearray(BLOCK_BYTES))
        return [chunk for chunk in chunks if not self._is_good(chunk, wanted, places, spare)]

    def _is_good(
        self, chunk: Chunk, wanted: dict[Chunk, list[Piece]], places: dict[Chunk, Place], spare: memoryview
    ) -> bool:
        """``spare`` takes what lies between the pieces: it is read for the digest alone."""
        index, number = chunk
        blob, place = self._manifest.blobs[index], places[chunk]
        start = number * self._manifest.chunk_bytes
        length = min(self._manifest.chunk_bytes, blob.bytes - start)
        at, value = place.offset + start, 0
        with contextlib.suppress(OSError):
            os.posix_fadvise(place.fd, at, length, os.POSIX_FADV_WILLNEED)
        for buffers in _blocks(length, wanted[chunk], spare):
            size = sum(len(buffer) for buffer in buffers)
            try:
                if os.preadv(place.fd, buffers, at) != size:
                    return False  # the file was cut short
            except OSError:
                return False
            for buffer in buffers:
                value = self._crc32c(buffer, value)
            at += size
        return f"{value:08x}" == blob.chunks[number]


def _blocks(length: int, pieces: Sequence[Piece], spare: memoryview) -> Iterator[list[memoryview]]:
    """A chunk's memory, piece by piece with what lies between, in blocks of at most ``BLOCK_BYTES``."""
    block: list[memoryview] = []
    room = BLOCK_BYTES
    for size, memory in _runs(length, pieces):
        done = 0
        while done < size:
            take = min(room, size - done)
            if memory is None:
                at = BLOCK_BYTES - room
                block.append(spare[at : at + take])
            else:
                block.append(memory[done : done + take])
            done += take
            room -= take
            if room == 0 or len(block) == _BUFFERS_MAX:
                yield block
                block, room = [], BLOCK_BYTES
    if block:
        yield block


def _runs(length: int, pieces: Sequence[Piece]) -> Iterator[tuple[int, memoryview | None]]:
    at = 0
    for piece in pieces:
        if piece.start > at:
            yield piece.start - at, None
        yield len(piece.memory), piece.memory
        at = piece.start + len(piece.memory)
    if at < length:
        yield length - at, None
