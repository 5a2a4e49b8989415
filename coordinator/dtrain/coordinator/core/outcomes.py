"""What agents are told of checkpoints that were decided, and what ranks wait for at the end of training."""

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.coordinator.core import committing
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.commands import AbortCheckpoint, ConfirmCheckpoint
from dtrain.protocol.ids import AgentName, Seq, Step
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import RankState


@dataclass(frozen=True, slots=True)
class Ended:
    """Where training stands at its end: the step all ranks announced, or that they disagree."""

    step: Step
    agree: bool
    steps: tuple[Step, ...]


def end_of_training(members: Sequence[Seat]) -> Ended | None:
    """The announced last step; None while any rank still trains or is not known.

    A rank that exited with 0 without announcing anything has no say in the step.
    """
    ranks = all_ranks(members)
    if ranks is None:
        return None
    steps = [rank.last_step for rank in ranks if rank.last_step is not None or rank.exit_code != 0]
    if not steps:
        return None
    if any(step is None for step in steps):
        return None
    known = sorted({step for step in steps if step is not None})
    return Ended(known[-1], len(known) == 1, tuple(known))


def all_ranks(members: Sequence[Seat]) -> list[RankState] | None:
    """Return what every rank reports; None while one is not known."""
    ranks = [rank for seat in members for rank in seat.ranks]
    expected = sum(seat.member.nproc for seat in members)
    return ranks if ranks and len(ranks) == expected else None


def final_commit(draft: Draft) -> CommitRecord | None:
    """The committed checkpoint at the end of this attempt's training."""
    known = [stored.value for stored in draft.commits()] + draft.committed
    mine = [c for c in known if c.attempt == draft.status.attempt and c.final]
    return mine[-1] if mine else None


def gave_up_final(draft: Draft) -> bool:
    """Whether the checkpoint at the end was tried often enough."""
    return draft.status.final_tries >= committing.FINAL_TRIES_MAX


def may_go(draft: Draft, members: Sequence[Seat]) -> bool:
    """Whether ranks that wait at the end of training have nothing to wait for any more.

    Once a rank has exited there will never be a checkpoint of all of them.
    """
    if not draft.status.store or final_commit(draft) is not None or gave_up_final(draft):
        return True
    return any(rank.exit_code is not None for seat in members for rank in seat.ranks)


def tell_outcomes(draft: Draft, members: Sequence[Seat]) -> None:
    """Tell each agent what became of the checkpoints it still holds a slot for."""
    open_key, name = draft.keys.open, draft.job.name
    undecided = {
        stored.value.seq
        for stored in draft.job.open
        if not draft.deletes_key(open_key(name, stored.value.seq))
    }
    committed = {stored.value.seq for stored in draft.job.commits} | {c.seq for c in draft.committed}
    # A retired checkpoint was committed once: its slot is free all the same.
    committed |= {stored.value.seq for stored in draft.job.garbage}
    for seat in members:
        if seat.snapshot is None:
            continue
        for seq in seat.snapshot.saving:
            # While a job is paused its ranks are not told: they hold until they hear the outcome.
            if seq not in undecided and seq != draft.status.held:
                _tell(draft, seat.member.agent, seq, committed=seq in committed)
    phases = (JobPhase.RUNNING, JobPhase.SUSPENDING)
    if draft.status.phase in phases and end_of_training(members) is not None:
        _let_go(draft, members)


def _tell(draft: Draft, agent: AgentName, seq: Seq, *, committed: bool) -> None:
    last = final_commit(draft)
    if committed:
        final = last is not None and last.seq == seq
        found = [*(stored.value for stored in draft.job.commits), *draft.committed]
        record = next((one for one in found if one.seq == seq), None)
        manifest, digest = (record.manifest, record.digest) if record else ("", "")
        header = draft.header(f"confirm.{seq}")
        draft.command(agent, ConfirmCheckpoint(header, seq, final, manifest, digest))
    else:
        # Told again by a later decision, it is known no more: the event keeps it.
        why = draft.aborted.get(seq) or f"checkpoint {seq} was aborted"
        draft.command(agent, AbortCheckpoint(draft.header(f"abort.{seq}"), seq, why))


def _let_go(draft: Draft, members: Sequence[Seat]) -> None:
    """Tell every agent whose ranks still wait at the end that there is nothing to wait for."""
    last = final_commit(draft)
    if not may_go(draft, members) or committing.own_open(draft):
        return
    seq = draft.status.seq_last if last is None else last.seq
    command_id = f"give-up.{seq}" if last is None else f"confirm.{seq}"
    header = draft.header(command_id)
    for seat in members:
        snapshot = seat.snapshot
        if snapshot is None or all(rank.exit_code is not None for rank in snapshot.ranks):
            continue
        told = snapshot.command is not None and snapshot.command.id == command_id and snapshot.command.ok
        if told and seq not in snapshot.saving:
            continue
        if last is not None:
            if seq not in snapshot.saving:  # else it has just been told
                draft.command(seat.member.agent, ConfirmCheckpoint(header, seq, final=True))
        else:
            why = "there will be no checkpoint at the end of training"
            draft.command(seat.member.agent, AbortCheckpoint(header, seq, why, final=True))
