"""Rows of jobs and agents out of the mirror, each worked out again only when one of its records changed.

A thousand machines write a snapshot every other second: asked now and then, all
of them have changed; asked often, few. Reading one costs microseconds either way.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dtrain.protocol import codec, summaries
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import ClusterName, JobName
from dtrain.protocol.job import Intent, JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.rows import AgentRow, JobRow
from dtrain.protocol.snapshot import NodeRecord
from dtrain.protocol.summaries import Part
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")


class Listing:
    """Lists of one replica. Safe for several threads; they take turns, so that they share the work."""

    def __init__(self, mirror: Mirror, cluster: ClusterName) -> None:
        self._mirror = mirror
        self._keys = Keys(cluster)
        self._lock = threading.Lock()
        self._specs = _Read(lambda value: _decode(JobSpec, value))
        self._intents = _Read(lambda value: _decode(Intent, value))
        self._statuses = _Read(lambda value: _decode(JobStatus, value))
        self._latests = _Read(lambda value: _decode(Latest, value))
        self._nodes = _Read(lambda value: _decode(NodeRecord, value))
        self._cordons = _Read(lambda value: _decode(Cordon, value))
        self._parts = _Read(summaries.part)

    def jobs(self, now: float) -> list[JobRow]:
        """Every job at ``now`` (epoch seconds), in order of name."""
        with self._lock:
            parts: dict[str, dict[str, Part]] = {}
            for agent, job, found in self._snapshots():
                parts.setdefault(job, {})[agent] = found
            names = self._mirror.children(self._keys.jobs)
            made = [row for name in names if (row := self._job(name, parts.get(name, {}), now)) is not None]
            for kept in (self._specs, self._intents, self._statuses, self._latests, self._parts):
                kept.forget()
            return summaries.in_queue(made)

    def agents(self) -> list[AgentRow]:
        """Every machine that has a session or is cordoned, in order of name."""
        with self._lock:
            parts: dict[str, dict[str, Part]] = {}
            for agent, job, found in self._snapshots():
                parts.setdefault(agent, {})[job] = found
            nodes: dict[str, NodeRecord | None] = dict.fromkeys(parts)
            cordons: dict[str, Cordon] = {}
            for kv in self._mirror.prefix(self._keys.agents):
                if kv.key.endswith("/node") and (node := self._nodes.of(kv)) is not None:
                    nodes[node.agent] = node
            for kv in self._mirror.prefix(self._keys.cordons):
                if (cordon := self._cordons.of(kv)) is not None:
                    cordons[cordon.agent] = cordon
                    nodes.setdefault(cordon.agent, None)
            for kept in (self._nodes, self._cordons, self._parts):
                kept.forget()
            return [
                summaries.agent_row(name, nodes[name], cordons.get(name), parts.get(name, {}))
                for name in sorted(nodes)
            ]

    def _job(self, name: str, parts: dict[str, Part], now: float) -> JobRow | None:
        job = JobName(name)
        spec = self._record(self._specs, self._keys.spec(job))
        status = self._record(self._statuses, self._keys.status(job))
        if spec is None and status is None:
            return None
        intent = self._record(self._intents, self._keys.intent(job))
        latest = self._record(self._latests, self._keys.latest(job))
        return summaries.job_row(name, spec, status, intent=intent, latest=latest, parts=parts, now=now)

    def _snapshots(self) -> list[tuple[str, str, Part]]:
        """(agent, job, part) of every snapshot that can be read."""
        found = []
        root = len(self._keys.agents)
        for kv in self._mirror.prefix(self._keys.agents):
            match kv.key[root:].split("/"):
                case [agent, "workers", job] if (one := self._parts.of(kv)) is not None:
                    found.append((agent, job, one))
        return found

    def _record(self, kept: "_Read[T]", key: str) -> T | None:
        kv = self._mirror.get(key)
        return None if kv is None else kept.of(kv)


class _Read(Generic[T]):
    """What was read out of records, until they change or are asked for no more."""

    def __init__(self, read: Callable[[bytes], T | None]) -> None:
        self._read = read
        self._before: dict[str, tuple[int, T | None]] = {}
        self._now: dict[str, tuple[int, T | None]] = {}

    def of(self, kv: KeyValue) -> T | None:
        """What this record says; None if it cannot be read."""
        known = self._now.get(kv.key) or self._before.get(kv.key)
        if known is None or known[0] != kv.mod_revision:
            known = kv.mod_revision, self._read(kv.value)
        self._now[kv.key] = known
        return known[1]

    def forget(self) -> None:
        """Let go of what was not asked for since the last time: a deleted record must not stay for ever."""
        self._before, self._now = self._now, {}


def _decode(kind: type[T], value: bytes) -> T | None:
    try:
        return codec.decode(kind, value)
    except DtrainError:
        # Of a newer release, or damaged: the row says what the other records do.
        return None
