"""What ranks reported over time, for whoever draws it: loss, step time, throughput, stalls, uploads.

Of each attempt the first rank of this machine is kept, in memory and bounded:
a restarted agent begins anew. Read off the agent's states, before and after each
event, so that the core knows nothing of it. ``see`` is called by the thread
that supervises, ``read`` by those that answer.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from dtrain.agent.core.ring import Ring
from dtrain.agent.core.state import AgentState, JobState, LocalRank
from dtrain.protocol.ids import Attempt, JobName, Rank, Seq, Uid
from dtrain.protocol.snapshot import WorkerPhase

POINTS = 400
"""Of one number in one attempt: 24 bytes each."""

NAMES_MAX = 12
ATTEMPTS_MAX = 8
JOBS_MAX = 64
EVERY_S = 0.5
"""A number is taken no more often than this."""

STEP_TIME, THROUGHPUT, STALL, UPLOAD = "step_s", "throughput", "stall_s", "upload_s"
"""Ours; a rank's own numbers have the names that its script gave them."""

STALL_METRIC = "checkpoint_stall_s"
"""Under this name a rank reports how long it stood still for its newest snapshot."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One number of one attempt: (epoch seconds, step, value), in order of time."""

    name: str
    attempt: Attempt
    rank: Rank
    points: tuple[tuple[float, int, float], ...]


@dataclass(slots=True)
class _Attempt:
    rank: Rank
    rings: dict[str, Ring] = field(default_factory=dict)
    taken_at: float = float("-inf")
    step: int = 0
    step_at: float = 0.0
    sealed_at: dict[Seq, float] = field(default_factory=dict)

    def add(self, name: str, at: float, step: int, value: float) -> None:
        ring = self.rings.get(name)
        if ring is None:
            if len(self.rings) >= NAMES_MAX:
                return
            ring = self.rings[name] = Ring(POINTS)
        ring.add(at, step, value)


_Job = tuple[JobName, Uid]


class Series:
    """Curves of the jobs that ran here lately."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
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
            return [
                Curve(name, attempt, found.rank, tuple(ring.points(points_max)))
                for attempt, found in attempts.items()
                for name, ring in found.rings.items()
            ]

    def _see_job(self, old: JobState | None, job: JobState, now: float) -> None:
        rank = min(job.ranks, key=lambda one: one.rank)
        was = old.rank(rank.rank) if old is not None else None
        if was is rank and old is not None and old.durable is job.durable:
            return
        kept = self._attempt(job, rank)
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

    def _take(self, kept: _Attempt, rank: LocalRank, at: float, now: float) -> None:
        if rank.step <= kept.step and kept.step_at:
            return  # a step that was told of before
        if kept.step_at and rank.step > kept.step:
            kept.add(THROUGHPUT, at, rank.step, (rank.step - kept.step) / (now - kept.step_at))
        kept.taken_at, kept.step, kept.step_at = now, rank.step, now
        if rank.timing is not None and rank.timing.step_s > 0:
            kept.add(STEP_TIME, at, rank.step, rank.timing.step_s)
        for name, value in rank.metrics.items():
            if name != STALL_METRIC and math.isfinite(value):
                kept.add(name, at, rank.step, value)

    def _attempt(self, job: JobState, rank: LocalRank) -> _Attempt:
        attempts = self._jobs.setdefault((job.name, job.uid), OrderedDict())
        self._jobs.move_to_end((job.name, job.uid))
        while len(self._jobs) > JOBS_MAX:
            self._jobs.popitem(last=False)
        if job.attempt not in attempts:
            attempts[job.attempt] = _Attempt(rank.rank)
            while len(attempts) > ATTEMPTS_MAX:
                attempts.popitem(last=False)
        return attempts[job.attempt]
