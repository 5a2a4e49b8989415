"""Several jobs on few machines: suspended and resumed, queued and preempted, and no step is done twice."""

import os
import subprocess
import sys
import time

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def dtrain(harness: Harness, *args: str, code: int = 0) -> str:
    """Run the command against the cluster and return what it printed."""
    addresses = ",".join(harness.cluster.addresses)
    env = dict(os.environ) | {
        "DTRAIN_COORDINATORS": addresses,
        "XDG_CONFIG_HOME": str(harness.folder / "config"),
    }
    command = [sys.executable, "-m", "dtrain.cli", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def endless(harness: Harness, name: str) -> str:
    return f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"


def steps_done_twice(harness: Harness, job: JobName) -> int:
    marks = [mark for mark in harness.marks(job) if mark.rank == 0]
    return len(marks) - len({mark.step for mark in marks})


def test_a_suspended_job_frees_its_machines_and_resumes_where_it_was(harness: Harness) -> None:
    job = harness.start("sleeper", endless(harness, "sleeper"), every_steps=0)
    harness.await_steps(job, 30)
    pids = set(harness.pids(job).values())

    began = time.monotonic()
    told = dtrain(harness, "suspend", job, "--wait", "--timeout", "2m")
    say(f"suspended after {time.monotonic() - began:.2f} s: {told.strip()}")
    status = harness.status(job)
    assert (status.phase, status.members) == (JobPhase.SUSPENDED, ())
    assert not pids & harness.alive()
    (commit,) = harness.commits(job)
    assert told == f"sleeper: {status.reason}\n"
    assert f"at step {commit.step}, with checkpoint {commit.seq}" in status.reason
    harness.until("its launchers have gone", lambda: not harness.snapshots(job))

    # What it had is free for others.
    other = harness.start("other", endless(harness, "other"), nnodes=3, every_steps=0)
    harness.stop_file("other").touch()
    harness.await_end(other)

    began = time.monotonic()
    dtrain(harness, "resume", job, "--wait", "--timeout", "2m")
    say(f"resumed after {time.monotonic() - began:.2f} s")
    after = harness.status(job)
    assert after.restore is not None
    assert (after.attempt, after.restore.seq) == (2, commit.seq)
    harness.await_steps(job, 10)
    assert steps_done_twice(harness, job) == 0
    assert (after.restarts, after.failure) == ((), None)


def test_a_paused_job_stands_still_with_all_it_has_and_goes_on_with_the_next_step(harness: Harness) -> None:
    job = JobName("sleeper")
    harness.await_steps(job, 20)
    before = harness.status(job)
    pids = set(harness.pids(job).values())
    began = time.monotonic()
    told = dtrain(harness, "pause", job, "--wait", "--timeout", "2m")
    say(f"paused after {time.monotonic() - began:.2f} s: {told.strip()}")
    status = harness.status(job)
    assert told == f"sleeper: {status.reason}\n"
    assert (status.phase, status.members, status.attempt) == (
        JobPhase.RUNNING,
        before.members,
        before.attempt,
    )
    commit = harness.commits(job)[-1]
    assert commit.seq == status.held
    # A leader and an agent that are replaced meanwhile let nobody go.
    harness.cluster.kill_leader_process()
    harness.cluster.kill_agent(status.members[0].agent)
    harness.until("another leads", lambda: harness.status(job).term > status.term)
    time.sleep(3.0)
    assert pids <= harness.alive()
    assert max(mark.step for mark in harness.marks(job)) + 1 == commit.step
    began = time.monotonic()
    dtrain(harness, "unpause", job, "--wait")
    say(f"unpaused after {time.monotonic() - began:.2f} s")
    harness.await_steps(job, 10)
    assert set(harness.pids(job).values()) == pids
    assert steps_done_twice(harness, job) == 0
    assert harness.status(job).attempt == before.attempt


def test_the_leader_dies_while_it_is_being_suspended(harness: Harness) -> None:
    job = JobName("sleeper")
    harness.await_steps(job, 20)
    commits = len(harness.commits(job))
    dtrain(harness, "suspend", job)
    harness.until("it is being suspended", lambda: harness.status(job).phase is not JobPhase.RUNNING)
    harness.cluster.kill_leader_process()
    harness.until("it is suspended", lambda: harness.status(job).phase is JobPhase.SUSPENDED)
    assert len(harness.commits(job)) == commits + 1
    dtrain(harness, "resume", job)
    harness.await_training(job, after_attempt=2)
    harness.await_steps(job, 10)
    assert steps_done_twice(harness, job) == 0
    harness.stop_file("sleeper").touch()
    harness.await_end(job)


def test_a_more_important_job_takes_the_machines_and_gives_them_back(harness: Harness) -> None:
    low = harness.start("low", endless(harness, "low"), nnodes=3, every_steps=0)
    harness.await_steps(low, 30)
    began = time.monotonic()
    big = harness.submit("big", endless(harness, "big"), nnodes=2, every_steps=0, priority=10)
    harness.await_training(big)
    say(f"the important job trains {time.monotonic() - began:.2f} s after it was submitted")
    assert harness.status(low).phase is JobPhase.QUEUED
    assert harness.events(low, EventReason.PREEMPTED)
    (commit,) = harness.commits(low)

    late = harness.submit("late", endless(harness, "late"), nnodes=3, every_steps=0)
    words = "2nd in the queue: waits for 3 agents with 2 free slots, behind low (priority 0)"
    harness.until("it is told its place", lambda: harness.status(late).reason == words)
    listed = dtrain(harness, "get", "jobs")
    assert words in listed
    assert "waiting for 2 of 3 agents with 2 free slots" in listed
    dtrain(harness, "cancel", late, "--yes", "--wait")

    harness.stop_file("big").touch()
    harness.await_end(big)
    after = harness.await_training(low, after_attempt=1)
    assert after.restore is not None
    assert (after.attempt, after.restore.seq) == (2, commit.seq)
    harness.await_steps(low, 10)
    assert steps_done_twice(harness, low) == 0
    harness.stop_file("low").touch()
    harness.await_end(low)
