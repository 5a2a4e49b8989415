"""What verbs read, in one place: a job, the fleet, everything."""

from dtrain.cli import records
from dtrain.cli.client import Client
from dtrain.cli.records import Agent, Cluster, Job


def everything(client: Client, *, after_revision: int = 0, wait_s: float = 0.0) -> Cluster:
    """Jobs and agents, with snapshots."""
    jobs = client.read("jobs/", after_revision=after_revision, wait_s=wait_s)
    agents, cordons = client.read("agents/"), client.read("cordons/")
    return records.group(jobs, agents, cordons)


def job(client: Client, wanted: str) -> tuple[Job, Cluster]:
    """The job that ``wanted`` names, and what was read with it.

    Raises:
        NotFound, Refused: no such job, or several.
    """
    cluster = everything(client)
    return cluster.jobs[records.find(cluster.jobs, wanted, "job")], cluster


def name(client: Client, wanted: str) -> str:
    """The full name of a job, given it or its unique beginning."""
    cluster = records.group(client.read("jobs/"))
    return records.find(cluster.jobs, wanted, "job")


def agent(client: Client, wanted: str) -> tuple[Agent, Cluster]:
    """The agent that ``wanted`` names, and what was read with it."""
    jobs, agents = client.read("jobs/"), client.read("agents/")
    cluster = records.group(jobs, agents, client.read("cordons/"), client.read("suspicions/"))
    return cluster.agents[records.find(cluster.agents, wanted, "agent")], cluster


def one(client: Client, exact: str, *, after_revision: int = 0, wait_s: float = 0.0) -> tuple[Job, int]:
    """One job by its full name with its snapshots, and the revision of it.

    Raises:
        NotFound: it does not exist (any more).
    """
    own = client.read(f"jobs/{exact}/", after_revision=after_revision, wait_s=wait_s)
    cluster = records.group(own, client.read("agents/"))
    return cluster.jobs[records.find(cluster.jobs, exact, "job")], own.revision


def coordinators(client: Client) -> Cluster:
    """Replicas and the leader."""
    return records.group(client.read("coordinators/"), client.read("leader"))
