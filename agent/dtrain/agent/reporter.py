"""The agent's own keys in etcd: its registration, and one snapshot per job.

Every snapshot is fenced by the registration: the transaction compares the node
record's revision with the one this life of the agent wrote, so that a write
that a former life left on its way can no longer land, and neither can one of an
agent whose name another has taken. It compares the snapshot's own revision too:
of two writes, the older cannot overtake the newer.

``Reporter.work`` does what is due and says when to be called again; the thread
around it is in ``ReporterThread``. Training never waits for any of this.
"""

import dataclasses
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.errors import (
    DtrainError,
    ErrorCode,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from dtrain.protocol.ids import Incarnation, JobName
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import SNAPSHOT_BYTES_MAX, Draining, NodeRecord, WorkerSnapshot
from dtrain.runtime.clock import Clock
from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Etcd,
    Get,
    Put,
    Target,
    Txn,
    TxnResult,
    flatten,
    prefix_end,
)
from dtrain.storage.etcd.session import Session

REFRESH_S = 60.0
REFRESH_JITTER = 0.2
RETRY_S_FIRST, RETRY_S_MAX = 0.1, 2.0
REFUSED_S = 5.0
"""Between tries of what etcd refuses, such as a write while it has no space."""
SESSION_POLL_S = 0.2
CALL_S = 3.0

_NOTHING = 0


@dataclass(slots=True)
class _Job:
    """What is to be published of one job. ``snapshot`` None: it is to be deleted."""

    snapshot: WorkerSnapshot | None
    due_at: float
    dirty: bool = True
    refresh_at: float = float("inf")
    written_at: float = float("-inf")
    mod_revision: int | None = None
    """Of the key as it is known here; None: not known."""
    unheard: bool = False
    """A write of this snapshot had no answer: it may be applied at any later time."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Intervals, s. ``progress_s``: at most so often a snapshot in which only steps moved."""

    progress_s: float = 2.0
    refresh_s: float = REFRESH_S


class Reporter:
    """Registers the agent and publishes snapshots. ``work`` is for one thread; the rest for any."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        session: Session,
        node: NodeRecord,
        clock: Clock,
        *,
        new_incarnation: Callable[[], Incarnation],
        on_registered: Callable[[int, Incarnation], None],
        on_taken: Callable[[NodeRecord | None, float], None],
        settings: Settings | None = None,
        rng: random.Random | None = None,
        log: Callable[..., None] = lambda *_args, **_fields: None,
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._session = session
        self._node = node
        self._clock = clock
        self._new_incarnation = new_incarnation
        self._on_registered = on_registered
        self._on_taken = on_taken
        self._settings = settings or Settings()
        self._rng = rng or random.Random()  # noqa: S311 - jitter only
        self._log = log
        self._changed = threading.Condition()
        self._news = False
        self._jobs: dict[JobName, _Job] = {}
        self._registration = _NOTHING
        self._generation = _NOTHING
        self._lease = _NOTHING
        self._problem = ""
        self._draining: Draining | None = None
        self._taken_since: float | None = None
        self._retry_s = RETRY_S_FIRST
        self._retry_at = float("-inf")
        self._complained = ""

    @property
    def registered(self) -> bool:
        """Whether the node record is this life's, as far as is known."""
        return self._registration != _NOTHING

    def submit(self, job: JobName, snapshot: WorkerSnapshot, *, urgent: bool) -> None:
        """Publish a snapshot: at once, or when progress is due. The newest one wins."""
        now = self._clock.monotonic()
        with self._changed:
            known = self._jobs.get(job)
            if known is None:
                self._jobs[job] = _Job(snapshot, now)
            else:
                due_at = now if urgent else max(now, known.written_at + self._settings.progress_s)
                known.due_at = min(known.due_at, due_at) if known.dirty else due_at
                known.snapshot = snapshot
                known.dirty = True
            self._tell()

    def delete(self, job: JobName) -> None:
        """Delete the job's snapshot."""
        with self._changed:
            known = self._jobs.setdefault(job, _Job(None, 0.0))
            known.snapshot, known.dirty, known.due_at = None, True, self._clock.monotonic()
            self._tell()

    def set_problem(self, problem: str) -> None:
        """Say in the node record what is wrong with the machine; "": nothing."""
        with self._changed:
            self._problem = problem
            self._tell()

    def set_draining(self, draining: Draining) -> None:
        """Say in the node record that the agent is about to end."""
        with self._changed:
            self._draining = draining
            self._tell()

    @property
    def idle(self) -> bool:
        """Everything has been published."""
        with self._changed:
            return self.registered and not any(job.dirty for job in self._jobs.values())

    def work(self) -> float:
        """Do what is due; return when to call again (monotonic)."""
        now = self._clock.monotonic()
        if now < self._retry_at:
            return self._retry_at
        try:
            if self._session_changed() and not self._register():
                return self._clock.monotonic() + SESSION_POLL_S
            if self._as_it_stands(self._node) != self._node and not self._tell_anew():
                return self._clock.monotonic()
            wake_at = self._publish()
        except (Unavailable, OutcomeUnknown) as error:
            return self._try_later(error, self._retry_s * (0.5 + self._rng.random()))
        except NotFound as error:
            if error.code is not ErrorCode.LEASE_NOT_FOUND:
                return self._try_later(error, REFUSED_S)
            # The guardian gets a new lease, the sooner the better: jobs wait for us, but not for long.
            self._session.doubt()
            self._registration = _NOTHING
            return self._try_later(error, SESSION_POLL_S)
        except Refused as error:
            return self._try_later(error, REFUSED_S)
        if self._complained:
            self._log("etcd answers again")
        self._retry_s, self._retry_at, self._complained = RETRY_S_FIRST, float("-inf"), ""
        return min(wake_at, self._clock.monotonic() + SESSION_POLL_S)

    def wait(self, until: float) -> None:
        """Sleep until then, or until there is something new to publish."""
        with self._changed:
            left_s = until - self._clock.monotonic()
            if left_s > 0 and not self._news:
                self._changed.wait(left_s)
            self._news = False

    def _tell(self) -> None:
        # Remembered, because the thread may be between its work and its wait.
        self._news = True
        self._changed.notify()

    def _try_later(self, error: DtrainError, wait_s: float) -> float:
        if error.message != self._complained:
            full = error.code is ErrorCode.ETCD_NO_SPACE
            event = "etcd has no space" if full else "snapshot not written"
            self._log(event, error=error.message, cause=error.cause, fix=error.fix)
            self._complained = error.message
        self._retry_s = min(RETRY_S_MAX, self._retry_s * 2)
        self._retry_at = self._clock.monotonic() + wait_s
        return self._retry_at

    # Registration

    def _session_changed(self) -> bool:
        return not self.registered or self._session.generation != self._generation

    def _register(self) -> bool:
        view = self._session.view()
        if not view.lease:
            return False
        self._registration = _NOTHING
        incarnation = self._new_incarnation()
        node = self._as_it_stands(dataclasses.replace(self._node, incarnation=incarnation))
        key, value = self._keys.node(self._node.agent), codec.encode(node)
        put = Put(key, value, view.lease)
        result = self._txn(Txn((Compare(key, Target.CREATE, 0),), (put,), (Get(key),)))
        if not result.succeeded:
            found = flatten(result.responses).get(key)
            if found is None:
                return False
            if found.lease != view.lease:
                self._taken(found.value)
                return False
            # This guardian's lease: the record is a former life's, or our own unheard write.
            result = self._txn(Txn((Compare(key, Target.MOD, found.mod_revision),), (put,)))
            if not result.succeeded:
                return False
        left_behind = self._left_behind()
        with self._changed:
            for job in self._jobs.values():
                job.mod_revision = None
                # Told anew by the driver under the new incarnation; a deletion is still owed.
                job.dirty, job.refresh_at = job.snapshot is None, float("inf")
            for name in left_behind:
                self._jobs.setdefault(name, _Job(None, self._clock.monotonic()))
        self._registration, self._generation, self._lease = result.revision, view.generation, view.lease
        self._node = node
        self._taken_since = None
        self._log("registered", incarnation=incarnation, lease=f"{view.lease:x}")
        self._on_registered(view.generation, incarnation)
        return True

    def _as_it_stands(self, node: NodeRecord) -> NodeRecord:
        return dataclasses.replace(node, problem=self._problem, draining=self._draining)

    def _tell_anew(self) -> bool:
        """Write the node record anew, before any snapshot that says more; False: it is not ours any more."""
        node = self._as_it_stands(self._node)
        key = self._keys.node(node.agent)
        fence = Compare(key, Target.MOD, self._registration)
        result = self._txn(Txn((fence,), (Put(key, codec.encode(node), self._lease),)))
        if not result.succeeded:
            self._log("registration lost")
            self._registration = _NOTHING
            return False
        self._registration, self._node = result.revision, node
        return True

    def _left_behind(self) -> list[JobName]:
        """Jobs with a snapshot of a former life that ended before it could delete it."""
        prefix = self._keys.workers_of(self._node.agent)
        found = self._etcd.range(prefix, prefix_end(prefix), deadline_s=CALL_S).items
        parsed = [self._keys.parse(kv.key) for kv in found]
        return [one.job for one in parsed if one is not None and one.kind == "worker"]

    def _taken(self, value: bytes) -> None:
        now = self._clock.monotonic()
        if self._taken_since is None:
            self._taken_since = now
        try:
            other: NodeRecord | None = codec.decode(NodeRecord, value)
        except Refused:
            other = None
        self._on_taken(other, now - self._taken_since)

    # Snapshots

    def _publish(self) -> float:
        """Write everything that is due; return when the next one is."""
        while True:
            now = self._clock.monotonic()
            with self._changed:
                due = [
                    (name, job, job.snapshot)
                    for name, job in self._jobs.items()
                    if min(job.due_at if job.dirty else float("inf"), job.refresh_at) <= now
                ]
                if not due:
                    times = [
                        min(job.due_at if job.dirty else float("inf"), job.refresh_at)
                        for job in self._jobs.values()
                    ]
                    return min(times, default=float("inf"))
            for name, job, snapshot in due:
                if not self._write(name, job, snapshot, now):
                    return self._clock.monotonic()

    def _write(self, name: JobName, job: _Job, snapshot: WorkerSnapshot | None, now: float) -> bool:
        key, node_key = self._keys.worker(self._node.agent, name), self._keys.node(self._node.agent)
        fence = Compare(node_key, Target.MOD, self._registration)
        reread = (Get(node_key), Get(key))
        if job.mod_revision is None:
            found = self._etcd.range(key, deadline_s=CALL_S).items
            job.mod_revision = found[0].mod_revision if found else 0
        # For a deletion, too: one that lands late must not take away what was written since.
        newest = Compare(key, Target.MOD, job.mod_revision)
        if snapshot is None:
            # With the key gone, an unheard creation would find it absent again, and bring the
            # snapshot back to life: the node record, written anew, shuts it out.
            again = (Put(node_key, codec.encode(self._node), self._lease),) if job.unheard else ()
            result = self._txn(Txn((fence, newest), (Delete(key), *again), reread))
            if result.succeeded and again:
                self._registration = result.revision
        else:
            # Between a registration and the driver's hearing of it, a snapshot still says who we were.
            now_named = dataclasses.replace(snapshot, incarnation=self._node.incarnation)
            value = fit(dataclasses.replace(now_named, at=round(self._clock.wall(), 3)))
            try:
                result = self._txn(Txn((fence, newest), (Put(key, value, self._lease),), reread))
            except OutcomeUnknown:
                job.unheard = True
                raise
        if not result.succeeded:
            found_now = flatten(result.responses)
            node = found_now.get(node_key)
            job.mod_revision = found_now[key].mod_revision if key in found_now else 0
            if node is not None and (node.lease, node.value) == (self._lease, codec.encode(self._node)):
                # Ours as it is: written anew by a deletion whose answer was lost, or not at all.
                self._registration = node.mod_revision
            if node is None or node.mod_revision != self._registration:
                self._log("registration lost")
                self._registration = _NOTHING
                return False
            # A write of ours was applied after all: this one goes on top of it.
            return True
        with self._changed:
            job.mod_revision, job.written_at = result.revision, now
            spread = 1 + REFRESH_JITTER * (2 * self._rng.random() - 1)
            job.refresh_at = now + self._settings.refresh_s * spread
            if job.snapshot is snapshot:
                job.dirty = False
                if snapshot is None:
                    del self._jobs[name]
        return True

    def _txn(self, txn: Txn) -> TxnResult:
        return self._etcd.txn(txn, deadline_s=CALL_S)


def fit(snapshot: WorkerSnapshot) -> bytes:
    """Encode a snapshot, cut to what etcd should hold: log tails first, then metrics, then prose."""
    value = codec.encode(snapshot)
    for cut in (_cut_logs, _cut_metrics, _cut_prose):
        if len(value) <= SNAPSHOT_BYTES_MAX:
            break
        snapshot = cut(snapshot)
        value = codec.encode(snapshot)
    return value


def _cut_logs(snapshot: WorkerSnapshot) -> WorkerSnapshot:
    failure = snapshot.failure
    if failure is None:
        return snapshot
    return dataclasses.replace(
        snapshot, failure=dataclasses.replace(failure, log_tail=failure.log_tail[-200:])
    )


def _cut_metrics(snapshot: WorkerSnapshot) -> WorkerSnapshot:
    ranks = (
        dataclasses.replace(
            rank,
            metrics={},
            timing=None,
            # The first ones are those that the job wants to be finite.
            nonfinite=rank.nonfinite[:1],
            nonfinite_seen=dict(list(rank.nonfinite_seen.items())[:1]),
        )
        for rank in snapshot.ranks
    )
    return dataclasses.replace(snapshot, ranks=tuple(ranks))


def _cut_prose(snapshot: WorkerSnapshot) -> WorkerSnapshot:
    problems = tuple(dataclasses.replace(one, message=one.message[:60]) for one in snapshot.problems)
    return dataclasses.replace(snapshot, problems=problems)


class ReporterThread:
    """Runs a reporter until ``close``. ``on_death``: it ended by an error of its own."""

    def __init__(self, reporter: Reporter, on_death: Callable[[BaseException], None]) -> None:
        self._reporter = reporter
        self._on_death = on_death
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(CALL_S + 1.0)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                until = self._reporter.work()
                self._reporter.wait(until)
        except BaseException as error:  # noqa: BLE001 - the agent must not live on unheard
            self._on_death(error)
