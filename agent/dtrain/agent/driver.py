"""The agent's event machine: one event in, one decision carried out.

It has no thread and no queue: the one thread that owns it feeds it, in the
daemon as in the simulation. Commands may take seconds to confirm, so the
daemon confirms them on the thread that received them (see ``link``).
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from dtrain.agent import telling
from dtrain.agent.core import isolation
from dtrain.agent.core.adoption import adopt
from dtrain.agent.core.decisions import (
    Action,
    Answer,
    CollectStacks,
    Decision,
    DeleteSnapshot,
    DropConnection,
    EnsureLauncher,
    JournalJob,
    JournalWrite,
    KillLauncher,
    LauncherOrder,
    LookAtRanks,
    PrepareLogs,
    ProbeProcesses,
    PublishDraining,
    PublishHealth,
    RankMessage,
    TransferOrder,
    WriteSnapshot,
)
from dtrain.agent.core.events import (
    CommandArrived,
    EtcdWentBack,
    Event,
    LauncherReported,
    LauncherStarted,
    ProcessesProbed,
    RankLook,
    RanksLookedAt,
    SessionSeen,
    Tick,
    TransferReported,
)
from dtrain.agent.core.invariants import check
from dtrain.agent.core.snapshots import snapshot_of
from dtrain.agent.core.state import AgentState, durable_view
from dtrain.agent.core.step import step
from dtrain.agent.launching import LauncherEnded, LaunchSettings, ProcessId
from dtrain.agent.launching import LauncherOrder as OrderToLauncher
from dtrain.agent.transferring import TransferEnded
from dtrain.agent.transferring import TransferOrder as OrderToTransfer
from dtrain.protocol.commands import Command
from dtrain.protocol.errors import DtrainError, Unavailable
from dtrain.protocol.ids import Attempt, JobName, Rank, Term, Uid
from dtrain.protocol.ranklink import Message
from dtrain.protocol.snapshot import Draining, WorkerSnapshot
from dtrain.runtime.clock import Clock


class JournalPort(Protocol):
    """Durable memory."""

    def apply(self, writes: Sequence[JournalWrite]) -> None:
        """Make the writes durable, all or none; raises Unavailable."""
        ...


class LauncherPort(Protocol):
    """The launchers of this machine, by job and submission. Reports come back as events."""

    def start(self, job: JobName, uid: Uid, settings: LaunchSettings) -> ProcessId:
        """Start one; raises DtrainError."""
        ...

    def attach(self, job: JobName, uid: Uid, folder: str, process: ProcessId) -> bool:
        """Find one again; False: it is gone."""
        ...

    def send(self, job: JobName, uid: Uid, order: OrderToLauncher) -> None:
        """Queue an order; dropped if there is no such launcher, as its end tells."""
        ...

    def kill(self, process: ProcessId) -> None:
        """SIGKILL exactly this process, if it lives."""
        ...

    def is_alive(self, process: ProcessId) -> bool:
        """Whether exactly this process still runs."""
        ...

    def waits_in(self, process: ProcessId) -> str:
        """The kernel function that a living process waits in, "" if the kernel does not tell."""
        ...


class TransferPort(Protocol):
    """The transfer process; it is started by the first order."""

    def send(self, order: OrderToTransfer) -> None: ...

    def ended(self) -> None:
        """Its end has been taken in: the next order may start another one."""
        ...


class RankPort(Protocol):
    """Connections of ranks, by number."""

    def send(self, connection: int, message: Message) -> None: ...

    def drop(self, connection: int) -> None: ...


class ReporterPort(Protocol):
    """Publishes snapshots; the newest of a job wins."""

    def submit(self, job: JobName, snapshot: WorkerSnapshot, *, urgent: bool) -> None: ...

    def delete(self, job: JobName) -> None: ...

    def set_problem(self, problem: str) -> None:
        """Say in the node record what is wrong with the machine; "": nothing."""
        ...

    def set_draining(self, draining: Draining) -> None:
        """Say in the node record that the agent is about to end."""
        ...


class WatchPort(Protocol):
    """Looks at what ranks do."""

    def look(self, rank: Rank, process: ProcessId) -> RankLook:
        """Return how a rank is now, and how long it has waited for a CPU since it was looked at last."""
        ...

    def collect(
        self, job: JobName, uid: Uid, attempt: Attempt, dump: str, processes: Mapping[Rank, ProcessId]
    ) -> None:
        """Collect stacks in the background; they come back as ``StacksCollected``."""
        ...


class LogPort(Protocol):
    """Log folders."""

    def prepare(
        self, job: JobName, uid: Uid, attempt: Attempt, first_rank: Rank, *, ranks: int, store: str
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything the driver can reach."""

    journal: JournalPort
    launchers: LauncherPort
    transfers: TransferPort
    ranks: RankPort
    reporter: ReporterPort
    logs: LogPort
    watch: WatchPort


class AgentDriver:
    """Feeds ``step`` and does what it asks for. One thread at a time."""

    def __init__(
        self,
        state: AgentState,
        ports: Ports,
        clock: Clock,
        *,
        confirm_term: Callable[[Term], bool],
        log: Callable[..., None] = lambda *_args, **_fields: None,
        see: Callable[[AgentState, AgentState, float], None] = lambda _before, _after, _now: None,
    ) -> None:
        """Remember. ``see`` is shown every change of the state, and when: for those who count."""
        self._see = see
        self._state = state
        self._ports = ports
        self._clock = clock
        self._confirm_term = confirm_term
        self._log = log
        self._events: deque[Event] = deque()
        self._unjournaled: set[JobName] = set()
        self._wake_at: float | None = None

    @property
    def state(self) -> AgentState:
        """The present state; immutable, so any thread may read it."""
        return self._state

    @property
    def wake_at(self) -> float | None:
        """When ``handle(Tick())`` is due (monotonic); None: not on account of time."""
        return self._wake_at

    def adopt(self) -> None:
        """Take up the jobs of the journal: find their launchers, publish what is known."""
        self._state, actions = adopt(self._state, self._clock.monotonic())
        gone: list[LauncherReported] = []
        for job in self._state.jobs.values():
            wanted = [(job.uid, job.launcher.folder, job.launcher.process)]
            wanted += [(one.uid, one.folder, one.process) for one in job.departing]
            for uid, folder, process in wanted:
                if process is None:
                    continue
                if self._ports.launchers.attach(job.name, uid, folder, process):
                    self._log("launcher adopted", job=job.name, pid=process.pid)
                else:
                    gone.append(LauncherReported(job.name, uid, LauncherEnded(None)))
            self._ports.reporter.submit(job.name, snapshot_of(self._state, job), urgent=True)
        self._carry_out(actions)
        for event in gone:
            self.handle(event)
        self.handle(Tick())

    def execute(self, command: Command) -> Answer:
        """Confirm a command's term where needed and take it on: for callers with time to wait."""
        return self.take(command, self.confirm(command))

    def confirm(self, command: Command) -> bool:
        """Tell whether the command's term is not ours and yet that of the present leader. Any thread.

        A lower one is asked about once: if it leads, etcd was restored from an older state.
        """
        term, state = command.header.term, self._state
        if term in (state.term, state.refused_term) or not self._confirm_term(term):
            return False
        if term < state.term:
            self._events.append(EtcdWentBack(term, state.term))
        return term > state.term

    def take(self, command: Command, confirmed: bool) -> Answer:
        """Take on, or refuse, a command."""
        answer = self.handle(CommandArrived(command, confirmed))
        assert answer is not None
        head = command.header
        log_name = "command taken" if answer.accepted else "command refused"
        if answer.message != "known":
            self._log(
                log_name,
                kind=type(command).__name__,
                job=head.job,
                attempt=head.attempt,
                term=head.term,
                id=head.id,
                why=answer.message,
            )
        return answer

    def see_session(self, seen: SessionSeen) -> None:
        """Take in what the guardian says of the lease: each turn, at no cost while all is well."""
        if isolation.observe(self._state.link, seen, self._clock.monotonic()) != self._state.link:
            self.handle(seen)

    def handle(self, event: Event) -> Answer | None:
        """Take in one event, and whatever it brings about at once; return a command's answer."""
        answer = self._handle(event)
        while self._events:
            self._handle(self._events.popleft())
        return answer

    def _handle(self, event: Event) -> Answer | None:
        if isinstance(event, TransferReported) and isinstance(event.report, TransferEnded):
            self._log("transfer process ended", exit_code=event.report.exit_code)
            self._ports.transfers.ended()
        before = self._state
        state, decision = step(before, event, self._clock.monotonic(), self._clock.wall())
        check(state)
        if not self._journal(state, decision, event):
            return Answer(False, "the agent's journal could not be written")
        self._state = state
        self._wake_at = decision.wake_at
        self._see(before, state, self._clock.monotonic())
        for name, fields in telling.changes(before, state, self._clock.monotonic()):
            self._log(name, **fields)
        self._carry_out(decision.actions)
        return decision.answer

    def _journal(self, state: AgentState, decision: Decision, event: Event) -> bool:
        """Make the decision durable. Only a command can still be refused; facts stay facts."""
        retried = [
            JournalJob(durable_view(state.jobs[name]), state.seen.get(name, ())[-1:])
            for name in sorted(self._unjournaled)
            if name in state.jobs
        ]
        try:
            self._ports.journal.apply([*retried, *decision.journal])
        except Unavailable as error:
            self._log("journal failed", error=error.message, fix=error.fix)
            if isinstance(event, CommandArrived):
                return False
            self._unjournaled |= {w.job.name for w in decision.journal if isinstance(w, JournalJob)}
            return True
        self._unjournaled.clear()
        return True

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        ports = self._ports
        match action:
            case EnsureLauncher(job, uid, settings):
                self._start_launcher(job, uid, settings)
            case LauncherOrder(job, uid, order):
                ports.launchers.send(job, uid, order)
            case KillLauncher(job, _, process):
                self._log("launcher killed", job=job, pid=process.pid)
                ports.launchers.kill(process)
            case ProbeProcesses(job, uid, processes):
                for process in processes:
                    ports.launchers.kill(process)
                alive = tuple(process for process in processes if ports.launchers.is_alive(process))
                waits = tuple(ports.launchers.waits_in(process) for process in alive)
                self._events.append(ProcessesProbed(job, uid, alive, waits))
            case LookAtRanks(job, uid, attempt, wanted):
                looks = tuple(ports.watch.look(rank, process) for rank, process in wanted.items())
                self._events.append(RanksLookedAt(job, uid, attempt, looks))
            case CollectStacks(job, uid, attempt, dump, wanted):
                self._log("collecting stacks", job=job, attempt=attempt, dump=dump)
                ports.watch.collect(job, uid, attempt, dump, wanted)
            case PrepareLogs(job, uid, attempt, first_rank, ranks, store):
                try:
                    ports.logs.prepare(job, uid, attempt, first_rank, ranks=ranks, store=store)
                except OSError as error:
                    # Without it logs are found by local rank; the job itself goes on.
                    self._log("log folder failed", job=job, error=str(error))
            case TransferOrder(order):
                ports.transfers.send(order)
            case RankMessage(connection, message):
                ports.ranks.send(connection, message)
            case DropConnection(connection):
                ports.ranks.drop(connection)
            case WriteSnapshot(job, snapshot, urgent):
                ports.reporter.submit(job, snapshot, urgent=urgent)
            case DeleteSnapshot(job):
                ports.reporter.delete(job)
            case PublishHealth(problem):
                if problem:
                    self._log("machine blocked", reason=problem)
                else:
                    self._log("machine usable again")
                ports.reporter.set_problem(problem)
            case PublishDraining(draining):
                self._log("draining", reason=draining.reason, grace_s=draining.grace_s)
                ports.reporter.set_draining(draining)
            case _:
                assert_never(action)

    def _start_launcher(self, job: JobName, uid: Uid, settings: LaunchSettings) -> None:
        try:
            process = self._ports.launchers.start(job, uid, settings)
        except DtrainError as error:
            self._events.append(LauncherReported(job, uid, LauncherEnded(None, error.message)))
            return
        self._log("launcher started", job=job, pid=process.pid)
        self._events.append(LauncherStarted(job, uid, process))
