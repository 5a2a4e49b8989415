"""Launchers and ranks of one machine, and the training that ranks do together.

The 'weights' are 64 bytes that depend on every step before: an interrupted run that ends with those of
``weights_at`` has lost, repeated and mixed up nothing. Each rank saves its share of them. A rank's link
to its agent is the trainer's real ``Session``.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from dtrain.agent.launching import (
    ClearBelow,
    Cleared,
    Forked,
    ForkRanks,
    LauncherEnded,
    LauncherOrder,
    LauncherReady,
    LauncherReport,
    LauncherState,
    LiveRank,
    ProcessId,
    Quit,
    RankEnded,
    RankLaunch,
    ServeStore,
    SignalRanks,
    StoreReady,
)
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import Attempt, JobName, Step, Uid
from dtrain.protocol.ranklink import (
    Begin,
    Hello,
    Message,
    Outcome,
    RestorePlan,
    Sealed,
    StopRank,
    Welcome,
)
from dtrain.protocol.snapshot import StackKind
from dtrain.trainer.session import ANSWER_SLACK_S, Ask, Session
from tests.sim.scheduler import Event, Scheduler

if TYPE_CHECKING:
    from tests.sim.machine import Machine

WEIGHT_BYTES = 64
STEP_S = 0.4
SOCKET_S = 0.002


@cache
def weights_at(step: int) -> bytes:
    """The state after ``step`` steps of a run that nobody interrupted."""
    state = hashlib.sha512(b"weights").digest()
    for number in range(1, step + 1):
        state = advance(state, number)
    return state


def advance(state: bytes, step: int) -> bytes:
    return hashlib.sha512(state + step.to_bytes(8, "big")).digest()


def share(rank: int, world: int) -> tuple[int, int]:
    """First byte and length of what ``rank`` of ``world`` writes."""
    first = rank * WEIGHT_BYTES // world
    return first, (rank + 1) * WEIGHT_BYTES // world - first


class WouldBlock(BaseException):
    """The session waits: ask it again when something has arrived."""


class _NoWait:
    """Stands in for the session's condition: one thread, so nothing ever waits in it."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def notify_all(self) -> None: ...

    def wait(self, _timeout_s: float) -> None:
        raise WouldBlock


class SimSession(Session):
    """The real one, but where it would wait it raises."""

    def _reset_lock(self) -> None:
        self._changed = _NoWait()  # type: ignore[assignment]


class Group:
    """The ranks of one attempt that met in one TCPStore: they step together or not at all."""

    def __init__(
        self,
        scheduler: Scheduler,
        world: int,
        of: tuple[JobName, Uid, Attempt],
        on_bad: Callable[[str], None],
    ) -> None:
        self.scheduler = scheduler
        self.job, self.uid, attempt = of
        self.world = world
        self.attempt = attempt
        self.ranks: dict[int, SimRank] = {}
        self.step = -1
        self.stepped_at = 0.0
        self.broken = False
        self._waits_for_hung = False
        self._stalled_since: float | None = None
        self._patience_s = scheduler.rng.uniform(15.0, 40.0)
        self._on_bad = on_bad

    def join(self, rank: "SimRank", step: int) -> None:
        """A rank has loaded and verified; training begins when all have."""
        if self.broken:
            rank.peer_lost()
            return
        self.ranks[rank.rank] = rank
        if len(self.ranks) < self.world:
            return
        steps = sorted({member.step for member in self.ranks.values()})
        if len(steps) != 1:
            self._on_bad(f"attempt {self.attempt}: ranks restored different steps {steps}")
        self.step = step
        for member in self._members():
            member.begin()
        self._next()

    def lost(self, silent: bool) -> None:
        """A rank has gone: the others' collective breaks, soon or after a timeout."""
        if self.broken:
            return
        self.broken = True
        for member in self._members():
            delay_s = (
                self.scheduler.rng.uniform(5.0, 30.0) if silent else self.scheduler.rng.uniform(0.01, 1.5)
            )
            member.scheduler.after(delay_s, member.peer_lost)

    def _members(self) -> list["SimRank"]:
        return [self.ranks[number] for number in sorted(self.ranks)]

    def _next(self) -> None:
        if self.broken or any(not member.alive for member in self.ranks.values()):
            return
        if all(member.ending for member in self.ranks.values()):
            return
        if any(member.machine.place.suspended for member in self.ranks.values()):
            self._stall()
            return
        if any(member.hung for member in self.ranks.values()):
            self._waits_for_hung = True
            return
        if any(member.holds for member in self.ranks.values()):
            # They are at a step's boundary, and in no collective that could run out of patience.
            self.scheduler.after(0.05, self._next)
            return
        self._stalled_since = None
        rng = self.scheduler.rng
        duration_s = STEP_S * rng.uniform(0.8, 1.3)
        self.step += 1
        self.stepped_at = self.scheduler.now
        # Ranks leave one collective a little apart, but none can enter the next one before all have.
        slack_s = 0.2 * duration_s
        step = self.step
        for member in self._members():
            left_s = duration_s - slack_s * rng.random()
            member.scheduler.after(left_s, lambda m=member: m.complete(step))  # type: ignore[misc]
        self.scheduler.after(duration_s, self._next)

    def go_on(self) -> None:
        """A rank that hung does no longer."""
        if self._waits_for_hung and not any(member.hung for member in self.ranks.values()):
            self._waits_for_hung = False
            self._next()

    def _stall(self) -> None:
        """A peer stands still: the collective waits, and ends with an error when its time is over."""
        now = self.scheduler.now
        if self._stalled_since is None:
            self._stalled_since = now
        if now - self._stalled_since > self._patience_s:
            self.lost(silent=False)
            return
        self.scheduler.after(0.2, self._next)


class SimRank:
    """One training process."""

    def __init__(self, launcher: "SimLauncher", launch: RankLaunch, live: LiveRank, total_steps: int) -> None:
        self.launcher = launcher
        self.machine = launcher.machine
        self.scheduler = self.machine.place
        self.live = live
        self.rank = int(launch.rank)
        self.local_rank = launch.local_rank
        self.attempt = live.attempt
        self.world = int(launch.env["WORLD_SIZE"])
        self.rendezvous = f"{launch.env['MASTER_ADDR']}:{launch.env['MASTER_PORT']}"
        self.total_steps = total_steps
        self.began_at = 0
        """The step that it had restored."""
        self.hung_at = -1.0
        """When it was last seen to hang, by what had it hang."""
        self.sick_steps = 0
        """In so many steps to come its loss is not finite."""
        self.alive = True
        self.ended: RankEnded | None = None
        self.ending = False
        self.step = 0
        self.state = b""
        self.hung: StackKind | None = None
        """It completes no step any more, and this is what its stack says."""
        self.session = SimSession(self.rank, self._wake)
        self._connection: Connection | None = None
        self._report_due: Event | None = None
        self._loading = False
        self._joined: Group | None = None
        self._held: tuple[Begin, float] | None = None
        """The checkpoint that it stays at, and until when at most."""
        self._saving: tuple[Ask, float] | None = None
        """What its script saves, and how long it waits for that."""
        rng = self.scheduler.rng
        self.scheduler.after(rng.uniform(0.05, 0.4), self._connect)

    # The link to the agent.

    def _connect(self) -> None:
        if not self.alive or self._connection is not None:
            return
        agent = self.machine.agent
        if agent is None or not agent.process.alive or agent.process.frozen:
            self.scheduler.after(self.scheduler.rng.uniform(0.2, 0.6), self._connect)
            return
        self._connection = Connection(self)
        hello = Hello(
            1,
            self.launcher.job,
            self.launcher.uid,
            self.attempt,
            self.live.rank,
            self.local_rank,
            self.live.process.pid,
        )
        agent.rank_connected(self._connection, hello)
        if not self._loading and self._joined is None:
            self.session._wants_restore = True
        self._wake()

    def _wake(self) -> None:
        """A report is due: always the newest one, and one at a time on its way."""
        if self._report_due is None and self.alive:
            self._report_due = self.scheduler.after(SOCKET_S, self._report)

    def _report(self) -> None:
        self._report_due = None
        connection = self._connection
        if self.alive and connection is not None and connection.open:
            connection.deliver_report(self.session.report())

    def told(self, connection: "Connection", message: Message) -> None:
        """A message from the agent has arrived."""
        if not self.alive or connection is not self._connection:
            return
        if isinstance(message, Welcome) and not message.accepted:
            self.exit(1, "the attempt is over")
            return
        self.session.handle(message)
        self._wake()
        if isinstance(message, Outcome) and not message.committed:
            self.launcher.arena.pop((self.local_rank, message.seq), None)
        if isinstance(message, StopRank):
            self.scheduler.after(self.scheduler.rng.uniform(0.01, 2 * STEP_S), self._leave)
        elif self._joined is None and not self._loading:
            self._try_restore()
        elif self._saving is not None:
            self._try_save()
        elif self.ending:
            self._try_end()

    def hung_up(self, connection: "Connection") -> None:
        """The agent closed the connection, or died."""
        if connection is self._connection:
            self._connection = None
            if self.alive:
                self.scheduler.after(self.scheduler.rng.uniform(0.05, 0.5), self._connect)

    # Life.

    def _try_restore(self) -> None:
        try:
            plan = self.session.await_plan()
        except WouldBlock:
            return
        if self.session.stop_reason is not None:
            return
        self._loading = True
        self.scheduler.after(self.scheduler.rng.uniform(0.02, 0.6), lambda: self._load(plan))

    def _load(self, plan: RestorePlan | None) -> None:
        if not self.alive:
            return
        if plan is None or plan.seq is None:
            self.step, self.state = 0, weights_at(0)
        else:
            found = self.machine.fetched.get(plan.manifest_path)
            if found is None:
                self.session.restore_failed(plan.seq, "the fetched bytes are gone")
                return
            self.step, self.state = found
            self.machine.cluster.checks.restored(self, self.step, self.state)
        group = self.machine.cluster.groups.get(self.rendezvous)
        if group is None or group.attempt != self.attempt:
            self.exit(1, "connection refused by the TCPStore")
            return
        self._joined = group
        group.join(self, self.step)

    def begin(self) -> None:
        """All ranks of the attempt have their state."""
        self.session.restored(self.step)
        self.began_at = self.step
        self.machine.cluster.checks.began(self, self.step)
        if self.step >= self.total_steps:
            self._end()

    def complete(self, step: int) -> None:
        if not self.alive or self.ending or self._joined is None or self._joined.broken:
            return
        self.machine.cluster.checks.stepped(self, step)
        self.step, self.state = step, advance(self.state, step)
        self.session.set_metrics({"loss": 1.0 / (1 + step)})
        if self.sick_steps:
            self.machine.cluster.checks.sick(self, step)
            self.session.set_nonfinite(("loss",), ("loss",))
            self.sick_steps -= 1
        else:
            self.session.set_nonfinite((), ())
        self._seal(self.session.complete(step))
        self._wake()
        asked = self.machine.cluster.jobs[self.launcher.job].save_of(self.rank, step)
        if asked is not None:
            timeout_s = self.machine.cluster.jobs[self.launcher.job].spec.checkpoint.timeout_s
            patience_s = timeout_s + ANSWER_SLACK_S
            self._saving = self.session.request(asked), self.scheduler.now + patience_s
            self.scheduler.after(patience_s, self._try_save)
            self._try_save()
        if step >= self.total_steps:
            self._end()

    def _try_save(self) -> None:
        """Go on with the script's own save, as ``Session.ask_save`` and ``await_answer`` do."""
        if self._saving is None or not self.alive:
            return
        ask, until = self._saving
        try:
            begin = self.session.granted(ask)
        except Refused as refusal:
            self._saved(refusal.message)
            return
        if ask.answer is not None:
            self.machine.cluster.checks.saved(self, ask.step)
            self._saved(f"step {ask.step} is saved")
        elif begin is not None:
            self._seal(begin)
            self._wake()
        elif self.scheduler.now >= until:
            self.session.withdraw(ask)
            self._saved(f"step {ask.step} is not saved: no answer")

    def _saved(self, text: str) -> None:
        self._saving = None
        self.scheduler.log(self.machine.name, f"rank {self.rank}: {text}")
        self.machine.cluster.rank_saved(self.rank, text)

    def _seal(self, begin: Begin | None) -> None:
        if begin is None:
            return
        if self.scheduler.chance(self.machine.cluster.faults.seal_failure):
            self.session.give_up(begin, "the arena is full")
            return
        first, length = share(self.rank, self.world)
        place = Sealed(
            begin.seq,
            begin.nonce,
            Step(self.step),
            f"{self.launcher.folder}/{self.local_rank}/{begin.seq}",
            first,
            length,
            0,
            0,
        )
        self.launcher.arena[self.local_rank, begin.seq] = (place, self.state[first : first + length])
        self.session.keep(place)
        if begin.hold_s > 0:
            self._held = begin, self.scheduler.now + begin.hold_s

    @property
    def holds(self) -> bool:
        """Whether it stays at the step it has done, as ``Run`` does in ``Session.await_outcome``."""
        if self._saving is not None and self.alive and self.session.stop_reason is None:
            return True
        if self._held is None or not self.alive:
            return False
        if self.session.stop_reason is not None:
            return True  # as ``Run.steps`` does: told to stop, it leaves before another step
        begin, until = self._held
        return self.scheduler.now < until and self.session.is_held(begin.seq)

    def _end(self) -> None:
        self.ending = True
        self._try_end()

    def _try_end(self) -> None:
        if not self.alive:
            return
        try:
            begin = self.session.await_end(self.step)
        except WouldBlock:
            return
        if begin is not None:
            self._seal(begin)
            self._try_end_later()
            return
        self._report()
        self.machine.cluster.checks.finished(self)
        self.scheduler.after(
            0.05, lambda: self.exit(0 if self.session.stop_reason is None else 143, "training ended")
        )

    def _try_end_later(self) -> None:
        self.scheduler.after(SOCKET_S, self._try_end)

    def _leave(self) -> None:
        if self.alive and not self.hung:
            self.exit(0, "told to stop")

    @property
    def trained(self) -> int:
        """Steps of this attempt, if it trains now; else 0."""
        group = self._joined
        trains = self.alive and group is not None and not group.broken and group.step >= 0 and not self.ending
        return self.step - self.began_at if trains else 0

    def hang(self, kind: StackKind) -> None:
        """From now on no step is completed, and no order is heard in the script."""
        self.hung = kind

    def go_on(self) -> None:
        """It was only slow."""
        if self.hung is None or not self.alive:
            return
        self.hung, self.hung_at = None, self.scheduler.now
        group = self._joined
        if self.session.stop_reason is not None:
            self._leave()
        elif group is not None and group.broken:
            self.peer_lost()
        elif group is not None:
            group.go_on()

    def peer_lost(self) -> None:
        if self.hung not in (None, StackKind.COLLECTIVE):
            return
        if self.alive and not self.ending:
            self.exit(1, "", error="Connection closed by peer [127.0.0.1]:1234")

    def exit(self, code: int, why: str, *, error: str = "", silent: bool = False) -> None:
        """The process ends; ``silent``: its machine did, so its peers hear nothing."""
        if not self.alive:
            return
        self.alive = False
        self.scheduler.log(
            self.machine.name, f"rank {self.rank} ended", attempt=self.attempt, code=code, why=why or error
        )
        if self._connection is not None:
            self._connection.rank_gone()
            self._connection = None
        group = self._joined or self.machine.cluster.groups.get(self.rendezvous)
        # Ranks that have ended well owe the others nothing: there is no exit barrier.
        if group is not None and not (code == 0 and self.ending):
            group.ranks.pop(self.rank, None)
            group.lost(silent)
        self.launcher.rank_ended(self, code, error)


class Connection:
    """One rank's connection to the agent's socket; ordered, both ways."""

    def __init__(self, rank: SimRank) -> None:
        self.rank = rank
        self.open = True
        self.number = 0
        self.to_agent: Callable[[Any], None] = lambda _report: None
        self.on_gone: Callable[[], None] = lambda: None

    def deliver_report(self, report: Any) -> None:
        if self.open:
            self.to_agent(report)

    def send(self, message: Message) -> None:
        """From the agent."""
        if self.open:
            self.rank.scheduler.after(SOCKET_S, lambda: self.open and self.rank.told(self, message))

    def close(self) -> None:
        """The agent hangs up, after what it has sent has left."""
        self.rank.scheduler.after(2 * SOCKET_S, self._closed)

    def _closed(self) -> None:
        if self.open:
            self.open = False
            self.rank.hung_up(self)

    def agent_gone(self) -> None:
        self._closed()

    def rank_gone(self) -> None:
        if self.open:
            self.open = False
            self.on_gone()


@dataclass
class _Store:
    attempt: Attempt
    port: int


class SimLauncher:
    """The launcher of one submission: outlives agents, dies with the machine or when told to."""

    def __init__(
        self, machine: "Machine", job: JobName, uid: Uid, folder: str, orphan_grace_s: float
    ) -> None:
        self.machine = machine
        self.scheduler = machine.place
        self.stray = False
        """No agent knows of it any more: it ends by itself after its grace."""
        self.job = job
        self.uid = uid
        self.folder = folder
        self.orphan_grace_s = orphan_grace_s
        self.process = machine.new_process()
        self.alive = True
        self.ready = False
        self.ranks: list[SimRank] = []
        self.store: _Store | None = None
        self.arena: dict[tuple[int, int], tuple[Sealed, bytes]] = {}
        self.client: Callable[[LauncherReport], None] | None = None
        self._floor = 0
        self._orphan: Event | None = None
        self.scheduler.after(self.scheduler.rng.uniform(0.3, 2.0), self._imported)

    def _imported(self) -> None:
        if self.alive:
            self.ready = True
            self._tell(LauncherReady())

    # The agent's side.

    def attach(self, client: Callable[[LauncherReport], None]) -> None:
        """An agent connects: it is told everything first."""
        self.client = client
        if self._orphan is not None:
            self._orphan.cancel()
            self._orphan = None
        ranks = tuple(rank.live for rank in self.ranks)
        store = self.store
        self._tell(
            LauncherState(
                self.process,
                self.ready,
                ranks,
                store.attempt if store else None,
                store.port if store else None,
            )
        )
        for rank in self.ranks:
            if rank.ended is not None:
                self._tell(rank.ended)

    def detach(self) -> None:
        self.client = None
        if self.alive and self._orphan is None:
            self._orphan = self.scheduler.after(self.orphan_grace_s, lambda: self.end(0))

    def _tell(self, report: LauncherReport) -> None:
        client = self.client
        if client is not None:
            self.scheduler.after(SOCKET_S, lambda: self.client is client and client(report))

    def obey(self, order: LauncherOrder) -> None:
        """An order has arrived."""
        if not self.alive:
            return
        match order:
            case ClearBelow(attempt, grace_s):
                self._floor = max(self._floor, attempt)
                doomed = [rank for rank in self.ranks if rank.attempt < attempt]
                delay_s = self.scheduler.rng.uniform(0.0, min(grace_s, 3.0)) if doomed and grace_s else 0.01
                self.scheduler.after(delay_s, lambda: self._cleared(attempt))
            case ServeStore(attempt, host, world):
                self.scheduler.after(0.02, lambda: self._serve(attempt, host, world))
            case ForkRanks():
                if self.ready:
                    self._fork(order)
            case SignalRanks(attempt, _):
                for rank in list(self.ranks):
                    if rank.attempt == attempt:
                        rank.exit(-9, "killed by its agent")
            case Quit():
                self.scheduler.after(0.02, lambda: self.end(0))

    def _cleared(self, attempt: Attempt) -> None:
        if not self.alive:
            return
        for rank in list(self.ranks):
            if rank.attempt < attempt:
                rank.exit(-9, "an older attempt")
        self.ranks = [rank for rank in self.ranks if rank.attempt >= attempt]
        if self.store is not None and self.store.attempt < attempt:
            self._close_store()
        self._tell(Cleared(attempt))

    def _serve(self, attempt: Attempt, host: str, world: int) -> None:
        if not self.alive:
            return
        if self.store is not None and self.store.attempt == attempt:
            self._tell(StoreReady(attempt, self.store.port))
            return
        if attempt < self._floor:
            self._tell(StoreReady(attempt, 0, "a later attempt has begun"))
            return
        self._close_store()
        cluster = self.machine.cluster
        port = cluster.new_port()
        cluster.groups[f"{host}:{port}"] = Group(
            cluster.scheduler, world, (self.job, self.uid, attempt), cluster.checks.bad
        )
        self.store = _Store(attempt, port)
        self._tell(StoreReady(attempt, port))

    def _close_store(self) -> None:
        if self.store is not None:
            group = self.machine.cluster.groups.pop(f"{self.machine.host}:{self.store.port}", None)
            if group is not None and group.step < 0:
                group.lost(silent=False)
            self.store = None

    def _fork(self, order: ForkRanks) -> None:
        if order.attempt < self._floor or any(rank.attempt == order.attempt for rank in self.ranks):
            known = tuple(rank.live for rank in self.ranks if rank.attempt == order.attempt)
            self._tell(Forked(order.attempt, known))
            return
        self.machine.cluster.checks.forking(self.machine, self.job, order.attempt)
        self.arena.clear()
        born = []
        for launch in order.ranks:
            live = LiveRank(order.attempt, launch.rank, launch.local_rank, self.machine.new_process())
            rank = SimRank(self, launch, live, self.machine.cluster.jobs[self.job].total_steps)
            self.ranks.append(rank)
            born.append(live)
        self._tell(Forked(order.attempt, tuple(born)))

    def rank_ended(self, rank: SimRank, code: int, error: str) -> None:
        rank.live = replace(rank.live, exit_code=code)
        document = json.dumps({"message": {"message": error}}) if error else ""
        at = self.scheduler.now
        rank.ended = RankEnded(rank.attempt, rank.live.rank, rank.live.process.pid, code, at, document)
        self._tell(rank.ended)

    def end(self, code: int, *, silent: bool = False) -> None:
        """It exits or is killed, and its ranks and store with it."""
        if not self.alive:
            return
        self.scheduler.log(self.machine.name, "launcher ended", code=code)
        for rank in list(self.ranks):
            rank.exit(-9, "its launcher ended", silent=silent)
        self._close_store()
        self._tell(LauncherEnded(code))
        self.alive = False
        self.arena.clear()
        self.machine.launchers.pop((self.job, self.uid, self.folder), None)


__all__ = ["Connection", "Group", "ProcessId", "SimLauncher", "SimRank", "advance", "weights_at"]
