"""Records about the cluster itself: leader, replicas, cordons."""

from dataclasses import dataclass

from dtrain.protocol.ids import AgentName, Attempt, JobName, ReplicaId, Term, Uid
from dtrain.protocol.snapshot import FailureKind


@dataclass(frozen=True, slots=True)
class LeaderRecord:
    """Value of the leader key; the term is the key's create revision, not in here."""

    replica: ReplicaId
    address: str
    nonce: str
    since: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A coordinator replica, under its own lease."""

    replica: ReplicaId
    address: str
    version: str = ""
    host: str = ""
    pid: int = 0
    since: str = ""
    ttl_s: float = 0.0
    """How long its lease lasts without a renewal: until then another may not take its id."""
    dashboard: str = ""
    """URL of its dashboard; "": it has none."""


@dataclass(frozen=True, slots=True)
class WebhookCursor:
    """How far one webhook has got: all events that are wanted, up to ``revision`` of etcd, were delivered."""

    term: Term
    name: str
    revision: int


@dataclass(frozen=True, slots=True)
class Cordon:
    """An agent that gets no new ranks. One with an end is written under a lease, and goes by itself.

    With ``drain`` the jobs that are there go on elsewhere, from a checkpoint taken now.
    """

    agent: AgentName
    reason: str
    by: str = ""
    until: str = ""
    drain: bool = False
    auto: bool = False
    """The leader wrote it."""


@dataclass(frozen=True, slots=True)
class Blame:
    """One attempt that ended because of a machine."""

    job: JobName
    uid: Uid
    attempt: Attempt
    kind: FailureKind
    at: float
    """Wall time, epoch seconds."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What attempts of all jobs have ended because of one machine, oldest first."""

    term: Term
    agent: AgentName
    blames: tuple[Blame, ...] = ()


@dataclass(frozen=True, slots=True)
class TestMark:
    """Says that this cluster may be broken on purpose; without it ``dtrain chaos`` does nothing."""

    __test__ = False  # no test, whatever pytest makes of the name

    by: str
    since: str = ""
    host: str = ""
    boot_id: str = ""
    """The kernel's id of the boot that ``pid`` belongs to."""
    pid: int = 0
    """The process that runs the cluster; 0: none, it was marked by hand."""
    faults: str = ""
    """Path of that process's Unix socket for faults, on ``host``; empty: none."""
