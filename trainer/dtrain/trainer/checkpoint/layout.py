"""Which rank writes which rows, and where they lie in its blob.

A pure function of names, dtypes and shapes, so that all ranks agree without a
word. Replicated tensors are cut into row blocks; the longest goes to the rank
with the least so far. A blob is a valid safetensors file: no holes are allowed
there, and larger items first keep each one aligned to its own size.
"""

import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import ChunkEntry, TensorEntry
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES

BLOCK_BYTES_MAX = 64 * 1024 * 1024
"""Larger tensors are cut; a single larger row is not."""

HEADER_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor without its values. ``owner`` None: any rank may write it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: int | None = None
    local: bool = False

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``start`` to ``stop`` of a tensor; all of it where ``whole``."""

    spec: Spec
    key: str
    start: int
    stop: int
    whole: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape if self.whole else (self.stop - self.start, *self.spec.shape[1:])

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.spec.dtype]


@dataclass(frozen=True, slots=True)
class Placed:
    """A block of this rank and its offset from the start of the blob."""

    block: Block
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What one rank writes. ``hash`` is equal on all ranks that see the same state."""

    hash: str
    header: bytes
    placed: tuple[Placed, ...]
    blob_bytes: int

    def entries(self) -> dict[str, TensorEntry]:
        """This rank's chunks in the form of a manifest."""
        chunks: dict[str, list[ChunkEntry]] = {}
        specs: dict[str, Spec] = {}
        for item in self.placed:
            block = item.block
            spec = specs[block.spec.name] = block.spec
            origin = (block.start, *([0] * (len(spec.shape) - 1))) if spec.shape else ()
            chunks.setdefault(spec.name, []).append(
                ChunkEntry(o=origin, s=block.shape, b=0, off=item.offset, len=block.size_bytes)
            )
        return {
            name: TensorEntry(dtype=specs[name].dtype, shape=specs[name].shape, chunks=tuple(found))
            for name, found in chunks.items()
        }


def plan(specs: Sequence[Spec], rank: int, world: int, *, block_bytes: int = BLOCK_BYTES_MAX) -> Layout:
    """Lay out the state for ``rank`` of ``world``."""
    mine = [
        block
        for spec in specs
        if spec.local or spec.owner is not None
        for block in _blocks(spec, block_bytes)
        if spec.owner == rank
    ]
    mine += _assigned([spec for spec in specs if not spec.local], rank, world, block_bytes)
    mine.sort(key=lambda block: (-ITEM_BYTES[block.spec.dtype], -block.size_bytes, block.key))
    header, data_bytes = _header(mine)
    placed = []
    offset = len(header)
    for block in mine:
        placed.append(Placed(block, offset))
        offset += block.size_bytes
    assert offset == len(header) + data_bytes
    return Layout(_hash(specs, world), header, tuple(placed), offset)


def _assigned(specs: Sequence[Spec], rank: int, world: int, block_bytes: int) -> list[Block]:
    """Blocks of replicated tensors for ``rank``: longest first, to whoever has least."""
    loads = [0] * world
    free: list[Block] = []
    for spec in specs:
        if spec.owner is not None:
            loads[spec.owner % world] += spec.size_bytes
        else:
            free.extend(_blocks(spec, block_bytes))
    free.sort(key=lambda block: (-block.size_bytes, block.key))
    queue = [(load, candidate) for candidate, load in enumerate(loads)]
    heapq.heapify(queue)
    mine = []
    for block in free:
        load, chosen = queue[0]
        # Empty tensors count a little, or all of them would go to one rank.
        heapq.heapreplace(queue, (load + max(1, block.size_bytes), chosen))
        if chosen == rank:
            mine.append(block)
    return mine


def _blocks(spec: Spec, block_bytes: int) -> Iterator[Block]:
    rows = spec.shape[0] if spec.shape else 1
    if spec.size_bytes <= block_bytes or rows <= 1:
        yield Block(spec, spec.name, 0, rows, whole=True)
        return
    step = max(1, block_bytes // (spec.size_bytes // rows))
    for index, start in enumerate(range(0, rows, step)):
        yield Block(spec, f"{spec.name}#{index}", start, min(rows, start + step), whole=False)


def _header(blocks: Sequence[Block]) -> tuple[bytes, int]:
    """The safetensors length and header, padded so that the data begins aligned."""
    table: dict[str, object] = {}
    offset = 0
    for block in blocks:
        end = offset + block.size_bytes
        table[block.key] = {
            "dtype": block.spec.dtype,
            "shape": list(block.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = codec.dumps(table)
    text += b" " * (-(8 + len(text)) % HEADER_ALIGN)
    return len(text).to_bytes(8, "little") + text, offset


def _hash(specs: Sequence[Spec], world: int) -> str:
    shared = sorted([s.name, s.dtype, list(s.shape), s.owner] for s in specs if not s.local)
    return "sha256:" + hashlib.sha256(codec.canonical([world, shared])).hexdigest()
