"""The agent's gRPC service: commands from the leader, log files for anybody's ``logs``."""

import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import NoReturn

import grpc

from dtrain.agent import log_times
from dtrain.agent.core.decisions import Answer
from dtrain.agent.logs import LogPart, LogPlace, RankLogs, read_part
from dtrain.protocol import wire
from dtrain.protocol.archive import Mark
from dtrain.protocol.commands import Command
from dtrain.protocol.curves import Curve
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import Attempt, Term
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.snapshot import Stack
from dtrain.runtime import grpc_tls

THREADS_ANSWERING = 4
THREADS_WAITING = 4
"""Readers that wait for new log bytes hold a thread each; commands must never wait for them."""
QUEUED_MAX = 64
WAIT_S_MAX = 10.0
POLL_S = 0.1
SHORT_WAIT_S = 0.2
"""Where no waiting thread is left: long enough that a follower does not spin."""
CONNECTIONS_MAX = 400
"""Replicas are few; descriptors are needed for ranks."""
MESSAGE_BYTES_MAX = 4 * 1024 * 1024
STACKS_BYTES_MAX = 1024 * 1024
"""Of all ranks together; the whole is in their log folders."""
POINTS_MAX = 1000

OPTIONS = (
    *grpc_tls.SERVER_OPTIONS,
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    ("grpc.max_concurrent_streams", THREADS_ANSWERING + THREADS_WAITING + QUEUED_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)

Execute = Callable[[Command], Answer]
Ended = Callable[[str, str, Attempt, int], bool]
Stacks = Callable[[str, str], list[tuple[Stack, str]]]
Curves = Callable[[str, str, int], list[Curve]]


class AgentServicer(agent_pb2_grpc.AgentServicer):
    """``execute`` takes commands on; ``ended`` tells whether a rank will write no more.

    ``stacks`` collects those of a submission's ranks, each in short and in full. ``curves`` returns
    what one has reported, with so many points at most.
    """

    def __init__(
        self,
        execute: Execute,
        logs: RankLogs,
        ended: Ended,
        term: Callable[[], Term],
        stacks: Stacks,
        *,
        curves: Curves = lambda _job, _uid, _points: [],
    ) -> None:
        self._execute = execute
        self._logs = logs
        self._ended = ended
        self._term = term
        self._stacks = stacks
        self._curves = curves
        self._waiting = threading.BoundedSemaphore(THREADS_WAITING)

    def Execute(self, request: pb.Command, context: grpc.ServicerContext) -> pb.Ack:  # noqa: N802
        try:
            answer = self._execute(wire.command_from_pb(request))
        except DtrainError as error:
            abort(context, error)
        return pb.Ack(accepted=answer.accepted, message=answer.message, term=self._term())

    def ReadLog(  # noqa: N802
        self, request: pb.ReadLogRequest, context: grpc.ServicerContext
    ) -> pb.LogChunk:
        try:
            return self._read_log(request, context)
        except DtrainError as error:
            abort(context, error)

    def Stacks(  # noqa: N802
        self, request: pb.StacksRequest, context: grpc.ServicerContext
    ) -> pb.StacksReply:
        if not self._waiting.acquire(blocking=False):
            abort(context, Unavailable(ErrorCode.AGENT_UNAVAILABLE, "the agent is busy; try again"))
        try:
            found = self._stacks(request.job, request.uid)
        except DtrainError as error:
            abort(context, error)
        finally:
            self._waiting.release()
        room = STACKS_BYTES_MAX // max(1, len(found))
        return pb.StacksReply(
            ranks=[
                pb.StacksReply.RankStacks(
                    rank=stack.rank, kind=stack.kind.value, where=stack.where, text=text[:room]
                )
                for stack, text in found
            ]
        )

    def Series(  # noqa: N802
        self,
        request: pb.SeriesRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - grpc's signature
    ) -> pb.SeriesReply:
        points_max = min(request.points_max or POINTS_MAX, POINTS_MAX)
        return pb.SeriesReply(
            curves=[
                pb.SeriesReply.Curve(
                    name=curve.name,
                    attempt=curve.attempt,
                    rank=curve.rank,
                    at=[at for at, _, _ in curve.points],
                    step=[step for _, step, _ in curve.points],
                    value=[value for _, _, value in curve.points],
                )
                for curve in self._curves(request.job, request.uid, points_max)
            ]
        )

    def _read_log(self, request: pb.ReadLogRequest, context: grpc.ServicerContext) -> pb.LogChunk:
        place = self._logs.find(request.job, request.uid, request.attempt, request.rank, request.stream)
        wait_s = min(max(0.0, request.wait_ms / 1000), WAIT_S_MAX)
        holds = wait_s > 0 and self._waiting.acquire(blocking=False)
        deadline = time.monotonic() + (wait_s if holds else min(wait_s, SHORT_WAIT_S))
        offset = request.offset
        try:
            while True:
                # Asked before the file is read: what was written before the end is then seen.
                over = self._ended(request.job, request.uid, place.attempt, request.rank)
                part = read_part(place.path, offset, request.bytes_max)
                if part.data or over or time.monotonic() >= deadline or not context.is_active():
                    return _chunk(part, place, over)
                offset = part.next_offset
                time.sleep(POLL_S)
        finally:
            if holds:
                self._waiting.release()


class AgentServer:
    """The gRPC server. Bound when built, serving once started."""

    def __init__(self, listen: str, tls: grpc_tls.Credentials | None = None) -> None:
        """Bind.

        Raises:
            Refused: PORT_IN_USE.
        """
        threads = THREADS_ANSWERING + THREADS_WAITING
        self._pool = futures.ThreadPoolExecutor(threads, "link")
        self._server = grpc.server(
            self._pool,
            interceptors=[grpc_tls.Gate(tls, abort)],
            options=OPTIONS,
            maximum_concurrent_rpcs=threads + QUEUED_MAX,
        )
        self.port = grpc_tls.bind(self._server, listen, tls)

    def start(self, servicer: AgentServicer) -> None:
        """Serve."""
        register = agent_pb2_grpc.add_AgentServicer_to_server
        register(servicer, self._server)  # type: ignore[no-untyped-call]
        self._server.start()

    def stop(self, grace_s: float = 0.2) -> None:
        """Take no more calls, and give those under way ``grace_s``."""
        self._server.stop(grace_s).wait(grace_s + 0.5)
        self._pool.shutdown(wait=False, cancel_futures=True)


def abort(context: grpc.ServicerContext, error: DtrainError) -> NoReturn:
    """End a call with ``error``."""
    status = grpc.StatusCode.UNAVAILABLE
    if isinstance(error, Refused):
        status = grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, NotFound):
        status = grpc.StatusCode.NOT_FOUND
    if error.code is ErrorCode.NOT_PERMITTED:
        status = grpc.StatusCode.PERMISSION_DENIED
    context.abort(status, f"{error.message} ({error.code.value})")
    raise AssertionError("abort returned")


def _chunk(part: LogPart, place: LogPlace, over: bool) -> pb.LogChunk:
    marks = _marks(part, place) if part.data else []
    return pb.LogChunk(
        data=part.data,
        next_offset=part.next_offset,
        attempt=place.attempt,
        eof=over and part.at_end,
        marks=[pb.TimeMark(size=mark.size, at_ms=mark.at_ms) for mark in marks],
    )


def _marks(part: LogPart, place: LogPlace) -> list[Mark]:
    found = list(log_times.within(log_times.read(log_times.of(place.path)), part.offset, part.next_offset))
    if not found or found[-1].size < part.next_offset:
        # Written since it was looked at last.
        found.append(Mark(part.next_offset, int(time.time() * 1000)))
    return found
