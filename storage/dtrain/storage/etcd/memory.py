"""A model of etcd in memory, behind the same port, for tests and the simulation.

It has no threads and reads no clock: time is the ``now`` it is given, and
leases expire when a call or ``tick`` notices. Every key keeps its history, so
that reads at a revision, resumed watches and compaction behave as in etcd;
``compact`` drops history as the real thing does. Faults (timeouts, lag, lost
answers) are not modelled here: the simulation puts them in front of the port.

What etcd checks is checked: 128 operations, 1.5 MiB, no key twice, leases that
exist. The contract suite in ``tests/contract/etcd`` holds both to the same.
"""

# ruff: noqa: ARG002 - the port's deadlines mean nothing to a model

import bisect
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable
from dtrain.storage.etcd.outcomes import no_space
from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    Status,
    Txn,
    TxnResult,
    WatchBatch,
)
from dtrain.storage.etcd.semantics import (
    LEASE_TTL_S_MIN,
    check_key,
    check_limits,
    check_ttl,
    holds,
    lease_not_found,
)


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    expires_at: float
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _History:
    """Versions of one key, oldest first; a deletion is a version with ``version`` 0."""

    revisions: list[int] = field(default_factory=list)
    versions: list[KeyValue] = field(default_factory=list)

    def at(self, revision: int) -> KeyValue | None:
        index = bisect.bisect_right(self.revisions, revision) - 1
        if index < 0 or self.versions[index].version == 0:
            return None
        return self.versions[index]


class MemoryEtcd:
    """``port.Etcd`` in memory. Safe for several threads; deterministic with one.

    ``version`` is what it reports, and whose known fault at a compaction it has.
    """

    def __init__(self, now: Callable[[], float], *, version: str = "3.5.16") -> None:
        self._now = now
        self._version = version
        numbers = tuple(int(part) for part in version.split("."))
        self._loses_deletions = numbers < (3, 4, 34) or (3, 5) <= numbers < (3, 5, 16)
        """Older servers forget a deletion at the very revision compacted: a watch from there misses it."""
        self.changed = threading.Condition()
        self._revision = 1
        self._compacted = 0
        self._live: dict[str, KeyValue] = {}
        self._sorted: list[str] = []
        """Keys of ``_history`` in order."""
        self._history: dict[str, _History] = {}
        self._log_revisions: list[int] = []
        self._log: list[tuple[Event, ...]] = []
        self._leases: dict[int, _Lease] = {}
        self._next_expiry = float("inf")
        self._watches: list[MemoryWatch] = []
        self._closed = False
        self.cluster_id = 0xD7121
        self.raft_term = 2
        self.out_of_space = False
        """Answer like a server under the NOSPACE alarm."""

    # The port.

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        check_limits(txn)
        with self.changed:
            self._begin()
            if self.out_of_space and any(isinstance(op, Put) for op in txn.success + txn.failure):
                raise no_space("etcd answered 'etcdserver: mvcc: database space exceeded'")
            succeeded = all(self._holds(compare) for compare in txn.compares)
            branch = txn.success if succeeded else txn.failure
            for operation in branch:
                if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                    raise lease_not_found()
            return self._apply(succeeded, branch)

    def range(
        self,
        key: str,
        range_end: str | None = None,
        *,
        revision: int = 0,
        limit: int = 0,
        deadline_s: float = 5.0,
    ) -> RangeResult:
        check_key(key)
        with self.changed:
            self._begin()
            if revision > self._revision:
                raise self._future_error(revision)
            if revision and revision < self._compacted:
                raise self.compacted_error(revision)
            found: list[KeyValue] = []
            more = False
            for kv in self._at(key, range_end, revision):
                if limit and len(found) == limit:
                    more = True
                    break
                found.append(kv)
            return RangeResult(tuple(found), revision or self._revision, more, self.raft_term)

    def grant(self, ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        if lease <= 0:
            # etcd would choose an id of its own for 0: the port grants ids of the caller's only.
            raise Refused(ErrorCode.ETCD_REFUSED, f"lease {lease} cannot be granted")
        check_ttl(ttl_s)
        with self.changed:
            self._begin()
            if self.out_of_space:
                raise no_space("etcd answered 'etcdserver: mvcc: database space exceeded'")
            if lease not in self._leases:
                self._leases[lease] = _Lease(float(max(ttl_s, LEASE_TTL_S_MIN)), 0.0)
            return self._renew(lease)

    def keepalive(self, lease: int, *, deadline_s: float = 1.5) -> float:
        with self.changed:
            self._begin()
            if lease not in self._leases:
                raise lease_not_found()
            return self._renew(lease)

    def revoke(self, lease: int, *, deadline_s: float = 5.0) -> None:
        with self.changed:
            self._begin()
            if lease in self._leases:
                self._end_lease(lease)

    def watch(self, key: str, range_end: str | None, start_revision: int) -> "MemoryWatch":
        with self.changed:
            self._begin()
            stream = MemoryWatch(self, key, range_end, start_revision or self._revision + 1)
            self._watches.append(stream)
            return stream

    def status(self, *, deadline_s: float = 5.0) -> Status:
        with self.changed:
            self._begin()
            alarms = ("NOSPACE",) if self.out_of_space else ()
            return Status(self.cluster_id, 1, self.raft_term, self._revision, self._version, alarms)

    def close(self) -> None:
        with self.changed:
            self._closed = True
            for stream in list(self._watches):
                stream.cut()
            self.changed.notify_all()

    # What a test or the simulation does to it.

    def tick(self) -> None:
        """Let leases expire whose time has come."""
        with self.changed:
            self._expire()

    def compact(self, revision: int) -> None:
        """Forget history before ``revision``; what lives at it stays readable.

        Raises:
            Refused: as etcd answers a revision that is compacted already, or not there yet.
        """
        with self.changed:
            if revision <= self._compacted:
                raise self.compacted_error(revision)
            if revision > self._revision:
                raise self._future_error(revision)
            # An open watch was sent these events already, even if nobody has read them yet.
            for stream in self._watches:
                stream.collect()
            self._compacted = revision
            for key in list(self._history):
                self._forget_before(key, revision)
            cut = bisect.bisect_left(self._log_revisions, revision)
            del self._log_revisions[:cut], self._log[:cut]
            if self._loses_deletions and self._log_revisions[:1] == [revision]:
                self._log[0] = tuple(event for event in self._log[0] if event.kind == "put")
            self.changed.notify_all()

    def cut_watches(self) -> None:
        """End all open watches as the loss of a member does."""
        with self.changed:
            for stream in list(self._watches):
                stream.cut()
            self.changed.notify_all()

    @property
    def revision(self) -> int:
        return self._revision

    def leases(self) -> dict[int, tuple[str, ...]]:
        """Return the keys of each living lease."""
        with self.changed:
            self._expire()
            return {lease: tuple(sorted(held.keys)) for lease, held in self._leases.items()}

    # Beneath.

    def _begin(self) -> None:
        if self._closed:
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "the client is closed")
        self._expire()

    def _expire(self) -> None:
        now = self._now()
        if now < self._next_expiry:
            return
        # In the order of expiry, so that equal histories give equal revisions.
        ends = sorted((held.expires_at, lease) for lease, held in self._leases.items())
        due = [(end, lease) for end, lease in ends if end <= now]
        for _, lease in due:
            self._end_lease(lease)
        self._next_expiry = min((held.expires_at for held in self._leases.values()), default=float("inf"))

    def _renew(self, lease: int) -> float:
        held = self._leases[lease]
        held.expires_at = self._now() + held.ttl_s
        self._next_expiry = min(self._next_expiry, held.expires_at)
        return held.ttl_s

    def _end_lease(self, lease: int) -> None:
        keys = sorted(self._leases.pop(lease).keys)
        if keys:
            self._write([Delete(key) for key in keys])

    def _apply(self, succeeded: bool, branch: tuple[Operation, ...]) -> TxnResult:
        if all(isinstance(operation, Get) for operation in branch):
            responses = tuple(self._get(operation) for operation in branch)
        else:
            responses = self._write(branch)
        return TxnResult(succeeded, self._revision, responses)

    def _get(self, operation: Operation) -> tuple[KeyValue, ...]:
        assert isinstance(operation, Get)
        return tuple(self._at(operation.key, operation.range_end, 0))

    def _write(self, operations: Iterable[Operation]) -> tuple[tuple[KeyValue, ...], ...]:
        """Apply in order, all at one new revision; nothing written, nothing changes."""
        revision = self._revision + 1
        events: list[Event] = []
        responses: list[tuple[KeyValue, ...]] = []
        for operation in operations:
            match operation:
                case Put():
                    events.append(self._put(operation, revision))
                    responses.append(())
                case Delete(key, range_end):
                    doomed = [kv.key for kv in self._at(key, range_end, 0)]
                    events.extend(self._delete(key, revision) for key in doomed)
                    responses.append(())
                case Get():
                    responses.append(self._get(operation))
        if events:
            self._revision = revision
            self._log_revisions.append(revision)
            self._log.append(tuple(events))
            self.changed.notify_all()
        return tuple(responses)

    def _put(self, put: Put, revision: int) -> Event:
        before = self._live.get(put.key)
        if before is not None and before.lease and before.lease in self._leases:
            self._leases[before.lease].keys.discard(put.key)
        if put.lease:
            self._leases[put.lease].keys.add(put.key)
        kv = KeyValue(
            key=put.key,
            value=bytes(put.value),
            create_revision=before.create_revision if before else revision,
            mod_revision=revision,
            version=before.version + 1 if before else 1,
            lease=put.lease,
        )
        self._live[put.key] = kv
        self._remember(kv)
        return Event("put", kv)

    def _delete(self, key: str, revision: int) -> Event:
        before = self._live.pop(key)
        if before.lease and before.lease in self._leases:
            self._leases[before.lease].keys.discard(key)
        gone = KeyValue(key, b"", 0, revision, 0)
        self._remember(gone)
        return Event("delete", gone)

    def _remember(self, kv: KeyValue) -> None:
        history = self._history.get(kv.key)
        if history is None:
            history = self._history[kv.key] = _History()
            bisect.insort(self._sorted, kv.key)
        history.revisions.append(kv.mod_revision)
        history.versions.append(kv)

    def _forget_before(self, key: str, revision: int) -> None:
        history = self._history[key]
        cut = bisect.bisect_right(history.revisions, revision) - 1
        if cut >= 0 and history.versions[cut].version == 0:
            cut += 1
        if cut > 0:
            del history.revisions[:cut], history.versions[:cut]
        if not history.versions:
            del self._history[key]
            del self._sorted[bisect.bisect_left(self._sorted, key)]

    def _keys(self, key: str, range_end: str | None) -> list[str]:
        if range_end is None:
            return [key]
        names = self._sorted
        return names[bisect.bisect_left(names, key) : bisect.bisect_left(names, range_end)]

    def _at(self, key: str, range_end: str | None, revision: int) -> Iterable[KeyValue]:
        if not revision or revision == self._revision:
            for name in self._keys(key, range_end):
                live = self._live.get(name)
                if live is not None:
                    yield live
            return
        for name in self._keys(key, range_end):
            history = self._history.get(name)
            kv = history.at(revision) if history else None
            if kv is not None:
                yield kv

    def _holds(self, compare: Compare) -> bool:
        return holds(compare, list(self._at(compare.key, compare.range_end, 0)))

    def _future_error(self, revision: int) -> Refused:
        return Refused(ErrorCode.ETCD_REFUSED, f"revision {revision} is a future revision")

    # For its watches.

    @property
    def compacted(self) -> int:
        return self._compacted

    def log_from(self, revision: int) -> list[tuple[int, tuple[Event, ...]]]:
        """Return the revisions from ``revision`` on with their events."""
        start = bisect.bisect_left(self._log_revisions, revision)
        return list(zip(self._log_revisions[start:], self._log[start:], strict=True))

    def forget(self, stream: "MemoryWatch") -> None:
        """Drop a watch that has ended."""
        if stream in self._watches:
            self._watches.remove(stream)

    def compacted_error(self, revision: int) -> Refused:
        """Return the refusal of a revision that is gone."""
        return Refused(
            ErrorCode.ETCD_COMPACTED,
            f"revision {revision} is compacted, {self._compacted} is the oldest",
            fix="list again at the present revision",
        )


class MemoryWatch:
    """``port.WatchStream`` over the model's log; made by ``MemoryEtcd.watch``.

    A batch holds one revision. Progress is told when ``progress`` asks for it,
    not by time.
    """

    def __init__(self, etcd: MemoryEtcd, key: str, range_end: str | None, start_revision: int) -> None:
        self._etcd = etcd
        self._key = key
        self._range_end = range_end
        self._next = start_revision
        self._ready: deque[WatchBatch] = deque()
        self._progress = False
        self._failure: DtrainError | None = None

    def next(self, timeout_s: float) -> WatchBatch | None:
        changed = self._etcd.changed
        with changed:
            batch = self.poll()
            if batch is None and timeout_s > 0:
                # Other threads write and tick; a model has no time of its own.
                changed.wait(timeout_s)
                batch = self.poll()
            return batch

    def poll(self) -> WatchBatch | None:
        """Return the next batch if there is one; never waits.

        Raises:
            Unavailable, Refused: as ``next``.
        """
        with self._etcd.changed:
            self._etcd.tick()
            self.collect()
            if self._ready:
                return self._ready.popleft()
            if self._failure is not None:
                raise self._failure
            if self._progress:
                self._progress = False
                return WatchBatch(self._etcd.revision)
            return None

    def progress(self) -> None:
        """Let the next idle poll tell that nothing is missing."""
        with self._etcd.changed:
            self._progress = True
            self._etcd.changed.notify_all()

    def collect(self) -> None:
        """Take over what the log holds for this watch."""
        if self._failure is not None or self._next > self._etcd.revision:
            return
        if self._next < self._etcd.compacted:
            self.cut(self._etcd.compacted_error(self._next))
            return
        for revision, events in self._etcd.log_from(self._next):
            covered = tuple(event for event in events if self._covers(event.kv.key))
            if covered:
                self._ready.append(WatchBatch(revision, covered))
        self._next = self._etcd.revision + 1

    def cut(self, error: DtrainError | None = None) -> None:
        """End the stream, as the loss of its member does."""
        if self._failure is None:
            self._failure = error or Unavailable(ErrorCode.ETCD_UNAVAILABLE, "the watch ended")
            self._etcd.forget(self)

    def close(self) -> None:
        with self._etcd.changed:
            self.cut()
            self._etcd.changed.notify_all()

    def _covers(self, key: str) -> bool:
        return key == self._key if self._range_end is None else self._key <= key < self._range_end
