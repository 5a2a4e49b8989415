"""Exit codes: what a script can rely on, in one table.

Codes are public interface and never change their meaning. ``run`` alone passes
on the code of the failing rank instead.
"""

from dtrain.protocol.errors import (
    Conflict,
    DtrainError,
    ErrorCode,
    InvariantBroken,
    LeadershipLost,
    NotFound,
    OutcomeUnknown,
    Refused,
    TimedOut,
    Unavailable,
)
from dtrain.protocol.phases import JobPhase

OK = 0
BUG = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
CONFLICT = 5
TIMED_OUT = 6
NOT_ALLOWED = 7
CHECK_FAILED = 8
JOB_FAILED = 20
JOB_CANCELLED = 21
BUDGET_SPENT = 22
INTERRUPTED = 130
TERMINATED = 143

MEANINGS = {
    OK: "done; the job SUCCEEDED",
    BUG: "a bug in dtrain; the message has an id",
    USAGE: "wrong usage, or an invalid job file",
    UNREACHABLE: "cluster or store cannot be reached; trying again makes sense",
    NOT_FOUND: "there is no such thing",
    CONFLICT: "conflict, failed precondition, or it exists already",
    TIMED_OUT: "timed out waiting",
    NOT_ALLOWED: "not allowed, or not authenticated",
    CHECK_FAILED: "a check failed",
    JOB_FAILED: "the job FAILED",
    JOB_CANCELLED: "the job was CANCELLED",
    BUDGET_SPENT: "the job FAILED: its restart budget is spent",
    INTERRUPTED: "interrupted; a submitted job runs on",
    TERMINATED: "terminated; a submitted job runs on",
}

# By code first, where it says more than the class does.
_BY_CODE = {
    ErrorCode.ETCD_AUTH: NOT_ALLOWED,
    ErrorCode.NOT_A_TEST_CLUSTER: NOT_ALLOWED,
    ErrorCode.NOT_PERMITTED: NOT_ALLOWED,
    ErrorCode.ALREADY_EXISTS: CONFLICT,
    ErrorCode.AGENT_NAME_TAKEN: CONFLICT,
    ErrorCode.PORT_IN_USE: CONFLICT,
    ErrorCode.CONFLICT: CONFLICT,
    ErrorCode.NOT_FOUND: NOT_FOUND,
    ErrorCode.BLOB_CORRUPT: CHECK_FAILED,
    ErrorCode.LOCAL_IO: USAGE,
    ErrorCode.BUG: BUG,
}
_BY_CLASS: tuple[tuple[type[DtrainError], int], ...] = (
    (NotFound, NOT_FOUND),
    (Refused, USAGE),
    (Conflict, CONFLICT),
    (TimedOut, TIMED_OUT),
    (Unavailable, UNREACHABLE),
    (OutcomeUnknown, UNREACHABLE),
    (LeadershipLost, UNREACHABLE),
    (InvariantBroken, BUG),
    (DtrainError, BUG),
)


def of_error(error: DtrainError) -> int:
    """Return the exit code that an error ends the command with."""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next(code for kind, code in _BY_CLASS if isinstance(error, kind))


def of_phase(phase: JobPhase, *, budget_spent: bool) -> int:
    """Return the exit code of a job that has ended in ``phase``."""
    match phase:
        case JobPhase.SUCCEEDED:
            return OK
        case JobPhase.CANCELLED:
            return JOB_CANCELLED
        case JobPhase.FAILED:
            return BUDGET_SPENT if budget_spent else JOB_FAILED
        case _:
            raise ValueError(f"{phase} is no end")


def of_rank(exit_code: int | None, signal: int | None) -> int:
    """Return a failed rank's own code as a shell would: 128 + n for a signal."""
    if signal:
        return 128 + signal
    if exit_code is None:
        return JOB_FAILED
    return 128 - exit_code if exit_code < 0 else exit_code or JOB_FAILED
