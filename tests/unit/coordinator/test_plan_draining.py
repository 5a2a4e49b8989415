"""Machines that are about to go: one checkpoint that ranks hold at, and the next attempt without them."""

from dataclasses import replace

import pytest
from tests.support.builders import Stage, make_spec

from dtrain.coordinator.core.draining import GRACE_SHARE
from dtrain.protocol.commands import AbortCheckpoint, BeginCheckpoint, ConfirmCheckpoint, Prepare, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Step
from dtrain.protocol.job import JobPhase, Wanted
from dtrain.protocol.snapshot import WorkerPhase


def training(*spares: str, sdk: bool = True, **spec: object) -> Stage:
    """A job of ranks on a and b, at step 40."""
    spec = {"store": "s3://b", **spec}
    stage = Stage(make_spec(**spec)).join("a", "b").run(step=40, sdk=sdk)  # type: ignore[arg-type]
    return stage.join(*spares)


def begun(stage: Stage) -> list[tuple[str, float]]:
    return [(d.agent, d.command.hold_s) for d in stage.commands(BeginCheckpoint)]  # type: ignore[union-attr]


def test_a_checkpoint_is_opened_at_once_and_all_ranks_are_to_hold_at_it() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    assert stage.opened.step > 40
    assert stage.opened.timeout_s == stage.opened.hold_s == GRACE_SHARE * 60
    assert begun(stage) == [("a", stage.opened.hold_s), ("b", stage.opened.hold_s)]
    assert "b is draining (SIGTERM)" in stage.status.reason
    assert stage.phase is JobPhase.RUNNING


def test_its_commit_and_the_next_attempt_are_one_decision_and_free() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    record = stage.opened
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.commits[-1].seq == record.seq
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert [member.agent for member in stage.status.members] == ["a", "c"]
    assert stage.status.restore is not None
    assert stage.status.restore.seq == record.seq
    assert (stage.status.restarts, stage.status.failure, stage.status.charge) == ((), None, False)
    # Nobody is told that it may go on: its steps would be done twice.
    assert not stage.commands(ConfirmCheckpoint)
    assert stage.receivers(Prepare) == ["a", "c"]
    assert stage.receivers(Stop) == ["b"]
    assert stage.reasons_of_events()[-4:] == [
        EventReason.AGENT_DRAINING,
        EventReason.CHECKPOINT_COMMITTED,
        EventReason.DRAINED,
        EventReason.ATTEMPT_STARTED,
    ]


def test_without_a_spare_the_job_waits_and_says_for_whom() -> None:
    stage = training()
    stage.drain("b")
    stage.decide()
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert "b is draining" in stage.status.reason
    assert sorted(stage.receivers(Stop)) == ["a", "b"]
    stage.join("c")
    stage.decide()
    assert [member.agent for member in stage.status.members] == ["a", "c"]
    assert stage.status.restore is not None


def test_a_job_that_may_shrink_goes_on_with_fewer_machines() -> None:
    stage = training(nodes=(1, 2))
    stage.drain("b")
    stage.decide()
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert [member.agent for member in stage.status.members] == ["a"]


def test_an_open_checkpoint_is_awaited_before_the_last_one() -> None:
    stage = training("c")
    stage.want(Wanted.RUN, token="now")
    stage.decide()
    first = stage.opened
    stage.drain("b")
    stage.decide()
    assert stage.opened.seq == first.seq
    stage.checkpoint()
    assert stage.phase is JobPhase.RUNNING
    stage.decide()
    assert (stage.opened.seq, stage.opened.hold_s > 0) == (first.seq + 1, True)


def test_ranks_that_were_past_the_step_are_let_go_and_asked_for_a_later_one() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    first = stage.opened
    stage.accept()
    stage.problem("a", late=True)
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    assert sorted(stage.receivers(AbortCheckpoint)) == ["a", "b"]
    stage.forget_outcomes()
    stage.decide()
    assert (stage.opened.seq, stage.opened.step > first.step) == (first.seq + 1, True)


def test_a_checkpoint_that_fails_is_not_tried_again() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    stage.accept()
    stage.problem("a", message="no space")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.restore is None
    assert stage.status.restarts == ()


@pytest.mark.parametrize("spec", [{"sdk": False}, {"store": ""}])
def test_what_cannot_be_saved_is_moved_at_once(spec: dict[str, object]) -> None:
    stage = training("c", **spec)  # type: ignore[arg-type]
    stage.drain("b")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert [member.agent for member in stage.status.members] == ["a", "c"]


def test_the_leader_gives_up_before_the_agent_does() -> None:
    stage = training("c")
    stage.drain("b", grace_s=20.0)
    stage.decide()
    stage.accept()
    # Nine tenths of the grace: what is left is for stopping in order.
    stage.after(17.9).decide()
    assert stage.phase is JobPhase.RUNNING
    stage.after(0.2).decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)


def test_another_leader_goes_on_with_the_same_checkpoint() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    record = stage.opened
    stage.accept()
    stage.change_leader()
    stage.until_quiet()
    assert stage.opened.seq == record.seq
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert (stage.status.attempt, len(stage.commits)) == (2, 1)
    assert stage.reasons_of_events().count(EventReason.AGENT_DRAINING) == 1


def test_machines_that_drain_together_need_one_checkpoint_and_one_stop() -> None:
    stage = training("c", "d")
    stage.drain("a")
    stage.decide()
    stage.accept()
    stage.drain("b")
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert [member.agent for member in stage.status.members] == ["c", "d"]
    assert (stage.status.attempt, len(stage.commits)) == (2, 1)


def test_a_starting_attempt_begins_again_without_the_machine() -> None:
    stage = Stage(make_spec(store="s3://b")).join("a", "b")
    stage.until_quiet()
    stage.join("c")
    stage.drain("b")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert [member.agent for member in stage.status.members] == ["a", "c"]


def test_a_job_at_its_end_is_let_finish() -> None:
    stage = training("c")
    stage.end_training(50)
    stage.drain("b")
    stage.decide()
    assert (stage.opened.final, stage.opened.hold_s) == (True, 0.0)
    stage.checkpoint()
    assert stage.phase is JobPhase.RUNNING
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED


def test_training_that_ends_at_the_very_step_is_over() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    stage.accept()
    stage.end_training(stage.opened.step)
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.commits[-1].final
    assert stage.phase is JobPhase.RUNNING
    assert {d.command.final for d in stage.commands(ConfirmCheckpoint)} == {True}  # type: ignore[union-attr]


def test_a_machine_whose_ranks_are_done_is_not_waited_for() -> None:
    stage = training(sdk=False)
    stage.report("b", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.drain("b")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


def test_a_cancelled_job_is_cancelled() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    stage.want(Wanted.CANCEL)
    stage.decide()
    assert stage.phase is JobPhase.CANCELLING


def test_nothing_new_is_placed_on_a_draining_machine() -> None:
    stage = Stage(make_spec(store="s3://b")).join("a", "b")
    stage.drain("a")
    stage.until_quiet()
    assert stage.phase is JobPhase.QUEUED
    assert "a is draining" in stage.status.reason


def test_the_brake_does_not_hold_up_what_an_agent_says_itself() -> None:
    stage = training("c")
    stage.brake = "3 of 9 agents vanished"
    stage.drain("b")
    stage.decide()
    assert stage.opened.hold_s > 0
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert stage.commits


def test_a_drained_machine_that_dies_in_the_middle_is_a_lost_one() -> None:
    stage = training("c")
    stage.drain("b")
    stage.decide()
    stage.accept()
    stage.lose("b")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert AgentName("b") not in [member.agent for member in stage.status.members]


def test_a_fast_job_gets_a_target_that_it_has_not_passed() -> None:
    stage = training("c")
    stage.step_rate = 100.0
    stage.step(1000)
    stage.after(1.5)
    stage.drain("b")
    stage.decide()
    assert stage.opened.step >= Step(1000 + 150 + 50)


def test_nothing_is_saved_where_nothing_was_computed() -> None:
    stage = Stage(make_spec(store="s3://b")).join("a", "b").run().join("c")
    stage.drain("b")
    stage.decide()
    assert not stage.of("open")
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)


def test_an_agent_that_came_back_and_does_not_know_the_steps_yet_is_heard_first() -> None:
    stage = Stage(make_spec(store="s3://b", nodes=(1, 1))).join("a").run(step=40).join("c")
    stage.join("a", incarnation="i2")
    stage.drain("a")
    stage.step(0)
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)
    stage.step(41)
    stage.decide()
    assert stage.opened.step > 41


def test_an_agent_that_does_not_answer_is_waited_for_before_the_step_is_chosen() -> None:
    stage = training("c")
    stage.drain("b")
    stage.unreachable[AgentName("b")] = stage.now
    stage.decide()
    assert not stage.of("open")
    assert "does not answer" in stage.said
    # Back in a new life: it may be asked.
    stage.unreachable.clear()
    stage.decide()
    assert stage.opened.hold_s > 0


def test_a_young_attempt_is_measured_by_its_age_and_no_target_is_out_of_reach() -> None:
    stage = training("c")
    stage.after(2.0).step(240)
    stage.drain("b")
    stage.decide()
    # A hundred steps a second: a second ahead at least.
    assert stage.opened.step >= 240 + 100
    for _ in range(3):
        stage.accept()
        stage.problem("a", late=True)
        stage.decide()
        stage.forget_outcomes()
        stage.decide()
    assert stage.opened.step <= 240 + 2 + 0.2 * 54 * 130
