"""A copy of etcd, grouped by job, agent and replica. Pure.

Records are kept as stored and decoded when a page needs them, each revision of
a key once: a cluster of many ranks writes far more than anybody looks at. What
is of a newer version, or no record at all, counts as absent.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord, Quarantine, Verification
from dtrain.protocol.cluster import Cordon, LeaderRecord, ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventRecord
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobPhase, JobSpec, JobStatus
from dtrain.protocol.keys import Keys, Parsed
from dtrain.protocol.snapshot import NodeRecord, RankState, WorkerSnapshot
from dtrain.protocol.standing import reported_step
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a list needs of one machine's snapshot of a job."""

    uid: str
    attempt: int
    step: int | None
    """The lowest of its ranks; None: it has none."""
    live: int


class Decoder:
    """Decodes each revision of a key once. ``forget`` what is gone, or it grows with all that ever was."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._parsed: dict[str, Parsed | None] = {}
        self._values: dict[str, tuple[int, Any]] = {}
        self._facts: dict[str, tuple[int, Facts | None]] = {}

    def parse(self, key: str) -> Parsed | None:
        """Take a key apart."""
        if key not in self._parsed:
            self._parsed[key] = self._keys.parse(key)
        return self._parsed[key]

    def decode(self, kind: type[T], kv: KeyValue | None) -> T | None:
        """Return the record; None if there is none that this release can read."""
        if kv is None:
            return None
        known = self._values.get(kv.key)
        if known is not None and known[0] == kv.mod_revision:
            found: T | None = known[1]
            return found
        try:
            value = codec.decode(kind, kv.value)
        except DtrainError:
            value = None
        self._values[kv.key] = (kv.mod_revision, value)
        return value

    def facts(self, kv: KeyValue) -> Facts | None:
        """Return what a list needs of a snapshot.

        Not all of it is decoded: behind a list of a hundred jobs stand a hundred thousand ranks with news.
        """
        known = self._facts.get(kv.key)
        if known is None or known[0] != kv.mod_revision:
            known = self._facts[kv.key] = (kv.mod_revision, _facts(kv.value))
        return known[1]

    def forget(self, present: Mapping[str, KeyValue]) -> None:
        """Drop what is not among ``present`` once that is most of what is kept."""
        if len(self._parsed) > 2 * len(present) + 1000:
            self._parsed = {key: value for key, value in self._parsed.items() if key in present}
            self._values = {key: value for key, value in self._values.items() if key in present}
            self._facts = {key: value for key, value in self._facts.items() if key in present}


@dataclass(slots=True)
class Job:
    """Everything stored about one job."""

    name: str
    decoder: Decoder
    one: dict[str, KeyValue] = field(default_factory=dict)
    """spec, intent, status and latest."""
    many: dict[str, dict[int, KeyValue]] = field(default_factory=dict)
    """checkpoint, open, garbage, bad, verified and event, by number."""
    pinned: set[int] = field(default_factory=set)
    worker_records: dict[str, KeyValue] = field(default_factory=dict)

    @property
    def spec(self) -> JobSpec | None:
        return self.decoder.decode(JobSpec, self.one.get("spec"))

    @property
    def status(self) -> JobStatus | None:
        """Of this submission; None until a leader has looked at it."""
        return self.decoder.decode(JobStatus, self.one.get("status"))

    @property
    def intent(self) -> Intent | None:
        return self.decoder.decode(Intent, self.one.get("intent"))

    @property
    def latest(self) -> Latest | None:
        return self.decoder.decode(Latest, self.one.get("latest"))

    @property
    def phase(self) -> JobPhase:
        """QUEUED until a leader has looked at it."""
        status = self.status
        return status.phase if status else JobPhase.QUEUED

    @property
    def finished(self) -> bool:
        """It has ended for good."""
        return self.phase in TERMINAL_PHASES

    @property
    def attempt(self) -> int:
        """Number of the current attempt, 0 for none."""
        status = self.status
        return status.attempt if status else 0

    def numbered(self, kind: str, record: type[T]) -> dict[int, T]:
        """Records of one kind by number, ascending."""
        found = {}
        for seq, kv in sorted(self.many.get(kind, {}).items()):
            value = self.decoder.decode(record, kv)
            if value is not None:
                found[seq] = value
        return found

    @property
    def events(self) -> dict[int, EventRecord]:
        return self.numbered("event", EventRecord)

    @property
    def commits(self) -> dict[int, CommitRecord]:
        return self.numbered("checkpoint", CommitRecord)

    @property
    def open(self) -> dict[int, OpenRecord]:
        return self.numbered("open", OpenRecord)

    @property
    def garbage(self) -> dict[int, Garbage]:
        return self.numbered("garbage", Garbage)

    @property
    def bad(self) -> dict[int, Quarantine]:
        return self.numbered("bad", Quarantine)

    @property
    def verified(self) -> dict[int, Verification]:
        return self.numbered("verified", Verification)

    @property
    def workers(self) -> dict[str, WorkerSnapshot]:
        """Snapshots of the current attempt of this submission, by agent."""
        status = self.status
        if status is None:
            return {}
        found = {}
        for agent, kv in sorted(self.worker_records.items()):
            snapshot = self.decoder.decode(WorkerSnapshot, kv)
            if snapshot is not None and (snapshot.uid, snapshot.attempt) == (status.uid, status.attempt):
                found[agent] = snapshot
        return found

    @property
    def ranks(self) -> dict[int, tuple[str, RankState]]:
        """Rank to (agent, state) in the current attempt."""
        found = {
            int(state.rank): (agent, state)
            for agent, snapshot in self.workers.items()
            for state in snapshot.ranks
        }
        return dict(sorted(found.items()))

    def progress(self) -> tuple[int, int]:
        """Return the newest step that every reporting rank has completed, and how many ranks run."""
        status = self.status
        if status is None:
            return 0, 0
        found = [self.decoder.facts(kv) for kv in self.worker_records.values()]
        mine = [one for one in found if one and (one.uid, one.attempt) == (status.uid, status.attempt)]
        lowest = () if self.finished else [one.step for one in mine if one.step is not None]
        return reported_step(status.step, lowest), sum(one.live for one in mine)

    @property
    def world_size(self) -> int:
        """Ranks: of the current attempt, else as asked for."""
        status, spec = self.status, self.spec
        if status and status.members:
            return status.world_size
        return self.nodes[1] * spec.nproc_per_node if spec else 0

    @property
    def nodes(self) -> tuple[int, int]:
        """Fewest and most machines: as scaled, else as in the job file."""
        spec, intent = self.spec, self.intent
        if spec is None:
            return 0, 0
        if intent is not None and intent.uid == spec.uid and intent.nnodes_max:
            return intent.nnodes_min, intent.nnodes_max
        return spec.nnodes_min, spec.nnodes_max


@dataclass(slots=True)
class Agent:
    """Everything stored about one machine."""

    name: str
    node: NodeRecord | None = None
    cordon: Cordon | None = None
    workers: dict[str, KeyValue] = field(default_factory=dict)


@dataclass(slots=True)
class Cluster:
    """What one copy of etcd holds, exactly as it was at ``revision``."""

    revision: int
    decoder: Decoder
    jobs: dict[str, Job] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    replicas: dict[str, ReplicaRecord | None] = field(default_factory=dict)
    leader: LeaderRecord | None = None
    term: int = 0
    """Of the leader; 0: there is none."""


def group(items: Iterable[KeyValue], revision: int, decoder: Decoder) -> Cluster:
    """Group records by job, agent and replica; unknown keys are left out."""
    cluster = Cluster(revision, decoder)
    for kv in items:
        parsed = decoder.parse(kv.key)
        if parsed is not None:
            _place(cluster, parsed, kv)
    # A snapshot may outlive the records of its job by a moment; it is no job.
    cluster.jobs = {
        name: job for name, job in sorted(cluster.jobs.items()) if "spec" in job.one or "status" in job.one
    }
    cluster.agents = dict(sorted(cluster.agents.items()))
    return cluster


def _place(cluster: Cluster, parsed: Parsed, kv: KeyValue) -> None:
    decode = cluster.decoder.decode
    match parsed.kind:
        case "leader":
            cluster.leader = decode(LeaderRecord, kv)
            cluster.term = kv.create_revision
        case "coordinator":
            cluster.replicas[parsed.name] = decode(ReplicaRecord, kv)
        case "node":
            _agent(cluster, parsed).node = decode(NodeRecord, kv)
        case "cordon":
            _agent(cluster, parsed).cordon = decode(Cordon, kv)
        case "worker":
            _agent(cluster, parsed).workers[parsed.job] = kv
            _job(cluster, parsed).worker_records[parsed.agent] = kv
        case "spec" | "intent" | "status" | "latest":
            _job(cluster, parsed).one[parsed.kind] = kv
        case "pin":
            _job(cluster, parsed).pinned.add(int(parsed.seq))
        case "checkpoint" | "open" | "garbage" | "bad" | "verified" | "event":
            _job(cluster, parsed).many.setdefault(parsed.kind, {})[int(parsed.seq)] = kv
        case _:
            return


def _facts(value: bytes) -> Facts | None:
    try:
        document = json.loads(value)
        if document.get("v", codec.VERSION) != codec.VERSION:
            return None
        ranks = document.get("ranks", ())
        steps = [int(rank.get("step", 0)) for rank in ranks]
        live = sum(rank.get("exit_code") is None for rank in ranks)
        return Facts(document["uid"], document["attempt"], min(steps, default=None), live)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _agent(cluster: Cluster, parsed: Parsed) -> Agent:
    return cluster.agents.setdefault(parsed.agent, Agent(parsed.agent))


def _job(cluster: Cluster, parsed: Parsed) -> Job:
    return cluster.jobs.setdefault(parsed.job, Job(parsed.job, cluster.decoder))
