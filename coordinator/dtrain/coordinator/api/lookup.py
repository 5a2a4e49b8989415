"""What servicers read of the mirror: one job, who there is, and waiting for a change."""

import contextlib
import threading
import time
from typing import TypeVar

import grpc

from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import (
    AgentName,
    JobName,
    parse_name,
)
from dtrain.protocol.job import JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")

WAIT_S_MAX = 30.0
REPLY_BYTES_MAX = 64 * 1024 * 1024
"""Of one answer; only ``Read`` may come near it: 30,000 snapshots of 2 KiB."""
READ_BYTES_MAX = REPLY_BYTES_MAX - 1024 * 1024
ITEM_BYTES = 64
"""What a record takes in an answer beyond its key and value."""
FIRST_LIST_S = 5.0


class Lookup:
    """Safe for several threads. ``waiting`` bounds calls that wait: others must find a free thread."""

    def __init__(self, mirror: Mirror, keys: Keys, waiting: threading.BoundedSemaphore) -> None:
        self._mirror = mirror
        self._keys = keys
        self._waiting = waiting

    def wait_for_first_list(self) -> None:
        """Give a replica that has just begun a moment to read etcd.

        Raises:
            Unavailable: MIRROR_STALE; it has not.
        """
        if not self._mirror.revision and not self._mirror.wait_for(1, FIRST_LIST_S):
            raise Unavailable(
                ErrorCode.MIRROR_STALE,
                "this replica has not read etcd yet",
                fix="ask another replica, or see whether etcd is up",
            )

    def wait_for_change(
        self, prefix: str, after_revision: int, wait_ms: int, context: grpc.ServicerContext
    ) -> None:
        """Wait until something under ``prefix`` has changed; at once if that is unclear."""
        end = time.monotonic() + min(wait_ms / 1000, WAIT_S_MAX)
        seen = self._mirror.revision
        if seen > after_revision or not self._waiting.acquire(blocking=False):
            return
        try:
            before = _fingerprint(self._mirror.prefix(prefix))
            while context.is_active() and (left_s := end - time.monotonic()) > 0:
                if not self._mirror.wait_for(seen + 1, min(left_s, 1.0)):
                    continue
                seen = self._mirror.revision
                if _fingerprint(self._mirror.prefix(prefix)) != before:
                    return
        finally:
            self._waiting.release()

    def job(self, name: str) -> tuple[JobSpec, JobStatus | None]:
        """A job as this replica's mirror has it; None: no leader has looked at this submission yet."""
        job = JobName(parse_name(name, "job"))
        spec = self.record(self._keys.spec(job), JobSpec)
        if spec is None:
            raise NotFound(ErrorCode.NOT_FOUND, f"there is no job {job}", fix="list jobs: dtrain get jobs")
        status = self.record(self._keys.status(job), JobStatus)
        return spec, status if status is not None and status.uid == spec.uid else None

    def record(self, key: str, kind: type[T]) -> T | None:
        """Return a record; None: there is none."""
        kv = self._mirror.get(key)
        return None if kv is None else codec.decode(kind, kv.value)

    def job_names(self) -> list[str]:
        """Return the names of all jobs."""
        found = []
        for kv in self._mirror.prefix(self._keys.jobs):
            parsed = self._keys.parse(kv.key)
            if parsed is not None and parsed.kind == "spec":
                found.append(parsed.job)
        return list(found)

    def addresses(self) -> dict[AgentName, str]:
        """Return where the agents that live are."""
        found = {}
        for kv in self._mirror.prefix(self._keys.agents):
            parsed = self._keys.parse(kv.key)
            if parsed is not None and parsed.kind == "node":
                with contextlib.suppress(DtrainError):
                    found[parsed.agent] = codec.decode(NodeRecord, kv.value).address
        return found

    def warnings(self, spec: JobSpec) -> list[str]:
        """Return why a job would not start at once, in sentences."""
        fit = 0
        alive = 0
        slots = max(1, spec.nproc_per_node)
        for kv in self._mirror.prefix(self._keys.agents):
            parsed = self._keys.parse(kv.key)
            if parsed is None or parsed.kind != "node":
                continue
            try:
                node = codec.decode(NodeRecord, kv.value)
            except DtrainError:
                continue
            alive += 1
            fit += node.slots >= slots
        if fit >= spec.nnodes_min:
            return []
        if alive >= spec.nnodes_min:
            return [
                f"{fit} of {alive} agents have {slots} slots, {spec.nnodes_min} are needed: "
                "the job waits for more"
            ]
        return [f"{alive} agents are alive, {spec.nnodes_min} are needed: the job waits for more"]


def check_size(items: list[KeyValue], prefix: str) -> None:
    """Refuse what is too much for one answer."""
    size = sum(len(kv.key) + len(kv.value) + ITEM_BYTES for kv in items)
    if size > READ_BYTES_MAX:
        raise Refused(
            ErrorCode.USAGE,
            f"the {len(items)} records under {prefix!r} take {size // 2**20} MiB, more than one answer may",
            fix='ask for less, such as "jobs/NAME/" or "agents/NAME/"',
        )


def _fingerprint(items: list[KeyValue]) -> tuple[int, int]:
    return len(items), max((kv.mod_revision for kv in items), default=0)
