"""The only loop: queue, plan, commit, send, schedule.

``Driver`` is an event machine without threads, clocks or I/O: it is told what
happened, and answers through its ports. Production and the simulation drive the
same class. Order is its one promise: nothing is decided before the mirror has
reached the own term, a job is not looked at again before the outcome of its
last decision is known and seen, and commands leave only after their decision is
durable. Whatever is dropped on the way is asked for again by the next plan.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dtrain.coordinator.core.decisions import (
    Decision,
    Directed,
    InspectCheckpoint,
    PutRecord,
    SweepOrphans,
    VerifyCheckpoint,
    Work,
)
from dtrain.coordinator.core.views import FleetView, Inspection, JobView, Moment, SweepFound
from dtrain.coordinator.known import stamped
from dtrain.coordinator.persistence import Committed, Conflict, Deposed, NotWritten, Outcome, Unknown
from dtrain.coordinator.results import Collected, Inspected, Probed, Swept, Verified, WorkCrashed, WorkResult
from dtrain.coordinator.world import World
from dtrain.protocol.commands import Warm
from dtrain.protocol.ids import AgentName, JobName, Term
from dtrain.protocol.job import JobStatus
from dtrain.storage.etcd.mirror import Change

Plan = Callable[[JobView, FleetView, Moment], Decision]

RESYNC_S = 300.0
"""Every job is looked at this often, whatever happened: no lost nudge lasts longer."""

JOBS_PER_TURN = 32
"""Bounds one call, so that a large queue cannot starve the loop's heartbeat."""

CRASHES_MAX = 3
QUARANTINE_S = 60.0
CRASH_RETRY_S = 1.0
RESEND_FAILED_S = 0.25
WORK_AGAIN_S = 1.0
"""Work that has just ended is not begun again at once, however often it is asked for."""

CLEAN_AGAIN_S = 10.0
"""The same for deleting what nobody needs, when the store did not let it: there is no hurry."""

_BACKOFF_S = (0.0, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class DriverPorts(Protocol):
    """What the driver can do. Calls return at once; answers come back as events."""

    def commit(self, job: JobName, term: Term, decision: Decision) -> None:
        """Begin the transaction of ``decision``, fenced by ``term``; answers by ``on_txn``."""
        ...

    def send(self, directed: Directed) -> None:
        """Send a command if this replica may still act; answers by ``on_command``, or never."""
        ...

    def start_work(self, job: JobName, work: Work) -> None:
        """Begin background work; answers by ``on_work``."""
        ...

    def log(self, event: str, **fields: Any) -> None:
        """Write one line."""
        ...

    def moment(self, now: float) -> Moment:
        """Return the inputs of a decision that are not state."""
        ...


@dataclass(slots=True)
class _Sent:
    at: float
    failed: bool = False


@dataclass(slots=True)
class _Track:
    """The driver's own book on one job."""

    in_flight: Decision | None = None
    reach: int = 0
    """The mirror revision before which the job is not looked at."""
    not_before: float = 0.0
    wake_at: float | None = None
    setbacks: int = 0
    """Conflicts and failed commits in a row."""
    told: str = ""
    """The setback that was logged last."""
    crashes: int = 0
    reason: str = ""
    sent: dict[tuple[AgentName, str], _Sent] = field(default_factory=dict)


class Driver:
    """Decides about all jobs while this replica leads. Not thread-safe."""

    def __init__(self, world: World, plan: Plan, ports: DriverPorts) -> None:
        self.world = world
        self._plan = plan
        self._ports = ports
        self._term: Term | None = None
        self._took_office_at: float | None = None
        self._revision = 0
        self._now = 0.0
        self._dirty: dict[JobName, None] = {}
        """A set in order of arrival."""
        self._tracks: dict[JobName, _Track] = {}
        self._heap: list[tuple[float, JobName]] = []
        self._working: dict[tuple[JobName, Work], float] = {}
        self._worked_at: dict[tuple[JobName, Work], float] = {}
        self._unseen: dict[JobName, int] = {}
        """Jobs whose slots stay reserved until the mirror has reached this revision."""
        self._resync_at = 0.0
        self._brake = ""
        self._turning = False

    @property
    def leads(self) -> bool:
        """This replica holds a term and has seen all that happened before it."""
        return self._took_office_at is not None

    @property
    def term(self) -> Term | None:
        """The term held, acting or not yet."""
        return self._term

    @property
    def brake(self) -> str:
        """Why this leader declares nobody lost now, or ""; the same for a standby."""
        return self._brake if self.leads else ""

    @property
    def wake_at(self) -> float | None:
        """When ``on_tick`` wants to be called at the latest; None: only an event matters."""
        if not self.leads:
            return None
        if any(self._is_due(job, self._now) for job in self._dirty):
            return self._now
        instants = [self._resync_at]
        if self._heap:
            instants.append(self._heap[0][0])
        if (brake_at := self.world.brake_changes_at(self._now)) is not None:
            instants.append(brake_at)
        return min(instants)

    # Events.

    def on_changes(self, changes: Iterable[Change], revision: int, now: float) -> None:
        """The mirror has reached ``revision`` by these changes."""
        self.world.apply(changes, now)
        self._revision = max(self._revision, revision)
        for job in [name for name, reach in self._unseen.items() if reach <= self._revision]:
            del self._unseen[job]
            self.world.reserve(job, None)
        self._take_office(now)
        self._turn(now)

    def on_heard(self, at: float, now: float) -> None:
        """The mirror was known to be complete at ``at``, with or without changes."""
        self.world.heard(at)
        self._turn(now)

    def on_term(self, term: Term, now: float) -> None:
        """This replica has become leader."""
        self._term = term
        self._took_office_at = None
        self._tracks.clear()
        self._heap.clear()
        self._worked_at.clear()
        self._unseen.clear()
        self.world.forget_local()
        self._ports.log("term won", term=term, revision=self._revision)
        self._take_office(now)
        self._turn(now)

    def on_term_lost(self) -> None:
        """This replica leads no more: nothing is decided or sent from here on."""
        if self._term is not None:
            self._ports.log("term lost", term=self._term)
        self._term = self._took_office_at = None

    def on_txn(self, job: JobName, outcome: Outcome, now: float) -> None:
        """The outcome of the last commit of ``job``."""
        track = self._tracks.get(job)
        if not self.leads or track is None or track.in_flight is None:
            return
        decision, track.in_flight = track.in_flight, None
        self._dirty[job] = None
        match outcome:
            case Committed(revision):
                track.reach, track.setbacks, track.told = revision, 0, ""
                self._perform(job, track, decision, now)
            case Conflict(revision) | Unknown(revision):
                track.reach = revision
                self._setback(job, track, type(outcome).__name__.lower(), now)
            case NotWritten(problem, True):
                self._setback(job, track, problem, now)
            case NotWritten(problem, False):
                self._crashed(job, track, f"etcd refuses what was decided: {problem}", now)
            case Deposed():
                self.on_term_lost()
                return
        if isinstance(outcome, (Committed, Unknown)) and track.reach > self._revision:
            # Until the mirror shows what was written, only this keeps other jobs off its slots.
            self._unseen[job] = track.reach
        else:
            self.world.reserve(job, None)
        self._turn(now)

    def on_command(self, directed: Directed, ok: bool, problem: str, now: float) -> None:
        """A command was taken on (``ok``), or not. ``problem`` "rejected: ...": the agent answered."""
        job = directed.command.header.job
        sent = self._track(job).sent.get((directed.agent, directed.command.header.id))
        if not ok:
            self._ports.log(
                "command failed",
                job=job,
                agent=directed.agent,
                command=type(directed.command).__name__,
                id=directed.command.header.id,
                problem=problem,
            )
            if sent is not None:
                sent.failed, sent.at = True, now
                self._wake(job, now + RESEND_FAILED_S)
        self.world.record_reached(directed.agent, ok or problem.startswith("rejected"), now)
        self._turn(now)

    def on_work(self, job: JobName, result: WorkResult, now: float) -> None:
        """Background work has ended."""
        key = (job, result.work)
        began_at = self._working.pop(key, now)
        self._worked_at[key] = now
        problem = ""
        match result:
            case Verified(_, verdict):
                self.world.record_verdict(job, stamped(verdict, now))
                self.world.record_unknown(job, verdict.unknown)
                problem = verdict.problem
            case Collected(work, problem):
                if not problem:
                    self.world.record_collected(job, work.garbage.seq)
            case Swept(work, deleted, problem, retry, unknown):
                self.world.record_unknown(job, unknown)
                if not retry:
                    # When it began: what was written since, it may not have seen.
                    self.world.record_swept(job, work.uid, began_at, SweepFound(deleted, problem))
                if deleted:
                    self._ports.log("orphans deleted", job=job, blobs=deleted)
            case Probed(_, problem):
                self.world.record_probe(job, problem, now)
            case Inspected(inspected, damage, problem, read):
                self.world.record_inspection(job, inspected, Inspection(began_at, damage, problem, read))
            case WorkCrashed(InspectCheckpoint() as inspected, problem):
                # Recorded, or it would be asked for again every second.
                self.world.record_inspection(job, inspected, Inspection(began_at, None, problem))
            case WorkCrashed(_, problem):
                pass
        if problem and isinstance(result, (Collected, Swept)):
            self._worked_at[key] = now + CLEAN_AGAIN_S
        if problem:
            self._ports.log("work failed", job=job, work=type(result.work).__name__, problem=problem)
        self._dirty[job] = None
        self._turn(now)

    def on_tick(self, now: float) -> None:
        """Time has passed."""
        self.world.tidy(now)
        self._turn(now)

    # One turn.

    def _take_office(self, now: float) -> None:
        if self._term is None or self.leads or self._revision < self._term:
            return
        # Counted from here, not from the win: what went missing before is given a full TTL.
        self._took_office_at = now
        self._resync_at = now
        self._ports.log("leading", term=self._term, revision=self._revision, jobs=len(self.world.jobs()))

    def _turn(self, now: float) -> None:
        self._now = max(self._now, now)
        # A port may answer at once, from within a turn: the outer call goes on with it.
        if self._turning:
            return
        self._turning = True
        try:
            self._collect_due(now)
            for _ in range(JOBS_PER_TURN):
                job = next((name for name in self._dirty if self._is_due(name, now)), None)
                if job is None or not self.leads:
                    return
                del self._dirty[job]
                self._decide(job, now)
                self._collect_due(now)
        finally:
            self._turning = False

    def _collect_due(self, now: float) -> None:
        for sentence in self.world.problems:
            self._ports.log("record unusable", problem=sentence)
        self.world.problems.clear()
        for job in self.world.take_touched():
            self._dirty[job] = None
        if not self.leads:
            # A standby keeps no queue: taking office looks at every job.
            self._dirty.clear()
            return
        brake = self.world.brake(now)
        if brake != self._brake:
            self._ports.log("brake", on=bool(brake), reason=brake or "agents and etcd are back")
            self._brake = brake
            self._resync_at = now
        if now >= self._resync_at:
            self._resync_at = now + RESYNC_S
            self._forget_gone()
            for job in self.world.jobs():
                self._dirty[job] = None
        while self._heap and self._heap[0][0] <= now:
            at, job = heapq.heappop(self._heap)
            track = self._tracks.get(job)
            if track is not None and track.wake_at == at:
                track.wake_at = None
                self._dirty[job] = None
                if now < track.not_before:
                    self._wake(job, track.not_before)

    def _is_due(self, job: JobName, now: float) -> bool:
        track = self._tracks.get(job)
        return track is None or (
            track.in_flight is None and self._revision >= track.reach and now >= track.not_before
        )

    def _decide(self, job: JobName, now: float) -> None:
        assert self._term is not None
        assert self._took_office_at is not None
        track = self._track(job)
        view = self.world.job_view(job)
        if view.quarantined:
            self._say(job, track, f"left alone: {view.quarantined}")
            return
        fleet = self.world.fleet_view(job, now, term=self._term, took_office_at=self._took_office_at)
        try:
            decision = self._plan(view, fleet, self._ports.moment(now))
        except Exception as error:  # noqa: BLE001 - one job's poison must not stop the others
            self._crashed(job, track, f"{type(error).__name__}: {error}", now)
            return
        self._say(job, track, "; ".join(reason.text for reason in decision.reasons))
        if decision.wake_at is not None:
            self._wake(job, max(decision.wake_at, now + 0.001))
        if not decision.writes:
            track.crashes = track.setbacks = 0
            self._perform(job, track, decision, now)
            return
        track.in_flight = decision
        self.world.reserve(job, _status_in(decision))
        self._ports.commit(job, self._term, decision)

    def _perform(self, job: JobName, track: _Track, decision: Decision, now: float) -> None:
        track.crashes = 0
        asked = {(directed.agent, directed.command.header.id) for directed in decision.commands}
        track.sent = {key: sent for key, sent in track.sent.items() if key in asked}
        for directed in decision.commands:
            self._send(job, track, directed, now)
        for work in decision.work:
            self._start(job, work, now)

    def _send(self, job: JobName, track: _Track, directed: Directed, now: float) -> None:
        key = (directed.agent, directed.command.header.id)
        sent = track.sent.get(key)
        # Nobody waits for a spare: one that refuses is asked again at leisure.
        in_haste = sent is not None and sent.failed and not isinstance(directed.command, Warm)
        wait_s = RESEND_FAILED_S if in_haste else directed.retry_s
        if sent is not None and now < sent.at + wait_s:
            self._wake(job, sent.at + wait_s)
            return
        track.sent[key] = _Sent(now)
        self._wake(job, now + directed.retry_s)
        self._ports.send(directed)

    def _start(self, job: JobName, work: Work, now: float) -> None:
        key = (job, work)
        if key in self._working:
            return
        again_at = self._worked_at.get(key, -WORK_AGAIN_S) + WORK_AGAIN_S
        if key in self._worked_at and now < again_at:
            self._wake(job, again_at)
            return
        if isinstance(work, SweepOrphans) and self._verifies(job):
            # The last sweep of a job would miss the manifest that is just being written, for good.
            return
        self._working[key] = now
        self._ports.start_work(job, work)

    def _verifies(self, job: JobName) -> bool:
        return any(of == job and isinstance(work, VerifyCheckpoint) for of, work in self._working)

    # Setbacks.

    def _setback(self, job: JobName, track: _Track, what: str, now: float) -> None:
        wait_s = _BACKOFF_S[min(track.setbacks, len(_BACKOFF_S) - 1)]
        track.setbacks += 1
        if what != track.told:
            # An etcd that is away or full for an hour is one line, not one every two seconds.
            track.told = what
            self._ports.log("commit failed", job=job, problem=what, times=track.setbacks)
        self._hold(job, track, now + wait_s)

    def _crashed(self, job: JobName, track: _Track, problem: str, now: float) -> None:
        track.crashes += 1
        quarantined = track.crashes >= CRASHES_MAX
        self._ports.log("plan failed", job=job, problem=problem, times=track.crashes, quarantined=quarantined)
        self._hold(job, track, now + (QUARANTINE_S if quarantined else CRASH_RETRY_S))

    def _hold(self, job: JobName, track: _Track, until: float) -> None:
        track.not_before = until
        self._dirty[job] = None
        self._wake(job, until)

    # Book-keeping.

    def _track(self, job: JobName) -> _Track:
        return self._tracks.setdefault(job, _Track())

    def _wake(self, job: JobName, at: float) -> None:
        track = self._track(job)
        if track.wake_at is not None and track.wake_at <= at:
            return
        track.wake_at = at
        heapq.heappush(self._heap, (at, job))

    def _say(self, job: JobName, track: _Track, reason: str) -> None:
        if reason and reason != track.reason:
            track.reason = reason
            self._ports.log("job", job=job, reason=reason)

    def _forget_gone(self) -> None:
        known = set(self.world.jobs())
        for job in [name for name in self._tracks if name not in known]:
            if self._tracks[job].in_flight is None:
                del self._tracks[job]
        for key in [key for key, at in self._worked_at.items() if self._now - at > RESYNC_S]:
            del self._worked_at[key]


def _status_in(decision: Decision) -> JobStatus | None:
    for write in decision.writes:
        if isinstance(write, PutRecord) and isinstance(write.value, JobStatus):
            return write.value
    return None
