"""Members of a real etcd cluster die, freeze, move their leader and lose their quorum.

Each test watches a counter that is written all the while: no version of it may be lost or told twice.
"""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.etcd.members import (
    Seen,
    Writer,
    etcdctl,
    follower_of,
    leader_of,
    settle,
    status,
    used,
)
from tests.contract.etcd.support import binary, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import DtrainError, OutcomeUnknown, Unavailable
from dtrain.storage.etcd.endpoints import parse_endpoint
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.port import Put, Txn, WatchStream, put_if_absent
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = pytest.mark.timeout(900)

OUTAGE_S = float(os.environ.get("DTRAIN_TEST_OUTAGE_S", "8"))
"""How long the quorum is away; 60 and 600 are worth trying, too."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """Three members for all tests of this module: each leaves them running."""
    folder = tmp_path_factory.mktemp("members")
    with EtcdCluster(folder / "etcd", size=3, binary=binary("3.5"), fsync=False, progress_s=1) as cluster:
        yield cluster


@pytest.fixture
def etcd(three: EtcdCluster) -> Iterator[GatewayEtcd]:
    for index in range(3):
        three.thaw(index)
    three.start()
    three.wait_ready()
    client = GatewayEtcd(three.endpoints)
    yield client
    client.close()
    for index in range(3):
        three.thaw(index)


@pytest.fixture
def writer(three: EtcdCluster) -> Iterator[Writer]:
    client = GatewayEtcd(three.endpoints)
    running = Writer(client, f"/faults/{secrets.token_hex(4)}/counter")
    yield running
    running.stop()
    client.close()


def prefix_of(writer: Writer) -> str:
    return writer._key.rpartition("/")[0] + "/"


def goes_on(writer: Writer, seen: Seen, limit_s: float = 30.0) -> float:
    """Wait until something written from now on has been told; return how long that took."""
    start = time.monotonic()
    more = writer.written + 20
    eventually(lambda: len(seen.versions(writer._key)) and writer.written >= more, limit_s, "writes go on")
    revision = writer.revision
    assert seen.mirror.wait_for(revision, limit_s)
    return time.monotonic() - start


@pytest.mark.parametrize("who", ["follower", "leader"])
def test_a_killed_member_costs_no_event(
    three: EtcdCluster, etcd: GatewayEtcd, writer: Writer, who: str
) -> None:
    with Seen(etcd, prefix_of(writer)) as seen:
        goes_on(writer, seen)
        victim = leader_of(three) if who == "leader" else follower_of(three)
        three.kill(victim)
        took_s = goes_on(writer, seen)
        three.start_member(victim)
        three.wait_ready()
        goes_on(writer, seen)
        assert took_s < 10.0
        assert seen.relisted == 0
        seen.assert_exactly_once(writer._key)


@pytest.mark.parametrize("who", ["follower", "leader", "connected"])
def test_a_frozen_member_costs_no_event(
    three: EtcdCluster, etcd: GatewayEtcd, writer: Writer, who: str
) -> None:
    with Seen(etcd, prefix_of(writer), progress_interval_s=1.0) as seen:
        goes_on(writer, seen)
        victim = {"leader": leader_of, "follower": follower_of}.get(who, lambda _: used(etcd, three))(three)
        three.freeze(victim)
        # Three silent intervals, and an election if it led.
        goes_on(writer, seen, 20.0)
        three.thaw(victim)
        goes_on(writer, seen)
        seen.assert_exactly_once(writer._key)


def test_a_planned_leader_move_is_not_noticed(three: EtcdCluster, etcd: GatewayEtcd, writer: Writer) -> None:
    with Seen(etcd, prefix_of(writer)) as seen:
        goes_on(writer, seen)
        lease = new_lease_id()
        etcd.grant(5, lease)
        for _ in range(2):
            leader, target = leader_of(three), follower_of(three)
            name = f"{status(three, target)['header']['member_id']:x}"
            etcdctl(three, "move-leader", name, member=leader)
            assert goes_on(writer, seen) < 10.0
            assert leader_of(three) == target
            assert etcd.keepalive(lease) > 0
        assert seen.relisted == 0
        seen.assert_exactly_once(writer._key)
        etcd.revoke(lease)


def test_a_member_that_has_caught_up_by_a_snapshot_is_not_taken_for_an_older_etcd(tmp_path: Path) -> None:
    # Its first answers are of the newest revision, and of the raft term that it knew before.
    cluster = EtcdCluster(tmp_path / "etcd", size=3, binary=binary("3.5"), fsync=False)
    cluster.flags = ("--snapshot-count=5", "--experimental-snapshot-catchup-entries=5")
    with cluster:
        leader, late = leader_of(cluster), follower_of(cluster)
        target = 3 - leader - late
        others = GatewayEtcd([cluster.endpoints[leader], cluster.endpoints[target]])
        alone = GatewayEtcd([cluster.endpoints[late]])
        every = GatewayEtcd(cluster.endpoints)
        cluster.freeze(late)
        numbers = iter(range(1000))
        for _ in range(20):
            settle(others, Txn((), (Put("/late/k", b"%d" % next(numbers)),)))
        name = f"{status(cluster, target)['header']['member_id']:x}"
        etcdctl(cluster, "move-leader", name, member=leader)
        revision = 0
        for _ in range(20):
            revision = settle(others, Txn((), (Put("/late/k", b"%d" % next(numbers)),)))
        # Both have heard of the newest term; one has nobody else to ask.
        alone._raft_term, alone._revision = others._raft_term, others._revision
        assert every.range("/late/k").revision == revision
        every._endpoints.worked(parse_endpoint(cluster.endpoints[late]))
        cluster.thaw(late)
        assert every.range("/late/k").revision == revision
        eventually(lambda: revision_of(alone) == revision, 5.0, "the late member's answer")
        for etcd in (others, alone, every):
            etcd.close()


def revision_of(etcd: GatewayEtcd) -> int:
    """Read once; 0: not available."""
    try:
        return etcd.range("/late/k").revision
    except Unavailable:
        return 0


def test_a_lost_quorum_stops_writes_and_nothing_else(
    three: EtcdCluster, etcd: GatewayEtcd, writer: Writer
) -> None:
    with Seen(etcd, prefix_of(writer), progress_interval_s=1.0) as seen:
        goes_on(writer, seen)
        stays = leader_of(three)
        for index in range(3):
            if index != stays:
                three.kill(index)
        began = time.monotonic()
        revision = 0
        while time.monotonic() - began < OUTAGE_S:
            with pytest.raises((Unavailable, OutcomeUnknown)):
                etcd.txn(put_if_absent(prefix_of(writer) + "during", b"x"), deadline_s=1.0)
            with pytest.raises(Unavailable):
                etcd.range(prefix_of(writer), deadline_s=1.0)
            # What it knew it still knows, and it knows how old that is.
            assert seen.versions(writer._key)
            revision = max(revision, seen.mirror.revision)
            time.sleep(0.2)
        assert seen.mirror.age_s() > OUTAGE_S / 2
        three.start()
        took_s = goes_on(writer, seen)
        assert took_s < 10.0
        assert seen.mirror.revision > revision
        assert seen.relisted == 0
        seen.assert_exactly_once(writer._key)


def test_a_member_without_quorum_ends_its_watches_and_answers_nothing(
    three: EtcdCluster, etcd: GatewayEtcd
) -> None:
    alone = leader_of(three)
    client = GatewayEtcd([three.endpoints[alone]])
    stream = client.watch("/faults/minority", None, 1)
    others = [index for index in range(3) if index != alone]
    for index in others:
        three.freeze(index)
    start = time.monotonic()
    # It accepts connections all the while; only the header makes it admit that it knows no leader.
    with pytest.raises(Unavailable):
        _read_on(stream, 15.0)
    assert time.monotonic() - start < 8.0
    with pytest.raises(Unavailable):
        client.range("/faults/minority", deadline_s=2.0)
    with pytest.raises(Unavailable):
        client.watch("/faults/minority", None, 1)
    for index in others:
        three.thaw(index)
    eventually(lambda: _answers(client), 15.0, "it answers again")
    client.close()


def _read_on(stream: WatchStream, for_s: float) -> None:
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        stream.next(1.0)


def _answers(client: GatewayEtcd) -> bool:
    try:
        client.range("/faults/minority", deadline_s=1.0)
    except DtrainError:
        return False
    return True


def test_a_write_that_timed_out_and_came_later_counts_once(three: EtcdCluster, etcd: GatewayEtcd) -> None:
    """Whoever finds its own nonce has won: "somebody else was faster" would be wrong."""
    came_late = 0
    for number in range(6):
        leader = leader_of(three)
        client = GatewayEtcd([three.endpoints[leader]])
        others = [index for index in range(3) if index != leader]
        for index in others:
            three.freeze(index)
        key, mine = f"/faults/late/{secrets.token_hex(4)}", b"nonce-%d" % number
        with pytest.raises(OutcomeUnknown):
            client.txn(put_if_absent(key, mine), deadline_s=0.4)
        for index in others:
            three.thaw(index)
        client.close()
        end = time.monotonic() + 30.0
        while True:
            try:
                result = etcd.txn(put_if_absent(key, mine), deadline_s=2.0)
                break
            except (Unavailable, OutcomeUnknown):
                assert time.monotonic() < end
        [kv] = etcd.range(key).items
        assert (kv.value, kv.version) == (mine, 1), "the write counted twice, or another's did"
        if not result.succeeded:
            came_late += 1
            [found] = result.responses[0]
            assert found.value == mine
        if came_late:
            break
    assert came_late, "no write came late: the test shows nothing"


def test_a_member_that_defragments_is_left(three: EtcdCluster, etcd: GatewayEtcd) -> None:
    """While it rewrites its file, a member answers nothing: the others do."""
    filler = os.urandom(1000) * 1000
    for number in range(60):
        settle(etcd, Txn((), (Put(f"/faults/fill/{number}", filler),)))
    client = GatewayEtcd(three.endpoints)
    client.range("/faults/x")
    connected = used(client, three)
    worst_s, took = 0.0, threading.Event()

    def defragment() -> None:
        etcdctl(three, "--command-timeout=60s", "defrag", member=connected, timeout_s=90)
        took.set()

    thread = threading.Thread(target=defragment)
    thread.start()
    while not took.is_set():
        start = time.monotonic()
        settle(client, Txn((), (Put("/faults/x", b"x"),)))
        client.range("/faults/x", deadline_s=5.0)
        worst_s = max(worst_s, time.monotonic() - start)
    thread.join()
    assert worst_s < 4.5
    for number in range(60):
        etcdctl(three, "del", f"/faults/fill/{number}")
    client.close()


def test_a_member_away_for_ten_seconds_as_by_a_long_defragmentation_is_left(
    three: EtcdCluster, etcd: GatewayEtcd, writer: Writer
) -> None:
    """Stands in for the defragmentation of a database of gigabytes: the member answers nothing for 10 s."""
    with Seen(etcd, prefix_of(writer), progress_interval_s=1.0) as seen:
        goes_on(writer, seen)
        connected = used(etcd, three)
        three.freeze(connected)
        frozen_at = time.monotonic()
        assert goes_on(writer, seen, 20.0) < 8.0
        while time.monotonic() - frozen_at < 10.0:
            start = time.monotonic()
            etcd.range(writer._key, deadline_s=5.0)
            assert time.monotonic() - start < 3.0
            time.sleep(0.1)
        three.thaw(connected)
        goes_on(writer, seen)
        seen.assert_exactly_once(writer._key)


def test_a_slow_disk_of_the_leading_member_loses_no_lease_and_no_event(
    three: EtcdCluster, etcd: GatewayEtcd, writer: Writer
) -> None:
    """Pulses of SIGSTOP stand in for fsyncs of half a second: writes stall, leases are renewed in time."""
    with Seen(etcd, prefix_of(writer), progress_interval_s=1.0) as seen:
        goes_on(writer, seen)
        lease = new_lease_id()
        ttl_s = etcd.grant(5, lease)
        slow = leader_of(three)
        end = time.monotonic() + 8.0
        renewed_at = time.monotonic()
        while time.monotonic() < end:
            three.freeze(slow)
            time.sleep(0.5)
            three.thaw(slow)
            time.sleep(0.2)
            started = time.monotonic()
            try:
                assert etcd.keepalive(lease, deadline_s=1.5) > 0
            except Unavailable:
                continue
            assert started - renewed_at < 0.7 * ttl_s, "too late for the leader's own deadline"
            renewed_at = started
        goes_on(writer, seen)
        seen.assert_exactly_once(writer._key)
        etcd.revoke(lease)
