"""What is counted in a job's status: attempts by why they began, checkpoints by how they ended.

The keys are public interface, as labels of metrics, and few.
"""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

from dtrain.protocol.job import JobStatus, Tally

FIRST = "first"
PLANNED = "planned"
"""Nothing had failed: another size, a drain, the end of a suspension."""


class Cause(StrEnum):
    """Why an open checkpoint is not committed."""

    LATE = "late"
    """Ranks had passed its step: the next one gets more slack."""
    RANK = "rank"
    """A rank could not copy or upload its part."""
    TIMEOUT = "timeout"
    VERIFY = "verify"
    """What was written does not fit together, or is not in the store."""
    UNFIT = "unfit"
    """A number that must be finite is not."""
    SUPERSEDED = "superseded"
    """It is not needed any more, or its attempt ended before it was durable."""


def attempt_begun(status: JobStatus) -> Tally:
    """Count the attempt after the one in ``status``."""
    failure = status.failure
    why = PLANNED
    if failure is not None and failure.attempt == status.attempt:
        why = failure.kind.value
    elif not status.tally.attempts:
        # Not by its number: those of a name that is used again go on.
        why = FIRST
    return replace(status.tally, attempts=_more(status.tally.attempts, why))


def committed(status: JobStatus, size_bytes: int) -> Tally:
    """Count a commit."""
    tally = status.tally
    return replace(tally, commits=tally.commits + 1, committed_bytes=tally.committed_bytes + size_bytes)


def aborted(status: JobStatus, cause: Cause) -> Tally:
    """Count a checkpoint that will never be."""
    return replace(status.tally, aborts=_more(status.tally.aborts, cause.value))


def _more(counts: Mapping[str, int], key: str) -> dict[str, int]:
    return {**counts, key: counts.get(key, 0) + 1}
