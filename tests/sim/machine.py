"""One machine: its guardian, its agent's lives, and what outlives them: launchers, ranks, the journal."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.agent import notices
from dtrain.agent.consult import Consultant
from dtrain.agent.core.decisions import (
    ForgetJob,
    JournalCoordinators,
    JournalJob,
    JournalOver,
    JournalTerm,
    JournalWrite,
)
from dtrain.agent.core.events import (
    DrainAsked,
    LauncherReported,
    RankConnected,
    RankDisconnected,
    RankLook,
    RankReported,
    SessionRenewed,
    SessionSeen,
    ShutDown,
    StacksCollected,
    Tick,
    TransferReported,
)
from dtrain.agent.core.events import Event as AgentEvent
from dtrain.agent.core.health import is_waiting
from dtrain.agent.core.state import AgentState, JobState, LauncherStatus
from dtrain.agent.core.state import Machine as MachineFacts
from dtrain.agent.driver import AgentDriver, Ports
from dtrain.agent.launching import LauncherOrder, LauncherReport, LaunchSettings, ProcessId
from dtrain.agent.notice_value import Notice
from dtrain.agent.reporter import Reporter
from dtrain.agent.transferring import TransferEnded, TransferOrder, TransferReport
from dtrain.protocol import codec
from dtrain.protocol.commands import Command
from dtrain.protocol.errors import DtrainError, ErrorCode, Unavailable
from dtrain.protocol.ids import AgentName, Attempt, Incarnation, JobName, Rank, Term, Uid
from dtrain.protocol.ranklink import Hello, Message
from dtrain.protocol.snapshot import NodeRecord, Stack, StackKind
from dtrain.storage.etcd.session import FixedSession
from tests.sim.etcd import EtcdAccess
from tests.sim.link import Link
from tests.sim.process import Guardian, Process, SimClock
from tests.sim.scheduler import Event, Scheduler, Task
from tests.sim.store import NodeStore
from tests.sim.training import SOCKET_S, Connection, SimLauncher
from tests.sim.transfer import SimTransfer

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

QUEUE_S = 0.001
"""From another thread's queue to the driver."""

SESSION_LOOK_S = 0.5
STACKS_S = 1.0
"""For two looks at each rank's stack."""
ORPHAN_GRACE_S = 120.0
STOP_GRACE_S = 5.0


class Host:
    """The scheduler as what runs on one machine sees it: nothing happens there while it is suspended."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.suspended = False
        self._held: list[Callable[[], None]] = []
        self.rng = scheduler.rng
        self.chance = scheduler.chance
        self.log = scheduler.log

    @property
    def now(self) -> float:
        return self._scheduler.now

    def after(self, delay_s: float, call: Callable[[], None]) -> Event:
        return self._scheduler.after(delay_s, lambda: self.run(call))

    def run(self, call: Callable[[], None]) -> None:
        """Run ``call`` now, or when the machine wakes up."""
        if self.suspended:
            self._held.append(call)
        else:
            call()

    def wake(self) -> None:
        self.suspended = False
        held, self._held = self._held, []
        for call in held:
            self.run(call)


class Machine:
    """Power, processes, disk."""

    def __init__(self, cluster: "Cluster", name: str, slots: int) -> None:
        self.cluster = cluster
        self.scheduler = cluster.scheduler
        self.place = Host(cluster.scheduler)
        self.name = name
        self.host = name
        self.slots = slots
        self.powered = False
        self.boots = 0
        self.draining: DrainAsked | None = None
        """What its guardian was told and tells each life of the agent."""
        self.guardian: Guardian | None = None
        self.agent: SimAgent | None = None
        self.journal = SimJournal()
        self.launchers: dict[tuple[JobName, Uid, str], SimLauncher] = {}
        self.fetched: dict[str, tuple[int, bytes]] = {}
        """What the transfer process holds in memory for ranks to map."""
        self.processes: dict[ProcessId, None] = {}
        self._pid = 100
        self.etcd = Link()
        self.peers = Link()
        self.store_link = Link()
        self.store = NodeStore(cluster, self.store_link, waits=False)
        self.clock = SimClock(cluster.scheduler, 0.0, 1.0)
        self.power_on()

    # Power.

    def power_on(self) -> None:
        assert not self.powered
        self.powered = True
        self.boots += 1
        self._boot_guardian()

    def power_off(self) -> None:
        """Everything on it ends at once, and nobody is told."""
        self.powered = False
        self.draining = None
        self.place.suspended = False
        self.place._held.clear()
        if self.guardian is not None:
            self.guardian.die()
            self.guardian = None
        for launcher in list(self.launchers.values()):
            launcher.end(-9, silent=True)
        self.launchers.clear()
        self.fetched.clear()
        self.processes.clear()

    def crash_guardian(self) -> None:
        """The agent dies with it; launchers and ranks stay; init starts it again."""
        if self.guardian is not None:
            self.guardian.die()
            self.guardian = None
            if self.draining is not None and not self.draining.stays:
                # Whoever told it to stop is not asked again; a notice stands.
                self.draining = None
            self.scheduler.after(self.scheduler.rng.uniform(0.5, 3.0), self._boot_again)

    def drain(self, grace_s: float, away_s: float) -> None:
        """SIGTERM at the guardian; once all has ended in order, it starts again after a while."""
        if self.guardian is None or self.guardian.stopped or self.draining is not None:
            return
        self.draining = DrainAsked("SIGTERM", self.clock.monotonic(), "", grace_s)
        self._away_s = away_s
        if self.agent is not None:
            self.agent.drain()

    def preempt(self, left_s: float) -> bool:
        """Tell the agent, and each life of it, that the machine goes; tell whether that is news."""
        if not self.powered or self.draining is not None or (self.guardian and self.guardian.stopped):
            return False
        grace_s = notices.grace_s(Notice("preempted", left_s), 0.0)
        self.draining = DrainAsked("preempted", self.clock.monotonic(), "", grace_s, stays=True)
        if self.agent is not None:
            self.agent.drain()
        return True

    def drained(self) -> None:
        """The agent has ended cleanly: its guardian revokes the lease and ends too."""
        guardian, self.draining = self.guardian, None
        assert guardian is not None
        guardian.stop("drained")

        def again() -> None:
            if self.guardian is guardian:
                guardian.die()
                self.guardian = None
                self._boot_again()

        self.scheduler.after(self._away_s, again)

    def _boot_again(self) -> None:
        if self.powered and self.guardian is None:
            self._boot_guardian()

    def _boot_guardian(self) -> None:
        clock = self.clock = self.cluster.new_clock()
        access = EtcdAccess(self.cluster.etcd, f"{self.name}/guardian", self.etcd)
        self.guardian = Guardian(
            self.scheduler,
            self.name,
            access,
            clock,
            ttl_s=self.cluster.agent_ttl_s,
            keep_lease=True,
            start=lambda session: self._start(session, clock),
            ended=self._agent_ended,
        )

    def _start(self, session: FixedSession, clock: SimClock) -> Process:
        self.agent = SimAgent(self, session, clock)
        return self.agent.process

    def _agent_ended(self) -> None:
        agent, self.agent = self.agent, None
        if agent is not None:
            agent.ended()

    def crash_agent(self) -> None:
        if self.guardian is not None and self.guardian.child is not None:
            self.guardian.child_ended("killed")

    def suspend(self) -> None:
        """The whole machine stands still, its clocks included: a paused VM."""
        self.place.suspended = True
        if self.guardian is not None:
            self.guardian.freeze(clocks=True)

    def wake(self) -> None:
        if not self.place.suspended:
            return
        # Who runs first is chance: the ranks may act before their agent looks.
        ranks_first = self.scheduler.chance(0.5)
        if ranks_first:
            self.place.wake()
        if self.guardian is not None and self.guardian.process.frozen:
            self.guardian.thaw()
        if not ranks_first:
            self.place.wake()

    def lose_journal(self) -> None:
        """The agent's disk is gone, with the agent: launchers that it knew are nobody's."""
        self.journal = SimJournal()
        for launcher in self.launchers.values():
            launcher.stray = True
        self.cluster.checks.journal_lost(self.name)
        self.crash_agent()

    # Processes.

    def new_process(self) -> ProcessId:
        self._pid += 1
        return ProcessId(self._pid, self._pid, f"{self.name}-{self.boots}")

    def ranks(self) -> list[Any]:
        return [rank for launcher in self.launchers.values() for rank in launcher.ranks if rank.alive]

    def find(self, process: ProcessId) -> SimLauncher | Any | None:
        for launcher in self.launchers.values():
            if launcher.process == process:
                return launcher
            for rank in launcher.ranks:
                if rank.live.process == process and rank.alive:
                    return rank
        return None

    def sealed_at(self, path: str) -> bytes | None:
        folder, local_rank, seq = path.rsplit("/", 2)
        for launcher in self.launchers.values():
            if launcher.folder == folder:
                found = launcher.arena.get((int(local_rank), int(seq)))
                return None if found is None else found[1]
        return None


class SimJournal:
    """The disk: survives everything but is read back through the codec."""

    def __init__(self) -> None:
        self.term = Term(0)
        self.jobs: dict[JobName, JobState] = {}
        self.seen: dict[JobName, tuple[str, ...]] = {}
        self.over: dict[Uid, Attempt] = {}
        self.coordinators: tuple[str, ...] = ()
        self.failing = 0
        """How many faults let it refuse writes now."""

    def apply(self, writes: Sequence[JournalWrite]) -> None:
        if not writes:
            return
        if self.failing:
            raise Unavailable(ErrorCode.AGENT_UNAVAILABLE, "the disk is full")
        for write in writes:
            match write:
                case JournalTerm(term):
                    self.term = term
                case JournalJob(job, ids):
                    self.jobs[job.name] = job
                    self.seen[job.name] = (*self.seen.get(job.name, ()), *ids)
                case JournalOver(uid, attempt):
                    self.over[uid] = attempt
                case JournalCoordinators(addresses):
                    self.coordinators = addresses
                case ForgetJob(name):
                    self.jobs.pop(name, None)
                    self.seen.pop(name, None)

    def load(self) -> tuple[Term, dict[JobName, JobState], dict[JobName, tuple[str, ...]]]:
        jobs = {
            name: codec.decode(JobState, codec.encode(job), bytes_max=1 << 23)
            for name, job in self.jobs.items()
        }
        return self.term, jobs, dict(self.seen)


class SimAgent:
    """One life of the agent process: the real driver and everything it reaches."""

    def __init__(self, machine: Machine, session: FixedSession, clock: SimClock) -> None:
        self.machine = machine
        self.cluster = machine.cluster
        self.scheduler = machine.scheduler
        self.session = session
        self.clock = clock
        self.process = Process(self.scheduler, machine.name, machine.cluster.checks.bug)
        self.access = EtcdAccess(machine.cluster.etcd, machine.name, machine.etcd, self.process.is_alive)
        self.access.post = self.process.post
        self.address = f"{machine.name}:{machine.cluster.new_port()}"
        self.reporter = Reporter(
            self.access,
            self.cluster.keys,
            session,
            NodeRecord(
                AgentName(machine.name),
                Incarnation(""),
                self.address,
                machine.host,
                machine.slots,
                boot_id=f"{machine.name}-{machine.boots}",
            ),
            clock,
            new_incarnation=self._new_incarnation,
            on_registered=self._on_registered,
            on_taken=lambda _other, _since_s: None,
            rng=self.scheduler.rng,
            log=self._log,
        )
        self.reporter._changed = _Changed(self.process)  # type: ignore[assignment]
        self.launchers = _Launchers(self)
        self.transfers = _Transfers(self)
        self._connections: dict[int, Connection] = {}
        self._numbers = 0
        self._tick: Event | None = None
        self.ending = False
        """It was drained, and ends what is left before it ends itself."""
        self.gave_up = False
        """The grace of a notice was over with ranks here."""
        self.loops: list[Task] = []
        """What must not end before the process does."""
        self.process.later(0.01, self._begin)

    def _begin(self) -> None:
        term, jobs, seen = self.machine.journal.load()
        facts = MachineFacts(
            cluster=self.cluster.name,
            agent=AgentName(self.machine.name),
            host=self.machine.host,
            rank_socket="/run/ranks",
            run_dir="/run",
            log_dir="/log",
            life=self._new_incarnation(),
            orphan_grace_s=ORPHAN_GRACE_S,
        )
        journal = self.machine.journal
        state = AgentState(
            facts,
            Incarnation(facts.life),
            term,
            jobs,
            seen,
            over=dict(journal.over),
            coordinators=journal.coordinators,
        )
        watch = _Watch(self)
        ports = Ports(
            self.machine.journal, self.launchers, self.transfers, self, self.reporter, _Logs(), watch
        )
        self.driver = AgentDriver(state, ports, self.clock, confirm_term=self._confirm_term, log=self._log)
        self.driver.adopt()
        if self.machine.draining is not None:
            self.driver.handle(self.machine.draining)
        self._moved()
        self.consultant = Consultant(
            self.access,
            self.cluster.keys,
            AgentName(self.machine.name),
            self.clock,
            state=lambda: self.driver.state,
            post=lambda event: self.process.later(QUEUE_S, lambda: self._handle(event)),
            ask=lambda addresses, request: self.cluster.network.consult(self, addresses, request),
            rng=self.scheduler.rng,
            log=self._log,
        )
        self.loops = [
            self.process.spawn(self._report, "reporter"),
            self.process.spawn(self._consult, "consult"),
        ]
        self._look_at_session()

    def drain(self) -> None:
        """What its guardian was told, if it was told anything."""
        told = self.machine.draining
        if told is not None and hasattr(self, "driver"):
            self.handle(told)

    def _end(self) -> None:
        """As ``Agent._end``: ranks and launchers first."""
        state = self.driver.state
        lives = [
            job.name
            for job in state.jobs.values()
            if job.launcher.status is not LauncherStatus.GONE or is_waiting(job)
        ]
        if (not lives and self.reporter.idle) or self.clock.monotonic() > self._end_by:
            self.machine.drained()
        else:
            self.process.later(0.1, self._end)

    def _look_at_session(self) -> None:
        self._see_session()
        self._moved()
        self.process.later(SESSION_LOOK_S, self._look_at_session)

    def _see_session(self) -> None:
        """As the agent's loop does before each event."""
        view = self.session.view()
        self.driver.see_session(SessionSeen(view.lease, view.ttl_s, view.demote_at))

    def _consult(self) -> None:
        task = self.scheduler.current()
        while True:
            until = self.consultant.work()
            task.sleep(max(0.001, until - self.clock.monotonic()))

    def _report(self) -> None:
        while True:
            self.reporter.wait(self.reporter.work())

    def _new_incarnation(self) -> Incarnation:
        return Incarnation(f"{self.scheduler.rng.getrandbits(64):016x}")

    def _on_registered(self, generation: int, incarnation: Incarnation) -> None:
        self.process.later(QUEUE_S, lambda: self._handle(SessionRenewed(generation, incarnation)))

    def _log(self, event: str, **fields: Any) -> None:
        self.scheduler.log(self.machine.name, event, **fields)

    def handle(self, event: AgentEvent) -> None:
        """Something happened; it reaches the driver through the process."""
        self.process.post(lambda: self._handle(event))

    def _handle(self, event: AgentEvent) -> None:
        if not hasattr(self, "driver"):
            self.process.later(0.01, lambda: self._handle(event))
            return
        self._see_session()
        self.driver.handle(event)
        self._moved()

    def _moved(self) -> None:
        self.cluster.checks.agent_stepped(self, self.driver.state)
        drain = self.driver.state.drain
        if drain is not None and drain.over and drain.stays and not self.gave_up:
            self.gave_up = True
            self.process.later(0.0, lambda: self._handle(ShutDown(STOP_GRACE_S)))
        elif drain is not None and drain.over and not drain.stays and not self.ending:
            self.ending = True
            self._end_by = self.clock.monotonic() + STOP_GRACE_S + 15.0
            self.process.later(0.0, lambda: self._handle(ShutDown(STOP_GRACE_S)))
            self.process.later(0.1, self._end)
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        wake_at = self.driver.wake_at
        if wake_at is not None:
            at = max(self.clock.global_at(wake_at), self.scheduler.now + 0.001)
            self._tick = self.scheduler.at(at, lambda: self.handle(Tick()))

    def ended(self) -> None:
        """The process is gone: what hangs on it notices."""
        self.transfers.ended_with_agent()
        for connection in list(self._connections.values()):
            connection.agent_gone()
        for launcher in self.machine.launchers.values():
            launcher.detach()

    # Commands.

    def command(self, command: Command, answer: Callable[[bool, str], None]) -> None:
        """A command has arrived on the wire."""
        if self.ending:
            answer(False, "the agent is ending")
            return

        def body() -> None:
            confirmed = self.driver.confirm(command)
            self.process.later(QUEUE_S, lambda: take(confirmed))

        def take(confirmed: bool) -> None:
            self._see_session()
            result = self.driver.take(command, confirmed)
            self._moved()
            answer(result.accepted, result.message)

        if hasattr(self, "driver"):
            self.process.spawn(body, "command")

    def _confirm_term(self, term: Term) -> bool:
        try:
            found = self.access.range(self.cluster.keys.leader, deadline_s=2.0).items
        except DtrainError:
            return False
        return bool(found) and found[0].create_revision == term

    # Ranks.

    def rank_connected(self, connection: Connection, hello: Hello) -> None:
        self._numbers += 1
        number = connection.number = self._numbers
        self._connections[number] = connection
        connection.to_agent = lambda report: self._later(RankReported(number, report))
        connection.on_gone = lambda: self._gone(number)
        self._later(RankConnected(number, hello))

    def _gone(self, number: int) -> None:
        self._connections.pop(number, None)
        self._later(RankDisconnected(number))

    def _later(self, event: AgentEvent) -> None:
        self.process.later(SOCKET_S, lambda: self._handle(event))

    def send(self, connection: int, message: Message) -> None:
        found = self._connections.get(connection)
        if found is not None:
            found.send(message)

    def drop(self, connection: int) -> None:
        found = self._connections.pop(connection, None)
        if found is not None:
            found.close()


class _Changed:
    """The reporter's condition: waiting takes virtual time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waits: tuple[Task, int] | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def notify(self) -> None:
        if self._waits is not None:
            task, token = self._waits
            self._process.later(QUEUE_S, lambda: task.answer(token, None))

    def wait(self, timeout_s: float) -> None:
        task = self._process.scheduler.current()
        self._waits = (task, task.waiting + 1)
        token = task.waiting + 1
        timer = self._process.later(max(0.001, timeout_s), lambda: task.answer(token, None))
        task.wait()
        timer.cancel()
        self._waits = None


class _Launchers:
    """``LauncherPort`` over the machine's launchers."""

    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent
        self._machine = agent.machine
        self._mine: dict[tuple[JobName, Uid], SimLauncher] = {}

    def start(self, job: JobName, uid: Uid, settings: LaunchSettings) -> ProcessId:
        if self._agent.scheduler.chance(self._agent.cluster.faults.launcher_failure):
            raise Unavailable(ErrorCode.LAUNCHER_FAILED, "no process could be started")
        launcher = SimLauncher(self._machine, job, uid, settings.folder, settings.orphan_grace_s)
        self._machine.launchers[job, uid, settings.folder] = launcher
        self._attach(launcher)
        return launcher.process

    def attach(self, job: JobName, uid: Uid, folder: str, process: ProcessId) -> bool:
        launcher = self._machine.launchers.get((job, uid, folder))
        if launcher is None or launcher.process != process:
            return False
        self._attach(launcher)
        return True

    def _attach(self, launcher: SimLauncher) -> None:
        self._mine[launcher.job, launcher.uid] = launcher
        agent = self._agent

        def report(report: LauncherReport) -> None:
            if agent.process.alive:
                agent.handle(LauncherReported(launcher.job, launcher.uid, report))

        launcher.attach(report)

    def send(self, job: JobName, uid: Uid, order: LauncherOrder) -> None:
        launcher = self._mine.get((job, uid))
        if launcher is not None:
            # Once written to the socket it arrives, whether or not the agent lives on.
            self._machine.place.after(SOCKET_S, lambda: launcher.obey(order))

    def kill(self, process: ProcessId) -> None:
        found = self._machine.find(process)
        if isinstance(found, SimLauncher):
            found.end(-9)
        elif found is not None:
            found.exit(-9, "killed by its agent")

    def is_alive(self, process: ProcessId) -> bool:
        return self._machine.find(process) is not None

    def waits_in(self, process: ProcessId) -> str:
        return ""


class _Transfers:
    """``TransferPort``: a child of the agent, started by the first order."""

    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent
        self._transfer: SimTransfer | None = None
        self._ended = False

    def send(self, order: TransferOrder) -> None:
        if self._ended:
            return
        if self._transfer is None:
            self._transfer = SimTransfer(self._agent.machine, self._emit)
        self._transfer.order(order)

    def _emit(self, report: TransferReport) -> None:
        self._agent.handle(TransferReported(report))

    def ended(self) -> None:
        self._ended = False

    def crash(self) -> None:
        """A fault: the process is killed, every order in it is lost."""
        if self._transfer is not None:
            self._transfer.die()
            self._transfer = None
            self._ended = True
            self._agent.handle(TransferReported(TransferEnded(-9)))

    def ended_with_agent(self) -> None:
        if self._transfer is not None:
            self._transfer.die()
            self._transfer = None


class _Watch:
    """``WatchPort``: ranks of the simulation wait in a collective unless a script has them hang."""

    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent

    def look(self, rank: Rank, process: ProcessId) -> RankLook:
        return RankLook(rank, "" if self._agent.machine.find(process) is None else "S")

    def collect(
        self, job: JobName, uid: Uid, attempt: Attempt, dump: str, processes: Mapping[Rank, ProcessId]
    ) -> None:
        def done() -> None:
            stacks = []
            for rank, process in processes.items():
                found = self._agent.machine.find(process)
                kind = getattr(found, "hung", None) or StackKind.COLLECTIVE
                where = "all_reduce" if kind is StackKind.COLLECTIVE else "train"
                stacks.append(Stack(rank, kind, f"{where} (train.py:1)", dump))
            self._agent.handle(StacksCollected(job, uid, attempt, dump, tuple(stacks)))

        self._agent.process.later(STACKS_S, done)


class _Logs:
    def prepare(
        self, job: JobName, uid: Uid, attempt: Attempt, first_rank: Rank, *, ranks: int, store: str
    ) -> None:
        """Nobody reads logs here."""
