"""One job goes through everything that can happen to etcd, and its ranks notice none of it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.etcd.members import etcdctl, follower_of, leader_of, status
from tests.e2e.trouble import QUOTA_BYTES, TTL_S, Trouble
from tests.support.harness import say

from dtrain.local.proxy import BLACK_HOLE, ONLY_TO_CLIENT, ONLY_TO_SERVER, PASS, Behaviour, Flow, http_chunk
from dtrain.protocol.errors import ErrorCode, Refused

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OUTAGE_S = float(os.environ.get("DTRAIN_TEST_OUTAGE_S", "8"))
"""How long the quorum is away; ``python -m tests.e2e.bars quorum`` takes 60 s or more."""


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trouble]:
    folder: Path = tmp_path_factory.mktemp("t")
    with Trouble(folder, small_disk=True, quota_bytes=QUOTA_BYTES) as running:
        yield running


def test_a_member_dies(trouble: Trouble) -> None:
    for who, find in (("follower", follower_of), ("leader", leader_of)):
        with trouble.unnoticed(f"the {who} of etcd killed"):
            victim = find(trouble.etcd)
            trouble.etcd.kill(victim)
            trouble.harness.await_commit(trouble.job)
            trouble.etcd.start_member(victim)
            trouble.etcd.wait_ready()


def test_the_leader_of_etcd_freezes_for_as_long_as_a_lease(trouble: Trouble) -> None:
    with trouble.unnoticed("the leader of etcd frozen"):
        victim = leader_of(trouble.etcd)
        trouble.etcd.freeze(victim)
        time.sleep(TTL_S)
        trouble.etcd.thaw(victim)


def test_etcd_moves_its_leader(trouble: Trouble) -> None:
    with trouble.unnoticed("the leader of etcd moved"):
        before, terms = trouble.harness.term(), trouble.leaderships()
        target = follower_of(trouble.etcd)
        name = f"{status(trouble.etcd, target)['header']['member_id']:x}"
        etcdctl(trouble.etcd, "move-leader", name, member=leader_of(trouble.etcd))
        trouble.harness.await_commit(trouble.job)
        assert (trouble.harness.term(), trouble.leaderships()) == (before, terms)


def test_the_quorum_is_lost(trouble: Trouble) -> None:
    with trouble.unnoticed(f"the quorum lost for {OUTAGE_S:g} s"):
        trouble.lose_quorum(OUTAGE_S)


def test_writes_time_out_and_come_later(trouble: Trouble) -> None:
    with trouble.unnoticed("two members frozen again and again"):
        for _ in range(4):
            leader = leader_of(trouble.etcd)
            others = [index for index in range(3) if index != leader]
            for index in others:
                trouble.etcd.freeze(index)
            time.sleep(1.2)
            for index in others:
                trouble.etcd.thaw(index)
            trouble.harness.until("etcd answers", trouble.answers)


def test_history_is_compacted_while_everyone_is_away(trouble: Trouble) -> None:
    with trouble.unnoticed("compaction past every resume point"):
        lists = trouble.said("mirror lists again")
        trouble.network(BLACK_HOLE)
        for number in range(3):
            etcdctl(trouble.etcd, "put", "/elsewhere/history", str(number))
        trouble.compact()
        for proxy in trouble.proxies():
            proxy.reset_connections()
        trouble.network(PASS)
        trouble.harness.until("mirrors list again", lambda: trouble.said("mirror lists again") >= lists + 3)


def test_every_member_defragments(trouble: Trouble) -> None:
    with trouble.unnoticed("every member defragmented"):
        for member in range(3):
            etcdctl(trouble.etcd, "defrag", member=member)
            trouble.etcd.freeze(member)
            time.sleep(1.0)
            trouble.etcd.thaw(member)


def test_the_leading_member_s_disk_is_slow(trouble: Trouble) -> None:
    with trouble.unnoticed("pulses of half a second on the leader of etcd"):
        began = trouble.leaderships()
        slow, end = leader_of(trouble.etcd), time.monotonic() + 6.0
        while time.monotonic() < end:
            trouble.etcd.freeze(slow)
            time.sleep(0.5)
            trouble.etcd.thaw(slow)
            time.sleep(0.3)
        assert trouble.leaderships() - began <= 1, "leadership flaps"


def test_streams_are_cut_into_bytes_and_garbled(trouble: Trouble) -> None:
    with trouble.unnoticed("every answer in single bytes, then garbage"):
        before = trouble.harness.term()
        trouble.network(Behaviour(to_server=Flow(chunk_bytes=1), to_client=Flow(chunk_bytes=1)))
        trouble.harness.await_commit(trouble.job)
        trouble.network(PASS)
        for garbage in (http_chunk(b"no JSON\n"), b"not even a chunk\r\n", http_chunk(b"x" * 500_000) * 40):
            for proxy in trouble.proxies():
                proxy.inject(garbage, where=lambda head: b"/v3/watch" in head)
            trouble.harness.await_commit(trouble.job)
        assert trouble.harness.term() == before


def test_connections_to_one_member_are_half_open(trouble: Trouble) -> None:
    with trouble.unnoticed("half-open connections to one member"):
        for number in range(2):
            for links in trouble.harness.cluster.links.values():
                links.proxies[number].black_hole()
            trouble.harness.await_commit(trouble.job)
            for links in trouble.harness.cluster.links.values():
                links.proxies[number].passing()


def test_the_way_to_etcd_is_open_in_one_direction(trouble: Trouble) -> None:
    for name, behaviour in (("answers", ONLY_TO_SERVER), ("requests", ONLY_TO_CLIENT)):
        leader = trouble.harness.cluster.leader()
        assert leader is not None
        with trouble.unnoticed(f"{name} of the leading coordinator lost"):
            old = trouble.harness.term()
            trouble.network(behaviour, leader)
            trouble.harness.until(
                "another replica leads", lambda before=old: trouble.harness.term() not in (0, before)
            )
            trouble.network(PASS)


def test_the_network_comes_and_goes(trouble: Trouble) -> None:
    with trouble.unnoticed("the network 1 s on, 1 s off"):
        began, terms = time.monotonic(), trouble.leaderships()
        for _ in range(6):
            trouble.network(BLACK_HOLE)
            time.sleep(1.0)
            trouble.network(PASS)
            time.sleep(1.0)
        changes, allowed = trouble.leaderships() - terms, (time.monotonic() - began) / TTL_S
        assert changes <= allowed, f"{changes} leaderships in {allowed:.1f} TTLs"


def test_one_member_s_disk_is_full(trouble: Trouble) -> None:
    with trouble.unnoticed("a full disk of one member"):
        with trouble.full_disk():
            # It grows its file by megabytes at a time: until then it serves on.
            trouble.harness.cluster.etcd.range("/x")
            trouble.write_until_dead(2)
            trouble.harness.await_commit(trouble.job)
        trouble.etcd.start_member(2)
        trouble.etcd.wait_ready()


def test_etcd_has_no_space(trouble: Trouble) -> None:
    harness = trouble.harness
    with trouble.unnoticed("no space in etcd"):
        term, leaderships = harness.term(), trouble.leaderships()
        with pytest.raises(Refused) as refused:
            trouble.fill()
        assert refused.value.code is ErrorCode.ETCD_NO_SPACE
        began = time.monotonic()

        def everyone_says_so() -> bool:
            found = harness.client.info_each().values()
            return all(any("no space" in p for p in getattr(info, "problems", ())) for info in found)

        harness.until("every replica says what is wrong", everyone_says_so, 20.0)
        say(f"every replica tells of it {time.monotonic() - began:.1f} s later")
        listed = trouble.cli("get", "coordinators")
        assert listed.stderr.count("PROBLEM") >= 1
        assert "etcdctl alarm disarm" in listed.stderr
        assert "no space" in trouble.cli("describe", "job", trouble.job).stderr
        with pytest.raises(Refused) as told:
            harness.submit("late", "--steps 5", nproc=1)
        assert told.value.code is ErrorCode.ETCD_NO_SPACE
        assert "etcdctl compact" in told.value.fix
        # Longer than two leases: all are renewed all the while, and nobody is elected.
        harness.until("two leases have passed", lambda: time.monotonic() - began > 2 * TTL_S + 1)
        harness.await_steps(trouble.job)
        assert (harness.term(), trouble.leaderships()) == (term, leaderships)
        trouble.free()
        freed = time.monotonic()
        harness.await_commit(trouble.job)
        say(f"a checkpoint is committed {time.monotonic() - freed:.1f} s after there is space again")
        harness.until(
            "nothing is wrong any more",
            lambda: not any(getattr(i, "problems", ()) for i in harness.client.info_each().values()),
            20.0,
        )
        for name in harness.cluster.coordinators:
            log = harness.log(name)
            lines = [line for line in log.splitlines() if "etcd-no-space" in line]
            assert len(lines) == 2, lines
        assert any("etcd has no space" in harness.log(name) for name in harness.cluster.agents)


def test_the_job_ends_as_if_nothing_had_happened(trouble: Trouble) -> None:
    harness, job = trouble.harness, trouble.job
    harness.stop_file(job).touch()
    harness.await_end(job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
    harness.assert_clean()
