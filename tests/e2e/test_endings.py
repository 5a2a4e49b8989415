"""How jobs end: every end has its reason, every failure its cause, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.harness import SCRIPTS, Harness

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import FailureKind

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_success_means_that_the_final_checkpoint_is_committed(harness: Harness) -> None:
    job = harness.submit("good", "--steps 120 --pause-ms 20", every_steps=20, keep_last=2)
    harness.assert_succeeded(job, 120)
    commits = harness.commits(job)
    assert [record.final for record in commits] == [False, True]
    assert len(harness.events(job, EventReason.JOB_SUCCEEDED)) == 1
    status = harness.status(job)
    assert (status.attempt, status.restarts, status.failure) == (1, (), None)
    assert "rank 0 is done" in harness.client.read_log(job, 0, "stdout", offset=0).data.decode()


def test_an_exception_in_one_rank_is_the_root_cause_not_its_victims(harness: Harness) -> None:
    args = "--steps 50 --bad-rank 2 --bad-step 5 --bad raise=the-dog-ate-it"
    job = harness.submit("raises", args, max_restarts=1)
    status = harness.await_end(job, JobPhase.FAILED)
    assert status.attempt == 2
    assert status.failure is not None
    assert (status.failure.rank, status.failure.kind) == (2, FailureKind.EXCEPTION)
    assert "the-dog-ate-it" in status.failure.message
    assert "Traceback" in status.failure.log_tail
    assert "misbehave" in status.failure.log_tail
    assert "the-dog-ate-it" in status.reason
    assert "budget of 1 restart is spent" in status.reason
    assert harness.events(job, EventReason.BUDGET_EXHAUSTED)
    harness.assert_released(job)


def test_an_error_of_the_script_ends_the_job_once_another_machine_has_shown_it(harness: Harness) -> None:
    args = "--steps 50 --bad-rank 1 --bad-step 5 --bad raise=no-such-column"
    job = harness.submit("mistaken", args, nnodes=1, every_steps=0, max_restarts=10)
    status = harness.await_end(job, JobPhase.FAILED)
    # Twice on the machine that it had, the third time elsewhere, of ten restarts that it had.
    assert status.attempt == 3
    assert len({mark.agent for mark in status.marks}) == 2
    assert "the same error came at the same step" in status.reason
    assert "no-such-column" in status.reason
    assert harness.events(job, EventReason.USER_ERROR)
    told = describe(harness, job)
    assert told[0].startswith(f"{job}  FAILED  attempt 3")
    assert told[1].startswith("  rank 1 on a")
    assert told[2].startswith("Root cause of attempt 3   rank 1 on a")
    assert any("| " in line and "no-such-column" in line for line in told)
    harness.assert_released(job)


def describe(harness: Harness, job: JobName) -> list[str]:
    command = [sys.executable, "-m", "dtrain.cli", "describe", "job", job]
    command += ["--coordinators", ",".join(harness.cluster.addresses)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


def test_a_script_that_exits_at_once_fails_when_its_budget_is_spent(harness: Harness) -> None:
    job = harness.submit(
        "exits", "1", script="exits_at_once.py", nnodes=1, nproc=1, max_restarts=2, marks=False
    )
    status = harness.await_end(job, JobPhase.FAILED)
    assert status.attempt == 3
    assert status.failure is not None
    assert (status.failure.rank, status.failure.exit_code) == (0, 1)
    assert "there is nothing to train here" in status.failure.log_tail
    harness.assert_released(job)


def test_exit_code_93_is_not_tried_again(harness: Harness) -> None:
    job = harness.submit("no-retry", "93", script="exits_at_once.py", nnodes=1, nproc=1, marks=False)
    status = harness.await_end(job, JobPhase.FAILED)
    assert status.attempt == 1
    assert status.failure is not None
    assert status.failure.exit_code == 93
    assert harness.events(job, EventReason.DO_NOT_RETRY)
    harness.assert_released(job)


def test_a_script_that_is_not_there_fails_with_a_sentence_that_names_it(harness: Harness) -> None:
    job = harness.submit("nowhere", script="nowhere.py", nnodes=1, nproc=1, max_restarts=1, marks=False)
    status = harness.await_end(job, JobPhase.FAILED)
    assert "script nowhere.py" in status.reason
    assert str(SCRIPTS) in status.reason
    harness.assert_released(job)


def test_a_script_that_never_heard_of_dtrain_succeeds(harness: Harness) -> None:
    job = harness.submit("plain", folder=EXAMPLES / "plain_torchrun", nnodes=1, marks=False)
    status = harness.await_end(job)
    assert status.attempt == 1
    assert not harness.commits(job)
    harness.assert_released(job)


def test_a_cancelled_job_ends_without_a_final_checkpoint(harness: Harness) -> None:
    job = harness.start("cancelled", "--steps 100000 --pause-ms 5", nnodes=1, every_steps=50)
    harness.client.set_intent(job, wanted="cancel", by="ann")
    harness.await_end(job, JobPhase.CANCELLED)
    assert not any(record.final for record in harness.commits(job))
    harness.assert_released(job)


def test_a_name_may_be_used_again_and_numbers_go_on(harness: Harness) -> None:
    before = harness.status(JobName("good"))
    assert before.phase == JobPhase.SUCCEEDED
    job = harness.submit("good", "--steps 30", every_steps=10, keep_last=2)
    harness.until("it is a new submission", lambda: harness.status(job).uid != before.uid)
    harness.assert_succeeded(job, 30)
    after = harness.status(job)
    assert after.attempt == before.attempt + 1
    assert min(record.seq for record in harness.commits(job)) > before.seq_last
