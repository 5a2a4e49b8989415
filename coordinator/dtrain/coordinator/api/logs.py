"""Where logs are read: from the machines that wrote them, and from the store where those are lost."""

import dataclasses
import re
import threading
from collections import OrderedDict
from typing import Any, TypeVar

import grpc

from dtrain.coordinator.api import asking
from dtrain.coordinator.api.archived import Archived, ArchivedLogs
from dtrain.coordinator.api.past import Past, PastJobs
from dtrain.coordinator.dispatch import Channels
from dtrain.coordinator.work import Stores
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import AgentName, ClusterName, JobName, Uid, parse_name
from dtrain.protocol.job import JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as agent_pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.snapshot import NodeRecord
from dtrain.runtime.clock import iso
from dtrain.storage.etcd.mirror import Mirror

T = TypeVar("T")

_UID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_]{0,63}")

LOG_BYTES_MAX = 1024 * 1024
WAIT_S_MAX = 30.0
AGENT_DEADLINE_S = 2.0
AGENTS_ASKED_MAX = 256
LOG_PLACES_KEPT = 4096


class LogDesk:
    """Answers ``ReadLog`` and ``ListLogs``. ``waiting`` bounds calls that wait for new bytes."""

    def __init__(
        self,
        cluster: ClusterName,
        mirror: Mirror,
        channels: Channels,
        stores: Stores,
        *,
        waiting: threading.BoundedSemaphore,
        default_store: str = "",
    ) -> None:
        self._keys = Keys(cluster)
        self._mirror = mirror
        self._channels = channels
        self._waiting = waiting
        self.archived = ArchivedLogs(cluster, stores.get)
        self._past_jobs = PastJobs(cluster, mirror, stores.get, default_store)
        self._places_lock = threading.Lock()
        self._places: OrderedDict[tuple[str, int, int], AgentName] = OrderedDict()
        """(uid, attempt, rank) to the agent that had its log."""

    def read(self, request: pb.JobLogRequest, context: grpc.ServicerContext) -> pb.JobLogChunk:
        """Bytes of one rank's log.

        Raises:
            NotFound: no such job, attempt or rank, and the archive has nothing of it.
            Unavailable: its machine does not answer, and the archive has nothing of it either.
        """
        job, uid, status = self._job(request.job, request.uid)
        if status is None or not status.attempt:
            raise NotFound(ErrorCode.NOT_FOUND, f"job {job} has not started yet: there are no logs")
        attempt = request.attempt or status.attempt
        try:
            return self._from_agents(request, context, status=status, attempt=attempt)
        except (NotFound, Unavailable) as error:
            # Whoever follows a machine that is silent for a moment asks it again: the archive lags behind.
            if isinstance(error, Unavailable) and request.wait_ms and self._is_registered(error):
                raise
            found, problem = self._from_archive(request, job, uid, status.store, attempt)
            if found is None:
                raise _both(error, problem) from error
            return _archived(found, attempt, request.rank, error, attempt < status.attempt)

    def sources(self, request: pb.ListLogsRequest) -> pb.ListLogsReply:
        """Which logs there are."""
        job, uid, status = self._job(request.job, request.uid)
        if status is None:
            return pb.ListLogsReply()
        found = [
            pb.LogSource(
                attempt=status.attempt,
                agent=member.agent,
                first_rank=member.first_rank,
                last_rank=member.first_rank + member.nproc - 1,
            )
            for member in status.members
            if request.attempt in (0, status.attempt)
        ]
        problem = ""
        if status.store:
            try:
                bundles = self.archived.bundles(status.store, job, uid)
            except DtrainError as error:
                bundles, problem = (), error.message
            seen = {(one.attempt, one.agent, one.first, one.last) for one in bundles}
            found += [
                pb.LogSource(attempt=attempt, agent=agent, first_rank=first, last_rank=last, archived=True)
                for attempt, agent, first, last in sorted(seen)
                if request.attempt in (0, attempt)
            ]
        return pb.ListLogsReply(sources=found, problem=problem)

    def archive(self, request: pb.ReadArchiveRequest) -> pb.ReadArchiveReply:
        """What the archive holds of one job, or which there are.

        Raises:
            NotFound: no such job was archived.
            Unavailable: the store does not answer.
        """
        if request.job:
            parse_name(request.job, "job")
        if request.list or not request.job:
            names, problem = self._past_jobs.submissions(request.job)
            jobs = [pb.ArchivedJob(job=one.job, uid=one.uid, finished=one.finished) for _, one in names]
            return pb.ReadArchiveReply(jobs=jobs, problem=problem)
        if request.events_before:
            job, uid, status = self._job(request.job, request.uid)
            if status is None or not status.store:
                return pb.ReadArchiveReply()
            events = self._past_jobs.earlier_events(job, uid, status.store, request.events_before)
            return pb.ReadArchiveReply(
                items=[_item(f"jobs/{job}/events/{one['seq']:020d}", one) for one in events]
            )
        past = self._past_jobs.find(request.job, request.uid)
        return pb.ReadArchiveReply(
            jobs=[pb.ArchivedJob(job=past.job, uid=past.uid, finished=past.finished)],
            items=[_item(key, value) for key, value in sorted(past.documents.items())],
        )

    # From the machines.

    def _from_agents(
        self,
        request: pb.JobLogRequest,
        context: grpc.ServicerContext,
        *,
        status: JobStatus,
        attempt: int,
    ) -> pb.JobLogChunk:
        place = (status.uid, attempt, request.rank)
        asked = agent_pb.ReadLogRequest(
            job=request.job,
            uid=status.uid,
            attempt=attempt,
            rank=request.rank,
            stream=request.stream or "stdout",
            offset=request.offset,
            bytes_max=min(request.bytes_max or LOG_BYTES_MAX, LOG_BYTES_MAX),
        )
        candidates = self._candidates(status, attempt, place)
        if not candidates:
            raise _NoSession(
                ErrorCode.AGENT_UNAVAILABLE,
                f"no agent that may have logs of {request.job} is alive",
                fix="logs of a lost machine can be read from the store, if the job has one",
            )
        waits = len(candidates) == 1 and request.wait_ms > 0 and self._waiting.acquire(blocking=False)
        try:
            if waits:
                asked.wait_ms = min(request.wait_ms, int(WAIT_S_MAX * 1000))
            agent, chunk = self._ask(candidates, asked, context)
        finally:
            if waits:
                self._waiting.release()
        with self._places_lock:
            self._places[place] = agent
            while len(self._places) > LOG_PLACES_KEPT:
                self._places.popitem(last=False)
        return pb.JobLogChunk(
            data=chunk.data,
            next_offset=chunk.next_offset,
            attempt=chunk.attempt or attempt,
            agent=agent,
            eof=chunk.eof,
            marks=[pb.LogMark(size=mark.size, at_ms=mark.at_ms) for mark in chunk.marks],
            offset=chunk.next_offset - len(chunk.data),
        )

    def _candidates(
        self, status: JobStatus, attempt: int, place: tuple[str, int, int]
    ) -> list[tuple[AgentName, str]]:
        """Agents that may have the log, with their addresses, the only one if it is known."""
        with self._places_lock:
            agent = self._places.get(place)
        # An attempt that is over has no members any more: after a failure, just when logs are wanted.
        if attempt == status.attempt and status.members:
            rank = place[2]
            agent = next(
                (m.agent for m in status.members if m.first_rank <= rank < m.first_rank + m.nproc), agent
            )
            if agent is None:
                raise NotFound(
                    ErrorCode.NOT_FOUND,
                    f"attempt {attempt} has no rank {rank}",
                    fix=f"use 0 to {status.world_size - 1}" if status.world_size else "",
                )
        if agent is not None:
            node = self._record(self._keys.node(agent), NodeRecord)
            return [] if node is None else [(agent, node.address)]
        # Nothing remembers where such attempts ran: whoever has the file answers.
        found = []
        for kv in self._mirror.prefix(self._keys.agents):
            parsed = self._keys.parse(kv.key)
            if parsed is not None and parsed.kind == "node":
                found.append((parsed.agent, codec.decode(NodeRecord, kv.value).address))
        return found[:AGENTS_ASKED_MAX]

    def _ask(
        self,
        candidates: list[tuple[AgentName, str]],
        asked: agent_pb.ReadLogRequest,
        context: grpc.ServicerContext,
    ) -> tuple[AgentName, agent_pb.LogChunk]:
        deadline_s = AGENT_DEADLINE_S + asked.wait_ms / 1000
        calls = []
        for agent, address in candidates:
            stub = agent_pb2_grpc.AgentStub(self._channels.get(agent, address))  # type: ignore[no-untyped-call]
            calls.append((agent, stub.ReadLog.future(asked, timeout=deadline_s)))
        # A client that hangs up must not leave a waiting call behind at the agent.
        context.add_callback(lambda: asking.cancel(calls))
        problems: list[tuple[AgentName, grpc.RpcError]] = []
        for agent, call in calls:
            try:
                return agent, call.result()
            except grpc.FutureCancelledError as error:
                raise Unavailable(ErrorCode.AGENT_UNAVAILABLE, "the call was given up") from error
            except grpc.RpcError as error:
                problems.append((agent, error))
        grave = [found for found in problems if found[1].code() is not grpc.StatusCode.NOT_FOUND]
        if not grave:
            raise NotFound(ErrorCode.NOT_FOUND, f"no agent has this log of rank {asked.rank}")
        silent, why = grave[0]
        raise Unavailable(
            ErrorCode.AGENT_UNAVAILABLE,
            f"agent {silent} did not give its log: {why.details() or why.code().name}",
            fix="try again in a few seconds",
        )

    # From the store.

    def _from_archive(
        self, request: pb.JobLogRequest, job: JobName, uid: Uid, store: str, attempt: int
    ) -> tuple[Archived | None, str]:
        if not store:
            return None, "the job has no store that its logs could have been copied to"
        try:
            found = self.archived.read(
                store,
                job,
                uid,
                attempt=attempt,
                name=f"{request.rank}/{request.stream or 'stdout'}",
                offset=request.offset,
                bytes_max=min(request.bytes_max or LOG_BYTES_MAX, LOG_BYTES_MAX),
            )
        except DtrainError as error:
            return None, f"the archive could not be read: {error.message}"
        return found, "the store has no copy of it"

    # Leaves.

    def _job(self, name: str, asked_uid: str) -> tuple[JobName, Uid, JobStatus | None]:
        """The job as this replica's mirror has it; status None: it has not been looked at yet."""
        job = JobName(parse_name(name, "job"))
        spec = self._record(self._keys.spec(job), JobSpec)
        if spec is None or asked_uid not in ("", spec.uid):
            past = self._past(job, asked_uid)
            return job, past.uid, dataclasses.replace(past.status, members=(), store=past.store)
        status = self._record(self._keys.status(job), JobStatus)
        return job, spec.uid, status if status is not None and status.uid == spec.uid else None

    def _past(self, job: JobName, uid: str) -> Past:
        """An earlier submission of a name, or the one that etcd has no record of any more."""
        if uid and not _UID.fullmatch(uid):
            raise Refused(ErrorCode.BAD_NAME, f"{uid[:80]!r} is no uid of a job")
        try:
            return self._past_jobs.find(job, uid)
        except (NotFound, Unavailable) as error:
            if uid:
                raise
            # A name that was mistyped is nobody's reason to wait for a store that is away.
            also = "" if isinstance(error, NotFound) else f"; {error.message}"
            raise NotFound(
                ErrorCode.NOT_FOUND, f"there is no job {job}{also}", fix="list jobs: dtrain get jobs"
            ) from error

    def _record(self, key: str, kind: type[T]) -> T | None:
        kv = self._mirror.get(key)
        return None if kv is None else codec.decode(kind, kv.value)

    def _is_registered(self, error: DtrainError) -> bool:
        return not isinstance(error, _NoSession)


class _NoSession(Unavailable):
    """No agent that may have the log is registered: asking again soon does not help."""


def _item(key: str, document: Any) -> pb.Item:
    return pb.Item(key=key, value=codec.dumps(document))


def _archived(found: Archived, attempt: int, rank: int, why: DtrainError, over: bool) -> pb.JobLogChunk:
    until = f" up to {iso(found.until_ms / 1000)}" if found.until_ms else ""
    return pb.JobLogChunk(
        data=found.data,
        next_offset=found.next_offset,
        attempt=attempt,
        agent=found.agent,
        eof=found.at_end and over,
        marks=[pb.LogMark(size=mark.size, at_ms=mark.at_ms) for mark in found.marks],
        archived=True,
        note=f"rank {rank} of attempt {attempt} from the archive{until}: {why.message}",
        offset=found.offset,
    )


def _both(error: DtrainError, problem: str) -> DtrainError:
    """The error of the machines with what the archive had to say."""
    return type(error)(error.code, f"{error.message}; {problem}", fix=error.fix)
