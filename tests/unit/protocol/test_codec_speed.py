"""The fast way to read a record finds what the careful way finds, and refuses what it refuses."""

import copy
import random
from typing import Any

import pytest

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import RankManifest
from dtrain.protocol.errors import Refused
from dtrain.protocol.job import JobSpec
from dtrain.protocol.snapshot import WorkerSnapshot

MANIFEST: dict[str, Any] = {
    "v": 1, "cluster": "c", "job": "j", "uid": "u", "seq": 1, "attempt": 1, "nonce": "n", "step": 5,
    "rank": 0, "world": 2, "layout": "x",
    "blobs": [{"key": "k", "rank": 0, "bytes": 9, "crc": "0", "chunks": ["0", "1"]}],
    "tensors": {"w": {"dtype": "F32", "shape": [2, 1],
                      "chunks": [{"o": [0, 0], "s": [2, 1], "b": 0, "off": 0, "len": 8}]}},
    "objects": {"o": {"crc": "0", "value": {"a": [1, None, 2.5, {"$tensor": "w"}]}}},
}  # fmt: skip

SPOILT = [None, True, 1, -1, 2**63, 2**64, 1.5, "", "text", "\ud800", [], [1], ["x"], [None], {}, {"a": 1}]


def places(document: Any) -> list[tuple[Any, Any]]:
    found = []
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, part in items:
        found.append((document, key))
        if isinstance(part, (dict, list)):
            found += places(part)
    return found


def outcome(build: Any) -> Any:
    try:
        return build()
    except Refused as error:
        return str(error)


@pytest.mark.parametrize("seed", range(300))
def test_any_damage_is_read_or_refused_alike(seed: int) -> None:
    chance = random.Random(seed)
    document = copy.deepcopy(MANIFEST)
    for _ in range(chance.choice((1, 1, 2))):
        container, key = chance.choice(places(document))
        if chance.random() < 0.2:
            del container[key]
        else:
            container[key] = copy.deepcopy(chance.choice(SPOILT))
    fast = outcome(lambda: codec.from_json(RankManifest, document))
    slow = outcome(lambda: codec._build(RankManifest, document, "RankManifest"))
    assert repr(fast) == repr(slow)


@pytest.mark.parametrize("kind", [RankManifest, JobSpec, WorkerSnapshot])
def test_an_empty_record_is_refused_alike(kind: Any) -> None:
    assert outcome(lambda: codec.from_json(kind, {})) == outcome(
        lambda: codec._build(kind, {}, kind.__name__)
    )


def test_the_limit_of_nesting_is_where_it_was() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    codec.loads(nested(codec.DEPTH_MAX))
    with pytest.raises(Refused, match="deeper"):
        codec.loads(nested(codec.DEPTH_MAX + 1))
