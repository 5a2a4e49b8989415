"""Lists as rows, made by the replica that answers.

What decodes records is loaded only where a replica of the former release makes no
rows: a list of hundreds of jobs has to be there before anybody notices.
"""

import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from dtrain.cli.client import Client
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.rows import AgentRow, JobRow

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Listed(Generic[R]):
    """Rows of a list, and how fresh they are."""

    rows: tuple[R, ...]
    revision: int
    age_s: float
    unreadable: int = 0
    """Rows of a newer release that this one cannot read."""


def jobs(client: Client, *, after_revision: int = 0, wait_s: float = 0.0) -> Listed[JobRow]:
    """One row for each job."""
    found = _listed(client, "jobs", JobRow, after_revision, wait_s)
    if found is not None:
        return found
    from dtrain.cli import reading
    from dtrain.protocol import summaries

    cluster = reading.everything(client, after_revision=after_revision, wait_s=wait_s)
    made = summaries.in_queue([job.row(time.time()) for job in cluster.jobs.values()])
    return Listed(tuple(made), cluster.revision, cluster.age_s)


def agents(client: Client, *, after_revision: int = 0, wait_s: float = 0.0) -> Listed[AgentRow]:
    """One row for each agent."""
    found = _listed(client, "agents", AgentRow, after_revision, wait_s)
    if found is not None:
        return found
    from dtrain.cli import records

    agents = client.read("agents/", after_revision=after_revision, wait_s=wait_s)
    cluster = records.group(agents, client.read("cordons/"))
    made = tuple(agent.row for agent in cluster.agents.values())
    return Listed(made, cluster.revision, cluster.age_s)


def _listed(client: Client, kind: str, row: type[R], after_revision: int, wait_s: float) -> Listed[R] | None:
    """What the replica makes of its records; None: it is of a release that makes no rows."""
    try:
        reply = client.list(kind, after_revision=after_revision, wait_s=wait_s)
    except Refused as error:
        if error.code is not ErrorCode.OLDER_RELEASE:
            raise
        return None
    made, unreadable = [], 0
    for encoded in reply.rows:
        try:
            made.append(codec.decode(row, encoded))
        except DtrainError:
            unreadable += 1
    return Listed(tuple(made), reply.revision, reply.age_s, unreadable)
