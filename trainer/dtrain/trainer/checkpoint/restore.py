"""From verified bytes in memory back into the tracked objects, for any number of ranks."""

import functools
import logging
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ranklink import RestorePlan
from dtrain.trainer.checkpoint import rng, state
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES, stored_dtype

log = logging.getLogger("dtrain.trainer")


def load(plan: RestorePlan, tracked: Mapping[str, Any], rank: int, world: int) -> Manifest:
    """Load every tracked object and the generators from the checkpoint of ``plan``.

    After an error the tracked objects are in no defined state: the rank must not train.

    Raises:
        Refused: RESTORE_FAILED.
    """
    try:
        with _Bytes(plan.manifest_path, plan.manifest_offset, plan.manifest_bytes) as view:
            manifest = codec.decode(Manifest, bytes(view), bytes_max=max(1, plan.manifest_bytes))
        reader = TensorReader(manifest, plan)
        for name, thing in tracked.items():
            entry = manifest.objects.get(name)
            if entry is None:
                raise Refused(
                    ErrorCode.RESTORE_FAILED,
                    f"checkpoint {manifest.seq} has no state named {name}",
                    fix="track the same names as when it was saved",
                )
            own = state.keeps_tensors(thing)
            value = state.decode(entry.value, functools.partial(reader.tensor, own=own))
            state.apply(name, thing, value)
        unused = [n for n in manifest.objects if n not in tracked and not n.startswith("rng/")]
        if unused:
            log.warning("checkpoint %d also holds %s, which is not tracked", manifest.seq, ", ".join(unused))
        _restore_rng(manifest, reader, rank, world)
    except DtrainError as error:
        if error.code is ErrorCode.RESTORE_FAILED:
            raise
        raise Refused(ErrorCode.RESTORE_FAILED, f"checkpoint {plan.seq}: {error}", fix=error.fix) from error
    except Exception as error:  # whatever load_state_dict of a user's object raises
        message = f"checkpoint {plan.seq} cannot be loaded: {type(error).__name__}: {error}"
        raise Refused(ErrorCode.RESTORE_FAILED, message) from error
    return manifest


def _restore_rng(manifest: Manifest, reader: "TensorReader", rank: int, world: int) -> None:
    if manifest.world != world:
        rng.derive(rank, manifest.step, manifest.uid)
        return
    own = {
        name: state.decode(entry.value, functools.partial(reader.tensor, own=True))
        for name, entry in manifest.objects.items()
        if name.startswith(rng.prefix(rank))
    }
    if not own:
        raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint has no random state of rank {rank}")
    rng.install(rank, own)


class TensorReader:
    """Tensors of a checkpoint whose blobs lie in memory."""

    def __init__(self, manifest: Manifest, plan: RestorePlan) -> None:
        if len(plan.blobs) != len(manifest.blobs):
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"{len(plan.blobs)} blobs came for the manifest's {len(manifest.blobs)}",
            )
        self._manifest = manifest
        self._blobs = [_Bytes(place.path, place.offset, place.size_bytes) for place in plan.blobs]
        self._views: dict[int, memoryview] = {}

    def tensor(self, name: str, *, own: bool) -> Any:
        """The whole tensor. Not ``own``: it may lie in the shared bytes, and is good for copying from only.

        Raises:
            Refused: RESTORE_FAILED.
        """
        import torch

        entry = self._manifest.tensors.get(name)
        if entry is None:
            raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint's manifest has no tensor {name}")
        dtype = stored_dtype(entry.dtype)
        item_bytes = ITEM_BYTES[entry.dtype]
        if sum(chunk.len for chunk in entry.chunks) != math.prod(entry.shape) * item_bytes:
            raise Refused(ErrorCode.RESTORE_FAILED, f"the chunks of {name} do not make up its shape")
        if math.prod(entry.shape) == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if len(entry.chunks) == 1:
            found = self._chunk(entry.chunks[0].b, entry.chunks[0].off, entry.shape, dtype, item_bytes)
            return found.clone() if own else found
        whole = torch.empty(entry.shape, dtype=dtype)
        for chunk in entry.chunks:
            where = tuple(slice(o, o + s) for o, s in zip(chunk.o, chunk.s, strict=True))
            whole[where].copy_(self._chunk(chunk.b, chunk.off, chunk.s, dtype, item_bytes))
        return whole

    def _chunk(self, blob: int, offset: int, shape: tuple[int, ...], dtype: Any, item_bytes: int) -> Any:
        import torch

        view = self._views.get(blob)
        if view is None:
            view = self._views[blob] = self._blobs[blob].open()
        size = math.prod(shape) * item_bytes
        if offset < 0 or offset + size > len(view):
            raise Refused(ErrorCode.RESTORE_FAILED, f"a chunk reaches beyond blob {blob}")
        with warnings.catch_warnings():
            # Read-only memory: torch cannot know that nothing here writes to it.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(view, dtype=torch.uint8, count=size, offset=offset)
        if offset % item_bytes:
            flat = flat.clone()
        return flat.view(dtype).view(shape)


class _Bytes:
    """A range of a file or memfd, mapped for reading."""

    def __init__(self, path: str, offset: int, size_bytes: int) -> None:
        self._path = path
        self._offset = offset
        self._size = size_bytes
        self._map: mmap.mmap | None = None

    def open(self) -> memoryview:
        if self._size == 0:
            return memoryview(b"")
        start = self._offset - self._offset % mmap.ALLOCATIONGRANULARITY
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_size < self._offset + self._size:
                    raise Refused(ErrorCode.RESTORE_FAILED, f"{self._path} is shorter than announced")
                # Mapped, not read: ranks of one machine share the pages.
                length = self._offset - start + self._size
                self._map = mmap.mmap(fd, length, offset=start, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
        except OSError as error:
            raise Refused(
                ErrorCode.RESTORE_FAILED, f"cannot open the fetched bytes at {self._path}: {error.strerror}"
            ) from error
        skip = self._offset - start
        return memoryview(self._map)[skip : skip + self._size]

    def __enter__(self) -> memoryview:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        """The mapping goes with the last view of it."""
