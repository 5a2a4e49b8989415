"""What is known of one job: its records as they came, what work on its store found, and how fast it is.

Records are decoded when they are first read. One that cannot be is remembered with the reason, so that
only its own job is left alone.
"""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from dtrain.coordinator.core import pace, stragglers
from dtrain.coordinator.core.views import (
    Inspection,
    Pace,
    Sightings,
    Stored,
    SweepFound,
    Verdict,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CommitRecord,
    Garbage,
    Latest,
    OpenRecord,
    Order,
    Quarantine,
    Verification,
)
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import AgentName, JobName, Seq, Uid
from dtrain.protocol.job import PLACED_PHASES, Intent, JobSpec, JobStatus
from dtrain.protocol.snapshot import WorkerSnapshot
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")

STEP_SAMPLES = 8

RATE_SPAN_S = 1.0
"""Shortest time that says something about a rate: the first snapshot of an attempt is urgent, and old."""

NOTHING_SWEPT = SweepFound()

_TRANSFERS = b',"transfers":'
_WRITTEN_AT = re.compile(rb',"at":[^,}]*')


@dataclass(slots=True)
class Cell(Generic[T]):
    """A record as it came; decoded when first read, since most snapshots never are."""

    kv: KeyValue
    seen_at: float
    stored: Stored[T] | None = None

    def read(self, kind: type[T]) -> Stored[T]:
        if self.stored is None:
            value = codec.decode(kind, self.kv.value)
            self.stored = Stored(value, self.kv.mod_revision, self.kv.create_revision, self.seen_at)
        return self.stored


@dataclass(slots=True)
class KnownJob:
    """All that is known of one job. Numbered records by their number."""

    name: JobName
    single: dict[str, Cell[Any]] = field(default_factory=dict)
    """spec, intent, status, latest."""
    numbered: dict[str, dict[Seq, Cell[Any]]] = field(default_factory=dict)
    """open, checkpoint, garbage, bad, verified."""
    orders: dict[str, Stored[Order]] = field(default_factory=dict)
    inspections: dict[tuple[Seq, str, str, int], Inspection] = field(default_factory=dict)
    pins: dict[Seq, set[str]] = field(default_factory=dict)
    events: set[int] = field(default_factory=set)
    workers: dict[AgentName, Cell[WorkerSnapshot]] = field(default_factory=dict)
    departed: dict[AgentName, WorkerSnapshot] = field(default_factory=dict)
    verdicts: dict[tuple[Seq, str], Verdict] = field(default_factory=dict)
    collected: set[Seq] = field(default_factory=set)
    swept_at: float | None = None
    swept_found: SweepFound = SweepFound()
    swept_former: set[Uid] = field(default_factory=set)
    unknown: tuple[Seq, Seq] | None = None
    store_ok: bool | None = None
    store_problem: str = ""
    store_probed_at: float | None = None
    progress: dict[AgentName, deque[tuple[float, int]]] = field(default_factory=dict)
    """(instant, step) of the current attempt, oldest first."""
    progress_of: tuple[str, int] = ("", 0)
    """The uid and attempt that ``progress`` is of."""
    sightings: Sightings = Sightings()
    pace: Pace = Pace()
    broken: dict[str, str] = field(default_factory=dict)
    """Why a record cannot be used, by key."""
    status: JobStatus | None = None
    """The status record decoded, if it can be."""

    def is_empty(self) -> bool:
        return not (
            self.single
            or self.workers
            or self.pins
            or self.orders
            or self.events
            or any(self.numbered.get(kind) for kind in self.numbered)
        )


SINGLE: dict[str, type] = {"spec": JobSpec, "intent": Intent, "status": JobStatus, "latest": Latest}


NUMBERED: dict[str, type] = {
    "open": OpenRecord,
    "checkpoint": CommitRecord,
    "garbage": Garbage,
    "bad": Quarantine,
    "verified": Verification,
}


def read(job: KnownJob, key: str, cell: Cell[T], kind: type[T]) -> Stored[T] | None:
    """Return a record decoded; None where it cannot be, which the job remembers."""
    try:
        return cell.read(kind)
    except DtrainError as error:
        job.broken[key] = f"{key} cannot be read: {error.message}"
        return None


def uid_of(cell: Cell[Any]) -> str:
    """Return the submission that a record is of; "" if it cannot be read."""
    return "" if cell.stored is None else str(cell.stored.value.uid)


def moved(before: KeyValue, after: KeyValue) -> bool:
    """Whether only bytes have moved on since: nothing is decided from that, and looks at large jobs are dear.

    Told by the text, which ends with ``transfers``: to decode it is most of what a look costs.
    """
    (rest, told), (rest_now, told_now) = _without_transfers(before.value), _without_transfers(after.value)
    return told != told_now and rest == rest_now


def _without_transfers(snapshot: bytes) -> tuple[bytes, bytes]:
    rest, found, told = snapshot.partition(_TRANSFERS)
    return _WRITTEN_AT.sub(b"", rest if found else rest[:-1]), told


def is_current(snapshot: WorkerSnapshot, status: JobStatus | None) -> bool:
    """Whether a snapshot is of the running attempt, or of one that is to come."""
    return status is not None and snapshot.uid == status.uid and snapshot.attempt >= status.attempt


def sightings(job: KnownJob, workers: Iterable[Stored[WorkerSnapshot]]) -> Sightings:
    """Which ranks are slower than the others, and since when, by all snapshots seen so far."""
    if job.status is not None:
        of = (str(job.status.uid), int(job.status.attempt))
        shown = [stored for stored in workers if (stored.value.uid, stored.value.attempt) == of]
        at = max((stored.seen_at for stored in shown), default=0.0)
        values = [stored.value for stored in shown]
        job.sightings = stragglers.observe(job.sightings, job.status, values, at)
    return job.sightings


def pace_of(job: KnownJob, workers: Iterable[Stored[WorkerSnapshot]]) -> Pace:
    """How long the job's steps take, by all snapshots seen so far."""
    if job.status is not None and job.status.phase in PLACED_PHASES:
        job.pace = pace.observe(job.pace, job.status, workers)
    return job.pace


def step_rate(job: KnownJob, workers: Iterable[Stored[WorkerSnapshot]]) -> float:
    """Steps per second over the last few snapshots that showed progress; 0.0: not known.

    Seen on one agent each: two agents' snapshots of different age, a moment
    apart, would pass for thousands of steps a second.
    """
    if job.status is None:
        return 0.0
    of = (str(job.status.uid), int(job.status.attempt))
    if of != job.progress_of:
        job.progress.clear()
        job.progress_of = of
    for stored in workers:
        snapshot = stored.value
        if (snapshot.uid, snapshot.attempt) != of or not snapshot.ranks:
            continue
        step = max(rank.step for rank in snapshot.ranks)
        seen = job.progress.setdefault(snapshot.agent, deque(maxlen=STEP_SAMPLES))
        if step and (not seen or step > seen[-1][1]):
            seen.append((stored.seen_at, step))
    rates = [
        (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
        for seen in job.progress.values()
        if seen and seen[-1][0] - seen[0][0] >= RATE_SPAN_S
    ]
    return max(rates, default=0.0)


def stamped(verdict: Verdict, now: float) -> Verdict:
    """Return the verdict with the instant at which it arrived."""
    return replace(verdict, at=now)
