"""What one rank contributes to a checkpoint: planned tensors, and the objects that it has."""

import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import dtypes, state
from dtrain.trainer.checkpoint.state import Captured
from dtrain.trainer.dcp.blob import Contents, Piece

ENV_CHECK = "DTRAIN_CHECK_REPLICAS"
"""``off``: do not compare what several ranks hold alike."""

SAMPLE_BYTES = 16 * 1024
_PLACES = 64


def gather(plan: SavePlan, planner: SavePlanner, own: Captured, rank: int, world: int) -> Contents:
    """Collect what ``plan`` has this rank write, and ``own``, which is only this rank's.

    Objects are described by every rank that has them, not only by the one that torch
    chose to write them: that is how the leader sees values that differ.

    Raises:
        Refused: STATE_NOT_SAVABLE; names what is neither a tensor nor JSON.
    """
    found = Contents()
    mappings = getattr(planner, "mappings", None) or {}
    planned: set[str] = set()
    for item in plan.items:
        name = item.index.fqn
        found.paths[name] = tuple(mappings.get(name, (name,)))
        if item.type is WriteItemType.BYTE_IO:
            planned.add(name)
        else:
            _add_tensor(found, item, planner)
    for name, value in _objects(planner, planned).items():
        if name.startswith("rng/"):
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"cannot save {name}: names below rng/ are taken")
        captured = state.capture({}, {name: value}, rank)
        _add_object(found, captured, write=name in planned)
    _add_object(found, own, write=True)
    if world > 1 and os.environ.get(ENV_CHECK, "").lower() not in ("off", "0", "false", "no"):
        tensors = getattr(planner, "state_dict", {})
        found.same.update(
            (name, digest(value))
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor)
            and not isinstance(value, DTensor)
            and not hasattr(value, "local_shards")
        )
    return found


def _add_tensor(found: Contents, item: WriteItem, planner: SavePlanner) -> None:
    name, data = item.index.fqn, item.tensor_data
    tensor = planner.resolve_data(item)
    if data is None or not isinstance(tensor, torch.Tensor):
        raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"cannot save {name}: its planner gave no tensor for it")
    tensor = tensor.detach()
    # A cached plan may be older than the state: torch does not compare all of it.
    if tuple(tensor.shape) != tuple(data.chunk.sizes):
        raise Refused(
            ErrorCode.STATE_NOT_SAVABLE,
            f"cannot save {name}: it has shape {list(tensor.shape)}, its plan says {list(data.chunk.sizes)}",
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise Refused(
            ErrorCode.STATE_NOT_SAVABLE, f"cannot save {name}: it is {tensor.layout} on {tensor.device}"
        )
    try:
        stored, dtype, original = dtypes.to_stored(tensor)
    except Refused as error:
        raise Refused(error.code, f"cannot save {name}: {error.message}") from error
    more = tuple(stored.shape[tensor.dim() :])  # a complex number is two
    shape, origin = (*data.size, *more), (*data.chunk.offsets, *(0 for _ in more))
    found.pieces.append(Piece(name, stored, dtype, shape, origin))
    if original:
        found.objects[name] = _described({"$tensor": name, "dtype": original})


def _objects(planner: SavePlanner, planned: set[str]) -> Mapping[str, Any]:
    if isinstance(planner, DefaultSavePlanner):
        return {
            name: value
            for name, value in planner.state_dict.items()
            if not isinstance(value, torch.Tensor) and not hasattr(value, "__create_write_items__")
        }
    if planned:
        raise Refused(
            ErrorCode.STATE_NOT_SAVABLE,
            f"cannot save {min(planned)}: {type(planner).__name__} hands over bytes, no values",
            fix="derive the planner from dtrain.trainer.dcp.planner.SavePlanner",
        )
    return {}


def _add_object(found: Contents, captured: Captured, *, write: bool) -> None:
    for name, value in captured.objects.items():
        found.objects[name] = _described(value)
    if not write or not captured.leaves:
        return
    taken = {piece.name for piece in found.pieces}
    for leaf in captured.leaves:
        if leaf.name in taken:
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"cannot save {leaf.name}: two tensors have this name")
        shape = tuple(leaf.tensor.shape)
        found.pieces.append(Piece(leaf.name, leaf.tensor, leaf.dtype, shape, (0,) * len(shape)))


def _described(value: Any) -> dict[str, Any]:
    return {"value": value, "crc": f"{zlib.crc32(codec.canonical(value)):08x}"}


def digest(tensor: torch.Tensor) -> str:
    """CRC32 in hex of all of a short tensor, and of a sample spread over a long one."""
    flat = tensor.detach().reshape(-1)
    item = flat.element_size()
    if flat.numel() * item > SAMPLE_BYTES:
        length = SAMPLE_BYTES // _PLACES // item
        step = (flat.numel() - length) // (_PLACES - 1)
        flat = flat.as_strided((_PLACES, length), (step, 1), flat.storage_offset())
    data = flat.contiguous().cpu().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().tobytes()):08x}"
