"""Orders to the transfer process and what it reports back.

It uploads sealed snapshots and fetches checkpoints, in a process of its own, so
that hashing and network cost neither the training processes nor the thread
that renews the lease. Orders arrive on its stdin, reports leave on its stdout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import RestorePlan, Sealed
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
class Fetch:
    """Bring a committed checkpoint into memory, verified; answer ``Fetched`` or ``FetchFailed``."""

    id: str
    job: JobName
    uid: Uid
    store: str
    seq: Seq
    step: Step
    manifest: str
    digest: str


@dataclass(frozen=True, slots=True)
class ReleaseFetch:
    """Nobody needs the fetched bytes any more."""

    id: str


TransferOrder = Upload | CancelUpload | Fetch | ReleaseFetch


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The part is durable: the store has confirmed every checksum."""

    job: JobName
    part: DurablePart


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """The part will not become durable; training goes on."""

    job: JobName
    seq: Seq
    rank: Rank
    message: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """All bytes are verified and in memory."""

    id: str
    plan: RestorePlan


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The checkpoint cannot be had. ``bad``: it is damaged; else the store did not answer."""

    id: str
    message: str
    bad: BadBlob | None = None


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """The transfer process is gone (sent by its client); every order without an answer is lost."""

    exit_code: int | None


TransferReport = Uploaded | UploadFailed | Fetched | FetchFailed | TransferEnded

ORDERS: Mapping[str, type] = {kind.__name__: kind for kind in (Upload, CancelUpload, Fetch, ReleaseFetch)}
REPORTS: Mapping[str, type] = {
    kind.__name__: kind for kind in (Uploaded, UploadFailed, Fetched, FetchFailed, TransferEnded)
}
