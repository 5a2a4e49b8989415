"""Jobs that stand still: all ranks are held at one step, with their machines, processes and memory.

Ranks hold at a checkpoint until they hear what became of it, as they do before any attempt that is
about to end. Of a paused job they do not hear: the leader commits the checkpoint, keeps its number as
``held`` in the job's status, and tells the outcome once nobody wants the pause any more. So a pause needs
no command, survives every change of leader and agent, and loses no step if a machine is lost meanwhile.
No promise is made beyond HOLD_S_MAX: a rank that hears of nobody for so long goes on by itself.
"""

from collections.abc import Sequence

from dtrain.coordinator.core import checkpoints, committing, conditions, draining
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Seq
from dtrain.protocol.job import Wanted

HOLD_S_MAX = 7 * 86400.0
"""A pause ends by itself after this."""


def is_wanted(draft: Draft) -> bool:
    """An operator wants this submission to stand still."""
    intent = draft.job.intent
    if intent is None or intent.value.uid != draft.status.uid:
        return False
    return intent.value.paused and intent.value.wanted is Wanted.RUN


def stands(draft: Draft, members: Sequence[Seat]) -> bool:
    """All ranks of the attempt are held at a step that is saved."""
    return bool(draft.status.held) and not _has_moved(draft, members)


def let_go(draft: Draft, members: Sequence[Seat]) -> None:
    """End the pause if nobody wants it any more, or ranks have gone on by themselves.

    They are told by ``outcomes.tell_outcomes``, from then on.
    """
    if not draft.status.held:
        return
    if not is_wanted(draft):
        draft.event(EventReason.UNPAUSED, f"unpaused{_asked_by(draft)}", f"attempt/{draft.status.attempt}")
    elif _has_moved(draft, members):
        text = f"ranks that were paused went on by themselves, as they do after {HOLD_S_MAX / 86400:g} days"
        draft.event(EventReason.UNPAUSED, text, f"attempt/{draft.status.attempt}", warning=True)
    else:
        return
    draft.set(held=Seq(0))


def drive(draft: Draft, members: Sequence[Seat]) -> None:
    """Take the checkpoint that ranks are held at, and keep them there.

    Called instead of ``checkpoints.drive``. One that fails is taken again: training goes on meanwhile.
    """
    if draft.status.held:
        draft.explain(draft.status.reason)
        return
    if any(rank.last_step is not None for seat in members for rank in seat.ranks):
        draft.say("it is not paused any more: its training has ended")
        checkpoints.drive(draft, members)
        return
    if why := _obstacle(draft, members):
        draft.explain(f"it cannot be paused, {why}, and goes on")
        draft.note("Paused", "False", conditions.CANNOT_PAUSE, draft.status.reason)
        checkpoints.drive(draft, members)
        return
    text = "being paused: its ranks are held at a step together, once that is saved"
    if draft.status.reason != text:
        about = f"attempt/{draft.status.attempt}"
        draft.event(EventReason.USER_REQUESTED, f"pause{_asked_by(draft)}", about)
    draft.explain(text)
    if not committing.own_open(draft):
        if deaf := draining.not_answering(draft, members):
            # Its ranks would hear of the step when the others hold at it already, and that is too late.
            draft.say(f"agent {deaf} does not answer; the pause waits for it")
            return
        if not checkpoints.rested(draft):
            return
    # One that ranks hold at for another reason is over too soon.
    ours = {one.value.seq for one in committing.own_open(draft) if one.value.hold_s >= HOLD_S_MAX}
    checkpoints.drive(draft, members, hold_s=HOLD_S_MAX)
    for record in draft.committed:
        if record.seq in ours:
            text = f"paused{_asked_by(draft)} at step {record.step}, with checkpoint {record.seq}"
            draft.set(held=record.seq)
            draft.event(EventReason.PAUSED, text, f"attempt/{draft.status.attempt}")
            draft.explain(text)


def _obstacle(draft: Draft, members: Sequence[Seat]) -> str:
    if not draft.status.store:
        return "as it has no store to save the step in"
    if any(not rank.sdk for seat in members for rank in seat.ranks):
        return "as its ranks have not joined through the SDK"
    return ""


def _has_moved(draft: Draft, members: Sequence[Seat]) -> bool:
    held = next((one.value for one in draft.commits() if one.value.seq == draft.status.held), None)
    return held is not None and any(rank.step > held.step for seat in members for rank in seat.ranks)


def _asked_by(draft: Draft) -> str:
    by = "" if draft.job.intent is None else draft.job.intent.value.by
    return f" by {by}" if by else ""
