"""Ranks that hang are found, told apart and named, and their stacks are kept."""

import functools
from pathlib import Path

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import JobName
from dtrain.protocol.snapshot import FailureKind

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LIMIT_S = 240.0
"""Waiting for a CPU is no hang: on a loaded machine a spinning rank is found later."""

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLANTED = (("elsewhere", 1, "own code"), ("worker", 2, "waits for data"), ("loop", 3, "own code"))


def hang_of(harness: Harness, job: JobName, attempt: int) -> EventRecord | None:
    found = harness.events(job, EventReason.HANG_FOUND)
    return next((event for event in found if event.attempt == attempt), None)


def test_three_kinds_of_hang_are_told_apart_and_the_job_goes_on(harness: Harness) -> None:
    plan = ",".join(f"{kind}:{rank}" for kind, rank, _ in PLANTED)
    args = f"--steps 1000000 --after 40 --plan {plan}"
    job = harness.submit("hangs", args, script="hanging.py", folder=BENCHMARKS, max_restarts=20)
    harness.await_training(job, limit_s=LIMIT_S)
    for attempt, (kind, rank, words) in enumerate(PLANTED, 1):
        found = functools.partial(hang_of, harness, job, attempt)
        event = harness.until(f"{kind} is found", found, LIMIT_S)
        assert event is not None
        say(f"{kind} on rank {rank}: {event.message}")
        assert event.object == f"rank/{rank}"
        assert words in event.message
        failure = harness.status(job).failure
        assert failure is not None
        assert (failure.kind, failure.rank) == (FailureKind.HANG, rank)
        stacks = harness.client.read_log(job, rank, "stacks", attempt=attempt).data.decode()
        assert {"elsewhere": "in wait", "worker": "in __getitem__", "loop": "in spin"}[kind] in stacks
    harness.await_training(job, after_attempt=len(PLANTED), limit_s=LIMIT_S)


def test_a_person_may_look_at_ranks_that_train(harness: Harness) -> None:
    job = JobName("hangs")
    found = harness.client.stacks(job)
    assert [one.rank for one in found.ranks] == [0, 1, 2, 3]
    assert found.problems == ()
    assert all("most recent call first" in one.text for one in found.ranks)
    # Others find what was collected: describe names it.
    counts = lambda: [snapshot.dumps for snapshot in harness.snapshots(job).values()]  # noqa: E731
    harness.until("the dumps are told of", lambda: counts() and all(count >= 1 for count in counts()))
    before = harness.status(job).attempt
    step = max(state.step for state in harness.training(job).values())
    harness.until("it trains on", lambda: max(s.step for s in harness.training(job).values()) > step)
    assert harness.status(job).attempt == before
    harness.client.set_intent(job, wanted="cancel")
