"""The end of training: a checkpoint like any other, and then success."""

from dataclasses import replace

import pytest
from tests.support.builders import Stage, make_spec

from dtrain.coordinator.core.decisions import SweepOrphans
from dtrain.protocol.commands import AbortCheckpoint, BeginCheckpoint, ConfirmCheckpoint, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Step
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import CommandOutcome, WorkerPhase


def running(**spec: object) -> Stage:
    spec = {"store": "s3://b", **spec}
    return Stage(make_spec(**spec)).join("a", "b").run()  # type: ignore[arg-type]


def told(stage: Stage, kind: type) -> list[tuple[str, bool]]:
    return [(directed.agent, directed.command.final) for directed in stage.commands(kind)]  # type: ignore[union-attr]


def test_end_of_training_is_checkpointed_before_ranks_may_exit() -> None:
    stage = running()
    stage.report("a", WorkerPhase.TRAINING, lambda r: replace(r, step=Step(50), last_step=Step(50)))
    stage.report("b", WorkerPhase.TRAINING, lambda r: replace(r, step=Step(49)))
    stage.decide()
    assert not stage.of("open")
    stage.end_training(50)
    stage.decide()
    assert (stage.opened.step, stage.opened.final) == (50, True)
    assert stage.receivers(BeginCheckpoint) == ["a", "b"]
    stage.durable()
    stage.decide()
    assert not stage.commands(ConfirmCheckpoint)
    stage.verify()
    stage.decide()
    assert [(d.agent, d.command.final) for d in stage.commands(ConfirmCheckpoint)] == [
        ("a", True),
        ("b", True),
    ]
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED
    assert stage.commits[-1].final
    assert stage.status.step == 50
    assert EventReason.JOB_SUCCEEDED in stage.reasons_of_events()


def test_final_outcome_is_repeated_to_an_agent_that_lost_it() -> None:
    stage = running()
    stage.end_training(50)
    stage.decide()
    stage.checkpoint()
    stage.decide()
    assert [(d.agent, d.command.final) for d in stage.commands(ConfirmCheckpoint)] == [
        ("a", True),
        ("b", True),
    ]
    command_id = stage.commands(ConfirmCheckpoint)[0].command.header.id
    stage.report("a", WorkerPhase.TRAINING, command=CommandOutcome(command_id, "ConfirmCheckpoint", True))
    stage.decide()
    assert stage.receivers(ConfirmCheckpoint) == ["b"]


def test_ranks_are_let_go_after_three_failed_tries() -> None:
    stage = running()
    stage.end_training(50)
    for _ in range(3):
        stage.after(60.0).decide()
        assert stage.opened.final
        stage.accept()
        stage.problem("b")
        stage.decide()
        if stage.status.final_tries < 3:
            assert not any(d.command.final for d in stage.commands(AbortCheckpoint))
        stage.forget_outcomes()
    stage.after(60.0).decide()
    assert not stage.of("open")
    assert told(stage, AbortCheckpoint) == [("a", True), ("b", True)]
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED
    assert "failed too often" in stage.status.reason


def test_rank_that_exited_without_waiting_lets_the_others_go() -> None:
    stage = running()
    stage.report("a", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.report("b", WorkerPhase.TRAINING, lambda r: replace(r, step=Step(5), last_step=Step(5)))
    stage.decide()
    assert not stage.of("open")
    assert told(stage, AbortCheckpoint) == [("b", True)]


def test_periodic_checkpoint_beyond_the_end_gives_way_to_the_final_one() -> None:
    stage = running(every_steps=10)
    stage.step(8)
    stage.decide()
    assert stage.opened.step == 10
    stage.accept()
    stage.end_training(9)
    stage.until_quiet()
    assert (stage.opened.step, stage.opened.final) == (9, True)


def test_periodic_checkpoint_of_the_last_step_is_the_final_one() -> None:
    stage = running(every_steps=10)
    stage.step(8)
    stage.decide()
    assert (stage.opened.step, stage.opened.final) == (10, False)
    stage.accept()
    stage.end_training(10)
    stage.decide()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert [(commit.step, commit.final) for commit in stage.commits] == [(10, True)]
    assert told(stage, ConfirmCheckpoint) == [("a", True), ("b", True)]
    stage.exit_all()
    stage.until_quiet()
    assert stage.phase is JobPhase.SUCCEEDED
    assert len(stage.commits) == 1


def test_ranks_that_end_at_different_steps_are_a_failure() -> None:
    stage = running()
    stage.report("a", WorkerPhase.TRAINING, lambda r: replace(r, last_step=Step(50)))
    stage.report("b", WorkerPhase.TRAINING, lambda r: replace(r, last_step=Step(51)))
    stage.decide()
    assert stage.status.attempt == 2
    assert len(stage.status.restarts) == 1
    assert stage.status.failure is not None
    assert "different steps: 50, 51" in stage.status.failure.message


@pytest.mark.parametrize("store", ["", "s3://b"])
def test_plain_script_succeeds_when_all_ranks_exit_with_zero(store: str) -> None:
    stage = Stage(make_spec(store=store)).join("a", "b").run(sdk=False)
    stage.report("a", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    stage.report("b", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED


def test_script_that_ends_before_it_counts_as_running_succeeds_too() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(WorkerPhase.READY)
    stage.decide()
    stage.everyone(WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.until_quiet()
    assert stage.history == [JobPhase.STARTING, JobPhase.RUNNING, JobPhase.SUCCEEDED]


def test_finished_job_releases_agents_sweeps_once_and_then_rests() -> None:
    stage = running()
    stage.exit_all()
    stage.decide()
    stage.decide()
    assert [(d.agent, d.command.release) for d in stage.commands(Stop)] == [("a", True), ("b", True)]
    assert not stage.work(SweepOrphans)
    stage.workers.clear()
    stage.decide()
    assert stage.work(SweepOrphans)
    stage.after(1.0).swept_at = stage.now
    stage.until_quiet()
    assert not stage.last.work
    assert stage.last.wake_at is None
    stage.change_leader()
    stage.until_quiet()
    assert not stage.last.work
    assert stage.last.wake_at is None


def test_terminal_job_ignores_whatever_agents_say() -> None:
    stage = running()
    stage.exit_all()
    stage.decide()
    stage.fail("a")
    stage.lose("b")
    stage.after(100.0).until_quiet()
    assert stage.phase is JobPhase.SUCCEEDED
    assert stage.status.attempt == 1
    assert AgentName("a") in stage.receivers(Stop)


def test_without_a_store_nobody_waits_at_the_end() -> None:
    stage = running(store="")
    stage.end_training(50)
    stage.decide()
    assert told(stage, AbortCheckpoint) == [("a", True), ("b", True)]
