"""A machine on the table: feed it events, look at what it wants done."""

from collections.abc import Mapping
from typing import Any, TypeVar

from dtrain.agent.core.adoption import adopt
from dtrain.agent.core.decisions import (
    Action,
    Decision,
    EnsureLauncher,
    JournalJob,
    LauncherOrder,
    RankMessage,
    TransferOrder,
    WriteSnapshot,
)
from dtrain.agent.core.events import (
    CommandArrived,
    Event,
    LauncherReported,
    LauncherStarted,
    RankConnected,
    RankReported,
    Tick,
    TransferReported,
)
from dtrain.agent.core.invariants import check
from dtrain.agent.core.state import AgentState, JobState, Machine
from dtrain.agent.core.step import step
from dtrain.agent.launching import (
    Cleared,
    Forked,
    LauncherReady,
    LauncherState,
    LiveRank,
    ProcessId,
    RankEnded,
    StoreReady,
)
from dtrain.protocol import codec
from dtrain.protocol.commands import (
    AbortCheckpoint,
    BeginCheckpoint,
    Command,
    ConfirmCheckpoint,
    Header,
    Prepare,
    Start,
    Stop,
)
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import Entry, EntryKind, JobSpec, RestorePoint
from dtrain.protocol.ranklink import Hello, Report, Sealed
from dtrain.protocol.snapshot import DurablePart, WorkerPhase, WorkerSnapshot

A = TypeVar("A")
JOB = JobName("train")
LAUNCHER = ProcessId(100, 1, "boot")
RESTORE = RestorePoint(Seq(7), Step(70), "manifests/7.json.gz", "d" * 64)


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "cluster": ClusterName("test"),
        "agent": AgentName("node-a"),
        "host": "10.0.0.1",
        "rank_socket": "/run/ranks.sock",
        "run_dir": "/run",
        "log_dir": "/logs",
        "env": {"PATH": "/bin", "DTRAIN_PASSWORD": "secret", "ETCDCTL_PASSWORD": "secret"},
    }
    return Machine(**{**values, **changes})


def sealed(seq: int = 1, nonce: str = "n1", step_: int = 10) -> Sealed:
    return Sealed(Seq(seq), nonce, Step(step_), "/proc/100/fd/9", 0, 64, 64, 10)


def part(rank: int, seq: int = 1, nonce: str = "n1", attempt: int = 1) -> DurablePart:
    return DurablePart(Seq(seq), Attempt(attempt), Step(10), Rank(rank), nonce, "key", "digest", 64)


class Table:
    """One agent's state; every step is checked against the invariants."""

    def __init__(self, *, nproc: int = 2, store: str = "s3://bucket", serve_store: bool = True) -> None:
        self.state = AgentState(machine(), Incarnation("life-1"))
        self.now = 1000.0
        self.nproc, self.store, self.serve_store = nproc, store, serve_store
        self.last = Decision()
        self.connections = 0

    # Events

    def feed(self, event: Event) -> Decision:
        self.state, self.last = step(self.state, event, self.now, wall=5.0)
        check(self.state)
        return self.last

    def tick(self, seconds: float = 0.0) -> Decision:
        self.now += seconds
        return self.feed(Tick())

    def command(self, command: Command, *, confirmed: bool = True) -> Decision:
        return self.feed(CommandArrived(command, confirmed))

    def report(self, report: Any, *, uid: str = "u1") -> Decision:
        return self.feed(LauncherReported(JOB, Uid(uid), report))

    def transfer(self, report: Any) -> Decision:
        return self.feed(TransferReported(report))

    def hello(self, rank: int, *, attempt: int = 1, uid: str = "u1") -> int:
        self.connections += 1
        self.feed(
            RankConnected(
                self.connections, Hello(1, JOB, Uid(uid), Attempt(attempt), Rank(rank), rank, 200 + rank)
            )
        )
        return self.connections

    def rank_report(
        self, connection: int, phase: WorkerPhase = WorkerPhase.TRAINING, at: int = 0, **more: Any
    ) -> Decision:
        return self.feed(RankReported(connection, Report(phase, Step(at), **more)))

    def ended(
        self, rank: int, exit_code: int, *, error: str = "", attempt: int = 1, tail: str = ""
    ) -> Decision:
        return self.report(RankEnded(Attempt(attempt), Rank(rank), 200 + rank, exit_code, 7.0, error, tail))

    # Longer ways

    def prepared(self, attempt: int = 1, *, uid: str = "u1") -> "Table":
        """Through PREPARE to READY."""
        self.command(self.prepare(attempt, uid=uid))
        if self.wanted(EnsureLauncher):
            self.feed(LauncherStarted(JOB, Uid(uid), LAUNCHER))
            self.report(LauncherState(LAUNCHER, ready=False), uid=uid)
        self.report(Cleared(Attempt(attempt)), uid=uid)
        if self.serve_store:
            self.report(StoreReady(Attempt(attempt), 29500), uid=uid)
        self.report(LauncherReady(), uid=uid)
        return self

    def forked(self, attempt: int = 1, *, restore: RestorePoint | None = None) -> "Table":
        """Through START to running processes."""
        self.prepared(attempt)
        self.command(self.start(attempt, restore))
        self.report(Forked(Attempt(attempt), self.live(attempt)))
        return self

    def training(self, attempt: int = 1) -> "Table":
        """Until all ranks have joined through the SDK and train; connections are 1 to nproc."""
        self.forked(attempt)
        for rank in range(self.nproc):
            self.rank_report(self.hello(rank, attempt=attempt))
        return self

    def live(self, attempt: int = 1) -> tuple[LiveRank, ...]:
        return tuple(
            LiveRank(Attempt(attempt), Rank(rank), rank, ProcessId(200 + rank, attempt, "boot"))
            for rank in range(self.nproc)
        )

    def restart(self) -> tuple[Action, ...]:
        """The agent is killed and comes back with what its journal holds."""
        seen: Mapping[JobName, tuple[str, ...]] = self.state.seen
        jobs = {name: codec.decode(JobState, codec.encode(self.journaled[name])) for name in self.journaled}
        state = AgentState(machine(), Incarnation("life-2"), self.state.term, jobs, seen)
        self.state, actions = adopt(state, self.now)
        check(self.state)
        return actions

    @property
    def journaled(self) -> dict[JobName, JobState]:
        """What a faithful journal would hold: checked against the decisions by ``Recorder`` tests."""
        from dtrain.agent.core.state import durable_view

        return {name: durable_view(job) for name, job in self.state.jobs.items()}

    # Commands

    def head(self, attempt: int, name: str, *, term: int = 5, uid: str = "u1") -> Header:
        return Header(
            ClusterName("test"), Term(term), JOB, Uid(uid), Attempt(attempt), f"{uid}-{attempt}-{name}"
        )

    def spec(self, uid: str = "u1", **more: Any) -> JobSpec:
        return JobSpec(JOB, Uid(uid), Entry(EntryKind.SCRIPT, "train.py"), nproc_per_node=self.nproc, **more)

    def prepare(self, attempt: int = 1, *, uid: str = "u1", term: int = 5, **more: Any) -> Prepare:
        return Prepare(
            self.head(attempt, "prepare", term=term, uid=uid),
            self.spec(uid, **more),
            self.store,
            node_rank=0,
            nnodes=1,
            first_rank=Rank(0),
            world_size=self.nproc,
            serve_store=self.serve_store,
            max_restarts=3,
        )

    def start(self, attempt: int = 1, restore: RestorePoint | None = None) -> Start:
        return Start(self.head(attempt, "start"), "10.0.0.1:29500", restore)

    def begin(self, seq: int = 1, nonce: str = "n1", at: int = 10, attempt: int = 1) -> BeginCheckpoint:
        return BeginCheckpoint(self.head(attempt, f"begin-{seq}"), Seq(seq), nonce, Step(at))

    def abort(self, seq: int = 1, attempt: int = 1) -> AbortCheckpoint:
        return AbortCheckpoint(self.head(attempt, f"abort-{seq}"), Seq(seq), "timeout")

    def confirm(self, seq: int = 1, *, final: bool = False) -> ConfirmCheckpoint:
        return ConfirmCheckpoint(self.head(1, f"confirm-{seq}"), Seq(seq), final)

    def stop(self, attempt: int = 1, *, release: bool = False, grace_s: float = 30.0) -> Stop:
        return Stop(self.head(attempt, f"stop-{release}"), grace_s, release, "asked to")

    # What it wants done

    @property
    def job(self) -> JobState:
        return self.state.jobs[JOB]

    @property
    def snapshot(self) -> WorkerSnapshot:
        from dtrain.agent.core.snapshots import snapshot_of

        return snapshot_of(self.state, self.job)

    def wanted(self, kind: type[A]) -> list[A]:
        return [action for action in self.last.actions if isinstance(action, kind)]

    def launcher_orders(self) -> list[Any]:
        return [action.order for action in self.wanted(LauncherOrder)]

    def transfer_orders(self) -> list[Any]:
        return [action.order for action in self.wanted(TransferOrder)]

    def messages(self, kind: type[A]) -> list[A]:
        return [one.message for one in self.wanted(RankMessage) if isinstance(one.message, kind)]

    def written(self) -> WriteSnapshot:
        (write,) = self.wanted(WriteSnapshot)
        return write

    def journal(self) -> list[JournalJob]:
        return [write for write in self.last.journal if isinstance(write, JournalJob)]
