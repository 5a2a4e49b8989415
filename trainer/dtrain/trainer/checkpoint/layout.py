"""Which rank writes which part of which tensor, and where it lies in its blob.

A pure function of names, dtypes, shapes and meshes, so that all ranks agree
without a word. Tensors are cut into blocks; a block that several ranks hold goes,
the longest first, to that of them with the least so far. A blob is a valid
safetensors file: no holes are allowed there, and larger items first keep each one
aligned to its own size.
"""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import ChunkEntry, TensorEntry
from dtrain.trainer.checkpoint import regions
from dtrain.trainer.checkpoint.dtypes import ITEM_BYTES
from dtrain.trainer.checkpoint.regions import Box, Spread

BLOCK_BYTES_MAX = 64 * 1024 * 1024
"""Larger parts are cut."""

BLOCK_BYTES_MIN = 256 * 1024
"""Smaller parts are not cut to even out what the ranks write."""

BLOCKS_PER_RANK = 32
"""Blocks that a rank gets at least of a state worth cutting: one weighs a few per cent of its share."""

RULE = 2
"""How blocks are cut and given out. Part of the hash: ranks that follow another rule do not fit together."""

HEADER_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor without its values. ``owner`` None: any rank that has it may write it.

    ``spread`` None: every rank has all of it. ``local``: only this rank has it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: int | None = None
    local: bool = False
    spread: Spread | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Block:
    """A hyper-rectangle of a tensor. ``whole``: all that the rank has of it, as it has it."""

    spec: Spec
    key: str
    box: Box
    whole: bool

    @property
    def origin(self) -> tuple[int, ...]:
        return self.box.origin

    @property
    def shape(self) -> tuple[int, ...]:
        return self.box.shape

    @property
    def size_bytes(self) -> int:
        return self.box.elements * ITEM_BYTES[self.spec.dtype]

    def of(self, tensor: Any) -> Any:
        """The block as a view of this rank's part of the tensor."""
        if self.whole:
            return tensor
        return tensor[
            tuple(slice(at, at + size) for at, size in zip(self.box.local, self.box.shape, strict=True))
        ]


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
            chunks.setdefault(spec.name, []).append(
                ChunkEntry(o=block.origin, s=block.shape, b=0, off=item.offset, len=block.size_bytes)
            )
        return {
            name: TensorEntry(dtype=specs[name].dtype, shape=specs[name].shape, chunks=tuple(found))
            for name, found in chunks.items()
        }


def plan(specs: Sequence[Spec], rank: int, world: int, *, block_bytes: int | None = None) -> Layout:
    """Lay out the state for ``rank`` of ``world``; ``block_bytes`` None: as its size asks for."""
    if block_bytes is None:
        block_bytes = _block_bytes(specs, world)
    shares = _Shares(rank, world, block_bytes)
    for spec in specs:
        shares.add(spec)
    mine = shares.assigned()
    mine.sort(key=_place)
    header, data_bytes = _header(mine)
    placed = []
    offset = len(header)
    for block in mine:
        placed.append(Placed(block, offset))
        offset += block.size_bytes
    assert offset == len(header) + data_bytes
    return Layout(_hash(specs, world), header, tuple(placed), offset)


def _block_bytes(specs: Sequence[Spec], world: int) -> int:
    """The longest block: every rank may get several dozen of them, for an even share."""
    if world == 1:
        return BLOCK_BYTES_MAX  # nobody to share with
    total = sum(spec.size_bytes for spec in specs if not spec.local)
    return min(BLOCK_BYTES_MAX, max(BLOCK_BYTES_MIN, total // (world * BLOCKS_PER_RANK)))


class _Shares:
    """Gives blocks out: what only one rank has to that rank, the rest evenly."""

    def __init__(self, rank: int, world: int, block_bytes: int) -> None:
        self._rank = rank
        self._block_bytes = block_bytes
        self._loads = [0] * world
        self._mine: list[Block] = []
        self._free: list[tuple[Block, tuple[int, ...]]] = []
        """With the ranks that hold it; none: all do."""
        self._alike: Counter[tuple[Spread, tuple[int, ...], int]] = Counter()
        """How many tensors of one form are cut into parts of one rank each: they weigh the same."""

    def add(self, spec: Spec) -> None:
        if spec.local:
            # Of no weight: other ranks do not know of it and must come to the same result.
            if spec.owner == self._rank:
                self._mine.extend(_blocks(spec, self._block_bytes))
        elif spec.spread is not None:
            self._add_sharded(spec, spec.spread)
        elif spec.owner is None:
            self._free.extend((block, ()) for block in _blocks(spec, self._block_bytes))
        else:
            self._loads[spec.owner % len(self._loads)] += spec.size_bytes
            if spec.owner == self._rank:
                self._mine.extend(_blocks(spec, self._block_bytes))

    def _add_sharded(self, spec: Spec, spread: Spread) -> None:
        if spec.size_bytes == 0:
            # No rank has an element of it; one of them has to say that it exists.
            if self._rank == min(min(group) for group in spread.groups):
                self._mine.append(Block(spec, spec.name, regions.whole(spec.shape), whole=True))
            return
        if regions.is_partition(spread, spec.shape):
            # What most tensors of a large job are: looking at all ranks' parts of each would take seconds.
            self._alike[spread, spec.shape, ITEM_BYTES[spec.dtype]] += 1
            own = regions.held(spread, spec.shape, self._rank)
            if own is not None:
                self._mine.extend(_of_piece(spec, own, self._block_bytes))
            return
        for piece in regions.pieces(spread, spec.shape):
            if not piece.boxes or not piece.ranks:
                continue
            # Of a buffer the first replica counts, as rank 0's does of one that is not sharded.
            holders = piece.ranks if spec.owner is None else piece.ranks[:1]
            if len(holders) > 1:
                self._free.extend((block, holders) for block in _of_piece(spec, piece, self._block_bytes))
                continue
            self._loads[holders[0]] += piece.elements * ITEM_BYTES[spec.dtype]
            if holders[0] == self._rank:
                self._mine.extend(_of_piece(spec, piece, self._block_bytes))

    def assigned(self) -> list[Block]:
        """This rank's blocks. The longest go first, to whoever has least of those that hold it."""
        loads, mine = self._loads, self._mine
        for (spread, shape, item_bytes), count in self._alike.items():
            for piece in regions.pieces(spread, shape):
                if piece.ranks:
                    loads[piece.ranks[0]] += piece.elements * item_bytes * count
        self._free.sort(key=lambda item: (-item[0].size_bytes, item[0].key))
        queue = [(load, candidate) for candidate, load in enumerate(loads)]
        heapq.heapify(queue)
        for block, holders in self._free:
            if holders:
                chosen = min(holders, key=lambda candidate: (loads[candidate], candidate))
            else:
                while queue[0][0] != loads[queue[0][1]]:
                    heapq.heappop(queue)  # it has got more since
                chosen = queue[0][1]
            # Empty tensors count a little, or all of them would go to one rank.
            loads[chosen] += max(1, block.size_bytes)
            heapq.heappush(queue, (loads[chosen], chosen))
            if chosen == self._rank:
                mine.append(block)
        return mine


def _of_piece(spec: Spec, piece: regions.Piece, block_bytes: int) -> Iterator[Block]:
    parts = [part for box in piece.boxes for part in regions.blocks(box, ITEM_BYTES[spec.dtype], block_bytes)]
    for index, part in enumerate(parts):
        everything = part.shape == spec.shape
        key = spec.name if everything else f"{spec.name}#{piece.number}.{index}"
        yield Block(spec, key, part, whole=len(parts) == 1)


def _blocks(spec: Spec, block_bytes: int) -> Iterator[Block]:
    box = regions.whole(spec.shape)
    parts = list(regions.blocks(box, ITEM_BYTES[spec.dtype], block_bytes)) if spec.size_bytes else [box]
    if len(parts) == 1:
        yield Block(spec, spec.name, box, whole=True)
        return
    for index, part in enumerate(parts):
        yield Block(spec, f"{spec.name}#{index}", part, whole=False)


def _place(block: Block) -> tuple[bool, int, int, str]:
    """Its place in the blob: whole cache lines first, as copies across their borders take a third longer."""
    straddles = block.size_bytes % HEADER_ALIGN != 0
    return straddles, -ITEM_BYTES[block.spec.dtype], -block.size_bytes, block.key


def _header(blocks: Sequence[Block]) -> tuple[bytes, int]:
    """The safetensors length and header, padded so that the data begins aligned."""
    table: dict[str, object] = {}
    offset = 0
    for block in blocks:
        end = offset + block.size_bytes
        key = block.key
        while key in table or key == "__metadata__":  # a tensor may be called like a block of another
            key += "~"
        table[key] = {
            "dtype": block.spec.dtype,
            "shape": list(block.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = codec.dumps(table)
    text += b" " * (-(8 + len(text)) % HEADER_ALIGN)
    return len(text).to_bytes(8, "little") + text, offset


def _hash(specs: Sequence[Spec], world: int) -> str:
    """Of what all ranks see alike: no rank's own part of a tensor goes into it."""
    spreads: dict[Spread, str] = {}
    shared: list[list[object]] = []
    for spec in specs:
        if spec.local:
            continue
        facts: list[object] = [spec.name, spec.dtype, list(spec.shape), spec.owner]
        if spec.spread is not None:
            text = spreads.get(spec.spread)
            if text is None:
                text = spreads[spec.spread] = _digest(spec.spread.facts())
            facts.append(text)
        shared.append(facts)
    shared.sort(key=lambda facts: str(facts[0]))
    return _digest([RULE, world, shared])


def _digest(value: object) -> str:
    return "sha256:" + hashlib.sha256(codec.canonical(value)).hexdigest()
