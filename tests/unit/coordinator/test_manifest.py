"""Merging rank manifests: what fits is merged, everything else is refused by name."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.coordinator.core.manifest import merge, tiling_problem
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CHUNK_BYTES,
    BlobEntry,
    ChunkEntry,
    Manifest,
    ObjectEntry,
    OpenRecord,
    RankManifest,
    TensorEntry,
)
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid

RECORD = OpenRecord(Term(5), Uid("u1"), Seq(7), Attempt(2), Step(40), "n7", 2, 300.0)


def chunk(o: Sequence[int], s: Sequence[int], *, b: int = 0, off: int = 0, item: int = 4) -> ChunkEntry:
    return ChunkEntry(tuple(o), tuple(s), b, off, prod(s) * item)


def tensor(shape: Sequence[int], *chunks: ChunkEntry, dtype: str = "F32") -> TensorEntry:
    return TensorEntry(dtype, tuple(shape), chunks)


def blob(rank: int, size: int = 4096) -> BlobEntry:
    return BlobEntry(f"blobs/{rank}.st", Rank(rank), size, "00", ("00",) * -(-size // CHUNK_BYTES))


def value(of: Any) -> ObjectEntry:
    return ObjectEntry(of, f"{zlib.crc32(codec.canonical(of)):08x}")


def rank_manifest(rank: int, **changes: Any) -> RankManifest:
    base = RankManifest(
        v=1,
        cluster=ClusterName("c"),
        job=JobName("j"),
        uid=Uid("u1"),
        seq=Seq(7),
        attempt=Attempt(2),
        nonce="n7",
        step=Step(40),
        rank=Rank(rank),
        world=2,
        blobs=(blob(rank),),
        tensors={"w": tensor((4, 2), chunk((2 * rank, 0), (2, 2)))},
        objects={f"rng/{rank}": value(rank), "sched": value({"lr": 1})},
        layout="h",
    )
    return replace(base, **changes)


def merged(*parts: RankManifest, record: OpenRecord = RECORD) -> Manifest:
    return merge(
        cluster=ClusterName("c"),
        job=JobName("j"),
        uid=record.uid,
        record=record,
        parts=parts,
        parent=Seq(6),
        created="now",
    )


def test_parts_that_fit_become_one_manifest() -> None:
    manifest = merged(rank_manifest(1), rank_manifest(0))
    assert [b.rank for b in manifest.blobs] == [0, 1]
    assert [c.b for c in manifest.tensors["w"].chunks] == [0, 1]
    assert sorted(manifest.objects) == ["rng/0", "rng/1", "sched"]
    assert (manifest.bytes, manifest.parent, manifest.world, manifest.layout) == (8192, 6, 2, "h")
    assert manifest == merged(rank_manifest(0), rank_manifest(1))


def test_ranks_with_other_names_are_told_which() -> None:
    stages = [
        rank_manifest(rank, layout=f"h{rank}", tensors={}, same={"norm": "1", f"layer.{rank}#2": "2"})
        for rank in (0, 1)
    ]
    with pytest.raises(Refused) as told:
        merged(*stages)
    assert "only ranks 0 name layer.0 (" in told.value.message
    assert "only ranks 1 name layer.1 (" in told.value.message
    assert "norm" not in told.value.message
    # Without the digests of replicas a rank names only what it writes: nothing follows from that.
    with pytest.raises(Refused) as told:
        merged(*(replace(stage, same={}) for stage in stages))
    assert "only ranks" not in told.value.message


def test_blob_indices_are_moved_past_those_of_earlier_ranks() -> None:
    zero = rank_manifest(0, blobs=(blob(0), replace(blob(0), key="blobs/0b.st")))
    zero = replace(zero, tensors={"w": tensor((4, 2), chunk((0, 0), (2, 2), b=1))})
    manifest = merged(zero, rank_manifest(1))
    assert [manifest.blobs[c.b].key for c in manifest.tensors["w"].chunks] == ["blobs/0b.st", "blobs/1.st"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seq": 8}, "rank 1 wrote seq 8, not 7"),
        ({"attempt": 1}, "rank 1 wrote attempt 1, not 2"),
        ({"step": 41}, "rank 1 wrote step 41, not 40"),
        ({"nonce": "x"}, "rank 1 wrote nonce x, not n7"),
        ({"uid": "u2"}, "rank 1 wrote uid u2, not u1"),
        ({"world": 3}, "rank 1 wrote world 3, not 2"),
        ({"cluster": "d"}, "rank 1 wrote cluster d, not c"),
        ({"job": "k"}, "rank 1 wrote job k, not j"),
        ({"rank": 0}, "ranks 0 are there twice; ranks 1 are missing"),
        ({"rank": 2}, "ranks 1 are missing; ranks 2 are not of this attempt"),
        ({"layout": "other"}, "ranks disagree about names"),
        ({"objects": {"sched": value({"lr": 2})}}, "object sched differs between ranks 0 and 1"),
        (
            {"objects": {"sched": replace(value({"lr": 1}), value={"lr": 9})}},
            "object sched of rank 1 is not what its digest says",
        ),
        ({"tensors": {}}, "tensor w F32[4, 2]: chunks hold 4 of 8 elements"),
        ({"tensors": {"w": tensor((4, 2), chunk((1, 0), (2, 2)))}}, "chunks overlap"),
        ({"tensors": {"w": tensor((4, 2), chunk((3, 0), (2, 2)))}}, "lies outside"),
        ({"tensors": {"w": tensor((4, 2), chunk((2,), (4,)))}}, "a chunk has 1 dimensions"),
        ({"tensors": {"w": tensor((4, 2), chunk((0, 0), (4, 2)))}}, "chunks hold 12 elements"),
        ({"tensors": {"w": tensor((4, 3), chunk((2, 0), (2, 2)))}}, "tensor w is F32[4, 3] on rank 1"),
        (
            {"tensors": {"w": tensor((4, 2), chunk((2, 0), (2, 2)), dtype="I32")}},
            "tensor w is I32[4, 2] on rank 1",
        ),
        ({"tensors": {"w": tensor((4, 2), chunk((2, 0), (2, 2), b=1))}}, "blob 1, which is not there"),
        ({"tensors": {"w": tensor((4, 2), chunk((2, 0), (2, 2), off=4095))}}, "outside its blob"),
        ({"tensors": {"w": tensor((4, 2), chunk((2, 0), (2, 2), item=2))}}, "has 8 bytes for [2, 2] F32"),
        ({"blobs": (replace(blob(1), chunks=()),)}, "of 4096 bytes has 0 digests"),
        ({"blobs": (replace(blob(1), rank=Rank(0)),)}, "rank 1 lists a blob of rank 0"),
        ({"blobs": (replace(blob(1), key="blobs/0.st"),)}, "blobs/0.st is listed twice"),
    ],
)
def test_parts_that_disagree_are_refused_by_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused) as caught:
        merged(rank_manifest(0), replace(rank_manifest(1), **change))
    assert caught.value.code is ErrorCode.RANKS_DISAGREE
    assert told in caught.value.message


def test_replicas_that_differ_are_refused_by_the_name_of_the_tensor() -> None:
    same = {"w": "aa", "v#1": "bb", "only0": "x"}
    assert merged(rank_manifest(0, same=same), rank_manifest(1, same={"w": "aa", "v#1": "bb"}))
    with pytest.raises(Refused) as caught:
        merged(rank_manifest(0, same=same), rank_manifest(1, same={"w": "ab", "v#1": "bc"}))
    assert caught.value.code is ErrorCode.RANKS_DISAGREE
    assert "tensor v#1 differs between rank 0 and ranks 1; tensor w differs" in caught.value.message
    assert "DTRAIN_CHECK_REPLICAS" in caught.value.fix


def test_ranks_without_digests_are_not_compared() -> None:
    assert merged(rank_manifest(0, same={"w": "aa"}), rank_manifest(1)).tensors


def test_missing_rank_is_refused() -> None:
    with pytest.raises(Refused, match="ranks 1 are missing"):
        merged(rank_manifest(0))


def test_many_problems_are_counted_not_listed() -> None:
    tensors = {f"t{i}": tensor((4,)) for i in range(20)}
    with pytest.raises(Refused, match="; and 15 more"):
        merged(rank_manifest(0, tensors=tensors), rank_manifest(1, tensors={}))


@pytest.mark.parametrize(
    ("entry", "fits"),
    [
        (tensor((), chunk((), ())), True),
        (tensor(()), False),
        (tensor((), chunk((), ()), chunk((), ())), False),
        (tensor((0, 4)), True),
        (tensor((0, 4), chunk((0, 0), (0, 4))), True),
        (tensor((2,), chunk((0,), (2,)), chunk((2,), (0,))), True),
        (tensor((2, 2), chunk((0, 0), (1, 2)), chunk((1, 0), (1, 1)), chunk((1, 1), (1, 1))), True),
        (tensor((2, 2), chunk((0, 0), (2, 1)), chunk((0, 0), (1, 2))), False),
    ],
)
def test_odd_shapes(entry: TensorEntry, fits: bool) -> None:
    assert (tiling_problem(entry) == "") is fits


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _cut(draw: Callable[..., Any], box: Box, depth: int) -> list[Box]:
    """Cut a box recursively into random boxes: grids and windmills alike come out."""
    o, s = box
    axes = [axis for axis, size in enumerate(s) if size > 1]
    if depth == 0 or not axes or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, s[axis] - 1))
    low = (o, (*s[:axis], at, *s[axis + 1 :]))
    high = ((*o[:axis], o[axis] + at, *o[axis + 1 :]), (*s[:axis], s[axis] - at, *s[axis + 1 :]))
    return _cut(draw, low, depth - 1) + _cut(draw, high, depth - 1)


@st.composite
def tilings(draw: Callable[..., Any]) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    return shape, draw(st.permutations(_cut(draw, ((0,) * len(shape), shape), 4)))


@settings(max_examples=150, deadline=None)
@given(tilings())
def test_every_tiling_is_accepted(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = tiling
    assert tiling_problem(tensor(shape, *(chunk(o, s) for o, s in boxes))) == ""


@settings(max_examples=150, deadline=None)
@given(tilings(), st.data())
def test_moved_chunks_are_judged_as_by_counting_cells(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    index = data.draw(st.integers(0, len(boxes) - 1))
    o = tuple(data.draw(st.integers(0, n)) for n in shape)
    boxes = [(o, boxes[index][1]) if i == index else box for i, box in enumerate(boxes)]
    cells: list[tuple[int, ...]] = []
    for origin, size in boxes:
        points: list[tuple[int, ...]] = [()]
        for start, length in zip(origin, size, strict=True):
            points = [(*p, x) for p in points for x in range(start, start + length)]
        cells += points
    exact = len(cells) == len(set(cells)) == prod(shape) and all(
        all(x < n for x, n in zip(cell, shape, strict=True)) for cell in cells
    )
    assert (tiling_problem(tensor(shape, *(chunk(o, s) for o, s in boxes))) == "") is exact


def test_many_row_blocks_are_checked_quickly() -> None:
    rows = 200_000
    entry = tensor((rows, 8), *(chunk((row, 0), (1, 8)) for row in range(rows)))
    assert tiling_problem(entry) == ""
