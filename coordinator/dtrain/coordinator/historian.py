"""Copies what happened to jobs into the store: their records once they end, events before etcd drops them.

A thread of every replica that works while the replica leads. It decides nothing and writes
nothing to etcd: what is in the store already is what its cursor is, so that a new leader goes on
where the former one was, and two of them at once write the same twice, under names of their own. A
store that is away is asked again with growing pauses; a job's last hundred events or its record
wait for it in etcd, where they still are.

Records older than ``keep_s`` are deleted, with what agents archived of their logs, whenever a record
was written, at most once in ``PRUNE_S``.
"""

import contextlib
import datetime
import math
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dtrain.protocol import archive, codec
from dtrain.protocol.archive import RecordName
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EVENTS_KEPT
from dtrain.protocol.ids import ClusterName, JobName, Term, Uid
from dtrain.protocol.job import TERMINAL_PHASES, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.runtime import redact, retry
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import PART_BYTES, BlobStore
from dtrain.storage.etcd.mirror import Change, Mirror

T = TypeVar("T")

BATCH = EVENTS_KEPT // 2
"""Events that are copied together: as many may still come before the first of them is dropped."""

LOOK_S = 1.0
RETRY_S_FIRST, RETRY_S_MAX = 5.0, 300.0
STORE_S_MAX = 20.0
PRUNE_S = 3600.0

_KINDS = frozenset({"status", "event"})
_RECORDS = frozenset({"spec", "intent", "status", "latest", "checkpoint", "bad", "verified"})


@dataclass(slots=True)
class _Cursor:
    """What the store holds of one submission."""

    event_last: int = 0
    recorded: bool = False


@dataclass(slots=True)
class _Later:
    at: float
    pause_s: float


class Historian:
    """``term`` is that of this replica while it may act, else None. ``keep_s`` 0: for ever."""

    def __init__(
        self,
        cluster: ClusterName,
        mirror: Mirror,
        stores: Callable[[str], BlobStore],
        *,
        term: Callable[[], Term | None],
        clock: Clock,
        keep_s: float,
        log: Callable[..., None],
    ) -> None:
        self._cluster, self._mirror, self._stores = cluster, mirror, stores
        self._keys = Keys(cluster)
        self._term, self._clock, self._keep_s, self._log = term, clock, keep_s, log
        self._lock = threading.Lock()
        self._changed: set[JobName] = set()
        self._wake = threading.Event()
        self._stopped = False
        self._led: Term | None = None
        self._due: set[JobName] = set()
        self._later: dict[JobName, _Later] = {}
        self._cursors: dict[str, dict[tuple[JobName, Uid], _Cursor]] = {}
        """By store, once it was listed."""
        self._pruned_at = -math.inf

    # Other threads

    def see(self, changes: Iterable[Change]) -> None:
        """Hear what the mirror has seen."""
        names = {
            parsed.job
            for change in changes
            if (parsed := self._keys.parse(change.key)) is not None and parsed.kind in _KINDS
        }
        if names and self._led is not None:
            with self._lock:
                self._changed |= names
            self._wake.set()

    def close(self) -> None:
        """End ``run`` soon."""
        self._stopped = True
        self._wake.set()

    # Its own thread

    def run(self) -> None:
        """Work until ``close``."""
        while not self._stopped:
            self._wake.wait(LOOK_S)
            self._wake.clear()
            self.turn()

    def turn(self) -> None:
        """Copy what is due."""
        term = self._term()
        if term is None:
            self._led = None
            return
        with self._lock:
            changed, self._changed = self._changed, set()
        if term != self._led:
            # Another leader may have copied since: the store is asked again.
            self._led = term
            self._cursors.clear()
            self._later.clear()
            changed |= {JobName(name) for name in self._mirror.children(self._keys.jobs)}
        self._due |= changed
        now = self._clock.monotonic()
        for job in sorted(self._due):
            waiting = self._later.get(job)
            if waiting is not None and now < waiting.at:
                continue
            if self._stopped or self._term() != term:
                return
            self._attend(job, now)

    def _attend(self, job: JobName, now: float) -> None:
        self._due.discard(job)
        try:
            self._copy(job)
            self._later.pop(job, None)
        except DtrainError as error:
            before = self._later.get(job)
            pause_s = RETRY_S_FIRST if before is None else min(2 * before.pause_s, RETRY_S_MAX)
            self._later[job] = _Later(now + pause_s, pause_s)
            self._due.add(job)
            if before is None:
                self._log("history not archived", job=job, problem=error.message, fix=error.fix)

    def _copy(self, job: JobName) -> None:
        stored = self._mirror.get(self._keys.status(job))
        status = None if stored is None else codec.decode(JobStatus, stored.value)
        if status is None or not status.store:
            return
        ended = status.phase in TERMINAL_PHASES
        cursor = self._cursor(status.store, job, status.uid)
        # Asked at every change of every job: the records are read only if something is due.
        if status.event_last - cursor.event_last < BATCH and (cursor.recorded or not ended):
            return
        records = {kv.key: kv.value for kv in self._mirror.prefix(self._keys.job(job))}
        events = self._events(records)
        new = {seq: event for seq, event in events.items() if seq > cursor.event_last}
        if ended and not cursor.recorded:
            document = self._document(job, status, records, events)
            key = archive.record_key(
                self._cluster,
                job,
                status.uid,
                finished_at=status.finished_at,
                event_last=status.event_last,
                nonce=secrets.token_hex(4),
            )
            self._put(status.store, key, document)
            cursor.recorded, cursor.event_last = True, status.event_last
            self._log("job archived", job=job, uid=status.uid, events=len(events))
            self._prune(status.store)
        elif len(new) >= BATCH:
            first, last = min(new), max(new)
            key = archive.events_key(
                self._cluster, job, status.uid, first=first, last=last, nonce=secrets.token_hex(4)
            )
            document = {"v": 1, "kind": "ArchivedEvents", "job": job, "uid": status.uid}
            self._put(status.store, key, document | {"events": [new[seq] for seq in sorted(new)]})
            cursor.event_last = last
        elif new:
            # Numbers go on where an earlier job of this name stopped, and what was dropped is gone.
            cursor.event_last = max(cursor.event_last, min(new) - 1)

    def _cursor(self, store: str, job: JobName, uid: Uid) -> _Cursor:
        known = self._cursors.get(store)
        if known is None:
            # One listing for all jobs: a new leader may find thousands that have ended.
            known = {}
            for name in self._names(store):
                cursor = known.setdefault((name.job, name.uid), _Cursor())
                cursor.event_last = max(cursor.event_last, name.last)
                cursor.recorded |= name.kind == "record"
            self._cursors[store] = known
        return known.setdefault((job, uid), _Cursor())

    def _names(self, store: str) -> list[RecordName]:
        blobs = self._stores(store)
        keys = _ask(lambda: [info.key for info in blobs.list(archive.jobs_prefix(self._cluster))])
        return [name for key in keys if (name := archive.parse_record_key(self._cluster, key))]

    def _events(self, records: Mapping[str, bytes]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for key, value in records.items():
            parsed = self._keys.parse(key)
            if parsed is not None and parsed.kind == "event":
                # Of a newer release, perhaps: what cannot be read is nobody's history.
                with contextlib.suppress(DtrainError):
                    found[parsed.seq] = codec.loads(value)
        return found

    def _document(
        self, job: JobName, status: JobStatus, records: Mapping[str, bytes], events: Mapping[int, Any]
    ) -> dict[str, Any]:
        """What is kept of a job: its records as etcd has them, without the secrets of its environment."""
        kept: dict[str, Any] = {}
        for key, value in sorted(records.items()):
            parsed = self._keys.parse(key)
            if parsed is None or parsed.kind not in _RECORDS:
                continue
            with contextlib.suppress(DtrainError):
                document = codec.loads(value)
                if document.get("uid", status.uid) != status.uid:
                    continue  # of the submission before or after this one
                if parsed.kind == "spec" and isinstance(document.get("env"), dict):
                    document["env"] = redact.environment(document["env"])
                kept[key.removeprefix(self._keys.job(job))] = document
        return {
            "v": 1,
            "kind": "ArchivedJob",
            "job": job,
            "uid": status.uid,
            "phase": status.phase.value,
            "finished_at": status.finished_at,
            "archived_at": iso(self._clock.wall()),
            "records": kept,
            "events": [events[seq] for seq in sorted(events)],
        }

    def _put(self, store: str, key: str, document: Mapping[str, Any]) -> None:
        blobs = self._stores(store)
        data = archive.pack_document(document)
        chunks = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
        crcs = [digest.crc32c(chunk) for chunk in chunks]
        _ask(lambda: blobs.put(key, chunks, chunk_crcs=crcs))

    # Retention

    def _prune(self, store: str) -> None:
        now = self._clock.monotonic()
        if not self._keep_s or now < self._pruned_at + PRUNE_S:
            return
        self._pruned_at = now
        oldest = datetime.datetime.fromtimestamp(self._clock.wall() - self._keep_s, tz=datetime.UTC)
        before = oldest.strftime("%Y%m%dT%H%M%SZ")
        blobs = self._stores(store)
        names = self._names(store)
        newest: dict[tuple[JobName, Uid], str] = {}
        for name in names:
            if name.finished:
                of = (name.job, name.uid)
                newest[of] = max(name.finished, newest.get(of, ""))
        for (job, uid), finished in sorted(newest.items()):
            if finished >= before or self._stopped:
                continue
            logs = _ask(
                lambda job=job, uid=uid: [  # type: ignore[misc]
                    info.key for info in blobs.list(archive.logs_prefix(self._cluster, job, uid))
                ]
            )
            own = [name for name in names if (name.job, name.uid) == (job, uid)]
            # The record goes last: as long as it is there, the rest is found again.
            own.sort(key=lambda name: name.kind == "record")
            for key in [*logs, *(name.key for name in own)]:
                _ask(lambda key=key: blobs.delete(key))  # type: ignore[misc]
            self._log("archive pruned", job=job, uid=uid, finished=finished, objects=len(logs) + len(own))


def _ask(operation: Callable[[], T]) -> T:
    return retry.call(operation, attempts=3, deadline_s=STORE_S_MAX, idempotent=True)
