"""The cluster of a scenario: the real cores and drivers over a model etcd, without chance and threads.

Real: ``plan``, ``Driver``, ``World``, ``Committer`` and ``Worker`` of each coordinator; ``step``, the driver
and the reporter of each agent; the ranks' ``Session``. Launchers, ranks and uploads are the simulation's,
moved by a source of chance that never surprises: every delay is its mean. One tick is a second.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from dtrain.agent.core.events import DrainAsked
from dtrain.coordinator.api import consulting
from dtrain.coordinator.core.decisions import Decision, Directed, Work
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.views import Moment
from dtrain.coordinator.dispatch import _lane
from dtrain.coordinator.driver import Driver
from dtrain.coordinator.persistence import Committer, Deposed
from dtrain.coordinator.work import Stores, Worker
from dtrain.coordinator.world import World
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import ErrorCode, NotFound, OutcomeUnknown, Unavailable
from dtrain.protocol.ids import ClusterName, JobName, ReplicaId, Seq, Term
from dtrain.protocol.job import Intent, JobSpec
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Change, MirrorState
from dtrain.storage.etcd.port import Delete, Put, RangeResult, Status, Txn, TxnResult, prefix_end
from dtrain.storage.etcd.session import FixedSession
from tests.scenarios.receiver import Receiver, StageSender
from tests.scenarios.transcript import Transcript
from tests.sim.checks import Checks
from tests.sim.etcd import go_back
from tests.sim.machine import Machine, SimAgent
from tests.sim.process import Process, SimClock
from tests.sim.scheduler import Event, Scheduler
from tests.sim.training import Group

TICK_S = 1.0
WALL_AT_START = 1_800_000_000.0
TTL_S = 10
RAISED = 1_000_000_000
"""By so much a restored etcd's revisions are raised."""
WIRE_S = 0.003
ANSWER_S = 2.0
"""A command without an answer has failed after that."""
DEADLINE_SHARE = 0.7
"""Of the TTL: until when a guardian that has just renewed trusts its lease."""
REBOOT_S = 1.0
"""From the end of a process to its next life."""


class Steady:
    """Stands in for ``random.Random``: always the middle, always the first, numbers that count up."""

    def __init__(self) -> None:
        self._count = 0

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2

    def random(self) -> float:
        return 0.5

    def choice(self, found: Any) -> Any:
        return found[0]

    def sample(self, found: Any, count: int) -> Any:
        return found[:count]

    def getrandbits(self, _bits: int) -> int:
        self._count += 1
        return self._count


class Stage:
    """What the simulation's machines call their cluster, and what a script can do to it."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(0)
        self.scheduler.rng = Steady()  # type: ignore[assignment]
        self.name = ClusterName("stage")
        self.keys = Keys(self.name)
        self.etcd = MemoryEtcd(lambda: self.scheduler.now)
        self.store = MemoryBlobs("stage")
        self.stores = Stores(lambda _uri: self.store)
        self.checks = Checks(self)  # type: ignore[arg-type]
        self.told = Transcript(self.keys, lambda: self.scheduler.now)
        # What a story does to its cluster is harm at any time, as far as the checks can know.
        self.faults = SimpleNamespace(
            seal_failure=0.0, launcher_failure=0.0, store_slow_s=0.0, harm_until=float("inf")
        )
        self.network = self
        self.groups: dict[str, Group] = {}
        self.agent_ttl_s = TTL_S
        self.cordon_s = 0.0
        """How long machines are cordoned that were blamed too often; 0: they are not."""
        self.jobs: dict[JobName, SimpleNamespace] = {}
        """What the ranks must know of each job: ``total_steps``."""
        self.machines: dict[str, StageMachine] = {}
        self.specs: dict[JobName, JobSpec] = {}
        self.intents: dict[JobName, Intent] = {}
        self.to_lose: list[str] = []
        """Fates of the next writes of a leader: ``kind how``."""
        self.to_drop = 0
        self.to_hold = 0
        self.to_double = 0
        self.held: list[Callable[[], None]] = []
        """Commands that arrive when the script says so."""
        self._flying: dict[Any, Event] = {}
        self._ports = 10_000
        self._leases = 0
        self._published = 1
        self.receiver: Receiver | None = None
        """Of a webhook, if there is one."""
        self.coordinators = {name: Coordinator(self, name) for name in ("c1", "c2")}
        for name in self.coordinators:
            record = ReplicaRecord(ReplicaId(name), f"{name}:1")
            self.put(self.keys.coordinator(ReplicaId(name)), record)
        self.scheduler.after(0.0, self._elect)
        self.scheduler.after(0.5, self._scan)

    # Time.

    def run(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Let time pass; what must hold is checked after every event."""

        def broken() -> bool:
            return bool(self.checks.violations) or stop()

        self.scheduler.run(self.scheduler.now + seconds, lambda: None, broken)
        assert not self.checks.violations, self.checks.violations

    # etcd.

    def new_lease(self) -> int:
        self.etcd.grant(TTL_S, self.next_lease())
        return self._leases

    def next_lease(self) -> int:
        self._leases += 1
        return self._leases

    def publish(self) -> None:
        """Show what is new in etcd to the checks, the transcript and the coordinators' mirrors."""
        if self.etcd.revision == self._published:
            return
        news = self.etcd.log_from(self._published + 1)
        self._published = self.etcd.revision
        for revision, events in news:
            self.checks.on_revision(revision, events)
            for event in events:
                self.told.etcd(event)
                if event.kind == "delete" and event.kv.key == self.keys.leader:
                    self.scheduler.after(0.3, self._elect)
        for coordinator in self.coordinators.values():
            coordinator.enter(coordinator.sync)

    def put(self, key: str, value: Any) -> None:
        """Write what an operator writes."""
        self.etcd.txn(Txn(success=(Put(key, codec.encode(value)),)))
        self.publish()

    def restore(self, target: int) -> None:
        """etcd loses its data and is restored from a backup, its revisions raised; mirrors list anew."""
        forgotten = self.etcd.revision - target
        go_back(self.etcd, target, bump=RAISED, expires_at=self.scheduler.now + TTL_S)
        self._published = self.etcd.revision
        self.checks.etcd_was_raised(self.etcd)
        self.told.line("etcd", f"is restored from a backup: {forgotten} revisions are forgotten")
        for coordinator in self.coordinators.values():
            coordinator.enter(coordinator.sync)

    def _scan(self) -> None:
        self.etcd.tick()
        self.publish()
        self.scheduler.after(0.5, self._scan)

    def _elect(self) -> None:
        """The first replica that is able to takes the office, if it is free."""
        if self.etcd.range(self.keys.leader).items:
            return
        able = [c for c in self.coordinators.values() if c.process.alive and not c.process.frozen]
        if not able:
            self.scheduler.after(0.3, self._elect)
            return
        able[0].win()

    def name_webhook(self) -> None:
        """Every coordinator's file names a receiver, from now on."""
        self.receiver = Receiver(self)
        for coordinator in self.coordinators.values():
            coordinator.take_webhook(self.receiver)

    def leader(self) -> "Coordinator":
        """The replica that holds the leader key."""
        found = self.etcd.range(self.keys.leader).items
        assert found, "nobody leads"
        return self.coordinators[codec.decode(ReplicaRecord, found[0].value).replica]

    # What the simulation's parts ask of their cluster.

    def new_port(self) -> int:
        self._ports += 1
        return self._ports

    def rank_saved(self, rank: int, text: str) -> None:
        """A script's own save has come to its end."""
        self.told.line(str(rank), text, "rank ")

    def committed_seqs(self, job: JobName) -> list[int]:
        """Checkpoints that exist in etcd now."""
        return [
            s
            for s in sorted(self.checks.history(job).commits)
            if self._has(self.keys.checkpoint(job, Seq(s)))
        ]

    def bad_seqs(self, job: JobName) -> list[int]:
        return [s for s in sorted(self.checks.history(job).commits) if self._has(self.keys.bad(job, Seq(s)))]

    def last_uid(self, job: JobName) -> str:
        return self.specs[job].uid

    def _has(self, key: str) -> bool:
        return bool(self.etcd.range(key).items)

    def new_clock(self) -> SimClock:
        return SimClock(self.scheduler, 0.0, 1.0)

    def consult(
        self, agent: SimAgent, addresses: Sequence[str], request: pb.ConsultRequest
    ) -> list[pb.ConsultReply]:
        """An agent without etcd asks replicas; their mirrors are as old as the newest news."""
        found = [self.coordinators[address.split(":")[0]] for address in addresses]
        if not agent.machine.peers.open:
            return []
        return [one.consult(request) for one in found if one.process.alive and not one.process.frozen]

    # Commands on their way.

    def send(self, sender: "Coordinator", directed: Directed) -> None:
        """As ``dispatch`` does it: what supersedes an older command cancels it, unreported."""
        scheduler, head = self.scheduler, directed.command.header
        lane = (sender.process, directed.agent, head.job, _lane(directed.command))
        superseded = self._flying.pop(lane, None)
        if superseded is not None:
            superseded.cancel()

        def answer(ok: bool, problem: str) -> None:
            if self._flying.get(lane) is timeout:
                del self._flying[lane]
                timeout.cancel()
                sender.enter(lambda: sender.driver.on_command(directed, ok, problem, scheduler.now))

        timeout = self._flying[lane] = scheduler.after(ANSWER_S, lambda: answer(False, "timed out"))

        def arrive(copy: int) -> None:
            machine = self.machines[directed.agent]
            agent = machine.agent
            if not machine.peers.open or not machine.powered:
                return
            if agent is None or directed.address != agent.address:
                answer(False, "refused")
                return

            def back(ok: bool, message: str) -> None:
                self.told.command(sender.name, directed, ok, message, copy)
                scheduler.after(WIRE_S, lambda: answer(ok, "" if ok else f"rejected: {message}"))

            agent.process.post(lambda: agent.command(directed.command, back))

        if self.to_drop:
            self.to_drop -= 1
            self.told.on_the_way(sender.name, directed, "is lost")
        elif self.to_hold:
            self.to_hold -= 1
            self.told.on_the_way(sender.name, directed, "is held up")
            self.held.append(lambda: arrive(1))
        else:
            scheduler.after(WIRE_S, lambda: arrive(0))
        if self.to_double:
            self.to_double -= 1
            scheduler.after(2 * WIRE_S, lambda: arrive(1))


class Link:
    """One process's way to etcd: it can be cut, and lose the answer to a write."""

    def __init__(self, stage: Stage, is_cut: Callable[[], bool]) -> None:
        self._stage = stage
        self._is_cut = is_cut

    def _reach(self) -> MemoryEtcd:
        if self._is_cut():
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "etcd cannot be reached")
        return self._stage.etcd

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        etcd, how = self._reach(), self._fate(txn)
        if how:
            self._stage.told.line("net", f"the reply to a write is lost; the write is {how}")
        if how == "lost":
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "the reply is lost")
        result = etcd.txn(txn)
        self._stage.publish()
        if how:
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "the reply is lost")
        return result

    def _fate(self, txn: Txn) -> str:
        stage = self._stage
        keys = [operation.key for operation in txn.success if isinstance(operation, (Put, Delete))]
        fenced = any(compare.key == stage.keys.leader for compare in txn.compares)
        if not stage.to_lose or not keys or not fenced:
            return ""
        kind, how = stage.to_lose[0].split()
        if kind == "commit" and not any("/checkpoints/" in key for key in keys):
            return ""
        stage.to_lose.pop(0)
        return how

    def grant(self, ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        return self._reach().grant(ttl_s, lease)

    def range(self, key: str, range_end: str | None = None, **how: Any) -> RangeResult:
        return self._reach().range(key, range_end, **how)

    def status(self, *, deadline_s: float = 5.0) -> Status:
        return self._reach().status(deadline_s=deadline_s)


class Coordinator:
    """One replica: its life, its mirror, its driver's ports."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.name = name
        self.replica = self
        """As the checks know it."""
        self.lease = 0
        self.boot()

    def boot(self) -> None:
        """Begin a life as a standby."""
        stage = self.stage
        self.process = Process(stage.scheduler, self.name, stage.checks.bug)
        link: Any = Link(stage, lambda: False)
        clock = SimClock(stage.scheduler, 0.0, 1.0)
        world = World(
            stage.name,
            ReplicaId(self.name),
            agent_ttl_s=TTL_S,
            default_store=stage.store.uri,
            cordon_s=stage.cordon_s,
        )
        self.driver = Driver(world, plan, self)
        # The lease is not asked: that a deposed leader's writes fail must not rest on its clock.
        self.committer = Committer(link, stage.name, may_act=lambda: True, new_lease=stage.next_lease)
        self.worker = Worker(link, stage.stores, merge, clock)
        self.mirror = MirrorState()
        begin = stage.etcd.compacted + 1
        self.watch = stage.etcd.watch(stage.keys.root, prefix_end(stage.keys.root), begin)
        self.in_hand: list[str] = []
        """Keys that it is about to write."""
        self.checked_at = -1
        """For the checks: the revision that they have seen."""
        self.term: Term | None = None
        """As long as it takes itself for the leader."""
        self.sender: StageSender | None = None
        if stage.receiver is not None:
            self.take_webhook(stage.receiver)
        self._tick: Any = None
        self._moments = 0
        self.enter(self.sync if begin == 1 else self.relist)
        self._hear()

    def now(self) -> float:
        return self.stage.scheduler.now

    def take_webhook(self, receiver: Receiver) -> None:
        """Call this receiver while it leads."""
        self.sender = StageSender(receiver, self, Link(self.stage, lambda: False))

    # Leadership.

    def win(self) -> None:
        stage = self.stage
        self.lease = stage.new_lease()
        record = codec.encode(ReplicaRecord(ReplicaId(self.name), f"{self.name}:1"))
        put = Put(stage.keys.leader, record, self.lease)
        self.term = term = Term(stage.etcd.txn(Txn(success=(put,))).revision)
        stage.publish()
        self.drive(lambda: self.driver.on_term(term, self.now()))
        self._renew(self.process)

    def _renew(self, life: Process) -> None:
        """Its guardian's part: a frozen or dead replica is renewed no more."""
        if not life.alive:
            return
        try:
            if not life.frozen:
                self.stage.etcd.keepalive(self.lease)
        except NotFound:
            return
        self.stage.scheduler.after(TTL_S / 4, lambda: self._renew(life))

    def crash(self) -> None:
        """Its guardian sees it, revokes the lease and starts it again."""
        self.end()
        lease, self.lease = self.lease, 0
        if lease:
            self.stage.scheduler.after(0.1, lambda: self._revoke(lease))

    def end(self) -> None:
        self.process.die()
        self.stage.scheduler.after(REBOOT_S, self.boot)

    def _revoke(self, lease: int) -> None:
        self.stage.etcd.revoke(lease)
        self.stage.publish()

    # Events.

    def consult(self, request: pb.ConsultRequest) -> pb.ConsultReply:
        """Answer as the API does."""
        mirror = SimpleNamespace(get=self.mirror.get, age_s=lambda: 0.0)
        return consulting.answer(mirror, self.stage.keys, request)

    def relist(self) -> None:
        """The mirror reads everything anew."""
        root, end = self.stage.keys.root, prefix_end(self.stage.keys.root)
        found = self.stage.etcd.range(root, end)
        self.watch = self.stage.etcd.watch(root, end, found.revision + 1)
        changes = self.mirror.relist(found.items, found.revision)
        self.driver.on_changes(changes, found.revision, self.now())
        self._tell(changes)

    def sync(self) -> None:
        """The mirror takes in what has come."""
        try:
            batches = list(iter(self.watch.poll, None))
        except Unavailable:
            self.relist()
            return
        for batch in batches:
            changes = self.mirror.apply(batch)
            self.driver.on_changes(changes, self.mirror.revision, self.now())
            self._tell(changes)

    def _tell(self, changes: tuple[Change, ...] = ()) -> None:
        """A turn of the thread that calls the webhook's receiver."""
        if (sender := self.sender) is not None:
            self.process.later(0.001, lambda: sender.tell(changes))

    def _hear(self) -> None:
        self.drive(lambda: self.driver.on_heard(self.now(), self.now()))
        self._tell()
        self.process.later(TICK_S, self._hear)

    def enter(self, call: Callable[[], None]) -> None:
        self.process.later(0.001, lambda: self.drive(call))

    def drive(self, call: Callable[[], None]) -> None:
        call()
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        wake_at = self.driver.wake_at
        if wake_at is not None:
            delay_s = max(wake_at - self.now(), 0.0005)
            self._tick = self.process.later(
                delay_s, lambda: self.drive(lambda: self.driver.on_tick(self.now()))
            )
        self.stage.checks.driver_moved(self)  # type: ignore[arg-type]

    # DriverPorts.

    def commit(self, job: JobName, term: Term, decision: Decision) -> None:
        self.in_hand = [write.key for write in decision.writes]

        def body() -> None:
            self.in_hand = []
            outcome = self.committer.commit(term, decision)
            if isinstance(outcome, Deposed):
                self.stage.told.line(self.name, "is deposed: its write is refused, and it exits")
                self.end()
                return
            self.enter(lambda: self.driver.on_txn(job, outcome, self.now()))

        self.process.later(WIRE_S, body)

    def send(self, directed: Directed) -> None:
        self.stage.send(self, directed)

    def start_work(self, job: JobName, work: Work) -> None:
        def body() -> None:
            result = self.worker.run(work)
            self.enter(lambda: self.driver.on_work(job, result, self.now()))

        self.process.later(0.05, body)

    def log(self, event: str, **fields: Any) -> None:
        self.stage.told.log(self.name, event, fields)
        self.stage.checks.driver_said(self, event, fields)  # type: ignore[arg-type]

    def moment(self, now: float) -> Moment:
        self._moments += 1
        return Moment(now, WALL_AT_START + now, f"{self._moments:016x}")


class StageMachine(Machine):
    """The simulation's machine; its guardian is no more than a lease that is renewed."""

    cluster: Any

    def __init__(self, cluster: Any, name: str, slots: int) -> None:
        super().__init__(cluster, name, slots)

    def _boot_guardian(self) -> None:
        self._session = FixedSession(self.cluster.new_lease(), ttl_s=TTL_S)
        self.start_agent()
        self._renew(self._session)

    def start_agent(self) -> None:
        if self.powered and self.agent is None:
            self.agent = StageAgent(self, self._session, SimClock(self.scheduler, 0.0, 1.0))

    def _renew(self, session: FixedSession) -> None:
        if not self.powered or session is not self._session:
            return
        if self.etcd.open:
            until = self.scheduler.now + DEADLINE_SHARE * TTL_S
            try:
                self.cluster.etcd.keepalive(session.lease)
                session.deadline = until
            except NotFound:
                session.replace(self.cluster.new_lease(), until)
        self.scheduler.after(TTL_S / 4, lambda: self._renew(session))

    def end_agent(self) -> None:
        """Its process is killed; launchers and ranks live on."""
        assert self.agent is not None
        self.agent.process.die()
        self._agent_ended()

    def drain(self, grace_s: float, away_s: float = 0.0) -> None:
        """SIGTERM at its guardian; it does not come back by itself."""
        assert self.agent is not None
        self.draining = DrainAsked("SIGTERM", self.scheduler.now, "", grace_s)
        self.agent.drain()

    def notice(self, grace_s: float) -> None:
        """Its agent hears that the machine goes; what becomes of it is the script's."""
        assert self.agent is not None
        self.draining = DrainAsked("AWS: terminate", self.scheduler.now, "", grace_s, stays=True)
        self.agent.drain()

    def drained(self) -> None:
        session, self._session = self._session, FixedSession(0)
        self.end_agent()
        self.cluster.etcd.revoke(session.lease)
        self.cluster.publish()

    def power_off(self) -> None:
        self.end_agent()
        super().power_off()

    def cut(self, *, etcd_only: bool = False) -> None:
        self.etcd.block("script")
        if not etcd_only:
            self.peers.block("script")

    def heal(self) -> None:
        self.etcd.unblock("script")
        self.peers.unblock("script")


class StageAgent(SimAgent):
    """The simulation's agent, whose calls to etcd return at once instead of waiting in a task."""

    def __init__(self, machine: StageMachine, session: FixedSession, clock: SimClock) -> None:
        self._work_due: Any = None
        super().__init__(machine, session, clock)
        link: Any = Link(machine.cluster, lambda: not machine.etcd.open)
        self.access = link
        self.reporter._etcd = link
        self.reporter._changed.notify = lambda n=1: self._report_at(0.0)  # type: ignore[method-assign]
        self.process.spawn = lambda body, _name: body()  # type: ignore[method-assign,assignment,return-value]

    def _consult(self) -> None:
        self.process.later(max(0.001, self.consultant.work() - self.clock.monotonic()), self._consult)

    def _report(self) -> None:
        self._work_due = None
        self._report_at(max(0.001, self.reporter.work() - self.clock.monotonic()))

    def _report_at(self, delay_s: float) -> None:
        if self._work_due is not None:
            self._work_due.cancel()
        self._work_due = self.process.later(delay_s, self._report)
