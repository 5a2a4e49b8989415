"""The composition root: parse, build, start, end.

Threads: the loop owns all state; the mirror's, the lease's, two that commit,
two that work at the store and one that reads there at leisure, and those of
grpc hand it values through one queue. One more looks at etcd's health and tells people only.
A thread that dies takes the process with it: a replica that looks healthy and
is not would be worse than none.
"""

import contextlib
import gc
import importlib.metadata
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dtrain.coordinator import config
from dtrain.coordinator.api.checkpoints import CheckpointDesk
from dtrain.coordinator.api.cordons import Cordons
from dtrain.coordinator.api.history import History
from dtrain.coordinator.api.records import Operators
from dtrain.coordinator.api.server import Server, waiting_slots
from dtrain.coordinator.api.servicers import CoordinatorServicer, Identity
from dtrain.coordinator.config import Config
from dtrain.coordinator.core.decisions import Decision, Directed, InspectCheckpoint, Work
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.views import Moment
from dtrain.coordinator.dispatch import Channels, Dispatcher
from dtrain.coordinator.driver import Driver, Plan
from dtrain.coordinator.health import EtcdHealth, Health, judge_rejection, judge_unknown
from dtrain.coordinator.historian import Historian
from dtrain.coordinator.leadership.lease import Leadership
from dtrain.coordinator.measures import Measures
from dtrain.coordinator.persistence import Committer, Deposed
from dtrain.coordinator.skew import Releases
from dtrain.coordinator.status import Status
from dtrain.coordinator.webhooks.sender import Sender, Senders
from dtrain.coordinator.work import Merge, Stores, Worker
from dtrain.coordinator.world import World
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime import grpc_tls, log
from dtrain.runtime.clock import Clock, SystemClock
from dtrain.runtime.serving import StatusServer, inherited
from dtrain.runtime.tls import Role
from dtrain.storage.etcd.metered import MeteredEtcd
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.open import open_etcd
from dtrain.storage.etcd.port import Etcd
from dtrain.storage.etcd.session import Session, attach
from dtrain.storage.etcd.versions import version_warnings

EX_SOFTWARE = 70
"""A thread died: a bug."""

EX_TEMPFAIL = 75
"""Leadership was lost: the guardian starts a fresh process."""

EX_CONFIG = 78
"""The settings, or etcd itself, need a person."""

QUEUE_MAX = 100_000
HEARD_EVERY_S = 0.5
LOOP_S_MAX = 0.25
COMMIT_THREADS = 2
WORK_THREADS = 2
API_GRACE_S = 0.05

_WARNINGS = frozenset(
    {"commit failed", "command failed", "work failed", "record unusable", "brake", "history not archived"}
)

BATCHES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class MirrorMoved:
    """Changes of the mirror, with the revision they lead to."""

    changes: tuple[Change, ...]
    revision: int


Event = MirrorMoved | Callable[[float], None]
"""What happened; a function is told the instant at which the loop gets to it."""


class Coordinator:
    """One replica, wired. ``end_process`` ends it at once, whichever thread calls."""

    def __init__(
        self,
        settings: Config,
        etcd: Etcd,
        session: Session,
        *,
        clock: Clock,
        decide: Plan,
        merge_manifests: Merge,
        revision_seen: int = 0,
        access_problems: Callable[[], Iterable[str]] = tuple,
        end_process: Callable[[int], None] = os._exit,
        health: socket.socket | None = None,
    ) -> None:
        self._settings = settings
        self._session = session
        self._clock = clock
        self._end_process = end_process
        self._log = log.get("coordinator").bind(replica=settings.replica)
        self._events: queue.Queue[Event] = queue.Queue(QUEUE_MAX)
        self._stopping = threading.Event()
        self._loop = threading.Thread(
            target=self._guarded, args=(self._run_loop,), name="driver", daemon=True
        )
        self._keys = Keys(settings.cluster)
        self._measures = Measures(clock)
        etcd = MeteredEtcd(etcd, self._measures.etcd, clock)
        version = importlib.metadata.version("dtrain")
        self._tls = grpc_tls.load(
            settings.tls, settings.cluster, Role.COORDINATOR, settings.replica, clock=clock
        )
        self._server = Server(settings.listen, self._tls)
        self.address = settings.advertised(self._server.address)
        self._history = History(self._keys.root)
        self._mirror = Mirror(
            etcd,
            self._keys.root,
            on_changes=self._on_changes,
            on_alarm=self._on_alarm,
            revision_seen=revision_seen,
            on_failure=lambda error: self._fail(f"the mirror died: {error}"),
            clock=clock,
        )
        self.leadership = Leadership(
            etcd,
            session,
            settings.cluster,
            ReplicaRecord(
                settings.replica,
                self.address,
                version,
                socket.gethostname(),
                os.getpid(),
                dashboard=settings.dashboard_url(self._server.address),
            ),
            clock=clock,
            on_term=lambda term: self._tell(lambda now: self._driver.on_term(term, now)),
            on_over=lambda _why: self._end_process(EX_TEMPFAIL),
            # At our own address only we serve: who was registered there before is dead.
            answers=lambda address: address != self.address and _answers(address),
            on_taken=self._on_taken,
        )
        self._lease = threading.Thread(
            target=self._guarded, args=(self.leadership.run,), name="lease", daemon=True
        )
        self._channels = Channels(self._tls, clock=clock)
        self._health = Health(self._log.warning)
        releases = Releases(version, settings.cluster, self._mirror.prefix)
        self._etcd_health = EtcdHealth(
            etcd,
            self._health,
            mirror_age_s=self._mirror.age_s,
            remarks=lambda etcd_version: (
                *version_warnings(etcd_version, bool(settings.etcd.user)),
                *access_problems(),
                *releases.remarks(),
            ),
        )
        self._health_thread = threading.Thread(
            target=self._guarded, args=(self._etcd_health.run,), name="health", daemon=True
        )
        self._dispatcher = Dispatcher(
            self._channels, self._on_command, on_timed=self._measures.command, clock=clock
        )
        self._stores = Stores(self._measures.open_store)
        self._committer = Committer(
            etcd,
            settings.cluster,
            may_act=self.leadership.may_act,
            on_no_space=self._etcd_health.refused_for_space,
            stored=self._mirror.get,
        )
        self._worker = Worker(
            etcd,
            self._stores,
            merge_manifests,
            clock,
            scrub_bytes_per_s=settings.scrub_mb_s * 1e6,
            stopped=self._stopping.is_set,
        )
        self._commits = ThreadPoolExecutor(COMMIT_THREADS, "commit")
        self._works = ThreadPoolExecutor(WORK_THREADS, "work")
        # Reading a checkpoint again takes hours: what training waits for must not stand behind it.
        self._scrubs = ThreadPoolExecutor(1, "scrub")
        world = World(
            settings.cluster,
            settings.replica,
            agent_ttl_s=float(settings.ttl_s),
            default_store=settings.default_store,
            scrub_interval_s=settings.scrub_interval_s,
            cordon_s=settings.cordon_s,
        )
        self._historian = Historian(
            settings.cluster,
            self._mirror,
            self._stores.get,
            term=self._acting_term,
            clock=clock,
            keep_s=settings.archive_keep_days * 86_400.0,
            log=self.log,
        )
        self._history_thread = threading.Thread(
            target=self._guarded, args=(self._historian.run,), name="history", daemon=True
        )
        self._driver = Driver(world, self._measures.planning(decide), self)
        self._lost = 0
        self._servicer = CoordinatorServicer(
            Identity(settings.cluster, settings.replica, version),
            self._mirror,
            Operators(etcd, settings.cluster, clock, self._stores.get),
            self._channels,
            self._stores,
            checkpoints=CheckpointDesk(etcd, settings.cluster, clock, self._worker.find_orphans),
            cordons=Cordons(etcd, settings.cluster, clock),
            term=self._acting_term,
            waiting=waiting_slots(),
            history=self._history,
            default_store=settings.default_store,
            problems=self._problems,
            etcd_version=lambda: self._etcd_health.version,
        )
        self._webhooks = Senders(
            Sender(
                hook,
                settings.cluster,
                etcd,
                self._mirror,
                clock,
                term=self._acting_term,
                log=self._log.warning,
            )
            for hook in settings.webhooks
        )
        self._loop_at = clock.monotonic()
        self._serves = False
        self._status = None if health is None else self._status_server(health)

    def start(self) -> None:
        """Start all threads and serve; returns at once."""
        self._loop.start()
        self._mirror.start()
        self._lease.start()
        self._health_thread.start()
        self._history_thread.start()
        self._server.start(self._servicer)
        self._webhooks.start(self._guarded)
        self._serves = True
        # Before its own status port answers: the guardian's falls silent by this.
        self._session.set_started()
        if self._status is not None:
            threading.Thread(
                target=self._guarded, args=(self._status.run,), name="status", daemon=True
            ).start()
        self._log.info("coordinator started", address=self.address)

    def resign(self) -> None:
        """Stop acting and serving, quickly; what is in flight is for the successor to resolve."""
        self._serves = False
        self.leadership.stop()
        self._stopping.set()
        self._webhooks.stop()
        self._etcd_health.stop()
        self._session.set_clean_stop()
        self._dispatcher.close()
        self._server.stop(API_GRACE_S)
        self._log.info("coordinator resigned")

    def close(self) -> None:
        """Free everything, at leisure: for tests that go on living."""
        self._stopping.set()
        self._webhooks.stop()
        self._etcd_health.stop()
        self._historian.close()
        self._health_thread.join(5.0)
        self._history_thread.join(5.0)
        self._loop.join(5.0)
        self._lease.join(5.0)
        self._mirror.close()
        self._server.close()
        if self._status is not None:
            self._status.close()
        self._commits.shutdown(wait=True, cancel_futures=True)
        self._works.shutdown(wait=True, cancel_futures=True)
        self._scrubs.shutdown(wait=True, cancel_futures=True)
        self._channels.close()
        self._stores.close()

    # The driver's ports; its thread calls them.

    def commit(self, job: JobName, term: Term, decision: Decision) -> None:
        self._commits.submit(self._guarded, lambda: self._commit(job, term, decision))

    def send(self, directed: Directed) -> None:
        if self.leadership.may_act():
            judge_unknown(self._health, directed)
            self._dispatcher.send(directed)

    def start_work(self, job: JobName, work: Work) -> None:
        slow = isinstance(work, InspectCheckpoint) and work.depth != "chunk"
        (self._scrubs if slow else self._works).submit(self._guarded, lambda: self._work(job, work))

    def log(self, event: str, **fields: Any) -> None:
        if (term := self.leadership.term) is not None:
            fields.setdefault("term", term)
        (self._log.warning if event in _WARNINGS else self._log.info)(event, **fields)

    def moment(self, now: float) -> Moment:
        return Moment(now, self._clock.wall(), secrets.token_hex(8))

    # The threads.

    def _run_loop(self) -> None:
        heard_at = 0.0
        while not self._stopping.is_set():
            self._session.beat()
            now = self._loop_at = self._clock.monotonic()
            if now - heard_at >= HEARD_EVERY_S:
                heard_at = now
                _need_descriptor()
                self._lost = self._driver.world.lost_count()
                if (age_s := self._mirror.age_s()) != float("inf"):
                    self._driver.on_heard(now - age_s, now)
            self._measures.office(self._driver.leads)
            wake_at = self._driver.wake_at
            if wake_at is not None and now >= wake_at:
                self._driver.on_tick(now)
                wake_at = self._driver.wake_at
            wait_s = LOOP_S_MAX if wake_at is None else min(LOOP_S_MAX, wake_at - now)
            # A tenth of the TTL is how often the guardian wants to see this loop alive.
            wait_s = min(wait_s, max(0.05, self._session.ttl_s / 10))
            try:
                event = self._events.get(timeout=wait_s) if wait_s > 0 else self._events.get_nowait()
            except queue.Empty:
                continue
            self._take(event)

    def _take(self, event: Event) -> None:
        """Tell the driver, and what else the mirror has brought meanwhile in one go.

        Each call decides about the jobs it touches: under load, one decision for
        many snapshots is what lets the loop catch up.
        """
        other: Event | None = event
        if isinstance(event, MirrorMoved):
            changes, revision, other = list(event.changes), event.revision, None
            for _ in range(BATCHES_AT_ONCE):
                try:
                    following = self._events.get_nowait()
                except queue.Empty:
                    break
                if not isinstance(following, MirrorMoved):
                    other = following
                    break
                changes += following.changes
                revision = following.revision
            self._driver.on_changes(changes, revision, self._clock.monotonic())
        if other is not None and not isinstance(other, MirrorMoved):
            other(self._clock.monotonic())

    def _commit(self, job: JobName, term: Term, decision: Decision) -> None:
        began = self._clock.monotonic()
        outcome = self._committer.commit(term, decision)
        self._measures.committed(decision, outcome, self._clock.monotonic() - began)
        if isinstance(outcome, Deposed) and not self._stopping.is_set():
            self._session.count_fenced()
            self._log.error("deposed", job=job, term=term)
            self._end_process(EX_TEMPFAIL)
        self._tell(lambda now: self._driver.on_txn(job, outcome, now))

    def _work(self, job: JobName, work: Work) -> None:
        began = self._clock.monotonic()
        result = self._worker.run(work)
        self._measures.worked(work, self._clock.monotonic() - began)
        self._tell(lambda now: self._driver.on_work(job, result, now))

    def _on_changes(self, changes: tuple[Change, ...], revision: int) -> None:
        self._historian.see(changes)
        self._history.add(changes, revision)
        self._webhooks.note(changes)
        for change in changes:
            if change.key == self._keys.leader:
                self._measures.leader_seen(change.after)
                # Past the queue: a standby's reaction to a fallen leader is a matter of milliseconds.
                self.leadership.nudge(change.after)
        self._tell(MirrorMoved(changes, revision))

    def _on_command(self, directed: Directed, ok: bool, problem: str) -> None:
        if not ok and self.leadership.may_act():
            judge_rejection(self._health, directed.agent, problem)
        self._tell(lambda now: self._driver.on_command(directed, ok, problem, now))

    def _on_alarm(self, error: DtrainError) -> None:
        # Deciding from an etcd that forgot could take committed checkpoints for garbage.
        self._log.critical("etcd is not the one it was", error=error.message, fix=error.fix)
        self._end_process(EX_CONFIG)

    def _on_taken(self, error: DtrainError) -> None:
        self._log.critical("replica id taken", code=error.code, error=error.message, fix=error.fix)
        self._end_process(EX_CONFIG)

    def _tell(self, event: Event) -> None:
        try:
            self._events.put(event, timeout=5.0)
        except queue.Full:
            self._fail(f"{QUEUE_MAX} events wait for the driver")

    def _problems(self) -> list[str]:
        """Sentences for people on what is wrong with this replica now."""
        return [
            *self._health.sentences(),
            *self._webhooks.problems(),
            *(self._tls.problems() if self._tls is not None else ()),
        ]

    def _status_server(self, listener: socket.socket) -> StatusServer:
        status = Status(
            self._settings.replica,
            self._keys,
            self._mirror,
            leads=self.leadership.may_act,
            serves=lambda: self._serves,
            loop_at=lambda: self._loop_at,
            problems=self._problems,
            brake_on=lambda: bool(self._driver.brake),
            db_bytes=lambda: self._etcd_health.db_bytes,
            lost=lambda: self._lost,
            measures=self._measures,
            session=self._session,
            clock=self._clock,
        )
        return StatusServer(listener, status.pages(), report=self._log.warning)

    def _acting_term(self) -> Term | None:
        return self.leadership.term if self.leadership.may_act() else None

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException:  # noqa: BLE001 - whatever it is, the process must not outlive it
            self._log.critical("thread died", thread=threading.current_thread().name, exc_info=True)
            self._end_process(EX_SOFTWARE)

    def _fail(self, why: str) -> None:
        self._log.critical("coordinator failed", reason=why)
        self._end_process(EX_SOFTWARE)


def _answers(address: str) -> bool:
    """Tell whether anything accepts a connection at ``host:port``, within a second."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _need_descriptor() -> None:
    """Find out that no file or socket can be opened while it can still be said.

    A leader in that state keeps its lease over the connections it has, and does ever less of its work.

    Raises:
        OSError: none is left.
    """
    os.close(os.dup(2))


def run(argv: Sequence[str]) -> int:
    """Be the guardian's child until told to stop. Ends the process itself.

    Exit codes: 0 stopped, 70 a bug, 75 leadership lost, 78 a person is needed.
    """
    clock = SystemClock()
    try:
        session = attach()
        health = inherited(os.environ)
        settings = config.load(argv, os.environ)
        log.configure(json_lines=settings.log_json, component=f"coordinator/{settings.replica}")
        etcd = open_etcd(settings.etcd, clock)
        coordinator = Coordinator(
            settings,
            etcd,
            session,
            clock=clock,
            decide=plan,
            merge_manifests=merge,
            revision_seen=session.revision_seen,
            access_problems=etcd.problems,
            health=health,
        )
    except DtrainError as error:
        cause = f": {error.cause}" if error.cause else ""
        fix = f"\n  fix: {error.fix}" if error.fix else ""
        sys.stderr.write(f"dtrain coordinator: {error.message}{cause} ({error.code.value}){fix}\n")
        return EX_CONFIG
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: told.set())
    code = EX_SOFTWARE
    try:
        coordinator.start()
        session.set_ready()
        gc.collect()
        # What exists now lives as long as the process: collections need not walk it again.
        gc.freeze()
        told.wait()
        coordinator.resign()
        code = 0
    except BaseException:  # noqa: BLE001 - an orderly end of the interpreter would wait for threads
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        # No teardown: each millisecond of it is one without a leader.
        os._exit(code)
