"""Orders to the transfer process and what it reports back.

It uploads sealed snapshots and fetches checkpoints, in a process of its own, so
that hashing and network cost neither the training processes nor the thread
that renews the lease. Orders arrive on its stdin, reports leave on its stdout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.package import Package
from dtrain.protocol.ranklink import Have, Need, RestorePlan, Sealed
from dtrain.protocol.snapshot import BadBlob, DurablePart


@dataclass(frozen=True, slots=True)
class Upload:
    """Make one rank's sealed snapshot durable; answer ``Uploaded`` or ``UploadFailed``."""

    cluster: ClusterName
    job: JobName
    uid: Uid
    store: str
    attempt: Attempt
    rank: Rank
    world: int
    step: Step
    sealed: Sealed
    bandwidth_mb_s: float = 0.0
    """All uploads of this job together, in megabytes (10^6) a second; 0: as fast as it goes."""
    patience_s: float = 60.0
    """How long a store that does not answer is asked again."""


@dataclass(frozen=True, slots=True)
class CancelUpload:
    """Checkpoint ``seq`` is aborted: stop its uploads and delete what they wrote."""

    job: JobName
    uid: Uid
    seq: Seq


@dataclass(frozen=True, slots=True)
class KeptBlob:
    """A blob whose bytes lie in an arena of this machine since they were uploaded, or did once.

    A rank may have written over them since: they count only where they fit their digests.
    """

    key: str
    path: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class KeepManifest:
    """A checkpoint of ranks of this machine is committed: have its manifest here. No answer.

    It is what a restart reads first; with it here, one on the same machine needs no store.
    """

    store: str
    manifest: str
    digest: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Open a committed checkpoint; answer ``Fetched`` or ``FetchFailed``.

    Not ``on_demand``: with every byte of it in memory, verified. Else what is
    needed is said with ``Demand``; what surely will be, is fetched meanwhile.
    """

    id: str
    job: JobName
    uid: Uid
    store: str
    seq: Seq
    step: Step
    manifest: str
    digest: str
    on_demand: bool = False
    kept: tuple[KeptBlob, ...] = ()
    ranks: tuple[Rank, ...] = ()
    """Those of this machine."""
    world: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """A rank needs these chunks; answer ``Supplied`` or ``FetchFailed``. Unknown fetches are ignored.

    ``private``: only copies that nobody else writes to will do.
    """

    id: str
    rank: Rank
    need: Need
    private: bool = False


@dataclass(frozen=True, slots=True)
class ReleaseFetch:
    """Nobody needs the fetched bytes any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Unpack:
    """Have a packed working directory as folder ``tree``; answer ``Unpacked`` or ``UnpackFailed``.

    ``keep``: folders of other submissions that may be in use; the rest is nobody's any more.
    """

    cluster: ClusterName
    job: JobName
    uid: Uid
    package: Package
    tree: str
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DropTree:
    """Nobody uses the folder of that name any more. No answer."""

    tree: str


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of a local file; what it does not hold any more is left out. ``times``: file of its marks."""

    name: str
    path: str
    offset: int
    size: int
    times: str = ""


@dataclass(frozen=True, slots=True)
class Archive:
    """Write parts of files as one bundle, then delete ``replaces``; answer ``Archived``.

    Nothing waits for it: it may be lost with the process, and is then sent again.
    """

    id: str
    store: str
    key: str
    """"" : nothing is written, only deleted."""
    parts: tuple[FilePart, ...] = ()
    replaces: tuple[str, ...] = ()


TransferOrder = (
    Upload | CancelUpload | KeepManifest | Fetch | Demand | ReleaseFetch | Unpack | DropTree | Archive
)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The part is durable: the store has confirmed every checksum."""

    job: JobName
    part: DurablePart
    kept: tuple[KeptBlob, ...] = ()
    """Where its bytes lie on this machine."""


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """The part will not become durable; training goes on."""

    job: JobName
    seq: Seq
    rank: Rank
    message: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """The manifest is there, and with a plan that is not ``on_demand`` everything else."""

    id: str
    plan: RestorePlan
    tiers: Mapping[str, int] = field(default_factory=dict)
    """Bytes that ranks were given so far, by where they lay: see ``transfer_tiers.Tier``."""


@dataclass(frozen=True, slots=True)
class Supplied:
    """What a rank had demanded is there."""

    id: str
    rank: Rank
    have: Have
    tiers: Mapping[str, int] = field(default_factory=dict)
    """As in ``Fetched``, of the whole fetch."""


@dataclass(frozen=True, slots=True)
class PartMoved:
    """How much of one rank's part the store has taken."""

    job: JobName
    uid: Uid
    seq: Seq
    rank: Rank
    done_bytes: int


@dataclass(frozen=True, slots=True)
class FetchMoved:
    """How much of what ranks have asked for so far, or surely will, is here."""

    id: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Moved:
    """How far everything is that runs now: told now and then, and lost without harm."""

    parts: tuple[PartMoved, ...] = ()
    fetches: tuple[FetchMoved, ...] = ()


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The checkpoint cannot be had. ``bad``: it is damaged; else the store did not answer."""

    id: str
    message: str
    bad: BadBlob | None = None


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The working directory is there."""

    job: JobName
    uid: Uid
    folder: str


@dataclass(frozen=True, slots=True)
class UnpackFailed:
    """It is not. ``hopeless``: what the store holds is not what was packed, for no machine."""

    job: JobName
    uid: Uid
    message: str
    hopeless: bool = False


@dataclass(frozen=True, slots=True)
class Archived:
    """The bundle is durable and what it replaces is gone; ``problem``: why not. Not for the core."""

    id: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """The transfer process is gone (sent by its client); every order without an answer is lost."""

    exit_code: int | None


@dataclass(frozen=True, slots=True)
class StoreUse:
    """What the process has asked of stores since the last one of these: for metrics alone.

    By operation: how many by duration, and seconds; failures that deserve another try by operation and code.
    """

    counts: Mapping[str, tuple[int, ...]]
    seconds: Mapping[str, float]
    retries: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


TransferReport = (
    Uploaded
    | UploadFailed
    | Fetched
    | Supplied
    | FetchFailed
    | Moved
    | Unpacked
    | UnpackFailed
    | TransferEnded
)
"""What the core is told."""

Aside = Archived | StoreUse
"""What goes past the core."""

ORDERS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        Upload,
        CancelUpload,
        KeepManifest,
        Fetch,
        Demand,
        ReleaseFetch,
        Unpack,
        DropTree,
        Archive,
    )
}
REPORTS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        Uploaded,
        UploadFailed,
        Fetched,
        Supplied,
        FetchFailed,
        Moved,
        Unpacked,
        UnpackFailed,
        TransferEnded,
        Archived,
        StoreUse,
    )
}
