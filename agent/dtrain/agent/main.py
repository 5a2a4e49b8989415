"""The composition root: parse, build, run, end.

The main thread owns the driver and all state. Others hand it events through one
bounded queue: grpc's (commands, which they confirm first), the rank server's,
the reporter's, and those of the clients of launchers and transfer process. A
thread that dies takes the process with it: the guardian starts another one
beside the running ranks, which finds everything in the journal.
"""

import fcntl
import gc
import importlib.metadata
import os
import queue
import secrets
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from dtrain.agent import config, notices
from dtrain.agent.archiver import Archiver
from dtrain.agent.config import Config
from dtrain.agent.consult import Consultant, ConsultThread, ask_over_grpc
from dtrain.agent.core import hangs
from dtrain.agent.core.decisions import Answer
from dtrain.agent.core.events import DrainAsked, Event, SessionRenewed, SessionSeen, ShutDown, Tick
from dtrain.agent.core.health import is_waiting
from dtrain.agent.core.state import AgentState, LauncherStatus, Machine
from dtrain.agent.core.torch_env import base_env
from dtrain.agent.driver import AgentDriver, Ports
from dtrain.agent.journal import Journal
from dtrain.agent.launch.processes import boot_id
from dtrain.agent.link import AgentServer, AgentServicer
from dtrain.agent.log_keeper import LogKeeper
from dtrain.agent.logs import RankLogs
from dtrain.agent.measures import Measures
from dtrain.agent.notice_value import Notice
from dtrain.agent.processes import Launchers, Transfers
from dtrain.agent.rank_socket import RankServer, short_run_dir
from dtrain.agent.reporter import Reporter, ReporterThread, Settings
from dtrain.agent.series import Series
from dtrain.agent.stacks import RankWatch
from dtrain.agent.status import Status
from dtrain.protocol.commands import Command
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import Attempt, Incarnation, JobName, Term
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord, Stack, WorkerPhase
from dtrain.runtime import grpc_tls, log
from dtrain.runtime.clock import Clock, SystemClock, iso
from dtrain.runtime.serving import StatusServer, inherited
from dtrain.runtime.tls import Role
from dtrain.storage.etcd import versions
from dtrain.storage.etcd.metered import MeteredEtcd
from dtrain.storage.etcd.open import open_etcd
from dtrain.storage.etcd.port import Etcd
from dtrain.storage.etcd.session import Session, attach

EX_SOFTWARE = 70
"""A thread died: a bug."""

EX_CONFIG = 78
"""The settings need a person."""

QUEUE_MAX = 10_000
POST_S_MAX = 10.0
LOOP_S_MAX = 0.25
ANSWER_S_MAX = 5.0
"""How long a command may wait for the driver; the leader sends it again."""
LAST_WORDS_S_MAX = 2.0
LAST_COPY_S_MAX = 3.0
"""How long an agent that stops waits for its ranks' last lines to be in the store."""

_WARNINGS = frozenset(
    {
        "journal failed",
        "journal moved aside",
        "launcher killed",
        "launcher warning",
        "machine blocked",
        "name taken",
        "preemption notice",
        "preemption notices fail",
        "archive book not written",
        "log copy failed",
        "log folder failed",
        "log times not noted",
        "rank refused",
        "registration lost",
        "snapshot not written",
        "status page failed",
        "transfer process ended",
    }
)


_Item = Event | tuple[Command, bool, "Future[Answer]"]


class Agent:
    """One agent, wired. ``end_process`` ends it at once, whichever thread calls."""

    def __init__(
        self,
        settings: Config,
        etcd: Etcd,
        session: Session,
        *,
        clock: Clock,
        end_process: Callable[[int], None] = os._exit,
        health: socket.socket | None = None,
    ) -> None:
        self._settings = settings
        self._measures = Measures(settings.name)
        etcd = MeteredEtcd(etcd, self._measures.etcd, clock)
        self._etcd = etcd
        self._session = session
        self._clock = clock
        self._end_process = end_process
        self._told_to_stop = False
        self._told_to_drain_at: float | None = None
        self._drain_begun = False
        self._noticed: deque[DrainAsked] = deque()
        self._gave_up = False
        """The grace of a notice was over with ranks here, and they were told to end."""
        self._log = log.get("agent").bind(agent=settings.name)
        self._keys = Keys(settings.cluster)
        self._queue: queue.Queue[_Item] = queue.Queue(QUEUE_MAX)
        data_dir = settings.data_dir
        run_dir = short_run_dir(data_dir)
        self._journal = Journal.open(data_dir / "journal.sqlite3")
        if self._journal.problem:
            self.log("journal moved aside", problem=self._journal.problem)
        logs = RankLogs(data_dir / "logs")
        self._series = Series(clock.wall, logs.keep, logs.kept)
        self._rank_watch = RankWatch(logs, self._post)
        self._ranks = RankServer(
            run_dir / "ranks.sock",
            self._post,
            on_refusal=lambda why: self.log("rank refused", why=why),
            on_death=lambda: self._fail("the rank server died"),
        )
        self._tls = grpc_tls.load(settings.tls, settings.cluster, Role.AGENT, settings.name, clock=clock)
        self._server = AgentServer(settings.listen, self._tls)
        self.address = settings.advertised(self._server.port)
        self._launchers = Launchers(self._post)
        self._transfers = Transfers(
            self._post,
            (
                *("--cache-dir", str(data_dir / "checkpoints"), "--cache-bytes", str(settings.cache_bytes)),
                *("--packages-dir", str(data_dir / "packages")),
                *("--packages-bytes", str(settings.package_cache_bytes)),
            ),
            on_archived=lambda report: self._archiver.take(report),
            on_use=self._measures.store_used,
        )
        self._archiver = Archiver(
            logs,
            settings.cluster,
            settings.name,
            send=self._transfers.send,
            ended=self._rank_ended,
            clock=clock,
            interval_s=settings.log_copy_interval_s,
            bytes_max=settings.log_copy_bytes,
            log=self.log,
        )
        self._keeper = LogKeeper(
            data_dir / "logs",
            busy=self._archiver.folders,
            here=lambda: [logs.folder(name, one.uid) for name, one in dict(self._driver.state.jobs).items()],
            clock=clock,
            keep_s=settings.log_keep_days * 86400,
            bytes_max=settings.log_bytes_max,
            log=self.log,
        )
        life = secrets.token_hex(8)
        self._reporter = Reporter(
            etcd,
            self._keys,
            session,
            self._node_record(),
            clock,
            new_incarnation=lambda: Incarnation(secrets.token_hex(8)),
            on_registered=lambda generation, mine: self._post(SessionRenewed(generation, mine)),
            on_taken=self._on_taken,
            settings=Settings(progress_s=settings.report_interval_s),
            log=self.log,
        )
        self._reporting = ReporterThread(
            self._reporter, lambda error: self._fail(f"the reporter died: {error!r}")
        )
        remembered = self._journal.load()
        machine = Machine(
            cluster=settings.cluster,
            agent=settings.name,
            host=settings.host,
            rank_socket=str(self._ranks.path),
            run_dir=str(run_dir),
            log_dir=str(data_dir / "logs"),
            env=base_env(os.environ),
            working_dir=str(Path.cwd()),
            tree_dir=str(data_dir / "packages" / "trees"),
            life=life,
            orphan_grace_s=settings.orphan_grace_s,
        )
        self._driver = AgentDriver(
            AgentState(
                machine,
                Incarnation(life),
                # Whoever commands must still be etcd's leader: that is asked before the first command.
                Term(0) if settings.accept_restored_etcd else remembered.term,
                remembered.jobs,
                remembered.seen,
                over=remembered.over,
                coordinators=remembered.coordinators,
            ),
            Ports(
                self._journal,
                self._launchers,
                self._transfers,
                self._ranks,
                self._reporter,
                self._archiver,
                self._rank_watch,
            ),
            clock,
            confirm_term=self._confirm_term,
            log=self.log,
            see=self._see,
        )
        self._consulting = ConsultThread(
            Consultant(
                etcd,
                self._keys,
                settings.name,
                clock,
                state=lambda: self._driver.state,
                post=self._post,
                ask=ask_over_grpc(self._tls),
                log=self.log,
            ),
            clock,
            lambda error: self._fail(f"the consultant died: {error!r}"),
        )
        self._servicer = AgentServicer(
            self._execute,
            logs,
            self._rank_ended,
            lambda: self._driver.state.term,
            self._stacks,
            curves=self._series.read,
        )
        self._notices = notices.Watch(
            settings.preemption_notices,
            interval_s=settings.preemption_interval_s,
            clock=clock,
            on_notice=self._on_notice,
            log=self.log,
        )
        self._loop_at = clock.monotonic()
        self._status = None if health is None else self._status_server(health)

    def run(self) -> None:
        """Serve until ``stop``; the calling thread owns all state from here on."""
        self._ranks.start()
        self._driver.adopt()
        # Before it registers: a successor that drains must not look as if it did not.
        self._notices.start()
        self._begin_drain()
        self._session.set_started()
        self._reporting.start()
        self._consulting.start()
        self._server.start(self._servicer)
        threading.Thread(target=self._archive, name="archive", daemon=True).start()
        threading.Thread(target=self._keep_logs, name="log-keeper", daemon=True).start()
        if self._status is not None:
            threading.Thread(target=self._serve_status, name="status", daemon=True).start()
        self.log("agent started", address=self.address, slots=self._settings.slots)
        while not self._told_to_stop and not (self._is_drained() and not self._stays()):
            self._turn()
        self._end()

    def stop(self) -> None:
        """Ask ``run`` to end; safe in a signal handler, where the queue's lock may be held already."""
        self._told_to_stop = True

    def drain(self, since: float | None = None) -> None:
        """Ask ``run`` to end once the jobs here have moved. Safe in a signal handler.

        ``since`` (monotonic): when it was asked, if a former life of the agent heard it. Asked again,
        nothing changes: a supervisor may signal the guardian, which passes it on, and this process too.
        """
        if not self._settings.drain_grace_s:
            self.stop()
        elif self._told_to_drain_at is None:
            self._told_to_drain_at = self._clock.monotonic() if since is None else since

    def close(self) -> None:
        """Free everything: for tests that go on living."""
        self._notices.close()
        self._archiver.close()
        self._keeper.close()
        self._reporting.close()
        self._consulting.close()
        self._ranks.close()
        self._launchers.close()
        self._transfers.close()
        if self._status is not None:
            self._status.close()
        self._journal.close()

    def log(self, event: str, **fields: Any) -> None:
        """One line."""
        (self._log.warning if event in _WARNINGS else self._log.info)(event, **fields)

    # The loop

    def _turn(self) -> None:
        """Take in one event, or wait a moment for one."""
        self._session.beat()
        self._loop_at = self._clock.monotonic()
        if self._reporter.registered:
            self._session.set_ready()
        view = self._session.view()
        self._driver.see_session(SessionSeen(view.lease, view.ttl_s, view.demote_at))
        now = self._clock.monotonic()
        self._begin_drain()
        wake_at = self._driver.wake_at
        if wake_at is not None and now >= wake_at:
            self._driver.handle(Tick())
            wake_at = self._driver.wake_at
        # A tenth of the TTL is how often the guardian wants to see this loop alive.
        wait_s = min(LOOP_S_MAX, max(0.05, self._session.ttl_s / 10))
        if wake_at is not None:
            wait_s = min(wait_s, max(0.0, wake_at - now))
        try:
            item = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, tuple):
            command, confirmed, future = item
            # Given up by its caller: the leader sends it again, and then wants an answer.
            if future.set_running_or_notify_cancel():
                future.set_result(self._driver.take(command, confirmed))
            return
        self._driver.handle(item)

    def _begin_drain(self) -> None:
        at = self._told_to_drain_at
        if at is not None and not self._drain_begun:
            self._drain_begun = True
            since = iso(self._clock.wall() - (self._clock.monotonic() - at))
            self._driver.handle(DrainAsked("SIGTERM", at, since, self._settings.drain_grace_s))
        while self._noticed:
            self._driver.handle(self._noticed.popleft())

    def _on_notice(self, notice: Notice) -> None:
        """Take in, in whichever thread, that the machine is about to go; the loop drains."""
        at = self._clock.monotonic()
        grace_s = notices.grace_s(notice, self._settings.notice_grace_s)
        since = iso(self._clock.wall())
        self._noticed.append(DrainAsked(notice.reason, at, since, grace_s, stays=True))

    def _stays(self) -> bool:
        """Whether it stays, drained by a notice and not told to end, until the machine goes.

        Ended, it would be started again at once, only to find that the machine is still to go.
        """
        if self._told_to_drain_at is not None or not self._notices.standing:
            return False
        if not self._gave_up and not self._settings.keep_ranks:
            self._gave_up = True
            self._driver.handle(ShutDown(self._settings.stop_grace_s))
        return True

    def _is_drained(self) -> bool:
        drain = self._driver.state.drain
        return drain is not None and bool(drain.over)

    def _end(self) -> None:
        """End ranks unless they are to be kept, publish what became of them, and let go."""
        self._server.stop()
        if not self._settings.keep_ranks:
            self.log("ranks are being stopped", grace_s=self._settings.stop_grace_s)
            self._driver.handle(ShutDown(self._settings.stop_grace_s))
            while any(self._lives(name) for name in self._driver.state.jobs):
                self._turn()
            self._archiver.hurry()
        began = self._clock.monotonic()
        while self._has_last_words(self._clock.monotonic() - began):
            self._session.beat()
            self._reporter.wait(self._clock.monotonic() + 0.02)
        self._session.set_clean_stop()
        self.log("agent stopped")

    def _has_last_words(self, waited_s: float) -> bool:
        """Whether the agent's end waits for a snapshot to be published, or for logs to be copied."""
        if waited_s < LAST_WORDS_S_MAX and not self._reporter.idle:
            return True
        copies = not self._settings.keep_ranks and self._archiver.busy
        return waited_s < LAST_COPY_S_MAX and copies

    def _lives(self, name: JobName) -> bool:
        job = self._driver.state.jobs[name]
        # What does not die is not waited for: it is not ours to end.
        return job.launcher.status is not LauncherStatus.GONE or is_waiting(job)

    # Other threads

    def _post(self, event: Event) -> None:
        try:
            self._queue.put(event, timeout=POST_S_MAX)
        except queue.Full:
            self._fail(f"{QUEUE_MAX} events wait for the driver")

    def _execute(self, command: Command) -> Answer:
        confirmed = self._driver.confirm(command)
        future: Future[Answer] = Future()
        try:
            self._queue.put((command, confirmed, future), timeout=ANSWER_S_MAX)
            return future.result(ANSWER_S_MAX)
        except (queue.Full, FutureTimeoutError) as error:
            future.cancel()
            raise Unavailable(ErrorCode.AGENT_UNAVAILABLE, "the agent is busy") from error

    def _confirm_term(self, term: Term) -> bool:
        try:
            found = self._etcd.range(self._keys.leader, deadline_s=2.0).items
        except DtrainError as error:
            self.log("term not confirmed", term=term, error=error.message)
            return False
        return bool(found) and found[0].create_revision == term

    def _status_server(self, listener: socket.socket) -> StatusServer:
        status = Status(
            self._settings.slots,
            state=lambda: self._driver.state,
            registered=lambda: self._reporter.registered,
            stopping=lambda: (
                self._told_to_stop
                or self._told_to_drain_at is not None
                or self._driver.state.drain is not None
            ),
            loop_at=lambda: self._loop_at,
            measures=self._measures,
            session=self._session,
            monotonic=self._clock.monotonic,
        )
        return StatusServer(listener, status.pages(), report=self.log)

    def _archive(self) -> None:
        try:
            self._archiver.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, logs must not stay behind unnoticed
            self._fail(f"the archiver died: {error!r}")

    def _keep_logs(self) -> None:
        try:
            self._keeper.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, a disk must not fill unnoticed
            self._fail(f"the keeper of logs died: {error!r}")

    def _serve_status(self) -> None:
        assert self._status is not None
        try:
            self._status.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, probes must not find nobody for ever
            self._fail(f"the status port died: {error!r}")

    def _rank_ended(self, job: str, uid: str, attempt: Attempt, rank: int) -> bool:
        known = self._driver.state.jobs.get(JobName(job))
        if known is None or known.uid != uid or attempt < known.attempt:
            return True
        if known.phase in (WorkerPhase.IDLE, WorkerPhase.DONE):
            return True
        found = next((local for local in known.ranks if local.rank == rank), None)
        return found is not None and found.exit_code is not None

    def _see(self, before: AgentState, after: AgentState, now: float) -> None:
        self._measures.see(before, after, now)
        self._series.see(before, after, now)

    def _stacks(self, job: str, uid: str) -> list[tuple[Stack, str]]:
        known = self._driver.state.jobs.get(JobName(job))
        if known is None or known.uid != uid:
            raise NotFound(ErrorCode.NOT_FOUND, f"job {job} has no ranks on this machine")
        found = hangs.processes(known)
        return self._rank_watch.now(known.name, known.uid, known.attempt, found, "somebody asked")

    def _on_taken(self, other: NodeRecord | None, waited_s: float) -> None:
        """Another lease holds our name: our own former guardian's, or a second machine's."""
        where = f"{other.host} (pid {other.pid})" if other else "an agent of another version"
        ours = (
            other is not None
            and other.boot_id == boot_id()
            and other.host == self._settings.host
            and not Path(f"/proc/{other.pid}").exists()
        )
        message = f"the name {self._settings.name} is taken by an agent on {where}"
        if waited_s == 0.0:
            self.log("name taken", reason=message, waiting="for its lease to expire")
        if not ours and waited_s > 2 * self._settings.ttl_s:
            complain(
                Refused(
                    ErrorCode.AGENT_NAME_TAKEN,
                    message,
                    fix="give each machine a --name of its own, or stop the other agent",
                )
            )
            self._end_process(EX_CONFIG)

    def _fail(self, why: str) -> None:
        self._log.critical("agent failed", reason=why)
        self._end_process(EX_SOFTWARE)

    def _node_record(self) -> NodeRecord:
        settings = self._settings
        return NodeRecord(
            agent=settings.name,
            incarnation=Incarnation(""),
            address=self.address,
            host=settings.host,
            slots=settings.slots,
            boot_id=boot_id(),
            pid=os.getpid(),
            gpus=settings.gpus,
            version=importlib.metadata.version("dtrain"),
            since=iso(self._clock.wall()),
        )


def lock_data_dir(folder: Path) -> int:
    """Take the folder for this process; return the descriptor that holds the lock.

    Raises:
        Refused: BAD_SETTING; another agent has it, or it cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"{folder} cannot be used: {error.strerror}",
            fix="choose another --data-dir",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        pid = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"{folder} is in use by another agent (pid {pid or 'unknown'})",
            fix="stop that agent, or give this one a --name or --data-dir of its own",
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def complain(error: DtrainError) -> None:
    """Tell the operator what is wrong and what to do."""
    cause = f": {error.cause}" if error.cause else ""
    fix = f"\n  fix: {error.fix}" if error.fix else ""
    sys.stderr.write(f"dtrain agent: {error.message}{cause} ({error.code.value}){fix}\n")
    sys.stderr.flush()


def run(argv: Sequence[str]) -> int:
    """Be the guardian's child until told to stop. Ends the process itself.

    Exit codes: 0 stopped, 70 a bug, 78 a person is needed.
    """
    clock = SystemClock()
    try:
        session = attach()
        health = inherited(os.environ)
        settings = config.load(argv, os.environ)
        log.configure(json_lines=settings.log_json, component=f"agent/{settings.name}")
        lock_data_dir(settings.data_dir)
        etcd = open_etcd(settings.etcd, clock)
        agent = Agent(settings, etcd, session, clock=clock, health=health)
    except DtrainError as error:
        complain(error)
        return EX_CONFIG
    signal.signal(signal.SIGTERM, lambda _number, _frame: agent.drain())
    # The guardian's word for: at once. Two SIGTERMs could become one on their way.
    signal.signal(signal.SIGINT, lambda _number, _frame: agent.stop())
    if session.stopping_since:
        agent.drain(session.stopping_since)
    # It ends once etcd has answered: nothing waits for it.
    tells = (etcd, bool(settings.etcd.user), log.get("etcd").warning)
    threading.Thread(target=versions.tell, args=tells, name="etcd-version", daemon=True).start()
    gc.collect()
    # What exists now lives as long as the process: collections need not walk it again.
    gc.freeze()
    try:
        agent.run()
    except Exception:  # noqa: BLE001 - whatever it is, the guardian's next child starts from the journal
        log.get("agent").critical("driver died", exc_info=True)
        sys.stderr.flush()
        os._exit(EX_SOFTWARE)
    sys.stderr.flush()
    # No teardown: the transfer process ends with this one, launchers that are kept do not.
    os._exit(0)
