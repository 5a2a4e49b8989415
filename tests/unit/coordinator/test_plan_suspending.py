"""Suspending: one checkpoint that ranks hold at, a clean stop, and back into the queue."""

from dataclasses import replace

import pytest
from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.queue import Place, Queue, Waiting
from dtrain.coordinator.core.suspending import STOP_SLACK_S
from dtrain.protocol.commands import BeginCheckpoint, Prepare, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, Incarnation, JobName, Uid
from dtrain.protocol.job import Intent, JobPhase, Wanted
from dtrain.protocol.snapshot import FailureKind, WorkerPhase, WorkerSnapshot

BIG = JobName("big")


def training(*, sdk: bool = True, store: str = "s3://b", nodes: tuple[int, int] = (2, 2)) -> Stage:
    """A job of ranks on a and b, at step 40."""
    return Stage(make_spec(store=store, nodes=nodes)).join("a", "b").run(step=40, sdk=sdk)


def preempted(stage: Stage) -> None:
    """A more important job needs the machines."""
    waiting = {BIG: Waiting(BIG, 10, 0.0, stage.now)}
    stage.queue = Queue({BIG: Place(1, False)}, waiting, victims={JOB: BIG})


def saved(stage: Stage) -> None:
    """The checkpoint is committed, and the decision to stop is made."""
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()


def stopped(stage: Stage, *names: str) -> None:
    """Ranks have obeyed STOP."""
    for name in names or [member.agent for member in stage.status.members]:
        stage.report(name, WorkerPhase.IDLE, saving=())
    stage.decide()


def suspended() -> Stage:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    saved(stage)
    stopped(stage)
    assert stage.phase is JobPhase.SUSPENDED
    return stage


def test_a_checkpoint_is_taken_that_all_ranks_hold_at() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDING
    assert not stage.status.stopping
    assert stage.status.reason == "being suspended: a checkpoint is taken before its ranks are stopped"
    assert stage.opened.step > 40
    assert [d.command.hold_s > 0 for d in stage.commands(BeginCheckpoint)] == [True, True]  # type: ignore[union-attr]
    assert stage.receivers(Stop) == []
    stage.decide()
    assert not stage.last.writes


def test_after_its_commit_all_ranks_are_stopped_and_only_then_the_machines_are_free() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    record = stage.opened
    saved(stage)
    assert stage.commits[-1].seq == record.seq
    assert (stage.phase, stage.status.stopping) == (JobPhase.SUSPENDING, True)
    assert len(stage.status.members) == 2
    assert stage.receivers(Stop) == ["a", "b"]
    stage.report("a", WorkerPhase.IDLE, saving=())
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDING
    assert stage.receivers(Stop) == ["b"]
    stopped(stage, "b")
    assert (stage.phase, stage.status.members) == (JobPhase.SUSPENDED, ())
    assert stage.status.reason == f"suspended by ann at step {record.step}, with checkpoint {record.seq}"
    # Its launchers go, too.
    assert all(directed.command.release for directed in stage.commands(Stop))  # type: ignore[union-attr]
    assert stage.receivers(Stop) == ["a", "b"]
    assert stage.reasons_of_events()[-3:] == [
        EventReason.USER_REQUESTED,
        EventReason.CHECKPOINT_COMMITTED,
        EventReason.SUSPENDED,
    ]
    condition = {one.type: one for one in stage.status.conditions}["Suspended"]
    assert (condition.status, condition.reason) == ("True", "AsAsked")


def test_resumed_it_waits_in_the_queue_and_goes_on_where_it_was() -> None:
    stage = suspended()
    stage.workers.clear()
    stage.decide()
    assert not stage.last.writes
    assert not stage.last.commands
    stage.want(Wanted.RUN)
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.restore is not None
    assert stage.status.restore.seq == stage.commits[-1].seq
    assert stage.receivers(Prepare) == ["a", "b"]
    assert EventReason.RESUMED in stage.reasons_of_events()
    assert stage.status.restarts == ()


def test_another_leader_goes_on_with_it_wherever_it_was() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.change_leader()
    stage.until_quiet()
    assert stage.phase is JobPhase.SUSPENDING
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.status.stopping
    stage.change_leader()
    stage.until_quiet()
    # No second checkpoint: what was saved is known from the status.
    assert not stage.of("open")
    assert stage.receivers(Stop) == ["a", "b"]
    stopped(stage)
    assert stage.phase is JobPhase.SUSPENDED


def test_a_checkpoint_that_fails_is_not_tried_again() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.problem("a")
    stage.decide()
    assert stage.status.stopping
    stopped(stage)
    assert stage.phase is JobPhase.SUSPENDED
    assert stage.status.reason == "suspended by ann without a checkpoint"
    assert stage.events[-1].type == "Warning"


def test_ranks_that_were_past_the_step_are_asked_for_a_later_one() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    first = stage.opened
    stage.accept()
    stage.problem("a", late=True)
    stage.decide()
    assert (stage.phase, stage.status.stopping) == (JobPhase.SUSPENDING, False)
    stage.forget_outcomes()
    stage.decide()
    assert stage.opened.seq == first.seq + 1
    assert stage.opened.step > first.step


def test_the_time_for_the_checkpoint_is_bounded() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.after(stage.spec.checkpoint.timeout_s + 1)
    stage.decide()
    assert stage.status.stopping
    assert stage.receivers(Stop) == ["a", "b"]


def test_ranks_that_are_always_past_the_step_do_not_put_it_off_for_ever() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.problem("a", late=True)
    stage.after(stage.spec.checkpoint.timeout_s)
    stage.decide()
    assert stage.status.stopping


@pytest.mark.parametrize("how", ["no store", "no sdk", "starting"])
def test_what_cannot_be_saved_is_stopped_at_once(how: str) -> None:
    if how == "starting":
        stage = Stage(make_spec(store="s3://b")).join("a", "b")
        stage.decide()
        assert stage.phase is JobPhase.STARTING
        stage.everyone(WorkerPhase.READY)
    else:
        stage = training(store="" if how == "no store" else "s3://b", sdk=how != "no sdk")
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert (stage.phase, stage.status.stopping) == (JobPhase.SUSPENDING, True)
    assert stage.receivers(Stop) == ["a", "b"]
    stopped(stage)
    assert stage.phase is JobPhase.SUSPENDED


def test_an_attempt_that_nobody_has_heard_of_yet_is_ended_by_its_agents_when_they_do() -> None:
    stage = Stage(make_spec(store="s3://b")).join("a", "b")
    stage.decide()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDING
    members = stage.status.members
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDED
    # PREPARE was on its way.
    snapshot = WorkerSnapshot(
        members[0].agent,
        stage.spec.uid,
        Incarnation(members[0].incarnation),
        stage.status.attempt,
        WorkerPhase.STARTING,
    )
    stage.put_snapshot(snapshot)
    stage.decide()
    assert stage.receivers(Stop) == ["a"]


def test_a_rank_that_fails_meanwhile_ends_the_wait_and_costs_no_restart() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.fail("b", kind=FailureKind.EXCEPTION, message="ValueError: x")
    stage.decide()
    assert stage.status.stopping
    assert not stage.of("open")
    assert stage.status.failure is not None
    stopped(stage, "a")
    assert (stage.phase, stage.status.restarts) == (JobPhase.SUSPENDED, ())


def test_exit_code_93_meanwhile_ends_the_job() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.fail("b", exit_code=93)
    stage.decide()
    assert stage.phase is JobPhase.FAILED


def test_a_machine_that_is_lost_meanwhile_is_not_waited_for() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.lose("b")
    stage.decide()
    stage.after(30).decide()
    assert stage.status.stopping
    stopped(stage, "a")
    assert stage.phase is JobPhase.SUSPENDED


def test_a_complete_checkpoint_is_settled_although_its_machine_is_lost() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.lose("b")
    stage.decide()
    assert stage.status.stopping
    stage.report("a", WorkerPhase.IDLE)
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDING
    stage.verify()
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDED
    assert len(stage.commits) == 1


def test_a_silent_agent_holds_it_up_for_the_grace_only() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    saved(stage)
    stopped(stage, "a")
    assert stage.phase is JobPhase.SUSPENDING
    stage.after(stage.spec.shutdown_grace_s + STOP_SLACK_S + 1).decide()
    assert stage.phase is JobPhase.SUSPENDED


@pytest.mark.parametrize("when", ["saving", "stopping", "suspended"])
def test_it_can_be_cancelled_at_any_time(when: str) -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    if when != "saving":
        saved(stage)
    if when == "suspended":
        stopped(stage)
        stage.workers.clear()
    stage.want(Wanted.CANCEL)
    stage.decide()
    if when == "suspended":
        assert stage.phase is JobPhase.CANCELLED
        return
    assert stage.phase is JobPhase.CANCELLING
    stopped(stage)
    assert stage.phase is JobPhase.CANCELLED


def test_training_that_ends_meanwhile_is_let_end() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    stage.accept()
    stage.end_training(41)
    stage.until_quiet()
    assert stage.phase is JobPhase.SUSPENDING
    stage.forget_outcomes()
    stage.until_quiet()
    assert stage.opened.final
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert not stage.status.stopping
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED


def test_resumed_before_it_was_suspended_it_waits_in_the_queue() -> None:
    stage = training()
    stage.want(Wanted.SUSPEND)
    stage.decide()
    saved(stage)
    stage.want(Wanted.RUN)
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDING
    stopped(stage)
    assert stage.phase is JobPhase.QUEUED
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)


def test_a_job_that_waits_has_nothing_to_give_back() -> None:
    stage = Stage(make_spec())
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert (stage.phase, stage.status.reason) == (
        JobPhase.SUSPENDED,
        "suspended by ann before its first attempt",
    )
    stage.join("a", "b").decide()
    assert stage.phase is JobPhase.SUSPENDED


def test_a_job_between_attempts_begins_no_other() -> None:
    stage = training()
    stage.lose("b")
    stage.after(30).until_quiet()
    assert stage.phase is JobPhase.RECOVERING
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDED


def test_a_submission_that_is_suspended_before_anybody_saw_it_never_starts() -> None:
    stage = Stage(make_spec()).join("a", "b")
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDED


def test_an_intent_of_another_submission_is_nobodys_business() -> None:
    stage = training()
    stage.write(KEYS.intent(JOB), Intent(Uid("other"), Wanted.SUSPEND))
    stage.decide()
    assert stage.phase is JobPhase.RUNNING


def test_the_less_important_job_makes_room_and_returns_to_the_queue() -> None:
    stage = training()
    preempted(stage)
    stage.decide()
    assert (stage.phase, stage.status.preempted_by) == (JobPhase.SUSPENDING, "big")
    assert stage.status.reason.startswith("making room for big: a checkpoint")
    assert "makes room for big of priority 10; its own priority is 0" in [e.message for e in stage.events]
    saved(stage)
    # Whoever needed it may have been cancelled meanwhile.
    stage.queue = Queue()
    stopped(stage)
    assert (stage.phase, stage.status.preempted_by) == (JobPhase.QUEUED, "big")
    assert stage.status.reason.startswith("made room for big at step")
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.restore is not None


def test_nobody_makes_room_while_the_brake_is_on() -> None:
    stage = training()
    preempted(stage)
    stage.brake = "4 of 5 agents vanished within 60 s"
    stage.decide()
    assert stage.phase is JobPhase.RUNNING


def test_suspended_by_an_operator_while_it_makes_room_it_stays_so() -> None:
    stage = training()
    preempted(stage)
    stage.decide()
    stage.want(Wanted.SUSPEND)
    saved(stage)
    stopped(stage)
    assert (stage.phase, stage.status.preempted_by) == (JobPhase.SUSPENDED, "")


def test_a_draining_machine_shortens_the_time_for_the_checkpoint() -> None:
    stage = training()
    stage.drain("b", grace_s=20)
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert 0 < stage.opened.hold_s <= 20


def test_what_a_restored_etcd_has_forgotten_is_stopped_as_well() -> None:
    stage = suspended()
    snapshot = stage.workers[AgentName("a")].value
    newer = replace(snapshot, attempt=Attempt(stage.status.attempt + 1), phase=WorkerPhase.TRAINING)
    stage.workers.clear()
    stage.put_snapshot(newer)
    stage.took_office_at = stage.now - 100
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.SUSPENDED, 2)
    stage.decide()
    assert stage.receivers(Stop) == ["a"]


def test_claims_of_others_are_respected_and_told() -> None:
    other = Waiting(BIG, 10, 0.0, 1000.0, 2, 2, 4)
    mine = Waiting(JOB, 0, 1.0, 1000.0, 2, 2, 1)
    place = Place(2, False, other, 0)
    stage = Stage(make_spec()).join("a", "b", slots=4)
    stage.queue = Queue({JOB: place}, {BIG: other, JOB: mine}, changes_at=1030.0)
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    words = "2nd in the queue: waits for 2 agents with 1 free slot, behind big (priority 10)"
    assert stage.status.reason == words
    assert stage.last.wake_at == 1030.0
    stage.queue = Queue(
        {JOB: Place(0, True)},
        {BIG: other, JOB: mine},
        {BIG: {AgentName("a"): 4}},
        {BIG: 0, JOB: 1},
    )
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    assert stage.status.reason == "waiting for 1 of 2 agents with 1 free slot (a is held back for big)"


def test_a_job_is_suspended_only_once_every_coordinator_could_read_that_it_is() -> None:
    stage = training()
    stage.withheld = "coordinator c1 runs dtrain 0.1.0"
    stage.want(Wanted.SUSPEND)
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    assert stage.receivers(BeginCheckpoint) == []
    stage.withheld = ""
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDING
