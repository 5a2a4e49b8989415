"""One coordinator replica: the real driver, committer, elector, mirror and work, in a simulated process."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dtrain.coordinator.api import consulting
from dtrain.coordinator.core.decisions import Decision, Directed, Work
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.views import Moment
from dtrain.coordinator.driver import Driver
from dtrain.coordinator.leadership.lease import Leadership
from dtrain.coordinator.persistence import Committer, Deposed
from dtrain.coordinator.work import Stores, Worker
from dtrain.coordinator.world import World
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName, ReplicaId, Term
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.session import FixedSession
from tests.sim.etcd import EtcdAccess
from tests.sim.link import Link
from tests.sim.process import Guardian, Process, SimClock
from tests.sim.scheduler import Event, Task
from tests.sim.store import NodeStore

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

HEARD_EVERY_S = 1.0
QUEUE_S = 0.001
"""From another thread's queue to the driver."""


class QuietLog:
    """Takes log lines and shows them only in a trace."""

    def __init__(self, log: Callable[..., None], who: str) -> None:
        self._log = log
        self._who = who

    def _line(self, event: str, **fields: Any) -> None:
        self._log(self._who, event, **{k: v for k, v in fields.items() if k not in ("exc_info", "prefix")})

    debug = info = warning = error = _line


class SimFlag:
    """A ``threading.Event`` whose waiting takes virtual time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._set = False
        self._waits: tuple[Task, int] | None = None

    def is_set(self) -> bool:
        return self._set

    def clear(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True
        if self._waits is not None:
            task, token = self._waits
            self._process.later(0.0, lambda: task.answer(token, None))

    def wait(self, timeout_s: float) -> bool:
        if not self._set:
            scheduler = self._process.scheduler
            task = scheduler.current()
            token = task.waiting + 1
            self._waits = (task, token)
            timer = self._process.later(max(0.001, timeout_s), lambda: task.answer(token, None))
            task.wait()
            timer.cancel()
            self._waits = None
        return self._set


class Replica:
    """The machine of one coordinator: its guardian, and one child after the other."""

    def __init__(self, cluster: "Cluster", name: str, *, ttl_s: int) -> None:
        self.cluster = cluster
        self.name = name
        self.ttl_s = ttl_s
        self.coordinator: Coordinator | None = None
        self.etcd = Link()
        self.peers = Link()
        self.store = Link()
        self.guardian: Guardian | None = None
        self.clock = SimClock(cluster.scheduler, 0.0, 1.0)
        self.boot()

    def boot(self) -> None:
        """Start the guardian; after a loss of the whole machine, too."""
        clock = self.clock = self.cluster.new_clock()
        access = EtcdAccess(self.cluster.etcd, f"{self.name}/guardian", self.etcd)
        self.guardian = Guardian(
            self.cluster.scheduler,
            self.name,
            access,
            clock,
            ttl_s=self.ttl_s,
            keep_lease=False,
            start=lambda session: self._start(session, clock),
            ended=self._ended,
        )

    def _start(self, session: FixedSession, clock: SimClock) -> Process:
        self.coordinator = Coordinator(self.cluster, self, session, clock)
        return self.coordinator.process

    def _ended(self) -> None:
        self.coordinator = None

    def crash_child(self) -> None:
        if self.guardian is not None and self.guardian.child is not None:
            self.guardian.child_ended("killed")

    def crash(self) -> None:
        """The guardian and the child at once: nobody revokes."""
        if self.guardian is not None:
            self.guardian.die()
            self.guardian = None


class Coordinator:
    """One life of the coordinator process. Implements ``DriverPorts``."""

    def __init__(self, cluster: "Cluster", replica: Replica, session: FixedSession, clock: SimClock) -> None:
        self.cluster = cluster
        self.replica = replica
        self.session = session
        self.clock = clock
        self.scheduler = cluster.scheduler
        self.process = Process(self.scheduler, replica.name, cluster.checks.bug)
        self.access = EtcdAccess(cluster.etcd, replica.name, replica.etcd, self.process.is_alive)
        self.access.post = self.process.post
        world = World(
            cluster.name,
            ReplicaId(replica.name),
            agent_ttl_s=cluster.agent_ttl_s,
            default_store=cluster.store.uri,
            scrub_interval_s=cluster.schedule.shape.scrub_s,
            cordon_s=cluster.schedule.shape.cordon_s,
        )
        self.driver = Driver(world, plan, self)
        self.leadership = Leadership(
            self.access,
            session,
            cluster.name,
            ReplicaRecord(ReplicaId(replica.name), f"{replica.name}:1"),
            clock=clock,
            on_term=self._on_term,
            on_over=self._exit,
            answers=lambda _address: self.cluster.is_twin_alive(replica),
            on_taken=self._on_taken,
            rng=self.scheduler.rng,
        )
        self.leadership._woken = SimFlag(self.process)  # type: ignore[assignment]
        self.leadership._log = QuietLog(self.scheduler.log, replica.name)
        self.committer = Committer(
            self.access,
            cluster.name,
            may_act=self.leadership.may_act,
            pause=lambda seconds: self.scheduler.current().sleep(seconds),
            new_lease=cluster.new_record_lease,
        )
        store = NodeStore(cluster, replica.store, waits=True)
        self.worker = Worker(self.access, Stores(lambda _uri: store), merge, clock)
        self.mirror = Mirror(
            self.access,
            cluster.keys.root,
            on_changes=self._on_changes,
            on_alarm=self._on_alarm,
            on_failure=lambda error: cluster.checks.bug(f"{replica.name}/mirror", error),
            clock=clock,
            rng=self.scheduler.rng,
        )
        self.mirror._stop = SimFlag(self.process)  # type: ignore[assignment]
        self.mirror._log = QuietLog(self.scheduler.log, replica.name)
        self.webhook = None if cluster.webhooks is None else cluster.webhooks.sender(self)
        self._tick: Event | None = None
        self.loops: list[Task] = []
        """What must not end before the process does."""
        self.checked_at = -1
        """The revision at which the checks last looked at its world."""
        self.process.later(0.0, self._begin)

    def _begin(self) -> None:
        self.loops = [
            self.process.spawn(self.mirror._run, "mirror"),
            self.process.spawn(self.leadership.run, "lease"),
        ]
        if self.webhook is not None:
            self.loops.append(self.process.spawn(self.webhook.run, "webhook"))
        self._hear()

    def now(self) -> float:
        return self.clock.monotonic()

    # Leadership.

    def _on_term(self, term: Term) -> None:
        self.scheduler.log(self.replica.name, "WON", term=term)
        self._enter(lambda: self.driver.on_term(term, self.now()))

    def _exit(self, why: str) -> None:
        self.scheduler.log(self.replica.name, "exits", why=why)
        guardian = self.replica.guardian
        assert guardian is not None
        guardian.process.later(0.0, lambda: guardian.child is self.process and guardian.child_ended(why))
        self.process.stop()

    def _on_alarm(self, error: DtrainError) -> None:
        if self.cluster.checks.etcd_went_back(self.replica.name, error):
            self._stop_for_good(error.message)

    def _on_taken(self, error: DtrainError) -> None:
        if self.cluster.checks.name_taken(self.replica, error):
            self._stop_for_good(error.message)

    def _stop_for_good(self, why: str) -> None:
        """It ends with the code that says: an operator is needed."""
        guardian = self.replica.guardian
        assert guardian is not None

        def ended() -> None:
            if guardian.child is self.process:
                guardian.stop(why)

        guardian.process.later(0.0, ended)
        self.process.stop()

    def consult(self, request: pb.ConsultRequest) -> pb.ConsultReply:
        """Answer an agent that cannot reach etcd, as the API does."""
        return consulting.answer(self.mirror, self.cluster.keys, request)

    # The mirror's thread hands over to the driver's.

    def _on_changes(self, changes: tuple[Change, ...], revision: int) -> None:
        self.cluster.checks.mirror_at(self.replica.name, self.mirror, revision)
        if self.webhook is not None:
            self.webhook.note(changes)
        for change in changes:
            if change.key == self.cluster.keys.leader:
                self.leadership.nudge(change.after)
        self._enter(lambda: self.driver.on_changes(changes, revision, self.now()))

    def _hear(self) -> None:
        age_s = self.mirror.age_s()
        if age_s < 1e9:
            self._drive(lambda: self.driver.on_heard(self.now() - age_s, self.now()))
        self.process.later(HEARD_EVERY_S, self._hear)

    def _enter(self, call: Callable[[], None]) -> None:
        self.process.later(QUEUE_S, lambda: self._drive(call))

    def _drive(self, call: Callable[[], None]) -> None:
        call()
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        wake_at = self.driver.wake_at
        if wake_at is not None:
            at = max(self.clock.global_at(wake_at), self.scheduler.now + 0.0005)
            self._tick = self.scheduler.at(
                at, lambda: self.process.post(lambda: self._drive(lambda: self.driver.on_tick(self.now())))
            )
        self.cluster.checks.driver_moved(self)

    # DriverPorts.

    def commit(self, job: JobName, term: Term, decision: Decision) -> None:
        self.cluster.checks.deciding(self, job, decision)

        def body() -> None:
            outcome = self.committer.commit(term, decision)
            if self.scheduler.tracing:
                self.scheduler.log(
                    self.replica.name,
                    "commit",
                    outcome=type(outcome).__name__,
                    keys=[write.key.split("/", 4)[-1] for write in decision.writes],
                )
            if isinstance(outcome, Deposed):
                self._exit("deposed")
                return
            self._enter(lambda: self.driver.on_txn(job, outcome, self.now()))

        self._later_spawn(body, "commit")

    def send(self, directed: Directed) -> None:
        if not self.leadership.may_act():
            return
        self.cluster.network.send(self, directed)

    def answered(self, directed: Directed, ok: bool, problem: str) -> None:
        self._enter(lambda: self.driver.on_command(directed, ok, problem, self.now()))

    def start_work(self, job: JobName, work: Work) -> None:
        def body() -> None:
            result = self.worker.run(work)
            self.scheduler.log(self.replica.name, "work", result=type(result).__name__)
            self._enter(lambda: self.driver.on_work(job, result, self.now()))

        self._later_spawn(body, "work")

    def _later_spawn(self, body: Callable[[], None], name: str) -> None:
        def spawn() -> None:
            self.process.spawn(body, name)

        self.process.later(QUEUE_S, spawn)

    def log(self, event: str, **fields: Any) -> None:
        self.scheduler.log(self.replica.name, event, **fields)
        self.cluster.checks.driver_said(self, event, fields)

    def moment(self, now: float) -> Moment:
        return Moment(now, self.clock.wall(), f"{self.scheduler.rng.getrandbits(64):016x}")
