"""Machines that are about to go: their jobs stop at a checkpoint, then go on elsewhere.

An agent that drains goes on training and says so in its node record; whoever
leads reads it there, so that a change of leader changes nothing. A machine that an
operator wants empty is treated alike, only that its agent stays. The attempt
ends with a checkpoint that its ranks hold at: no step is done twice. If there
can be none, or it fails, the attempt ends without it; the agent would soon end
its ranks anyway.
"""

from collections.abc import Sequence

from dtrain.coordinator.core import checkpoints, committing
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.coordinator.core.placement import draining as who_drains
from dtrain.coordinator.core.placement import resting
from dtrain.protocol.events import EventReason
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import WorkerPhase

GRACE_SHARE = 0.9
"""Of an agent's own patience: what is not durable by then is given up, which leaves time to stop in order."""


def leaving(members: Sequence[Seat]) -> list[Seat]:
    """Members that have ranks on a machine that is about to go."""
    return [
        seat
        for seat in members
        if seat.agent is not None
        and seat.agent.draining_at is not None
        and seat.phase is not WorkerPhase.DONE
    ]


def is_due(draft: Draft, members: Sequence[Seat], going: Sequence[Seat]) -> bool:
    """Take the checkpoint that the attempt ends with; True once it is to end, with or without one.

    Called instead of ``checkpoints.drive``, with the seats that ``leaving`` returned.
    """
    text = f"{sentence(going)}; a checkpoint is taken before the job goes on elsewhere"
    if draft.status.reason != text:
        draft.event(EventReason.AGENT_DRAINING, text, _about(going))
    draft.explain(text)
    if any(rank.last_step is not None for seat in members for rank in seat.ranks):
        # Training has ended: its last checkpoint is as good as one of ours, and nothing has to move.
        checkpoints.drive(draft, members)
        return False
    until = ends_at(draft, going)
    if draft.now >= until or checkpoints.is_pointless(draft, members):
        return True
    draft.wake(until)
    if not committing.own_open(draft) and (deaf := not_answering(draft, members)):
        # Its ranks would hear of the step when the others hold at it already, and that is too late.
        draft.say(f"agent {deaf} does not answer; the checkpoint waits for it")
        return False
    return is_decided(draft, members, until)


def not_answering(draft: Draft, members: Sequence[Seat]) -> str:
    """A member that would not hear of a checkpoint now; "" if all would."""
    found = [
        seat.member.agent
        for seat in members
        if seat.agent is not None and resting(draft, seat.member.agent, seat.agent)
    ]
    return min(found, default="")


def is_decided(draft: Draft, members: Sequence[Seat], until: float) -> bool:
    """Go on with the checkpoint; True if it is committed, or has failed in a way that another one would."""
    held = [stored.value for stored in committing.own_open(draft) if stored.value.hold_s > 0]
    late_before = draft.status.late_saves
    checkpoints.drive(draft, members, hold_s=until - draft.now)
    if not any(draft.deletes_key(draft.keys.open(draft.job.name, record.seq)) for record in held):
        return False
    if not draft.committed and checkpoints.save_asks(members):
        return False  # it made way for what the script saves, and is taken after that
    # Ranks that had gone past the step are asked again for a later one.
    return bool(draft.committed) or draft.status.late_saves <= late_before


def note_end(draft: Draft, going: Sequence[Seat]) -> None:
    """Record that the attempt ends because of these machines. It costs no restart."""
    held = [one.value for one in draft.commits() if one.value.seq == draft.status.held]
    newest = next(iter([*draft.committed[-1:], *held]), None)
    if newest is not None:
        where = f"ends at step {newest.step}, with checkpoint {newest.seq}"
    elif draft.status.phase is JobPhase.STARTING:
        where = "ends before it has begun"
    else:
        where = "ends without a checkpoint"
    draft.event(
        EventReason.DRAINED,
        f"{sentence(going)}: attempt {draft.status.attempt} {where}",
        _about(going),
        warning=newest is None and draft.status.phase is JobPhase.RUNNING,
    )
    draft.set(charge=False)


def sentence(going: Sequence[Seat]) -> str:
    """Who goes, and why."""
    names = sorted(seat.member.agent for seat in going)
    reasons = sorted({_reason(seat) for seat in going} - {""})
    return who_drains(names) + (f" ({', '.join(reasons)})" if reasons else "")


def _reason(seat: Seat) -> str:
    if seat.agent is None:
        return ""
    told = seat.agent.node.draining or seat.agent.vacating
    return "" if told is None else told.reason


def ends_at(draft: Draft, going: Sequence[Seat]) -> float:
    """Until when a checkpoint must be durable, so that the first of them can still stop in order."""
    return min(_until(draft, seat) for seat in going)


def _until(draft: Draft, seat: Seat) -> float:
    assert seat.agent is not None
    assert seat.agent.draining_at is not None
    told = seat.agent.node.draining
    if told is None:
        # The machine stays: nothing is lost by waiting as long as any checkpoint may take.
        return seat.agent.draining_at + draft.spec.checkpoint.timeout_s
    return seat.agent.draining_at + GRACE_SHARE * told.grace_s


def _about(going: Sequence[Seat]) -> str:
    return f"agent/{going[0].member.agent}"
