"""Small values with tensors in them as JSON alone.

For what each rank saves under a name of its own (positions of data loaders, generators):
their tensors are small, and as JSON the whole is one object of this rank, which no other
rank's layout needs to know.
"""

import base64
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

_TENSOR, _ARRAY = "__tensor__", "__array__"


def is_per_rank(tracked: Any) -> bool:
    """True for objects of which each rank saves its own part, under a name of its own.

    They are tracked as ``name/rank`` and have ``load_parts`` beside ``state_dict``,
    which must hold JSON values only: tensors would be taken for replicated ones.
    """
    return callable(getattr(tracked, "load_parts", None))


def encode(value: Any, path: str) -> Any:
    """Return ``value`` with tensors and arrays as base64; ``path`` names it in errors.

    Raises:
        Refused: STATE_NOT_SAVABLE; something in it is neither a tensor nor JSON.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return value
    if kind in (list, tuple):
        parts = [encode(part, f"{path}.{i}") for i, part in enumerate(value)]
        return parts if kind is list else tuple(parts)
    if isinstance(value, dict):
        return {key: encode(part, f"{path}.{key}") for key, part in value.items()}
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "item"):
        if not hasattr(value, "tobytes") or not getattr(value, "shape", ()):
            return value.item()
        return {_ARRAY: [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    if hasattr(value, "dtype") and hasattr(value, "data_ptr"):
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
        name = str(value.dtype).removeprefix("torch.")
        return {_TENSOR: [name, list(value.shape), _text(raw)]}
    raise Refused(
        ErrorCode.STATE_NOT_SAVABLE,
        f"cannot save {path}: {kind.__module__}.{kind.__qualname__} is neither a tensor nor JSON",
        fix="let its state_dict return tensors, numbers, strings, lists and dicts",
    )


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def decode(value: Any) -> Any:
    """Undo ``encode``."""
    if isinstance(value, list):
        return [decode(part) for part in value]
    if isinstance(value, tuple):
        return tuple(decode(part) for part in value)
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        import torch

        name, shape, raw = value[_TENSOR]
        data = bytearray(base64.b64decode(raw))
        dtype = getattr(torch, name)
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
    if _ARRAY in value:
        import numpy as np

        name, shape, raw = value[_ARRAY]
        return np.frombuffer(base64.b64decode(raw), dtype=np.dtype(name)).reshape(shape).copy()
    return {key: decode(part) for key, part in value.items()}
