"""The pages of a replica's status port: live, ready, metrics.

Live means that the loop which decides comes round, and nothing else. etcd's
absence never makes a replica dead: a restart would not bring etcd back, and
would throw away the copy and the connections that it needs on etcd's return.
Ready means that a client is served well here: the API is open and the copy of
etcd is neither missing nor old. A replica that stands by is as ready as the
leader, because any replica serves any client.

The thread of the port calls these; all that they read is published by others.
"""

import threading
from collections.abc import Callable

from dtrain.coordinator import metrics
from dtrain.coordinator.health import MIRROR_STALE_S
from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import ReplicaId
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord
from dtrain.runtime.metrics import Metric, Samples, exposition
from dtrain.runtime.serving import Page, Pages, live, verdict
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import KeyValue

COUNT_AGAIN_S = 5.0
"""However often somebody scrapes, records are counted no more often than this."""

AGENT_STATES = ("ready", "cordoned", "draining", "blocked")


class Status:
    """Reads one replica. ``loop_at`` and ``monotonic`` are of one clock; ``serves``: the API is open."""

    def __init__(
        self,
        replica: ReplicaId,
        keys: Keys,
        mirror: Mirror,
        *,
        leads: Callable[[], bool],
        serves: Callable[[], bool],
        loop_at: Callable[[], float],
        problems: Callable[[], list[str]],
        monotonic: Callable[[], float],
    ) -> None:
        self._replica = replica
        self._keys = keys
        self._mirror = mirror
        self._leads = leads
        self._serves = serves
        self._loop_at = loop_at
        self._problems = problems
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._counts: Samples = {}
        self._counted_at = float("-inf")
        self._phases: dict[str, tuple[int, str]] = {}
        """By key of a status record: its revision and the phase in it, so that only news is decoded."""

    def pages(self) -> Pages:
        """Return the pages by path."""
        shown = exposition("coordinator", metrics.METRICS, self.samples)
        return {"/livez": self.live, "/readyz": self.ready, "/metrics": shown}

    def live(self) -> Page:
        """Return whether the loop comes round."""
        return live(self._monotonic() - self._loop_at())

    def ready(self) -> Page:
        """Return whether a client is served well here, and who leads."""
        age_s = self._mirror.age_s()
        reasons = []
        if not self._serves():
            reasons.append("the API is not open")
        if age_s == float("inf"):
            reasons.append("etcd has not been read yet")
        elif age_s >= MIRROR_STALE_S:
            reasons.append(f"etcd was last heard of {age_s:.0f} s ago")
        found = self._mirror.get(self._keys.leader)
        leader, term = ("", 0) if found is None else (_leader(found), found.create_revision)
        return verdict(
            "ready",
            not reasons,
            reasons,
            replica=self._replica,
            leads=self._leads(),
            leader=leader,
            term=term,
            mirror_age_s=None if age_s == float("inf") else round(age_s, 3),
        )

    def samples(self) -> Samples:
        """Return what ``metrics.METRICS`` are now."""
        found: dict[Metric, dict[tuple[str, ...], float]] = {
            metrics.IS_LEADER: {(): float(self._leads())},
            metrics.MIRROR_REVISION: {(): float(self._mirror.revision)},
            metrics.LOOP_AGE: {(): max(0.0, self._monotonic() - self._loop_at())},
            metrics.PROBLEMS: {(): float(len(self._problems()))},
        }
        age_s = self._mirror.age_s()
        if age_s == float("inf"):
            return found
        found[metrics.MIRROR_AGE] = {(): age_s}
        leader = self._mirror.get(self._keys.leader)
        if leader is not None:
            found[metrics.TERM] = {(): float(leader.create_revision)}
        return {**found, **self._count()}

    def _count(self) -> Samples:
        with self._lock:
            now = self._monotonic()
            if now - self._counted_at >= COUNT_AGAIN_S:
                self._counts = {metrics.JOBS: self._count_jobs(), metrics.AGENTS: self._count_agents()}
                self._counted_at = now
            return self._counts

    def _count_jobs(self) -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {(phase.value,): 0.0 for phase in JobPhase}
        known, self._phases = self._phases, {}
        specs, with_status = set(), set()
        for kv in self._mirror.prefix(self._keys.jobs):
            parsed = self._keys.parse(kv.key)
            if parsed is None:
                continue
            if parsed.kind == "spec":
                specs.add(parsed.job)
            elif parsed.kind == "status":
                revision, phase = known.get(kv.key, (0, ""))
                if revision != kv.mod_revision:
                    phase = _phase(kv)
                self._phases[kv.key] = (kv.mod_revision, phase)
                with_status.add(parsed.job)
                if phase:
                    counts[phase,] += 1
        # Submitted, and no leader has looked at it yet.
        counts[JobPhase.QUEUED.value,] += len(specs - with_status)
        return counts

    def _count_agents(self) -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {(state,): 0.0 for state in AGENT_STATES}
        cordoned = {
            parsed.agent
            for kv in self._mirror.prefix(f"{self._keys.root}cordons/")
            if (parsed := self._keys.parse(kv.key)) is not None
        }
        for kv in self._mirror.prefix(self._keys.agents):
            parsed = self._keys.parse(kv.key)
            if parsed is None or parsed.kind != "node":
                continue
            counts["cordoned" if parsed.agent in cordoned else _agent_state(kv),] += 1
        return counts


def _leader(kv: KeyValue) -> str:
    try:
        return codec.decode(LeaderRecord, kv.value).replica
    except DtrainError:
        return ""


def _phase(kv: KeyValue) -> str:
    try:
        return codec.decode(JobStatus, kv.value).phase.value
    except DtrainError:
        return ""


def _agent_state(kv: KeyValue) -> str:
    try:
        node = codec.decode(NodeRecord, kv.value)
    except DtrainError:
        # Of another version, perhaps: nothing is placed there.
        return "blocked"
    if node.draining is not None:
        return "draining"
    return "blocked" if node.problem else "ready"
