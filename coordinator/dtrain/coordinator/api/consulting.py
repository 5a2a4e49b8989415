"""What a replica tells an agent that cannot reach etcd about its jobs: from the mirror, however old it is.

The agent judges by the mirror's age.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import AgentName, JobName, parse_name
from dtrain.protocol.job import TERMINAL_PHASES, JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.storage.etcd.port import KeyValue

T = TypeVar("T")

JOBS_CONSULTED_MAX = 1024


class Records(Protocol):
    """What is asked of the mirror."""

    @property
    def get(self) -> Callable[[str], KeyValue | None]:
        """One record; None: there is none."""

    @property
    def age_s(self) -> Callable[[], float]:
        """How old what it knows may be."""


def answer(mirror: Records, keys: Keys, request: pb.ConsultRequest) -> pb.ConsultReply:
    """Return how each of the jobs stands that an agent asks about.

    Raises:
        Refused: USAGE, BAD_NAME; no agent asks this way.
    """
    if len(request.jobs) > JOBS_CONSULTED_MAX:
        raise Refused(ErrorCode.USAGE, f"an agent asks about {JOBS_CONSULTED_MAX} jobs at most")
    # Before the records: they may be newer than it says, never older.
    age_s = mirror.age_s()
    agent = AgentName(parse_name(request.agent, "agent"))
    return pb.ConsultReply(
        etcd_age_s=age_s if math.isfinite(age_s) else -1.0,
        jobs=[_standing(mirror, keys, agent, part) for part in request.jobs],
    )


def _standing(mirror: Records, keys: Keys, agent: AgentName, part: pb.JobPart) -> pb.JobStanding:
    job = JobName(parse_name(part.job, "job"))
    try:
        spec = _record(mirror, keys.spec(job), JobSpec)
        status = _record(mirror, keys.status(job), JobStatus)
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


def _record(mirror: Records, key: str, kind: type[T]) -> T | None:
    kv = mirror.get(key)
    return None if kv is None else codec.decode(kind, kv.value)
