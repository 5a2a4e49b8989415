"""What follows from a failure: the job's rules in order, those of every job after them."""

from dataclasses import replace

import pytest
from tests.support.builders import EPOCH, JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core import rules
from dtrain.protocol.checkpoint import CommitRecord, Latest
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.commands import Prepare
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import FailureRule, JobPhase, RuleAction
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

A, B = AgentName("a"), AgentName("b")


def failure(kind: FailureKind = FailureKind.EXCEPTION, **fields: object) -> Failure:
    return Failure(kind, "ValueError: bad batch", agent=B, rank=Rank(1), **fields)  # type: ignore[arg-type]


def started(*rules: FailureRule, machines: str = "ab", **spec: object) -> Stage:
    spec = {"store": "memory://x", **spec}
    made = replace(make_spec(**spec), failure_rules=rules)  # type: ignore[arg-type]
    return Stage(made).join(*machines).run()


def fails(stage: Stage, name: str, **fields: object) -> None:
    values = {"kind": FailureKind.EXCEPTION, "fingerprint": "f1", "step": Step(7)} | fields
    kind = values.pop("kind")
    member = stage.member(name)
    told = replace(failure(kind), agent=AgentName(name), rank=member.first_rank, **values)  # type: ignore[arg-type]
    stage.report(name, WorkerPhase.ERROR, failure=told)
    stage.decide()


def commit(stage: Stage, seq: int, attempt: int) -> None:
    record = CommitRecord(
        Term(5), Uid("u1"), Seq(seq), Step(seq), Attempt(attempt), "n", 2, 1, f"m{seq}", 1, "d", None, False
    )
    stage.write(KEYS.checkpoint(JOB, Seq(seq)), record)
    stage.write(KEYS.latest(JOB), Latest(Term(5), Seq(seq), Step(seq)))
    stage.write(KEYS.status(JOB), replace(stage.status, seq_last=Seq(seq)))


# Fitting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (FailureRule(RuleAction.FAIL), True),
        (FailureRule(RuleAction.FAIL, reasons=("exception",)), True),
        (FailureRule(RuleAction.FAIL, reasons=("signal", "node-lost")), False),
        (FailureRule(RuleAction.FAIL, exit_codes=(1, 3)), True),
        (FailureRule(RuleAction.FAIL, exit_codes=(2,)), False),
        (FailureRule(RuleAction.FAIL, signals=(9,)), False),
        (FailureRule(RuleAction.FAIL, message="bad b.tch"), True),
        (FailureRule(RuleAction.FAIL, message="^in the log$"), True),
        (FailureRule(RuleAction.FAIL, message="nowhere"), False),
        (FailureRule(RuleAction.FAIL, reasons=("exception",), message="nowhere"), False),
    ],
)
def test_a_rule_fits_if_all_it_names_is_true(rule: FailureRule, fits: bool) -> None:
    assert rules.fits(rule, failure(exit_code=3, log_tail="first\nin the log\n")) is fits


def test_an_error_of_the_script_is_a_reason_of_its_own() -> None:
    rule = FailureRule(RuleAction.RESTART, reasons=("user-error",))
    assert not rules.fits(rule, failure())
    assert rules.fits(rule, failure(), users=True)


# Actions ---------------------------------------------------------------------------------


def test_the_first_rule_that_fits_wins() -> None:
    free = FailureRule(RuleAction.RESTART_FREE, reasons=("exception",))
    stage = started(free, FailureRule(RuleAction.FAIL))
    fails(stage, "b")
    assert (stage.phase, stage.status.attempt, stage.status.restarts) == (JobPhase.STARTING, 2, ())
    assert "failure rule 1 of the job says restart-free" in stage.events[-2].message


def test_a_rule_can_end_the_job() -> None:
    stage = started(FailureRule(RuleAction.FAIL, message="bad batch"))
    fails(stage, "b")
    assert stage.phase is JobPhase.FAILED
    assert stage.status.reason == "rank 1 on b: ValueError: bad batch; failure rule 1 of the job says fail"


def test_a_rule_can_allow_what_is_forbidden_to_all_others() -> None:
    stage = started(FailureRule(RuleAction.RESTART, exit_codes=(93,)))
    fails(stage, "b", kind=FailureKind.EXIT, exit_code=93)
    assert stage.phase is JobPhase.STARTING
    assert len(stage.status.restarts) == 1


def test_elsewhere_means_without_that_machine_if_there_is_another_one() -> None:
    stage = started(FailureRule(RuleAction.ELSEWHERE), machines="abc")
    fails(stage, "b")
    assert [member.agent for member in stage.status.members] == ["a", "c"]
    assert len(stage.status.restarts) == 1


def test_elsewhere_is_where_it_was_if_nothing_else_is_there() -> None:
    stage = started(FailureRule(RuleAction.ELSEWHERE))
    fails(stage, "b")
    assert stage.receivers(Prepare) == ["a", "b"]


def test_elsewhere_outlives_the_wait_for_the_next_attempt() -> None:
    stage = started(FailureRule(RuleAction.ELSEWHERE), machines="abc", max_restarts=9)
    stage.write(KEYS.status(JOB), replace(stage.status, fruitless=5))
    fails(stage, "b")
    assert stage.phase is JobPhase.RECOVERING
    stage.after(30.0).decide()
    assert [member.agent for member in stage.status.members] == ["a", "c"]


def test_elsewhere_is_said_of_the_attempt_that_failed_and_of_no_later_one() -> None:
    stage = started(FailureRule(RuleAction.ELSEWHERE), machines="abc")
    fails(stage, "b")
    stage.run().join("d")
    del stage.workers[B]
    stage.drain("c")
    stage.decide()
    assert [member.agent for member in stage.status.members] == ["a", "b"]


def test_what_was_being_saved_is_no_way_around_a_rollback() -> None:
    stage = started(FailureRule(RuleAction.ROLLBACK), every_steps=10)
    for seq in (1, 2):
        commit(stage, seq, 1)
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.verify()
    fails(stage, "b")
    assert stage.status.restore is not None
    assert stage.status.restore.seq == 1
    assert not stage.of("open")


def test_rollback_begins_from_an_older_checkpoint() -> None:
    stage = started(FailureRule(RuleAction.ROLLBACK, back=2))
    for seq in (1, 2, 3, 4):
        commit(stage, seq, 1)
    fails(stage, "b")
    assert stage.status.restore is not None
    assert stage.status.restore.seq == 2
    assert stage.status.passed_over == (3, 4)
    assert EventReason.ROLLED_BACK in stage.reasons_of_events()


def test_what_was_rolled_back_past_gives_no_restart_back() -> None:
    stage = started(FailureRule(RuleAction.ROLLBACK), max_restarts=2)
    commit(stage, 1, 1)
    for seq in (2, 3):
        commit(stage, seq, stage.status.attempt)
        fails(stage, "b", fingerprint="")
        assert stage.status.passed_over[-1] == seq
        stage.run()
    assert len(stage.status.restarts) == 2


def test_a_rule_can_keep_the_machine_free_for_a_while() -> None:
    stage = started(FailureRule(RuleAction.RESTART, cordon_s=600.0), machines="abc")
    fails(stage, "b")
    cordon = stage.cells[KEYS.cordon(B)].value
    assert isinstance(cordon, Cordon)
    assert cordon.auto
    assert [member.agent for member in stage.status.members] == ["a", "c"]
    (write,) = [write for write in stage.last.writes if write.key == KEYS.cordon(B)]
    assert write.lease_ttl_s == 600.0  # type: ignore[union-attr]


# Errors of the script ---------------------------------------------------------------------


def test_the_same_error_at_the_same_step_on_another_machine_is_the_scripts() -> None:
    stage = started(max_restarts=9)
    fails(stage, "b")
    assert stage.phase is JobPhase.STARTING
    stage.run()
    fails(stage, "a")
    assert stage.phase is JobPhase.FAILED
    assert "the same error came at the same step on b in attempt 1" in stage.status.reason
    assert EventReason.USER_ERROR in stage.reasons_of_events()


@pytest.mark.parametrize("other", [{"step": Step(8)}, {"fingerprint": "f2"}, {"fingerprint": ""}])
def test_another_step_or_error_says_nothing(other: dict[str, object]) -> None:
    stage = started(max_restarts=9)
    fails(stage, "b")
    stage.run()
    fails(stage, "a", **other)
    assert stage.phase is JobPhase.STARTING


def test_all_ranks_failing_at_once_prove_nothing_yet() -> None:
    stage = started(max_restarts=9)
    told = failure(fingerprint="f1", step=Step(7))
    stage.report("a", WorkerPhase.ERROR, failure=replace(told, agent=A, rank=Rank(0)))
    fails(stage, "b")
    assert stage.phase is JobPhase.STARTING
    assert stage.status.failure is not None
    assert stage.status.failure.also == ("rank 1 on b: ValueError: bad batch",)
    stage.run()
    fails(stage, "b")
    assert stage.phase is JobPhase.FAILED


def test_the_second_time_on_one_machine_another_one_is_tried() -> None:
    stage = started(machines="abc", max_restarts=9)
    fails(stage, "b")
    assert [member.agent for member in stage.status.members] == ["a", "b"]
    stage.run()
    fails(stage, "b")
    assert [member.agent for member in stage.status.members] == ["a", "c"]
    stage.run()
    fails(stage, "c")
    assert stage.phase is JobPhase.FAILED


def test_the_third_time_on_the_only_machine_is_enough() -> None:
    stage = started(nodes=(1, 1), machines="a", max_restarts=9)
    for attempt in (1, 2, 3):
        assert stage.status.attempt == attempt
        fails(stage, "a")
        if attempt < 3:
            stage.after(60.0).run()
    assert stage.phase is JobPhase.FAILED
    assert "3 times on a" in stage.status.reason


def test_a_commit_since_then_takes_the_mark_back() -> None:
    stage = started(max_restarts=9)
    fails(stage, "b")
    stage.run()
    commit(stage, 1, 2)
    fails(stage, "a")
    assert stage.phase is JobPhase.STARTING


def test_marks_are_bounded() -> None:
    stage = started(max_restarts=99)
    for number in range(30):
        fails(stage, "b", fingerprint=f"f{number}")
        stage.after(60.0).run()
    assert len(stage.status.marks) == rules.MARKS_KEPT
    assert stage.status.restarts[-1] > EPOCH


def test_what_no_machine_can_do_ends_the_job_whatever_its_rules_say_and_blames_nobody() -> None:
    stage = started(FailureRule(RuleAction.RESTART_FREE))
    fails(stage, "b", kind=FailureKind.PREPARE, hopeless=True)
    assert stage.status.phase is JobPhase.FAILED
    assert EventReason.PACKAGE_UNUSABLE in stage.reasons_of_events()
    assert KEYS.suspicion(B) not in stage.cells
