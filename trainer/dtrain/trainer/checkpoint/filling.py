"""Stored chunks into memory: the bytes this rank needs, asked for once, each copied straight to its place."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dtrain.protocol.checkpoint import Manifest, TensorEntry
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import regions
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES, stored_dtype
from dtrain.trainer.checkpoint.regions import Box, Run
from dtrain.trainer.checkpoint.source import Range, Source

FILLS_MAX = 3
"""Bytes may lie where others can write to: what was copied while they changed is copied once more."""

COPY_LANES = min(4, os.cpu_count() or 1)
LANES_FROM_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Target:
    """Memory for ``boxes`` of the stored tensor ``name``; each box tells where in ``tensor`` it belongs."""

    name: str
    tensor: Any
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """Part of a chunk that goes to ``box.local`` of ``tensor``."""

    tensor: Any
    box: Box
    dtype: str
    blob: int
    offset: int
    length: int
    strides: tuple[int, ...]


class Filling:
    """Collects targets; ``fill`` reads for all of them."""

    def __init__(self, source: Source, rank: int) -> None:
        self.rank = rank
        self._source = source
        self._manifest: Manifest = source.manifest
        self._reads: list[_Read] = []
        self._known: set[tuple[str, int, tuple[int, ...]]] = set()

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def entry(self, name: str) -> TensorEntry:
        """What the manifest says of a tensor.

        Raises:
            Refused: RESTORE_FAILED; nothing, or in a dtype this release does not know.
        """
        entry = self._manifest.tensors.get(name)
        if entry is None:
            raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint's manifest has no tensor {name}")
        if entry.dtype not in ITEM_BYTES:
            raise Refused(
                ErrorCode.RESTORE_FAILED, f"{name} has the stored type {entry.dtype!r}, unknown here"
            )
        return entry

    def add(self, target: Target) -> None:
        """Have ``target`` filled.

        Raises:
            Refused: RESTORE_FAILED; the stored chunks do not cover it.
        """
        if target.tensor.numel():
            # Tied weights share memory under several names: once is enough.
            where = (target.name, target.tensor.data_ptr(), tuple(target.tensor.shape))
            if where in self._known:
                return
            self._known.add(where)
        entry = self.entry(target.name)
        for box in target.boxes:
            found = list(self._covering(target, box, entry))
            if sum(read.box.elements for read in found) != box.elements:
                raise Refused(
                    ErrorCode.RESTORE_FAILED,
                    f"the chunks of {target.name} do not make up {list(box.shape)} at {list(box.origin)}",
                )
            self._reads += found

    def fill(self) -> None:
        """Fetch what all targets need and copy it into them.

        Raises:
            Refused: RESTORE_FAILED.
        """
        for _ in range(FILLS_MAX):
            self._source.want(merged(Range(read.blob, read.offset, read.length) for read in self._reads))
            self._copy()
            if self._source.is_still_good():
                self._reads = []
                return
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"checkpoint {self._manifest.seq} changed {FILLS_MAX} times while it was read",
        )

    def _copy(self) -> None:
        import torch

        size_bytes = sum(read.length for read in self._reads)
        on_cpu = all(read.tensor.device.type == "cpu" for read in self._reads)
        # Ranks are given one thread for torch's own parallelism, and cores have nothing else to do here.
        several = on_cpu and size_bytes >= LANES_FROM_BYTES and torch.get_num_threads() == 1
        lanes = COPY_LANES if several else 1
        with warnings.catch_warnings():
            # Read-only memory: torch cannot know that nothing here writes to it.
            warnings.simplefilter("ignore", UserWarning)
            if lanes == 1:
                for read in self._reads:
                    self._copy_one(read)
                return
            with ThreadPoolExecutor(lanes, thread_name_prefix="fill") as pool:
                for done in [pool.submit(self._copy_one, read) for read in self._reads]:
                    done.result()

    def _copy_one(self, read: _Read) -> None:
        import torch

        with torch.no_grad():  # of this thread
            stored = self._stored(read)
            place = read.tensor
            if tuple(place.shape) != read.box.shape:
                spans = zip(read.box.local, read.box.shape, strict=True)
                place = place[tuple(slice(at, at + size) for at, size in spans)]
            place.copy_(stored)

    def _covering(self, target: Target, box: Box, entry: TensorEntry) -> Iterator[_Read]:
        item = ITEM_BYTES[entry.dtype]
        gap_max = self._manifest.chunk_bytes // item
        for chunk in entry.chunks:
            if len(chunk.o) != len(box.shape) or chunk.len != math.prod(chunk.s) * item:
                raise Refused(ErrorCode.RESTORE_FAILED, f"a chunk of {target.name} is not what it says")
            part = regions.common(box, chunk.o, chunk.s)
            if part is None:
                continue
            strides = regions.strides_of(chunk.s)
            run: Run
            for run in regions.runs(part, chunk.o, chunk.s, gap_max):
                yield _Read(
                    target.tensor,
                    run.box,
                    entry.dtype,
                    chunk.b,
                    chunk.off + run.start * item,
                    (run.stop - run.start) * item,
                    strides,
                )

    def _stored(self, read: _Read) -> Any:
        """The stored elements, as a tensor over the bytes themselves."""
        import torch

        view = self._source.view(read.blob, read.offset, read.length)
        flat = torch.frombuffer(view, dtype=torch.uint8)
        if flat.data_ptr() % ITEM_BYTES[read.dtype]:
            flat = flat.clone()  # written by a release that did not align it
        return flat.view(stored_dtype(read.dtype)).as_strided(read.box.shape, read.strides)


def merged(ranges: Iterator[Range] | Sequence[Range]) -> list[Range]:
    """The same bytes in as few ranges as there can be, in order."""
    found: list[Range] = []
    for one in sorted(ranges, key=lambda r: (r.blob, r.offset)):
        last = found[-1] if found else None
        if last is not None and last.blob == one.blob and one.offset <= last.offset + last.length:
            end = max(last.offset + last.length, one.offset + one.length)
            found[-1] = Range(last.blob, last.offset, end - last.offset)
        else:
            found.append(one)
    return found
