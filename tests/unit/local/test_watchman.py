"""The live auditor: it sees what happens, through a killed etcd and a compaction, and says what it missed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.local.etcd import EtcdCluster
from dtrain.local.filling import Filling
from dtrain.local.watchman import Watchman
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import Delete, Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

KEYS = Keys(ClusterName("watched"))
LEADER = b'{"v":1,"replica":"c1","address":"x","nonce":"n"}'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path / "etcd", fsync=False, quota_bytes=16 << 20) as server:
        yield server


@pytest.fixture
def etcd(server: EtcdCluster) -> Iterator[GatewayEtcd]:
    client = GatewayEtcd(server.endpoints)
    yield client
    client.close()


@pytest.fixture
def watchman(server: EtcdCluster) -> Iterator[Watchman]:
    made = Watchman(lambda: GatewayEtcd(server.endpoints), KEYS)
    yield made
    made.close()


def status(term: int) -> Put:
    return Put(f"{KEYS.root}jobs/j/status", b'{"v":1,"term":%d,"uid":"u","phase":"QUEUED"}' % term)


def lead(etcd: GatewayEtcd) -> int:
    etcd.txn(Txn((), (Delete(KEYS.leader),)))
    return etcd.txn(Txn((), (Put(KEYS.leader, LEADER),))).revision


def test_history_before_its_start_is_judged_and_a_stale_leader_is_named(
    etcd: GatewayEtcd, watchman: Watchman
) -> None:
    term = lead(etcd)
    etcd.txn(Txn((), (status(term),)))
    watchman.start()
    assert watchman.settle()
    assert watchman.violations == ()
    lead(etcd)
    etcd.txn(Txn((), (status(term),)))
    assert watchman.settle()
    assert [violation.invariant for violation in watchman.violations] == ["I1"]
    assert watchman.judged[1] == 2


def test_it_goes_on_where_it_was_when_etcd_was_killed(
    server: EtcdCluster, etcd: GatewayEtcd, watchman: Watchman
) -> None:
    term = lead(etcd)
    watchman.start()
    assert watchman.settle()
    server.kill()
    server.start_member(0)
    server.wait_ready()
    etcd.txn(Txn((), (status(term),)))
    etcd.txn(Txn((), (status(term - 1),)))
    assert watchman.settle()
    assert len(watchman.violations) == 1
    assert watchman.gaps == 0


def test_a_filled_etcd_takes_nothing_and_a_freed_one_everything_without_a_gap(
    server: EtcdCluster, etcd: GatewayEtcd, watchman: Watchman
) -> None:
    term = lead(etcd)
    watchman.start()
    filling = Filling(
        server.endpoints, KEYS, compact_up_to=lambda at: at if watchman.await_revision(at, 20.0) else 0
    )
    assert not filling.is_filled()
    assert filling.fill() > 4 << 20
    assert filling.is_filled()
    assert etcd.status().alarms == ("NOSPACE",)
    filling.free()
    assert not filling.is_filled()
    assert etcd.status().alarms == ()
    etcd.txn(Txn((), (status(term),)))
    assert watchman.settle()
    assert (watchman.gaps, watchman.violations) == (0, ())
    # Again: what is free is not an error.
    filling.free()


def test_compacted_history_is_judged_from_a_list_on(
    server: EtcdCluster, etcd: GatewayEtcd, watchman: Watchman
) -> None:
    term = lead(etcd)
    etcd.txn(Txn((), (status(term),)))
    Filling(server.endpoints, KEYS).free()
    watchman.start()
    assert watchman.settle()
    etcd.txn(Txn((), (status(term - 1),)))
    assert watchman.settle()
    assert [violation.invariant for violation in watchman.violations] == ["I1"]
