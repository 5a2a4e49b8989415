"""Ranks that are persistently slower than the others: named, until they are not any more.

All ranks of a synchronous job take equally long for a step. Compared is each rank's own time, which waits
for nobody else; what one of them needs more than the others is what each step of all takes longer.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.coordinator.core.views import Sightings
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank
from dtrain.protocol.job import JobStatus
from dtrain.protocol.snapshot import WorkerSnapshot

CONDITION = "Straggling"

SLOW_RATIO = 1.5
FINE_RATIO = 1.25
"""Of the usual own time: above the first a rank is slow, below the second it is not; between, as before."""

SHARE = 0.1
"""Of the step: a rank that costs the others less is not worth a word."""

NAMED_AFTER_S = 10.0
FINE_AFTER_S = 10.0
"""So long without a pause, on top of the steps that the reported medians are of."""

SHOWN_MAX = 8


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank that is slow now, in seconds per step; ``data_s``: what of the difference waits for data."""

    rank: Rank
    agent: AgentName
    own_s: float
    usual_s: float
    data_s: float

    @property
    def is_slow(self) -> bool:
        return self.own_s > SLOW_RATIO * self.usual_s

    @property
    def waits_for_data(self) -> bool:
        return self.data_s >= (self.own_s - self.usual_s) / 2

    @property
    def sentence(self) -> str:
        cause = ", as it waits for data" if self.waits_for_data else ""
        return (
            f"rank {self.rank} on {self.agent} needs {_ms(self.own_s)} per step of its own,"
            f" others {_ms(self.usual_s)}{cause}"
        )


def compare(snapshots: Iterable[WorkerSnapshot]) -> dict[Rank, Slow]:
    """Ranks whose own time is not as usual among the others: more than ``FINE_RATIO`` times that."""
    known = [
        (snapshot.agent, rank.rank, rank.timing)
        for snapshot in snapshots
        for rank in snapshot.ranks
        if rank.timing is not None and rank.timing.own_s > 0 and rank.exit_code is None
    ]
    if len(known) < 2:
        return {}
    # The lower one: of two ranks the other is the measure, and half of them may be slow.
    usual_s = statistics.median_low([timing.own_s for _, _, timing in known])
    data_s = statistics.median_low([timing.data_s for _, _, timing in known])
    least = max(FINE_RATIO * usual_s, usual_s + SHARE * max(timing.step_s for _, _, timing in known))
    return {
        rank: Slow(rank, agent, timing.own_s, usual_s, max(0.0, timing.data_s - data_s))
        for agent, rank, timing in known
        if timing.own_s > least
    }


def observe(
    before: Sightings, status: JobStatus, snapshots: Sequence[WorkerSnapshot], at: float
) -> Sightings:
    """Take in the snapshots of the attempt in ``status`` as they were at ``at``."""
    of = (str(status.uid), int(status.attempt))
    if before.of != of:
        before = Sightings(of)
    found = compare(snapshots)
    if not found and not status.stragglers:
        return Sightings(of)
    slow = [rank for rank, one in found.items() if one.is_slow or rank in before.slow]
    fine = [rank for rank in status.stragglers if rank not in found]
    return Sightings(
        of,
        {rank: before.slow.get(rank, at) for rank in slow},
        {rank: before.fine.get(rank, at) for rank in fine},
    )


def note(draft: Draft, members: Sequence[Seat]) -> None:
    """Name a rank that has been slow for long enough, and say so when it is over."""
    seen, named = draft.job.sightings, set(draft.status.stragglers)
    if seen.of != (draft.status.uid, draft.status.attempt):
        return
    if not seen.slow and not named:
        return
    slow = compare(seat.snapshot for seat in members if seat.snapshot is not None)
    for rank, since in sorted(seen.slow.items()):
        if rank in named or rank not in slow:
            continue
        if draft.now < since + NAMED_AFTER_S:
            draft.wake(since + NAMED_AFTER_S)
            continue
        named.add(rank)
        draft.event(EventReason.STRAGGLER, slow[rank].sentence, f"rank/{rank}", warning=True)
    for rank in sorted(named & seen.fine.keys()):
        if draft.now < seen.fine[rank] + FINE_AFTER_S:
            draft.wake(seen.fine[rank] + FINE_AFTER_S)
            continue
        named.remove(rank)
        draft.event(EventReason.STRAGGLER, f"rank {rank} keeps up with the others again", f"rank/{rank}")
    if named == set(draft.status.stragglers):
        return
    draft.set(stragglers=tuple(sorted(named)))
    if not named:
        draft.note(CONDITION, "False", "AllAlike", "")
        return
    told = [slow[rank] for rank in sorted(named) if rank in slow]
    reason = "SlowData" if told and all(one.waits_for_data for one in told) else "SlowRank"
    draft.note(CONDITION, "True", reason, "; ".join(one.sentence for one in told[:SHOWN_MAX]))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
