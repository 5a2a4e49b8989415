"""Numbers that must stay finite: what is never committed, and what follows."""

from dataclasses import replace

import pytest
from tests.support.builders import Stage, make_spec

from dtrain.coordinator.core.nonfinite import QUIET_S, QUIET_STEPS
from dtrain.protocol.commands import AbortCheckpoint
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Seq, Step
from dtrain.protocol.job import FailureRule, JobPhase, NonFiniteAction, NonFinitePolicy, RuleAction
from dtrain.protocol.snapshot import FailureKind, RankState, SaveProblem, WorkerPhase

STORE = "memory://x"


def running(action: NonFiniteAction = NonFiniteAction.WARN, *, back: int = 1, restarts: int = 3) -> Stage:
    spec = make_spec(store=STORE, every_steps=10, keep_last=5, max_restarts=restarts)
    spec = replace(spec, nonfinite=NonFinitePolicy(action, ("loss",), back))
    return Stage(spec).join("a", "b").run()


def report(
    stage: Stage, name: str, step: int, *, now: bool = True, seen: int | None = None, **more: object
) -> None:
    """A rank of ``name`` is at ``step``; its loss is NaN, or was in step ``seen``."""

    def change(rank: RankState) -> RankState:
        names = ("loss",) if now else ()
        last = {"loss": Step(step if seen is None else seen)}
        return replace(rank, step=Step(step), nonfinite=names, nonfinite_seen=last, **more)  # type: ignore[arg-type]

    stage.report(name, WorkerPhase.TRAINING, change)


def committed(stage: Stage, *steps: int) -> None:
    for step in steps:
        stage.step(step - 2)
        stage.decide()
        stage.checkpoint()
        stage.forget_outcomes()
        stage.until_quiet()


def test_what_a_rank_calls_unfit_is_never_committed_however_durable_it_is() -> None:
    stage = running()
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.verify()
    snapshot = stage.workers[AgentName("b")].value
    problem = SaveProblem(
        Seq(1), snapshot.ranks[0].rank, False, Step(10), "loss is not finite at step 10", unfit=True
    )
    stage.put_snapshot(replace(snapshot, problems=(problem,)))
    stage.decide()
    assert stage.commits == []
    assert stage.events[-1].message.endswith("rank 1: loss is not finite at step 10")
    stage.until_quiet()
    assert {d.command.seq for d in stage.commands(AbortCheckpoint)} == {1}  # type: ignore[union-attr]


@pytest.mark.parametrize("seen", [10, None])
def test_a_step_that_a_rank_reports_as_not_finite_is_not_committed_even_if_it_sealed_it(
    seen: int | None,
) -> None:
    stage = running()
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.verify()
    report(stage, "b", 10 if seen is None else 12, now=seen is None, seen=seen)
    stage.decide()
    assert stage.commits == []


def test_a_number_that_was_not_finite_in_another_step_does_not_stand_in_the_way() -> None:
    stage = running()
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.verify()
    report(stage, "b", 14, seen=13)
    stage.decide()
    assert [commit.step for commit in stage.commits] == [10]


def test_an_unfit_checkpoint_of_an_attempt_that_is_over_is_not_settled_into_one() -> None:
    stage = running()
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.verify()
    report(stage, "b", 10)
    stage.fail("a")
    stage.decide()
    stage.until_quiet()
    assert stage.commits == []
    assert stage.status.restore is None


def test_the_last_word_of_a_machine_that_has_gone_counts() -> None:
    stage = running()
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    report(stage, "b", 10)
    stage.lose("b")
    stage.decide()
    stage.until_quiet()
    assert stage.commits == []


def test_no_checkpoint_is_opened_while_a_number_is_not_finite() -> None:
    stage = running()
    stage.step(8)
    report(stage, "b", 8)
    stage.until_quiet()
    assert "no checkpoint is taken while loss is not finite on rank 1" in stage.said
    assert not stage.of("open")
    report(stage, "b", 18, now=False, seen=8)
    stage.step(18)
    stage.until_quiet()
    assert stage.opened.step == 20


def test_a_warning_comes_once_for_each_time_that_it_lasts() -> None:
    stage = running()
    for step in (3, 4, 5):
        report(stage, "b", step)
        stage.until_quiet()
    assert stage.reasons_of_events().count(EventReason.NON_FINITE) == 1
    told = next(one for one in stage.status.conditions if one.type == "NonFinite")
    assert (told.status, "rank 1" in told.message) == ("True", True)
    assert stage.phase is JobPhase.RUNNING
    stage.after(QUIET_S + 1)
    stage.step(6 + QUIET_STEPS)
    report(stage, "b", 6 + QUIET_STEPS, now=False, seen=5)
    stage.until_quiet()
    told = next(one for one in stage.status.conditions if one.type == "NonFinite")
    assert told.status == "False"
    assert stage.events[-1].message == "all numbers have been finite since step 5"
    events = len(stage.events)
    stage.change_leader()
    stage.until_quiet()
    assert EventReason.NON_FINITE not in stage.reasons_of_events()[events:]
    report(stage, "b", 90)
    stage.until_quiet()
    assert stage.events[-1].reason is EventReason.NON_FINITE
    assert "at step 90" in stage.events[-1].message


def test_other_numbers_may_be_whatever_they_are() -> None:
    stage = running(NonFiniteAction.FAIL)
    stage.report(
        "a", WorkerPhase.TRAINING, lambda r: replace(r, nonfinite=("norm",), nonfinite_seen={"norm": Step(1)})
    )
    stage.until_quiet()
    assert stage.phase is JobPhase.RUNNING
    assert EventReason.NON_FINITE not in stage.reasons_of_events()


def test_a_single_step_is_enough_to_go_back_two_checkpoints() -> None:
    stage = running(NonFiniteAction.ROLLBACK, back=2)
    committed(stage, 10, 20, 30)
    report(stage, "b", 33, now=False, seen=31)
    stage.until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.passed_over == (2, 3)
    assert stage.status.restore is not None
    assert stage.status.restore.step == 10
    assert stage.status.failure is not None
    assert (stage.status.failure.kind, stage.status.failure.rank) == (FailureKind.NONFINITE, 1)
    assert len(stage.status.restarts) == 1
    assert EventReason.ROLLED_BACK in stage.reasons_of_events()
    # A later failure of another kind begins from no checkpoint that was passed over either.
    stage.run(step=11)
    stage.fail("a")
    stage.until_quiet()
    assert stage.status.restore.step == 10


def test_nothing_is_rolled_back_while_a_coordinator_could_not_read_why() -> None:
    stage = running(NonFiniteAction.ROLLBACK)
    committed(stage, 10, 20)
    stage.withheld = "coordinator c1 runs dtrain 0.1.0"
    report(stage, "b", 22)
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)
    stage.withheld = ""
    stage.decide()
    assert (stage.status.attempt, stage.status.passed_over) == (2, (2,))


def test_with_no_checkpoint_left_training_begins_anew() -> None:
    stage = running(NonFiniteAction.ROLLBACK, back=2)
    committed(stage, 10)
    report(stage, "a", 12)
    stage.until_quiet()
    assert stage.status.restore is None
    assert "from scratch" in stage.status.reason


def test_rolling_back_again_and_again_spends_the_budget_whatever_is_committed_between() -> None:
    stage = running(NonFiniteAction.ROLLBACK, restarts=2)
    committed(stage, 10, 20)
    for attempt in (2, 3):
        report(stage, "a", 25)
        stage.until_quiet()
        assert stage.status.attempt == attempt
        assert stage.status.restore is not None
        base = stage.status.restore.step
        stage.run(step=base)
        committed(stage, base + 10, base + 20)
    report(stage, "a", 45)
    stage.until_quiet()
    assert stage.phase is JobPhase.FAILED
    assert "budget of 2 restarts is spent" in stage.status.reason


def test_a_job_may_fail_at_once() -> None:
    stage = running(NonFiniteAction.FAIL)
    committed(stage, 10)
    report(stage, "b", 12)
    stage.until_quiet()
    assert stage.phase is JobPhase.FAILED
    assert stage.status.reason == "rank 1 on b: loss is not finite at step 12"
    assert [commit.step for commit in stage.commits] == [10]


def test_a_rule_about_it_counts_for_more_than_a_mere_warning() -> None:
    stage = running()
    rule = FailureRule(RuleAction.ROLLBACK, ("nonfinite",), message="loss", back=1)
    other = FailureRule(RuleAction.FAIL, (), message="loss")
    for rules, phase in (((other,), JobPhase.RUNNING), ((rule, other), JobPhase.STARTING)):
        stage = Stage(replace(stage.spec, failure_rules=rules)).join("a", "b").run()
        committed(stage, 10, 20)
        report(stage, "b", 22)
        stage.until_quiet()
        assert stage.phase is phase
    assert stage.status.passed_over == (2,)


def test_a_script_that_ends_because_of_it_is_rolled_back_all_the_same() -> None:
    stage = running(NonFiniteAction.ROLLBACK)
    committed(stage, 10, 20)
    report(stage, "b", 22)
    stage.fail("b")
    stage.decide()
    assert stage.status.failure is not None
    assert stage.status.failure.kind is FailureKind.NONFINITE
    assert stage.status.restore is not None
    assert stage.status.restore.step == 10


def test_training_that_ends_so_has_no_checkpoint_of_its_end_and_ends_with_the_reason() -> None:
    stage = running()
    committed(stage, 10)
    report(stage, "a", 15, last_step=Step(15))
    report(stage, "b", 15, now=False, seen=3, last_step=Step(15))
    stage.until_quiet()
    assert not stage.of("open")
    assert {d.command.final for d in stage.commands(AbortCheckpoint)} == {True}  # type: ignore[union-attr]
    stage.exit_all()
    stage.until_quiet()
    assert stage.phase is JobPhase.SUCCEEDED
    assert stage.status.reason == (
        "training ended; there is no checkpoint of its end, as loss is not finite on rank 0"
    )


def test_a_last_checkpoint_that_turns_out_unfit_is_not_tried_again() -> None:
    stage = running()
    stage.end_training(15)
    stage.decide()
    stage.accept()
    report(stage, "b", 15, last_step=Step(15))
    stage.until_quiet()
    assert not stage.of("open")
    assert stage.commits == []
    assert True in {d.command.final for d in stage.commands(AbortCheckpoint)}  # type: ignore[union-attr]
