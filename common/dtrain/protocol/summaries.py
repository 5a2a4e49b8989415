"""Rows of jobs and agents, made of their records. Pure.

By a replica for all who ask, and by clients themselves where the replica is of a
release that makes none.
"""

import datetime
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtrain.protocol import moving
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.ids import Step
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobPhase, JobSpec, JobStatus
from dtrain.protocol.ledger import goodput
from dtrain.protocol.moving import Told
from dtrain.protocol.rows import AgentRow, JobRow, Movement
from dtrain.protocol.snapshot import NodeRecord
from dtrain.protocol.standing import agent_status, reported_step, sentences
from dtrain.protocol.wording import some

RANKS_NAMED = 4
QUEUE_AGING_S = 600.0
"""So much of waiting counts as one point of priority: what the leader sorts its queue by."""


@dataclass(frozen=True, slots=True)
class Part:
    """One machine's part of a job, as far as lists tell of it.

    Ranks are counted at once: there are thousands, and an object for each would take as
    long as reading them.
    """

    uid: str
    attempt: int
    live: int = 0
    """Ranks that have not ended."""
    step: int | None = None
    """The newest that all its ranks have completed; None: it has none."""
    steps_total: int = 0
    step_s: tuple[float, ...] = ()
    """What a step took lately, of each rank that says so."""
    stalls: tuple[tuple[int, int], ...] = ()
    """Ranks that stand still for longer than they may, and their steps."""
    at_work: tuple[tuple[int, str], ...] = ()
    """Ranks that stand still and yet were found at work, and where."""
    moves: Told = Told()
    """Checkpoints on their way."""


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
    ranks = document.get("ranks", ())
    times = [timing["step_s"] for rank in ranks if (timing := rank.get("timing"))]
    return Part(
        str(document["uid"]),
        int(document["attempt"]),
        sum(rank.get("exit_code") is None for rank in ranks),
        min((int(rank.get("step", 0)) for rank in ranks), default=None),
        max((int(rank.get("steps_total", 0)) for rank in ranks), default=0),
        tuple(float(took) for took in times if took > 0),
        tuple((int(stall["rank"]), int(stall["step"])) for stall in document.get("stalls", ())),
        tuple(
            (int(stack["rank"]), str(stack.get("where", "")))
            for stack in document.get("stacks", ())
            if stack.get("moving")
        ),
        moving.told(document),
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
    phase = status.phase if status else JobPhase.QUEUED
    finished = phase in TERMINAL_PHASES
    stored = status.step if status else Step(0)
    step = reported_step(stored, [] if finished else [one.step for one in current if one.step is not None])
    total = max((one.steps_total for one in current), default=0)
    return JobRow(
        name,
        phase,
        reason(status, current),
        uid,
        attempt,
        step,
        total,
        eta_s(step, total, current) if phase is JobPhase.RUNNING else None,
        step_s=step_s(current) if phase is JobPhase.RUNNING else None,
        goodput=goodput(status.ledger, now).ratio if status and status.ledger else None,
        ranks=sum(one.live for one in current),
        world_size=world_size(spec, intent, status),
        latest_seq=latest.seq if latest else 0,
        latest_step=latest.step if latest else 0,
        submitted_at=spec.submitted_at if spec else "",
        since=status.since if status else "",
        finished_at=status.finished_at if status else "",
        priority=spec.priority if spec else 0,
        members=tuple(member.agent for member in status.members) if status else (),
        labels=spec.labels if spec else {},
        restarts=status.restarts if status else (),
        restarts_window_s=spec.restarts.window_s if spec else 0.0,
        restarts_max=spec.restarts.max_restarts if spec else 0,
        moving=() if finished else moved(status, current),
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


def eta_s(step: int, total: int, parts: Iterable[Part]) -> float | None:
    """Seconds to the last step; None: nobody knows how many there are, or how long one takes."""
    took = step_s(parts)
    if not total or took is None:
        return None
    return max(0, total - step) * took


def step_s(parts: Iterable[Part]) -> float | None:
    """Seconds that a step took lately; None: no rank says so.

    Each rank reports the median of its recent steps, which one slow step does not move;
    ranks keep step with each other, so that the median of them is not moved by one odd rank.
    """
    took = [seconds for one in parts for seconds in one.step_s]
    return statistics.median(took) if took else None


def moved(status: JobStatus | None, parts: Iterable[Part]) -> tuple[Movement, ...]:
    """How far the checkpoints of the current attempt are that its machines move."""
    return moving.movements([one.moves for one in parts], len(status.members) if status else 0)


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
    return f"rank{'' if len(ranks) == 1 else 's'} {some(ranks, RANKS_NAMED)}"


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
