"""The stacks of all ranks of a job, gathered from the agents that they run on."""

import grpc

from dtrain.coordinator.api import asking
from dtrain.coordinator.api.lookup import Lookup
from dtrain.coordinator.dispatch import Channels
from dtrain.protocol.errors import ErrorCode, NotFound, Unavailable
from dtrain.protocol.ids import (
    AgentName,
)
from dtrain.protocol.job import JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as agent_pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.snapshot import NodeRecord
from dtrain.runtime import log

STACKS_DEADLINE_S = 10.0
STACKS_BYTES_MAX = 16 * 1024 * 1024
"""Of all ranks together; the whole is in their log folders."""
AGENTS_ASKED_MAX = 256


class StackDesk:
    """Asks agents. Safe for several threads."""

    def __init__(self, channels: Channels, keys: Keys, lookup: Lookup) -> None:
        self._channels = channels
        self._keys = keys
        self._lookup = lookup
        self._log = log.get("api")

    def collect(
        self, spec: JobSpec, status: JobStatus | None, context: grpc.ServicerContext
    ) -> pb.JobStacksReply:
        """Return what every rank does now; of machines that do not answer, why.

        Raises:
            NotFound: no rank of it runs.
            Unavailable: AGENT_UNAVAILABLE; the caller has gone.
        """
        if status is None or not status.members:
            raise NotFound(ErrorCode.NOT_FOUND, f"no rank of job {spec.name} runs now")
        asked = agent_pb.StacksRequest(job=spec.name, uid=spec.uid)
        calls, problems = [], []
        for member in status.members[:AGENTS_ASKED_MAX]:
            node = self._lookup.record(self._keys.node(member.agent), NodeRecord)
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
        self._log.info("stacks collected", job=spec.name, ranks=len(found), problems=len(problems))
        return pb.JobStacksReply(ranks=sorted(found, key=lambda one: one.rank), problems=problems)


def _rank_stacks(
    agent: AgentName, one: agent_pb.StacksReply.RankStacks, room: int
) -> pb.JobStacksReply.RankStacks:
    return pb.JobStacksReply.RankStacks(
        rank=one.rank, agent=agent, kind=one.kind, where=one.where, text=one.text[:room]
    )
