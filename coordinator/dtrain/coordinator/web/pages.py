"""What each page shows, as named parts. Pure.

A page is a mapping of part names to JSON values. Whoever follows it is sent the
parts that changed, so a part is what changes together: one row, one head. Rows
are paged here: a browser gets what it shows, however large the cluster is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dtrain.coordinator.web.records import Agent, Cluster, Job
from dtrain.protocol import codec, moving, standing
from dtrain.protocol.events import EventRecord
from dtrain.protocol.job import JobPhase, JobSpec
from dtrain.protocol.rows import Movement
from dtrain.protocol.snapshot import RankState, WorkerSnapshot
from dtrain.runtime import redact

Json = Any
Parts = dict[str, Json]

ROWS_MAX = 100
"""Rows of one page of a list."""

FAILED = frozenset({JobPhase.FAILED, JobPhase.CANCELLED})
ACTIVE = frozenset(JobPhase) - {JobPhase.FAILED, JobPhase.CANCELLED, JobPhase.SUCCEEDED}

TEXT_CHARACTERS_MAX = 4000
METRICS_SHOWN = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """What somebody looks at. ``page``: jobs, job, agents, replicas or checkpoints."""

    page: str
    name: str = ""
    phase: str = ""
    """``active``, ``failed``, a phase, or "" for all; of agents, their status."""
    text: str = ""
    """Only names that contain it."""
    sort: str = ""
    offset: int = 0
    limit: int = ROWS_MAX

    def __post_init__(self) -> None:
        if self.page not in PAGES:
            raise ValueError(f"there is no page {self.page!r}")
        if not 0 <= self.offset <= 10**7 or not 1 <= self.limit <= ROWS_MAX:
            raise ValueError(f"a page has 1 to {ROWS_MAX} rows")


def parts(cluster: Cluster, query: Query) -> Parts:
    """Return what ``query`` asks for, beside what every page shows."""
    return {"cluster": _cluster(cluster), **PAGES[query.page](cluster, query)}


def _cluster(cluster: Cluster) -> Json:
    phases: dict[str, int] = {}
    for job in cluster.jobs.values():
        phases[job.phase.value] = phases.get(job.phase.value, 0) + 1
    return {
        "leader": cluster.leader.replica if cluster.leader else "",
        "term": cluster.term,
        "since": cluster.leader.since if cluster.leader else "",
        "jobs": phases,
        "agents": sum(agent.node is not None for agent in cluster.agents.values()),
        "replicas": {
            name: record.dashboard if record else "" for name, record in sorted(cluster.replicas.items())
        },
    }


# Jobs.


def _jobs(cluster: Cluster, query: Query) -> Parts:
    chosen = [job for job in cluster.jobs.values() if query.text in job.name and _fits(job, query.phase)]
    keys: dict[str, Callable[[Job], Any]] = {
        "name": lambda job: job.name,
        "phase": lambda job: (list(JobPhase).index(job.phase), job.name),
        "step": lambda job: (-job.progress()[0], job.name),
        "attempt": lambda job: (-job.attempt, job.name),
    }
    if query.sort in keys:
        chosen.sort(key=keys[query.sort])
    else:
        chosen.sort(key=lambda job: (_submitted(job), job.name), reverse=True)
    return _rows(chosen, query, lambda job: job.name, job_row)


def _fits(job: Job, phase: str) -> bool:
    if phase == "active":
        return job.phase in ACTIVE
    if phase == "failed":
        return job.phase in FAILED or (job.status is not None and job.status.failure is not None)
    return not phase or job.phase.value == phase.upper()


def _submitted(job: Job) -> str:
    return job.spec.submitted_at if job.spec else ""


def job_row(job: Job) -> Json:
    """One job in a list."""
    step, live = job.progress()
    latest, spec = job.latest, job.spec
    return {
        "name": job.name,
        "phase": job.phase.value,
        "step": step,
        "attempt": job.attempt,
        "live": live,
        "world": job.world_size,
        "latest": {"seq": latest.seq, "step": latest.step} if latest else None,
        "submitted_at": _submitted(job),
        "priority": spec.priority if spec else 0,
        "ledger": _ledger(job),
        "reason": _cut("; ".join(standing.sentences(job.status)), 300),
    }


def _ledger(job: Job) -> Json:
    """What a browser needs to tell the goodput at any time: what was spent, and what passes now counts as."""
    ledger = job.status.ledger if job.status else None
    if ledger is None:
        return None
    return {"spent": dict(ledger.spent), "doing": ledger.doing, "until_ms": ledger.until_ms}


# One job.


def _job(cluster: Cluster, query: Query) -> Parts:
    job = cluster.jobs.get(query.name)
    if job is None:
        return {"head": None}
    ranks = _ranks(job)
    if query.text:
        ranks = [row for row in ranks if query.text in (str(row["rank"]), row["agent"])]
    shown = ranks[query.offset : query.offset + query.limit]
    found: Parts = {
        "head": _head(job),
        "members": _members(job),
        "spec": _spec(job.spec),
        "ranks": {"total": len(ranks), "offset": query.offset, "order": [row["rank"] for row in shown]},
    }
    found |= {f"rank:{row['rank']}": row for row in shown}
    found |= {f"event:{seq}": event_row(event) for seq, event in job.events.items()}
    found |= {f"checkpoint:{row['seq']}": row for row in checkpoint_rows(job)}
    return found


def _head(job: Job) -> Json:
    status, spec, intent = job.status, job.spec, job.intent
    return job_row(job) | {
        "uid": spec.uid if spec else "",
        "since": status.since if status else "",
        "finished_at": status.finished_at if status else "",
        "finished": job.finished,
        "term": status.term if status else 0,
        "restarts": {
            "at": list(status.restarts) if status else [],
            "max": spec.restarts.max_restarts if spec else 0,
            "window_s": spec.restarts.window_s if spec else 0,
        },
        "nodes": list(job.nodes),
        "nproc": spec.nproc_per_node if spec else 0,
        "program": " ".join((spec.entry.target, *spec.entry.args)) if spec else "",
        "store": redact.url(status.store) if status else "",
        "restore": {"seq": status.restore.seq, "step": status.restore.step}
        if status and status.restore
        else None,
        "paused": bool(intent and spec and intent.uid == spec.uid and intent.paused),
        "wanted": intent.wanted.value if intent and spec and intent.uid == spec.uid else "run",
        "by": intent.by if intent and spec and intent.uid == spec.uid else "",
        "conditions": codec.to_json(status).get("conditions", []) if status else [],
        "failure": _failure(job),
        "moving": [codec.to_json(one) for one in _moving(job)],
    }


def _moving(job: Job) -> tuple[Movement, ...]:
    """Checkpoints on their way to the store or back."""
    if job.finished or job.status is None:
        return ()
    told = [moving.told(codec.to_json(snapshot)) for snapshot in job.workers.values()]
    return moving.movements(told, len(job.status.members))


def _failure(job: Job) -> Json:
    failure = job.status.failure if job.status else None
    if failure is None:
        return None
    document = codec.to_json(failure)
    document["message"] = _cut(failure.message, TEXT_CHARACTERS_MAX)
    document["log_tail"] = failure.log_tail[-TEXT_CHARACTERS_MAX:]
    document.pop("fingerprint", None)
    return document


def _members(job: Job) -> Json:
    workers = job.workers
    rows = []
    for member in job.status.members[:ROWS_MAX] if job.status else ():
        worker = workers.get(member.agent)
        rows.append(
            {
                "agent": member.agent,
                "node_rank": member.node_rank,
                "first_rank": member.first_rank,
                "nproc": member.nproc,
                "phase": worker.phase.value if worker else "",
                "note": _cut(" ".join(_notes(worker)), 400) if worker else "no report",
            }
        )
    return {"total": len(job.status.members) if job.status else 0, "rows": rows}


def _notes(worker: WorkerSnapshot) -> list[str]:
    stalls = [f"rank {stall.rank} completed no step after step {stall.step}." for stall in worker.stalls]
    stacks = [f"rank {stack.rank} is at {stack.where}." for stack in worker.stacks if stack.where]
    return [note for note in (worker.note, worker.warning) if note] + stalls[:4] + stacks[:4]


def _ranks(job: Job) -> list[dict[str, Json]]:
    """All ranks, those first that are behind."""
    known = job.ranks
    rows = []
    for member in job.status.members if job.status else ():
        for rank in range(member.first_rank, member.first_rank + member.nproc):
            if rank in known:
                rows.append(_rank_row(rank, *known[rank]))
            else:
                rows.append({"rank": rank, "agent": member.agent, "phase": "", "step": -1})
    return sorted(rows, key=lambda row: (row["step"], row["rank"]))


def _rank_row(rank: int, agent: str, state: RankState) -> dict[str, Json]:
    timing = state.timing
    return {
        "rank": rank,
        "agent": agent,
        "pid": state.pid,
        "phase": state.phase.value,
        "step": state.step,
        "exit_code": state.exit_code,
        "step_s": timing.step_s if timing else None,
        "data_s": timing.data_s if timing else None,
        "own_s": timing.own_s if timing else None,
        "metrics": dict(sorted(state.metrics.items())[:METRICS_SHOWN]),
        "nonfinite": list(state.nonfinite),
    }


def event_row(event: EventRecord) -> Json:
    """One event."""
    return {
        "seq": event.seq,
        "type": event.type.value,
        "reason": event.reason.value,
        "message": _cut(event.message, 600),
        "object": event.object,
        "attempt": event.attempt,
        "term": event.term,
        "count": event.count,
        "first": event.first,
        "last": event.last,
    }


def _spec(spec: JobSpec | None) -> Json:
    """The job file as stored, without what its environment may hide."""
    if spec is None:
        return None
    document = codec.to_json(spec)
    if spec.env:
        # Names only: a page is open to more people than a terminal, and any value may be a secret.
        document["env"] = dict.fromkeys(sorted(spec.env), redact.HIDDEN)
    return document


# Checkpoints.


def checkpoint_rows(job: Job) -> list[dict[str, Json]]:
    """All checkpoints of a job by number: committed, open, bad and those being deleted."""
    status, latest = job.status, job.latest
    pinned = set(job.pinned)
    if status and status.restore and not job.finished:
        pinned.add(int(status.restore.seq))
    verified, bad = job.verified, job.bad
    rows: dict[int, dict[str, Json]] = {}
    for seq, tomb in job.garbage.items():
        rows[seq] = {"state": "Deleting", "note": tomb.reason}
    for seq, opened in job.open.items():
        rows[seq] = {
            "state": "Open",
            "step": opened.step,
            "attempt": opened.attempt,
            "world": opened.world_size,
            "at": opened.opened_at,
            "note": "final" if opened.final else "",
        }
    for seq, record in job.commits.items():
        rows[seq] = {
            "state": "Bad" if seq in bad else "Committed",
            "step": record.step,
            "attempt": record.attempt,
            "world": record.world_size,
            "bytes": record.bytes,
            "at": record.committed_at,
            "term": record.term,
            "note": "final" if record.final else "",
        }
        if status and seq in status.passed_over:
            rows[seq]["note"] = "training was rolled back past it"
    for seq, damaged in bad.items():
        rows.setdefault(seq, {"state": "Bad", "at": damaged.at})
        rows[seq]["note"] = f"{damaged.blob} chunk {damaged.chunk}"
    for seq, row in rows.items():
        row |= {
            "seq": seq,
            "latest": latest is not None and seq == latest.seq,
            "pinned": seq in pinned,
            "verified_at": verified[seq].at if seq in verified else "",
        }
    return [rows[seq] for seq in sorted(rows)]


def _checkpoints(cluster: Cluster, query: Query) -> Parts:
    found = [
        row | {"job": job.name}
        for job in cluster.jobs.values()
        if query.text in job.name
        for row in checkpoint_rows(job)
        if not query.phase or row["state"].lower() == query.phase.lower()
    ]
    # Reversed twice by sort keys that differ in direction: newest first, then by name.
    found.sort(key=lambda row: (row["job"], -row["seq"]))
    if query.sort != "name":
        found.sort(key=lambda row: row.get("at", ""), reverse=True)
    return _rows(found, query, lambda row: f"{row['job']}/{row['seq']}", lambda row: row)


# Machines and replicas.


def _agents(cluster: Cluster, query: Query) -> Parts:
    chosen = [
        agent
        for agent in cluster.agents.values()
        if query.text in agent.name and (not query.phase or _agent_status(agent).lower() == query.phase)
    ]
    if query.sort == "status":
        chosen.sort(key=lambda agent: (_agent_status(agent), agent.name))
    return _rows(chosen, query, lambda agent: agent.name, lambda agent: agent_row(cluster, agent))


def _agent_status(agent: Agent) -> str:
    return standing.agent_status(agent.node, agent.cordon, has_work=bool(agent.workers))


def agent_row(cluster: Cluster, agent: Agent) -> Json:
    """One machine in a list."""
    node, cordon = agent.node, agent.cordon
    found = [cluster.decoder.facts(kv) for kv in agent.workers.values()]
    draining = node.draining if node else None
    reason = f"{draining.reason}: it waits for its jobs to move" if draining else ""
    return {
        "name": agent.name,
        "status": _agent_status(agent),
        "busy": sum(one.live for one in found if one),
        "slots": node.slots if node else 0,
        "gpus": node.gpus if node else 0,
        "jobs": sorted(agent.workers),
        "host": node.host if node else "",
        "address": node.address if node else "",
        "version": node.version if node else "",
        "since": node.since if node else "",
        "cordon": {"reason": cordon.reason, "by": cordon.by, "until": cordon.until} if cordon else None,
        "reason": reason or (node.problem if node else "") or (cordon.reason if cordon else ""),
    }


def _replicas(cluster: Cluster, query: Query) -> Parts:
    leader = cluster.leader.replica if cluster.leader else ""
    rows = []
    for name, record in sorted(cluster.replicas.items()):
        document = codec.to_json(record) if record else {}
        rows.append(
            {
                "name": name,
                "role": "leader" if name == leader else "standby",
                "term": cluster.term if name == leader else 0,
                **{
                    key: document.get(key, "")
                    for key in ("address", "version", "host", "pid", "since", "dashboard")
                },
            }
        )
    return _rows(rows, query, lambda row: row["name"], lambda row: row)


# Leaves.


def _rows(
    chosen: Sequence[Any], query: Query, name: Callable[[Any], str], row: Callable[[Any], Json]
) -> Parts:
    shown = chosen[query.offset : query.offset + query.limit]
    order = [name(one) for one in shown]
    listed = {"total": len(chosen), "offset": query.offset, "order": order}
    return {"list": listed} | {f"row:{key}": row(one) for key, one in zip(order, shown, strict=True)}


def _cut(text: str, characters_max: int) -> str:
    return text if len(text) <= characters_max else text[: characters_max - 1] + "…"


PAGES: Mapping[str, Callable[[Cluster, Query], Parts]] = {
    "jobs": _jobs,
    "job": _job,
    "agents": _agents,
    "replicas": _replicas,
    "checkpoints": _checkpoints,
}


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the parts that are new or changed, and the names of those that are gone."""
    changed = {name: text for name, text in after.items() if before.get(name) != text}
    return changed, _gone(before, after)


def _gone(before: Iterable[str], after: Mapping[str, str]) -> list[str]:
    return [name for name in before if name not in after]
