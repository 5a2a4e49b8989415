"""The Coordinator service over real gRPC: a replica's API on the model of etcd."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from typing import Any

import grpc
import pytest

from dtrain.coordinator.api import stacks
from dtrain.coordinator.api.checkpoints import CheckpointDesk
from dtrain.coordinator.api.cordons import Cordons
from dtrain.coordinator.api.records import Operators
from dtrain.coordinator.api.server import THREADS_WAITING, Server, waiting_slots
from dtrain.coordinator.api.servicers import CoordinatorServicer, Identity
from dtrain.coordinator.dispatch import Channels
from dtrain.coordinator.work import Orphans, Stores
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Pin
from dtrain.protocol.cluster import Cordon, LeaderRecord, ReplicaRecord, Suspicion
from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Refused
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
from dtrain.protocol.job import Entry, EntryKind, Intent, JobPhase, JobSpec, JobStatus, Member, Wanted
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as agent_pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb.coordinator_pb2_grpc import CoordinatorStub
from dtrain.protocol.rows import AgentRow, JobRow
from dtrain.protocol.snapshot import NodeRecord, RankState, WorkerPhase, WorkerSnapshot
from dtrain.runtime.clock import SystemClock
from dtrain.runtime.grpc_errors import ERROR_KEY
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Delete, Put, Txn, TxnResult, prefix_end

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
JOB = JobName("train")
SPEC = {"v": 1, "name": "train", "entry": {"kind": "script", "target": "train.py"}}


class LossyEtcd(MemoryEtcd):
    """Loses the answer of the next writing transactions, after or before applying them."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.lose: list[str] = []

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        how = self.lose.pop(0) if self.lose and any(isinstance(op, Put) for op in txn.success) else ""
        result = super().txn(txn, deadline_s=deadline_s) if how != "before" else None
        if how or result is None:
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "lost")
        return result


class Replica:
    """One replica's API with a mirror, and a client of it."""

    def __init__(self) -> None:
        self.etcd = LossyEtcd()
        self.mirror = Mirror(self.etcd, KEYS.root)
        self.channels = Channels()
        self.term: Term | None = None
        self.waiting = waiting_slots()
        self.server = Server("127.0.0.1:0")
        servicer = CoordinatorServicer(
            Identity(CLUSTER, ReplicaId("r1"), "0.0.0"),
            self.mirror,
            Operators(self.etcd, CLUSTER, SystemClock()),
            self.channels,
            Stores(),
            checkpoints=CheckpointDesk(self.etcd, CLUSTER, SystemClock(), lambda _work: Orphans()),
            cordons=Cordons(self.etcd, CLUSTER, SystemClock()),
            term=lambda: self.term,
            waiting=self.waiting,
        )
        self.mirror.start()
        assert self.mirror.wait_for(1, 5)
        self.server.start(servicer)
        self.channel = grpc.insecure_channel(self.server.address)
        self.stub = CoordinatorStub(self.channel)

    def close(self) -> None:
        self.channel.close()
        self.server.stop(0)
        self.server.close()
        self.mirror.close()
        self.channels.close()

    def put(self, key: str, value: Any) -> int:
        revision = self.etcd.txn(Txn(success=(Put(key, codec.encode(value)),))).revision
        assert self.mirror.wait_for(revision, 5)
        return revision

    def submit(self, request_id: str = "q1", dry_run: bool = False, **changes: Any) -> pb.SubmitReply:
        document = json.dumps({**SPEC, **changes}).encode()
        return self.stub.Submit(pb.SubmitRequest(spec=document, request_id=request_id, dry_run=dry_run))

    def stored(self, key: str, kind: type) -> Any:
        items = self.etcd.range(key).items
        return codec.decode(kind, items[0].value) if items else None


@pytest.fixture
def replica() -> Iterator[Replica]:
    made = Replica()
    yield made
    made.close()


def refusal(call: Any) -> tuple[grpc.StatusCode, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    told = dict(error.trailing_metadata())[ERROR_KEY]
    return error.code(), json.loads(told)


def status(uid: str, phase: JobPhase, **fields: Any) -> JobStatus:
    return JobStatus(Term(1), uid, phase, **fields)  # type: ignore[arg-type]


def test_a_submitted_job_is_stored_with_its_intent_at_one_revision(replica: Replica) -> None:
    reply = replica.submit()
    spec = codec.decode(JobSpec, reply.spec)
    assert reply.created
    assert replica.stored(KEYS.spec(JOB), JobSpec) == spec
    assert len(spec.uid) == 8
    assert spec.submitted_at
    assert replica.stored(KEYS.intent(JOB), Intent).uid == spec.uid
    (kv,) = replica.etcd.range(KEYS.intent(JOB)).items
    assert kv.mod_revision == reply.revision


def test_the_same_request_submits_once(replica: Replica) -> None:
    first, again = replica.submit("q1"), replica.submit("q1")
    assert (first.created, again.created) == (True, False)
    assert first.spec == again.spec


def test_another_request_for_a_job_that_runs_is_refused_with_a_fix(replica: Replica) -> None:
    replica.submit("q1")
    code, told = refusal(lambda: replica.submit("q2"))
    assert (code, told["code"]) == (grpc.StatusCode.ALREADY_EXISTS, ErrorCode.ALREADY_EXISTS)
    assert "dtrain cancel train" in told["fix"]


def test_the_name_of_an_ended_job_can_be_used_again(replica: Replica) -> None:
    old = codec.decode(JobSpec, replica.submit("q1").spec)
    replica.put(KEYS.status(JOB), status(old.uid, JobPhase.SUCCEEDED))
    reply = replica.submit("q2")
    assert reply.created
    assert codec.decode(JobSpec, reply.spec).uid != old.uid
    # The status is still the old job's: the new one has not ended.
    assert refusal(lambda: replica.submit("q3"))[0] is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize("lost", [["after"], ["before"], ["before", "after"]])
def test_a_lost_answer_neither_loses_nor_doubles_a_submission(replica: Replica, lost: list[str]) -> None:
    replica.etcd.lose = lost
    reply = replica.submit()
    assert reply.created
    assert replica.stored(KEYS.spec(JOB), JobSpec).uid == codec.decode(JobSpec, reply.spec).uid
    assert replica.etcd.range(KEYS.spec(JOB)).items[0].version == 1


def test_a_submission_that_came_between_reading_and_writing_is_not_overwritten(replica: Replica) -> None:
    apply = replica.etcd.txn

    def overtaken(txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        if any(isinstance(operation, Put) for operation in txn.success):
            replica.etcd.txn = apply  # type: ignore[method-assign]
            assert replica.submit("q1").created
        return apply(txn, deadline_s=deadline_s)

    replica.etcd.txn = overtaken  # type: ignore[method-assign]
    assert refusal(lambda: replica.submit("q2"))[0] is grpc.StatusCode.ALREADY_EXISTS
    assert replica.stored(KEYS.spec(JOB), JobSpec).request_id == "q1"


def test_submissions_at_once_create_one_job(replica: Replica) -> None:
    def attempt(number: int) -> str:
        try:
            return "created" if replica.submit(f"q{number}").created else "known"
        except grpc.RpcError as error:
            return str(error.code().name)

    with futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attempt, range(8)))
    assert sorted(answers) == ["ALREADY_EXISTS"] * 7 + ["created"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../up"}, "cannot name a job"),
        ({"name": "a\nb"}, "cannot name a job"),
        ({"nnodes_min": 3, "nnodes_max": 2}, "nnodes"),
        ({"nproc_per_node": -1}, "nproc_per_node"),
        ({"entry": {"kind": "script", "target": " "}}, "script"),
        ({"entry": {"kind": "shell", "target": "x"}}, "not one of"),
        ({"env": {"A=B": "x"}}, "env"),
        ({"checkpoint": {"store": "ftp://x"}}, "not a store"),
        ({"checkpoint": {"keep_last": 0}}, "keep_last"),
        ({"working_dir": "here"}, "working_dir"),
        ({"nonfinite": {"action": "rollback", "back": 3}}, "only 3 checkpoints are kept"),
        ({"nonfinite": {"back": 0}}, "nonfinite.back"),
        ({"spares": -1}, "spares"),
        ({"grow_cooldown_s": -1.0}, "grow_cooldown"),
        ({"hang": {"timeout_s": -1.0}}, "hang.timeout"),
        ({"hang": {"startup_s": 0.0}}, "hang.startup"),
        ({"nonfinite": {"metrics": list("abcdefghi")}}, "nonfinite.metrics"),
    ],
)
def test_a_job_that_cannot_run_is_refused_by_name_of_its_field(
    replica: Replica, changes: dict[str, Any], said: str
) -> None:
    code, told = refusal(lambda: replica.submit(**changes))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in told["message"]
    assert not replica.etcd.range(KEYS.spec(JOB)).items


def test_a_dry_run_checks_the_store_and_stores_nothing(replica: Replica) -> None:
    reply = replica.submit(dry_run=True)
    assert not reply.created
    code, told = refusal(lambda: replica.submit(dry_run=True, checkpoint={"store": "file:///no/such"}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told["fix"]
    assert not replica.etcd.range(KEYS.spec(JOB)).items


def test_a_store_that_is_silent_leaves_time_to_answer_the_caller(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    silent = MemoryBlobs(fault=lambda _op, _key: release.wait(20))
    monkeypatch.setattr(Stores, "get", lambda _self, _uri: silent)
    document = json.dumps({**SPEC, "checkpoint": {"store": "s3://bucket"}}).encode()
    try:
        reply = replica.stub.Submit(pb.SubmitRequest(spec=document, request_id="q1"), timeout=2.5)
    finally:
        release.set()
    assert reply.created
    assert any("does not answer" in warning for warning in reply.warnings)


def test_a_job_that_must_wait_for_agents_says_so(replica: Replica) -> None:
    replica.put(KEYS.node(AgentName("a1")), NodeRecord(AgentName("a1"), Incarnation("i"), "h:1", "h", 1))
    assert "1 agents are alive, 2 are needed" in replica.submit(nnodes_min=2, nnodes_max=2).warnings[0]
    assert "0 of 1 agents have 4 slots" in replica.submit("q1", name="t2", nproc_per_node=4).warnings[0]
    assert not replica.submit("q1", name="t3").warnings


def test_an_intent_changes_only_what_was_asked(replica: Replica) -> None:
    replica.submit()
    first = replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, checkpoint_token="t1", by="ada"))
    assert codec.decode(Intent, first.intent).checkpoint_token == "t1"
    second = replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="cancel"))
    stored = replica.stored(KEYS.intent(JOB), Intent)
    assert (stored.wanted, stored.checkpoint_token) == (Wanted.CANCEL, "t1")
    again = replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="cancel"))
    assert again.intent == second.intent
    assert replica.etcd.range(KEYS.intent(JOB)).items[0].version == 3


def test_a_job_is_scaled_and_stays_so(replica: Replica) -> None:
    replica.submit()
    replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, nnodes_min=2, nnodes_max=8))
    replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, checkpoint_token="t1"))
    stored = replica.stored(KEYS.intent(JOB), Intent)
    assert (stored.nnodes_min, stored.nnodes_max, stored.wanted) == (2, 8, Wanted.RUN)
    for low, high in ((3, 2), (0, 2), (2, 0), (-1, 2), (1, 10**6)):
        request = pb.SetIntentRequest(job=JOB, nnodes_min=low, nnodes_max=high)
        code, told = refusal(lambda request=request: replica.stub.SetIntent(request))  # type: ignore[misc]
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "nnodes" in told["message"]


def test_an_intent_for_an_unknown_job_names_one_like_it(replica: Replica) -> None:
    replica.put(KEYS.spec(JOB), codec.decode(JobSpec, replica.submit().spec))
    code, told = refusal(lambda: replica.stub.SetIntent(pb.SetIntentRequest(job="trian", wanted="cancel")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert told["fix"] == "did you mean train?"


def test_an_ended_job_wants_nothing_more(replica: Replica) -> None:
    spec = codec.decode(JobSpec, replica.submit().spec)
    replica.put(KEYS.status(JOB), status(spec.uid, JobPhase.FAILED))
    code, told = refusal(lambda: replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="cancel")))
    assert code is grpc.StatusCode.ABORTED
    assert "FAILED" in told["message"]


def test_a_job_is_suspended_and_resumed_but_a_cancelled_one_is_not(replica: Replica) -> None:
    replica.submit()
    for wanted in (Wanted.SUSPEND, Wanted.RUN, Wanted.CANCEL):
        replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted=wanted.value))
        assert replica.stored(KEYS.intent(JOB), Intent).wanted is wanted
    code, told = refusal(lambda: replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="run")))
    assert code is grpc.StatusCode.ABORTED
    assert "cannot be undone" in told["message"]


def test_no_job_is_suspended_while_a_coordinator_could_not_read_it(replica: Replica) -> None:
    replica.submit()
    old = ReplicaId("c9")
    replica.put(KEYS.coordinator(old), ReplicaRecord(old, "c9:1", version="0.1.0"))
    code, told = refusal(lambda: replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="suspend")))
    assert code is grpc.StatusCode.ABORTED
    assert "coordinator c9 runs dtrain 0.1.0" in told["message"]
    assert replica.stored(KEYS.intent(JOB), Intent).wanted is Wanted.RUN


def test_a_job_is_paused_and_unpaused_and_what_else_is_wanted_stays(replica: Replica) -> None:
    replica.submit()
    replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, nnodes_min=1, nnodes_max=2))
    for pause, paused in (("pause", True), ("", True), ("unpause", False)):
        reply = replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, pause=pause))
        assert codec.decode(Intent, reply.intent).paused is paused
        stored = replica.stored(KEYS.intent(JOB), Intent)
        assert (stored.paused, stored.nnodes_max) == (paused, 2)
    code, told = refusal(lambda: replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, pause="rest")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "pause, unpause" in told["fix"]


def test_suspending_ends_a_pause_and_what_is_suspended_cannot_be_paused(replica: Replica) -> None:
    replica.submit()
    replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, pause="pause"))
    replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="suspend"))
    assert not replica.stored(KEYS.intent(JOB), Intent).paused
    code, told = refusal(lambda: replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, pause="pause")))
    assert code is grpc.StatusCode.ABORTED
    assert told["fix"] == f"let it go on first: dtrain resume {JOB}"


def test_a_lost_answer_to_an_intent_is_resolved(replica: Replica) -> None:
    replica.submit()
    replica.etcd.lose = ["after"]
    replica.stub.SetIntent(pb.SetIntentRequest(job=JOB, wanted="cancel"))
    assert replica.stored(KEYS.intent(JOB), Intent).wanted is Wanted.CANCEL


def test_reading_returns_records_below_the_root(replica: Replica) -> None:
    revision = replica.submit().revision
    assert replica.mirror.wait_for(revision, 5)
    reply = replica.stub.Read(pb.ReadRequest(prefix="jobs/"))
    assert [item.key for item in reply.items] == ["jobs/train/intent", "jobs/train/spec"]
    assert reply.revision >= revision
    assert 0 <= reply.age_s < 60


def rows_of(replica: Replica, kind: str, row: type) -> list[Any]:
    return [codec.decode(row, one) for one in replica.stub.List(pb.ListRequest(kind=kind)).rows]


def test_a_list_has_one_row_for_each_job_that_follows_its_records(replica: Replica) -> None:
    for name in ("b", "a", "ab"):
        replica.submit(f"q-{name}", name=name)
    uid = replica.stored(KEYS.spec(JobName("a")), JobSpec).uid
    for seq in range(3):
        # More keys below one job than others have must not hide those.
        replica.put(KEYS.pin(JobName("a"), Seq(seq), "me"), Pin(Seq(seq), "me", 0, "why"))
    replica.put(KEYS.status(JobName("a")), status(uid, JobPhase.RUNNING, attempt=1, step=3))
    found = rows_of(replica, "jobs", JobRow)
    assert [(row.name, row.phase, row.step) for row in found] == [
        ("a", "RUNNING", 3),
        ("ab", "QUEUED", 0),
        ("b", "QUEUED", 0),
    ]
    replica.put(KEYS.status(JobName("a")), status(uid, JobPhase.RUNNING, attempt=1, step=4))
    replica.put(
        KEYS.worker(AgentName("a1"), JobName("a")),
        WorkerSnapshot(
            AgentName("a1"),
            uid,
            Incarnation("i"),
            Attempt(1),
            WorkerPhase.TRAINING,
            (RankState(Rank(0), 9, WorkerPhase.TRAINING, Step(7)),),
        ),
    )
    assert (rows_of(replica, "jobs", JobRow)[0].step, rows_of(replica, "jobs", JobRow)[0].ranks) == (7, 1)
    own = KEYS.job(JobName("a"))
    gone = [Delete(kv.key) for kv in replica.etcd.range(own, prefix_end(own)).items]
    revision = replica.etcd.txn(Txn(success=tuple(gone))).revision
    assert replica.mirror.wait_for(revision, 5)
    assert [row.name for row in rows_of(replica, "jobs", JobRow)] == ["ab", "b"]


def test_a_list_of_agents_has_the_cordoned_ones_that_are_away(replica: Replica) -> None:
    replica.put(KEYS.node(AgentName("a1")), NodeRecord(AgentName("a1"), Incarnation("i"), "h:1", "h", 4))
    replica.put(KEYS.cordon(AgentName("a0")), Cordon(AgentName("a0"), "broken", "ops"))
    found = rows_of(replica, "agents", AgentRow)
    assert [(row.name, row.status, row.slots) for row in found] == [("a0", "Lost", 0), ("a1", "Ready", 4)]


def test_a_record_that_cannot_be_read_does_not_take_the_list_away(replica: Replica) -> None:
    replica.submit()
    revision = replica.etcd.txn(Txn(success=(Put(KEYS.status(JOB), b'{"v":99}'),))).revision
    assert replica.mirror.wait_for(revision, 5)
    assert [row.name for row in rows_of(replica, "jobs", JobRow)] == [JOB]


def test_there_is_no_list_of_anything_else(replica: Replica) -> None:
    code, _ = refusal(lambda: replica.stub.List(pb.ListRequest(kind="pods")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_read_waits_for_a_change_below_its_prefix(replica: Replica) -> None:
    revision = replica.submit().revision
    assert replica.mirror.wait_for(revision, 5)
    waiting = replica.stub.Read.future(
        pb.ReadRequest(prefix=f"jobs/{JOB}/", after_revision=revision, wait_ms=20_000)
    )
    while replica.waiting._value == THREADS_WAITING:
        time.sleep(0.005)
    # A change elsewhere is not what it waits for.
    replica.put(KEYS.node(AgentName("a1")), NodeRecord(AgentName("a1"), Incarnation("i"), "h:1", "h", 1))
    with pytest.raises(grpc.FutureTimeoutError):
        waiting.result(timeout=0.3)
    replica.etcd.txn(Txn(success=(Delete(KEYS.intent(JOB)),)))
    reply = waiting.result(timeout=5)
    assert [item.key for item in reply.items] == ["jobs/train/spec"]


def test_a_wait_ends_with_its_time(replica: Replica) -> None:
    revision = replica.submit().revision
    assert replica.mirror.wait_for(revision, 5)
    began = time.monotonic()
    reply = replica.stub.Read(pb.ReadRequest(prefix="jobs/", after_revision=revision, wait_ms=200))
    assert 0.15 < time.monotonic() - began < 3
    assert len(reply.items) == 2


def test_many_waiting_readers_leave_room_for_others(replica: Replica) -> None:
    revision = replica.submit().revision
    assert replica.mirror.wait_for(revision, 5)
    request = pb.ReadRequest(prefix="jobs/none/", after_revision=revision, wait_ms=20_000)
    waiting = [replica.stub.Read.future(request) for _ in range(120)]
    assert replica.stub.Info(pb.InfoRequest(), timeout=5).replica == "r1"
    for call in waiting:
        call.cancel()


def consult(replica: Replica, uid: str = "u1", attempt: int = 3, agent: str = "a1") -> pb.JobStanding:
    part = pb.JobPart(job="train", uid=uid, attempt=attempt)
    reply = replica.stub.Consult(pb.ConsultRequest(agent=agent, jobs=[part]))
    assert 0 <= reply.etcd_age_s < 60
    (standing,) = reply.jobs
    return standing  # type: ignore[no-any-return]


def test_an_agent_without_etcd_hears_what_became_of_its_job(replica: Replica) -> None:
    spec = JobSpec(JobName("train"), Uid("u1"), Entry(EntryKind.SCRIPT, "t.py"))
    replica.put(KEYS.spec(JobName("train")), spec)
    members = (Member(AgentName("a1"), 0, Rank(0), 1),)
    replica.put(
        KEYS.status(JobName("train")),
        status("u1", JobPhase.RUNNING, attempt=Attempt(3), members=members),
    )
    found = consult(replica)
    assert (found.job, found.current, found.attempt, found.member) == ("train", True, 3, True)
    assert not consult(replica, agent="a2").member
    assert not consult(replica, uid="u0").current
    replica.put(KEYS.status(JobName("train")), status("u1", JobPhase.CANCELLED, attempt=Attempt(3)))
    assert not consult(replica).current
    replica.put(KEYS.status(JobName("train")), status("u1", JobPhase.RUNNING, attempt=Attempt(3)))
    replica.put(KEYS.spec(JobName("train")), replace(spec, uid=Uid("u2")))
    assert not consult(replica).current


def test_of_a_job_that_is_not_known_nothing_is_said(replica: Replica) -> None:
    found = consult(replica)
    assert (found.current, found.attempt, found.member) == (False, 0, False)


def test_an_agent_cannot_ask_about_the_whole_world(replica: Replica) -> None:
    parts = [pb.JobPart(job="train", uid="u1")] * 2000
    code, told = refusal(lambda: replica.stub.Consult(pb.ConsultRequest(agent="a1", jobs=parts)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "1024 jobs at most" in told["message"]
    with pytest.raises(grpc.RpcError):
        replica.stub.Consult(pb.ConsultRequest(agent="../a1"))


def test_info_names_the_leader(replica: Replica) -> None:
    term = replica.put(KEYS.leader, LeaderRecord(ReplicaId("r2"), "h:2", "n"))
    reply = replica.stub.Info(pb.InfoRequest())
    assert (reply.leader, reply.term, reply.leader_replica, reply.leader_address) == (
        False,
        term,
        "r2",
        "h:2",
    )
    replica.term = Term(term)
    assert replica.stub.Info(pb.InfoRequest()).leader


class LogAgent(agent_pb2_grpc.AgentServicer):
    """Has the logs of the attempts it is given."""

    def __init__(self, name: str, attempts: dict[int, bytes]) -> None:
        self.name = AgentName(name)
        self.attempts = attempts
        self.asked = 0
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        agent_pb2_grpc.add_AgentServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def ReadLog(self, request: agent_pb.ReadLogRequest, context: Any) -> agent_pb.LogChunk:  # noqa: N802
        self.asked += 1
        if request.attempt not in self.attempts:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such log")
        data = self.attempts[request.attempt][request.offset :]
        return agent_pb.LogChunk(
            data=data, next_offset=request.offset + len(data), attempt=request.attempt, eof=True
        )

    def Stacks(self, request: agent_pb.StacksRequest, context: Any) -> agent_pb.StacksReply:  # noqa: N802
        rank = agent_pb.StacksReply.RankStacks(rank=0, kind="code", where="f (x.py:1)", text="x" * 4000)
        return agent_pb.StacksReply(ranks=[rank])


def test_stacks_of_a_large_job_are_cut_and_who_was_not_asked_is_told(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "AGENTS_ASKED_MAX", 2)
    monkeypatch.setattr(stacks, "STACKS_BYTES_MAX", 3000)
    agent = LogAgent("a1", {})
    try:
        spec = codec.decode(JobSpec, replica.submit().spec)
        replica.put(KEYS.node(agent.name), NodeRecord(agent.name, Incarnation("i"), agent.address, "h", 1))
        members = tuple(Member(AgentName(f"a{n + 1}"), n, Rank(n), 1) for n in range(3))
        replica.put(KEYS.status(JOB), status(spec.uid, JobPhase.RUNNING, attempt=Attempt(1), members=members))
        found = replica.stub.Stacks(pb.JobStacksRequest(job=JOB))
        assert [(one.rank, one.agent, len(one.text)) for one in found.ranks] == [(0, "a1", 1000)]
        assert list(found.problems) == ["agent a2 has no session", "1 more agents were not asked"]
    finally:
        agent.server.stop(0).wait()


def test_logs_come_from_the_agent_that_has_them(replica: Replica) -> None:
    agents = [LogAgent("a1", {2: b"new"}), LogAgent("a2", {1: b"old"})]
    try:
        spec = codec.decode(JobSpec, replica.submit().spec)
        for agent in agents:
            node = NodeRecord(agent.name, Incarnation("i"), agent.address, "h", 1)
            replica.put(KEYS.node(agent.name), node)
        member = Member(AgentName("a1"), 0, Rank(0), 1)
        replica.put(
            KEYS.status(JOB), status(spec.uid, JobPhase.RUNNING, attempt=Attempt(2), members=(member,))
        )
        now = replica.stub.ReadLog(pb.JobLogRequest(job=JOB, rank=0))
        assert (now.data, now.agent, now.attempt, now.eof) == (b"new", "a1", 2, True)
        assert agents[1].asked == 0
        for offset, said in ((0, b"old"), (1, b"ld")):
            old = replica.stub.ReadLog(pb.JobLogRequest(job=JOB, rank=0, attempt=1, offset=offset))
            assert (old.data, old.agent) == (said, "a2")
        assert agents[0].asked == 2, "the place is remembered"
        for request in (pb.JobLogRequest(job=JOB, rank=5), pb.JobLogRequest(job=JOB, rank=5, attempt=7)):
            assert refusal(lambda request=request: replica.stub.ReadLog(request))[0] is (
                grpc.StatusCode.NOT_FOUND
            )
    finally:
        for agent in agents:
            agent.server.stop(0).wait()


def test_logs_of_a_failed_job_are_found_although_it_has_no_members(replica: Replica) -> None:
    agents = [LogAgent("a1", {}), LogAgent("a2", {1: b"why"})]
    try:
        spec = codec.decode(JobSpec, replica.submit().spec)
        for agent in agents:
            replica.put(
                KEYS.node(agent.name), NodeRecord(agent.name, Incarnation("i"), agent.address, "h", 1)
            )
        replica.put(KEYS.status(JOB), status(spec.uid, JobPhase.FAILED, attempt=Attempt(1)))
        found = replica.stub.ReadLog(pb.JobLogRequest(job=JOB, rank=0))
        assert (found.data, found.agent) == (b"why", "a2")
    finally:
        for agent in agents:
            agent.server.stop(0).wait()


def test_an_agent_that_is_gone_is_unavailable_not_a_hang(replica: Replica) -> None:
    agent = LogAgent("a1", {})
    agent.server.stop(0).wait()
    spec = codec.decode(JobSpec, replica.submit().spec)
    replica.put(KEYS.node(agent.name), NodeRecord(agent.name, Incarnation("i"), agent.address, "h", 1))
    member = Member(agent.name, 0, Rank(0), 1)
    replica.put(KEYS.status(JOB), status(spec.uid, JobPhase.RUNNING, attempt=Attempt(1), members=(member,)))
    code, told = refusal(lambda: replica.stub.ReadLog(pb.JobLogRequest(job=JOB, rank=0)))
    assert (code, told["code"]) == (grpc.StatusCode.UNAVAILABLE, ErrorCode.AGENT_UNAVAILABLE)


def test_a_port_in_use_is_refused_with_a_fix(replica: Replica) -> None:
    with pytest.raises(Refused) as caught:
        Server(replica.server.address)
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert "--listen" in caught.value.fix


def test_a_machine_is_cordoned_for_a_while_and_let_go_again(replica: Replica) -> None:
    replica.put(KEYS.node(AgentName("a1")), NodeRecord(AgentName("a1"), Incarnation("i"), "h:1", "h", 1))
    replica.put(KEYS.suspicion(AgentName("a1")), Suspicion(Term(1), AgentName("a1")))
    request = pb.CordonRequest(agent="a1", reason="new disk", by="ada", ttl_s=60, drain=True)
    reply = replica.stub.Cordon(request)
    stored = replica.stored(KEYS.cordon(AgentName("a1")), Cordon)
    assert stored == codec.decode(Cordon, reply.record)
    assert (stored.reason, stored.by, stored.drain, stored.auto) == ("new disk", "ada", True, False)
    assert stored.until
    assert replica.etcd.range(KEYS.cordon(AgentName("a1"))).items[0].lease
    assert replica.stub.Uncordon(pb.UncordonRequest(agent="a1")).removed
    assert not replica.etcd.range(KEYS.cordon(AgentName("a1"))).items
    assert not replica.etcd.range(KEYS.suspicion(AgentName("a1"))).items
    assert not replica.stub.Uncordon(pb.UncordonRequest(agent="a1")).removed


def test_a_cordon_without_an_end_stays(replica: Replica) -> None:
    replica.put(KEYS.node(AgentName("a1")), NodeRecord(AgentName("a1"), Incarnation("i"), "h:1", "h", 1))
    replica.etcd.lose = ["after"]
    replica.stub.Cordon(pb.CordonRequest(agent="a1"))
    (kv,) = replica.etcd.range(KEYS.cordon(AgentName("a1"))).items
    assert kv.lease == 0
    assert codec.decode(Cordon, kv.value).until == ""


def test_an_unknown_machine_is_not_cordoned(replica: Replica) -> None:
    replica.put(
        KEYS.node(AgentName("gpu-02")), NodeRecord(AgentName("gpu-02"), Incarnation("i"), "h:1", "h", 1)
    )
    for call in (
        lambda: replica.stub.Cordon(pb.CordonRequest(agent="gpu-2")),
        lambda: replica.stub.Uncordon(pb.UncordonRequest(agent="gpu-2")),
    ):
        code, told = refusal(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert told["fix"] == "did you mean gpu-02?"
    code, told = refusal(lambda: replica.stub.Cordon(pb.CordonRequest(agent="gpu-02", ttl_s=1)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"action": "fail", "reasons": ["nonsense"]}, "failure_rules[1].reasons"),
        ({"action": "fail", "message": "(a+)+"}, "failure_rules[1].message"),
        ({"action": "rollback", "back": 0}, "failure_rules[1].back"),
        ({"action": "fail", "cordon_s": 1e9}, "failure_rules[1].cordon"),
    ],
)
def test_a_rule_that_no_job_file_could_hold_is_refused(
    replica: Replica, rule: dict[str, Any], field: str
) -> None:
    code, told = refusal(lambda: replica.submit(failure_rules=[rule]))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told["message"].startswith(field)
