"""The errors that cross a boundary, ordered by what the caller should do.

::

    DtrainError
    ├── Refused           stop: the request is wrong and stays wrong
    │   └── NotFound      stop: there is no such thing
    ├── Conflict          reload, decide again: somebody else was faster
    ├── Unavailable       try again, elsewhere or later; nothing happened
    ├── OutcomeUnknown    look before trying again: it may have happened
    ├── LeadershipLost    stand down: another leader may be acting
    ├── TimedOut          stop waiting; what was waited for may still come
    └── InvariantBroken   crash: a bug, or damage, that must not be acted on

Every error carries a stable code, a sentence saying what happened, and where
possible what to do next. Adapters translate library exceptions into these
once, at the edge, and keep the original as ``__cause__``.
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable codes, never reused; ``docs/troubleshooting.md`` has a section for each.

    1xxx usage and job file, 2xxx store, 3xxx etcd, 4xxx coordinator and API,
    5xxx agent, 6xxx trainer and restore, 9xxx bugs.
    """

    BAD_NAME = "DT-1001"
    BAD_JOB_FILE = "DT-1002"
    BAD_SETTING = "DT-1003"
    BAD_RECORD = "DT-1004"
    USAGE = "DT-1005"
    NOT_A_TEST_CLUSTER = "DT-1006"
    CANNOT_PACK = "DT-1007"
    LOCAL_IO = "DT-1008"

    STORE_UNAVAILABLE = "DT-2001"
    STORE_REFUSED = "DT-2002"
    BLOB_NOT_FOUND = "DT-2003"
    BLOB_EXISTS = "DT-2004"
    BLOB_CORRUPT = "DT-2005"
    STORE_CREDENTIALS = "DT-2006"
    STORE_DENIED = "DT-2007"
    STORE_NO_BUCKET = "DT-2008"
    STORE_BUSY = "DT-2009"
    STORE_CLOCK = "DT-2010"
    STORE_FULL = "DT-2011"
    PACKAGE_DAMAGED = "DT-2012"

    ETCD_UNAVAILABLE = "DT-3001"
    ETCD_OUTCOME_UNKNOWN = "DT-3002"
    ETCD_REFUSED = "DT-3003"
    ETCD_COMPACTED = "DT-3004"
    ETCD_NO_SPACE = "DT-3005"
    ETCD_AUTH = "DT-3006"
    LEASE_NOT_FOUND = "DT-3007"
    ETCD_WENT_BACK = "DT-3008"
    ETCD_NOT_INSTALLED = "DT-3009"

    COORDINATOR_UNAVAILABLE = "DT-4001"
    NOT_FOUND = "DT-4002"
    ALREADY_EXISTS = "DT-4003"
    CONFLICT = "DT-4004"
    LEADERSHIP_LOST = "DT-4005"
    WAIT_TIMED_OUT = "DT-4006"
    MIRROR_STALE = "DT-4007"
    NOT_PERMITTED = "DT-4008"
    REPLICA_ID_TAKEN = "DT-4009"
    OLDER_RELEASE = "DT-4010"

    AGENT_UNAVAILABLE = "DT-5001"
    AGENT_NAME_TAKEN = "DT-5002"
    SCRIPT_NOT_FOUND = "DT-5004"
    LAUNCHER_FAILED = "DT-5005"
    PORT_IN_USE = "DT-5006"

    RESTORE_FAILED = "DT-6001"
    STATE_NOT_SAVABLE = "DT-6002"
    RANKS_DISAGREE = "DT-6003"
    CHECKPOINT_ABORTED = "DT-6004"

    BUG = "DT-9000"


class DtrainError(Exception):
    """Base of all; ``str()`` is the sentence without code and fix."""

    def __init__(self, code: ErrorCode, message: str, *, cause: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.cause = cause
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        # torch.distributed pickles errors to tell other ranks; the message alone would not rebuild one.
        return _rebuilt, (type(self), self.code, self.message, self.cause, self.fix)


def _rebuilt(kind: type["DtrainError"], code: ErrorCode, message: str, cause: str, fix: str) -> "DtrainError":
    return kind(code, message, cause=cause, fix=fix)


class Refused(DtrainError):
    """The request is wrong and would be wrong again."""


class NotFound(Refused):
    """What was asked for does not exist."""


class Conflict(DtrainError):
    """The world changed underneath: reload and decide again."""


class Unavailable(DtrainError):
    """Nothing happened; trying again elsewhere or later makes sense."""


class OutcomeUnknown(DtrainError):
    """It may have happened, now or later: read back before trying again."""


class LeadershipLost(DtrainError):
    """Another leader may be acting: stop acting at once."""


class TimedOut(DtrainError):
    """The wait is over; what was waited for may still happen."""


class InvariantBroken(DtrainError):
    """A bug or damage; acting on it could lose data, so the process ends."""
