"""What a job's ranks reported over time, gathered from the agents that remember it.

The first rank of the present attempt is on one machine, those of earlier
attempts may have been on others. All agents are asked once; later only those
that had something, and the machine of rank 0. Attempts that no agent remembers
are read from the archive.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from dtrain.coordinator.api import asking
from dtrain.coordinator.api.archived import ArchivedLogs
from dtrain.coordinator.dispatch import Channels
from dtrain.protocol import curves
from dtrain.protocol.curves import Curve
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import AgentName, Attempt
from dtrain.protocol.job import JobSpec, JobStatus
from dtrain.protocol.pb import agent_pb2 as agent_pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.pb import coordinator_pb2 as pb

DEADLINE_S = 2.0
AGENTS_ASKED_MAX = 256
PLACES_MAX = 16
"""Machines of one job that are asked each time."""

JOBS_KEPT = 1024
ATTEMPTS_MAX = 8
"""Newest ones that are looked for in the archive."""
ARCHIVE_AGAIN_S = 30.0
ARCHIVED_KEPT = 256
"""Attempts whose archived curves are remembered."""
POINTS_MAX = 1000


class Curves:
    """Asks agents. Safe for several threads. ``nodes`` returns the addresses of the agents that live."""

    def __init__(
        self,
        channels: Channels,
        nodes: Callable[[], Mapping[AgentName, str]],
        archive: ArchivedLogs,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channels = channels
        self._archive = archive
        self._monotonic = monotonic
        self._nodes = nodes
        self._lock = threading.Lock()
        self._known: OrderedDict[str, OrderedDict[AgentName, None]] = OrderedDict()
        self._archived: OrderedDict[tuple[str, int], tuple[float, Sequence[Curve]]] = OrderedDict()

    def read(
        self, spec: JobSpec, status: JobStatus, points_max: int, context: grpc.ServicerContext
    ) -> pb.JobSeriesReply:
        """Return each number of each attempt once: as its lowest rank that is remembered reported it."""
        nodes = self._nodes()
        asked = agent_pb.SeriesRequest(
            job=spec.name, uid=spec.uid, points_max=min(points_max or POINTS_MAX, POINTS_MAX)
        )
        calls: list[tuple[AgentName, Any]] = []
        for agent in self._whom(spec, status, nodes):
            stub = agent_pb2_grpc.AgentStub(self._channels.get(agent, nodes[agent]))  # type: ignore[no-untyped-call]
            calls.append((agent, stub.Series.future(asked, timeout=DEADLINE_S)))
        context.add_callback(lambda: asking.cancel(calls))
        best: dict[tuple[int, str], tuple[AgentName, agent_pb.SeriesReply.Curve]] = {}
        problems = []
        for agent, call in calls:
            try:
                found = call.result().curves
            except grpc.FutureCancelledError:
                break
            except grpc.RpcError as error:
                problems.append(_problem(agent, error))
                continue
            if found:
                self._remember(spec.uid, agent)
            for curve in found:
                known = best.get((curve.attempt, curve.name))
                if known is None or curve.rank < known[1].rank:
                    best[curve.attempt, curve.name] = (agent, curve)
        heard = {attempt for attempt, _ in best}
        newest = range(max(1, status.attempt - ATTEMPTS_MAX + 1), status.attempt + 1)
        try:
            archived = [
                one for n in newest if n not in heard for one in self._from_archive(spec, status, Attempt(n))
            ]
        except DtrainError as error:
            archived = []
            problems.append(f"the archive could not be read: {error.message}")
        live = [
            pb.JobSeriesReply.Curve(
                name=curve.name,
                attempt=curve.attempt,
                rank=curve.rank,
                agent=agent,
                at=curve.at,
                step=curve.step,
                value=curve.value,
            )
            for _, (agent, curve) in sorted(best.items())
        ]
        old = [_from_archived(curve, asked.points_max) for curve in archived]
        return pb.JobSeriesReply(curves=[*old, *live], problems=problems)

    def _from_archive(self, spec: JobSpec, status: JobStatus, attempt: Attempt) -> Sequence[Curve]:
        """What the machine of rank 0 wrote down in an attempt; the answer holds for a while."""
        if not status.store:
            return ()
        now, key = self._monotonic(), (str(spec.uid), int(attempt))
        with self._lock:
            at, known = self._archived.get(key, (float("-inf"), ()))
        if now - at < ARCHIVE_AGAIN_S:
            return known
        part = self._archive.read(
            status.store,
            spec.name,
            spec.uid,
            attempt=attempt,
            name=f"kept/{curves.ARCHIVED_NAME}",
            offset=-2 * curves.LINE_BYTES_MAX,
            bytes_max=2 * curves.LINE_BYTES_MAX,
        )
        found = () if part is None else tuple(curves.newest(part.data))
        with self._lock:
            self._archived[key] = (now, found)
            self._archived.move_to_end(key)
            while len(self._archived) > ARCHIVED_KEPT:
                self._archived.popitem(last=False)
        return found

    def _whom(self, spec: JobSpec, status: JobStatus, nodes: Mapping[AgentName, str]) -> Sequence[AgentName]:
        with self._lock:
            known = self._known.get(spec.uid)
            wanted = list(known) if known is not None else list(nodes)[:AGENTS_ASKED_MAX]
        first = min(status.members, key=lambda member: member.first_rank, default=None)
        if first is not None and first.agent not in wanted:
            wanted.insert(0, first.agent)
        return [agent for agent in wanted if agent in nodes]

    def _remember(self, uid: str, agent: AgentName) -> None:
        with self._lock:
            places = self._known.setdefault(uid, OrderedDict())
            self._known.move_to_end(uid)
            places[agent] = None
            places.move_to_end(agent)
            while len(places) > PLACES_MAX:
                places.popitem(last=False)
            while len(self._known) > JOBS_KEPT:
                self._known.popitem(last=False)


def _from_archived(curve: Curve, points_max: int) -> pb.JobSeriesReply.Curve:
    # Every so many, counted from the newest: a chart has no room for more.
    points = curve.points[:: -max(1, -(-len(curve.points) // points_max))][::-1]
    return pb.JobSeriesReply.Curve(
        name=curve.name,
        attempt=curve.attempt,
        rank=curve.rank,
        at=[at for at, _, _ in points],
        step=[step for _, step, _ in points],
        value=[value for _, _, value in points],
    )


def _problem(agent: AgentName, error: grpc.RpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return f"agent {agent} is of a release that keeps no series: upgrade it"
    return f"agent {agent} did not answer: {error.details() or error.code().name}"
