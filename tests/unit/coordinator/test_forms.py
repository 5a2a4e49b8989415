"""Rank manifests judged as text: what is remembered changes neither verdict nor manifest."""

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.agent.rank_manifest import encode
from dtrain.coordinator.core.forms import Form, Judged, Merge, RankForm, RankText, judge, judge_in_full
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.remembered import Forms
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
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

BYTES_MAX = 1 << 24
WORLD = 2
LONG = {"$dict": [["layer", {"$tensor": f"model.{number}"}] for number in range(40)]}


def merging(seq: int) -> Merge:
    record = OpenRecord(Term(5), Uid("u1"), Seq(seq), Attempt(2), Step(40), f"n{seq}", WORLD, 300.0)

    def call(parts: Sequence[RankManifest]) -> Manifest:
        return merge(
            cluster=ClusterName("c"),
            job=JobName("j"),
            uid=Uid("u1"),
            record=record,
            parts=parts,
            parent=Seq(seq - 1),
            created="now",
        )

    return call


def value(of: Any) -> ObjectEntry:
    return ObjectEntry(of, f"{zlib.crc32(codec.canonical(of)):08x}")


def rank_manifest(rank: int, seq: int = 7, **changes: Any) -> RankManifest:
    key = f"blobs/{seq}/{rank}.st"
    base = RankManifest(
        v=1,
        cluster=ClusterName("c"),
        job=JobName("j"),
        uid=Uid("u1"),
        seq=Seq(seq),
        attempt=Attempt(2),
        nonce=f"n{seq}",
        step=Step(40),
        rank=Rank(rank),
        world=WORLD,
        blobs=(
            BlobEntry(key, Rank(rank), 64, "00", ("00",)),
            BlobEntry(f"{key}b", Rank(rank), 8, "0", ("0",)),
        ),
        tensors={
            "w": TensorEntry("F32", (4, 2), (ChunkEntry((2 * rank, 0), (2, 2), 0, 0, 16),)),
            f"only/{rank}": TensorEntry("I64", (), (ChunkEntry((), (), 1, 0, 8),)),
            "empty": TensorEntry("F32", (0, 3), ()),
        },
        objects={"model": value(LONG), f"rng/{rank}": value([rank, seq]), "sched": value({"lr": 1e-05})},
        layout="h",
        same={"w": "aa", "v#1": "bb"},
    )
    return replace(base, **changes)


def written(part: RankManifest, *, rank: int | None = None) -> RankText:
    """As the agent writes it: what the rank left goes behind, its tensors last."""
    document = codec.to_json(part)
    index = {name: document.get(name, {}) for name in ("layout", "objects", "same", "tensors")}
    head = replace(part, layout="", objects={}, same={}, tensors={})
    text = gzip.decompress(encode(head, codec.canonical(index)))
    return RankText(Rank(part.rank if rank is None else rank), f"{part.rank}.json.gz", text)


def both(seq: int = 7, **changes: Any) -> list[RankText]:
    return [written(rank_manifest(rank, seq, **changes)) for rank in range(WORLD)]


def former() -> Form:
    """What the checkpoint before is remembered by."""
    form = judge(both(6), merging(6), Form(), bytes_max=BYTES_MAX).form
    assert form is not None
    return form


FORMER = former()


def verdict(judging: Callable[[], Judged]) -> tuple[Any, ...]:
    try:
        judged = judging()
    except Refused as error:
        return (error.code, error.message, error.fix)
    return (judged.text, judged.blobs, judged.bytes)


def alike(texts: Sequence[RankText], seq: int = 7) -> tuple[Any, ...]:
    """The verdict, which must not depend on what is remembered."""
    expected = verdict(partial(judge_in_full, texts, merging(seq), bytes_max=BYTES_MAX))
    for form in (Form(), FORMER):
        assert verdict(partial(judge, texts, merging(seq), form, bytes_max=BYTES_MAX)) == expected
    return expected


def test_parts_are_merged_alike_with_and_without_a_form() -> None:
    text, blobs, size = alike(both())
    manifest = codec.decode(Manifest, text)
    assert (manifest.blobs, manifest.bytes) == (blobs, size)
    assert sorted(manifest.tensors) == ["empty", "only/0", "only/1", "w"]
    assert [chunk.b for chunk in manifest.tensors["w"].chunks] == [0, 2]
    assert sorted(manifest.objects) == ["model", "rng/0", "rng/1", "sched"]
    assert text == codec.canonical(codec.to_json(manifest))


def test_the_order_of_the_parts_does_not_matter() -> None:
    assert alike(both()) == alike(both()[::-1])


def test_what_did_not_change_is_taken_over_and_not_made_again() -> None:
    form = judge(both(), merging(7), FORMER, bytes_max=BYTES_MAX).form
    assert form is not None
    assert form.tensors is FORMER.tensors
    assert form.ranks is FORMER.ranks
    assert form.objects["model"][0] is FORMER.objects["model"][0]


def test_a_state_that_changed_is_read_anew_and_remembered() -> None:
    more = {"x": TensorEntry("U8", (1,), (ChunkEntry((0,), (1,), 0, 0, 1),))}
    texts = [
        written(rank_manifest(0, tensors=dict(rank_manifest(0).tensors) | more)),
        written(rank_manifest(1, objects={"model": value([LONG, 1])})),
    ]
    assert alike(texts)[0] is ErrorCode.RANKS_DISAGREE  # model differs
    texts = [texts[0], both()[1]]
    alike(texts)
    form = judge(texts, merging(7), FORMER, bytes_max=BYTES_MAX).form
    assert form is not None
    assert b'"x":' in form.tensors
    assert form.ranks[1] == FORMER.ranks[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seq": 6}, "rank 1 wrote seq 6, not 7"),
        ({"nonce": "n6"}, "rank 1 wrote nonce n6, not n7"),
        ({"attempt": 1}, "rank 1 wrote attempt 1, not 2"),
        ({"layout": "other"}, "ranks disagree about names"),
        ({"same": {"w": "ab"}}, "tensor w differs between rank 0 and ranks 1"),
        ({"objects": {"model": value(LONG), "sched": value({"lr": 2})}}, "object sched differs"),
        (
            {"objects": {"model": replace(value([LONG]), crc=value(LONG).crc)}},
            "object model of rank 1 is not what its digest says",
        ),
        ({"blobs": rank_manifest(1).blobs[:1]}, "is in blob 1, which is not there"),
        (
            {"blobs": (replace(rank_manifest(1).blobs[0], bytes=15), rank_manifest(1).blobs[1])},
            "outside its blob",
        ),
        ({"blobs": rank_manifest(0).blobs}, "rank 1 lists a blob of rank 0"),
        ({"tensors": {}}, "tensor w F32[4, 2]: chunks hold 4 of 8 elements"),
        ({"tensors": rank_manifest(0).tensors}, "chunks overlap"),
    ],
)
def test_what_is_known_is_no_excuse_for_what_does_not_fit(change: Mapping[str, Any], told: str) -> None:
    answer = alike([written(rank_manifest(0)), written(rank_manifest(1, **change), rank=1)])
    assert answer[0] is ErrorCode.RANKS_DISAGREE
    assert told in answer[1]


def test_a_part_reported_for_another_rank_is_refused() -> None:
    answer = alike([written(rank_manifest(0)), written(rank_manifest(0), rank=1)])
    assert answer[:2] == (ErrorCode.BLOB_CORRUPT, "0.json.gz is of rank 0, not 1")


@pytest.mark.parametrize(
    "name",
    ["tensors", "objects", '"tensors":{', "a\\", "größe", "\N{PILE OF POO}", "\ud800", "", "__metadata__"],
)
def test_names_that_look_like_something_else(name: str) -> None:
    tensor = TensorEntry("U8", (1,), (ChunkEntry((0,), (1,), 0, 0, 1),))
    part = rank_manifest(0)
    text, _, _ = alike(
        [
            written(
                replace(part, tensors={**part.tensors, name: tensor}, objects={name: value({name: LONG})})
            ),
            both()[1],
        ]
    )
    assert len(codec.decode(Manifest, text).tensors) == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rank":1,', b'"rank":1,"rank":1,'),
        (b'"same":{', b'"same":{"w":"aa",'),
        (b'"objects":{', b'"objects":{},"objects":{'),
        (b'"objects":{', b'"objects":{"sched":{"crc":"0","value":0},'),
        (b'"tensors":{', b'"tensors":{},"tensors":{'),
        (b'"tensors":{', b'"tensors":{"w":{},'),
        (b'"tensors":{', b'"objects2":{"tensors":{'),
        (b"}}}", b'}},"same":{}}'),
        (b"}}}", b"}}} "),
        (b"}}}", b"}}}x"),
        (b"}}}", b"}}}}"),
        (b"}}}", b"}}"),
        (b'"lr":1e-05', b'"lr":0.00001'),
        (b'"lr":1e-05', b'"lr": 1e-05'),
        (b'"lr":1e-05', b'"lr":1e999'),
        (b'"lr":1e-05', b'"lr":NaN'),
        (b'"lr":1e-05', b'"lr":' + b"[" * 40 + b"]" * 40),
        (b'"v":1', b'"v":2'),
        (b'"v":1', b'"v":true'),
        (b'"v":1', b'"v":1,"new":' + b"[" * 29 + b"]" * 29),
        (b'"v":1', b'"v":1,"new":' + b"[" * 32 + b"]" * 32),
        (b'"dtype":"F32"', b'"dtype":"F32","new":' + b"[" * 29 + b"]" * 29),
        (b'"dtype":"F32"', b'"dtype":"F32","new":' + b"[" * 30 + b"]" * 30),
        (b'"dtype":"F32"', b'"dtype":"F64"'),
        (b'"dtype":"F32"', b'"dtype":32'),
        (b'"len":16', b'"len":16.0'),
        (b'"len":16', b'"len":18446744073709551616'),
        (b'"off":0', b'"off":-1'),
        (b'"layout":"h"', '"layout":"h\u00e4"'.encode()),
        (b'"layout":"h"', b'"layout":"h\xff"'),
        (b'"b":1', b'"b":01'),
        (b'"b":1', b'"b":2'),
        (b'"b":1', b'"b":1000000000000000000000'),
        (b'"len":8,', b'"len":8,"o":[0],'),
        (b'"len":8,', b'"len":8,"o":[],'),
        (b'"len":8,', b'"len":9,'),
        (b'"len":8,', b'"len":4,'),
        (b'"only/', b'"onl\\u0079/'),
        (b'"only/', b'"only\t/'),
        (b'"only/1"', b'"only/0"'),
        (b'"only/1"', b'"w"'),
        (b'"world":2', b'"world":2,"paths":{"w":["model",0]}'),
    ],
)
def test_texts_that_our_ranks_do_not_write(old: bytes, new: bytes) -> None:
    zero, one = both()
    changed = replace(one, text=new.join(one.text.rsplit(old, 1)))
    assert changed != one
    alike([zero, changed])
    alike([replace(zero, text=new.join(zero.text.rsplit(old, 1))), changed])


def test_nesting_is_judged_at_the_same_depth_everywhere() -> None:
    for depth in range(codec.DEPTH_MAX - 4, codec.DEPTH_MAX + 3):
        deep: Any = None
        for _ in range(depth):
            deep = [deep]
        answer = alike(both(objects={"deep": value(deep)}))
        assert (answer[0] is ErrorCode.BAD_RECORD) is (depth > codec.DEPTH_MAX - 3)


@st.composite
def damaged(draw: Callable[..., Any]) -> list[RankText]:
    """Parts of which bytes were changed, lost, repeated or swapped with another's."""
    texts = [bytearray(item.text) for item in both()]
    for _ in range(draw(st.integers(1, 3))):
        text = draw(st.sampled_from(texts))
        start = draw(st.integers(0, len(text) - 1))
        end = min(len(text), start + draw(st.integers(1, 12)))
        match draw(st.sampled_from(["digit", "byte", "lost", "twice", "other"])):
            case "digit":
                digits = [at for at, byte in enumerate(text) if chr(byte).isdigit()]
                text[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789")))
            case "byte":
                text[start] = draw(st.sampled_from(b'{}[]",:\\0a \xff'))
            case "lost":
                del text[start:end]
            case "twice":
                text[start:start] = text[start:end]
            case _:
                text[start:end] = draw(st.sampled_from(texts))[start:end]
        if not text:
            text += b"{"
    return [RankText(Rank(rank), f"{rank}", bytes(text)) for rank, text in enumerate(texts)]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_damaged_texts_get_the_same_verdict(texts: list[RankText]) -> None:
    alike(texts)


WHOLE = ("a", "b", "t0", 'quo"ted', "größe", "c.0", "\x7f", "")


def whole(draw: Callable[..., Any], at: int) -> tuple[TensorEntry, int]:
    """A tensor of one chunk, and where its bytes end; now and then something about it does not fit."""
    dtype, item = draw(st.sampled_from([("F32", 4), ("U8", 1), ("I64", 8), ("F4", 3)]))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    length = item * prod(shape)
    fields: dict[str, Any] = {"o": (0,) * len(shape), "s": shape, "b": 0, "off": at, "len": length}
    wrong: dict[str, Any] = {"o": (1,), "s": (2, 2), "b": 2, "off": -1, "len": length + 1}
    field = draw(st.sampled_from([None] * 60 + list(wrong)))
    if field is not None:
        fields[field] = wrong[field]
    chunks = (ChunkEntry(**fields),) * draw(st.sampled_from([1] * 20 + [0, 2]))
    return TensorEntry(dtype, shape, chunks), at + length


@st.composite
def states(draw: Callable[..., Any]) -> list[RankText]:
    """Parts of a random state: most of them fit, some do not."""
    parts = []
    rows = draw(st.lists(st.sampled_from([0] + [1, 2, 3] * 10), min_size=1, max_size=4))
    shared = draw(
        st.dictionaries(
            st.text(max_size=3),
            st.none() | st.floats(allow_nan=False, allow_infinity=False, width=16),
            max_size=3,
        )
    )
    for rank in range(WORLD):
        tensors, at = {}, 0
        for number, count in enumerate(rows):
            origin = 0 if rank == 0 else count
            shift = draw(st.sampled_from([0] * 40 + [1]))
            entry = ChunkEntry((origin + shift, 0), (count, 2), draw(st.integers(0, 1)), at, count * 4)
            tensors[f"t{number}"] = TensorEntry("F16", (2 * count, 2), (entry,))
            at += count * 4
        for name in draw(st.lists(st.sampled_from(WHOLE), max_size=2, unique=True)):
            whose = draw(st.sampled_from([f"{name}{rank}"] * 8 + [name]))
            tensors[whose], at = whole(draw, at)
        objects = {name: value(item) for name, item in shared.items()}
        if draw(st.booleans()):
            objects["long"] = value(LONG)
        size = draw(st.sampled_from([at] * 10 + [at + 3, max(0, at - 1)]))
        blobs = tuple(
            BlobEntry(f"{rank}.{number}", Rank(rank), size, "0", ("0",) if size else ())
            for number in range(2)
        )
        same = {"t0": draw(st.sampled_from(["a"] * 10 + ["b"]))}
        parts.append(written(rank_manifest(rank, tensors=tensors, objects=objects, blobs=blobs, same=same)))
    return parts


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(states(), st.data())
def test_any_state_is_judged_alike_cold_and_remembered(texts: list[RankText], data: st.DataObject) -> None:
    expected = alike(texts)
    try:
        form = judge(texts, merging(7), Form(), bytes_max=BYTES_MAX).form or Form()
    except Refused:
        return
    assert verdict(partial(judge, texts, merging(7), form, bytes_max=BYTES_MAX)) == expected
    # One byte of it changes: never taken for what it was.
    number = data.draw(st.integers(0, WORLD - 1))
    text = bytearray(texts[number].text)
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.sampled_from(b'0123456789{}[]",:a'))
    changed = [*texts]
    changed[number] = replace(texts[number], text=bytes(text))
    wanted = verdict(partial(judge_in_full, changed, merging(7), bytes_max=BYTES_MAX))
    assert verdict(partial(judge, changed, merging(7), form, bytes_max=BYTES_MAX)) == wanted


def test_memory_is_bounded_and_forgets_who_saved_longest_ago() -> None:
    forms = Forms(bytes_max=3000)
    large = Form(ranks=(RankForm(b"", ()),), tensors=b"x" * 1000)
    for job in ("a", "b", "a", "c"):
        forms.put(("cluster", job, "uid"), large)
    assert forms.get(("cluster", "a", "uid")) is large
    assert forms.get(("cluster", "b", "uid")) == Form()
    forms.put(("cluster", "huge", "uid"), Form(tensors=b"x" * 3000))
    assert forms.get(("cluster", "huge", "uid")) == Form()
    assert forms.get(("cluster", "c", "uid")) is large
