"""Stored chunks into memory: the bytes this rank needs, asked for once, each copied straight to its place."""

import ctypes
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
from dtrain.trainer.checkpoint.reading import Into
from dtrain.trainer.checkpoint.regions import Box, Run
from dtrain.trainer.checkpoint.source import Filler, Range, Source

FILLS_MAX = 3
"""Bytes may lie where others can write to: what was copied while they changed is copied once more."""

STAGED_BYTES_MAX = 128 * 1024**2
"""Read at a time of what has to be copied to its place, to a GPU for example. One region may be larger."""

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
        filler = self._source.filler
        if filler is not None:
            self._read_straight(filler)
            return
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

    def _read_straight(self, filler: Filler) -> None:
        """Each region to its place if its bytes lie there as they are stored, else past memory of its own."""
        waiting = sorted((read for read in self._reads if read.length), key=lambda r: (r.blob, r.offset))
        filler.expect(merged(Range(read.blob, read.offset, read.length) for read in waiting))
        while waiting:
            batch, waiting = _batch([(read, _direct(read)) for read in waiting])
            staged = [(read, _staging(read)) for read, place in batch if place is None]
            parts = [Into(r.blob, r.offset, _memory(place)) for r, place in batch if place is not None]
            parts += [Into(read.blob, read.offset, _memory(flat)) for read, flat in staged]
            filler.fill(parts)
            _tell_changed([place for _, place in batch if place is not None])
            for read, flat in staged:
                self._put(read, flat)
        self._reads = []

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

        view = self._source.view(read.blob, read.offset, read.length)
        self._put(read, torch.frombuffer(view, dtype=torch.uint8))

    def _put(self, read: _Read, flat: Any) -> None:
        import torch

        with torch.no_grad():  # of this thread
            _place(read).copy_(_stored(read, flat))

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


def _place(read: _Read) -> Any:
    """The part of the tensor that the read is for."""
    if tuple(read.tensor.shape) == read.box.shape:
        return read.tensor
    spans = zip(read.box.local, read.box.shape, strict=True)
    return read.tensor[tuple(slice(at, at + size) for at, size in spans)]


def _stored(read: _Read, flat: Any) -> Any:
    """The stored elements, as a tensor over their bytes."""
    if flat.data_ptr() % ITEM_BYTES[read.dtype]:
        flat = flat.clone()  # written by a release that did not align it
    return flat.view(stored_dtype(read.dtype)).as_strided(read.box.shape, read.strides)


def _direct(read: _Read) -> Any:
    """The part of the tensor, if it is plain memory that holds just what is stored; else None."""
    import torch

    if type(read.tensor) not in (torch.Tensor, torch.nn.Parameter) or read.tensor.device.type != "cpu":
        return None
    if read.tensor.dtype is not stored_dtype(read.dtype):
        return None
    if read.length != read.box.elements * ITEM_BYTES[read.dtype]:
        return None
    place = _place(read)
    return place if place.is_contiguous() else None


def _staging(read: _Read) -> Any:
    import torch

    return torch.empty(read.length, dtype=torch.uint8)


def _batch(waiting: list[tuple[_Read, Any]]) -> tuple[list[tuple[_Read, Any]], list[_Read]]:
    """What can be read at once: no byte twice, and not too much that is staged. The rest comes later."""
    batch: list[tuple[_Read, Any]] = []
    later: list[_Read] = []
    blob, end, staged = -1, 0, 0
    for read, place in waiting:
        too_much = place is None and staged and staged + read.length > STAGED_BYTES_MAX
        if too_much or (read.blob == blob and read.offset < end):
            later.append(read)
            continue
        batch.append((read, place))
        blob, end = read.blob, read.offset + read.length
        staged += read.length if place is None else 0
    return batch, later


def _memory(tensor: Any) -> memoryview:
    """The bytes of a contiguous tensor, for as long as somebody holds it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _tell_changed(tensors: list[Any]) -> None:
    """Autograd must know that they were written to, as it does from any copy."""
    import torch

    torch.autograd.graph.increment_version([one for one in tensors if not one.is_inference()])


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
