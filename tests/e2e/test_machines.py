"""One job through the loss of agents, ranks, launchers and machines, and two zombies.

All tests are chapters of one training run; the last one compares its weights,
bit by bit, with a run that nothing happened to.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.support.harness import Harness, say

from dtrain.local import sweeping
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName, Rank
from dtrain.protocol.job import JobStatus
from dtrain.protocol.snapshot import FailureKind

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def job(harness: Harness) -> JobName:
    name = "faults"
    args = f"--steps 1000000 --pause-ms 10 --stubborn --stop-file {harness.stop_file(name)}"
    started = harness.start(name, args, spares=1)
    harness.await_commit(started, after=0)
    return started


def warm(harness: Harness, job: JobName) -> str:
    """The machine that is ready to take a lost one's place, "" while none is."""
    return next((name for name, snapshot in harness.snapshots(job).items() if snapshot.warm), "")


@contextmanager
def recovers(harness: Harness, job: JobName, what: str) -> Iterator[JobStatus]:
    """All ranks train again in a later attempt, from the newest commit."""
    before = harness.status(job)
    newest = harness.commits(job)[-1].seq
    began = time.monotonic()
    yield before
    after = harness.await_training(job, after_attempt=before.attempt)
    say(f"{what}: trains again after {time.monotonic() - began:.2f} s")
    assert after.restore is not None
    assert after.restore.seq >= newest
    harness.await_commit(job)


@pytest.fixture(autouse=True)
def whole(harness: Harness) -> None:
    """Every chapter begins with all machines."""
    harness.await_ready()


def test_an_agent_comes_back_beside_its_running_ranks(harness: Harness, job: JobName) -> None:
    pids, attempt = harness.pids(job), harness.status(job).attempt
    agent = harness.status(job).members[1].agent
    old = harness.cluster.kill_agent(agent)
    harness.await_steps(job)
    harness.until(
        "the guardian has started another agent",
        lambda: harness.cluster.daemon(agent).process_pid not in (None, old),
    )
    # Its commit needs the adopted ranks: they must hear of the checkpoint from the new agent.
    harness.await_commit(job)
    assert harness.pids(job) == pids
    assert harness.status(job).attempt == attempt
    assert old not in {found.pid for found in sweeping.find(harness.cluster.folder)}


def test_a_killed_rank_is_restored_from_the_newest_commit(harness: Harness, job: JobName) -> None:
    with recovers(harness, job, "rank killed") as before:
        pid = harness.cluster.kill_rank(3, job=job)
    failure = harness.await_event(job, EventReason.RANK_SIGNALED, "rank 3")
    assert failure.attempt == before.attempt
    status = harness.status(job)
    assert status.failure is not None
    assert (status.failure.kind, status.failure.rank) == (FailureKind.SIGNAL, 3)
    assert (status.failure.pid, status.failure.signal) == (pid, signal.SIGKILL)
    assert harness.status(job).attempt == before.attempt + 1


def test_a_rank_that_dies_while_its_agent_is_down_is_noticed(harness: Harness, job: JobName) -> None:
    agent = harness.status(job).members[1].agent
    with recovers(harness, job, "agent, then rank killed"):
        guardian = harness.cluster.kill_guardian(agent, signal.SIGSTOP)
        harness.cluster.kill_agent(agent)
        harness.cluster.kill_rank(2, job=job)
        os.kill(guardian, signal.SIGCONT)


def test_a_killed_launcher_takes_one_attempt(harness: Harness, job: JobName) -> None:
    agent = harness.status(job).members[0].agent
    with recovers(harness, job, "launcher killed"):
        harness.cluster.kill_launcher(agent)


@pytest.mark.parametrize("node_rank", [1, 0])
def test_a_lost_machine_is_replaced_by_the_spare(harness: Harness, job: JobName, node_rank: int) -> None:
    """Any machine, that of rank 0 too. Its ranks are forked from what the spare imported ahead."""
    victim = harness.status(job).members[node_rank].agent
    spare = harness.until("a machine is warm", lambda: warm(harness, job))
    ready = harness.launchers(spare)
    with recovers(harness, job, f"machine of node rank {node_rank} lost"):
        harness.cluster.power_cut(victim)
        status = harness.await_training(job, after_attempt=harness.status(job).attempt)
        assert victim not in [member.agent for member in status.members]
        assert status.members[node_rank].agent == spare
        assert harness.launchers(spare) == ready
        harness.cluster.start_daemon(victim)


def test_all_machines_lost_at_once_are_waited_for(harness: Harness, job: JobName) -> None:
    with recovers(harness, job, "all machines lost, and brought back"):
        for name in harness.cluster.agents:
            harness.cluster.power_cut(name)
        for name in harness.cluster.agents:
            harness.cluster.start_daemon(name)


def transfers(harness: Harness, agent: str) -> list[int]:
    found = sweeping.find(harness.cluster.daemon(agent).folder)
    return [process.pid for process in found if process.module == "dtrain.agent.transfer"]


def ranks_of(harness: Harness, job: JobName, agent: str) -> dict[Rank, int]:
    return {state.rank: state.pid for state in harness.snapshots(job)[agent].ranks}


def test_a_zombie_is_replaced_and_its_ranks_die_when_it_returns(harness: Harness, job: JobName) -> None:
    """A machine is cut off from etcd and the leader, not from its ranks, for longer than the TTL."""
    zombie, attempt = harness.status(job).members[1].agent, harness.status(job).attempt
    old = ranks_of(harness, job, zombie)
    with recovers(harness, job, "agent cut off"):
        harness.cluster.freeze(zombie)
        harness.until("it is called lost", lambda: harness.status(job).members[1].agent != zombie)
        # Nobody could reach the agent to end them.
        assert set(old.values()) <= harness.alive()
    harness.cluster.thaw(zombie)
    harness.until("its old ranks are gone", lambda: not set(old.values()) & harness.alive())
    # It may be made ready at once to be the job's spare.
    harness.until("it holds nothing of the attempt", lambda: not holds(harness, job, zombie, attempt))


def test_an_upload_that_a_zombie_finishes_late_commits_nothing(harness: Harness, job: JobName) -> None:
    zombie = harness.status(job).members[1].agent
    attempt = harness.status(job).attempt
    old = ranks_of(harness, job, zombie)
    stopped = transfers(harness, zombie)
    assert stopped
    with recovers(harness, job, "agent cut off during an upload"):
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        opened = harness.until("a checkpoint is half done", lambda: half_done(harness, job, zombie))
        harness.cluster.freeze(zombie)
        harness.until("it is called lost", lambda: harness.status(job).members[1].agent != zombie)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    harness.cluster.thaw(zombie)
    harness.until("its old ranks are gone", lambda: not set(old.values()) & harness.alive())
    # It may be made ready at once to be the job's spare.
    harness.until("it holds nothing of the attempt", lambda: not holds(harness, job, zombie, attempt))
    assert opened not in [record.seq for record in harness.commits(job)]
    assert all(r.attempt != attempt or r.seq < opened for r in harness.commits(job))


def holds(harness: Harness, job: JobName, agent: str, attempt: int) -> bool:
    """Whether an agent still shows an attempt, or ranks of any."""
    snapshot = harness.snapshots(job).get(agent)
    return snapshot is not None and (snapshot.attempt == attempt or bool(snapshot.ranks))


def half_done(harness: Harness, job: JobName, without: str) -> int | None:
    """The number of a checkpoint that all agents but one have finished."""
    for record in harness.opened(job):
        done = [
            agent
            for agent, snapshot in harness.snapshots(job).items()
            if any(part.seq == record.seq for part in snapshot.durable)
        ]
        if done and without not in done and record.seq in harness.snapshots(job)[without].saving:
            return record.seq
    return None


def test_a_returned_zombie_is_a_machine_like_any_other(harness: Harness, job: JobName) -> None:
    members = [member.agent for member in harness.status(job).members]
    spare = next(name for name in harness.cluster.agents if name not in members)
    with recovers(harness, job, "machine lost, the zombie takes over"):
        harness.cluster.power_cut(members[1])
        status = harness.await_training(job, after_attempt=harness.status(job).attempt)
        assert spare in [member.agent for member in status.members]
        harness.cluster.start_daemon(members[1])


def test_the_weights_are_those_of_an_undisturbed_run(harness: Harness, job: JobName) -> None:
    harness.stop_file(job).touch()
    harness.await_end(job)
    steps = int(harness.commits(job)[-1].step)
    harness.assert_succeeded(job, steps)
    trained = {(mark.rank, mark.step) for mark in harness.marks(job)}
    assert trained >= {(rank, step) for rank in range(4) for step in range(steps)}
    calm = harness.submit("calm", f"--steps {steps}", every_steps=0)
    harness.assert_succeeded(calm, steps)
    assert len(harness.marks(calm)) == 4 * steps
    assert harness.digests(calm) == harness.digests(job) != {}
