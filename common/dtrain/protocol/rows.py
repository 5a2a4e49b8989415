"""One row for each job and agent: what lists show of many records. Pure.

Made by a replica, which has the records in memory, so that a list of hundreds of
jobs on thousands of machines is one small answer; and by clients themselves
where the replica is of a release that makes none.
"""

import datetime
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.ids import Step
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobPhase, JobSpec, JobStatus
from dtrain.protocol.ledger import goodput
from dtrain.protocol.snapshot import NodeRecord
from dtrain.protocol.standing import agent_status, reported_step, sentences

RANKS_NAMED = 4
QUEUE_AGING_S = 600.0
"""So much of waiting counts as one point of priority: what the leader sorts its queue by."""


@dataclass(frozen=True, slots=True)
class RankPart:
    """One rank, as far as lists tell of it."""

    rank: int
    step: int = 0
    live: bool = True
    steps_total: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """One machine's part of a job."""

    uid: str
    attempt: int
    ranks: tuple[RankPart, ...] = ()
    stalls: tuple[tuple[int, int], ...] = ()
    """Ranks that stand still for longer than they may, and their steps."""
    at_work: tuple[tuple[int, str], ...] = ()
    """Ranks that stand still and yet were found at work, and where."""

    @property
    def live(self) -> int:
        """Ranks that have not ended."""
        return sum(rank.live for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job in a list. Times are UTC; 0, "" and None: not known, or there is none."""

    name: str
    phase: JobPhase = JobPhase.QUEUED
    reason: str = ""
    uid: str = ""
    attempt: int = 0
    step: int = 0
    """Newest step that every rank that reports has completed, or the last one stored."""
    steps_total: int = 0
    """As many steps as the training has, where its script says so."""
    eta_s: float | None = None
    """Until its last step, if steps go on to take what they took lately."""
    goodput: float | None = None
    """Share of its time, without queue and pauses, in which steps were done that were kept."""
    ranks: int = 0
    """Ranks that run."""
    world_size: int = 0
    """Ranks of the attempt, else as many as it may have."""
    latest_seq: int = 0
    latest_step: int = 0
    submitted_at: str = ""
    since: str = ""
    """When the phase began."""
    finished_at: str = ""
    priority: int = 0
    queue: int = 0
    """Place among those that wait for machines, from 1."""
    members: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    restarts: tuple[float, ...] = ()
    """Epoch seconds of those that count against the budget; older ones than ``restarts_window_s`` do not."""
    restarts_window_s: float = 0.0
    restarts_max: int = 0

    @property
    def finished(self) -> bool:
        """It has ended for good."""
        return self.phase in TERMINAL_PHASES


@dataclass(frozen=True, slots=True)
class AgentRow:
    """A machine in a list.

    ``status``: Ready, Draining, Cordoned, Blocked (something on it does not die), or Lost (no
    lease). Draining: it is about to end, or an operator wants it empty and it is not yet.
    """

    name: str
    status: str
    reason: str = ""
    """Why it is not simply Ready."""
    busy: int = 0
    """Slots with a rank that runs."""
    slots: int = 0
    gpus: int = 0
    jobs: tuple[str, ...] = ()
    version: str = ""
    since: str = ""
    address: str = ""
    host: str = ""
    incarnation: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def part(snapshot: bytes) -> Part | None:
    """What a stored ``WorkerSnapshot`` says for a list; None if it cannot be read.

    Thousands of them change every second or two: only what is needed is looked at.
    """
    try:
        document = json.loads(snapshot)
        return part_of(document)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def part_of(document: Mapping[str, Any]) -> Part:
    """The same of a snapshot's JSON.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it is none.
    """
    return Part(
        str(document["uid"]),
        int(document["attempt"]),
        tuple(_rank(rank) for rank in document.get("ranks", ())),
        tuple((int(stall["rank"]), int(stall["step"])) for stall in document.get("stalls", ())),
        tuple(
            (int(stack["rank"]), str(stack.get("where", "")))
            for stack in document.get("stacks", ())
            if stack.get("moving")
        ),
    )


def _rank(document: Mapping[str, Any]) -> RankPart:
    timing = document.get("timing") or {}
    return RankPart(
        int(document["rank"]),
        int(document.get("step", 0)),
        document.get("exit_code") is None,
        int(document.get("steps_total", 0)),
        float(timing.get("step_s", 0.0)),
    )


def job_row(
    name: str,
    spec: JobSpec | None,
    status: JobStatus | None,
    *,
    intent: Intent | None,
    latest: Latest | None,
    parts: Mapping[str, Part],
    now: float,
) -> JobRow:
    """One job at ``now`` (epoch seconds). ``parts`` of other submissions and attempts do not count."""
    uid, attempt = (status.uid, status.attempt) if status else (spec.uid if spec else "", 0)
    current = [one for one in parts.values() if status and one.uid == uid and one.attempt == attempt]
    ranks = [rank for one in current for rank in one.ranks]
    phase = status.phase if status else JobPhase.QUEUED
    finished = phase in TERMINAL_PHASES
    stored = status.step if status else Step(0)
    step = reported_step(stored, () if finished else (Step(rank.step) for rank in ranks))
    total = max((rank.steps_total for rank in ranks), default=0)
    return JobRow(
        name,
        phase,
        reason(status, current),
        uid,
        attempt,
        step,
        total,
        eta_s(step, total, ranks) if phase is JobPhase.RUNNING else None,
        goodput=goodput(status.ledger, now).ratio if status and status.ledger else None,
        ranks=sum(rank.live for rank in ranks),
        world_size=world_size(spec, intent, status),
        latest_seq=latest.seq if latest else 0,
        latest_step=latest.step if latest else 0,
        submitted_at=spec.submitted_at if spec else "",
        since=status.since if status else "",
        finished_at=status.finished_at if status else "",
        priority=spec.priority if spec else 0,
        members=tuple(member.agent for member in status.members) if status else (),
        restarts=status.restarts if status else (),
        restarts_window_s=spec.restarts.window_s if spec else 0.0,
        restarts_max=spec.restarts.max_restarts if spec else 0,
    )


def in_queue(rows: Sequence[JobRow]) -> list[JobRow]:
    """The same rows, with the places of those that wait for machines."""

    def key(row: JobRow) -> tuple[float, int, str]:
        return _epoch_s(row.submitted_at) - row.priority * QUEUE_AGING_S, -row.priority, row.name

    waiting = sorted((row for row in rows if row.phase is JobPhase.QUEUED), key=key)
    places = {row.name: place for place, row in enumerate(waiting, 1)}
    return [replace(row, queue=places[row.name]) if row.name in places else row for row in rows]


def agent_row(
    name: str, node: NodeRecord | None, cordon: Cordon | None, parts: Mapping[str, Part]
) -> AgentRow:
    """One machine; ``parts`` by job."""
    status = agent_status(node, cordon, has_work=bool(parts))
    busy = sum(one.live for one in parts.values())
    row = AgentRow(name, status, _why(node, cordon), busy, jobs=tuple(sorted(parts)))
    if node is None:
        return row
    return replace(
        row,
        slots=node.slots,
        gpus=node.gpus,
        version=node.version,
        since=node.since,
        address=node.address,
        host=node.host,
        incarnation=node.incarnation,
        labels=node.labels,
    )


def world_size(spec: JobSpec | None, intent: Intent | None, status: JobStatus | None) -> int:
    """Ranks: of the current attempt, else as many as asked for."""
    if status and status.members:
        return status.world_size
    return nodes(spec, intent)[1] * spec.nproc_per_node if spec else 0


def nodes(spec: JobSpec | None, intent: Intent | None) -> tuple[int, int]:
    """Fewest and most machines: as scaled, else as in the job file."""
    if spec is None:
        return 0, 0
    if intent is not None and intent.uid == spec.uid and intent.nnodes_max:
        return intent.nnodes_min, intent.nnodes_max
    return spec.nnodes_min, spec.nnodes_max


def eta_s(step: int, total: int, ranks: Sequence[RankPart]) -> float | None:
    """Seconds to the last step; None: nobody knows how many there are, or how long one takes.

    Each rank reports the median of its recent steps, which one slow step does not move;
    ranks keep step with each other, so that the median of them is not moved by one odd rank.
    """
    took = [rank.step_s for rank in ranks if rank.step_s > 0]
    if not total or not took:
        return None
    return max(0, total - step) * statistics.median(took)


def reason(status: JobStatus | None, parts: Iterable[Part]) -> str:
    """The leader's sentence on a job, and what its ranks add to it."""
    decided, *noticed = sentences(status)
    return "; ".join([decided, *_of_steps(status, list(parts)), *noticed])


def _of_steps(status: JobStatus | None, parts: Sequence[Part]) -> list[str]:
    """Ranks that stand still for longer than they may, and what those do that were found at work."""
    if status is None or status.phase is not JobPhase.RUNNING:
        return []
    stalls = sorted(stall for one in parts for stall in one.stalls)
    texts = []
    if stalls:
        step = min(step for _, step in stalls)
        texts.append(f"{_names([rank for rank, _ in stalls])} completed no step after step {step}")
    at_work = sorted(found for one in parts for found in one.at_work)
    texts += [f"rank {rank} is at work" + (f" in {where}" if where else "") for rank, where in at_work[:1]]
    return texts


def _names(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:RANKS_NAMED]))
    more = f" and {len(ranks) - RANKS_NAMED} more" if len(ranks) > RANKS_NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}{more}"


def _why(node: NodeRecord | None, cordon: Cordon | None) -> str:
    """Why a machine is not simply Ready."""
    if node is not None and (draining := node.draining) is not None:
        return f"{draining.reason}: it waits for at most {draining.grace_s:g} s for its jobs to move"
    return (node.problem if node else "") or (cordon.reason if cordon else "")


def _epoch_s(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
