"""From verified bytes in memory back into the tracked objects, for any number of ranks."""

import functools
import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.trainer.checkpoint import rng, state
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES, stored_dtype
from dtrain.trainer.checkpoint.source import Range, Source

log = logging.getLogger("dtrain.trainer")


def load(source: Source, tracked: Mapping[str, Any], rank: int, world: int) -> Manifest:
    """Load every tracked object and the generators from the checkpoint behind ``source``.

    After an error the tracked objects are in no defined state: the rank must not train.

    Raises:
        Refused: RESTORE_FAILED.
    """
    manifest = source.manifest
    try:
        source.want([Range(number, 0, blob.bytes) for number, blob in enumerate(manifest.blobs)])
        reader = TensorReader(source)
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
        raise Refused(
            ErrorCode.RESTORE_FAILED, f"checkpoint {manifest.seq}: {error}", fix=error.fix
        ) from error
    except Exception as error:  # whatever load_state_dict of a user's object raises
        message = f"checkpoint {manifest.seq} cannot be loaded: {type(error).__name__}: {error}"
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
    """Tensors of a checkpoint whose bytes are there."""

    def __init__(self, source: Source) -> None:
        self._manifest = source.manifest
        self._source = source

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

        view = self._source.view(blob, offset, math.prod(shape) * item_bytes)
        with warnings.catch_warnings():
            # Read-only memory: torch cannot know that nothing here writes to it.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(view, dtype=torch.uint8)
        if offset % item_bytes:
            flat = flat.clone()
        return flat.view(dtype).view(shape)
