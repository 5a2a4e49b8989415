"""Pausing: one checkpoint that ranks hold at, whose outcome they hear only when the pause is over."""

from dataclasses import replace

import pytest
from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.pausing import HOLD_S_MAX
from dtrain.coordinator.core.queue import Place, Queue, Waiting
from dtrain.protocol.commands import AbortCheckpoint, BeginCheckpoint, ConfirmCheckpoint, Prepare, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import Condition, Intent, JobPhase, Wanted


def training(*, sdk: bool = True, store: str = "s3://b", nodes: tuple[int, int] = (2, 2)) -> Stage:
    """A job of ranks on a and b, at step 40."""
    return Stage(make_spec(store=store, nodes=nodes)).join("a", "b").run(step=40, sdk=sdk)


def want(stage: Stage, *, paused: bool = True, wanted: Wanted = Wanted.RUN) -> None:
    stage.write(KEYS.intent(JOB), Intent(stage.spec.uid, wanted, by="ann", paused=paused))


def held() -> Stage:
    stage = training()
    want(stage)
    stage.decide()
    record = stage.opened
    stage.accept()
    stage.durable()
    stage.step(record.step)
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.status.held == record.seq
    return stage


def condition(stage: Stage) -> Condition:
    return {one.type: one for one in stage.status.conditions}["Paused"]


def test_all_ranks_are_held_at_one_step_that_is_saved() -> None:
    stage = training()
    want(stage)
    stage.decide()
    assert stage.status.reason == "being paused: its ranks are held at a step together, once that is saved"
    begins = [directed.command for directed in stage.commands(BeginCheckpoint)]
    assert [begin.hold_s for begin in begins] == [HOLD_S_MAX] * 2  # type: ignore[union-attr]
    assert stage.opened.step > 40
    assert stage.opened.timeout_s == stage.spec.checkpoint.timeout_s
    stage.decide()
    assert not stage.last.writes


def test_after_the_commit_nobody_is_told_how_it_ended() -> None:
    stage = held()
    assert stage.phase is JobPhase.RUNNING
    record = stage.commits[-1]
    assert stage.status.reason == f"paused by ann at step {record.step}, with checkpoint {record.seq}"
    for _ in range(3):
        assert not stage.commands(ConfirmCheckpoint)
        stage.after(3600.0).decide()
        assert not stage.last.writes
    assert (condition(stage).status, condition(stage).reason) == ("True", "AsAsked")
    assert stage.reasons_of_events()[-3:] == [
        EventReason.USER_REQUESTED,
        EventReason.CHECKPOINT_COMMITTED,
        EventReason.PAUSED,
    ]
    assert len(stage.status.members) == 2


def test_unpaused_all_are_told_and_go_on() -> None:
    stage = held()
    want(stage, paused=False)
    stage.decide()
    assert stage.status.held == 0
    assert stage.receivers(ConfirmCheckpoint) == ["a", "b"]
    assert condition(stage).status == "False"
    assert stage.events[-1].message == "unpaused by ann"
    stage.forget_outcomes()
    stage.step(60)
    stage.decide()
    assert stage.status.reason == "training on 2 ranks"
    assert not stage.of("open")


def test_what_was_paused_for_an_hour_is_not_an_hour_ahead_when_it_is_let_go() -> None:
    stage = Stage(make_spec(store="s3://b", nodes=(2, 2), every_steps=20)).join("a", "b").run(step=40)
    want(stage)
    stage.decide()
    if stage.opened.hold_s < HOLD_S_MAX:
        stage.checkpoint()
        stage.decide()
    record = stage.opened
    stage.accept()
    stage.durable()
    stage.step(record.step)
    stage.decide()
    stage.verify()
    stage.decide()
    stage.step_rate = 25.0
    stage.after(50.0)
    want(stage, paused=False)
    stage.decide()
    assert all(one.value.step < record.step + 100 for one in stage.of("open").values())


def test_a_new_leader_holds_on_and_can_end_it() -> None:
    stage = held()
    stage.change_leader()
    stage.until_quiet()
    assert stage.status.held
    assert not stage.commands(ConfirmCheckpoint)
    want(stage, paused=False)
    stage.decide()
    assert stage.receivers(ConfirmCheckpoint) == ["a", "b"]


def test_a_pause_that_is_taken_back_before_the_commit_holds_nobody() -> None:
    stage = training()
    want(stage)
    stage.decide()
    want(stage, paused=False)
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.status.held == 0
    assert stage.receivers(ConfirmCheckpoint) == ["a", "b"]


def test_a_checkpoint_that_fails_lets_go_and_is_taken_again_after_a_rest() -> None:
    stage = training()
    want(stage)
    stage.decide()
    stage.accept()
    stage.problem("a")
    stage.decide()
    assert stage.receivers(AbortCheckpoint) == ["a", "b"]
    stage.forget_outcomes()
    stage.decide()
    assert not stage.of("open")
    stage.after(10.0).decide()
    assert stage.opened.hold_s == HOLD_S_MAX


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (training(store=""), "it cannot be paused, as it has no store to save the step in, and goes on"),
        (
            training(sdk=False),
            "it cannot be paused, as its ranks have not joined through the SDK, and goes on",
        ),
    ],
    ids=["store", "sdk"],
)
def test_what_cannot_be_saved_cannot_be_paused_and_says_so(stage: Stage, why: str) -> None:
    want(stage)
    stage.until_quiet()
    assert stage.status.reason == why
    assert not stage.of("open")


def test_a_lost_machine_ends_the_attempt_and_the_next_one_is_paused_again() -> None:
    stage = held()
    record = stage.commits[-1]
    stage.join("c")
    stage.lose("b")
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt, stage.status.held) == (JobPhase.STARTING, 2, 0)
    assert stage.status.restore is not None
    assert stage.status.restore.seq == record.seq
    assert condition(stage).status == "False"
    stage.run(step=record.step).decide()
    assert stage.opened.hold_s == HOLD_S_MAX


def test_a_drained_machine_is_left_from_the_step_they_are_held_at() -> None:
    stage = held()
    record = stage.commits[-1]
    stage.join("c")
    stage.drain("b")
    stage.decide()
    assert stage.status.restore is not None
    assert stage.status.restore.seq == record.seq
    assert f"ends at step {record.step}, with checkpoint {record.seq}" in stage.events[-2].message
    assert "a" in stage.receivers(Prepare)


def test_suspended_while_it_is_paused_it_needs_no_other_checkpoint() -> None:
    stage = held()
    record = stage.commits[-1]
    want(stage, paused=False, wanted=Wanted.SUSPEND)
    stage.decide()
    assert (stage.phase, stage.status.stopping, stage.status.held) == (JobPhase.SUSPENDING, True, 0)
    stage.decide()
    assert stage.receivers(Stop) == ["a", "b"]
    assert not stage.of("open")
    assert stage.commits[-1].seq == record.seq


def test_a_more_important_job_gets_its_machines_at_once() -> None:
    stage = held()
    big = JobName("big")
    stage.queue = Queue({JOB: Place(1, False)}, {big: Waiting(big, 10, 0.0, stage.now)}, victims={JOB: big})
    stage.decide()
    assert (stage.phase, stage.status.stopping) == (JobPhase.SUSPENDING, True)


def test_a_change_of_size_waits_until_it_goes_on() -> None:
    stage = held()
    stage.write(KEYS.intent(JOB), Intent(stage.spec.uid, by="ann", nnodes_min=1, nnodes_max=1, paused=True))
    stage.until_quiet()
    assert len(stage.status.members) == 2
    assert stage.status.held


def test_ranks_that_went_on_by_themselves_are_not_called_paused() -> None:
    stage = held()
    step = stage.commits[-1].step
    stage.step(step + 1)
    stage.decide()
    assert EventReason.UNPAUSED in stage.reasons_of_events()
    assert not stage.commands(Stop)
    assert stage.status.held == 0
    assert stage.receivers(ConfirmCheckpoint) == ["a", "b"]


def test_a_paused_job_can_be_cancelled() -> None:
    stage = held()
    want(stage, paused=False, wanted=Wanted.CANCEL)
    stage.decide()
    assert (stage.phase, stage.status.held) == (JobPhase.CANCELLING, 0)
    stage.decide()
    assert stage.receivers(Stop) == ["a", "b"]


def test_training_that_ends_is_not_held() -> None:
    stage = training()
    stage.end_training(41)
    want(stage)
    stage.decide()
    assert stage.opened.final
    assert stage.opened.hold_s == 0


def test_another_submission_of_the_name_is_not_meant() -> None:
    stage = training()
    stage.write(KEYS.intent(JOB), replace(Intent(stage.spec.uid, paused=True), uid="other"))
    stage.decide()
    assert not stage.of("open")
