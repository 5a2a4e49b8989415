"""Records as the replicas serve them, grouped by what they are about. Pure.

Each record is kept twice: decoded for tables, and as the JSON it was stored
as for ``-o json``. A record of a newer version is skipped in tables, with a note.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dtrain.cli import exits
from dtrain.cli.answers import Item, Reading
from dtrain.protocol import codec, summaries
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord, Quarantine, Verification
from dtrain.protocol.cluster import Cordon, LeaderRecord, ReplicaRecord, Suspicion
from dtrain.protocol.errors import Refused
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobPhase, JobSpec, JobStatus
from dtrain.protocol.keys import Keys, Parsed
from dtrain.protocol.rows import AgentRow, JobRow
from dtrain.protocol.snapshot import NodeRecord, RankState, WorkerSnapshot
from dtrain.protocol.standing import reported_step
from dtrain.protocol.summaries import Part
from dtrain.runtime import redact

T = TypeVar("T")
Json = dict[str, Any]

# Keys are parsed relative to the root, so that no cluster name is needed.
_KEYS = Keys(ClusterName("any"))

_FOLDERS = {
    **{kind: kind for kind in ("open", "garbage", "bad", "verified")},
    "checkpoint": "checkpoints",
    "event": "events",
    "pin": "pins",
    "order": "orders",
}
"""Where the documents of a kind of record stand in a job's."""

_HISTORY = {"open", "garbage", "bad", "verified", "checkpoint", "event"}


@dataclass(slots=True)
class Job:
    """Everything stored about one job."""

    name: str
    spec: JobSpec | None = None
    intent: Intent | None = None
    status: JobStatus | None = None
    latest: Latest | None = None
    open: dict[int, OpenRecord] = field(default_factory=dict)
    commits: dict[int, CommitRecord] = field(default_factory=dict)
    garbage: dict[int, Garbage] = field(default_factory=dict)
    bad: dict[int, Quarantine] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    verified: dict[int, Verification] = field(default_factory=dict)
    orders: set[str] = field(default_factory=set)
    """Ids of requests about checkpoints that the leader has not answered yet."""
    events: dict[int, EventRecord] = field(default_factory=dict)
    workers: dict[str, WorkerSnapshot] = field(default_factory=dict)
    raw: Json = field(default_factory=dict)

    @property
    def phase(self) -> JobPhase:
        """QUEUED until a leader has looked at it."""
        return self.status.phase if self.status else JobPhase.QUEUED

    @property
    def finished(self) -> bool:
        """It has ended for good."""
        return self.phase in TERMINAL_PHASES

    @property
    def attempt(self) -> int:
        """Number of the current attempt, 0 for none."""
        return self.status.attempt if self.status else 0

    @property
    def current_workers(self) -> dict[str, WorkerSnapshot]:
        """Snapshots of the current attempt of this submission."""
        if self.status is None:
            return {}
        return {
            agent: snapshot
            for agent, snapshot in self.workers.items()
            if snapshot.uid == self.status.uid and snapshot.attempt == self.status.attempt
        }

    @property
    def ranks(self) -> dict[int, tuple[str, RankState]]:
        """Rank to (agent, state) in the current attempt."""
        found = {
            state.rank: (agent, state)
            for agent, snapshot in self.current_workers.items()
            for state in snapshot.ranks
        }
        return dict(sorted(found.items()))

    def row(self, now: float) -> JobRow:
        """What a list shows of it at ``now`` (epoch seconds), without its place in the queue."""
        parts = {agent: _part(snapshot) for agent, snapshot in self.workers.items()}
        return summaries.job_row(
            self.name, self.spec, self.status, intent=self.intent, latest=self.latest, parts=parts, now=now
        )

    @property
    def reason(self) -> str:
        """The leader's sentence, and what its ranks add to it."""
        return summaries.reason(self.status, [_part(snapshot) for snapshot in self.current_workers.values()])

    @property
    def step(self) -> int:
        """Newest step that every reporting rank has completed, or the last one stored."""
        stored = self.status.step if self.status else 0
        ranks = () if self.finished else self.ranks.values()
        return reported_step(stored, (state.step for _, state in ranks))

    @property
    def world_size(self) -> int:
        """Ranks: of the current attempt, else as asked for."""
        return summaries.world_size(self.spec, self.intent, self.status)

    @property
    def nodes(self) -> tuple[int, int]:
        """Fewest and most machines: as scaled, else as in the job file."""
        return summaries.nodes(self.spec, self.intent)

    @property
    def budget_spent(self) -> bool:
        """It failed because it was restarted too often."""
        reason = EventReason.BUDGET_EXHAUSTED
        conditions = self.status.conditions if self.status else ()
        return any(condition.reason == reason for condition in conditions) or any(
            event.reason is reason and event.attempt in (0, self.attempt) for event in self.events.values()
        )

    @property
    def exit_code(self) -> int:
        """Exit code of its end; it must have ended."""
        return exits.of_phase(self.phase, budget_spent=self.budget_spent)

    def as_json(self, now: float | None = None) -> Json:
        """The records, with the fields that they are stored with; with ``now`` the numbers of a list, too."""
        found = {"v": 1, "kind": "Job", "name": self.name, **self.raw} | redacted(self.raw)
        return found if now is None else found | {"summary": codec.to_json(self.row(now))}


def redacted(raw: Json) -> Json:
    """The spec among a job's records with the secrets in its environment hidden; {} if there is none."""
    spec = raw.get("spec")
    if not isinstance(spec, dict):
        return {} if spec is None else {"spec": spec}
    env = spec.get("env")
    if not isinstance(env, dict):
        return {"spec": spec}
    return {"spec": {**spec, "env": redact.environment({name: str(value) for name, value in env.items()})}}


@dataclass(slots=True)
class Agent:
    """Everything stored about one machine."""

    name: str
    node: NodeRecord | None = None
    cordon: Cordon | None = None
    suspicion: Suspicion | None = None
    workers: dict[str, WorkerSnapshot] = field(default_factory=dict)
    raw: Json = field(default_factory=dict)

    @property
    def row(self) -> AgentRow:
        """What a list shows of it."""
        parts = {job: _part(snapshot) for job, snapshot in self.workers.items()}
        return summaries.agent_row(self.name, self.node, self.cordon, parts)

    def as_json(self) -> Json:
        """The records, with the fields that they are stored with."""
        return {"v": 1, "kind": "Agent", "name": self.name, **self.raw}


@dataclass(slots=True)
class Replica:
    """One coordinator; ``term`` is set for the leader."""

    name: str
    record: ReplicaRecord | None = None
    term: int = 0
    raw: Json = field(default_factory=dict)

    def as_json(self) -> Json:
        """The record, with the fields that it is stored with."""
        return {"v": 1, "kind": "Coordinator", "name": self.name, "term": self.term, **self.raw}


@dataclass(slots=True)
class Cluster:
    """What was read, grouped."""

    jobs: dict[str, Job] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    leader: LeaderRecord | None = None
    term: int = 0
    revision: int = 0
    age_s: float = 0.0


def group(*readings: Reading, history: bool = True) -> Cluster:
    """Group records by job, agent and replica; unknown keys are left out.

    Without ``history`` events and checkpoints are there as they are stored only (``as_json``): most of
    what a cluster holds is those, and checking ten thousand of them takes as long as all the rest.
    """
    cluster = Cluster(
        revision=min((reading.revision for reading in readings), default=0),
        age_s=max((reading.age_s for reading in readings), default=0.0),
    )
    for item in _items(readings):
        parsed = _KEYS.parse(_KEYS.root + item.key)
        if parsed is not None:
            _place(cluster, parsed, item, history=history)
    if cluster.leader and (replica := cluster.replicas.get(cluster.leader.replica)):
        replica.term = cluster.term
    # A snapshot may outlive the records of its job by a moment; it is no job.
    cluster.jobs = {name: job for name, job in sorted(cluster.jobs.items()) if job.spec or job.status}
    cluster.agents = dict(sorted(cluster.agents.items()))
    return cluster


def _items(readings: Iterable[Reading]) -> Iterable[Item]:
    for reading in readings:
        yield from reading.items


def _place(cluster: Cluster, parsed: Parsed, item: Item, *, history: bool) -> None:
    document = _json(item.value)
    match parsed.kind:
        case "leader":
            cluster.leader = _decode(LeaderRecord, item.value)
            cluster.term = item.create_revision
        case "coordinator":
            record = _decode(ReplicaRecord, item.value)
            cluster.replicas[parsed.name] = Replica(parsed.name, record, raw={"record": document})
        case "node":
            agent = cluster.agents.setdefault(parsed.agent, Agent(parsed.agent))
            agent.node = _decode(NodeRecord, item.value)
            agent.raw["node"] = document
        case "cordon":
            agent = cluster.agents.setdefault(parsed.agent, Agent(parsed.agent))
            agent.cordon = _decode(Cordon, item.value)
            agent.raw["cordon"] = document
        case "suspicion":
            agent = cluster.agents.setdefault(parsed.agent, Agent(parsed.agent))
            agent.suspicion = _decode(Suspicion, item.value)
            agent.raw["suspicion"] = document
        case "worker":
            snapshot = _decode(WorkerSnapshot, item.value)
            agent = cluster.agents.setdefault(parsed.agent, Agent(parsed.agent))
            job = cluster.jobs.setdefault(parsed.job, Job(parsed.job))
            agent.raw.setdefault("workers", {})[parsed.job] = document
            job.raw.setdefault("workers", {})[parsed.agent] = document
            if snapshot is not None:
                agent.workers[parsed.job] = job.workers[parsed.agent] = snapshot
        case _:
            job = cluster.jobs.setdefault(parsed.job, Job(parsed.job))
            if history or parsed.kind not in _HISTORY:
                _place_in_job(job, parsed, item)
            _place_document(job, parsed, document)


def _place_in_job(job: Job, parsed: Parsed, item: Item) -> None:
    seq = int(parsed.seq)
    match parsed.kind:
        case "spec":
            job.spec = _decode(JobSpec, item.value)
        case "intent":
            job.intent = _decode(Intent, item.value)
        case "status":
            job.status = _decode(JobStatus, item.value)
        case "latest":
            job.latest = _decode(Latest, item.value)
        case "open":
            _keep(job.open, seq, _decode(OpenRecord, item.value))
        case "checkpoint":
            _keep(job.commits, seq, _decode(CommitRecord, item.value))
        case "garbage":
            _keep(job.garbage, seq, _decode(Garbage, item.value))
        case "bad":
            _keep(job.bad, seq, _decode(Quarantine, item.value))
        case "event":
            _keep(job.events, seq, _decode(EventRecord, item.value))
        case "pin":
            job.pinned.add(seq)
        case "verified":
            _keep(job.verified, seq, _decode(Verification, item.value))
        case "order":
            job.orders.add(parsed.name)


def _place_document(job: Job, parsed: Parsed, document: Any) -> None:
    seq = int(parsed.seq)
    if parsed.kind in ("spec", "intent", "status", "latest"):
        job.raw[parsed.kind] = document
    elif parsed.kind in _FOLDERS:
        name = {"pin": f"{seq}/{parsed.name}", "order": parsed.name}.get(parsed.kind, str(seq))
        job.raw.setdefault(_FOLDERS[parsed.kind], {})[name] = document


def _part(snapshot: WorkerSnapshot) -> Part:
    return summaries.part_of(codec.to_json(snapshot))


def _keep(where: dict[int, T], seq: int, record: T | None) -> None:
    if record is not None:
        where[seq] = record


def _decode(kind: type[T], value: bytes) -> T | None:
    try:
        return codec.decode(kind, value)
    except Refused:
        return None


def _json(value: bytes) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value.decode(errors="replace")
