"""What verbs read of the records, in one place: one job or agent, some, everything. Rows: ``listing.py``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from dtrain.cli import listing, naming, records
from dtrain.cli.answers import Reading
from dtrain.cli.client import Client
from dtrain.cli.records import Agent, Cluster, Job

R = TypeVar("R")

READ_ALONE_MAX = 8
"""So many jobs are read one by one; more of them with all others, in one go."""


def everything(
    client: Client, *, after_revision: int = 0, wait_s: float = 0.0, history: bool = True
) -> Cluster:
    """Jobs and agents, with snapshots; ``history`` as in ``records.group``."""
    jobs = client.read("jobs/", after_revision=after_revision, wait_s=wait_s)
    agents, cordons = client.read("agents/"), client.read("cordons/")
    return records.group(jobs, agents, cordons, history=history)


def some(client: Client, names: Sequence[str], *, history: bool = True) -> Cluster:
    """The jobs of these full names, with snapshots; one that has gone since is left out."""
    if len(names) > READ_ALONE_MAX:
        cluster = everything(client, history=history)
        cluster.jobs = {name: cluster.jobs[name] for name in names if name in cluster.jobs}
        return cluster
    own = [client.read(f"jobs/{name}/") for name in names]
    agents = client.read("agents/")
    found = (*own, *(_of_job(agents, name) for name in names), _no_items(agents))
    return records.group(*found, history=history)


def job(client: Client, wanted: str) -> tuple[Job, Cluster]:
    """The job that ``wanted`` names, and what was read with it.

    Raises:
        NotFound, Refused: no such job, or several.
    """
    exact = name(client, wanted)
    cluster = some(client, [exact])
    return cluster.jobs[naming.find(cluster.jobs, exact, "job")], cluster


def name(client: Client, wanted: str) -> str:
    """The full name of a job, given it or its unique beginning."""
    return naming.find((row.name for row in listing.jobs(client).rows), wanted, "job")


def agent(client: Client, wanted: str) -> tuple[Agent, Cluster]:
    """The agent that ``wanted`` names, and what was read with it."""
    agents = client.read("agents/")
    cluster = records.group(agents, client.read("cordons/"), client.read("suspicions/"))
    return cluster.agents[naming.find(cluster.agents, wanted, "agent")], cluster


def one(client: Client, exact: str, *, after_revision: int = 0, wait_s: float = 0.0) -> tuple[Job, int]:
    """One job by its full name with its snapshots, and the revision of it.

    Raises:
        NotFound: it does not exist (any more).
    """
    own = client.read(f"jobs/{exact}/", after_revision=after_revision, wait_s=wait_s)
    cluster = records.group(own, _of_job(client.read("agents/"), exact))
    return cluster.jobs[naming.find(cluster.jobs, exact, "job")], own.revision


def coordinators(client: Client) -> Cluster:
    """Replicas and the leader."""
    return records.group(client.read("coordinators/"), client.read("leader"))


def _of_job(agents: Reading, name: str) -> Reading:
    """The snapshots of one job among all: those of a thousand machines need not be decoded for it."""
    end = f"/workers/{name}"
    return replace(agents, items=tuple(item for item in agents.items if item.key.endswith(end)))


def _no_items(reading: Reading) -> Reading:
    return replace(reading, items=())
