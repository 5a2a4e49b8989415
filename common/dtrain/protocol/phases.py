"""Where a job stands, in one word, and groups of such words. Imports nothing else of ours."""

from collections.abc import Mapping
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

PHASE_CHANGES: Mapping[JobPhase, frozenset[JobPhase]] = {
    JobPhase.QUEUED: frozenset(
        {JobPhase.STARTING, JobPhase.SUSPENDED, JobPhase.CANCELLED, JobPhase.FAILED, JobPhase.CANCELLING}
    ),
    JobPhase.STARTING: frozenset(
        {
            JobPhase.RUNNING,
            JobPhase.RECOVERING,
            JobPhase.SUSPENDING,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.FAILED,
            JobPhase.SUCCEEDED,
        }
    ),
    JobPhase.RUNNING: frozenset(
        {
            JobPhase.STARTING,
            JobPhase.RECOVERING,
            JobPhase.SUSPENDING,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.FAILED,
            JobPhase.SUCCEEDED,
        }
    ),
    JobPhase.RECOVERING: frozenset(
        {
            JobPhase.STARTING,
            JobPhase.QUEUED,
            JobPhase.SUSPENDED,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.FAILED,
        }
    ),
    JobPhase.SUSPENDING: frozenset(
        {
            JobPhase.SUSPENDED,
            JobPhase.QUEUED,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.SUCCEEDED,
            JobPhase.FAILED,
        }
    ),
    JobPhase.SUSPENDED: frozenset({JobPhase.QUEUED, JobPhase.CANCELLED}),
    JobPhase.CANCELLING: frozenset({JobPhase.CANCELLED}),
    JobPhase.CANCELLED: frozenset(),
    JobPhase.SUCCEEDED: frozenset(),
    JobPhase.FAILED: frozenset(),
}
"""Where each phase may lead; records that say otherwise break the audit."""
