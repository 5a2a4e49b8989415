"""What has been read of a cluster, as one value. Pure."""

from dataclasses import dataclass, field

from dtrain.cli.records import Agent, Cluster, Job
from dtrain.protocol.events import EventRecord
from dtrain.protocol.rows import AgentRow, JobRow

STALL_S_MIN = 10.0
"""A job that has taken no step for less than that may just be slow."""

STALL_STEPS = 5.0
"""So many times what its steps took lately is no step any more."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest that is known; ``opened`` is the job or agent whose page is looked at."""

    jobs: tuple[JobRow, ...] = ()
    agents: tuple[AgentRow, ...] = ()
    coordinators: Cluster = field(default_factory=Cluster)
    events: tuple[tuple[str, EventRecord], ...] = ()
    """(job, event), the newest first."""
    moved: dict[str, float] = field(default_factory=dict)
    """When a job's step was first seen to be what it is, in the feed's seconds."""
    name: str = ""
    """Of the cluster."""
    mirror_ages_s: dict[str, float | None] = field(default_factory=dict)
    """By replica; None: it does not answer."""
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)
    opened: Job | Agent | None = None
    gone: bool = False
    """What was opened is no more."""
    read_at: float = 0.0
    """When the rows were read, in the feed's seconds."""
    age_s: float = 0.0
    """How old the mirror was that they were read from."""
    trouble: str = ""
    """Why nothing newer is known; "": all is well."""

    def stalled_s(self, row: JobRow, at: float) -> float:
        """For how long a job that runs has been watched without a step; 0: it takes steps, or may yet."""
        began = self.moved.get(row.name)
        if began is None or row.phase != "RUNNING":
            return 0.0
        # While nothing can be read, nobody knows of steps.
        waited = min(at, self.read_at) - began
        return waited if waited > max(STALL_S_MIN, STALL_STEPS * (row.step_s or 0.0)) else 0.0


def moved(before: Seen, rows: tuple[JobRow, ...], at: float) -> dict[str, float]:
    """``Seen.moved`` after ``rows`` were read ``at``: a new step, attempt or phase counts as a move."""
    known = {row.name: (row.uid, row.attempt, row.phase, row.step) for row in before.jobs}
    same = ((row.name, known.get(row.name) == (row.uid, row.attempt, row.phase, row.step)) for row in rows)
    return {name: before.moved.get(name, at) if unmoved else at for name, unmoved in same}
