"""``Reader``: the storage of ``dcp.load``."""

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dtrain.protocol.checkpoint import ChunkEntry
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.trainer.checkpoint import state
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES, from_stored, stored_dtype
from dtrain.trainer.checkpoint.source import Range, Source
from dtrain.trainer.dcp import planner as planners
from dtrain.trainer.dcp.catalog import Catalog, tensors_in

LOADS_MAX = 3


class Reader(StorageReader):
    """Reads the checkpoint that this attempt starts from; made by ``Run.dcp_reader``.

    ``source``: its verified bytes; None: there is no checkpoint yet. ``good``: whether what was
    read is still the checkpoint. ``on_failure`` is told what makes the checkpoint unusable.
    """

    def __init__(
        self,
        source: Source | None,
        step: int,
        good: Callable[[], bool] = lambda: True,
        on_failure: Callable[[str], None] = lambda _why: None,
    ) -> None:
        self.step = step
        """Steps completed in it."""
        self._source = source
        self._good = good
        self._on_failure = on_failure
        self._catalog: Catalog | None = None

    @property
    def exists(self) -> bool:
        """Whether there is anything to load."""
        return self._source is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: what this attempt starts from is the leader's decision."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: no path leads here."""
        del checkpoint_id
        return False

    # Not called kwargs: torch would take the failure for a missing file, and ask again by rank.
    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            Refused: RESTORE_FAILED; there is none, or its manifest cannot be read.
        """
        del args
        return self._open().metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy verified bytes to where the planner wants them.

        Raises:
            Refused: RESTORE_FAILED; they cannot be had, or are not what the manifest says.
        """
        try:
            for _ in range(LOADS_MAX):
                self._read(plan, planner)
                if self._good():
                    break
            else:
                message = f"the checkpoint changed {LOADS_MAX} times while it was read"
                raise Refused(ErrorCode.RESTORE_FAILED, message)
        except DtrainError as error:
            if error.code is ErrorCode.RESTORE_FAILED:
                self._on_failure(error.message)
            raise
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open(self) -> Catalog:
        if self._source is None:
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                "this job has no checkpoint yet",
                fix="load only if the reader's `exists` is true",
            )
        if self._catalog is None:
            self._catalog = Catalog(self._source.manifest)
        return self._catalog

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        catalog = self._open()
        assert self._source is not None
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        objects = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        regions = [_region(catalog, item) for item in tensors]
        ranges = {Range(r.chunk.b, r.offset, r.length) for r in regions if r.length}
        for item in objects:
            for name in tensors_in(catalog.encoded(item.storage_index.fqn)):
                ranges.update(Range(c.b, c.off, c.len) for c in self._entry(name).chunks if c.len)
        # Once, and before anything is overwritten.
        self._source.want(sorted(ranges, key=lambda r: (r.blob, r.offset)))
        with torch.no_grad(), warnings.catch_warnings():
            # Read-only memory: torch cannot know that nothing here writes to it.
            warnings.simplefilter("ignore", UserWarning)
            for item, region in zip(tensors, regions, strict=True):
                target = planner.resolve_tensor(item).detach()
                if region.length:
                    target.copy_(self._part(region))
                planner.commit_tensor(item, target)
            for item in objects:
                planners.assign(planner, item, self._value(item.storage_index.fqn))

    def _part(self, region: "_Region") -> torch.Tensor:
        flat = self._flat(region.chunk.b, region.offset, region.length, region.dtype)
        part = flat.as_strided(region.sizes, region.strides)
        return from_stored(part, region.original) if region.original else part

    def _flat(self, blob: int, offset: int, length: int, dtype: str) -> torch.Tensor:
        assert self._source is not None
        flat = torch.frombuffer(self._source.view(blob, offset, length), dtype=torch.uint8)
        if flat.data_ptr() % ITEM_BYTES[dtype]:
            flat = flat.clone()
        return flat.view(stored_dtype(dtype))

    def _value(self, name: str) -> Any:
        catalog = self._open()
        return catalog.pick(name, state.decode(catalog.encoded(name), self._whole))

    def _whole(self, name: str) -> torch.Tensor:
        """A stored tensor of its own memory."""
        entry = self._entry(name)
        whole = torch.empty(entry.shape, dtype=stored_dtype(entry.dtype))
        for chunk in entry.chunks:
            if chunk.len:
                where = tuple(slice(o, o + s) for o, s in zip(chunk.o, chunk.s, strict=True))
                whole[where].copy_(self._flat(chunk.b, chunk.off, chunk.len, entry.dtype).view(chunk.s))
        return whole

    def _entry(self, name: str) -> Any:
        entry = self._open().manifest.tensors.get(name)
        if entry is None:
            raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint's manifest has no tensor {name}")
        return entry


class _Region:
    """What one item reads of one stored chunk: the shortest run of bytes that holds it."""

    __slots__ = ("chunk", "dtype", "length", "offset", "original", "sizes", "strides")

    def __init__(
        self, chunk: ChunkEntry, dtype: str, original: str, starts: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        if any(a < 0 or a + n > s for a, n, s in zip(starts, sizes, chunk.s, strict=True)):
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"{list(sizes)} at {list(starts)} is not inside of a chunk of {chunk.s}",
            )
        item = ITEM_BYTES[dtype]
        strides = tuple(math.prod(chunk.s[at + 1 :]) for at in range(len(chunk.s)))
        first = sum(a * stride for a, stride in zip(starts, strides, strict=True))
        last = first + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        self.chunk = chunk
        self.dtype = dtype
        self.original = original
        self.sizes = sizes
        self.strides = strides
        self.offset = chunk.off + first * item
        self.length = (last - first + 1) * item if math.prod(sizes) else 0


def _region(catalog: Catalog, item: ReadItem) -> _Region:
    name = item.storage_index.fqn
    chunk = catalog.chunk(name, tuple(item.storage_index.offset or ()))
    original = catalog.original(name)
    starts, sizes = tuple(item.storage_offsets), tuple(item.lengths)
    # A complex number is stored as two.
    more = len(chunk.s) - len(sizes)
    return _Region(
        chunk, catalog.entry(name).dtype, original, (*starts, *(0,) * more), (*sizes, *chunk.s[len(sizes) :])
    )
