"""What ``get`` lists: one row for each job, agent, replica or event. Pure: ``now`` is an argument."""

from collections.abc import Iterable, Sequence

from dtrain.cli.durations import show_s
from dtrain.cli.records import Agent, Cluster, Job, Replica
from dtrain.cli.render.sentences import reason, restarts
from dtrain.cli.render.table import UNKNOWN, Table, ago
from dtrain.protocol.events import EventRecord
from dtrain.protocol.job import JobPhase

STALE_S = 10.0
"""An idle etcd tells its watchers every 5 s that nothing is missing: younger than that means nothing."""

PHASE_COLOURS = {
    JobPhase.RUNNING: "green",
    JobPhase.SUCCEEDED: "green",
    JobPhase.FAILED: "red",
    JobPhase.RECOVERING: "yellow",
    JobPhase.CANCELLING: "yellow",
}
"""Colour of a phase on a terminal."""


def jobs(cluster: Cluster, now: float, *, wide: bool = False) -> Table:
    """``get jobs``."""
    headings = ("NAME", "PHASE", "STEP", "ATTEMPT", "RANKS", "LAST-CKPT", "AGE")
    extra = ("UID", "MEMBERS", "RESTARTS", "PRIORITY")
    rows = []
    for job in cluster.jobs.values():
        submitted = job.spec.submitted_at if job.spec else ""
        row: tuple[str, ...] = (
            job.name,
            str(job.phase),
            str(job.step),
            str(job.attempt),
            _ranks(job),
            f"{job.latest.seq} (step {job.latest.step})" if job.latest else UNKNOWN,
            ago(submitted, now),
        )
        if wide:
            row += (
                (job.spec.uid if job.spec else "") or UNKNOWN,
                ",".join(member.agent for member in job.status.members) if job.status else UNKNOWN,
                restarts(job, now),
                str(job.spec.priority) if job.spec else UNKNOWN,
            )
        rows.append((*row, reason(job)))
    return Table((*headings, *(extra if wide else ()), "REASON"), tuple(rows))


def agents(cluster: Cluster, now: float, *, wide: bool = False) -> Table:
    """``get agents``."""
    headings = ("NAME", "STATUS", "SLOTS", "JOBS", "VERSION", "SINCE")
    extra = ("ADDRESS", "HOST", "GPUS", "INCARNATION")
    rows = []
    for agent in cluster.agents.values():
        node = agent.node
        busy = sum(len(_live(snapshot.ranks)) for snapshot in agent.workers.values())
        row: tuple[str, ...] = (
            agent.name,
            agent_status(agent),
            f"{busy}/{node.slots}" if node else UNKNOWN,
            ",".join(agent.workers) or UNKNOWN,
            (node.version if node else "") or UNKNOWN,
            ago(node.since, now) if node else UNKNOWN,
        )
        if wide:
            row += (
                (node.address, node.host, str(node.gpus), node.incarnation)
                if node
                else (UNKNOWN,) * len(extra)
            )
        rows.append((*row, agent_reason(agent)))
    return Table((*headings, *(extra if wide else ()), "REASON"), tuple(rows))


def coordinators(
    cluster: Cluster, ages_s: dict[str, float | None], now: float, *, wide: bool = False
) -> Table:
    """``get coordinators``; ``ages_s`` has the mirror's age by replica, None for no answer."""
    headings = ("NAME", "ROLE", "TERM", "ADDRESS", "VERSION", "MIRROR-AGE", "SINCE")
    rows = []
    for replica in sorted(cluster.replicas.values(), key=lambda replica: replica.name):
        record, mirror_age_s = replica.record, ages_s.get(replica.name)
        row: tuple[str, ...] = (
            replica.name,
            "leader" if replica.term else "standby",
            str(replica.term) if replica.term else UNKNOWN,
            record.address if record else UNKNOWN,
            (record.version if record else "") or UNKNOWN,
            UNKNOWN if mirror_age_s is None else show_s(mirror_age_s),
            ago(record.since, now) if record else UNKNOWN,
        )
        rows.append((*row, *((record.host, str(record.pid)) if record else ("", ""))) if wide else row)
    return Table((*headings, *(("HOST", "PID") if wide else ())), tuple(rows))


def events(found: Iterable[tuple[str, EventRecord]], now: float, *, wide: bool = False) -> Table:
    """``get events``, oldest first; pairs of job name and event."""
    rows = []
    for job, event in sorted(found, key=lambda pair: (pair[1].last or pair[1].first, pair[0], pair[1].seq)):
        about = f"job/{job}" + (f" {event.object}" if event.object else "")
        row = (
            ago(event.last or event.first, now),
            str(event.type),
            str(event.reason),
            about,
            str(event.count),
        )
        rows.append((*row, *((str(event.attempt), str(event.term)) if wide else ()), event.message))
    extra = ("ATTEMPT", "TERM") if wide else ()
    return Table(("TIME", "TYPE", "REASON", "OBJECT", "COUNT", *extra, "MESSAGE"), tuple(rows))


def problem_lines(found: dict[str, tuple[str, ...]]) -> list[str]:
    """What replicas say is wrong, by replica; what several say is one line."""
    by_sentence: dict[str, list[str]] = {}
    for name in sorted(found):
        for sentence in found[name]:
            by_sentence.setdefault(sentence, []).append(name)
    return [f"PROBLEM ({', '.join(names)}): {sentence}" for sentence, names in by_sentence.items()]


def stale_line(mirror_age_s: float) -> str:
    """The warning that reads carry when the replica's mirror is old; "" when it is not."""
    return f"mirror is {show_s(mirror_age_s)} old: etcd unreachable" if mirror_age_s > STALE_S else ""


def agent_status(agent: Agent) -> str:
    """Ready, Draining, Cordoned, Blocked (something on it does not die), or Lost (no lease).

    Draining: it is about to end, or an operator wants it empty and it is not yet.
    """
    if agent.node is None:
        return "Lost"
    if agent.node.draining is not None:
        return "Draining"
    if agent.node.problem:
        return "Blocked"
    if agent.cordon is None:
        return "Ready"
    return "Draining" if agent.cordon.drain and agent.workers else "Cordoned"


def agent_reason(agent: Agent) -> str:
    """Why it is not simply Ready."""
    node = agent.node
    draining = node.draining if node else None
    if draining is not None:
        return f"{draining.reason}: it waits for at most {show_s(draining.grace_s)} for its jobs to move"
    return (node.problem if node else "") or (agent.cordon.reason if agent.cordon else "")


def replica_of(cluster: Cluster, address: str) -> Replica | None:
    """The replica that serves at ``address``."""
    return next(
        (
            replica
            for replica in cluster.replicas.values()
            if replica.record and replica.record.address == address
        ),
        None,
    )


def names(kind: str, found: Sequence[str]) -> list[str]:
    """Lines of ``-o name``."""
    return [f"{kind}/{name}" for name in found]


def _ranks(job: Job) -> str:
    live = len(_live(state for _, state in job.ranks.values()))
    return f"{live}/{job.world_size}" if not job.finished else str(job.world_size)


def _live(states: Iterable[object]) -> list[object]:
    return [state for state in states if getattr(state, "exit_code", None) is None]
