"""In containers, while a job trains, every node is killed, frozen, cut off, filled up and replaced.

What training must not notice comes first: same ranks, same attempt, and checkpoints
go on. Then what ends an attempt: the next one starts from the newest checkpoint.
The auditor judges all of it.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.protocol.events import EventReason
from dtrain.storage.etcd.port import Put, Txn
from dtrain.testing import DtrainCluster, Job

SCRIPT = Path(__file__).parents[1] / "e2e" / "scripts" / "train.py"
TTL_S = 5
READY_S = 400.0
LOST = 2
"""Attempts that a lost machine may cost: its peers' ranks may end before anybody knows which machine
is gone. The next attempt counts on it then, until it does not answer."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DtrainCluster]:
    """Three machines of one slot each: two train, one is spare."""
    with DtrainCluster(
        agents=3, slots=1, ttl_s=TTL_S, small_disk={"etcd-2": "260m"}, ready_timeout_s=READY_S
    ) as made:
        yield made


@pytest.fixture(scope="module")
def job(cluster: DtrainCluster) -> Iterator[Job]:
    made = cluster.submit(
        *(SCRIPT, "--steps", 10_000_000, "--pause-ms", 20),
        name="steady",
        nnodes=2,
        checkpoint_every_steps=50,
        checkpoint={"timeout": "30s"},
        restarts={"max": 100},
    )
    made.wait_for_commit()
    yield made
    made.cancel()
    made.wait(phase="CANCELLED")


def newest(job: Job) -> int:
    return job.commits()[-1].seq


@contextlib.contextmanager
def unnoticed(cluster: DtrainCluster, job: Job) -> Iterator[None]:
    """Same attempt, same processes, steps all the while, and a checkpoint that was begun afterwards."""
    cluster.wait_ready()
    job.wait_for_commit()
    attempt, pids = job.attempt, job.pids()
    step = job.step
    yield
    cluster.wait_ready()
    # The first one may have been in flight.
    job.wait_for_commit(after=newest(job) + 1)
    assert (job.attempt, job.pids()) == (attempt, pids), job.describe()
    assert job.step > step
    cluster.audit()


@contextlib.contextmanager
def restarted(cluster: DtrainCluster, job: Job, *, attempts: int = 1) -> Iterator[None]:
    """At most so many more attempts, from the newest checkpoint there was, and the last one commits."""
    cluster.wait_ready()
    job.wait_for_commit()
    attempt, committed = job.attempt, newest(job)
    yield
    status = job.wait_for_attempt(attempt + 1)
    assert status.restore is not None
    assert status.restore.seq >= committed
    job.wait_for_commit(after=newest(job))
    assert job.attempt <= attempt + attempts, job.describe()
    cluster.audit()


def successor(cluster: DtrainCluster, leader: str) -> str:
    return cluster.until("another coordinator leads", lambda: cluster.leader() != leader and cluster.leader())


def given_up(cluster: DtrainCluster, *names: str) -> None:
    cluster.until(f"{', '.join(names)} are given up", lambda: not cluster.registered() & set(names))


# Unnoticed ----------------------------------------------------------------------------------


@pytest.mark.ci
def test_the_leader_s_host_is_lost_and_another_one_takes_its_place_without_any_state(
    cluster: DtrainCluster, job: Job
):
    with unnoticed(cluster, job):
        leader = cluster.leader()
        before = cluster.container(leader)
        cluster.kill(leader)
        successor(cluster, leader)
        cluster.replace(leader)
        cluster.wait_ready(leader)
    now = cluster.container(leader)
    assert now.id != before.id
    assert now.attrs["Config"]["Hostname"] != before.attrs["Config"]["Hostname"]
    assert now.attrs["HostConfig"]["ReadonlyRootfs"]
    assert now.attrs["Mounts"] == []


@pytest.mark.ci
def test_a_frozen_leader_is_succeeded_and_does_no_harm_once_it_thaws(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        leader = cluster.leader()
        cluster.pause(leader)
        other = successor(cluster, leader)
        job.wait_for_commit(after=newest(job))
        cluster.resume(leader)
        cluster.wait_ready(leader)
        assert cluster.leader() == other


def test_a_leader_without_network_is_succeeded(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        leader = cluster.leader()
        cluster.disconnect(leader)
        successor(cluster, leader)
        given_up(cluster, leader)
        cluster.reconnect(leader)


def test_no_coordinator_is_left_for_a_while(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        for name in cluster.coordinators:
            cluster.kill(name)
        before = job.step
        cluster.until("training goes on without any of them", lambda: job.step > before + 20)
        for name in cluster.coordinators:
            cluster.start(name)


def test_the_leading_member_of_etcd_is_killed(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        member = cluster.etcd_leader()
        cluster.kill(member)
        job.wait_for_commit(after=newest(job))
        cluster.start(member)


@pytest.mark.ci
def test_the_leading_member_of_etcd_is_frozen(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        member = cluster.etcd_leader()
        cluster.pause(member)
        job.wait_for_commit(after=newest(job))
        cluster.resume(member)


def test_the_leading_member_of_etcd_has_no_network(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        member = cluster.etcd_leader()
        cluster.disconnect(member)
        job.wait_for_commit(after=newest(job))
        cluster.reconnect(member)


def test_etcd_has_no_quorum_for_three_leases(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        for member in cluster.etcd_members[:2]:
            cluster.pause(member)
        # What is claimed is about this very time: nothing can be awaited while nothing answers.
        time.sleep(3 * TTL_S)
        for member in cluster.etcd_members[:2]:
            cluster.resume(member)


def test_the_leader_is_on_the_smaller_side_of_a_partition(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        leader, member = cluster.leader(), cluster.etcd_leader()
        minority = {leader, member}
        cluster.partition(minority, {*cluster.coordinators, *cluster.etcd_members} - minority)
        # It can still command every agent, and does not any more.
        cluster.partition({leader}, set(cluster.etcd_members) - {member})
        job.wait_for_commit(after=newest(job))
        assert cluster.leader() != leader
        cluster.heal()


def test_the_disk_of_a_member_of_etcd_is_full(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        cluster.fill_disk("etcd-2")
        member = cluster.container("etcd-2")
        # It grows its file by megabytes at a time: until then it serves on.
        for number in range(200):
            member.reload()
            if member.status != "running":
                break
            write = Txn((), (Put(f"/elsewhere/{number % 2}", b"x" * 100_000),))
            cluster.until("etcd takes a write", lambda write=write: cluster.etcd.txn(write))
        assert member.status == "exited"
        job.wait_for_commit(after=newest(job))
        cluster.free_disk("etcd-2")
        cluster.start("etcd-2")


def test_a_member_of_etcd_is_replaced_by_an_empty_one(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        cluster.replace("etcd-1")
        cluster.until("it leads or follows", lambda: cluster.etcd_leader())


def test_the_store_is_away_and_comes_back(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        cluster.kill("store")
        before = job.step
        cluster.until("training goes on", lambda: job.step > before + 60)
        cluster.start("store")


def test_the_store_hangs(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        cluster.pause("store")
        before = job.step
        cluster.until("training goes on", lambda: job.step > before + 60)
        cluster.resume("store")


def test_ranks_do_not_hear_of_each_other_for_a_moment(cluster: DtrainCluster, job: Job):
    with unnoticed(cluster, job):
        one, other = job.agents
        cluster.partition([one], [other])
        time.sleep(2.0)
        cluster.heal()


@pytest.mark.ci
def test_all_coordinators_and_members_of_etcd_are_restarted_one_by_one_and_no_command_fails(
    cluster: DtrainCluster, job: Job
):
    failed: list[str] = []
    asked = 0
    done = threading.Event()

    def ask() -> None:
        nonlocal asked
        commands = (
            ("get", "jobs"),
            ("describe", "job", job.name),
            ("get", "agents"),
            ("get", "checkpoints", job.name),
        )
        while not done.is_set():
            words = commands[asked % len(commands)]
            shown = cluster.cli(*words)
            asked += 1
            if shown.returncode:
                failed.append(f"{' '.join(words)}: exit {shown.returncode}: {shown.stderr[-800:]}")

    asker = threading.Thread(target=ask)
    with unnoticed(cluster, job):
        asker.start()
        try:
            for name in (*cluster.coordinators, *cluster.etcd_members):
                before = asked
                cluster.restart(name)
                cluster.until("etcd is whole", cluster.etcd_leader)
                job.wait_for_commit(after=newest(job))
                cluster.until("a command was given meanwhile", lambda before=before: asked > before)
        finally:
            done.set()
            asker.join()
    assert not failed, failed


# One restart --------------------------------------------------------------------------------


@pytest.mark.ci
def test_a_killed_rank_costs_one_restart_on_the_same_machines(cluster: DtrainCluster, job: Job):
    before = job.agents
    with restarted(cluster, job):
        cluster.kill_rank(job, 1)
    assert job.agents == before


@pytest.mark.ci
def test_a_killed_machine_is_replaced_by_the_spare(cluster: DtrainCluster, job: Job):
    with restarted(cluster, job, attempts=LOST):
        killed = job.agents[0]
        cluster.kill(killed)
        cluster.until("the spare takes its place", lambda: killed not in job.agents)
    cluster.start(killed)


def test_a_frozen_machine_is_replaced_and_its_ranks_are_gone_once_it_thaws(cluster: DtrainCluster, job: Job):
    with restarted(cluster, job, attempts=LOST):
        frozen = job.agents[-1]
        cluster.pause(frozen)
        cluster.until("the spare takes its place", lambda: frozen not in job.agents)
    cluster.resume(frozen)
    cluster.wait_ready(frozen)
    no_ranks(cluster, frozen)


@pytest.mark.ci
def test_a_machine_without_network_is_replaced_and_its_ranks_are_gone_once_it_is_back(
    cluster: DtrainCluster, job: Job
):
    with restarted(cluster, job, attempts=LOST):
        lost = job.agents[-1]
        cluster.disconnect(lost)
        cluster.until("the spare takes its place", lambda: lost not in job.agents)
    cluster.reconnect(lost)
    cluster.wait_ready(lost)
    no_ranks(cluster, lost)


def no_ranks(cluster: DtrainCluster, agent: str) -> None:
    script = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c dtrain.agent.launcher"
    cluster.until(
        f"no rank is left on {agent}",
        lambda: cluster.execute(agent, "sh", "-c", script).stdout.strip() in ("0", "1"),
    )


def test_half_of_the_cluster_is_cut_off(cluster: DtrainCluster, job: Job):
    with restarted(cluster, job, attempts=LOST):
        lost = job.agents[0]
        leader = cluster.leader()
        half = {lost, leader, cluster.etcd_members[0]}
        rest = set(cluster.nodes) - half
        cluster.partition(half, rest)
        cluster.until("the spare takes its place", lambda: lost not in job.agents, 180.0)
    cluster.heal()
    cluster.wait_ready()


@pytest.mark.ci
def test_a_machine_that_is_asked_to_end_hands_over_at_a_checkpoint(cluster: DtrainCluster, job: Job):
    used = job.status.restarts
    with restarted(cluster, job):
        leaving = job.agents[0]
        before = newest(job)
        cluster.stop(leaving)
    status = job.status
    assert leaving not in job.agents
    assert status.restarts == used
    assert status.restore is not None
    assert status.restore.seq > before
    cluster.start(leaving)


def test_a_machine_is_replaced_by_a_new_one_of_its_name(cluster: DtrainCluster, job: Job):
    with restarted(cluster, job, attempts=LOST):
        replaced = job.agents[0]
        cluster.replace(replaced)
    cluster.wait_ready(replaced)


def test_the_power_of_the_whole_cluster_fails(cluster: DtrainCluster, job: Job):
    committed = newest(job)
    attempt = job.attempt
    nodes = [*cluster.agents, *cluster.coordinators, *cluster.etcd_members, "store"]
    for name in nodes:
        cluster.kill(name)
    for name in reversed(nodes):
        cluster.start(name)
    cluster.wait_ready()
    status = job.wait_for_attempt(attempt + 1)
    assert status.restore is not None
    assert status.restore.seq >= committed
    job.wait_for_commit(after=newest(job))


def test_nothing_was_quarantined_all_the_while(cluster: DtrainCluster, job: Job):
    assert not job.events(EventReason.CHECKPOINT_QUARANTINED)
    assert cluster.audit().commits > 20
