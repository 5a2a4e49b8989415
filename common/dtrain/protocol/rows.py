"""One row for each job and agent: what lists show of many records.

Made by a replica (``summaries.py``), which has the records in memory, so that a
list of hundreds of jobs on thousands of machines is one small answer. Whoever only
shows rows need not know the records.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.protocol.phases import TERMINAL_PHASES, JobPhase


@dataclass(frozen=True, slots=True)
class Movement:
    """How far a checkpoint is on its way, over all machines; ``moving.py`` sums it."""

    kind: str
    """"save": to the store; "restore": to the ranks."""
    seq: int
    step: int
    done_bytes: int
    total_bytes: int = 0
    """0: not known yet."""
    bytes_per_s: float = 0.0
    """Of the last seconds."""
    left_s: float | None = None
    """Until the slowest machine has done its part, at its rate; None: nobody knows."""
    machines: int = 0
    """Machines that have told of their parts."""
    machines_done: int = 0
    """Of these, the ones that are through."""
    expected: int = 0
    """Machines of the attempt."""


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job in a list. Times are UTC; 0, "" and None: not known, or there is none."""

    name: str
    phase: JobPhase = JobPhase.QUEUED
    reason: str = ""
    uid: str = ""
    attempt: int = 0
    step: int = 0
    """Newest step that every rank that reports has completed, or the last one stored."""
    steps_total: int = 0
    """As many steps as the training has, where its script says so."""
    eta_s: float | None = None
    """Until its last step, if steps go on to take what they took lately."""
    step_s: float | None = None
    """What a step took lately, while it runs."""
    goodput: float | None = None
    """Share of its time, without queue and pauses, in which steps were done that were kept."""
    ranks: int = 0
    """Ranks that run."""
    world_size: int = 0
    """Ranks of the attempt, else as many as it may have."""
    latest_seq: int = 0
    latest_step: int = 0
    submitted_at: str = ""
    since: str = ""
    """When the phase began."""
    finished_at: str = ""
    priority: int = 0
    queue: int = 0
    """Place among those that wait for machines, from 1."""
    members: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    restarts: tuple[float, ...] = ()
    """Epoch seconds of those that count against the budget; older ones than ``restarts_window_s`` do not."""
    restarts_window_s: float = 0.0
    restarts_max: int = 0
    moving: tuple[Movement, ...] = ()
    """Checkpoints on their way to the store or back."""

    @property
    def finished(self) -> bool:
        """It has ended for good."""
        return self.phase in TERMINAL_PHASES


@dataclass(frozen=True, slots=True)
class AgentRow:
    """A machine in a list.

    ``status``: Ready, Draining, Cordoned, Blocked (something on it does not die), or Lost (no
    lease). Draining: it is about to end, or an operator wants it empty and it is not yet.
    """

    name: str
    status: str
    reason: str = ""
    """Why it is not simply Ready."""
    busy: int = 0
    """Slots with a rank that runs."""
    slots: int = 0
    gpus: int = 0
    jobs: tuple[str, ...] = ()
    version: str = ""
    since: str = ""
    address: str = ""
    host: str = ""
    incarnation: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
