"""Records and manifests of checkpoints.

A rank's blob is a valid safetensors file. What one rank wrote is described by
its ``RankManifest``; the leader merges those of all ranks into the
``Manifest``, which the commit record names by key, length and digest.

Stored manifests are gzipped canonical JSON; ``docs/protocol.md`` lists the fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.snapshot import DurablePart

CHUNK_BYTES = 16 * 1024 * 1024
"""Bytes under one digest: an upload part and a verified read alike."""

MANIFEST_BYTES_MAX = 8 * 1024 * 1024
"""As stored (gzipped); about 400,000 tensors."""


@dataclass(frozen=True, slots=True)
class OpenRecord:
    """Intent of a checkpoint in flight, written before any blob of it exists.

    ``timeout_s`` is a duration: each leader counts it from when it first saw the
    record, so a failover can only extend it. ``reports`` keeps the durable parts
    of agents whose snapshot has gone.
    """

    term: Term
    uid: Uid
    seq: Seq
    attempt: Attempt
    step: Step
    nonce: str
    world_size: int
    timeout_s: float
    final: bool = False
    """Taken at the end of training: the job's last checkpoint."""
    token: str = ""
    """The operator's token it answers, if any."""
    reports: tuple[DurablePart, ...] = ()
    opened_at: str = ""
    hold_s: float = 0.0
    """The attempt ends with it: ranks stay at its step, at most so long. 0: they train on."""
    asked: bool = False
    """The script asked for exactly this step: each rank seals when its script comes to it."""
    imported: str = ""
    """Id of the order that brings its bytes from elsewhere, and names its part: no rank writes it."""


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The decision: this checkpoint exists. The only thing readers follow."""

    term: Term
    uid: Uid
    seq: Seq
    step: Step
    attempt: Attempt
    nonce: str
    world_size: int
    bytes: int
    manifest: str
    manifest_bytes: int
    digest: str
    """SHA-256 of the manifest's bytes as stored, in hex."""
    parent: Seq | None = None
    final: bool = False
    committed_at: str = ""


@dataclass(frozen=True, slots=True)
class Latest:
    """Pointer to the newest commit; never goes to a lower seq."""

    term: Term
    seq: Seq
    step: Step


@dataclass(frozen=True, slots=True)
class Garbage:
    """Tombstone of a retired checkpoint: its blobs may be deleted, its manifest last."""

    term: Term
    seq: Seq
    manifest: str
    digest: str
    reason: str = ""
    store: str = ""
    """Where its blobs are: a name used again may have moved to another store."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A committed checkpoint that was found damaged, with the evidence."""

    term: Term
    seq: Seq
    blob: str
    chunk: int
    expected: str
    found: str
    agent: str = ""
    rank: Rank | None = None
    at: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """A committed checkpoint of which every byte was read back and found right."""

    term: Term
    seq: Seq
    at: str
    bytes: int = 0
    """What was read for it."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Somebody needs this checkpoint: retention and deletion leave it alone.

    A reader's pin hangs on a lease of its own, so that a reader that was killed
    pins nothing for long. An operator's has none and stays until it is taken off.
    """

    seq: Seq
    holder: str
    """Who it is told apart by: the last part of the key."""
    ttl_s: int = 0
    """Seconds that it outlives its last renewal; 0: for ever."""
    why: str = ""
    by: str = ""
    at: str = ""


class OrderKind(StrEnum):
    """What an operator can ask the leader to do about a job's checkpoints."""

    DELETE = "delete"
    INSPECT = "inspect"
    COLLECT = "collect"
    IMPORT = "import"


@dataclass(frozen=True, slots=True)
class Order:
    """An operator's request to the leader, which answers by deleting it, with an event.

    ``inspect`` has one chunk read again by the leader, after somebody found it
    damaged: only what the leader confirms is quarantined. ``collect`` has the
    store searched for orphans now. ``import`` has a checkpoint opened for which
    whoever asks writes the bytes: it hangs on a lease of the asker's, stays until
    that checkpoint is committed or aborted, and is where its part is reported.
    """

    uid: Uid
    kind: OrderKind
    seq: Seq = Seq(0)
    blob: str = ""
    """Of ``inspect``: store key of the blob, or of the manifest."""
    chunk: int = 0
    by: str = ""
    at: str = ""
    step: Step = Step(0)
    """Of ``import``: the step that training goes on after."""
    timeout_s: float = 0.0
    """Of ``import``: seconds from its open record to its commit."""
    part: DurablePart | None = None
    """Of ``import``: what was written, once it is durable."""


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """One blob: ``chunks`` holds the CRC32C of each CHUNK_BYTES of it, in hex."""

    key: str
    rank: Rank
    bytes: int
    crc: str
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A hyper-rectangle of a tensor: ``s`` elements from ``o``, ``len`` bytes at ``off`` of blob ``b``."""

    o: tuple[int, ...]
    s: tuple[int, ...]
    b: int
    off: int
    len: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor by safetensors dtype name and global shape; its chunks tile it exactly."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A JSON value. ``crc`` is the CRC32 (zlib) of its canonical JSON, in hex.

    Small values are inline; replicated ones carry the same crc on every rank,
    which is how a value that differs between ranks is found and refused.
    """

    value: Any
    crc: str


@dataclass(frozen=True, slots=True)
class RankManifest:
    """What one rank wrote."""

    v: int
    cluster: ClusterName
    job: JobName
    uid: Uid
    seq: Seq
    attempt: Attempt
    nonce: str
    step: Step
    rank: Rank
    world: int
    blobs: tuple[BlobEntry, ...]
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    layout: str = ""
    """Hash over names, dtypes, shapes and owners of the whole state: equal on all ranks."""
    paths: Mapping[str, Any] = field(default_factory=dict)
    """Where a tensor or object belongs in a nested state: name -> list of str and int. Empty: not told."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Digests by name of what this rank and others hold alike: of a replicated tensor,
    or (``name#n``) of part ``n`` of a sharded one. Equal on all ranks that have it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint: blobs of all ranks, tensors tiled by their chunks."""

    v: int
    cluster: ClusterName
    job: JobName
    uid: Uid
    seq: Seq
    attempt: Attempt
    nonce: str
    step: Step
    world: int
    chunk_bytes: int
    crc: str
    bytes: int
    layout: str
    blobs: tuple[BlobEntry, ...]
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    parent: Seq | None = None
    created: str = ""
    user: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, Any] = field(default_factory=dict)
    """Where a tensor or object belongs in a nested state: name -> list of str and int. Empty: not told."""


def job_root(cluster: ClusterName, job: JobName, uid: Uid) -> str:
    """Folder of one submission in the store: a name used again shares nothing."""
    return f"{cluster}/{job}/{uid}"


def owners_prefix(cluster: ClusterName) -> str:
    """Folder of the marks that say which etcd decides about a cluster's blobs; no job can have this name."""
    return f"{cluster}/_owners/"


def blob_prefix(root: str, seq: Seq, attempt: Attempt, nonce: str) -> str:
    """Folder of one checkpoint's blobs: never used twice, so never overwritten."""
    return f"{root}/blobs/{seq:020d}/{attempt:06d}-{nonce}"


def blob_key(prefix: str, rank: Rank, lane: int, blob_nonce: str) -> str:
    """Name of one rank's blob under ``blob_prefix``."""
    return f"{prefix}/{rank:05d}-{lane:02d}-{blob_nonce}.st"


def rank_manifest_key(prefix: str, rank: Rank, blob_nonce: str) -> str:
    """Name of one rank's manifest under ``blob_prefix``."""
    return f"{prefix}/{rank:05d}-{blob_nonce}.json.gz"


def manifest_key(root: str, seq: Seq, attempt: Attempt, nonce: str, try_nonce: str) -> str:
    """Name of a merged manifest; ``try_nonce`` keeps two leaders' tries apart."""
    return f"{root}/manifests/{seq:020d}-{attempt:06d}-{nonce}-{try_nonce}.json.gz"
