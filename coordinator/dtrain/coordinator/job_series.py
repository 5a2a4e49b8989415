"""What the records in etcd tell of jobs and agents, as series: read when a scrape asks.

Counters are those of ``JobStatus.tally``, so that a change of leader neither resets nor
doubles them, and a job's series end with its record. Only the leader shows series of single
jobs: the same ones from every replica would have to be told apart by whoever adds them up.

A scrape is bounded: so many jobs, so many snapshots per job, and no more than a twentieth
of the time, however large the cluster is and however often somebody asks.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from dtrain.coordinator import metrics
from dtrain.coordinator.core import stragglers
from dtrain.coordinator.core.stamps import parse_iso
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Latest
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobPhase, JobSpec, JobStatus, Member
from dtrain.protocol.keys import Keys
from dtrain.protocol.ledger import Ledger, counters, goodput
from dtrain.protocol.snapshot import NodeRecord, WorkerSnapshot
from dtrain.runtime.metrics import Metric, Samples
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")

COUNT_AGAIN_S = 5.0
"""However often somebody scrapes, records are read no more often than this."""

REST_SHARE = 20.0
"""Reading that took so long is not repeated before so many times that has passed."""

JOBS_MAX = 1000
"""Jobs with series of their own: those that have not ended first, then the newest."""

MEMBERS_MAX = 64
"""Machines of a job whose snapshots are read: ranks of a synchronous job are at the same step."""

SNAPSHOTS_MAX = 1000
"""Over all jobs. One of 8 ranks takes a quarter of a millisecond, and probes wait meanwhile."""

STRAGGLERS_MAX = 8
"""Machines of named stragglers that are read beyond that, of each job."""

AGENT_STATES = ("ready", "cordoned", "draining", "blocked", "lost")

_Found = dict[Metric, dict[tuple[str, ...], float]]


@dataclass(slots=True)
class _Progress:
    """When a job's step was last seen to rise, in this attempt or a former one."""

    of: Uid
    step: int
    at: float


class JobSeries:
    """Reads the mirror. One thread at a time; ``lost`` counts agents that the driver misses."""

    def __init__(
        self,
        keys: Keys,
        mirror: Mirror,
        *,
        lost: Callable[[], int],
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._mirror = mirror
        self._lost = lost
        self._monotonic = monotonic
        self._wall = wall
        self._again_at = float("-inf")
        self._found: Samples = {}
        self._led = False
        self._members = MEMBERS_MAX
        self._decoded: dict[str, tuple[int, object]] = {}
        """By key: its revision and what it holds, so that only news is decoded."""
        self._former: dict[str, tuple[int, object]] = {}
        self._progress: dict[JobName, _Progress] = {}
        self._shown_s: dict[tuple[JobName, Uid], dict[str, float]] = {}
        """Seconds by category as they were shown last."""

    def samples(self, *, leads: bool) -> Samples:
        """Return the counts of all, and for a leader the series of each job."""
        now = self._monotonic()
        if now < self._again_at and leads == self._led:
            return self._found
        self._led = leads
        self._former, self._decoded = self._decoded, {}
        found: _Found = {metrics.JOBS: {(phase.value,): 0.0 for phase in JobPhase}}
        found[metrics.AGENTS] = self._agents()
        self._jobs(found, leads=leads)
        self._former = {}
        self._found = found
        self._again_at = now + max(COUNT_AGAIN_S, REST_SHARE * (self._monotonic() - now))
        return found

    def _jobs(self, found: _Found, *, leads: bool) -> None:
        specs: set[JobName] = set()
        statuses: dict[JobName, JobStatus] = {}
        unreadable: set[JobName] = set()
        for kv in self._mirror.prefix(self._keys.jobs):
            if not kv.key.endswith(("/spec", "/status")):
                continue
            parsed = self._keys.parse(kv.key)
            if parsed is None:
                continue
            if parsed.kind == "spec":
                specs.add(parsed.job)
            elif parsed.kind == "status":
                status = self._decode(JobStatus, kv)
                if status is None:
                    unreadable.add(parsed.job)
                else:
                    statuses[parsed.job] = status
        counts = found[metrics.JOBS]
        for status in statuses.values():
            counts[status.phase.value,] += 1
        # Submitted, and no leader has looked at it yet.
        counts[JobPhase.QUEUED.value,] += len(specs - statuses.keys() - unreadable)
        if not leads:
            self._progress.clear()
            self._shown_s.clear()
            return
        shown = sorted(statuses, key=lambda job: _order(statuses[job]))[:JOBS_MAX]
        found[metrics.JOBS_UNSHOWN] = {(): float(len(statuses) - len(shown))}
        placed = sum(statuses[job].phase in PLACED_PHASES for job in shown)
        self._members = max(1, min(MEMBERS_MAX, SNAPSHOTS_MAX // max(1, placed)))
        for job in shown:
            self._job(found, job, statuses[job])
        for gone in self._progress.keys() - statuses.keys():
            del self._progress[gone]
        current = {(job, statuses[job].uid) for job in shown}
        self._shown_s = {of: spent for of, spent in self._shown_s.items() if of in current}

    def _job(self, found: _Found, job: JobName, status: JobStatus) -> None:
        def show(metric: Metric, value: float | None, *labels: str) -> None:
            if value is not None:
                found.setdefault(metric, {})[(job, *labels)] = value

        workers = self._workers(job, status)
        steps = [rank.step for worker in workers for rank in worker.ranks]
        over = status.phase in TERMINAL_PHASES
        step = status.step if over or not steps else max(status.step, min(steps))
        tally = status.tally
        show(metrics.STEP, float(step))
        show(metrics.PHASE_AT, parse_iso(status.since))
        for why, count in tally.attempts.items():
            show(metrics.ATTEMPTS, float(count), why)
        show(metrics.COMMITS, float(tally.commits))
        show(metrics.COMMITTED_BYTES, float(tally.committed_bytes))
        for why, count in tally.aborts.items():
            show(metrics.CHECKPOINT_FAILURES, float(count), why)
        self._checkpoint(show, job, status)
        if status.ledger is not None:
            show(metrics.GOODPUT, goodput(status.ledger, self._wall()).ratio)
            for category, seconds in self._spent(job, status.uid, status.ledger).items():
                show(metrics.TIME, seconds, category)
        if status.phase is not JobPhase.RUNNING or status.held:
            self._progress.pop(job, None)
            return
        show(metrics.PROGRESS_AT, self._progressed(job, status.uid, step))
        usual_s = _usual_s(workers)
        show(metrics.STEP_USUAL, usual_s)
        show(metrics.INTERVAL, self._interval_s(job, status.uid, usual_s))
        for agent, ratio in _stragglers(status, workers).items():
            show(metrics.STRAGGLER, ratio, agent)

    def _checkpoint(self, show: Callable[..., None], job: JobName, status: JobStatus) -> None:
        latest = self._read(Latest, self._keys.latest(job))
        if latest is None:
            return
        commit = self._read(CommitRecord, self._keys.checkpoint(job, latest.seq))
        if commit is not None and commit.uid == status.uid:
            show(metrics.COMMITTED_STEP, float(commit.step))
            show(metrics.COMMITTED_AT, parse_iso(commit.committed_at))

    def _workers(self, job: JobName, status: JobStatus) -> list[WorkerSnapshot]:
        if status.phase not in PLACED_PHASES:
            return []
        found = (
            self._read(WorkerSnapshot, self._keys.worker(member.agent, job))
            for member in self._sample(status)
        )
        current = (status.uid, status.attempt)
        return [one for one in found if one is not None and (one.uid, one.attempt) == current]

    def _sample(self, status: JobStatus) -> tuple[Member, ...]:
        first = status.members[: self._members]
        slow = set(status.stragglers)
        hosts = [
            member
            for member in (status.members[self._members :] if slow else ())
            if not slow.isdisjoint(range(member.first_rank, member.first_rank + member.nproc))
        ]
        return (*first, *hosts[:STRAGGLERS_MAX])

    def _progressed(self, job: JobName, uid: Uid, step: int) -> float:
        known = self._progress.get(job)
        if known is None or known.of != uid:
            known = self._progress[job] = _Progress(uid, step, self._wall())
        elif step != known.step:
            # Lower after a restore: steps that are done again are progress, too.
            known.step, known.at = step, self._wall()
        return known.at

    def _spent(self, job: JobName, uid: Uid, ledger: Ledger) -> dict[str, float]:
        """The ledger's counters, kept from falling: Prometheus would take that for a start from nothing."""
        former = self._shown_s.get((job, uid), {})
        spent = {name: max(seconds, former.get(name, 0.0)) for name, seconds in counters(ledger).items()}
        self._shown_s[job, uid] = spent
        return spent

    def _interval_s(self, job: JobName, uid: Uid, usual_s: float | None) -> float | None:
        spec = self._read(JobSpec, self._keys.spec(job))
        if spec is None or spec.uid != uid:
            return None
        policy = spec.checkpoint
        intervals = [policy.every_seconds] if policy.every_seconds else []
        if policy.every_steps and usual_s:
            intervals.append(policy.every_steps * usual_s)
        return min(intervals, default=None)

    def _agents(self) -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {(state,): 0.0 for state in AGENT_STATES}
        cordoned = {
            parsed.agent
            for kv in self._mirror.prefix(f"{self._keys.root}cordons/")
            if (parsed := self._keys.parse(kv.key)) is not None
        }
        for kv in self._mirror.prefix(self._keys.agents):
            if not kv.key.endswith("/node"):
                continue
            parsed = self._keys.parse(kv.key)
            if parsed is None or parsed.kind != "node":
                continue
            state = "cordoned" if parsed.agent in cordoned else _state(self._decode(NodeRecord, kv))
            counts[state,] += 1
        counts["lost",] = float(self._lost())
        return counts

    # Reading.

    def _read(self, kind: type[T], key: str) -> T | None:
        kv = self._mirror.get(key)
        return None if kv is None else self._decode(kind, kv)

    def _decode(self, kind: type[T], kv: KeyValue) -> T | None:
        """Return what a record holds; None: it cannot be read, which others tell of."""
        revision, value = self._former.get(kv.key, (0, None))
        if revision != kv.mod_revision:
            try:
                value = codec.decode(kind, kv.value)
            except DtrainError:
                value = None
        self._decoded[kv.key] = (kv.mod_revision, value)
        return value if isinstance(value, kind) else None


def _order(status: JobStatus) -> tuple[bool, float]:
    """Those that have not ended first, then the newest end."""
    over = status.phase in TERMINAL_PHASES
    return over, -(parse_iso(status.finished_at) or 0.0) if over else 0.0


def _state(node: NodeRecord | None) -> str:
    if node is None:
        # Of another version, perhaps: nothing is placed there.
        return "blocked"
    if node.draining is not None:
        return "draining"
    return "blocked" if node.problem else "ready"


def _usual_s(workers: Iterable[WorkerSnapshot]) -> float | None:
    known = [
        rank.timing.step_s
        for worker in workers
        for rank in worker.ranks
        if rank.timing and rank.timing.step_s
    ]
    return statistics.median(known) if known else None


def _stragglers(status: JobStatus, workers: list[WorkerSnapshot]) -> dict[str, float]:
    """The slowest named rank of each machine, if it still is slow."""
    if not status.stragglers:
        return {}
    ratios: dict[str, float] = {}
    for rank, slow in stragglers.compare(workers).items():
        if rank in status.stragglers and slow.usual_s > 0:
            ratios[slow.agent] = max(ratios.get(slow.agent, 0.0), slow.own_s / slow.usual_s)
    return ratios
