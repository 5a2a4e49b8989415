"""What ranks report of themselves, and what follows: a loss that is NaN, and ranks slower than the others."""

import pytest
from tests.support.harness import Harness

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import Condition, NonFiniteAction, NonFinitePolicy
from dtrain.protocol.snapshot import FailureKind

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def condition(harness: Harness, job: JobName, name: str) -> Condition | None:
    return next((one for one in harness.status(job).conditions if one.type == name), None)


def test_a_loss_that_is_nan_in_one_step_takes_training_back_two_checkpoints(harness: Harness) -> None:
    trigger = harness.folder / "nan"
    job = harness.start(
        "sick",
        f"--nan-file {trigger} --stop-file {harness.stop_file('sick')}",
        script="uneven.py",
        every_steps=20,
        keep_last=5,
        nonfinite=NonFinitePolicy(NonFiniteAction.ROLLBACK, back=2),
    )
    harness.until("three checkpoints", lambda: len(harness.commits(job)) >= 3)
    trigger.touch()
    status = harness.await_training(job, after_attempt=1)
    assert status.failure is not None
    assert (status.failure.kind, status.failure.rank) == (FailureKind.NONFINITE, 1)
    assert len(status.restarts) == 1
    first, second = status.passed_over
    assert status.restore is not None
    mine = [record.seq for record in harness.commits(job) if record.attempt == 1]
    assert mine[-3:] == [status.restore.seq, first, second]
    assert harness.events(job, EventReason.ROLLED_BACK)
    again = min(mark.step for mark in harness.marks(job) if mark.attempt == 2)
    assert again == status.restore.step
    # Nothing that the rank had spoken against was committed: what is newer is of the attempt after it.
    assert all(record.step <= status.failure.step for record in harness.commits(job) if record.attempt == 1)
    harness.stop_file(job).touch()
    harness.await_end(job)


def test_slow_ranks_are_named_with_the_cause_and_cleared(harness: Harness) -> None:
    slow = harness.folder / "slow"
    job = harness.start(
        "uneven",
        f"--slow-file {slow} --stop-file {harness.stop_file('uneven')}",
        script="uneven.py",
        every_steps=0,
    )
    slow.write_text("1 step 150\n2 data 150\n")
    harness.until("both are named", lambda: set(harness.status(job).stragglers) == {1, 2})
    told = {event.object: event.message for event in harness.events(job, EventReason.STRAGGLER)}
    assert set(told) == {"rank/1", "rank/2"}
    assert not told["rank/1"].endswith("as it waits for data")
    assert told["rank/2"].endswith("as it waits for data")
    found = condition(harness, job, "Straggling")
    assert found is not None
    assert found.status == "True"
    assert "rank 1 on" in found.message
    # All ranks take as long for a step: only their own part of it tells who is slow.
    timings = {rank: state.timing for rank, state in harness.training(job).items()}
    assert all(timing is not None and timing.step_s > 0.14 for timing in timings.values())
    slow.unlink()
    harness.until("both are cleared", lambda: not harness.status(job).stragglers)
    found = condition(harness, job, "Straggling")
    assert found is not None
    assert found.status == "False"
    harness.stop_file(job).touch()
    harness.await_end(job)
