"""Hyper-rectangles of tensors: which ranks hold which of them, and which bytes of a chunk two share.

Pure arithmetic on shapes and meshes, without torch, so that every rank works out
the parts of all ranks alike and without a word.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """``shape`` elements from ``origin`` of a tensor, which lie at ``local`` in the rank's own part of it."""

    origin: Shape
    shape: Shape
    local: Shape

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """What ``ranks`` hold alike, in boxes without a common element; piece ``number`` of its tensor."""

    number: int
    ranks: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def elements(self) -> int:
        return sum(box.elements for box in self.boxes)


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor dimension split over a mesh dimension, as ``torch.chunk`` splits.

    ``factor`` above 1: it is split into so many first, and each of those over the mesh;
    this is how FSDP splits what tensor parallelism has split already.
    """

    dim: int
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Spread:
    """How a tensor lies on ranks.

    ``groups``: the ranks of each mesh of shape ``mesh``, row by row; several where
    every slice of a larger mesh holds the tensor by itself. ``cuts`` has one entry
    per mesh dimension; None: replicated along it.
    """

    mesh: Shape
    groups: tuple[tuple[int, ...], ...]
    cuts: tuple[Cut | None, ...]

    def facts(self) -> list[object]:
        """The same JSON on all ranks, for digests."""
        cuts = [None if cut is None else [cut.dim, cut.factor] for cut in self.cuts]
        return [list(self.mesh), [list(group) for group in self.groups], cuts]


def whole(shape: Shape) -> Box:
    """The box that is the tensor."""
    origin = (0,) * len(shape)
    return Box(origin, shape, origin)


@functools.lru_cache(maxsize=4096)
def pieces(spread: Spread, shape: Shape) -> tuple[Piece, ...]:
    """All pieces of a tensor of ``shape``, each with the ranks that hold it. Some have no elements.

    Raises:
        ValueError: a dimension is split that the tensor does not have.
    """
    split = [size if cut is not None else 1 for size, cut in zip(spread.mesh, spread.cuts, strict=True)]
    holders: dict[Shape, list[int]] = {}
    for group in spread.groups:
        coordinates = itertools.product(*(range(size) for size in spread.mesh))
        for rank, coordinate in zip(group, coordinates, strict=True):
            at = tuple(c if cut is not None else 0 for c, cut in zip(coordinate, spread.cuts, strict=True))
            holders.setdefault(at, []).append(rank)
    found = []
    for number, at in enumerate(itertools.product(*(range(size) for size in split))):
        ranks = tuple(sorted(set(holders.get(at, ()))))
        found.append(Piece(number, ranks, boxes_at(spread, shape, at)))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def is_partition(spread: Spread, shape: Shape) -> bool:
    """True if no element is held by two ranks."""
    return all(len(piece.ranks) <= 1 for piece in pieces(spread, shape))


def held(spread: Spread, shape: Shape, rank: int) -> Piece | None:
    """The piece that ``rank`` holds; None if it has no part in the mesh."""
    return _by_rank(spread, shape).get(rank)


@functools.lru_cache(maxsize=4096)
def _by_rank(spread: Spread, shape: Shape) -> dict[int, Piece]:
    return {rank: piece for piece in pieces(spread, shape) for rank in piece.ranks}


def boxes_at(spread: Spread, shape: Shape, coordinate: Shape) -> tuple[Box, ...]:
    """What lies at ``coordinate`` of the mesh, in the order in which it lies there."""
    ranges: list[list[tuple[int, int]]] = [[(0, size)] for size in shape]
    for size, at, cut in zip(spread.mesh, coordinate, spread.cuts, strict=True):
        if cut is None:
            continue
        if not 0 <= cut.dim < len(shape):
            raise ValueError(f"dimension {cut.dim} of a tensor with {len(shape)} is split")
        ranges[cut.dim] = _joined(_split(ranges[cut.dim], cut.factor, size, at))
    runs = [_with_local(parts) for parts in ranges]
    return tuple(
        Box(tuple(r[0] for r in chosen), tuple(r[1] - r[0] for r in chosen), tuple(r[2] for r in chosen))
        for chosen in itertools.product(*runs)
        if all(start < stop for start, stop, _ in chosen)
    )


def _split(parts: list[tuple[int, int]], factor: int, size: int, at: int) -> list[tuple[int, int]]:
    if factor == 1:
        return _chunk(parts, size, at)
    found: list[tuple[int, int]] = []
    for index in range(factor):
        found += _chunk(_chunk(parts, factor, index), size, at)
    return found


def _chunk(parts: list[tuple[int, int]], count: int, index: int) -> list[tuple[int, int]]:
    """Part ``index`` of ``count``, all as long as the first except for the last ones, which may be empty."""
    total = sum(stop - start for start, stop in parts)
    step = -(-total // count)
    first, last = min(total, step * index), min(total, step * (index + 1))
    found = []
    passed = 0
    for start, stop in parts:
        low, high = max(first - passed, 0), min(last - passed, stop - start)
        if low < high:
            found.append((start + low, start + high))
        passed += stop - start
    return found


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, stop in parts:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _with_local(parts: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    found = []
    passed = 0
    for start, stop in parts:
        found.append((start, stop, passed))
        passed += stop - start
    return found


def blocks(box: Box, item_bytes: int, block_bytes: int) -> Iterator[Box]:
    """Cut a box into boxes of at most ``block_bytes``, each contiguous where the box is.

    Rows first; a row that is too long is cut as a tensor of its own.
    """
    if box.elements * item_bytes <= block_bytes:
        yield box
        return
    dim = next((dim for dim, size in enumerate(box.shape) if size > 1), None)
    if dim is None:
        yield box
        return
    rows = box.shape[dim]
    row_bytes = box.elements // rows * item_bytes
    step = max(1, block_bytes // row_bytes)
    for start in range(0, rows, step):
        part = slab(box, dim, start, min(rows, start + step))
        if step == 1 and row_bytes > block_bytes:
            yield from blocks(part, item_bytes, block_bytes)
        else:
            yield part


def slab(box: Box, dim: int, start: int, stop: int) -> Box:
    """Rows ``start`` to ``stop`` along ``dim``, counted within the box."""

    def at(values: Shape, value: int) -> Shape:
        return (*values[:dim], value, *values[dim + 1 :])

    return Box(
        at(box.origin, box.origin[dim] + start),
        at(box.shape, stop - start),
        at(box.local, box.local[dim] + start),
    )


def common(first: Box, origin: Sequence[int], shape: Sequence[int]) -> Box | None:
    """What ``first`` shares with the box at ``origin``, with ``first``'s local position; None: nothing."""
    starts, sizes, local = [], [], []
    for a, s, at, b, t in zip(first.origin, first.shape, first.local, origin, shape, strict=True):
        start, stop = max(a, b), min(a + s, b + t)
        if start >= stop:
            return None
        starts.append(start)
        sizes.append(stop - start)
        local.append(at + start - a)
    return Box(tuple(starts), tuple(sizes), tuple(local))


@dataclass(frozen=True, slots=True)
class Run:
    """Elements ``start`` to ``stop`` of a chunk that hold ``box``: all of them, or with gaps."""

    box: Box
    start: int
    stop: int


def runs(box: Box, origin: Sequence[int], shape: Sequence[int], gap_max: int) -> Iterator[Run]:
    """Where ``box`` lies in a row-major chunk; cut wherever more than ``gap_max`` elements lie between."""
    strides = strides_of(shape)
    first = sum((o - at) * stride for o, at, stride in zip(box.origin, origin, strides, strict=True))
    span = 1 + sum((size - 1) * stride for size, stride in zip(box.shape, strides, strict=True))
    dim = next((dim for dim, size in enumerate(box.shape) if size > 1), None)
    if dim is not None:
        inner = span - (box.shape[dim] - 1) * strides[dim]
        if strides[dim] - inner > gap_max:
            for row in range(box.shape[dim]):
                yield from runs(slab(box, dim, row, row + 1), origin, shape, gap_max)
            return
    yield Run(box, first, first + span)


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    found = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        found[dim] = found[dim + 1] * shape[dim + 1]
    return tuple(found)
