"""etcd as a node sees it: the model behind a network that delays, cuts, loses and lies by silence.

``EtcdServer`` owns the one ``MemoryEtcd`` and shows every revision to the checks. ``EtcdAccess`` is one
node's way to it: ``submit`` for event code, the ``port.Etcd`` methods for code that runs as a task.
"""

import bisect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.etcd.memory import MemoryEtcd, MemoryWatch, _Lease
from dtrain.storage.etcd.port import Delete, Put, RangeResult, Status, Txn, TxnResult, WatchBatch
from dtrain.storage.etcd.port import Event as WatchEvent
from tests.sim.link import Link
from tests.sim.scheduler import Scheduler

LATENCY_S = 0.004
WATCH_DELAY_S = 0.01
PROGRESS_S = 5.0
EXPIRY_SCAN_S = 0.5


class EtcdServer:
    """The cluster of members, as one linearizable thing that may be down for a while."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.memory = MemoryEtcd(lambda: scheduler.now)
        self.away: dict[object, None] = {}
        """Why nobody answers now: no quorum, or all members stand still."""
        self.ambiguous = 0.0
        """Share of writes whose answer never comes."""
        self.ambiguous_s_max = 7.0
        """How late such a write may be applied."""
        self.latency_s = LATENCY_S
        self.former_raft_term = self.memory.raft_term
        self.on_revision: Callable[[int, tuple[WatchEvent, ...]], None] = lambda _revision, _events: None
        self.seen = 1
        self.watches: list[SimWatch] = []
        scheduler.after(EXPIRY_SCAN_S, self._scan)

    @property
    def down(self) -> bool:
        return bool(self.away)

    def apply(self, operation: Callable[[MemoryEtcd], Any]) -> Any:
        """Run an operation now; its error is its value."""
        try:
            result = operation(self.memory)
        except DtrainError as error:
            result = error
        self.publish()
        return result

    def publish(self) -> None:
        """Show new revisions to the checks, and wake the watches."""
        if self.memory.revision == self.seen:
            return
        for revision, events in self.memory.log_from(self.seen + 1):
            self.on_revision(revision, events)
        self.seen = self.memory.revision
        for watch in self.watches:
            watch.wake()

    def compact(self, kept: int) -> None:
        """Forget history but for the newest ``kept`` revisions, as the compactor does."""
        revision = self.memory.revision - kept
        if revision > max(1, self.memory.compacted):
            self.memory.compact(revision)

    def restore(self, back: int, *, bump: int = 0) -> int:
        """Become what a snapshot of ``back`` revisions ago was; return its revision.

        Leases come back with their keys, and count anew. History since then has never been.
        ``bump``: revisions are raised by so much, and marked as compacted.
        """
        memory = self.memory
        target = max(memory.compacted + 1, memory.revision - back)
        go_back(memory, target, bump=bump, expires_at=self.scheduler.now + 10.0)
        self.seen = memory.revision
        self.former_raft_term = memory.raft_term
        return target

    def _scan(self) -> None:
        # Without a quorum nothing expires; the leader of a new one extends every lease.
        if not self.down:
            self.memory.tick()
            self.publish()
        self.scheduler.after(EXPIRY_SCAN_S, self._scan)

    def go_away(self, token: object) -> None:
        """Nobody answers until ``come_back`` with the same token."""
        self.away[token] = None

    def come_back(self, token: object, *, expired: bool = False) -> None:
        """Answer again. ``expired``: as it was; otherwise a new leader gives each lease its full time."""
        if token in self.away:
            del self.away[token]
            if not self.away and not expired:
                self.new_leader()

    def new_leader(self) -> None:
        """Another member leads: every lease is extended."""
        memory = self.memory
        self.former_raft_term, memory.raft_term = memory.raft_term, memory.raft_term + 1
        for held in memory._leases.values():
            held.expires_at = max(held.expires_at, self.scheduler.now + held.ttl_s)
        memory._next_expiry = min((held.expires_at for held in memory._leases.values()), default=float("inf"))


class EtcdAccess:
    """One process' connection, over its node's link."""

    def __init__(
        self, server: EtcdServer, who: str, link: Link, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self.server = server
        self.who = who
        self.link = link
        self.alive = alive
        self.post: Callable[[Callable[[], None]], None] = lambda call: call()
        """How answers enter the process: a frozen one takes them when it thaws."""

    def submit(
        self,
        operation: Callable[[MemoryEtcd], Any],
        done: Callable[[Any], None],
        *,
        write: bool,
        deadline_s: float,
    ) -> None:
        """Call etcd; ``done`` gets the result or the error, once, later."""
        server, scheduler = self.server, self.server.scheduler
        open_ = [True]

        def finish(value: Any) -> None:
            if open_[0]:
                open_[0] = False
                timeout.cancel()
                self.post(lambda: done(value))

        lost = OutcomeUnknown if write else Unavailable
        code = ErrorCode.ETCD_OUTCOME_UNKNOWN if write else ErrorCode.ETCD_UNAVAILABLE
        timeout = scheduler.after(deadline_s, lambda: finish(lost(code, "etcd did not answer in time")))
        link = self.link
        if link.closed and scheduler.chance(0.5):
            scheduler.after(0.05, lambda: finish(_refused()))
            return

        def reply(result: Any) -> None:
            scheduler.after(scheduler.delay(server.latency_s), lambda: finish(result) if link.in_ else None)

        def arrive() -> None:
            if not link.out:
                return
            if server.down:
                if scheduler.chance(0.5):
                    finish(_refused())
                return
            if link.auth_denied:
                reply(_denied())
                return
            if write and scheduler.chance(server.ambiguous):
                fate = scheduler.rng.choice(("now", "later", "never"))
                scheduler.log("etcd", "ambiguous write", by=self.who, applied=fate)
                if fate == "now":
                    server.apply(operation)
                elif fate == "later":
                    late = scheduler.rng.uniform(0.0, server.ambiguous_s_max)
                    scheduler.after(late, lambda: None if server.down else server.apply(operation))
                if scheduler.chance(0.5):
                    early = scheduler.rng.uniform(0.0, deadline_s)
                    scheduler.after(early, lambda: finish(lost(code, "the connection was reset")))
                return
            reply(server.apply(operation))

        scheduler.after(scheduler.delay(server.latency_s), arrive)

    def _call(self, operation: Callable[[MemoryEtcd], Any], *, write: bool, deadline_s: float) -> Any:
        """Call etcd from a task, which waits."""
        task = self.server.scheduler.current()
        token = task.waiting + 1
        self.submit(operation, lambda value: task.answer(token, value), write=write, deadline_s=deadline_s)
        return task.wait()

    # port.Etcd, for code that runs as a task.

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        write = any(isinstance(operation, (Put, Delete)) for operation in txn.success + txn.failure)
        result: TxnResult = self._call(lambda etcd: etcd.txn(txn), write=write, deadline_s=deadline_s)
        return result

    def range(
        self,
        key: str,
        range_end: str | None = None,
        *,
        revision: int = 0,
        limit: int = 0,
        deadline_s: float = 5.0,
    ) -> RangeResult:
        result: RangeResult = self._call(
            lambda etcd: etcd.range(key, range_end, revision=revision, limit=limit),
            write=False,
            deadline_s=deadline_s,
        )
        return result

    def grant(self, ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        result: float = self._call(lambda etcd: etcd.grant(ttl_s, lease), write=True, deadline_s=deadline_s)
        return result

    def keepalive(self, lease: int, *, deadline_s: float = 1.5) -> float:
        result: float = self._call(lambda etcd: etcd.keepalive(lease), write=False, deadline_s=deadline_s)
        return result

    def revoke(self, lease: int, *, deadline_s: float = 5.0) -> None:
        self._call(lambda etcd: etcd.revoke(lease), write=False, deadline_s=deadline_s)

    def watch(self, key: str, range_end: str | None, start_revision: int) -> "SimWatch":
        return SimWatch(self, key, range_end, start_revision)

    def status(self, *, deadline_s: float = 5.0) -> Status:
        result: Status = self._call(lambda etcd: etcd.status(), write=False, deadline_s=deadline_s)
        if self.link.lag_s and self.server.scheduler.chance(0.5):
            # Asked of a member that has not heard of the newest leader.
            return replace(result, raft_term=self.server.former_raft_term)
        return result

    def close(self) -> None:
        """Nothing is held."""


class SimWatch:
    """A stream whose batches come late, together, or not at all until it is opened again."""

    def __init__(self, access: EtcdAccess, key: str, range_end: str | None, start: int) -> None:
        self._access = access
        self._scheduler = access.server.scheduler
        self._model: MemoryWatch | None = None
        self._arguments = (key, range_end, start)
        self._ready: list[WatchBatch | DtrainError] = []
        self._scheduled = False
        self._closed = False
        self._token: tuple[Any, int] | None = None
        access.server.watches.append(self)
        self._scheduler.after(self._scheduler.delay(WATCH_DELAY_S), self._open)
        self._scheduler.after(PROGRESS_S, self._progress)

    def next(self, timeout_s: float) -> WatchBatch | None:
        if not self._ready:
            task = self._scheduler.current()
            token = task.waiting + 1
            self._token = (task, token)
            timer = self._scheduler.after(
                timeout_s, lambda: self._access.post(lambda: task.answer(token, None))
            )
            task.wait()
            timer.cancel()
            self._token = None
        if not self._ready:
            return None
        first = self._ready.pop(0)
        if isinstance(first, DtrainError):
            self.close()
            raise first
        return first

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._access.server.watches.remove(self)
            if self._model is not None:
                self._model.close()

    def cut(self) -> None:
        """The member behind it went away: it ends, and whoever reads it resumes."""
        self._push(Unavailable(ErrorCode.ETCD_UNAVAILABLE, "the watch ended"))
        if self._model is not None:
            self._model.close()

    def wake(self) -> None:
        """There is something to deliver, some time from now."""
        if self._model is not None and not self._scheduled and not self._closed:
            self._scheduled = True
            self._scheduler.after(
                self._scheduler.delay(WATCH_DELAY_S) + self._access.link.lag_s, self._deliver
            )

    def _open(self) -> None:
        if self._closed or not self._access.alive():
            return
        if not self._access.link.open or self._access.server.down:
            self._push(_refused())
            return
        if self._access.link.auth_denied:
            self._push(_denied())
            return
        self._model = self._access.server.memory.watch(*self._arguments)
        self._deliver()

    def _deliver(self) -> None:
        self._scheduled = False
        model = self._model
        if self._closed or model is None:
            return
        if not self._access.link.open or self._access.server.down:
            # Half open: the reader learns of it by silence, or when it heals.
            self._scheduled = True
            self._scheduler.after(0.5, self._deliver)
            return
        while True:
            try:
                batch = model.poll()
            except DtrainError as error:
                self._push(error)
                return
            if batch is None:
                return
            last = self._ready[-1] if self._ready else None
            if isinstance(last, WatchBatch) and last.events and batch.events and self._scheduler.chance(0.5):
                self._ready[-1] = WatchBatch(batch.revision, last.events + batch.events)
            else:
                self._push(batch)

    def _progress(self) -> None:
        if self._closed or not self._access.alive():
            return
        if self._model is not None and self._access.link.open and not self._access.server.down:
            self._model.progress()
            self.wake()
        self._scheduler.after(PROGRESS_S, self._progress)

    def _push(self, item: WatchBatch | DtrainError) -> None:
        self._ready.append(item)
        if self._token is not None:
            task, token = self._token
            self._access.post(lambda: task.answer(token, None))


def _refused() -> Unavailable:
    return Unavailable(ErrorCode.ETCD_UNAVAILABLE, "connection refused")


def _denied() -> Refused:
    return Refused(ErrorCode.ETCD_AUTH, "etcd answered 'etcdserver: permission denied' (403/7)")


def go_back(memory: MemoryEtcd, target: int, *, bump: int, expires_at: float) -> None:
    """Make etcd what a snapshot of the revision ``target`` holds; leases last until ``expires_at``."""
    memory.cut_watches()
    for key in list(memory._history):
        history = memory._history[key]
        kept = bisect.bisect_right(history.revisions, target)
        del history.revisions[kept:], history.versions[kept:]
        if not kept:
            del memory._history[key]
            memory._sorted.remove(key)
    memory._live = {key: kv for key, held in memory._history.items() if (kv := held.at(target))}
    kept = bisect.bisect_right(memory._log_revisions, target)
    del memory._log_revisions[kept:], memory._log[kept:]
    memory._leases.clear()
    for kv in memory._live.values():
        if kv.lease:
            memory._leases.setdefault(kv.lease, _Lease(10.0, expires_at)).keys.add(kv.key)
    memory._next_expiry = expires_at
    memory._revision = target + bump
    if bump:
        memory._compacted = memory._revision
    memory.raft_term = 2
