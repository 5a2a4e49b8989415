"""What the coordinators can be asked: any replica will do, and every call may be repeated.

Request ids and checkpoint tokens are chosen here, so that a repeated mutation
changes nothing. How a replica is found that answers is ``calling.py``'s. Records are
imported where one is decoded: most verbs need none of them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from dtrain.cli.answers import (
    ArchivedJob,
    Changed,
    GarbageItem,
    Importing,
    Item,
    JobStacks,
    LogChunk,
    LogPlace,
    News,
    Pinned,
    RankStacks,
    Reading,
    ReplicaInfo,
    Review,
    Rows,
    Submitted,
)
from dtrain.cli.calling import Caller
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.runtime.grpc_errors import error_of

if TYPE_CHECKING:
    from dtrain.protocol.cluster import Cordon
    from dtrain.protocol.snapshot import DurablePart

STACKS_S = 12.0
"""Ranks are looked at while the caller waits."""

ARCHIVE_S = 6.0
"""How much longer a log may take that has to come from the store."""

STORE_WAIT_S = 6.0
"""How much longer a replica may take that asks a job's store first: it gives a store that is silent 5 s."""

WAIT_S_MAX = 20.0
"""Longest single wait for a change; longer ones are several calls."""

CATCH_UP_S = 0.3
"""How long a replica may wait to catch up with what was read elsewhere."""

PACE_S = 0.1
"""A waiting read takes this long at least: in a large cluster something always changes."""


class Client(Caller):
    """The cluster, through whichever replica answers. Safe for several threads."""

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
        pause: str = "",
    ) -> int:
        """Say what is wanted of a job; return the revision of it. ``nnodes`` (0, 0): as before.

        ``pause``: "pause", "unpause", or "" for as before.

        Raises:
            NotFound: there is no such job.
            Conflict: it has ended, or is suspended and cannot be paused.
            Refused: the replica that answered knows of no pauses.
            Unavailable: no replica could be reached, or none reaches etcd.
        """
        request = pb.SetIntentRequest(
            job=job,
            wanted=wanted,
            checkpoint_token=checkpoint_token,
            by=by,
            nnodes_min=nnodes[0],
            nnodes_max=nnodes[1],
            pause=pause,
        )
        reply = self._call(lambda stub, timeout: stub.SetIntent(request, timeout=timeout))
        from dtrain.protocol.job import Intent

        if pause and codec.decode(Intent, reply.intent).paused is not (pause == "pause"):
            # A former release passes over what it does not know.
            raise Refused(
                ErrorCode.USAGE,
                f"the coordinator that answered is of a former release: it cannot {pause} {job}",
                fix="upgrade the coordinators: dtrain get coordinators shows their releases",
            )
        return int(reply.revision)

    def cordon(
        self, agent: str, *, reason: str, ttl_s: int = 0, drain: bool = False, by: str = ""
    ) -> "Cordon":
        """Keep new ranks off a machine, for ``ttl_s`` or until it is lifted; return the record.

        Raises:
            NotFound: there is no such agent.
            Unavailable: no replica could be reached, or none reaches etcd.
        """
        request = pb.CordonRequest(agent=agent, reason=reason, by=by, ttl_s=ttl_s, drain=drain)
        reply = self._call(lambda stub, timeout: stub.Cordon(request, timeout=timeout))
        self._seen_revision = max(self._seen_revision, int(reply.revision))
        from dtrain.protocol.cluster import Cordon

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
            self._refuse_older(reply.revision)
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

    def list(self, kind: str, *, after_revision: int = 0, wait_s: float = 0.0) -> Rows:
        """Return one row for each of ``jobs`` or ``agents``; with ``wait_s`` wait that long for a change.

        Raises:
            Refused: OLDER_RELEASE; the replica is of a release that makes no rows.
            Unavailable: no replica could be reached.
        """
        floor = after_revision or self._seen_revision
        request = pb.ListRequest(
            kind=kind, after_revision=floor, wait_ms=int(1000 * (wait_s or (CATCH_UP_S if floor else 0.0)))
        )

        def ask(stub: Any, timeout: float) -> Rows:
            reply = stub.List(request, timeout=timeout + wait_s)
            self._refuse_older(reply.revision)
            return Rows(tuple(reply.rows), reply.revision, reply.age_s, self._addresses[self._current])

        begun = time.monotonic()
        found = self._call(ask, wait_s=wait_s)
        if wait_s > 0:
            time.sleep(max(0.0, min(wait_s, PACE_S) - (time.monotonic() - begun)))
        self._seen_revision = max(self._seen_revision, found.revision)
        return found

    def changes(self, prefixes: Sequence[str], *, after_revision: int, wait_s: float = 0.0) -> News:
        """Return what has changed below ``prefixes`` since; with ``wait_s`` wait that long for something.

        Raises:
            Refused: OLDER_RELEASE; the replica is of a release that remembers no changes.
            Unavailable: no replica could be reached.
        """
        request = pb.ChangesRequest(
            prefixes=prefixes, after_revision=after_revision, wait_ms=int(1000 * wait_s)
        )
        for _ in self._addresses:
            reply = self._call(
                lambda stub, timeout: stub.Changes(request, timeout=timeout + wait_s), wait_s=wait_s
            )
            if not reply.lost:
                break
            # One that has begun only now knows less than those beside it.
            self._pass_over()
        changes = tuple(
            Changed(one.key, None if one.deleted else one.value, one.revision, one.create_revision)
            for one in reply.changes
        )
        return News(changes, reply.revision, reply.age_s, reply.lost)

    def _refuse_older(self, revision: int) -> None:
        if revision < self._seen_revision:
            raise Unavailable(ErrorCode.MIRROR_STALE, "the replica's mirror is behind what was read before")

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
        uid: str = "",
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
            uid=uid,
        )
        # Whoever does not wait for new bytes waits for the store instead, if the machine is lost.
        patience_s = wait_s or ARCHIVE_S
        reply = self._call(
            lambda stub, timeout: stub.ReadLog(request, timeout=timeout + patience_s), wait_s=patience_s
        )
        return LogChunk(
            reply.data,
            reply.next_offset,
            reply.attempt,
            reply.agent,
            reply.eof,
            reply.next_offset - len(reply.data),
            tuple((mark.size, mark.at_ms) for mark in reply.marks),
            reply.note,
        )

    def archived_jobs(self, job: str = "") -> tuple[tuple[ArchivedJob, ...], str]:
        """Which submissions the archive holds, newest first, of one name or of all; and what was not read.

        Raises:
            Refused: OLDER_RELEASE; the replica knows of no archive.
        """
        reply = self._archive(pb.ReadArchiveRequest(job=job, list=True))
        return tuple(ArchivedJob(one.job, one.uid, one.finished) for one in reply.jobs), reply.problem

    def read_archive(self, job: str, uid: str = "", *, events_before: int = 0) -> Reading:
        """Records of a submission that has ended, as ``read`` would have answered; "": the newest one.

        With ``events_before`` only events below that number, of a job that etcd still knows.

        Raises:
            NotFound: it was not archived.
            Unavailable: the store does not answer.
            Refused: OLDER_RELEASE; the replica knows of no archive.
        """
        reply = self._archive(pb.ReadArchiveRequest(job=job, uid=uid, events_before=events_before))
        items = tuple(Item(one.key, one.value, 0, 0) for one in reply.items)
        return Reading(items, 0, 0.0, "archive")

    def _archive(self, request: pb.ReadArchiveRequest) -> pb.ReadArchiveReply:
        reply: pb.ReadArchiveReply = self._call(
            lambda stub, timeout: stub.ReadArchive(request, timeout=timeout + ARCHIVE_S), wait_s=ARCHIVE_S
        )
        return reply

    def log_places(self, job: str, attempt: int = 0, uid: str = "") -> tuple[tuple[LogPlace, ...], str]:
        """Which logs of a job there are, of which attempts, and why the store could not be asked, if so.

        Nothing from a replica of an earlier release.

        Raises:
            NotFound: no such job.
            Unavailable: no replica could be reached.
        """
        request = pb.ListLogsRequest(job=job, attempt=attempt, uid=uid)
        try:
            reply = self._call(
                lambda stub, timeout: stub.ListLogs(request, timeout=timeout + ARCHIVE_S), wait_s=ARCHIVE_S
            )
        except Refused as error:
            if error.code is not ErrorCode.OLDER_RELEASE:
                raise
            return (), "this replica is of an earlier release"
        found = (
            LogPlace(one.attempt, one.agent, one.first_rank, one.last_rank, one.archived)
            for one in reply.sources
        )
        return tuple(found), reply.problem

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
        from dtrain.protocol.checkpoint import CommitRecord

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
        part: "DurablePart | None" = None,
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
                found[address] = error_of(error, address)
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
            reply.store,
        )


@contextlib.contextmanager
def closing(client: Client) -> Iterator[Client]:
    """Close ``client`` at the end."""
    try:
        yield client
    finally:
        client.close()
