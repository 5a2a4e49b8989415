"""Snapshots that an attempt left behind in memory: they are waited for if that is the shorter way.

A sealed snapshot outlives its rank, and the agent goes on uploading it. When an attempt ends while
all ranks have sealed a checkpoint, the next attempt would repeat every step since the one before it;
it begins from this one instead, if the rest of the upload takes no longer than those steps would.
"""

from collections.abc import Sequence

from dtrain.coordinator.core.draft import Draft
from dtrain.protocol.checkpoint import OpenRecord
from dtrain.protocol.ids import Rank
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import RankState, WorkerPhase, WorkerSnapshot

UNKNOWN_PACE_S = 15.0
"""How long is waited where nobody knows what the steps would take again."""

_OVER = (WorkerPhase.IDLE, WorkerPhase.DONE)


def is_awaited(draft: Draft, record: OpenRecord, missing: Sequence[Rank]) -> bool:
    """Whether the parts that are missing may still come, and time is left for them."""
    if not _may_come(draft, record, missing):
        return False
    since = draft.in_phase_since if draft.status.phase is JobPhase.RECOVERING else None
    due = (draft.now if since is None else since) + _patience_s(draft, record)
    if draft.now >= due and since is not None:
        return False
    draft.wake(due)
    draft.say(f"checkpoint {record.seq} of step {record.step} is sealed and being uploaded; it is waited for")
    return True


def _may_come(draft: Draft, record: OpenRecord, missing: Sequence[Rank]) -> bool:
    shown = _shown(draft, record)
    reached = len(missing) < record.world_size
    for number in missing:
        snapshot, rank = shown.get(number, (None, None))
        if snapshot is None or rank is None or record.seq not in snapshot.saving:
            return False
        if any((one.seq, one.rank) == (record.seq, number) for one in snapshot.problems):
            return False
        if rank.sealed == record.seq:
            reached = True
        elif rank.exit_code is not None or snapshot.phase in _OVER:
            return False
    # While nobody has come to that step, nobody ever will.
    return reached


def _shown(draft: Draft, record: OpenRecord) -> dict[Rank, tuple[WorkerSnapshot, RankState]]:
    """The record's ranks as agents that are there show them."""
    return {
        rank.rank: (stored.value, rank)
        for name, stored in draft.job.workers.items()
        if name in draft.fleet.agents
        and (stored.value.uid, stored.value.attempt) == (record.uid, record.attempt)
        for rank in stored.value.ranks
    }


def _patience_s(draft: Draft, record: OpenRecord) -> float:
    """What doing the steps again would take, and never longer than a checkpoint may."""
    newest = draft.newest_good()
    repeated = record.step - (0 if newest is None else newest.step)
    again_s = repeated / draft.job.step_rate if draft.job.step_rate > 0 else UNKNOWN_PACE_S
    return min(again_s, draft.spec.checkpoint.timeout_s)
