"""How each torch dtype is stored: under its safetensors name, or as a view that has one."""

import functools
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Safetensors dtypes that blobs use, with their size."""

_NATIVE = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
_COMPLEX = ("complex64", "complex128")
# Kept as bytes: readers of safetensors do not agree on names for these.
_AS_BYTES = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@functools.cache
def _names() -> dict[Any, str]:
    import torch

    found = {}
    for name in (*_NATIVE, *_COMPLEX, *_AS_BYTES):
        dtype = getattr(torch, name, None)  # older releases lack some
        if dtype is not None:
            found[dtype] = name
    return found


@functools.cache
def stored_dtype(name: str) -> Any:
    """The torch dtype behind a safetensors name.

    Raises:
        Refused: RESTORE_FAILED; this torch has no such dtype.
    """
    import torch

    for plain, stored in _NATIVE.items():
        if stored == name and hasattr(torch, plain):
            return getattr(torch, plain)
    raise Refused(ErrorCode.RESTORE_FAILED, f"this torch has no dtype for the stored type {name!r}")


def to_stored(tensor: Any) -> tuple[Any, str, str]:
    """Return a view with a safetensors dtype, that dtype's name, and the original's if it differs.

    Raises:
        Refused: STATE_NOT_SAVABLE.
    """
    import torch

    name = _names().get(tensor.dtype)
    if name is None:
        raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"tensors of type {tensor.dtype} cannot be saved")
    if name in _COMPLEX:
        return _real_view(tensor), "F32" if name == "complex64" else "F64", name
    if name in _AS_BYTES:
        return tensor.view(torch.uint8), "U8", name
    return tensor, _NATIVE[name], ""


def _real_view(tensor: Any) -> Any:
    import torch

    return torch.view_as_real(tensor.resolve_conj().resolve_neg())


def from_stored(tensor: Any, original: str) -> Any:
    """Undo ``to_stored``; ``original`` is the name it returned last."""
    import torch

    if not original:
        return tensor
    if original in _COMPLEX:
        return torch.view_as_complex(tensor)
    if original in _AS_BYTES and hasattr(torch, original):
        return tensor.view(getattr(torch, original))
    raise Refused(ErrorCode.RESTORE_FAILED, f"this torch has no dtype {original!r}")
