"""What chaos sees of a cluster, and what it calls recovered. Everything is read from etcd.

``Eyes`` read, ``Sight`` is what they saw at one moment, and ``missing`` compares
two sights: pure, and the definition of recovery.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord, ReplicaRecord
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord, WorkerPhase, WorkerSnapshot
from dtrain.storage.etcd.port import Etcd, KeyValue, prefix_end

T = TypeVar("T")

_BUSY = (WorkerPhase.TRAINING, WorkerPhase.CHECKPOINTING, WorkerPhase.DONE)


@dataclass(frozen=True, slots=True)
class RankSight:
    """One live rank of a job's current attempt."""

    agent: str
    pid: int
    step: int
    busy: bool
    done: bool = False
    """It has done all its steps."""


@dataclass(frozen=True, slots=True)
class JobSight:
    """One job: where it stands, by its status and its agents' snapshots."""

    uid: str
    phase: JobPhase
    attempt: int
    world: int
    base: int
    """The step its attempt began from."""
    agents: tuple[str, ...] = ()
    ranks: Mapping[int, RankSight] = field(default_factory=dict)
    reason: str = ""
    trained: bool = False
    """It has trained before: an earlier fault may have interrupted it. Nobody but chaos knows."""

    @property
    def trains(self) -> bool:
        """All its ranks do steps."""
        full = len(self.ranks) == self.world > 0
        return (
            self.phase is JobPhase.RUNNING
            and full
            and all(rank.busy or rank.done for rank in self.ranks.values())
        )


@dataclass(frozen=True, slots=True)
class Sight:
    """A cluster at one moment."""

    leader: str = ""
    term: int = 0
    coordinators: Mapping[str, ReplicaRecord] = field(default_factory=dict)
    agents: Mapping[str, NodeRecord] = field(default_factory=dict)
    jobs: Mapping[str, JobSight] = field(default_factory=dict)

    @property
    def daemons(self) -> frozenset[str]:
        """Everything that is registered."""
        return frozenset(self.coordinators) | frozenset(self.agents)


class Eyes:
    """Looks at one cluster through etcd; raises what the port raises while etcd is away."""

    def __init__(self, etcd: Etcd, keys: Keys) -> None:
        self._etcd = etcd
        self._keys = keys

    def look(self, jobs: Sequence[str] | None = None) -> Sight:
        """Return what there is; only these jobs if they are named, which is cheaper."""
        agents, snapshots = self._agents()
        seen = {}
        for name, status in self._statuses(jobs).items():
            seen[name] = _job(status, [one for job, one in snapshots if job == name])
        leader, term = self._leader()
        replicas = {}
        for item in self._under(f"{self._keys.root}coordinators/"):
            record = _decode(ReplicaRecord, item)
            if record is not None:
                replicas[item.key.rpartition("/")[2]] = record
        return Sight(leader, term, replicas, agents, seen)

    def _leader(self) -> tuple[str, int]:
        for item in self._etcd.range(self._keys.leader, deadline_s=3.0).items:
            record = _decode(LeaderRecord, item)
            if record is not None:
                return str(record.replica), item.create_revision
        return "", 0

    def _agents(self) -> tuple[dict[str, NodeRecord], list[tuple[JobName, WorkerSnapshot]]]:
        nodes: dict[str, NodeRecord] = {}
        snapshots: list[tuple[JobName, WorkerSnapshot]] = []
        for item in self._under(self._keys.agents):
            parsed = self._keys.parse(item.key)
            if parsed is not None and parsed.kind == "node":
                node = _decode(NodeRecord, item)
                if node is not None:
                    nodes[str(parsed.agent)] = node
            elif parsed is not None and parsed.kind == "worker":
                snapshot = _decode(WorkerSnapshot, item)
                if snapshot is not None:
                    snapshots.append((parsed.job, snapshot))
        return nodes, snapshots

    def _statuses(self, jobs: Sequence[str] | None) -> dict[str, JobStatus]:
        if jobs is None:
            found = {
                item.key: _decode(JobStatus, item)
                for item in self._under(self._keys.jobs)
                if _is_status(item)
            }
        else:
            keys = [self._keys.status(JobName(job)) for job in jobs]
            found = {key: self._decoded(JobStatus, key) for key in keys}
        return {key.split("/")[-2]: status for key, status in found.items() if status is not None}

    def _under(self, prefix: str) -> tuple[KeyValue, ...]:
        return self._etcd.range(prefix, prefix_end(prefix), deadline_s=3.0).items

    def _decoded(self, kind: type[T], key: str) -> T | None:
        found = self._etcd.range(key, deadline_s=3.0).items
        return _decode(kind, found[0]) if found else None


def _job(status: JobStatus, snapshots: Sequence[WorkerSnapshot]) -> JobSight:
    ranks = {}
    for snapshot in snapshots:
        if snapshot.attempt != status.attempt or snapshot.uid != status.uid:
            continue
        for state in snapshot.ranks:
            if state.exit_code is None or state.phase is WorkerPhase.DONE:
                ranks[int(state.rank)] = RankSight(
                    str(snapshot.agent),
                    state.pid,
                    int(state.step),
                    busy=snapshot.phase in _BUSY,
                    done=state.last_step is not None or state.phase is WorkerPhase.DONE,
                )
    return JobSight(
        str(status.uid),
        status.phase,
        int(status.attempt),
        status.world_size,
        int(status.restore.step) if status.restore else 0,
        tuple(str(member.agent) for member in status.members),
        ranks,
        status.reason,
    )


def missing(before: Sight, now: Sight) -> str:
    """Return "" if everything that worked ``before`` works again, else what does not.

    There must be a leader, and each job that trains, or did before an earlier fault,
    must have ended well or have done a step since, on every rank. Who is registered
    is ``away``.
    """
    if not now.leader:
        return "there is no leader"
    for name, job in before.jobs.items():
        if not (job.trains or job.trained):
            continue
        found = now.jobs.get(name)
        if found is None:
            return f"the status of {name} is gone"
        if found.uid != job.uid or found.phase in TERMINAL_PHASES:
            continue
        if not found.trains:
            return f"{name} is {found.phase}: {found.reason}"
        for number, rank in found.ranks.items():
            was = job.ranks.get(number)
            same = was is not None and found.attempt == job.attempt
            # One step may have been on its way to us when the fault struck.
            floor = was.step + 1 if was is not None and same else found.base
            if rank.step <= floor and not rank.done:
                return f"rank {number} of {name} has done no step since"
    return ""


def away(expected: frozenset[str], now: Sight) -> str:
    """Return "" if all of ``expected`` are registered, else who is not."""
    lacking = sorted(expected - now.daemons)
    return f"not registered: {', '.join(lacking)}" if lacking else ""


def failed(before: Sight, now: Sight) -> list[str]:
    """Return a sentence for each job that was unfinished ``before`` and has FAILED since."""
    return [
        f"{name} FAILED: {job.reason}"
        for name, job in now.jobs.items()
        if job.phase is JobPhase.FAILED
        and (name not in before.jobs or before.jobs[name].phase is not JobPhase.FAILED)
    ]


def _is_status(item: KeyValue) -> bool:
    return item.key.endswith("/status")


def _decode(kind: type[T], item: KeyValue) -> T | None:
    try:
        return codec.decode(kind, item.value)
    except Refused:
        # The auditor names records that cannot be read.
        return None
