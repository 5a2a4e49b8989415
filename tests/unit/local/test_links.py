"""Cutting, slowing and healing the links of a cluster made for it; the mark that says that it is one."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.local import marks
from dtrain.local.cluster import LocalCluster
from dtrain.protocol.cluster import TestMark
from dtrain.protocol.errors import Conflict, ErrorCode, NotFound, Refused
from dtrain.storage.etcd.port import Put, Txn


def made(folder: Path, **more: object) -> LocalCluster:
    settings: dict[str, object] = {"coordinators": 2, "agents": 0, "store": "dir", "etcd_fsync": False}
    return LocalCluster(folder, **(settings | more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with made(tmp_path_factory.mktemp("links") / "cluster", faults=True) as cluster:
        yield cluster


def until(what: str, condition: Callable[[], bool], limit_s: float = 40.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.parametrize("way", ["both", "to etcd"])
def test_a_leader_that_is_cut_off_loses_its_office_and_a_healed_one_is_back(
    cluster: LocalCluster, way: str
) -> None:
    until("there is a leader", lambda: cluster.leader() is not None)
    lost = cluster.leader()
    assert lost is not None
    cluster.cut(lost, way=way)  # type: ignore[arg-type]
    until("another leads", lambda: cluster.leader() not in (None, lost))
    until(
        "its record is gone", lambda: f"{cluster.keys.root}coordinators/{lost}" not in cluster.read("coord")
    )
    cluster.heal(lost)
    until("both are registered", lambda: len(cluster.read("coordinators/")) == 2)


def test_slow_links_cost_no_leader_its_office(cluster: LocalCluster) -> None:
    until("there is a leader", lambda: cluster.leader() is not None)
    leader = cluster.leader()
    term = cluster.etcd.range(cluster.keys.leader).items[0].create_revision
    assert leader is not None
    cluster.slow(leader, 0.15)
    # Longer than a lease: it must have renewed over the slow links.
    end = time.monotonic() + 6.0
    until("longer than a lease has passed", lambda: time.monotonic() > end)
    cluster.heal(leader)
    assert cluster.etcd.range(cluster.keys.leader).items[0].create_revision == term


def test_what_cannot_be_cut_is_said(cluster: LocalCluster) -> None:
    with pytest.raises(NotFound, match="there is no c9"):
        cluster.cut("c9")
    with pytest.raises(Refused, match="sideways"):
        cluster.cut("c1", way="sideways")  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="no member etcd-7"):
        cluster.kill_member("etcd-7")


def test_a_cluster_made_for_faults_carries_the_mark_and_loses_it_when_started_without(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    with made(folder, coordinators=1, faults=True) as cluster:
        mark = marks.require(cluster.etcd, cluster.keys)
        assert mark.pid > 0
        assert mark.boot_id == marks.boot_id()
        assert [len(links.proxies) for links in cluster.links.values()] == [1]
    with made(folder, coordinators=1) as cluster:
        assert marks.find(cluster.etcd, cluster.keys) is None
        with pytest.raises(Refused) as caught:
            marks.require(cluster.etcd, cluster.keys)
        assert caught.value.code is ErrorCode.NOT_A_TEST_CLUSTER
        with pytest.raises(Refused, match="no test cluster"):
            cluster.cut("c1")


def test_a_cluster_is_marked_by_hand_only_while_it_is_idle(cluster: LocalCluster) -> None:
    etcd, keys, mark = cluster.etcd, cluster.keys, TestMark("me")
    assert marks.remove(etcd, keys)
    assert not marks.remove(etcd, keys)
    spec = keys.root + "jobs/busy/spec"
    try:
        etcd.txn(Txn((), (Put(spec, b'{"v":1,"uid":"u1"}'),)))
        with pytest.raises(Conflict, match="unfinished jobs: busy"):
            marks.add(etcd, keys, mark)
        status = b'{"v":1,"term":1,"uid":"u1","phase":"SUCCEEDED"}'
        etcd.txn(Txn((), (Put(keys.root + "jobs/busy/status", status),)))
        marks.add(etcd, keys, mark)
        assert marks.require(etcd, keys) == mark
        with pytest.raises(Conflict):
            marks.add(etcd, keys, mark)
    finally:
        marks.put(etcd, keys, marks.make())
