"""Pieces of tensors into the arena: one safetensors blob and the index behind it."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dtrain.protocol import codec
from dtrain.protocol.ids import Step
from dtrain.protocol.ranklink import Begin, Sealed
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES, stored_dtype

HEADER_ALIGN = 64

INDEX_SPARE_BYTES = 1024 * 1024
"""Room for objects to grow between saves without touching new memory in the stall."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A hyper-rectangle of the tensor ``name`` of ``shape``, viewed in its stored dtype."""

    name: str
    tensor: torch.Tensor
    dtype: str
    shape: tuple[int, ...]
    origin: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.tensor.shape) * ITEM_BYTES[self.dtype]


@dataclass(slots=True)
class Contents:
    """Everything of one rank. ``same``: digests of what other ranks must hold alike."""

    pieces: list[Piece] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def seal(arena: Arena, begin: Begin, contents: Contents) -> Sealed:
    """Copy the pieces into the arena and describe the copy.

    Raises:
        Refused: STATE_NOT_SAVABLE; there is no memory for it.
    """
    header, placed = _lay_out(contents.pieces)
    index = codec.dumps(
        {
            # Ranks may hold different parts: that they fit together is seen by the tiling.
            "layout": "dcp",
            "objects": contents.objects,
            "paths": {name: list(path) for name, path in contents.paths.items()},
            "same": contents.same,
            "tensors": _entries(placed),
        }
    )
    size = len(header) + sum(piece.size_bytes for piece in contents.pieces)
    if size + len(index) > arena.size_bytes:
        arena.reserve(size + 2 * len(index) + INDEX_SPARE_BYTES)
    memory = arena.memory
    memory[: len(header)] = header
    _copy(memory, placed)
    memory[size : size + len(index)] = index
    return Sealed(
        seq=begin.seq,
        nonce=begin.nonce,
        step=Step(begin.step),
        path=arena.path,
        offset=0,
        size_bytes=size,
        index_offset=size,
        index_bytes=len(index),
        index_crc=f"{zlib.crc32(index):08x}",
    )


def _lay_out(pieces: Sequence[Piece]) -> tuple[bytes, list[tuple[Piece, int]]]:
    # No holes are allowed in the format: wider items first keep each one aligned to its own size.
    order = sorted(pieces, key=lambda p: (-ITEM_BYTES[p.dtype], -p.size_bytes, p.name, p.origin))
    table: dict[str, object] = {}
    starts = []
    at = 0
    for piece in order:
        key = piece.name
        if tuple(piece.tensor.shape) != piece.shape:
            key += "@" + ",".join(map(str, piece.origin))
        while key in table:
            key += "~"
        end = at + piece.size_bytes
        table[key] = {"dtype": piece.dtype, "shape": list(piece.tensor.shape), "data_offsets": [at, end]}
        starts.append(at)
        at = end
    text = codec.dumps(table)
    text += b" " * (-(8 + len(text)) % HEADER_ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return header, [(piece, len(header) + start) for piece, start in zip(order, starts, strict=True)]


def _entries(placed: Sequence[tuple[Piece, int]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for piece, offset in placed:
        entry = found.setdefault(piece.name, {"dtype": piece.dtype, "shape": list(piece.shape), "chunks": []})
        entry["chunks"].append(
            {
                "o": list(piece.origin),
                "s": list(piece.tensor.shape),
                "b": 0,
                "off": offset,
                "len": piece.size_bytes,
            }
        )
    return found


def _copy(memory: Any, placed: Sequence[tuple[Piece, int]]) -> None:
    on_device = False
    with torch.no_grad():
        for piece, offset in placed:
            if not piece.size_bytes:
                continue
            flat = torch.frombuffer(memory, dtype=torch.uint8, count=piece.size_bytes, offset=offset)
            target = flat.view(stored_dtype(piece.dtype)).view(piece.tensor.shape)
            on_device = on_device or piece.tensor.is_cuda
            # Without waiting for each: all copies are awaited together below.
            target.copy_(piece.tensor, non_blocking=True)
    if on_device:
        torch.cuda.synchronize()
