"""Records as a replica would serve them, and replicas that serve them over real gRPC."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from dtrain.cli import records
from dtrain.cli.answers import Item, Reading
from dtrain.protocol import codec, summaries
from dtrain.protocol.checkpoint import (
    CommitRecord,
    Garbage,
    Latest,
    OpenRecord,
    Pin,
    Quarantine,
    Verification,
)
from dtrain.protocol.cluster import Cordon, LeaderRecord, ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventReason, EventRecord, EventType
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import (
    Condition,
    Entry,
    EntryKind,
    Intent,
    JobPhase,
    JobSpec,
    JobStatus,
    Member,
    RestorePoint,
)
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb import coordinator_pb2_grpc
from dtrain.protocol.snapshot import Failure, FailureKind, NodeRecord, RankState, WorkerPhase, WorkerSnapshot

KEYS = Keys(ClusterName("local"))
NOW = 1_800_000_000.0
JOB, UID, TERM = JobName("digits"), Uid("u1"), Term(7)


def at(seconds_ago: float) -> str:
    from dtrain.runtime.clock import iso

    return iso(NOW - seconds_ago)


def item(key: str, record: Any, *, create: int = 5) -> Item:
    return Item(key.removeprefix(KEYS.root), codec.encode(record), create, 9)


def spec(**more: Any) -> JobSpec:
    values: dict[str, Any] = {
        "name": JOB,
        "uid": UID,
        "entry": Entry(EntryKind.SCRIPT, "train.py", ("--lr", "0.1")),
        "nnodes_min": 2,
        "nnodes_max": 2,
        "nproc_per_node": 2,
        "working_dir": "/code",
        "submitted_at": at(3700),
    }
    return JobSpec(**(values | more))


def status(phase: JobPhase = JobPhase.RUNNING, **more: Any) -> JobStatus:
    members = (
        Member(AgentName("a1"), 0, Rank(0), 2),
        Member(AgentName("a2"), 1, Rank(2), 2),
    )
    values: dict[str, Any] = {
        "term": TERM,
        "uid": UID,
        "phase": phase,
        "reason": "all 4 ranks train",
        "attempt": Attempt(3),
        "members": members,
        "store": "s3://b",
        "step": Step(40),
        "since": at(65),
        "restarts": (NOW - 60, NOW - 9999),
    }
    return JobStatus(**(values | more))


def snapshot(agent: str, first: int, step: int, **more: Any) -> WorkerSnapshot:
    values: dict[str, Any] = {
        "agent": AgentName(agent),
        "uid": UID,
        "incarnation": Incarnation("i"),
        "attempt": Attempt(3),
        "phase": WorkerPhase.TRAINING,
        "ranks": tuple(
            RankState(Rank(rank), 100 + rank, WorkerPhase.TRAINING, Step(step), metrics={"loss": 0.25})
            for rank in (first, first + 1)
        ),
    }
    return WorkerSnapshot(**(values | more))


def failure(**more: Any) -> Failure:
    values: dict[str, Any] = {
        "kind": FailureKind.SIGNAL,
        "message": "out of memory",
        "agent": AgentName("a2"),
        "attempt": Attempt(2),
        "rank": Rank(3),
        "pid": 4711,
        "signal": 9,
        "log_tail": "step 431 loss=0.213\nKilled\n",
    }
    return Failure(**(values | more))


def running_job(**more: Any) -> list[Item]:
    """A job in full health, with a past."""
    return [
        item(KEYS.spec(JOB), spec()),
        item(KEYS.status(JOB), status(**more)),
        item(KEYS.latest(JOB), Latest(TERM, Seq(4), Step(40))),
        item(KEYS.garbage(JOB, Seq(2)), Garbage(TERM, Seq(2), "m2", "d", "retention")),
        item(KEYS.checkpoint(JOB, Seq(3)), commit(3, 30)),
        item(KEYS.bad(JOB, Seq(3)), Quarantine(TERM, Seq(3), "blob-x", 2, "aa", "bb", at=at(5))),
        item(KEYS.checkpoint(JOB, Seq(4)), commit(4, 40)),
        item(
            KEYS.open(JOB, Seq(5)),
            OpenRecord(TERM, UID, Seq(5), Attempt(3), Step(50), "n", 4, 60.0, opened_at=at(2)),
        ),
        item(KEYS.pin(JOB, Seq(4), "reader"), Pin(Seq(4), "reader", 60, "export")),
        item(KEYS.verified(JOB, Seq(4)), Verification(TERM, Seq(4), at(7), 1_200_000_000)),
        item(KEYS.event(JOB, 1), event(1, EventReason.ATTEMPT_STARTED, "attempt 3 begins", 70)),
        item(
            KEYS.event(JOB, 2),
            event(2, EventReason.RANK_SIGNALED, "SIGKILL", 80, type=EventType.WARNING, object="rank/3"),
        ),
        item(KEYS.worker(AgentName("a1"), JOB), snapshot("a1", 0, 46)),
        item(KEYS.worker(AgentName("a2"), JOB), snapshot("a2", 2, 45)),
    ]


def commit(seq: int, step: int) -> CommitRecord:
    return CommitRecord(
        TERM, UID, Seq(seq), Step(step), Attempt(2), "n", 4, 1_200_000_000, "m", 10, "d", committed_at=at(41)
    )


def event(seq: int, reason: EventReason, message: str, seconds_ago: float, **more: Any) -> EventRecord:
    values: dict[str, Any] = {
        "type": EventType.NORMAL,
        "attempt": Attempt(3),
        "first": at(seconds_ago),
        "last": at(seconds_ago),
    }
    return EventRecord(term=TERM, seq=seq, reason=reason, message=message, **(values | more))


def fleet() -> list[Item]:
    """Two agents, the second cordoned, and two replicas, the first leading."""
    return [
        item(
            KEYS.node(AgentName("a1")),
            NodeRecord(AgentName("a1"), Incarnation("i"), "h1:1", "h1", 2, version="0.1.0", since=at(7200)),
        ),
        item(
            KEYS.node(AgentName("a2")),
            NodeRecord(AgentName("a2"), Incarnation("j"), "h2:1", "h2", 4, since=at(10)),
        ),
        item(KEYS.cordon(AgentName("a2")), Cordon(AgentName("a2"), "bad memory", "ops")),
        item(
            KEYS.coordinator(ReplicaId("c1")),
            ReplicaRecord(ReplicaId("c1"), "h1:7070", "0.1.0", "h1", 5, at(60)),
        ),
        item(
            KEYS.coordinator(ReplicaId("c2")),
            ReplicaRecord(ReplicaId("c2"), "h2:7070", "0.1.0", "h2", 6, at(60)),
        ),
        item(KEYS.leader, LeaderRecord(ReplicaId("c1"), "h1:7070", "n"), create=TERM),
    ]


def reading(*items: Item, revision: int = 9) -> Reading:
    return Reading(tuple(items), revision, 0.1, "h1:7070")


__all__ = ["Condition", "RestorePoint", "json"]


@dataclass
class FakeReplica(coordinator_pb2_grpc.CoordinatorServicer):
    """Answers from fields that a test sets; ``refuse`` raises for every call."""

    items: list[Item] = field(default_factory=list)
    revision: int = 9
    refuse: Callable[[], DtrainError | grpc.StatusCode | None] = lambda: None
    calls: list[str] = field(default_factory=list)
    submitted: dict[str, bytes] = field(default_factory=dict)
    store: str = ""
    intents: list[pb.SetIntentRequest] = field(default_factory=list)
    cordons: list[pb.CordonRequest] = field(default_factory=list)
    logs: dict[tuple[int, int, str], bytes] = field(default_factory=dict)
    """(attempt, rank, stream) to what was written."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    problems: list[str] = field(default_factory=list)
    former: bool = False
    """It is of the release before this one: it makes no rows."""
    knows_pauses: bool = True

    history: list[pb.Changed] = field(default_factory=list)
    known_from: int = 0

    def update(self, items: list[Item]) -> None:
        """Become so in one transaction."""
        with self.changed:
            before = {one.key: one.value for one in self.items}
            self.revision += 1
            now = {one.key: one for one in items}
            self.items = [
                one if before.get(one.key) == one.value else replace(one, mod_revision=self.revision)
                for one in items
            ]
            self.history += [
                pb.Changed(key=key, revision=self.revision, value=one.value)
                for key, one in now.items()
                if before.get(key) != one.value
            ]
            self.history += [
                pb.Changed(key=key, revision=self.revision, deleted=True) for key in before if key not in now
            ]
            self.changed.notify_all()

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.SubmitReply:  # noqa: N802
        self._enter("Submit", context)
        created = request.request_id not in self.submitted
        if not request.dry_run:
            self.submitted.setdefault(request.request_id, request.spec)
        document = json.loads(request.spec) | {"uid": "u1"}
        return pb.SubmitReply(spec=codec.dumps(document), created=created, revision=self.revision)

    def SetIntent(self, request: pb.SetIntentRequest, context: grpc.ServicerContext) -> pb.SetIntentReply:  # noqa: N802
        self._enter("SetIntent", context)
        self.intents.append(request)
        paused = request.pause == "pause" and self.knows_pauses
        intent = codec.encode(Intent(Uid("u1"), paused=paused))
        return pb.SetIntentReply(intent=intent, revision=self.revision)

    def Cordon(self, request: pb.CordonRequest, context: grpc.ServicerContext) -> pb.CordonReply:  # noqa: N802
        self._enter("Cordon", context)
        self.cordons.append(request)
        until = at(-request.ttl_s) if request.ttl_s else ""
        record = Cordon(AgentName(request.agent), request.reason, request.by, until, request.drain)
        return pb.CordonReply(record=codec.encode(record), revision=self.revision)

    def Stacks(self, _request: pb.JobStacksRequest, _context: Any) -> pb.JobStacksReply:  # noqa: N802
        rank = pb.JobStacksReply.RankStacks(rank=0, agent="a1", kind="data", where="read (x.py:3)", text="..")
        return pb.JobStacksReply(ranks=[rank])

    def Uncordon(self, request: pb.UncordonRequest, context: grpc.ServicerContext) -> pb.UncordonReply:  # noqa: N802
        self._enter("Uncordon", context)
        return pb.UncordonReply(removed=request.agent == "a2", revision=self.revision)

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> pb.ReadReply:  # noqa: N802
        self._enter("Read", context)
        with self.changed:
            if request.after_revision:
                self.changed.wait_for(lambda: self.revision > request.after_revision, request.wait_ms / 1000)
            return pb.ReadReply(
                items=[
                    pb.Item(
                        key=i.key,
                        value=i.value,
                        create_revision=i.create_revision,
                        mod_revision=i.mod_revision,
                    )
                    for i in self.items
                    if i.key.startswith(request.prefix)
                ],
                revision=self.revision,
                age_s=0.1,
            )

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListReply:  # noqa: N802
        self._enter("List", context)
        if self.former:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        with self.changed:
            if request.after_revision:
                self.changed.wait_for(lambda: self.revision > request.after_revision, request.wait_ms / 1000)
            cluster = records.group(Reading(tuple(self.items), self.revision, 0.1, ""))
            made: list[Any] = summaries.in_queue([job.row(NOW) for job in cluster.jobs.values()])
            if request.kind == "agents":
                made = [agent.row for agent in cluster.agents.values()]
            return pb.ListReply(rows=[codec.encode(row) for row in made], revision=self.revision, age_s=0.1)

    def Changes(self, request: pb.ChangesRequest, context: grpc.ServicerContext) -> pb.ChangesReply:  # noqa: N802
        self._enter("Changes", context)
        if self.former:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        with self.changed:
            self.changed.wait_for(
                lambda: self.revision > request.after_revision or not context.is_active(),
                request.wait_ms / 1000,
            )
            return pb.ChangesReply(
                changes=[
                    one
                    for one in self.history
                    if one.revision > request.after_revision and one.key.startswith(tuple(request.prefixes))
                ],
                revision=max(self.revision, request.after_revision),
                lost=request.after_revision < self.known_from,
            )

    def ReadLog(self, request: pb.JobLogRequest, context: grpc.ServicerContext) -> pb.JobLogChunk:  # noqa: N802
        self._enter("ReadLog", context)
        data = self.logs.get((request.attempt, request.rank, request.stream))
        if data is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such log")
            raise AssertionError
        # Small chunks, so that lines are cut in the middle.
        part = data[request.offset : request.offset + 7]
        return pb.JobLogChunk(
            data=part,
            next_offset=request.offset + len(part),
            attempt=request.attempt,
            agent="a1",
            eof=not part,
        )

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:  # noqa: N802
        self._enter("Info", context)
        return pb.InfoReply(
            cluster="local",
            replica="c1",
            version="0.1.0",
            mirror_age_s=0.2,
            problems=self.problems,
            store=self.store,
        )

    def _enter(self, name: str, context: grpc.ServicerContext) -> None:
        self.calls.append(name)
        problem = self.refuse()
        if isinstance(problem, grpc.StatusCode):
            context.abort(problem, "told to")
        if isinstance(problem, DtrainError):
            told = {
                "kind": type(problem).__name__,
                "code": problem.code,
                "message": problem.message,
                "fix": problem.fix,
            }
            context.set_trailing_metadata((("dtrain-error-bin", json.dumps(told).encode()),))
            context.abort(grpc.StatusCode.UNKNOWN, problem.message)


@contextmanager
def serving(replica: FakeReplica) -> Iterator[str]:
    """Serve on a free loopback port; yields its address."""
    server = grpc.server(futures.ThreadPoolExecutor(16))
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(replica, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
