"""The Coordinator service: what clients ask of any replica."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from dtrain.coordinator.api import asking
from dtrain.coordinator.api.checkpoints import CheckpointDesk
from dtrain.coordinator.api.cordons import Cordons
from dtrain.coordinator.api.errors import translated
from dtrain.coordinator.api.history import History
from dtrain.coordinator.api.listing import Listing
from dtrain.coordinator.api.logs import LogDesk
from dtrain.coordinator.api.records import Operators
from dtrain.coordinator.api.series import Curves
from dtrain.coordinator.dispatch import Channels
from dtrain.coordinator.work import Stores
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Order, OrderKind, Pin
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import (
    AgentName,
    ClusterName,
    JobName,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
    parse_name,
)
from dtrain.protocol.job import TERMINAL_PHASES, JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as agent_pb
from dtrain.protocol.pb import agent_pb2_grpc, coordinator_pb2_grpc
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.rows import AgentRow, JobRow
from dtrain.protocol.snapshot import DurablePart, NodeRecord
from dtrain.runtime import grpc_tls, log, redact
from dtrain.runtime.tls import Role
from dtrain.storage.blobs.probe import SOON_S, probe_soon
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")

WAIT_S_MAX = 30.0
PREFIX_CHARACTERS_MAX = 256
REPLY_BYTES_MAX = 64 * 1024 * 1024
"""Of one answer; only ``Read`` may come near it: 30,000 snapshots of 2 KiB."""
READ_BYTES_MAX = REPLY_BYTES_MAX - 1024 * 1024
ITEM_BYTES = 64
"""What a record takes in an answer beyond its key and value."""
STACKS_DEADLINE_S = 10.0
STACKS_BYTES_MAX = 16 * 1024 * 1024
"""Of all ranks together; the whole is in their log folders."""
AGENTS_ASKED_MAX = 256
JOBS_CONSULTED_MAX = 1024
FIRST_LIST_S = 5.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers."""

    cluster: ClusterName
    replica: ReplicaId
    version: str


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServicer):
    """Answers clients. ``waiting`` bounds calls that wait: others must find a free thread."""

    def __init__(
        self,
        identity: Identity,
        mirror: Mirror,
        operators: Operators,
        channels: Channels,
        stores: Stores,
        *,
        checkpoints: CheckpointDesk,
        cordons: Cordons,
        term: Callable[[], Term | None],
        waiting: threading.BoundedSemaphore,
        history: History | None = None,
        default_store: str = "",
        problems: Callable[[], Iterable[str]] = tuple,
        etcd_version: Callable[[], str] = str,
    ) -> None:
        self._identity = identity
        self._mirror = mirror
        self._operators = operators
        self._channels = channels
        self._stores = stores
        self._checkpoints = checkpoints
        self._cordons = cordons
        self._term = term
        self._waiting = waiting
        self._default_store = default_store
        self._problems = problems
        self._etcd_version = etcd_version
        self._keys = Keys(identity.cluster)
        self._listing = Listing(mirror, identity.cluster)
        self._history = history or History(self._keys.root)
        self._logs = LogDesk(
            identity.cluster, mirror, channels, stores, waiting=waiting, default_store=default_store
        )
        self._curves = Curves(channels, self._addresses, self._logs.archived)
        self._log = log.get("api")

    # Operators' records.

    @translated
    def Submit(  # noqa: N802
        self,
        request: pb.SubmitRequest,
        context: grpc.ServicerContext,
    ) -> pb.SubmitReply:
        spec = self._operators.prepare(request.spec, request.request_id)
        warnings = self._warnings(spec)
        store = spec.checkpoint.store or self._default_store
        if store:
            # One that refuses would refuse every checkpoint; one that is away may be back when it is needed.
            why = probe_soon(self._stores.get(store), limit_s=_patience_s(context))
            if why:
                warnings.append(f"{why}: the job waits until its store can be used")
        if request.dry_run:
            return pb.SubmitReply(spec=codec.encode(spec), created=False, warnings=warnings)
        done = self._operators.submit(spec)
        self._log.info("job submitted", job=done.spec.name, uid=done.spec.uid, created=done.created)
        return pb.SubmitReply(
            spec=codec.encode(done.spec), created=done.created, revision=done.revision, warnings=warnings
        )

    @translated
    def SetIntent(  # noqa: N802
        self, request: pb.SetIntentRequest, context: grpc.ServicerContext
    ) -> pb.SetIntentReply:
        by = _who(request.by, context)
        intent, revision = self._operators.set_intent(
            request.job,
            request.wanted,
            request.checkpoint_token,
            by,
            self._job_names(),
            nnodes=(request.nnodes_min, request.nnodes_max),
            pause=request.pause,
        )
        return pb.SetIntentReply(intent=codec.encode(intent), revision=revision)

    # Reading.

    @translated
    def Read(  # noqa: N802
        self, request: pb.ReadRequest, context: grpc.ServicerContext
    ) -> pb.ReadReply:
        if len(request.prefix) > PREFIX_CHARACTERS_MAX or not request.prefix.isascii():
            raise Refused(ErrorCode.USAGE, "a prefix is short and ASCII", fix='use one such as "jobs/"')
        root = self._keys.root
        peer = grpc_tls.caller(context)
        self._wait_for_first_list()
        if request.after_revision and request.wait_ms:
            self._wait_for_change(root + request.prefix, request.after_revision, request.wait_ms, context)
        revision, items = self._mirror.snapshot(root + request.prefix)
        _check_size(items, request.prefix)
        return pb.ReadReply(
            items=[
                pb.Item(
                    key=kv.key[len(root) :],
                    value=kv.value
                    if peer is None or peer.role in _SEE_ALL
                    else _without_secrets(kv.key, kv.value),
                    create_revision=kv.create_revision,
                    mod_revision=kv.mod_revision,
                )
                for kv in items
            ],
            revision=revision,
            age_s=self._mirror.age_s(),
        )

    @translated
    def List(  # noqa: N802
        self, request: pb.ListRequest, context: grpc.ServicerContext
    ) -> pb.ListReply:
        lists: dict[str, Callable[[], Sequence[JobRow | AgentRow]]] = {
            "jobs": lambda: self._listing.jobs(time.time()),
            "agents": self._listing.agents,
        }
        if request.kind not in lists:
            raise Refused(ErrorCode.USAGE, f"there is no list of {request.kind[:40]!r}")
        self._wait_for_first_list()
        if request.after_revision and request.wait_ms:
            prefix = f"{self._keys.root}{request.kind}/"
            self._wait_for_change(prefix, request.after_revision, request.wait_ms, context)
        # The revision first: rows may be newer than it says, never older.
        revision, age_s = self._mirror.revision, self._mirror.age_s()
        rows = [codec.encode(row) for row in lists[request.kind]()]
        return pb.ListReply(rows=rows, revision=revision, age_s=age_s)

    @translated
    def Changes(  # noqa: N802
        self, request: pb.ChangesRequest, context: grpc.ServicerContext
    ) -> pb.ChangesReply:
        if any(len(prefix) > PREFIX_CHARACTERS_MAX for prefix in request.prefixes):
            raise Refused(ErrorCode.USAGE, "a prefix is short", fix='use one such as "jobs/"')
        self._wait_for_first_list()
        found = self._history.since(request.prefixes, request.after_revision)
        if not found.changes and not found.lost and request.wait_ms and self._waiting.acquire(blocking=False):
            try:
                timeout_s = min(request.wait_ms / 1000, WAIT_S_MAX)
                found = self._history.wait(
                    request.prefixes, request.after_revision, timeout_s, context.is_active
                )
            finally:
                self._waiting.release()
        root, peer = len(self._keys.root), grpc_tls.caller(context)
        sees_all = peer is None or peer.role in _SEE_ALL
        return pb.ChangesReply(
            changes=[
                pb.Changed(
                    key=change.key[root:],
                    revision=change.revision,
                    deleted=kv is None,
                    value=b"" if kv is None else kv.value if sees_all else _without_secrets(kv.key, kv.value),
                    create_revision=0 if kv is None else kv.create_revision,
                )
                for change in found.changes
                for kv in (change.after,)
            ],
            revision=found.revision,
            age_s=self._mirror.age_s(),
            lost=found.lost,
        )

    @translated
    def Info(  # noqa: N802
        self,
        request: pb.InfoRequest,  # noqa: ARG002 - grpc's signature
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.InfoReply:
        leader = self._mirror.get(self._keys.leader)
        try:
            known = codec.decode(LeaderRecord, leader.value) if leader is not None else None
        except DtrainError:
            known = None
        term = self._term()
        return pb.InfoReply(
            cluster=self._identity.cluster,
            replica=self._identity.replica,
            version=self._identity.version,
            leader=term is not None,
            term=term or (leader.create_revision if leader is not None else 0),
            revision=self._mirror.revision,
            mirror_age_s=self._mirror.age_s(),
            leader_replica=known.replica if known is not None else "",
            leader_address=known.address if known is not None else "",
            problems=self._problems(),
            etcd_version=self._etcd_version(),
            store=self._default_store,
        )

    @translated
    def Consult(  # noqa: N802
        self,
        request: pb.ConsultRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.ConsultReply:
        """Answer from the mirror, however old it is: the agent judges by its age."""
        if len(request.jobs) > JOBS_CONSULTED_MAX:
            raise Refused(ErrorCode.USAGE, f"an agent asks about {JOBS_CONSULTED_MAX} jobs at most")
        # Before the records: they may be newer than it says, never older.
        age_s = self._mirror.age_s()
        agent = AgentName(parse_name(request.agent, "agent"))
        return pb.ConsultReply(
            etcd_age_s=age_s if math.isfinite(age_s) else -1.0,
            jobs=[self._standing(agent, part) for part in request.jobs],
        )

    def _standing(self, agent: AgentName, part: pb.JobPart) -> pb.JobStanding:
        job = JobName(parse_name(part.job, "job"))
        try:
            spec = self._record(self._keys.spec(job), JobSpec)
            status = self._record(self._keys.status(job), JobStatus)
        except DtrainError:
            spec = status = None  # of a newer version, perhaps: nothing can be said about it
        if spec is None or status is None:
            return pb.JobStanding(job=job)
        return pb.JobStanding(
            job=job,
            current=spec.uid == status.uid == part.uid and status.phase not in TERMINAL_PHASES,
            attempt=status.attempt,
            member=any(member.agent == agent for member in status.members),
        )

    # Checkpoints.

    @translated
    def PinCheckpoint(  # noqa: N802
        self, request: pb.PinCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.PinCheckpointReply:
        by = _who(request.by, context)
        pin = Pin(Seq(request.seq), request.holder, request.ttl_s, request.why, by)
        done = self._checkpoints.pin(request.job, request.seq, pin, request.lease)
        return pb.PinCheckpointReply(
            record=codec.encode(done.record), store=done.store, lease=done.lease, revision=done.revision
        )

    @translated
    def UnpinCheckpoint(  # noqa: N802
        self,
        request: pb.UnpinCheckpointRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.UnpinCheckpointReply:
        removed, revision = self._checkpoints.unpin(request.job, request.seq, request.holder, request.lease)
        return pb.UnpinCheckpointReply(removed=removed, revision=revision)

    @translated
    def DeleteCheckpoint(  # noqa: N802
        self, request: pb.DeleteCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        by = _who(request.by, context)
        order, revision = self._checkpoints.delete(request.job, request.seq, request.request_id, by)
        self._log.info("deletion asked for", job=request.job, seq=request.seq, by=by)
        return pb.OrderReply(order=order, revision=revision)

    @translated
    def ReportDamage(  # noqa: N802
        self, request: pb.ReportDamageRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        by = _who(request.by, context)
        order, revision = self._checkpoints.report(
            request.job, request.seq, request.blob, request.chunk, request_id=request.request_id, by=by
        )
        self._log.warning("damage reported", job=request.job, seq=request.seq, blob=request.blob, by=by)
        return pb.OrderReply(order=order, revision=revision)

    @translated
    def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        by = _who(request.by, context)
        order, revision = self._checkpoints.collect(request.job, request.request_id, by)
        return pb.OrderReply(order=order, revision=revision)

    @translated
    def ImportCheckpoint(  # noqa: N802
        self, request: pb.ImportCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.ImportCheckpointReply:
        by = _who(request.by, context)
        if request.withdraw:
            done = self._checkpoints.withdraw_import(request.job, request.request_id)
        else:
            part = codec.decode(DurablePart, request.part) if request.part else None
            order = Order(
                Uid(""),
                OrderKind.IMPORT,
                by=by,
                step=Step(request.step),
                timeout_s=request.timeout_s,
                part=part,
            )
            done = self._checkpoints.import_(
                request.job, request.request_id, order, ttl_s=request.ttl_s, lease=request.lease
            )
        return pb.ImportCheckpointReply(
            order=done.order, lease=done.lease, revision=done.revision, answered=done.answered
        )

    @translated
    def ReviewGarbage(  # noqa: N802
        self,
        request: pb.ReviewGarbageRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.ReviewGarbageReply:
        review = self._checkpoints.review(request.job)
        return pb.ReviewGarbageReply(
            items=[
                pb.GarbageItem(
                    kind=item.kind,
                    seq=item.seq,
                    what=item.what,
                    deleted=item.deleted,
                    why=item.why,
                    bytes=item.bytes,
                )
                for item in review.items
            ],
            revision=review.revision,
            problem=review.problem,
        )

    # Cordons.

    @translated
    def Cordon(  # noqa: N802
        self, request: pb.CordonRequest, context: grpc.ServicerContext
    ) -> pb.CordonReply:
        record, revision = self._cordons.put(
            request.agent,
            request.reason,
            by=_who(request.by, context),
            ttl_s=request.ttl_s,
            drain=request.drain,
        )
        self._log.info("cordoned", agent=record.agent, by=record.by, until=record.until, drain=record.drain)
        return pb.CordonReply(record=codec.encode(record), revision=revision)

    @translated
    def Uncordon(  # noqa: N802
        self,
        request: pb.UncordonRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.UncordonReply:
        removed, revision = self._cordons.remove(request.agent)
        self._log.info("uncordoned", agent=request.agent, removed=removed)
        return pb.UncordonReply(removed=removed, revision=revision)

    # Logs.

    @translated
    def ReadLog(  # noqa: N802
        self, request: pb.JobLogRequest, context: grpc.ServicerContext
    ) -> pb.JobLogChunk:
        self._wait_for_first_list()
        return self._logs.read(request, context)

    @translated
    def ListLogs(  # noqa: N802
        self,
        request: pb.ListLogsRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.ListLogsReply:
        self._wait_for_first_list()
        return self._logs.sources(request)

    @translated
    def ReadArchive(  # noqa: N802
        self,
        request: pb.ReadArchiveRequest,
        context: grpc.ServicerContext,
    ) -> pb.ReadArchiveReply:
        self._wait_for_first_list()
        peer = grpc_tls.caller(context)
        reply = self._logs.archive(request)
        if peer is not None and peer.role not in _SEE_ALL:
            for item in reply.items:
                item.value = _without_secrets(item.key, item.value)
        return reply

    # Stacks.

    @translated
    def Stacks(  # noqa: N802
        self, request: pb.JobStacksRequest, context: grpc.ServicerContext
    ) -> pb.JobStacksReply:
        self._wait_for_first_list()
        spec, status = self._job(request.job)
        job = spec.name
        if status is None or not status.members:
            raise NotFound(ErrorCode.NOT_FOUND, f"no rank of job {job} runs now")
        asked = agent_pb.StacksRequest(job=job, uid=spec.uid)
        calls, problems = [], []
        for member in status.members[:AGENTS_ASKED_MAX]:
            node = self._record(self._keys.node(member.agent), NodeRecord)
            if node is None:
                problems.append(f"agent {member.agent} has no session")
                continue
            stub = agent_pb2_grpc.AgentStub(self._channels.get(member.agent, node.address))  # type: ignore[no-untyped-call]
            calls.append((member.agent, stub.Stacks.future(asked, timeout=STACKS_DEADLINE_S)))
        if (left := len(status.members) - AGENTS_ASKED_MAX) > 0:
            problems.append(f"{left} more agents were not asked")
        context.add_callback(lambda: asking.cancel(calls))
        found = []
        room = STACKS_BYTES_MAX // max(1, status.world_size)
        for agent, call in calls:
            try:
                found += [_rank_stacks(agent, one, room) for one in call.result().ranks]
            except grpc.FutureCancelledError as error:
                raise Unavailable(ErrorCode.AGENT_UNAVAILABLE, "the call was given up") from error
            except grpc.RpcError as error:
                problems.append(f"agent {agent} did not answer: {error.details() or error.code().name}")
        self._log.info("stacks collected", job=job, ranks=len(found), problems=len(problems))
        return pb.JobStacksReply(ranks=sorted(found, key=lambda one: one.rank), problems=problems)

    # Series.

    @translated
    def Series(  # noqa: N802
        self, request: pb.JobSeriesRequest, context: grpc.ServicerContext
    ) -> pb.JobSeriesReply:
        self._wait_for_first_list()
        spec, status = self._job(request.job)
        if status is None or not status.attempt:
            return pb.JobSeriesReply()
        return self._curves.read(spec, status, request.points_max, context)

    # Leaves.

    def _job(self, name: str) -> tuple[JobSpec, JobStatus | None]:
        """A job as this replica's mirror has it; None: no leader has looked at this submission yet."""
        job = JobName(parse_name(name, "job"))
        spec = self._record(self._keys.spec(job), JobSpec)
        if spec is None:
            raise NotFound(ErrorCode.NOT_FOUND, f"there is no job {job}", fix="list jobs: dtrain get jobs")
        status = self._record(self._keys.status(job), JobStatus)
        return spec, status if status is not None and status.uid == spec.uid else None

    def _addresses(self) -> dict[AgentName, str]:
        found = {}
        for kv in self._mirror.prefix(self._keys.agents):
            parsed = self._keys.parse(kv.key)
            if parsed is not None and parsed.kind == "node":
                with contextlib.suppress(DtrainError):
                    found[parsed.agent] = codec.decode(NodeRecord, kv.value).address
        return found

    def _wait_for_first_list(self) -> None:
        if not self._mirror.revision and not self._mirror.wait_for(1, FIRST_LIST_S):
            raise Unavailable(
                ErrorCode.MIRROR_STALE,
                "this replica has not read etcd yet",
                fix="ask another replica, or see whether etcd is up",
            )

    def _wait_for_change(
        self, prefix: str, after_revision: int, wait_ms: int, context: grpc.ServicerContext
    ) -> None:
        """Wait until something under ``prefix`` has changed; at once if that is unclear."""
        end = time.monotonic() + min(wait_ms / 1000, WAIT_S_MAX)
        seen = self._mirror.revision
        if seen > after_revision or not self._waiting.acquire(blocking=False):
            return
        try:
            before = _fingerprint(self._mirror.prefix(prefix))
            while context.is_active() and (left_s := end - time.monotonic()) > 0:
                if not self._mirror.wait_for(seen + 1, min(left_s, 1.0)):
                    continue
                seen = self._mirror.revision
                if _fingerprint(self._mirror.prefix(prefix)) != before:
                    return
        finally:
            self._waiting.release()

    def _record(self, key: str, kind: type[T]) -> T | None:
        kv = self._mirror.get(key)
        return None if kv is None else codec.decode(kind, kv.value)

    def _job_names(self) -> list[str]:
        found = []
        for kv in self._mirror.prefix(self._keys.jobs):
            parsed = self._keys.parse(kv.key)
            if parsed is not None and parsed.kind == "spec":
                found.append(parsed.job)
        return list(found)

    def _warnings(self, spec: JobSpec) -> list[str]:
        fit = 0
        alive = 0
        slots = max(1, spec.nproc_per_node)
        for kv in self._mirror.prefix(self._keys.agents):
            parsed = self._keys.parse(kv.key)
            if parsed is None or parsed.kind != "node":
                continue
            try:
                node = codec.decode(NodeRecord, kv.value)
            except DtrainError:
                continue
            alive += 1
            fit += node.slots >= slots
        if fit >= spec.nnodes_min:
            return []
        if alive >= spec.nnodes_min:
            return [
                f"{fit} of {alive} agents have {slots} slots, {spec.nnodes_min} are needed: "
                "the job waits for more"
            ]
        return [f"{alive} agents are alive, {spec.nnodes_min} are needed: the job waits for more"]


def _patience_s(context: grpc.ServicerContext) -> float:
    """How long a store may stay silent, so that the caller still hears what became of its call."""
    left_s = context.time_remaining()
    return SOON_S if left_s is None else min(SOON_S, max(0.1, left_s - 1.0))


def _who(said: str, context: grpc.ServicerContext) -> str:
    """Who calls: what its certificate says, if it has one, proves more than what it says of itself."""
    peer = grpc_tls.caller(context)
    if peer is not None and peer.role is Role.COORDINATOR:
        # It speaks for somebody at its dashboard, and says so.
        return f"{peer.name}: {said}" if said else peer.name
    return said if peer is None else peer.name


_SEE_ALL = frozenset({Role.OPERATOR, Role.COORDINATOR})


def _without_secrets(key: str, value: bytes) -> bytes:
    """A record as those may see it who only look: a job's environment often holds secrets."""
    if not key.endswith("/spec"):
        return value
    try:
        document = codec.loads(value)
        env = document.get("env", {})
        return codec.dumps({**document, "env": dict.fromkeys(env, redact.HIDDEN)}) if env else value
    except (DtrainError, AttributeError, TypeError):
        return b"{}"


def _check_size(items: list[KeyValue], prefix: str) -> None:
    size = sum(len(kv.key) + len(kv.value) + ITEM_BYTES for kv in items)
    if size > READ_BYTES_MAX:
        raise Refused(
            ErrorCode.USAGE,
            f"the {len(items)} records under {prefix!r} take {size // 2**20} MiB, more than one answer may",
            fix='ask for less, such as "jobs/NAME/" or "agents/NAME/"',
        )


def _fingerprint(items: list[KeyValue]) -> tuple[int, int]:
    return len(items), max((kv.mod_revision for kv in items), default=0)


def _rank_stacks(
    agent: AgentName, one: agent_pb.StacksReply.RankStacks, room: int
) -> pb.JobStacksReply.RankStacks:
    return pb.JobStacksReply.RankStacks(
        rank=one.rank, agent=agent, kind=one.kind, where=one.where, text=one.text[:room]
    )
