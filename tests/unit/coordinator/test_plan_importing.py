"""Checkpoints from elsewhere: opened on request, committed by the rules of all others, begun from."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.builders import JOB, KEYS, Stage, make_part, make_spec

from dtrain.coordinator.core.decisions import VerifyCheckpoint
from dtrain.coordinator.core.views import Verdict
from dtrain.protocol.checkpoint import Order, OrderKind, Quarantine
from dtrain.protocol.commands import Prepare
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Seq, Step, Term, Uid
from dtrain.protocol.job import JobPhase, JobSpec, Wanted
from dtrain.protocol.snapshot import WorkerPhase

STEP = Step(40)


def awaiting(**more: Any) -> JobSpec:
    spec = make_spec(store="file:///s", **more)
    return replace(spec, checkpoint=replace(spec.checkpoint, await_import=True))


def ask(stage: Stage, name: str = "i1", *, uid: str = "u1", timeout_s: float = 100.0, **more: Any) -> None:
    order = Order(Uid(uid), OrderKind.IMPORT, by="ann", step=STEP, timeout_s=timeout_s, **more)
    stage.write(KEYS.order(JOB, name), order)


def report(stage: Stage, name: str = "i1", **changes: Any) -> None:
    """What was opened for the request is written."""
    order = stage.orders()[name].value
    stage.write(KEYS.order(JOB, name), replace(order, part=replace(make_part(stage.opened, 0), **changes)))


def judge(stage: Stage, *, ok: bool = True, retry: bool = False) -> None:
    record = stage.opened
    stage.verdicts[record.seq, record.nonce] = Verdict(
        record.seq,
        record.nonce,
        ok,
        "" if ok else "a chunk is missing",
        retry,
        f"m/{record.seq}",
        10,
        "d" * 64,
        1024,
        stage.now,
    )


def waiting() -> Stage:
    """Machines are there, and the job does not begin."""
    stage = Stage(awaiting()).join("a", "b")
    stage.until_quiet()
    assert stage.phase is JobPhase.QUEUED
    assert "dtrain checkpoints import job PATH" in stage.status.reason
    return stage


def test_a_job_that_awaits_a_checkpoint_begins_from_the_one_that_is_imported() -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    opened = stage.opened
    assert (opened.step, opened.world_size, opened.imported, opened.timeout_s) == (STEP, 1, "i1", 100.0)
    assert stage.phase is JobPhase.QUEUED
    assert not stage.work(VerifyCheckpoint), "nothing is written yet"
    report(stage)
    stage.decide()
    (work,) = stage.work(VerifyCheckpoint)
    assert isinstance(work, VerifyCheckpoint)
    assert ([part.rank for part in work.parts], work.store) == ([0], "file:///s")
    judge(stage)
    stage.decide()
    (commit,) = stage.commits
    assert (commit.seq, commit.step, commit.attempt, commit.world_size) == (1, STEP, 0, 1)
    assert not stage.orders()
    assert not stage.of("open")
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING
    restore = stage.status.restore
    assert restore is not None
    assert (restore.seq, restore.step) == (1, STEP)
    assert stage.receivers(Prepare) == ["a", "b"]
    assert EventReason.CHECKPOINT_COMMITTED in stage.reasons_of_events()


def test_a_job_that_waits_for_machines_takes_one_too_and_none_starts_meanwhile() -> None:
    stage = Stage(make_spec(store="file:///s"))
    stage.until_quiet()
    ask(stage)
    stage.join("a", "b")
    stage.until_quiet()
    assert (stage.phase, stage.opened.imported) == (JobPhase.QUEUED, "i1")
    report(stage)
    judge(stage)
    stage.until_quiet()
    assert stage.status.restore is not None


@pytest.mark.parametrize("reported", [False, True])
def test_a_request_that_is_gone_aborts_what_was_opened_for_it(reported: bool) -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    if reported:
        report(stage)
        judge(stage)
    del stage.cells[KEYS.order(JOB, "i1")]
    stage.until_quiet()
    assert not stage.of("open")
    assert not stage.commits
    assert stage.events[-1].reason is EventReason.CHECKPOINT_ABORTED
    assert stage.phase is JobPhase.QUEUED, "it never begins from scratch"
    ask(stage, "i2")
    stage.until_quiet()
    assert (stage.opened.seq, stage.opened.imported) == (2, "i2"), "no number is used again"


@pytest.mark.parametrize(
    "other", [{"nonce": "0" * 16}, {"attempt": 1}, {"seq": Seq(7)}, {"step": Step(41)}, {"rank": 1}]
)
def test_a_part_of_anything_else_is_not_looked_at(other: dict[str, Any]) -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    report(stage, **other)
    judge(stage)
    stage.until_quiet()
    assert not stage.commits
    assert not stage.work(VerifyCheckpoint)


def test_what_does_not_verify_is_aborted_and_said_and_an_absent_store_is_asked_again() -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    report(stage)
    judge(stage, ok=False, retry=True)
    stage.until_quiet()
    assert stage.opened
    assert not stage.work(VerifyCheckpoint)
    stage.after(5.0).decide()
    assert stage.work(VerifyCheckpoint)
    judge(stage, ok=False)
    stage.until_quiet()
    assert not stage.of("open")
    assert not stage.orders()
    assert "a chunk is missing" in stage.events[-1].message


def test_an_import_has_a_deadline_that_a_change_of_leader_does_not_end() -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    stage.after(90.0)
    stage.change_leader()
    stage.until_quiet()
    assert (stage.opened.term, stage.opened.imported) == (stage.term, "i1")
    stage.after(90.0).until_quiet()
    assert stage.opened
    stage.after(20.0).until_quiet()
    assert not stage.of("open")
    assert not stage.orders()
    assert "within 100 s" in stage.events[-1].message


def test_a_cancelled_job_takes_no_checkpoint() -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    report(stage)
    judge(stage)
    stage.want(Wanted.CANCEL)
    stage.until_quiet()
    assert stage.phase is JobPhase.CANCELLED
    assert not stage.of("open")
    assert not stage.commits
    assert not stage.orders()


def test_a_job_that_has_begun_refuses() -> None:
    stage = Stage(make_spec(store="file:///s")).join("a", "b")
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING
    ask(stage)
    stage.until_quiet()
    assert not stage.orders()
    assert not stage.of("open")
    assert (stage.events[-1].reason, stage.events[-1].object) == (EventReason.USER_REQUESTED, "import/i1")


def test_a_job_that_was_suspended_goes_on_with_its_own_work() -> None:
    stage = Stage(make_spec(store="file:///s")).join("a", "b").run(step=40)
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.problem("a", message="no space")  # it has no checkpoint, and has trained all the same
    stage.decide()
    stage.everyone(WorkerPhase.IDLE, saving=())
    stage.until_quiet()
    assert stage.phase is JobPhase.SUSPENDED
    stage.want(Wanted.RUN)
    ask(stage)
    stage.agents.clear()
    stage.until_quiet()
    assert (stage.phase, stage.orders(), stage.of("open")) == (JobPhase.QUEUED, {}, {})
    assert stage.events[-1].message.endswith("the job is at step 40, not waiting for its first attempt")


def test_without_a_store_there_is_nothing_to_import_into() -> None:
    spec = make_spec()
    stage = Stage(replace(spec, checkpoint=replace(spec.checkpoint, await_import=True))).join("a", "b")
    stage.until_quiet()
    assert "no store" in stage.status.reason
    ask(stage)
    stage.until_quiet()
    assert not stage.orders()
    assert "no store" in stage.events[-1].message


def test_two_requests_are_answered_one_after_the_other_and_the_later_one_counts() -> None:
    stage = Stage(awaiting())
    stage.until_quiet()
    ask(stage)
    ask(stage, "i2")
    stage.until_quiet()
    assert stage.opened.imported == "i1"
    report(stage)
    judge(stage)
    stage.until_quiet()
    assert ([c.seq for c in stage.commits], stage.opened.imported) == ([1], "i2")
    report(stage, "i2")
    judge(stage)
    stage.join("a", "b").until_quiet()
    assert stage.status.restore is not None
    assert stage.status.restore.seq == 2


def test_an_imported_checkpoint_that_is_damaged_is_not_replaced_by_a_beginning_from_scratch() -> None:
    stage = waiting()
    ask(stage)
    stage.until_quiet()
    report(stage)
    judge(stage)
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING
    stage.write(KEYS.bad(JOB, Seq(1)), Quarantine(Term(1), Seq(1), "x", 0, "a", "b"))
    stage.lose("a")
    stage.after(60.0).until_quiet()
    assert stage.phase is JobPhase.FAILED
    assert "must not begin from scratch" in stage.status.reason


def test_what_was_imported_is_looked_for_where_it_was_put() -> None:
    spec = make_spec()
    stage = Stage(replace(spec, checkpoint=replace(spec.checkpoint, await_import=True)))
    stage.default_store = "file:///one"
    stage.until_quiet()
    ask(stage)
    stage.until_quiet()
    report(stage)
    judge(stage)
    stage.until_quiet()
    stage.default_store = "file:///two"
    stage.join("a", "b").until_quiet()
    assert (stage.phase, stage.status.store) == (JobPhase.STARTING, "file:///one")
