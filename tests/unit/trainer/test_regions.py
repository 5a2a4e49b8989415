"""The arithmetic of shards: the same as torch's, whatever the shape and the mesh; never a byte too few."""

import itertools
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dtrain.coordinator.core.manifest import tiling_problem
from dtrain.protocol.checkpoint import BlobEntry, ChunkEntry, Manifest, TensorEntry
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.trainer.checkpoint import filling as fillings
from dtrain.trainer.checkpoint import layout, regions
from dtrain.trainer.checkpoint.filling import Filling, Target, merged
from dtrain.trainer.checkpoint.layout import Spec
from dtrain.trainer.checkpoint.reading import by_chunk
from dtrain.trainer.checkpoint.regions import Box, Cut, Spread
from dtrain.trainer.checkpoint.replicas import SAMPLE_BYTES, Replicas
from dtrain.trainer.checkpoint.source import Range
from dtrain.trainer.checkpoint.state import Leaf


def random_spread(draw: random.Random, dims: int) -> Spread:
    mesh = tuple(draw.choice([1, 2, 2, 3, 4]) for _ in range(draw.choice([1, 1, 2, 3])))
    cuts = []
    for _ in mesh:
        cut = None if dims == 0 or draw.random() < 0.25 else Cut(draw.randrange(dims))
        if cut is not None and draw.random() < 0.3:
            cut = Cut(cut.dim, draw.choice([2, 3]))
        cuts.append(cut)
    size = math.prod(mesh)
    # Sometimes the mesh is one of several beside each other.
    groups = [tuple(range(start, start + size)) for start in range(0, size * draw.choice([1, 1, 2]), size)]
    return Spread(mesh, tuple(groups), tuple(cuts))


def cut_by_torch(whole: torch.Tensor, spread: Spread, coordinate: tuple[int, ...]) -> torch.Tensor:
    for size, at, cut in zip(spread.mesh, coordinate, spread.cuts, strict=True):
        if cut is None:
            continue
        kind = Shard(cut.dim) if cut.factor == 1 else _StridedShard(cut.dim, split_factor=cut.factor)
        parts, _ = kind._split_tensor(whole, size, with_padding=False)
        whole = parts[at]
    return whole


def slices(origin: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(origin, shape, strict=True))


@pytest.mark.parametrize("seed", range(150))
def test_parts_are_cut_as_torch_cuts_them(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.choice([0, 1, 2, 3, 5, 8, 13]) for _ in range(draw.randrange(4)))
    whole = torch.arange(math.prod(shape)).view(shape)
    spread = random_spread(draw, len(shape))
    for coordinate in itertools.product(*map(range, spread.mesh)):
        expected = cut_by_torch(whole, spread, coordinate)
        found = torch.full_like(expected, -1)
        for box in regions.boxes_at(spread, shape, coordinate):
            found[slices(box.local, box.shape)] = whole[slices(box.origin, box.shape)]
        assert torch.equal(found, expected), (shape, spread, coordinate)


def test_ranks_of_every_slice_of_a_mesh_hold_the_same() -> None:
    spread = Spread((2,), ((0, 1), (2, 3)), (Cut(0),))
    first, second = regions.pieces(spread, (3, 2))
    assert (first.ranks, second.ranks) == ((0, 2), (1, 3))
    assert [box.shape for piece in (first, second) for box in piece.boxes] == [(2, 2), (1, 2)]
    assert regions.held(spread, (3, 2), 3) == second
    assert regions.held(spread, (3, 2), 4) is None


def random_specs(draw: random.Random) -> list[Spec]:
    specs = []
    for index in range(draw.randrange(1, 12)):
        shape = tuple(draw.choice([0, 1, 2, 3, 7, 12]) for _ in range(draw.randrange(4)))
        spread = random_spread(draw, len(shape)) if draw.random() < 0.7 else None
        owner = 0 if draw.random() < 0.2 else None
        specs.append(Spec(f"t{index}", draw.choice(["F32", "BF16", "U8"]), shape, owner, spread=spread))
    return specs


def ranks_of(specs: list[Spec]) -> int:
    return max((max(map(max, s.spread.groups)) + 1 for s in specs if s.spread is not None), default=2)


@pytest.mark.parametrize("seed", range(150))
def test_every_element_is_written_once_by_a_rank_that_has_it(seed: int) -> None:
    draw = random.Random(seed)
    specs = random_specs(draw)
    world = ranks_of(specs)
    block_bytes = draw.choice([None, 1, 16, 100])
    plans = [layout.plan(specs, rank, world, block_bytes=block_bytes) for rank in range(world)]
    assert len({plan.hash for plan in plans}) == 1
    chunks: dict[str, list[ChunkEntry]] = {}
    for rank, plan in enumerate(plans):
        for name, entry in plan.entries().items():
            chunks.setdefault(name, []).extend(entry.chunks)
        for item in plan.placed:
            block = item.block
            if block.spec.spread is None or not block.size_bytes:
                continue
            piece = regions.held(block.spec.spread, block.spec.shape, rank)
            assert piece is not None
            # It lies inside of one of the rank's own boxes, as far in as the block says.
            assert any(
                (inside := regions.common(box, block.origin, block.shape)) is not None
                and inside.shape == block.shape
                and inside.local == block.box.local
                for box in piece.boxes
            )
    for spec in specs:
        assert tiling_problem(TensorEntry(spec.dtype, spec.shape, tuple(chunks[spec.name]))) == ""


def test_the_hash_tells_meshes_apart_but_not_ranks() -> None:
    def of(spread: Spread | None, rank: int) -> str:
        return layout.plan([Spec("w", "F32", (8, 4), spread=spread)], rank, 4).hash

    rows = Spread((4,), ((0, 1, 2, 3),), (Cut(0),))
    columns = Spread((4,), ((0, 1, 2, 3),), (Cut(1),))
    assert len({of(rows, rank) for rank in range(4)}) == 1
    assert len({of(spread, 0) for spread in (rows, columns, None)}) == 3


def test_replicas_of_shards_are_shared_out_evenly() -> None:
    mesh = Spread((2, 2), ((0, 1, 2, 3),), (None, Cut(0)))
    specs = [Spec(f"w{i}", "F32", (64, 1000 + i), spread=mesh) for i in range(40)]
    specs.append(Spec("plain", "F32", (500, 500)))
    loads = [layout.plan(specs, rank, 4).blob_bytes for rank in range(4)]
    assert max(loads) / (sum(loads) / 4) <= 1.05


# Reading ---------------------------------------------------------------------------


class Memory:
    """One blob that counts the bytes it was asked for."""

    def __init__(
        self, blob: bytes, tensors: dict[str, TensorEntry], chunk_bytes: int, *, fills: bool = False
    ) -> None:
        entry = BlobEntry("b", Rank(0), len(blob), "00", ("00",))
        self.manifest = Manifest(
            1, ClusterName("c"), JobName("j"), Uid("u"), Seq(1), Attempt(1), "n", Step(1), 1, chunk_bytes,
            "crc32c", len(blob), "", (entry,), tensors, {},
        )  # fmt: skip
        self._blob = memoryview(blob)
        self.filler = self if fills else None
        self.filled: list[Range] = []
        self.wanted: list[Range] = []

    def expect(self, ranges: Any) -> None:
        self.wanted += ranges

    def fill(self, parts: Any) -> None:
        by_chunk(self.manifest, parts)  # refuses what overlaps
        for part in parts:
            self.filled.append(Range(part.blob, part.offset, len(part.memory)))
            part.memory[:] = self._blob[part.offset : part.offset + len(part.memory)]

    def want(self, ranges: Any) -> None:
        self.wanted += ranges

    def is_still_good(self) -> bool:
        return True

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        assert any(r.offset <= offset and offset + length <= r.offset + r.length for r in self.wanted)
        return self._blob[offset : offset + length]


def random_tiling(draw: random.Random, box: Box, depth: int) -> Iterator[Box]:
    wide = [dim for dim, size in enumerate(box.shape) if size > 1]
    if depth == 0 or not wide:
        yield box
        return
    dim = draw.choice(wide)
    at = draw.randrange(1, box.shape[dim])
    yield from random_tiling(draw, regions.slab(box, dim, 0, at), depth - 1)
    yield from random_tiling(draw, regions.slab(box, dim, at, box.shape[dim]), depth - 1)


@pytest.mark.parametrize("fills", [True, False])
@pytest.mark.parametrize("seed", range(150))
def test_any_region_is_read_out_of_any_tiling(seed: int, fills: bool) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.choice([1, 2, 5, 9]) for _ in range(draw.randrange(4)))
    whole = torch.arange(math.prod(shape), dtype=torch.int16).view(shape) + 1
    blob, chunks = b"\0" * draw.choice([0, 1, 2]), []
    for box in random_tiling(draw, regions.whole(shape), draw.randrange(5)):
        data = whole[slices(box.origin, box.shape)].contiguous().numpy().tobytes()
        chunks.append(ChunkEntry(box.origin, box.shape, 0, len(blob), len(data)))
        blob += data
    tensors = {"t": TensorEntry("I16", shape, tuple(chunks))}
    source = Memory(blob, tensors, draw.choice([1, 8, 1 << 20]), fills=fills)
    origin = tuple(draw.randrange(size) for size in shape)
    size = tuple(draw.randrange(1, n - o + 1) for n, o in zip(shape, origin, strict=True))
    margin = tuple(draw.randrange(3) for _ in shape)
    place = torch.zeros(tuple(s + m for s, m in zip(size, margin, strict=True)), dtype=torch.int16)
    filling = Filling(source, 0)
    filling.add(Target("t", place, (Box(origin, size, margin),)))
    filling.fill()
    expected = torch.zeros_like(place)
    expected[slices(margin, size)] = whole[slices(origin, size)]
    assert torch.equal(place, expected)


def test_only_rows_that_are_needed_are_asked_for() -> None:
    whole = torch.arange(1000, dtype=torch.int32).view(100, 10)
    chunk = ChunkEntry((0, 0), (100, 10), 0, 0, 4000)
    entry = TensorEntry("I32", (100, 10), (chunk,))
    source = Memory(whole.numpy().tobytes(), {"t": entry}, 64)
    rows = torch.empty(5, 10, dtype=torch.int32)
    filling = Filling(source, 0)
    filling.add(Target("t", rows, (Box((20, 0), (5, 10), (0, 0)),)))
    filling.add(Target("t", torch.empty(5, 10, dtype=torch.int32), (Box((22, 0), (5, 10), (0, 0)),)))
    filling.fill()
    assert source.wanted == [Range(0, 800, 280)]
    assert torch.equal(rows, whole[20:25])


def test_what_several_targets_need_is_read_for_each_and_never_twice_at_once() -> None:
    whole = torch.arange(1000, dtype=torch.int32).view(100, 10)
    entry = TensorEntry("I32", (100, 10), (ChunkEntry((0, 0), (100, 10), 0, 0, 4000),))
    source = Memory(whole.numpy().tobytes(), {"t": entry}, 64, fills=True)
    filling = Filling(source, 0)
    places = [torch.zeros(5, 10, dtype=torch.int32) for _ in range(3)]
    for number, place in enumerate(places):
        filling.add(Target("t", place, (Box((20 + 2 * number, 0), (5, 10), (0, 0)),)))
    filling.fill()
    assert source.filled == [Range(0, at, 200) for at in (800, 880, 960)]
    for number, place in enumerate(places):
        assert torch.equal(place, whole[20 + 2 * number : 25 + 2 * number])


def test_what_is_not_stored_as_it_lies_goes_past_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dtype, gaps between the rows: a few regions at a time."""
    monkeypatch.setattr(fillings, "STAGED_BYTES_MAX", 1000)
    whole = torch.arange(1000, dtype=torch.int32).view(100, 10)
    entry = TensorEntry("I32", (100, 10), (ChunkEntry((0, 0), (100, 10), 0, 0, 4000),))
    source = Memory(whole.numpy().tobytes(), {"t": entry}, 64, fills=True)
    sizes: list[int] = []
    fill = source.fill

    def counted(parts: Any) -> None:
        sizes.append(sum(len(part.memory) for part in parts))
        fill(parts)

    source.fill = counted  # type: ignore[method-assign]
    filling = Filling(source, 0)
    other = torch.zeros(100, 10, dtype=torch.int64)
    filling.add(Target("t", other, tuple(Box((at, 0), (20, 10), (at, 0)) for at in range(0, 100, 20))))
    wide = torch.zeros(20, 30, dtype=torch.int32)
    filling.add(Target("t", wide, (Box((0, 0), (20, 10), (0, 5)),)))
    filling.fill()
    assert torch.equal(other, whole.long())
    assert torch.equal(wide[:, 5:15], whole[:20])
    assert sizes == [800] * 6


def test_memory_that_is_read_into_counts_as_written_to() -> None:
    entry = TensorEntry("F32", (4,), (ChunkEntry((0,), (4,), 0, 0, 16),))
    place = torch.ones(4)
    leaf = torch.ones(4, requires_grad=True)
    product = (leaf * place).sum()
    filling = Filling(Memory(bytes(16), {"t": entry}, 64, fills=True), 0)
    filling.add(Target("t", place, (regions.whole((4,)),)))
    filling.fill()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_columns_are_asked_for_apart_only_where_much_lies_between() -> None:
    box = Box((0, 2), (3, 1), (0, 0))
    assert [(run.start, run.stop) for run in regions.runs(box, (0, 0), (3, 10), 100)] == [(2, 23)]
    assert [(run.start, run.stop) for run in regions.runs(box, (0, 0), (3, 10), 5)] == [
        (2, 3),
        (12, 13),
        (22, 23),
    ]


def test_a_hole_in_the_chunks_is_refused() -> None:
    entry = TensorEntry("U8", (4,), (ChunkEntry((0,), (3,), 0, 0, 3),))
    filling = Filling(Memory(b"abc", {"t": entry}, 64), 0)
    with pytest.raises(Refused, match="do not make up"):
        filling.add(Target("t", torch.empty(4, dtype=torch.uint8), (regions.whole((4,)),)))


def test_ranges_are_merged() -> None:
    assert merged([Range(1, 5, 5), Range(0, 0, 4), Range(0, 2, 4), Range(0, 6, 1), Range(0, 9, 0)]) == [
        Range(0, 0, 7),
        Range(0, 9, 0),
        Range(1, 5, 5),
    ]


# Replicas --------------------------------------------------------------------------


def leaf(name: str, tensor: torch.Tensor, **changes: Any) -> Leaf:
    return Leaf(name, tensor, "F32", changes.get("owner"), changes.get("local", False), tuple(tensor.shape))


def digests(*leaves: Leaf, world: int = 2) -> dict[str, str]:
    replicas = Replicas(0, world)
    tensors = [leaf.tensor for leaf in leaves]
    replicas.plan([leaf.spec for leaf in leaves], tensors)
    return replicas.digests(tensors)


def test_one_element_of_a_short_tensor_and_a_drift_of_a_long_one_are_seen() -> None:
    short, long = torch.rand(30, 10), torch.rand(1000, 1000)
    before = digests(leaf("short", short), leaf("long", long))
    short[7, 3] += 1
    long *= 1.001
    after = digests(leaf("short", short), leaf("long", long))
    assert before.keys() == after.keys() == {"short", "long"}
    assert all(before[name] != after[name] for name in before)


def test_the_sample_of_a_long_tensor_reaches_its_end() -> None:
    for size in (SAMPLE_BYTES // 4 + 1, 50_021, 1_000_000):
        long = torch.rand(size)
        before = digests(leaf("long", long))
        long[-64:] += 1
        assert digests(leaf("long", long)) != before


def test_a_digest_is_of_values_and_not_of_how_they_lie_in_memory() -> None:
    for shape in ((20, 30), (300, 200), (7, 40, 50)):
        tensor = torch.rand(shape)
        other = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        assert not other.is_contiguous()
        assert digests(leaf("t", tensor)) == digests(leaf("t", other))


def test_what_only_one_rank_has_or_counts_is_not_compared() -> None:
    tensor = torch.rand(4)
    assert digests(leaf("buffer", tensor, owner=0), leaf("rng", tensor, owner=0, local=True)) == {}
    assert digests(leaf("w", tensor), world=1) == {}
    assert digests(leaf("empty", torch.empty(0))) == {}


def test_thousands_of_small_tensors_cost_milliseconds() -> None:
    leaves = [leaf(f"t{i}", torch.rand(64)) for i in range(8000)]
    replicas = Replicas(0, 2)
    tensors = [leaf.tensor for leaf in leaves]
    replicas.plan([leaf.spec for leaf in leaves], tensors)
    spent = []
    for _ in range(5):
        began = time.process_time()
        assert len(replicas.digests(tensors)) == 8000
        spent.append(time.process_time() - began)
    assert min(spent) <= 0.05


def test_placements_of_torch_are_known_by_name() -> None:
    # What dtrain recognises a placement by, without importing the module behind it.
    assert [type(p).__name__ for p in (Shard(0), Replicate(), _StridedShard(0, split_factor=2))] == [
        "Shard",
        "Replicate",
        "_StridedShard",
    ]
