"""What a decision is made from: one job, the fleet, and the moment.

Views are built from the mirror of etcd plus a few facts that this leader saw
for itself since it took office. Instants are of the local monotonic clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dtrain.coordinator.core.queue import Queue
from dtrain.protocol.checkpoint import (
    CommitRecord,
    Garbage,
    Latest,
    OpenRecord,
    Order,
    Quarantine,
    Verification,
)
from dtrain.protocol.cluster import Cordon, Suspicion
from dtrain.protocol.ids import AgentName, ClusterName, JobName, Rank, ReplicaId, Seq, Term, Uid
from dtrain.protocol.job import Intent, JobSpec, JobStatus
from dtrain.protocol.snapshot import NodeRecord, WorkerSnapshot

T = TypeVar("T")

NO_QUEUE = Queue()


@dataclass(frozen=True, slots=True)
class Stored(Generic[T]):
    """A record with the revision it was read at.

    ``seen_at`` is when this replica first saw this *revision* of the key or, for
    numbered records (open, checkpoints, garbage), first saw the key at all: the
    time that a checkpoint may take is not restarted by a rewrite of its record.
    """

    value: T
    mod_revision: int
    create_revision: int = 0
    seen_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of verifying one open checkpoint against the store.

    ``ok``: the merged manifest is durable at ``manifest``. Not ok and
    ``retry``: the store did not answer; not ok and not ``retry``: this
    checkpoint can never be committed.
    """

    seq: Seq
    nonce: str
    ok: bool
    problem: str = ""
    retry: bool = False
    manifest: str = ""
    manifest_bytes: int = 0
    digest: str = ""
    size_bytes: int = 0
    at: float = 0.0
    unknown: tuple[Seq, Seq] | None = None
    """Numbers of manifests that no record names, first and last, if one of them is this number or a later."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One chunk of a committed checkpoint that is not what was committed, read twice.

    ``found`` is its digest, or "missing" or "short". ``tensors``: which of them
    lie in it, in words.
    """

    blob: str
    chunk: int
    expected: str
    found: str
    rank: Rank | None = None
    tensors: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What reading a committed checkpoint again found; ``problem``: why it says nothing."""

    at: float
    """When it began."""
    damage: Damage | None = None
    problem: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class SweepFound:
    """What came of this leader's newest search for orphans."""

    deleted: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Sightings:
    """What this leader has seen of an attempt: since when ranks are slow, or named ones are not any more."""

    of: tuple[str, int] = ("", 0)
    """Its uid and number."""
    slow: Mapping[Rank, float] = field(default_factory=dict)
    fine: Mapping[Rank, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pace:
    """When an attempt came how far, as this leader has seen it; ``pace`` has the rules."""

    of: tuple[str, int] = ("", 0)
    """Its uid and number."""
    ready_at: float | None = None
    """When the last machine was ready."""
    joined_at: float | None = None
    """When the last rank had joined."""
    waited: bool = False
    """It was seen before its first new step."""
    first_at: float | None = None
    """When the first new step was seen; None: it was not, or who saw it had not seen what was before."""
    first_steps: int = 0
    """How many steps were new then."""
    step: int = 0
    """The newest step that was seen, or that it began from."""
    step_at: float | None = None
    """When that was; None: no new step was seen."""
    ended_at: float | None = None
    """When all ranks had announced the end of training."""
    counts: bool = False
    """Ranks tell their steps."""
    step_ms: float = 0.0
    """What a step takes; 0.0: not known yet."""
    held_ms: int = 0
    """How long checkpoints have held a rank, at most."""


@dataclass(frozen=True, slots=True)
class JobView:
    """Everything known of one job."""

    name: JobName
    spec: Stored[JobSpec] | None = None
    intent: Stored[Intent] | None = None
    status: Stored[JobStatus] | None = None
    open: tuple[Stored[OpenRecord], ...] = ()
    """By seq."""
    commits: tuple[Stored[CommitRecord], ...] = ()
    """By seq."""
    latest: Stored[Latest] | None = None
    bad: Mapping[Seq, Quarantine] = field(default_factory=dict)
    garbage: tuple[Stored[Garbage], ...] = ()
    pinned: frozenset[Seq] = frozenset()
    verified: Mapping[Seq, Stored[Verification]] = field(default_factory=dict)
    orders: Mapping[str, Stored[Order]] = field(default_factory=dict)
    """By id; those that can be read."""
    inspections: Mapping[tuple[Seq, str, str, int], Inspection] = field(default_factory=dict)
    """By (seq, depth, blob, chunk): what this leader has read again, and how that went last."""
    events: tuple[int, ...] = ()
    """Sequence numbers of the events in etcd, ascending."""
    workers: Mapping[AgentName, Stored[WorkerSnapshot]] = field(default_factory=dict)
    departed: Mapping[AgentName, WorkerSnapshot] = field(default_factory=dict)
    """Last snapshot of agents whose key has vanished during the current attempt."""
    verdicts: Mapping[tuple[Seq, str], Verdict] = field(default_factory=dict)
    """By (seq, nonce): what this leader has verified."""
    collected: frozenset[Seq] = frozenset()
    """Tombstones whose blobs this leader has deleted."""
    swept_at: float | None = None
    """When this leader last began a sweep of this job's orphans that was completed; None: not yet."""
    swept_found: SweepFound = SweepFound()
    swept_former: frozenset[Uid] = frozenset()
    """Earlier submissions of this name that this leader has swept after."""
    unknown: tuple[Seq, Seq] | None = None
    """Numbers of checkpoints that this leader found in the store and etcd does not know: first and last."""
    store_ok: bool | None = None
    """Whether the job's store answered a probe; None: not probed yet."""
    store_problem: str = ""
    store_probed_at: float | None = None
    """When the last probe of the store ended; None: unknown, or never."""
    step_rate: float = 0.0
    """Steps per second of the current attempt, from its snapshots; 0.0: not known yet."""
    sightings: Sightings = Sightings()
    """Which ranks have been slower than the others, and since when."""
    pace: Pace = Pace()
    quarantined: str = ""
    """Not empty: deciding about this job crashed repeatedly; leave it alone."""


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent with a live session."""

    node: NodeRecord
    seen_at: float
    """When this leader first saw this incarnation."""
    draining_at: float | None = None
    """When this replica first saw that the agent drains, in whichever of its lives, or that an operator
    wants it empty; None: neither."""
    vacating: Cordon | None = None
    """An operator wants it empty; the agent itself stays."""


@dataclass(frozen=True, slots=True)
class FleetView:
    """The machines, and what limits their use."""

    cluster: ClusterName
    replica: ReplicaId
    term: Term
    took_office_at: float
    agents: Mapping[AgentName, AgentView] = field(default_factory=dict)
    lost_at: Mapping[AgentName, float] = field(default_factory=dict)
    """Agents whose session this leader saw end (not those missing from the start)."""
    cordoned: frozenset[AgentName] = frozenset()
    used: Mapping[AgentName, int] = field(default_factory=dict)
    """Slots taken by the placed attempts of *other* jobs."""
    unreachable: Mapping[AgentName, float] = field(default_factory=dict)
    """Agents that refused or did not answer the newest command, and when that was."""
    brake: str = ""
    """Not empty: why nothing may be declared lost or started elsewhere."""
    agent_ttl_s: float = 10.0
    default_store: str = ""
    losses_settle_at: float = 0.0
    """Several agents vanished one after another: nobody is called lost before, as more may follow."""
    left: frozenset[AgentName] = frozenset()
    """Of ``lost_at``, those that drained: they end their ranks before they go and are not waited for."""
    scrub_interval_s: float = 0.0
    """How often committed checkpoints are read whole; 0: never."""
    suspicions: Mapping[AgentName, Stored[Suspicion]] = field(default_factory=dict)
    cordon_s: float = 0.0
    """How long a suspected machine is cordoned; 0: machines are not suspected."""
    queue: Queue = NO_QUEUE
    """The jobs that wait for machines, what is claimed for them, and who makes room."""
    withheld: str = ""
    """Not empty: which coordinator could not read what ``core/releases.py`` lists, if it led next."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The inputs of a decision that are not state: time and one random draw."""

    now: float
    wall: float
    nonce: str
    """Fresh, unguessable, 16 hex digits: names whatever this decision creates."""
