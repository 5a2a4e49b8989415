"""Which releases go together, and what is said of those that do not."""

import itertools

import pytest

from dtrain.coordinator.skew import Releases, goes_with, sentences
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.ids import AgentName, ClusterName, Incarnation, ReplicaId
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord
from dtrain.storage.etcd.port import KeyValue

KEYS = Keys(ClusterName("c"))


@pytest.mark.parametrize(
    ("own", "other", "fits"),
    [
        ("0.2.0", "0.2.7", True),
        ("0.2.0", "0.1.0", True),
        ("0.2.0", "0.3.0rc1", True),
        ("0.3.0", "0.1.9", False),
        ("1.0.0", "0.9.0", False),
        ("0.2.0", "", True),
        ("0.2.0", "a build of my own", True),
    ],
)
def test_neighbouring_minor_releases_go_together(own: str, other: str, fits: bool) -> None:
    assert goes_with(own, other) is fits


def test_who_is_too_far_away_is_named_once_per_release() -> None:
    agents = {f"a{index}": "0.1.0" for index in range(5)} | {"b": "0.4.0", "c": "0.3.1"}
    found = list(sentences("0.3.0", agents, {"c1": "0.1.0", "c2": "0.2.0"}))
    assert [sentence.split(" runs ")[0] for sentence in found] == [
        "agent a0, a1, a2 and 2 more",
        "coordinator c1",
    ]
    assert all("upgrade coordinators, then agents" in sentence for sentence in found)


def test_versions_come_from_the_records_and_are_read_again_when_these_change() -> None:
    counter = itertools.count(1)
    held: dict[str, KeyValue] = {}

    def put(key: str, value: bytes) -> None:
        revision = next(counter)
        held[key] = KeyValue(key, value, revision, revision, 1, 0)

    def agent(version: str) -> bytes:
        return codec.encode(NodeRecord(AgentName("a1"), Incarnation("i"), "x:1", "h", 1, version=version))

    releases = Releases(
        "0.5.0", KEYS.cluster, lambda prefix: [kv for key, kv in held.items() if key.startswith(prefix)]
    )
    assert list(releases.remarks()) == []
    put(KEYS.node(AgentName("a1")), agent("0.3.0"))
    put(KEYS.node(AgentName("a2")), b'{"v":2,"agent":"a2"}')
    put(KEYS.coordinator(ReplicaId("c1")), codec.encode(ReplicaRecord(ReplicaId("c1"), "x:2", "0.5.1")))
    (sentence,) = releases.remarks()
    assert sentence.startswith("agent a1 runs dtrain 0.3.0 and this replica 0.5.0")
    put(KEYS.node(AgentName("a1")), agent("0.5.0"))
    assert list(releases.remarks()) == []
    held.clear()
    assert list(releases.remarks()) == []
