"""What verbs read, in one place: lists as rows, one job or agent, everything."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from dtrain.cli import records
from dtrain.cli.answers import Reading
from dtrain.cli.client import Client
from dtrain.cli.records import Agent, Cluster, Job
from dtrain.protocol import codec, rows
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.rows import AgentRow, JobRow

R = TypeVar("R")

READ_ALONE_MAX = 8
"""So many jobs are read one by one; more of them with all others, in one go."""


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
    cluster = everything(client, after_revision=after_revision, wait_s=wait_s)
    made = rows.in_queue([job.row(time.time()) for job in cluster.jobs.values()])
    return Listed(tuple(made), cluster.revision, cluster.age_s)


def agents(client: Client, *, after_revision: int = 0, wait_s: float = 0.0) -> Listed[AgentRow]:
    """One row for each agent."""
    found = _listed(client, "agents", AgentRow, after_revision, wait_s)
    if found is not None:
        return found
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


def everything(client: Client, *, after_revision: int = 0, wait_s: float = 0.0) -> Cluster:
    """Jobs and agents, with snapshots."""
    jobs = client.read("jobs/", after_revision=after_revision, wait_s=wait_s)
    agents, cordons = client.read("agents/"), client.read("cordons/")
    return records.group(jobs, agents, cordons)


def some(client: Client, names: Sequence[str]) -> Cluster:
    """The jobs of these full names, with snapshots; one that has gone since is left out."""
    if len(names) > READ_ALONE_MAX:
        cluster = everything(client)
        cluster.jobs = {name: cluster.jobs[name] for name in names if name in cluster.jobs}
        return cluster
    own = [client.read(f"jobs/{name}/") for name in names]
    agents = client.read("agents/")
    return records.group(*own, *(_of_job(agents, name) for name in names), _no_items(agents))


def job(client: Client, wanted: str) -> tuple[Job, Cluster]:
    """The job that ``wanted`` names, and what was read with it.

    Raises:
        NotFound, Refused: no such job, or several.
    """
    exact = name(client, wanted)
    cluster = some(client, [exact])
    return cluster.jobs[records.find(cluster.jobs, exact, "job")], cluster


def name(client: Client, wanted: str) -> str:
    """The full name of a job, given it or its unique beginning."""
    return records.find((row.name for row in jobs(client).rows), wanted, "job")


def agent(client: Client, wanted: str) -> tuple[Agent, Cluster]:
    """The agent that ``wanted`` names, and what was read with it."""
    agents = client.read("agents/")
    cluster = records.group(agents, client.read("cordons/"), client.read("suspicions/"))
    return cluster.agents[records.find(cluster.agents, wanted, "agent")], cluster


def one(client: Client, exact: str, *, after_revision: int = 0, wait_s: float = 0.0) -> tuple[Job, int]:
    """One job by its full name with its snapshots, and the revision of it.

    Raises:
        NotFound: it does not exist (any more).
    """
    own = client.read(f"jobs/{exact}/", after_revision=after_revision, wait_s=wait_s)
    cluster = records.group(own, _of_job(client.read("agents/"), exact))
    return cluster.jobs[records.find(cluster.jobs, exact, "job")], own.revision


def coordinators(client: Client) -> Cluster:
    """Replicas and the leader."""
    return records.group(client.read("coordinators/"), client.read("leader"))


def _of_job(agents: Reading, name: str) -> Reading:
    """The snapshots of one job among all: those of a thousand machines need not be decoded for it."""
    end = f"/workers/{name}"
    return replace(agents, items=tuple(item for item in agents.items if item.key.endswith(end)))


def _no_items(reading: Reading) -> Reading:
    return replace(reading, items=())
