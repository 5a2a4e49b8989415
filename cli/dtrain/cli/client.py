"""Calls to the coordinators: any replica will do, and every call may be repeated.

A call goes to the replica that answered last. One that is gone, frozen or cut
off is passed over for the next, within the call's own deadline; request ids
and checkpoint tokens are chosen here, so that a repeated mutation changes
nothing. The servers' errors come back as members of the error tree.
"""

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from dtrain.protocol import codec, errors
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, TimedOut, Unavailable
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb.coordinator_pb2_grpc import CoordinatorStub
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime import grpc_tls
from dtrain.runtime.tls import TlsFiles

T = TypeVar("T")

ERROR_KEY = "dtrain-error-bin"
TRY_S_MAX = 3.0
"""One replica gets this long to answer before the next is asked: it may be frozen."""

STACKS_S = 12.0
"""Ranks are looked at while the caller waits."""

STORE_WAIT_S = 6.0
"""How much longer a replica may take that asks a job's store first: it gives a store that is silent 5 s."""

WAIT_S_MAX = 20.0
"""Longest single wait for a change; longer ones are several calls."""

CATCH_UP_S = 0.3
"""How long a replica may wait to catch up with what was read elsewhere."""

PACE_S = 0.1
"""A waiting read takes this long at least: in a large cluster something always changes."""

_REQUEST_BYTES_MAX = 4 * 1024 * 1024
_REPLY_BYTES_MAX = 64 * 1024 * 1024
_PAUSE_S_FIRST, _PAUSE_S_MAX = 0.05, 0.5

_OPTIONS = (
    ("grpc.max_send_message_length", _REQUEST_BYTES_MAX),
    ("grpc.max_receive_message_length", _REPLY_BYTES_MAX),
    # Loopback and private addresses are no business of a web proxy.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One record as stored; ``key`` is below the cluster's root."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Records under one prefix, from the mirror of ``replica``; it was current ``age_s`` ago."""

    items: tuple[Item, ...]
    revision: int
    age_s: float
    replica: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a submission."""

    spec: bytes
    created: bool
    revision: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankStacks:
    """The stacks of one rank: what it does, where, and all its threads as text."""

    rank: int
    agent: str
    kind: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class JobStacks:
    """Of all ranks that could be asked; ``problems``: who could not, in one sentence each."""

    ranks: tuple[RankStacks, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Bytes of one rank's log."""

    data: bytes
    next_offset: int
    attempt: int
    agent: str
    eof: bool


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What one replica says about itself."""

    address: str
    cluster: str
    replica: str
    version: str
    leader: bool
    term: int
    revision: int
    mirror_age_s: float
    leader_replica: str
    problems: tuple[str, ...] = ()
    """What is wrong now, in sentences for people."""
    etcd_version: str = ""


@dataclass(frozen=True, slots=True)
class Importing:
    """A request to import; ``answered``: it is gone from the records, which tell what became of it."""

    lease: int
    answered: bool


@dataclass(frozen=True, slots=True)
class Pinned:
    """A checkpoint that stays while it is pinned; ``lease`` renews the pin, 0 for one without an end."""

    record: CommitRecord
    store: str
    lease: int
    revision: int

    @property
    def seq(self) -> int:
        return int(self.record.seq)


@dataclass(frozen=True, slots=True)
class GarbageItem:
    """Something in a job's store, whether it would go, and why."""

    kind: str
    seq: int
    what: str
    deleted: bool
    why: str
    bytes: int

    def as_json(self, job: str) -> dict[str, Any]:
        """The same for programs."""
        return {
            "v": 1,
            "kind": "Garbage",
            "job": job,
            "what": self.kind,
            "seq": self.seq,
            "name": self.what,
            "deleted": self.deleted,
            "why": self.why,
            "bytes": self.bytes,
        }


@dataclass(frozen=True, slots=True)
class Review:
    """What would be deleted now; ``problem``: why orphans would not."""

    items: tuple[GarbageItem, ...]
    revision: int
    problem: str


class _Silent:
    def info(self, event: str, **fields: Any) -> None:
        pass

    warning = info


class Client:
    """The cluster, through whichever replica answers. Safe for several threads.

    ``timeout_s`` bounds each call over all replicas; a wait inside a call comes
    on top of it.
    """

    def __init__(
        self, addresses: Sequence[str], *, timeout_s: float = 5.0, tls: TlsFiles | None = None
    ) -> None:
        """Remember the addresses.

        Raises:
            Refused: BAD_SETTING; the TLS files cannot be used.
        """
        assert addresses
        self._timeout_s = timeout_s
        self._addresses = tuple(addresses)
        # What a program prints must hold no log lines: ``problems`` is for its stderr.
        self._tls = grpc_tls.Credentials(tls, logger=_Silent()) if tls is not None else None
        self._lock = threading.Lock()
        self._retired: list[grpc.Channel] = []
        self._open()
        # Clients that all began with the first replica would load only that one.
        self._current = random.randrange(len(addresses))  # noqa: S311 - no secret
        self._seen_revision = 0

    def close(self) -> None:
        """End all connections; blocked calls fail."""
        with self._lock:
            channels, self._retired = [*self._channels, *self._retired], []
        for channel in channels:
            channel.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The replicas that are asked."""
        return self._addresses

    def problems(self) -> list[str]:
        """Sentences on this client's certificate, such as that it expires."""
        return self._tls.problems() if self._tls is not None else []

    def submit(self, spec: bytes, request_id: str, *, dry_run: bool = False) -> Submitted:
        """Submit a job; the same ``request_id`` submits it once.

        Raises:
            Refused, Conflict: the job is not accepted.
            Unavailable: no replica could be reached, or none reaches etcd.
        """
        request = pb.SubmitRequest(spec=spec, request_id=request_id, dry_run=dry_run)
        reply = self._call(
            lambda stub, timeout: stub.Submit(request, timeout=timeout + STORE_WAIT_S), wait_s=STORE_WAIT_S
        )
        return Submitted(reply.spec, reply.created, reply.revision, tuple(reply.warnings))

    def set_intent(
        self,
        job: str,
        *,
        wanted: str = "",
        checkpoint_token: str = "",
        by: str = "",
        nnodes: tuple[int, int] = (0, 0),
    ) -> int:
        """Say what is wanted of a job; return the revision of it. ``nnodes`` (0, 0): as before.

        Raises:
            NotFound: there is no such job.
            Conflict: it has ended.
            Unavailable: no replica could be reached, or none reaches etcd.
        """
        request = pb.SetIntentRequest(
            job=job,
            wanted=wanted,
            checkpoint_token=checkpoint_token,
            by=by,
            nnodes_min=nnodes[0],
            nnodes_max=nnodes[1],
        )
        reply = self._call(lambda stub, timeout: stub.SetIntent(request, timeout=timeout))
        return int(reply.revision)

    def cordon(self, agent: str, *, reason: str, ttl_s: int = 0, drain: bool = False, by: str = "") -> Cordon:
        """Keep new ranks off a machine, for ``ttl_s`` or until it is lifted; return the record.

        Raises:
            NotFound: there is no such agent.
            Unavailable: no replica could be reached, or none reaches etcd.
        """
        request = pb.CordonRequest(agent=agent, reason=reason, by=by, ttl_s=ttl_s, drain=drain)
        reply = self._call(lambda stub, timeout: stub.Cordon(request, timeout=timeout))
        self._seen_revision = max(self._seen_revision, int(reply.revision))
        return codec.decode(Cordon, reply.record)

    def uncordon(self, agent: str) -> bool:
        """Let ranks on a machine again; False: it was not cordoned."""
        request = pb.UncordonRequest(agent=agent)
        reply = self._call(lambda stub, timeout: stub.Uncordon(request, timeout=timeout))
        self._seen_revision = max(self._seen_revision, int(reply.revision))
        return bool(reply.removed)

    def read(self, prefix: str, *, after_revision: int = 0, wait_s: float = 0.0) -> Reading:
        """Return the records under ``prefix``.

        With ``after_revision`` wait up to ``wait_s`` for a newer mirror. What
        comes back may be unchanged, but is never older than what this client
        has read before: a replica that lags behind is asked to wait, too.

        Raises:
            Unavailable: no replica could be reached.
        """
        floor = max(after_revision, self._seen_revision - 1 if wait_s == 0 else 0)
        wait_s = min(wait_s, WAIT_S_MAX)
        # Reads without a wait still give a lagging replica a moment to catch up.
        request = pb.ReadRequest(
            prefix=prefix,
            after_revision=floor,
            wait_ms=int(1000 * (wait_s or (CATCH_UP_S if floor else 0.0))),
        )

        def read(stub: Any, timeout: float) -> Reading:
            reply = stub.Read(request, timeout=timeout + wait_s)
            if reply.revision < self._seen_revision:
                raise Unavailable(
                    ErrorCode.MIRROR_STALE, "the replica's mirror is behind what was read before"
                )
            items = tuple(
                Item(item.key, item.value, item.create_revision, item.mod_revision) for item in reply.items
            )
            return Reading(items, reply.revision, reply.age_s, self._addresses[self._current])

        begun = time.monotonic()
        reading = self._call(read, wait_s=wait_s)
        if wait_s > 0:
            time.sleep(max(0.0, min(wait_s, PACE_S) - (time.monotonic() - begun)))
        self._seen_revision = max(self._seen_revision, reading.revision)
        return reading

    def read_log(
        self,
        job: str,
        rank: int,
        stream: str,
        *,
        attempt: int = 0,
        offset: int = 0,
        bytes_max: int = 256 * 1024,
        wait_s: float = 0.0,
    ) -> LogChunk:
        """Return log bytes from ``offset`` on; with ``wait_s`` wait that long for some.

        Raises:
            NotFound: no such job, rank or attempt, or its machine has gone.
            Unavailable: no replica, or not the rank's agent, could be reached.
        """
        request = pb.JobLogRequest(
            job=job,
            attempt=attempt,
            rank=rank,
            stream=stream,
            offset=offset,
            bytes_max=bytes_max,
            wait_ms=int(wait_s * 1000),
        )
        reply = self._call(
            lambda stub, timeout: stub.ReadLog(request, timeout=timeout + wait_s), wait_s=wait_s
        )
        return LogChunk(reply.data, reply.next_offset, reply.attempt, reply.agent, reply.eof)

    def stacks(self, job: str) -> JobStacks:
        """Collect the stacks of a job's ranks now.

        Raises:
            NotFound: no such job, or no rank of it runs.
            Unavailable: no replica could be reached.
        """
        request = pb.JobStacksRequest(job=job)
        reply = self._call(
            lambda stub, timeout: stub.Stacks(request, timeout=timeout + STACKS_S), wait_s=STACKS_S
        )
        ranks = tuple(RankStacks(one.rank, one.agent, one.kind, one.where, one.text) for one in reply.ranks)
        return JobStacks(ranks, tuple(reply.problems))

    def pin_checkpoint(
        self, job: str, seq: int, *, holder: str, ttl_s: int, why: str = "", by: str = "", lease: int = 0
    ) -> Pinned:
        """Pin a checkpoint (0: the newest good one), or renew the pin of ``lease``.

        Raises:
            NotFound: there is none.
            Refused: too many pins, or no such holder can be.
        """
        request = pb.PinCheckpointRequest(
            job=job, seq=seq, holder=holder, ttl_s=ttl_s, lease=lease, why=why, by=by
        )
        reply = self._call(lambda stub, timeout: stub.PinCheckpoint(request, timeout=timeout))
        return Pinned(codec.decode(CommitRecord, reply.record), reply.store, reply.lease, reply.revision)

    def unpin_checkpoint(self, job: str, seq: int, *, holder: str, lease: int = 0) -> bool:
        """Take a pin off ("*": all); False: there was none."""
        request = pb.UnpinCheckpointRequest(job=job, seq=seq, holder=holder, lease=lease)
        reply = self._call(lambda stub, timeout: stub.UnpinCheckpoint(request, timeout=timeout))
        return bool(reply.removed)

    def delete_checkpoint(self, job: str, seq: int, *, request_id: str, by: str) -> str:
        """Ask the leader to delete a checkpoint; return the id of the request.

        Raises:
            NotFound: there is none.
            Conflict: it must stay.
        """
        request = pb.DeleteCheckpointRequest(job=job, seq=seq, request_id=request_id, by=by)
        return self._ordered(lambda stub, timeout: stub.DeleteCheckpoint(request, timeout=timeout))

    def report_damage(self, job: str, seq: int, blob: str, chunk: int, *, request_id: str, by: str) -> str:
        """Ask the leader to look at a damaged chunk itself; return the id of the request."""
        request = pb.ReportDamageRequest(
            job=job, seq=seq, blob=blob, chunk=chunk, request_id=request_id, by=by
        )
        return self._ordered(lambda stub, timeout: stub.ReportDamage(request, timeout=timeout))

    def collect_garbage(self, job: str, *, request_id: str, by: str) -> str:
        """Ask the leader to search the store for orphans now; return the id of the request."""
        request = pb.CollectGarbageRequest(job=job, request_id=request_id, by=by)
        return self._ordered(lambda stub, timeout: stub.CollectGarbage(request, timeout=timeout))

    def import_checkpoint(
        self,
        job: str,
        *,
        request_id: str,
        step: int,
        ttl_s: int,
        timeout_s: float,
        lease: int = 0,
        part: DurablePart | None = None,
        by: str = "",
    ) -> Importing:
        """Ask for a checkpoint to be opened whose bytes the caller writes; or renew that, or report a part.

        Raises:
            NotFound: there is no such job.
            Conflict: it has begun, or somebody else imports.
        """
        request = pb.ImportCheckpointRequest(
            job=job,
            request_id=request_id,
            by=by,
            step=step,
            ttl_s=ttl_s,
            lease=lease,
            timeout_s=timeout_s,
            part=b"" if part is None else codec.encode(part),
        )
        reply = self._call(lambda stub, timeout: stub.ImportCheckpoint(request, timeout=timeout))
        self._seen_revision = max(self._seen_revision, int(reply.revision))
        return Importing(reply.lease, bool(reply.answered))

    def withdraw_import(self, job: str, request_id: str) -> None:
        """Give an import up: nothing will come of it."""
        request = pb.ImportCheckpointRequest(job=job, request_id=request_id, withdraw=True)
        self._call(lambda stub, timeout: stub.ImportCheckpoint(request, timeout=timeout))

    def review_garbage(self, job: str, *, timeout_s: float = 60.0) -> Review:
        """What would be deleted now, and why; a large store takes a while to list.

        Raises:
            NotFound: there is no such job.
        """
        request = pb.ReviewGarbageRequest(job=job)
        reply = self._call(
            lambda stub, timeout: stub.ReviewGarbage(request, timeout=timeout + timeout_s), wait_s=timeout_s
        )
        items = tuple(
            GarbageItem(item.kind, item.seq, item.what, item.deleted, item.why, item.bytes)
            for item in reply.items
        )
        return Review(items, reply.revision, reply.problem)

    def _ordered(self, call: Callable[[Any, float], Any]) -> str:
        reply = self._call(call)
        # What is waited for is at this revision: no replica that lags behind may be asked for it.
        self._seen_revision = max(self._seen_revision, int(reply.revision))
        return str(reply.order)

    def info(self) -> ReplicaInfo:
        """What the replica that answers says about itself."""
        return self._call(lambda stub, timeout: self._info(stub, self._addresses[self._current], timeout))

    def info_each(self, *, timeout_s: float = 1.0) -> dict[str, ReplicaInfo | DtrainError]:
        """Ask every replica about itself, one after the other."""
        found: dict[str, ReplicaInfo | DtrainError] = {}
        self._refresh()
        for address, stub in zip(self._addresses, self._stubs, strict=True):
            try:
                found[address] = self._info(stub, address, timeout_s)
            except grpc.RpcError as error:
                found[address] = translate(error, address)
        return found

    def _info(self, stub: Any, address: str, timeout_s: float) -> ReplicaInfo:
        reply = stub.Info(pb.InfoRequest(), timeout=timeout_s)
        return ReplicaInfo(
            address,
            reply.cluster,
            reply.replica,
            reply.version,
            reply.leader,
            reply.term,
            reply.revision,
            reply.mirror_age_s,
            reply.leader_replica,
            tuple(reply.problems),
            reply.etcd_version,
        )

    def _call(self, call: Callable[[Any, float], T], *, wait_s: float = 0.0) -> T:
        deadline = time.monotonic() + self._timeout_s + wait_s
        pause_s = _PAUSE_S_FIRST
        failures = 0
        while True:
            self._refresh()
            left_s = deadline - time.monotonic() - wait_s
            current = self._current
            address = self._addresses[current]
            try:
                return call(self._stubs[current], max(0.2, min(left_s, TRY_S_MAX)))
            except grpc.RpcError as error:
                problem = translate(error, address)
            except Unavailable as error:
                problem = error
            # Everything here is idempotent, so an unknown outcome is asked for again.
            if not isinstance(problem, Unavailable | OutcomeUnknown):
                raise problem
            failures += 1
            self._current = (current + 1) % len(self._stubs)
            if time.monotonic() + pause_s >= deadline:
                raise self._unreachable(problem) from problem
            if failures % len(self._stubs) == 0:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    def _unreachable(self, last: DtrainError) -> DtrainError:
        if last.code is not ErrorCode.COORDINATOR_UNAVAILABLE:
            return last
        return Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"no coordinator answers at {', '.join(self._addresses)}",
            cause=last.cause or last.message,
            fix=_fix(last.cause, self._tls is not None),
        )

    def _open(self) -> None:
        self._generation = self._tls.generation if self._tls is not None else 0
        self._channels = [
            grpc_tls.to_coordinator(address, self._tls, _OPTIONS) for address in self._addresses
        ]
        self._stubs = [CoordinatorStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]

    def _refresh(self) -> None:
        """Open new channels once the certificate has been replaced: a follower lives for days."""
        if self._tls is None or self._tls.generation == self._generation:
            return
        with self._lock:
            if self._tls.generation == self._generation:
                return
            # Other threads' calls may be under way on the ones of last time, never on older ones.
            over, self._retired = self._retired, self._channels
            self._open()
        for channel in over:
            channel.close()


def _fix(cause: str, secured: bool) -> str:
    told = cause.lower()
    if secured and any(word in told for word in ("handshake", "certificate", "verification", "ssl")):
        return (
            "the coordinator's certificate must be signed by --tls-cacert, be of the cluster that yours "
            "names, and neither may have expired: docs/security.md"
        )
    fix = "check --coordinators and that the replicas run, or start a local cluster: dtrain up"
    if not secured and ("socket closed" in told or "reset" in told or "handshake" in told):
        return f"{fix}; if they use TLS, give --tls-cert, --tls-key and --tls-cacert"
    return fix


@contextlib.contextmanager
def closing(client: Client) -> Iterator[Client]:
    """Close ``client`` at the end."""
    try:
        yield client
    finally:
        client.close()


def translate(error: grpc.RpcError, address: str) -> DtrainError:
    """Return the error that a server's status stands for."""
    status = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
    if isinstance(error, grpc.Call):
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_KEY:
                return _told(value if isinstance(value, bytes) else value.encode(), details)
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE, f"the coordinator at {address} does not answer", cause=details
        )
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "concurrent" in details.lower():
        # Too many calls for this replica, which has not looked at ours; another one may have room.
        return Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE, f"the coordinator at {address} is busy", cause=details
        )
    kind, code = _BY_STATUS.get(status, (errors.InvariantBroken, ErrorCode.BUG))
    return kind(code, f"the coordinator at {address} answered {status.name}: {details}")


_BY_STATUS: dict[grpc.StatusCode, tuple[type[DtrainError], ErrorCode]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (errors.Refused, ErrorCode.USAGE),
    grpc.StatusCode.NOT_FOUND: (errors.NotFound, ErrorCode.NOT_FOUND),
    grpc.StatusCode.ALREADY_EXISTS: (errors.Conflict, ErrorCode.ALREADY_EXISTS),
    grpc.StatusCode.FAILED_PRECONDITION: (errors.Conflict, ErrorCode.CONFLICT),
    grpc.StatusCode.ABORTED: (errors.Conflict, ErrorCode.CONFLICT),
    grpc.StatusCode.UNIMPLEMENTED: (errors.Refused, ErrorCode.USAGE),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (errors.Refused, ErrorCode.USAGE),
    grpc.StatusCode.UNAUTHENTICATED: (errors.Refused, ErrorCode.ETCD_AUTH),
    grpc.StatusCode.PERMISSION_DENIED: (errors.Refused, ErrorCode.NOT_PERMITTED),
}

_KINDS: dict[str, type[DtrainError]] = {
    kind.__name__: kind
    for kind in (
        errors.Refused,
        errors.NotFound,
        errors.Conflict,
        errors.Unavailable,
        errors.OutcomeUnknown,
        errors.LeadershipLost,
        TimedOut,
        errors.InvariantBroken,
    )
}


def _told(value: bytes, details: str) -> DtrainError:
    try:
        told = json.loads(value)
        kind = _KINDS.get(told.get("kind", ""), DtrainError)
        code = ErrorCode(told.get("code", ""))
    except (ValueError, AttributeError):
        # A newer server may know codes that this client does not.
        return DtrainError(ErrorCode.BUG, details)
    # A replica that has just lost its leadership can still be asked again.
    kind = Unavailable if kind is errors.LeadershipLost else kind
    return kind(
        code,
        str(told.get("message") or details),
        cause=str(told.get("cause", "")),
        fix=str(told.get("fix", "")),
    )
