"""Where a job stands, in one word, and groups of such words. Imports nothing else of ours."""

from enum import StrEnum


class JobPhase(StrEnum):
    r"""Where a job stands. A phase changes only in a fenced transaction of the leader.

    ::

        QUEUED -> STARTING -> RUNNING -> SUCCEEDED
                      \          \
                       +-> RECOVERING -> STARTING ...      (a rank, agent or machine was lost)
                       +-> SUSPENDING -> SUSPENDED -> QUEUED   (an operator asked)
                       |             \-> QUEUED            (a job of higher priority needs its machines)
                       +-> CANCELLING -> CANCELLED         (an operator asked)
                       +-> FAILED                          (budget spent, or not to be retried)
    """

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


TERMINAL_PHASES = frozenset({JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.CANCELLED})
"""A job never leaves these; a new submission has a new uid."""

PLACED_PHASES = frozenset({JobPhase.STARTING, JobPhase.RUNNING, JobPhase.SUSPENDING, JobPhase.CANCELLING})
"""Phases in which ``JobStatus.members`` occupy slots."""
