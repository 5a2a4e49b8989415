"""What ranks reported over time, for whoever draws it: loss, step time, throughput, stalls, uploads.

Of each attempt the first rank of this machine is kept, in memory and bounded. A restarted
agent goes on from what its former self wrote down for the archive. Read off the agent's states,
before and after each event, so that the core knows nothing of it. ``see`` is called by the thread
that supervises, ``read`` by those that answer.
"""

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from dtrain.agent.core.ring import Ring
from dtrain.agent.core.state import AgentState, JobState, LocalRank
from dtrain.protocol import curves
from dtrain.protocol.curves import Curve
from dtrain.protocol.ids import Attempt, JobName, Rank, Seq, Uid
from dtrain.protocol.snapshot import WorkerPhase

POINTS = 400
"""Of one number in one attempt: 24 bytes each."""

NAMES_MAX = 12
ATTEMPTS_MAX = 8
JOBS_MAX = 64
EVERY_S = 0.5
"""A number is taken no more often than this."""

KEEP_S, KEEP_SHARE = 60.0, 0.25
"""What is known is written down for the archive after a minute, and whenever the attempt has grown by a
quarter: a lost machine takes a fifth with it, and the lines of days take little room."""

STEP_TIME, THROUGHPUT, STALL, UPLOAD = "step_s", "throughput", "stall_s", "upload_s"
"""Ours; a rank's own numbers have the names that its script gave them."""

STALL_METRIC = "checkpoint_stall_s"
"""Under this name a rank reports how long it stood still for its newest snapshot."""


@dataclass(slots=True)
class _Attempt:
    rank: Rank
    rings: dict[str, Ring] = field(default_factory=dict)
    taken_at: float = float("-inf")
    step: int = 0
    step_at: float = 0.0
    paced: bool = False
    """A report of its own steps was seen: from there on time is known by steps."""
    sealed_at: dict[Seq, float] = field(default_factory=dict)
    began_at: float = 0.0
    kept_at: float = 0.0
    over: bool = False

    def add(self, name: str, at: float, step: int, value: float) -> None:
        ring = self.rings.get(name)
        if ring is None:
            if len(self.rings) >= NAMES_MAX:
                return
            ring = self.rings[name] = Ring(POINTS)
        ring.add(at, step, value)


_Job = tuple[JobName, Uid]


Keep = Callable[[JobName, Uid, Attempt, str, bytes], None]
Recall = Callable[[JobName, Uid, Attempt, str, int], bytes]


class Series:
    """Curves of the jobs that ran here lately.

    ``keep`` appends to the archive, ``recall`` reads the end of what was appended; both may raise OSError.
    """

    def __init__(
        self,
        wall: Callable[[], float],
        keep: Keep = lambda *_: None,
        recall: Recall = lambda *_: b"",
    ) -> None:
        self._wall = wall
        self._keep = keep
        self._recall = recall
        self._lock = threading.Lock()
        self._jobs: OrderedDict[_Job, OrderedDict[Attempt, _Attempt]] = OrderedDict()

    def see(self, before: AgentState, after: AgentState, now: float) -> None:
        """An event has led from one state to the next, at ``now`` (monotonic)."""
        if before.jobs is after.jobs:
            return
        for name, job in after.jobs.items():
            old = before.jobs.get(name)
            if old is not job and job.attempt and job.ranks:
                same = old if old is not None and (old.uid, old.attempt) == (job.uid, job.attempt) else None
                with self._lock:
                    self._see_job(same, job, now)

    def read(self, job: str, uid: str, points_max: int) -> list[Curve]:
        """Return what is kept of a submission, the oldest attempt first; [] if that is nothing."""
        with self._lock:
            attempts = self._jobs.get((JobName(job), Uid(uid)), OrderedDict())
            return [one for attempt, found in attempts.items() for one in _curves(attempt, found, points_max)]

    def _see_job(self, old: JobState | None, job: JobState, now: float) -> None:
        rank = min(job.ranks, key=lambda one: one.rank)
        was = old.rank(rank.rank) if old is not None else None
        if was is rank and old is not None and old.durable is job.durable:
            return
        kept = self._attempt(job, rank, now)
        at = self._wall()
        if rank.sealed is not None and (
            was is None or was.sealed is None or was.sealed.seq != rank.sealed.seq
        ):
            kept.sealed_at = {rank.sealed.seq: now}
        for part in job.durable:
            sealed_at = kept.sealed_at.pop(part.seq, None) if part.rank == rank.rank else None
            if sealed_at is not None:
                kept.add(UPLOAD, at, part.step, now - sealed_at)
        stall_s = rank.metrics.get(STALL_METRIC)
        known = was.metrics.get(STALL_METRIC) if was is not None else None
        if stall_s is not None and stall_s != known:
            kept.add(STALL, at, rank.step, stall_s)
        if rank.phase is WorkerPhase.TRAINING and rank.connection and now - kept.taken_at >= EVERY_S:
            self._take(kept, rank, at, now)
        if rank.rank == 0 and kept.rings:
            self._archive(job, kept, now)

    def _archive(self, job: JobState, kept: _Attempt, now: float) -> None:
        over = all(rank.exit_code is not None for rank in job.ranks)
        since_s = now - kept.kept_at
        due = since_s >= max(KEEP_S, KEEP_SHARE * (kept.kept_at - kept.began_at))
        if kept.over or not (over or due):
            return
        kept.kept_at, kept.over = now, over
        line = curves.encode(_curves(job.attempt, kept, POINTS))
        # Without a place for logs there is none for these; ranks have trouble enough then.
        with contextlib.suppress(OSError):
            self._keep(job.name, job.uid, job.attempt, curves.ARCHIVED_NAME, line)

    def _take(self, kept: _Attempt, rank: LocalRank, at: float, now: float) -> None:
        if rank.step <= kept.step and kept.step_at:
            return  # a step that was told of before
        if kept.paced:
            kept.add(THROUGHPUT, at, rank.step, (rank.step - kept.step) / (now - kept.step_at))
        # A rank joins, warms up and makes its first steps in one: from there on a time is one of steps.
        kept.paced = bool(kept.step_at)
        kept.taken_at, kept.step, kept.step_at = now, rank.step, now
        if rank.timing is not None and rank.timing.step_s > 0:
            kept.add(STEP_TIME, at, rank.step, rank.timing.step_s)
        for name, value in rank.metrics.items():
            if name != STALL_METRIC and math.isfinite(value):
                kept.add(name, at, rank.step, value)

    def _attempt(self, job: JobState, rank: LocalRank, now: float) -> _Attempt:
        attempts = self._jobs.setdefault((job.name, job.uid), OrderedDict())
        self._jobs.move_to_end((job.name, job.uid))
        while len(self._jobs) > JOBS_MAX:
            self._jobs.popitem(last=False)
        if job.attempt not in attempts:
            kept = attempts[job.attempt] = _Attempt(rank.rank, began_at=now, kept_at=now)
            self._go_on(job, kept)
            while len(attempts) > ATTEMPTS_MAX:
                attempts.popitem(last=False)
        return attempts[job.attempt]

    def _go_on(self, job: JobState, kept: _Attempt) -> None:
        """Take up what a former life of the agent has written down of this attempt."""
        found = b""
        with contextlib.suppress(OSError):
            found = self._recall(
                job.name, job.uid, job.attempt, curves.ARCHIVED_NAME, 2 * curves.LINE_BYTES_MAX
            )
        for curve in curves.newest(found):
            if (curve.attempt, curve.rank) == (job.attempt, kept.rank):
                for at, step, value in curve.points:
                    kept.add(curve.name, at, step, value)


def _curves(attempt: Attempt, found: _Attempt, points_max: int) -> list[Curve]:
    return [
        Curve(name, attempt, found.rank, tuple(ring.points(points_max))) for name, ring in found.rings.items()
    ]
