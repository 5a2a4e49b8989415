"""Exit codes: one table, and every error and end has its place in it."""

import click
import pytest

from dtrain.cli import complaint, exits
from dtrain.protocol import errors
from dtrain.protocol.errors import DtrainError, ErrorCode
from dtrain.protocol.job import JobPhase


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Refused(ErrorCode.BAD_JOB_FILE, "x"), 2),
        (errors.Refused(ErrorCode.ETCD_AUTH, "x"), 7),
        (errors.Refused(ErrorCode.PORT_IN_USE, "x"), 5),
        (errors.NotFound(ErrorCode.NOT_FOUND, "x"), 4),
        (errors.NotFound(ErrorCode.SCRIPT_NOT_FOUND, "x"), 4),
        (errors.Conflict(ErrorCode.ALREADY_EXISTS, "x"), 5),
        (errors.Conflict(ErrorCode.CONFLICT, "x"), 5),
        (errors.Unavailable(ErrorCode.COORDINATOR_UNAVAILABLE, "x"), 3),
        (errors.OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "x"), 3),
        (errors.LeadershipLost(ErrorCode.LEADERSHIP_LOST, "x"), 3),
        (errors.TimedOut(ErrorCode.WAIT_TIMED_OUT, "x"), 6),
        (errors.InvariantBroken(ErrorCode.BUG, "x"), 1),
        (DtrainError(ErrorCode.BUG, "x"), 1),
    ],
)
def test_every_error_has_its_code(error: DtrainError, code: int) -> None:
    assert exits.of_error(error) == code
    assert complaint.of(error).exit_code == code
    assert code in exits.MEANINGS


def test_every_end_of_a_job_has_its_code() -> None:
    assert exits.of_phase(JobPhase.SUCCEEDED, budget_spent=False) == 0
    assert exits.of_phase(JobPhase.FAILED, budget_spent=False) == 20
    assert exits.of_phase(JobPhase.CANCELLED, budget_spent=False) == 21
    assert exits.of_phase(JobPhase.FAILED, budget_spent=True) == 22
    with pytest.raises(ValueError, match="no end"):
        exits.of_phase(JobPhase.RUNNING, budget_spent=False)


@pytest.mark.parametrize(
    ("exit_code", "signal", "code"),
    [(3, None, 3), (93, None, 93), (-9, 9, 137), (-11, None, 139), (None, None, 20), (0, None, 20)],
)
def test_run_passes_on_the_ranks_own_code(exit_code: int | None, signal: int | None, code: int) -> None:
    assert exits.of_rank(exit_code, signal) == code


def test_usage_interruption_and_bugs_have_theirs() -> None:
    assert complaint.of(click.UsageError("x")).exit_code == 2
    assert complaint.of(click.Abort()).exit_code == 130
    assert complaint.of(BrokenPipeError()).exit_code == 0
    bug = complaint.of(ZeroDivisionError("by zero"))
    assert (bug.exit_code, bug.code) == (1, "DT-9000")
    assert "id " in bug.message
    assert "--debug" in bug.fix


def test_the_same_bug_has_the_same_id_and_another_one_has_not() -> None:
    def fail(what: str) -> str:
        try:
            if what == "a":
                raise ValueError("one text")
            raise ValueError("another text")
        except ValueError as error:
            return complaint.of(error).message.split(":")[0]

    assert fail("a") == fail("a") != fail("b")


def test_an_error_is_a_sentence_a_cause_and_a_fix() -> None:
    error = errors.Refused(ErrorCode.STORE_REFUSED, "no", cause="because", fix="do it")
    told = complaint.of(error)
    assert told.as_text() == "error[DT-2002]: no\n  cause: because\n  fix:   do it"
    assert '"code": "DT-2002"' in told.as_json()
