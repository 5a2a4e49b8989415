"""When an attempt came how far: what this leader has seen of it, by its own monotonic clock.

Only the ledger reads it, to divide time that has passed anyway. A leader that came later has seen less
and divides more coarsely; no time is lost by that.
"""

from collections.abc import Iterable
from dataclasses import replace

from dtrain.coordinator.core.views import Pace, Stored
from dtrain.protocol.job import JobStatus
from dtrain.protocol.snapshot import RankState, WorkerPhase, WorkerSnapshot

_OBEYED_START = frozenset(
    {
        WorkerPhase.RESTORING,
        WorkerPhase.TRAINING,
        WorkerPhase.CHECKPOINTING,
        WorkerPhase.DONE,
        WorkerPhase.ERROR,
    }
)


def observe(before: Pace, status: JobStatus, workers: Iterable[Stored[WorkerSnapshot]]) -> Pace:
    """Take in the snapshots of the attempt in ``status``."""
    of = (str(status.uid), int(status.attempt))
    pace = before if before.of == of else Pace(of, step=_begins_at(status))
    shown = [stored for stored in workers if (stored.value.uid, stored.value.attempt) == of]
    if not shown:
        return pace
    at = max(stored.seen_at for stored in shown)
    whole = {stored.value.agent for stored in shown} >= {member.agent for member in status.members}
    phases = [stored.value.phase for stored in shown]
    ranks = [rank for stored in shown for rank in stored.value.ranks]
    started = whole and all(phase in _OBEYED_START for phase in phases)
    ready = started or (whole and all(p is WorkerPhase.READY or p in _OBEYED_START for p in phases))
    joined = started and bool(ranks) and all(_has_joined(rank) for rank in ranks)
    ended = joined and all(rank.last_step is not None or rank.exit_code is not None for rank in ranks)
    pace = replace(
        pace,
        ready_at=_first(pace.ready_at, ready, at),
        joined_at=_first(pace.joined_at, joined, at),
        # A final checkpoint that failed is tried again: ranks are at their end all the time.
        ended_at=_first(pace.ended_at, ended, at),
        counts=pace.counts or any(rank.sdk for rank in ranks),
        step_ms=max((1000 * rank.timing.step_s for rank in ranks if rank.timing), default=pace.step_ms),
        held_ms=max([pace.held_ms, *(round(1000 * rank.held_s) for rank in ranks)]),
    )
    return _stepped(pace, status, shown)


def _stepped(pace: Pace, status: JobStatus, shown: list[Stored[WorkerSnapshot]]) -> Pace:
    step, at = pace.step, pace.step_at
    for stored in shown:
        newest = max((int(rank.step) for rank in stored.value.ranks), default=0)
        if newest > step:
            step, at = newest, stored.seen_at
    if step == pace.step:
        return replace(pace, waited=pace.waited or pace.step_at is None)
    if pace.step_at is None and pace.waited:
        pace = replace(pace, first_at=at, first_steps=step - _begins_at(status))
    return replace(pace, step=step, step_at=at)


def _begins_at(status: JobStatus) -> int:
    return 0 if status.restore is None else int(status.restore.step)


def _has_joined(rank: RankState) -> bool:
    return rank.sdk or rank.exit_code is not None or rank.phase is not WorkerPhase.RESTORING


def _first(known: float | None, now: bool, at: float) -> float | None:
    return at if known is None and now else known
