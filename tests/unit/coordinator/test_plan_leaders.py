"""Changes of leader, and states that a leader must leave alone."""

from dataclasses import replace

import pytest
from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core import plan as planning
from dtrain.coordinator.core.plan import TRANSITIONS, plan
from dtrain.coordinator.core.views import JobView, Moment
from dtrain.protocol.errors import InvariantBroken
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Term
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase

MOMENT = Moment(1000.0, 2000.0, "0" * 16)


def test_new_leader_takes_a_running_job_over_without_touching_it() -> None:
    stage = Stage().join("a", "b").run()
    stage.change_leader()
    stage.decide()
    assert (stage.phase, stage.status.attempt, stage.status.term) == (JobPhase.RUNNING, 1, stage.term)
    assert stage.reasons_of_events()[-1] is EventReason.LEADER_CHANGED
    assert not stage.commands()
    assert not stage.decide().writes


def test_finished_and_queued_jobs_are_not_rewritten_by_a_new_leader() -> None:
    stage = Stage()
    stage.decide()
    stage.change_leader()
    assert not stage.decide().writes


def test_open_checkpoint_is_rewritten_under_the_new_term_and_then_committed() -> None:
    stage = Stage(make_spec(store="s3://b", every_steps=10)).join("a", "b").run(step=8)
    stage.decide()
    stage.durable()
    stage.change_leader()
    stage.verify()
    stage.decide()
    assert stage.opened.term == stage.term
    assert not stage.commits
    stage.decide()
    assert stage.commits[0].term == stage.term


def test_leader_of_an_older_term_decides_nothing() -> None:
    stage = Stage().join("a", "b").run()
    stage.term = Term(1)
    decision = stage.decide()
    assert not decision.writes
    assert not decision.commands


def test_quarantined_job_is_left_alone() -> None:
    stage = Stage().join("a", "b")
    decision = plan(replace(stage.view(), quarantined="plan crashed"), stage.fleet(), MOMENT)
    assert not decision.writes
    assert decision.reasons[0].text == "left alone: plan crashed"


def test_nothing_is_decided_without_a_job_file() -> None:
    stage = Stage()
    assert not plan(JobView(JOB), stage.fleet(), MOMENT).writes


def test_job_file_replaced_while_running_stops_the_old_job_first() -> None:
    stage = Stage().join("a", "b").run()
    stage.write(KEYS.spec(JOB), make_spec(uid="u2"))
    stage.decide()
    assert stage.phase is JobPhase.CANCELLING
    assert stage.status.uid == "u1"
    stage.workers.clear()
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
    stage.until_quiet()
    assert stage.status.uid == "u2"


def test_terminal_phases_have_no_way_out() -> None:
    assert set(TRANSITIONS) == {None, *JobPhase}
    assert all(not TRANSITIONS[phase] for phase in TERMINAL_PHASES)
    reachable: set[JobPhase] = set().union(*TRANSITIONS.values())
    assert reachable == set(JobPhase)


def test_decision_outside_the_phase_diagram_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage().join("a", "b").run()
    monkeypatch.setattr(planning.phases, "running", lambda draft: draft.set(phase=JobPhase.QUEUED))
    with pytest.raises(InvariantBroken, match="may not go from"):
        stage.decide()
