"""What a leader does after etcd was restored from a backup: numbers, attempts, jobs that were forgotten."""

import copy
from dataclasses import replace
from typing import Any

from tests.support.builders import JOB, Stage, make_spec

from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.restored import SEQS_AHEAD_MAX, UNKNOWN
from dtrain.coordinator.core.views import JobView, Moment
from dtrain.protocol.commands import BeginCheckpoint, Prepare, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, Seq, Uid
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import WorkerPhase

SAVING = make_spec(store="s3://b", every_steps=10)


def backup(stage: Stage) -> dict[str, Any]:
    return copy.deepcopy(stage.cells)


def restore(stage: Stage, saved: dict[str, Any]) -> Stage:
    """etcd holds again what it held then; agents go on, and another leader takes office."""
    stage.cells = copy.deepcopy(saved)
    stage.revision += 1_000_000_000
    stage.change_leader()
    stage.join(*stage.agents)
    return stage


def running(*, step: int = 8) -> Stage:
    return Stage(SAVING).join("a", "b").run(step=step)


def over(stage: Stage, seq: int) -> None:
    """All agents know that the numbers up to this one are over."""
    for stored in list(stage.workers.values()):
        stage.put_snapshot(replace(stored.value, seq_over=Seq(seq), saving=(), durable=(), problems=()))


# Checkpoint numbers


def test_numbers_go_on_above_the_highest_that_an_agent_has_heard_of() -> None:
    stage = running()
    saved = backup(stage)
    over(stage, 5)
    restore(stage, saved)
    stage.decide()
    assert (stage.status.seq_last, stage.status.unknown_from, stage.status.unknown_to) == (6, 1, 5)
    assert stage.opened.seq == 6, "it goes on at once"
    assert stage.receivers(BeginCheckpoint) == ["a", "b"]
    event = next(event for event in stage.events if event.reason is EventReason.ETCD_RESTORED)
    assert "1 to 5" in event.message
    assert stage.checkpoint().seq == 6
    assert stage.phase is JobPhase.RUNNING
    assert stage.status.attempt == 1


def test_a_checkpoint_that_is_open_again_is_given_up_at_once() -> None:
    stage = running()
    stage.decide()
    saved = backup(stage)
    first = stage.opened.seq
    stage.checkpoint()
    over(stage, 4)
    restore(stage, saved)
    stage.decide()  # the open record is taken over
    stage.decide()
    assert not stage.of("open"), "nobody can complete it: its time is not waited for"
    assert (stage.status.unknown_from, stage.status.unknown_to) == (first, 4)
    stage.until_quiet()
    assert stage.opened.seq == 5
    assert not stage.status.failed_saves


def test_a_number_that_an_agent_still_saves_is_not_given_out_again() -> None:
    stage = running()
    saved = backup(stage)
    for stored in list(stage.workers.values()):
        stage.put_snapshot(replace(stored.value, saving=(Seq(3),)))
    restore(stage, saved)
    stage.decide()
    assert stage.opened.seq == 4


def test_numbers_of_manifests_that_only_the_store_knows_are_passed_over() -> None:
    stage = running()
    stage.decide()
    view = replace(stage.view(), unknown=(Seq(7), Seq(9)))
    decision = plan(view, stage.fleet(), Moment(stage.now, stage.now, "0" * 16))
    stage._apply(decision)
    assert (stage.status.seq_last, stage.status.unknown_from, stage.status.unknown_to) == (9, 7, 9)
    assert stage.opened.seq == 1, "what is under way goes on"


def test_an_agent_that_lies_cannot_use_up_the_numbers() -> None:
    stage = running()
    over(stage, SEQS_AHEAD_MAX + 5)
    stage.decide()
    assert stage.opened.seq == 1


def test_no_number_is_passed_over_while_etcd_forgets_nothing() -> None:
    stage = running()
    for step in (8, 18, 28):
        stage.step(step)
        stage.until_quiet()
        stage.checkpoint()
        over(stage, stage.status.seq_last)
    stage.decide()
    assert stage.status.unknown_to == 0
    assert EventReason.ETCD_RESTORED not in stage.reasons_of_events()


# Attempts


def forgotten_attempt() -> tuple[Stage, dict[str, Any]]:
    """A job in its second attempt, and a backup from its first."""
    stage = running()
    saved = backup(stage)
    stage.fail("a")
    stage.decide()
    stage.run(step=12)
    assert stage.status.attempt == 2
    return stage, saved


def test_an_attempt_that_etcd_has_forgotten_and_that_trains_goes_on() -> None:
    stage, saved = forgotten_attempt()
    restore(stage, saved)
    assert stage.status.attempt == 1
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 2)
    assert [member.agent for member in stage.status.members] == ["a", "b"]
    assert not stage.commands(Stop)
    assert not stage.commands(Prepare)
    stage.step(18)
    stage.until_quiet()
    assert stage.checkpoint().attempt == 2


def test_the_other_ranks_of_a_forgotten_attempt_are_waited_for() -> None:
    stage, saved = forgotten_attempt()
    missing = stage.workers.pop(AgentName("b"))
    restore(stage, saved)
    decision = stage.decide()
    decision = stage.decide()
    assert not decision.writes
    assert not decision.commands
    assert decision.wake_at is not None
    stage.workers[AgentName("b")] = replace(missing, seen_at=stage.now)
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 2)


def test_a_leader_that_stayed_in_office_waits_for_all_ranks_of_a_forgotten_attempt_as_well() -> None:
    stage, saved = forgotten_attempt()
    stage.after(1000.0)
    stage.cells = copy.deepcopy(saved)
    for cell in stage.cells.values():
        cell.seen_at = stage.now
    missing = stage.workers.pop(AgentName("b"))
    decision = stage.decide()
    assert not decision.commands
    stage.workers[AgentName("b")] = replace(missing, seen_at=stage.now)
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 2)


def test_a_forgotten_attempt_that_is_not_whole_is_ended_by_one_with_a_higher_number() -> None:
    stage, saved = forgotten_attempt()
    stage.lose("b")
    restore(stage, saved)
    stage.join("c")
    stage.decide()
    stage.after(stage.agent_ttl_s + 0.1)
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 3)
    assert sorted(stage.receivers(Prepare)) == ["a", "c"]
    assert not stage.status.restarts, "it costs no restart"


def test_a_straggler_of_a_forgotten_attempt_does_not_disturb_the_one_that_runs() -> None:
    stage = running()
    stage.join("z")
    late = replace(stage.workers[AgentName("a")].value, agent=AgentName("z"), attempt=Attempt(7))
    stage.put_snapshot(late)
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)
    [order] = stage.commands(Stop)
    assert (order.agent, order.command.header.attempt) == ("z", 7)


def test_a_job_that_was_not_placed_yet_when_the_backup_was_taken_goes_on() -> None:
    stage = Stage(make_spec()).join("a", "b")
    saved = backup(stage)
    stage.run()
    restore(stage, saved)
    decision = stage.decide()
    assert not decision.commands, "it trains already"
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


# Jobs and submissions


def test_ranks_of_a_job_that_etcd_does_not_know_are_ended_in_order() -> None:
    stage = running()
    view = JobView(JOB, workers=dict(stage.workers))
    decision = plan(view, stage.fleet(), Moment(stage.now, stage.now, "0" * 16))
    assert not decision.writes
    assert [directed.agent for directed in decision.commands] == ["a", "b"]
    for directed in decision.commands:
        order = directed.command
        assert isinstance(order, Stop)
        assert order.release
        assert order.grace_s > 0
        assert (order.header.uid, order.header.attempt) == ("u1", 1)
        assert order.header.id.startswith(UNKNOWN)
    assert "no job of this name" in decision.reasons[0].text


def test_a_later_submission_that_etcd_does_not_know_is_ended_before_the_known_one_goes_on() -> None:
    stage, saved = forgotten_attempt()
    for stored in list(stage.workers.values()):
        stage.put_snapshot(replace(stored.value, uid=Uid("u2")))
    restore(stage, saved)
    stage.decide()
    stage.decide()
    orders = stage.commands(Stop)
    assert [order.agent for order in orders] == ["a", "b"]
    assert all(order.command.header.uid == "u2" for order in orders)
    assert not stage.commands(Prepare)
    stage.workers.clear()
    stage.after(2 * stage.agent_ttl_s)
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)


def test_a_job_that_is_over_releases_a_later_attempt_that_etcd_does_not_know() -> None:
    stage = Stage(make_spec()).join("a", "b").run()
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED
    stage.put_snapshot(
        replace(stage.workers[AgentName("a")].value, attempt=Attempt(4), phase=WorkerPhase.TRAINING)
    )
    stage.decide()
    [order] = [order for order in stage.commands(Stop) if order.agent == "a"]
    assert order.command.header.attempt == 4
