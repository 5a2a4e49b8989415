"""SIGTERM at agents, or a notice that they go: jobs are saved at one step and go on elsewhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol import codec
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import NodeRecord

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GRACE_S = 30.0


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder = tmp_path_factory.mktemp("h")
    flags = (
        *("--report-interval", "0.2", "--drain-grace", str(GRACE_S), "--stop-grace", "5"),
        *("--preemption-notice", f"{folder}/{{name}}-goes", "--preemption-interval", "0.2"),
    )
    with Harness(folder, agent_flags=flags) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(autouse=True)
def whole(harness: Harness) -> Iterator[None]:
    """Every test ends with all machines."""
    yield
    for agent in harness.cluster.agents:
        notice(harness, agent).unlink(missing_ok=True)
    for name in [*harness.cluster.coordinators, *harness.cluster.agents]:
        if not harness.cluster.daemon(name).is_running:
            harness.cluster.start_daemon(name)
    harness.await_ready()


def terminate(harness: Harness, agent: str) -> float:
    """SIGTERM to the guardian, and nothing else, as a supervisor of containers does it."""
    assert harness.cluster.daemon(agent).send(signal.SIGTERM)
    return time.monotonic()


def await_end(harness: Harness, agent: str, since: float) -> float:
    """Wait for its guardian to end well; return how long that took."""
    daemon = harness.cluster.daemon(agent)
    assert daemon.wait(GRACE_S + 30.0)
    took_s = time.monotonic() - since
    assert daemon.exit_code == 0
    return took_s


def node(harness: Harness, agent: str) -> NodeRecord | None:
    found = harness.cluster.etcd.range(harness.keys.node(agent)).items  # type: ignore[arg-type]
    return codec.decode(NodeRecord, found[0].value) if found else None


def await_draining(harness: Harness, agent: str) -> None:
    def drains() -> bool:
        found = node(harness, agent)
        return found is not None and found.draining is not None

    harness.until(f"{agent} says that it drains", drains)


def dtrain(harness: Harness, *words: str) -> str:
    command = [sys.executable, "-m", "dtrain.cli", *words]
    command += ["--coordinators", ",".join(harness.cluster.addresses)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_operator_empties_a_machine_and_its_agent_stays(harness: Harness) -> None:
    name = "emptied"
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, every_steps=0)
    harness.await_steps(job, 30)
    before = harness.status(job)
    victim = before.members[1].agent
    assert (
        dtrain(harness, "drain", victim, "--reason", "new disk", "--wait", "--yes") == f"{victim}: drained\n"
    )
    after = harness.await_training(job, after_attempt=before.attempt)
    assert victim not in [member.agent for member in after.members]
    (commit,) = harness.commits(job)
    assert after.restore is not None
    assert (after.restore.seq, after.restarts, after.failure) == (commit.seq, (), None)
    assert harness.cluster.daemon(victim).is_running
    told = dtrain(harness, "get", "agents")
    (line,) = [line for line in told.splitlines() if line.startswith(victim)]
    assert "Cordoned" in line
    assert "new disk" in line
    assert dtrain(harness, "uncordon", victim) == f"{victim}: uncordoned\n"
    harness.stop_file(name).touch()
    harness.await_end(job)


def notice(harness: Harness, agent: str) -> Path:
    """The file whose appearance says that the machine is about to go."""
    return harness.folder / f"{agent}-goes"


def done_and_repeated(harness: Harness, job: JobName, attempt: int) -> tuple[int, int]:
    """Steps that rank 0 had done by the end of ``attempt``, and how many of all it did twice."""
    marks = [mark for mark in harness.marks(job) if mark.rank == 0]
    done = max(mark.step for mark in marks if mark.attempt <= attempt) + 1
    return done, len(marks) - len({mark.step for mark in marks})


def test_a_drained_machine_costs_no_step_and_no_restart(harness: Harness) -> None:
    name = "moves"
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, every_steps=0)
    harness.await_steps(job, 50)
    before = harness.status(job)
    victim = before.members[1].agent

    began = terminate(harness, victim)
    took_s = await_end(harness, victim, began)
    after = harness.await_training(job, after_attempt=before.attempt)
    say(
        f"drained: the agent ended after {took_s:.2f} s,"
        f" all train again after {time.monotonic() - began:.2f} s"
    )
    (commit,) = harness.commits(job)
    assert commit.attempt == before.attempt
    assert after.restore is not None
    assert (after.attempt, after.restore.seq) == (before.attempt + 1, commit.seq)
    assert victim not in [member.agent for member in after.members]
    assert (after.restarts, after.failure) == ((), None)
    harness.await_steps(job)
    done, again = done_and_repeated(harness, job, before.attempt)
    say(f"drained at step {done}, checkpoint of step {commit.step}: {again} steps done twice")
    assert (done, again) == (commit.step, 0)
    assert took_s < GRACE_S / 2
    reasons = [event.reason for event in harness.events(job)]
    assert reasons.index(EventReason.AGENT_DRAINING) < reasons.index(EventReason.DRAINED)
    harness.stop_file(name).touch()
    harness.await_end(job)


def test_a_spot_notice_costs_no_step_and_the_machine_is_left_alone_until_it_goes(harness: Harness) -> None:
    name = "spot"
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, every_steps=0)
    harness.await_steps(job, 50)
    before = harness.status(job)
    victim = before.members[0].agent

    notice(harness, victim).write_text("25 the market asks")
    began = time.monotonic()
    after = harness.await_training(job, after_attempt=before.attempt)
    say(f"a notice of 25 s: all train elsewhere after {time.monotonic() - began:.2f} s")
    (commit,) = harness.commits(job)
    assert after.restore is not None
    assert (after.attempt, after.restore.seq) == (before.attempt + 1, commit.seq)
    assert victim not in [member.agent for member in after.members]
    assert (after.restarts, after.failure) == ((), None)
    harness.await_steps(job)
    assert done_and_repeated(harness, job, before.attempt) == (commit.step, 0)
    told = [event.message for event in harness.events(job) if event.reason is EventReason.AGENT_DRAINING]
    assert "the market asks" in told[0]
    # Its next life is told the same before it says that it is there.
    harness.cluster.kill_agent(victim)
    former = node(harness, victim)
    harness.until("a new life of it is there", lambda: (one := node(harness, victim)) and one != former)
    await_draining(harness, victim)
    assert harness.cluster.daemon(victim).is_running
    notice(harness, victim).unlink()
    await_end(harness, victim, time.monotonic())
    assert harness.status(job).attempt == after.attempt
    harness.stop_file(name).touch()
    harness.await_end(job)


def test_a_job_of_one_machine_waits_for_another_one_and_loses_no_step(harness: Harness) -> None:
    name = "single"
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, nnodes=1, every_steps=0)
    harness.await_steps(job, 20)
    before = harness.status(job)
    for agent in harness.cluster.agents:
        notice(harness, agent).touch()
    harness.until("it waits", lambda: harness.status(job).phase is JobPhase.RECOVERING)
    status = harness.status(job)
    assert "waiting for 1 of 1 agent" in status.reason
    (commit,) = harness.commits(job)
    for agent in harness.cluster.agents:
        notice(harness, agent).unlink()
        await_end(harness, agent, time.monotonic())
        harness.cluster.start_daemon(agent)
    after = harness.await_training(job, after_attempt=before.attempt)
    harness.await_steps(job)
    assert (after.attempt, after.restarts) == (before.attempt + 1, ())
    assert done_and_repeated(harness, job, before.attempt) == (commit.step, 0)
    harness.stop_file(name).touch()
    harness.await_end(job)


def test_a_spare_has_nothing_to_wait_for(harness: Harness) -> None:
    spare = sorted(harness.cluster.agents)[-1]
    assert await_end(harness, spare, terminate(harness, spare)) < GRACE_S / 3


def test_ranks_without_the_sdk_are_moved_at_once(harness: Harness) -> None:
    job = harness.submit("plain", script="plain.py", nnodes=1, nproc=1, marks=False)
    harness.until("it runs", lambda: harness.status(job).phase is JobPhase.RUNNING)
    before = harness.status(job)
    victim = before.members[0].agent
    assert await_end(harness, victim, terminate(harness, victim)) < GRACE_S / 2
    harness.until("it has been started again", lambda: harness.status(job).attempt > before.attempt)
    after = harness.status(job)
    assert after.members[0].agent != victim
    assert after.restarts == ()
    harness.client.set_intent(job, wanted="cancel")
    harness.await_end(job, JobPhase.CANCELLED)


def test_all_machines_of_a_job_drain_with_one_checkpoint_and_a_killed_agent_goes_on(harness: Harness) -> None:
    name = "all"
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, every_steps=0)
    harness.await_steps(job, 20)
    attempt = harness.status(job).attempt
    began = {agent: terminate(harness, agent) for agent in harness.cluster.agents}
    crashed = harness.status(job).members[0].agent
    pid = harness.cluster.daemon(crashed).process_pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    for agent, since in began.items():
        say(f"{agent} of all ended after {await_end(harness, agent, since):.2f} s")
    status = harness.status(job)
    say(f"meanwhile: {status.phase}: {status.reason}")
    assert status.phase is JobPhase.RECOVERING
    (commit,) = harness.commits(job)
    for agent in harness.cluster.agents:
        harness.cluster.start_daemon(agent)
    after = harness.await_training(job, after_attempt=attempt)
    assert after.restore is not None
    assert after.restore.seq == commit.seq
    harness.stop_file(name).touch()
    harness.await_end(job)


def test_without_a_leader_nobody_waits_long_and_the_second_signal_waits_for_nothing(harness: Harness) -> None:
    name = "alone"
    args = f"--steps 1000000 --pause-ms 10 --stubborn --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, every_steps=20)
    commit = harness.await_commit(job)
    attempt = harness.status(job).attempt
    patient, hurried = (member.agent for member in harness.status(job).members)
    for coordinator in harness.cluster.coordinators:
        harness.cluster.power_cut(coordinator)
    began = {agent: terminate(harness, agent) for agent in (patient, hurried)}
    await_draining(harness, hurried)
    terminate(harness, hurried)
    hurried_s = await_end(harness, hurried, began[hurried])
    patient_s = await_end(harness, patient, began[patient])
    say(f"without a leader: ended after {patient_s:.2f} s, by a second SIGTERM after {hurried_s:.2f} s")
    assert GRACE_S / 3 <= patient_s < GRACE_S
    assert hurried_s < patient_s
    for daemon in [*harness.cluster.coordinators, patient, hurried]:
        harness.cluster.start_daemon(daemon)
    after = harness.await_training(job, after_attempt=attempt)
    assert after.restore is not None
    assert after.restore.seq >= commit.seq
    assert after.restarts == ()
    harness.stop_file(name).touch()
    harness.await_end(job)
