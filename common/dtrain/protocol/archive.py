"""What outlives machines and records: bundles of files' parts in the store, and where they lie.

An agent copies what its ranks wrote to the store while they run and when their
attempt ends. A *bundle* is one gzipped object: a line of JSON that names its parts,
then their bytes. A part is a range of one file; files only grow, so parts of several
bundles that overlap agree, and a reader takes the union of what it finds.

The leader adds the records of jobs that have ended, and the events that etcd has no room for.

Everything lies under ``<cluster>/_archive/``: no job can have this name, and the
collector of checkpoints looks only below jobs'.
"""

import gzip
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Rank, Uid

BUNDLE_BYTES_MAX = 48 * 1024 * 1024
"""Of the parts of one bundle together, unpacked."""

MARKS_MAX = 4096
"""Times kept with one part; every other one goes until they fit."""

DOCUMENT_BYTES_MAX = 32 * 1024 * 1024
"""Of an archived record or a batch of events, unpacked."""

_HEADER_BYTES_MAX = 8 * 1024 * 1024
_RECORD = re.compile(
    r"([^/]+)/([^/]+)/(?:record-(\d{8}T\d{6}Z)-(\d{20})|events-(\d{20})-(\d{20}))-[0-9a-f]+\.json\.gz"
)
_BUNDLE = re.compile(r"(\d{6})/([^/]+)/(\d{5,})-(\d{5,})-(\d{6,})-([0-9a-f]+)\.gz")


@dataclass(frozen=True, slots=True)
class Mark:
    """At ``at_ms`` (epoch, the writer's clock) the file was ``size`` bytes long."""

    size: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one file from ``offset`` on, and when they had been written."""

    name: str
    """``<rank>/<stream>`` of a log."""
    offset: int
    data: bytes
    marks: tuple[Mark, ...] = ()

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class BundleName:
    """What a bundle's key says: parts of ranks ``first`` to ``last``, the ``number``-th that was written."""

    attempt: Attempt
    agent: AgentName
    first: Rank
    last: Rank
    number: int
    key: str


def archive_root(cluster: ClusterName) -> str:
    """Folder of all that is archived of a cluster."""
    return f"{cluster}/_archive/"


def logs_prefix(cluster: ClusterName, job: JobName, uid: Uid) -> str:
    """Folder of one submission's bundles."""
    return f"{archive_root(cluster)}logs/{job}/{uid}/"


def bundle_key(
    prefix: str, attempt: Attempt, agent: AgentName, *, first: Rank, last: Rank, number: int, nonce: str
) -> str:
    """Name of one bundle under ``logs_prefix``; the nonce keeps two lives of an agent apart."""
    return f"{prefix}{attempt:06d}/{agent}/{first:05d}-{last:05d}-{number:06d}-{nonce}.gz"


def jobs_prefix(cluster: ClusterName, job: str = "", uid: str = "") -> str:
    """Folder of archived records: of the cluster, of one job name, or of one submission."""
    return "/".join([f"{archive_root(cluster)}jobs", *(part for part in (job, uid) if part)]) + "/"


@dataclass(frozen=True, slots=True)
class RecordName:
    """What the key of an archived record or of a batch of events says."""

    job: JobName
    uid: Uid
    kind: str
    """``record`` or ``events``."""
    finished: str
    """Of a record: when the job ended, as ``20260501T120000Z``."""
    first: int
    last: int
    key: str


def record_key(
    cluster: ClusterName, job: JobName, uid: Uid, *, finished_at: str, event_last: int, nonce: str
) -> str:
    """Name of the record of a submission that has ended at ``finished_at`` (UTC)."""
    return f"{jobs_prefix(cluster, job, uid)}record-{compact(finished_at)}-{event_last:020d}-{nonce}.json.gz"


def events_key(cluster: ClusterName, job: JobName, uid: Uid, *, first: int, last: int, nonce: str) -> str:
    """Name of a batch of a submission's events, ``first`` to ``last``."""
    return f"{jobs_prefix(cluster, job, uid)}events-{first:020d}-{last:020d}-{nonce}.json.gz"


def parse_record_key(cluster: ClusterName, key: str) -> RecordName | None:
    """Take a key under ``jobs_prefix`` apart; None for one that is neither kind's."""
    prefix = jobs_prefix(cluster)
    found = _RECORD.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    if found is None:
        return None
    job, uid, finished, at, first, last = found.groups()
    if finished is not None:
        return RecordName(JobName(job), Uid(uid), "record", finished, 0, int(at), key)
    return RecordName(JobName(job), Uid(uid), "events", "", int(first), int(last), key)


def compact(stamp: str) -> str:
    """A UTC time as it is in keys: ``2026-05-01T12:00:00.123Z`` as ``20260501T120000Z``."""
    return re.sub(r"[-:]|\.\d+", "", stamp)


def pack_document(document: Mapping[str, Any]) -> bytes:
    """A record or a batch of events as it is stored."""
    return gzip.compress(codec.dumps(document), mtime=0)


def unpack_document(data: bytes) -> dict[str, Any]:
    """A stored record or batch of events.

    Raises:
        Refused: BAD_RECORD; it is damaged, or of a newer kind.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(DOCUMENT_BYTES_MAX + 1)
    except (OSError, EOFError) as error:
        raise Refused(ErrorCode.BAD_RECORD, f"an archived record cannot be read: {error}") from error
    document = codec.loads(text, bytes_max=DOCUMENT_BYTES_MAX)
    if not isinstance(document, dict) or document.get("v") != 1:
        raise Refused(ErrorCode.BAD_RECORD, "an archived record is of an unknown version")
    return document


def parse_bundle_key(prefix: str, key: str) -> BundleName | None:
    """Take a key under ``logs_prefix`` apart; None for one that is not a bundle's."""
    found = _BUNDLE.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    if found is None:
        return None
    attempt, agent, first, last, number, _ = found.groups()
    return BundleName(
        Attempt(int(attempt)), AgentName(agent), Rank(int(first)), Rank(int(last)), int(number), key
    )


def pack(parts: Iterable[Part]) -> bytes:
    """One bundle as it is stored."""
    parts = list(parts)
    header = {
        "v": 1,
        "parts": [
            {
                "name": part.name,
                "offset": part.offset,
                "size": len(part.data),
                "marks": marks_text(thinned(part.marks, MARKS_MAX)),
            }
            for part in parts
        ],
    }
    packed = io.BytesIO()
    # No time in the header: the same parts are the same bytes, and a repeated write finds its own.
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as file:
        file.write(codec.dumps(header) + b"\n")
        for part in parts:
            file.write(part.data)
    return packed.getvalue()


def unpack(data: bytes) -> tuple[Part, ...]:
    """The parts of a stored bundle.

    Raises:
        Refused: BAD_RECORD; it is damaged, or of a newer kind.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            line = file.readline(_HEADER_BYTES_MAX)
            body = file.read(BUNDLE_BYTES_MAX + 1)
        document = codec.loads(line, bytes_max=_HEADER_BYTES_MAX)
        if not isinstance(document, dict) or document.get("v") != 1:
            raise Refused(ErrorCode.BAD_RECORD, "a bundle of the archive is of an unknown version")
        parts, at = [], 0
        for one in document["parts"]:
            size = int(one["size"])
            if size < 0 or at + size > len(body):
                raise Refused(ErrorCode.BAD_RECORD, "a bundle of the archive ends early")
            marks = marks_from(str(one.get("marks", "")))
            parts.append(Part(str(one["name"]), int(one["offset"]), body[at : at + size], marks))
            at += size
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise Refused(ErrorCode.BAD_RECORD, f"a bundle of the archive cannot be read: {error}") from error
    return tuple(parts)


def marks_text(marks: Iterable[Mark]) -> str:
    """Marks as they are stored: ``SIZE TIME`` each, one a line."""
    return "".join(f"{mark.size} {mark.at_ms}\n" for mark in marks)


def marks_from(text: str) -> tuple[Mark, ...]:
    """Marks in the order of their sizes; lines that are none, such as one cut short, are left out."""
    found: list[Mark] = []
    for line in text.splitlines():
        size, _, at_ms = line.partition(" ")
        if size.isdecimal() and at_ms.isdecimal() and (not found or int(size) >= found[-1].size):
            found.append(Mark(int(size), int(at_ms)))
    return tuple(found)


def thinned(marks: Sequence[Mark], most: int) -> tuple[Mark, ...]:
    """At most ``most`` of the marks, the last one among them."""
    kept = tuple(marks)
    while len(kept) > most:
        kept = kept[-1::-2][::-1]
    return kept
