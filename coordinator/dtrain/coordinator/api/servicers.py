"""The Coordinator service: what clients ask of any replica."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc

from dtrain.coordinator.api import consulting
from dtrain.coordinator.api.callers import sees_all, who, without_secrets
from dtrain.coordinator.api.checkpoints import CheckpointDesk
from dtrain.coordinator.api.cordons import Cordons
from dtrain.coordinator.api.errors import translated
from dtrain.coordinator.api.history import History
from dtrain.coordinator.api.listing import Listing
from dtrain.coordinator.api.logs import LogDesk
from dtrain.coordinator.api.lookup import WAIT_S_MAX, Lookup, check_size
from dtrain.coordinator.api.records import Operators
from dtrain.coordinator.api.series import Curves
from dtrain.coordinator.api.stacks import StackDesk
from dtrain.coordinator.dispatch import Channels
from dtrain.coordinator.work import Stores
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Order, OrderKind, Pin
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import (
    ClusterName,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb import coordinator_pb2_grpc
from dtrain.protocol.rows import AgentRow, JobRow
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime import log
from dtrain.storage.blobs.probe import SOON_S, probe_soon
from dtrain.storage.etcd.mirror import Mirror

PREFIX_CHARACTERS_MAX = 256


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
        self._lookup = Lookup(mirror, self._keys, waiting)
        self._stacks = StackDesk(channels, self._keys, self._lookup)
        self._listing = Listing(mirror, identity.cluster)
        self._history = history or History(self._keys.root)
        self._logs = LogDesk(
            identity.cluster, mirror, channels, stores, waiting=waiting, default_store=default_store
        )
        self._curves = Curves(channels, self._lookup.addresses, self._logs.archived)
        self._log = log.get("api")

    # Operators' records.

    @translated
    def Submit(  # noqa: N802
        self,
        request: pb.SubmitRequest,
        context: grpc.ServicerContext,
    ) -> pb.SubmitReply:
        spec = self._operators.prepare(request.spec, request.request_id)
        warnings = self._lookup.warnings(spec)
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
        by = who(request.by, context)
        intent, revision = self._operators.set_intent(
            request.job,
            request.wanted,
            request.checkpoint_token,
            by,
            self._lookup.job_names(),
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
        all_of_it = sees_all(context)
        self._lookup.wait_for_first_list()
        if request.after_revision and request.wait_ms:
            self._lookup.wait_for_change(
                root + request.prefix, request.after_revision, request.wait_ms, context
            )
        revision, items = self._mirror.snapshot(root + request.prefix)
        check_size(items, request.prefix)
        return pb.ReadReply(
            items=[
                pb.Item(
                    key=kv.key[len(root) :],
                    value=kv.value if all_of_it else without_secrets(kv.key, kv.value),
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
        self._lookup.wait_for_first_list()
        if request.after_revision and request.wait_ms:
            prefix = f"{self._keys.root}{request.kind}/"
            self._lookup.wait_for_change(prefix, request.after_revision, request.wait_ms, context)
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
        self._lookup.wait_for_first_list()
        found = self._history.since(request.prefixes, request.after_revision)
        if not found.changes and not found.lost and request.wait_ms and self._waiting.acquire(blocking=False):
            try:
                timeout_s = min(request.wait_ms / 1000, WAIT_S_MAX)
                found = self._history.wait(
                    request.prefixes, request.after_revision, timeout_s, context.is_active
                )
            finally:
                self._waiting.release()
        root, all_of_it = len(self._keys.root), sees_all(context)
        return pb.ChangesReply(
            changes=[
                pb.Changed(
                    key=change.key[root:],
                    revision=change.revision,
                    deleted=kv is None,
                    value=b"" if kv is None else kv.value if all_of_it else without_secrets(kv.key, kv.value),
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
        return consulting.answer(self._mirror, self._keys, request)

    # Checkpoints.

    @translated
    def PinCheckpoint(  # noqa: N802
        self, request: pb.PinCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.PinCheckpointReply:
        by = who(request.by, context)
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
        by = who(request.by, context)
        order, revision = self._checkpoints.delete(request.job, request.seq, request.request_id, by)
        self._log.info("deletion asked for", job=request.job, seq=request.seq, by=by)
        return pb.OrderReply(order=order, revision=revision)

    @translated
    def ReportDamage(  # noqa: N802
        self, request: pb.ReportDamageRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        by = who(request.by, context)
        order, revision = self._checkpoints.report(
            request.job, request.seq, request.blob, request.chunk, request_id=request.request_id, by=by
        )
        self._log.warning("damage reported", job=request.job, seq=request.seq, blob=request.blob, by=by)
        return pb.OrderReply(order=order, revision=revision)

    @translated
    def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        by = who(request.by, context)
        order, revision = self._checkpoints.collect(request.job, request.request_id, by)
        return pb.OrderReply(order=order, revision=revision)

    @translated
    def ImportCheckpoint(  # noqa: N802
        self, request: pb.ImportCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.ImportCheckpointReply:
        by = who(request.by, context)
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
            by=who(request.by, context),
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
        self._lookup.wait_for_first_list()
        return self._logs.read(request, context)

    @translated
    def ListLogs(  # noqa: N802
        self,
        request: pb.ListLogsRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.ListLogsReply:
        self._lookup.wait_for_first_list()
        return self._logs.sources(request)

    @translated
    def ReadArchive(  # noqa: N802
        self,
        request: pb.ReadArchiveRequest,
        context: grpc.ServicerContext,
    ) -> pb.ReadArchiveReply:
        self._lookup.wait_for_first_list()
        reply = self._logs.archive(request)
        if not sees_all(context):
            for item in reply.items:
                item.value = without_secrets(item.key, item.value)
        return reply

    # Stacks.

    @translated
    def Stacks(  # noqa: N802
        self, request: pb.JobStacksRequest, context: grpc.ServicerContext
    ) -> pb.JobStacksReply:
        self._lookup.wait_for_first_list()
        spec, status = self._lookup.job(request.job)
        return self._stacks.collect(spec, status, context)

    # Series.

    @translated
    def Series(  # noqa: N802
        self, request: pb.JobSeriesRequest, context: grpc.ServicerContext
    ) -> pb.JobSeriesReply:
        self._lookup.wait_for_first_list()
        spec, status = self._lookup.job(request.job)
        if status is None or not status.attempt:
            return pb.JobSeriesReply()
        return self._curves.read(spec, status, request.points_max, context)


def _patience_s(context: grpc.ServicerContext) -> float:
    """How long a store may stay silent, so that the caller still hears what became of its call."""
    left_s = context.time_remaining()
    return SOON_S if left_s is None else min(SOON_S, max(0.1, left_s - 1.0))
