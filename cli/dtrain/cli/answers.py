"""What the coordinators answer, as values: no grpc in it, so that what only shows them loads none."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.protocol.checkpoint import CommitRecord


@dataclass(frozen=True, slots=True)
class Item:
    """One record as stored; ``key`` is below the cluster's root."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Records under one prefix, from the mirror of ``replica``; it was current ``age_s`` ago."""

    items: tuple[Item, ...]
    revision: int
    age_s: float
    replica: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows of a list, from the mirror of ``replica``; it was current ``age_s`` ago."""

    rows: tuple[bytes, ...]
    revision: int
    age_s: float
    replica: str


@dataclass(frozen=True, slots=True)
class Changed:
    """One record's step to ``value``, None: it was deleted; ``key`` is below the cluster's root."""

    key: str
    value: bytes | None
    revision: int
    create_revision: int


@dataclass(frozen=True, slots=True)
class News:
    """Changes up to ``revision``; ``lost``: no replica knows any more what came after the one asked for."""

    changes: tuple[Changed, ...]
    revision: int
    age_s: float
    lost: bool


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a submission."""

    spec: bytes
    created: bool
    revision: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankStacks:
    """The stacks of one rank: what it does, where, and all its threads as text."""

    rank: int
    agent: str
    kind: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class JobStacks:
    """Of all ranks that could be asked; ``problems``: who could not, in one sentence each."""

    ranks: tuple[RankStacks, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Bytes of one rank's log."""

    data: bytes
    next_offset: int
    attempt: int
    agent: str
    eof: bool
    offset: int = 0
    """Of the first byte."""
    marks: tuple[tuple[int, int], ...] = ()
    """(size, milliseconds): when the log was how long."""
    note: str = ""
    """Why it comes from the archive, if it does."""


@dataclass(frozen=True, slots=True)
class ArchivedJob:
    """A submission whose records are in the store; ``finished`` such as 20260501T120000Z."""

    job: str
    uid: str
    finished: str


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Logs of some ranks of one attempt, on a machine or ``archived`` in the store."""

    attempt: int
    agent: str
    first_rank: int
    last_rank: int
    archived: bool


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What one replica says about itself."""

    address: str
    cluster: str
    replica: str
    version: str
    leader: bool
    term: int
    revision: int
    mirror_age_s: float
    leader_replica: str
    problems: tuple[str, ...] = ()
    """What is wrong now, in sentences for people."""
    etcd_version: str = ""
    store: str = ""
    """Of jobs that name none; "": there is none, or the replica is of a release that does not say."""


@dataclass(frozen=True, slots=True)
class Importing:
    """A request to import; ``answered``: it is gone from the records, which tell what became of it."""

    lease: int
    answered: bool


@dataclass(frozen=True, slots=True)
class Pinned:
    """A checkpoint that stays while it is pinned; ``lease`` renews the pin, 0 for one without an end."""

    record: "CommitRecord"
    store: str
    lease: int
    revision: int

    @property
    def seq(self) -> int:
        return int(self.record.seq)


@dataclass(frozen=True, slots=True)
class GarbageItem:
    """Something in a job's store, whether it would go, and why."""

    kind: str
    seq: int
    what: str
    deleted: bool
    why: str
    bytes: int

    def as_json(self, job: str) -> dict[str, Any]:
        """The same for programs."""
        return {
            "v": 1,
            "kind": "Garbage",
            "job": job,
            "what": self.kind,
            "seq": self.seq,
            "name": self.what,
            "deleted": self.deleted,
            "why": self.why,
            "bytes": self.bytes,
        }


@dataclass(frozen=True, slots=True)
class Review:
    """What would be deleted now; ``problem``: why orphans would not."""

    items: tuple[GarbageItem, ...]
    revision: int
    problem: str
