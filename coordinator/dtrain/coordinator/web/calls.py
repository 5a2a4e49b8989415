"""What the dashboard asks replicas for, over the API that the CLI uses: changes, logs, how they are.

The replica at our side is asked first, then the others: each of them answers
for all. Calls are synchronous and run in a small pool.
"""

import asyncio
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb.coordinator_pb2_grpc import CoordinatorStub
from dtrain.runtime import grpc_tls
from dtrain.runtime.grpc_errors import error_of

T = TypeVar("T")

THREADS = 8
CALL_S = 3.0
CHANNELS_MAX = 32
LOG_BYTES_MAX = 64 * 1024
POINTS_MAX = 200
DRAWN_MAX = 400
"""Of one number in all attempts: a chart is not wider."""
PROBLEMS_SHOWN = 3

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

WANTED = {"cancel": "cancel", "suspend": "suspend", "resume": "run"}
ACTIONS = (*WANTED, "pause", "unpause", "checkpoint", "scale")
"""What can be asked of a job."""


class Calls:
    """``addresses`` returns replicas' API addresses, the nearest first."""

    def __init__(
        self, addresses: Callable[[], Sequence[str]], tls: grpc_tls.Credentials | None, by: str
    ) -> None:
        self._addresses = addresses
        self._tls = tls
        self._by = by
        self._pool = ThreadPoolExecutor(THREADS, "calls")
        self._lock = threading.Lock()
        self._channels: dict[str, tuple[int, grpc.Channel]] = {}

    async def act(self, job: str, action: str, nodes: tuple[int, int] = (0, 0)) -> int:
        """Ask for something of a job; return the revision at which it is written.

        Raises:
            DtrainError: no such job, it has ended, or no replica could write.
        """
        if action not in ACTIONS:
            raise Refused(ErrorCode.USAGE, f"{action!r} is not known", fix=f"use one of {', '.join(ACTIONS)}")
        if action == "scale" and not 1 <= nodes[0] <= nodes[1]:
            raise Refused(ErrorCode.USAGE, f"{nodes[0]} to {nodes[1]} machines cannot be", fix="use MIN:MAX")
        request = pb.SetIntentRequest(
            job=job,
            wanted=WANTED.get(action, ""),
            checkpoint_token=secrets.token_hex(8) if action == "checkpoint" else "",
            by=self._by,
            nnodes_min=nodes[0] if action == "scale" else 0,
            nnodes_max=nodes[1] if action == "scale" else 0,
            pause=action if action in ("pause", "unpause") else "",
        )
        reply = await self._run(lambda stub: stub.SetIntent(request, timeout=CALL_S))
        return int(reply.revision)

    async def cordon(self, agent: str, reason: str, *, drain: bool) -> int:
        """Keep new ranks off a machine; with ``drain`` move those that it has."""
        request = pb.CordonRequest(agent=agent, reason=reason, by=self._by, drain=drain)
        return int((await self._run(lambda stub: stub.Cordon(request, timeout=CALL_S))).revision)

    async def uncordon(self, agent: str) -> int:
        """Let ranks on a machine again."""
        request = pb.UncordonRequest(agent=agent)
        return int((await self._run(lambda stub: stub.Uncordon(request, timeout=CALL_S))).revision)

    async def log(self, job: str, rank: int, stream: str, *, attempt: int, offset: int) -> dict[str, Any]:
        """Return a part of a rank's log, from ``offset`` on; negative: so much before its end."""
        request = pb.JobLogRequest(
            job=job, attempt=attempt, rank=rank, stream=stream, offset=offset, bytes_max=LOG_BYTES_MAX
        )
        reply = await self._run(lambda stub: stub.ReadLog(request, timeout=CALL_S))
        return {
            "text": reply.data.decode(errors="replace"),
            "next_offset": reply.next_offset,
            "attempt": reply.attempt,
            "agent": reply.agent,
            "eof": reply.eof,
        }

    async def series(self, job: str) -> dict[str, Any]:
        """Return what a job's first rank has reported, by name: (epoch seconds, step, value), in order."""
        request = pb.JobSeriesRequest(job=job, points_max=POINTS_MAX)
        reply = await self._run(lambda stub: stub.Series(request, timeout=CALL_S))
        found: dict[str, list[tuple[float, int, float]]] = {}
        for curve in reply.curves:
            found.setdefault(curve.name, []).extend(zip(curve.at, curve.step, curve.value, strict=False))
        return {
            "series": {name: _drawn(points) for name, points in found.items()},
            "note": "; ".join(reply.problems[:PROBLEMS_SHOWN]),
        }

    async def infos(self, replicas: dict[str, str]) -> dict[str, Any]:
        """Return what each replica says of itself, by name; of one that does not answer, why."""
        asked = {name: self._one(address, _info) for name, address in replicas.items()}
        answers = await asyncio.gather(*asked.values(), return_exceptions=True)
        return {
            name: {"problem": answer.message} if isinstance(answer, DtrainError) else answer
            for name, answer in zip(asked, answers, strict=True)
            if isinstance(answer, DtrainError | dict)
        }

    def close(self) -> None:
        """End all connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for _, channel in self._channels.values():
                channel.close()

    async def _run(self, call: Callable[[Any], T]) -> T:
        last: DtrainError = Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            "no coordinator is known to be up",
            fix="see whether etcd and the coordinators run",
        )
        for address in self._addresses():
            try:
                return await self._one(address, call)
            except (Unavailable, OutcomeUnknown) as error:
                # All calls may be repeated: another replica answers as well.
                last = error
        raise last

    async def _one(self, address: str, call: Callable[[Any], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._call, address, call)

    def _call(self, address: str, call: Callable[[Any], T]) -> T:
        try:
            return call(CoordinatorStub(self._channel(address)))  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise error_of(error, address) from error

    def _channel(self, address: str) -> grpc.Channel:
        generation = self._tls.generation if self._tls is not None else 0
        with self._lock:
            known = self._channels.get(address)
            if known is not None and known[0] == generation:
                return known[1]
            if len(self._channels) >= CHANNELS_MAX:
                _, (_, oldest) = self._channels.popitem()
                oldest.close()
            channel = grpc_tls.to_coordinator(address, self._tls, _OPTIONS)
            self._channels[address] = (generation, channel)
            return channel


def _drawn(points: list[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    """As many as a chart has room for, with as many digits as can be seen; the newest is one of them."""
    points.sort()
    width = max(1, -(-len(points) // DRAWN_MAX))
    kept = points[::-width][::-1]
    return [(round(at, 2), step, float(f"{value:.5g}")) for at, step, value in kept]


def _info(stub: Any) -> dict[str, Any]:
    reply = stub.Info(pb.InfoRequest(), timeout=CALL_S)
    return {
        "leader": reply.leader,
        "term": reply.term,
        "revision": reply.revision,
        "mirror_age_s": reply.mirror_age_s,
        "problems": list(reply.problems),
        "etcd_version": reply.etcd_version,
    }
