"""Jobs that change their size while they run: ``nnodes MIN:MAX``, of the job file or of ``dtrain scale``.

A job loses machines at once: what ends its attempt begins the next one with those
that are left. It grows, and leaves machines that it may not have any more, at a
checkpoint that its ranks hold at, so that no step is done twice. Machines that join
import everything before, while the others go on training, and they join together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dtrain.coordinator.core import checkpoints, committing, draining, kinds, placement, spares
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat, Standing
from dtrain.coordinator.core.stamps import iso, parse_iso
from dtrain.coordinator.core.views import Stored
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Seq
from dtrain.protocol.job import Intent, JobPhase, JobSpec, JobStatus
from dtrain.protocol.snapshot import WorkerPhase
from dtrain.protocol.wording import count, some

WARM_S = 120.0
"""How long a machine may import before the job grows without waiting for it any longer."""

SILENT_S = 10.0
"""The same for one that shows nothing of the job: its agent may know of no such command."""

HELD_AGAIN_S_MAX = 3600.0
"""Between checkpoints that ranks hold at while none succeeds: training stands still for each."""


@dataclass(frozen=True, slots=True)
class Resize:
    """A change that is due now: who joins, or else who leaves."""

    joiners: tuple[AgentName, ...] = ()
    leavers: tuple[AgentName, ...] = ()


# How large ------------------------------------------------------------------------


def effective(spec: JobSpec, intent: Stored[Intent] | None) -> JobSpec:
    """The job file with the bounds that an operator has set since, if any."""
    if intent is None or intent.value.uid != spec.uid:
        return spec
    low, high = intent.value.nnodes_min, intent.value.nnodes_max
    return replace(spec, nnodes_min=low, nnodes_max=high) if 1 <= low <= high else spec


def may_grow(spec: JobSpec, intent: Stored[Intent] | None, status: JobStatus) -> bool:
    """Whether a machine that comes free concerns the running job."""
    running = status.phase is JobPhase.RUNNING and status.uid == spec.uid
    return running and len(status.members) < effective(spec, intent).nnodes_max


# What is due -----------------------------------------------------------------------


def due(draft: Draft, members: Sequence[Seat]) -> Resize | None:
    """The change of size to be made now; None: the job goes on as it is."""
    if draft.fleet.brake or any(seat.standing is not Standing.PRESENT for seat in members):
        return None
    if any(rank.last_step is not None or rank.exit_code is not None for s in members for rank in s.ranks):
        return None  # training has ended, or is about to
    surplus = len(members) - draft.spec.nnodes_max
    if surplus < 0 and draft.fleet.queue.changes_at is not None:
        draft.wake(draft.fleet.queue.changes_at)
    joining = () if surplus >= 0 else _choose(draft, members)
    if not joining:
        _note(draft, ())
    if surplus <= 0 and not joining:
        return None
    if not checkpoints.can_checkpoint(draft, members):
        # Without one all its work would be lost, which nobody has asked for.
        wanted = len(members) - surplus if surplus > 0 else len(members) + len(joining)
        draft.say(f"it will be on {count(wanted, 'agent')} after its next restart: it cannot be checkpointed")
        _note(draft, ())
        return None
    if surplus > 0:
        leavers = tuple(seat.member.agent for seat in members[draft.spec.nnodes_max :])
        return Resize(leavers=leavers) if _may_begin(draft) else None
    _note(draft, joining)
    ready = _ready(draft, joining, draft.spec.nnodes_max - len(members))
    if not ready or len(members) + len(ready) < draft.spec.nnodes_min:
        return None
    return Resize(joiners=ready) if _may_begin(draft) and _is_cool(draft) else None


def _held(draft: Draft) -> set[Seq]:
    """The open checkpoint that ranks hold at, if any."""
    return {stored.value.seq for stored in committing.own_open(draft) if stored.value.hold_s > 0}


def _may_begin(draft: Draft) -> bool:
    """Whether ranks may be held now: each try that fails may cost them all that a checkpoint may take."""
    failed = draft.status.failed_saves
    if _held(draft):
        return True
    if failed < 2:
        return checkpoints.rested(draft)
    pause_s = min(HELD_AGAIN_S_MAX, draft.spec.checkpoint.timeout_s * 2.0 ** min(failed - 2, 10))
    due = draft.status_seen_at + pause_s
    if draft.now >= due:
        return True
    draft.wake(due)
    draft.say("checkpoints fail: its size stays as it is for the time being")
    return False


def _choose(draft: Draft, members: Sequence[Seat]) -> tuple[AgentName, ...]:
    """Machines to grow by: those that are joining already stay chosen."""
    present = {seat.member.agent for seat in members}
    before = frozenset(draft.status.joining)
    # One that does not answer for a moment keeps what it has imported.
    versions = [seat.member.version if seat.agent is None else seat.agent.node.version for seat in members]
    free = [
        name
        for name, view in placement.candidates(draft, silent=before, growing=True).items()
        # The larger attempt could not save what this one can.
        if name not in present and not kinds.are_mixed([*versions, view.node.version])
    ]
    free.sort(key=lambda name: (name not in before, not placement.is_warm(draft, name), name))
    chosen = free[: draft.spec.nnodes_max - len(members)]
    missing = draft.spec.nnodes_min - len(members) - len(chosen)
    if missing > 0:
        draft.say(f"it goes on with {count(len(members), 'agent')}; {missing} more are needed to grow")
        return ()
    return tuple(sorted(chosen))


def _note(draft: Draft, joining: tuple[AgentName, ...]) -> None:
    """Keep in the status who is to join, and since when: a change of leader starts no wait again."""
    status = draft.status
    if joining == status.joining:
        return
    since = status.joining_since if joining and status.joining else iso(draft.moment.wall)
    draft.set(joining=joining, joining_since=since if joining else "")


def _ready(draft: Draft, joining: Sequence[AgentName], room: int) -> tuple[AgentName, ...]:
    """Who joins now, as far as they alone decide it; () while it is worth waiting for more."""
    asked_s = _since_s(draft, draft.status.joining_since)
    waiting: list[AgentName] = []
    warm: list[AgentName] = []
    cold: list[AgentName] = []
    for name in joining:
        if placement.resting(draft, name, draft.fleet.agents[name]):
            # Often it was only its former life that did not; that is over in a moment.
            if asked_s < SILENT_S + placement.UNREACHABLE_REST_S:
                waiting.append(name)
            continue
        if placement.is_warm(draft, name):
            warm.append(name)
            continue
        spares.warm(draft, name)
        stored = draft.job.workers.get(name)
        patience_s = WARM_S if stored is not None and stored.value.uid == draft.status.uid else SILENT_S
        (waiting if asked_s < patience_s else cold).append(name)
        if asked_s < patience_s:
            draft.wake(draft.now + patience_s - asked_s)
    # Who has not become warm by now would hold up all others; if nobody has, none of them can.
    ready = tuple(warm or cold)
    if ready and _held(draft):
        return ready  # ranks stand still, or are about to: who came last joins another time
    if waiting:
        draft.say(f"{_names(waiting)} {'is' if len(waiting) == 1 else 'are'} getting ready to join")
        return ()
    together = max(draft.fleet.agents[name].seen_at for name in joining) + placement.JOIN_WINDOW_S
    if ready and len(joining) < room and draft.now < together:
        draft.wake(together)
        draft.say(f"waiting a moment for more agents than {_names(joining)} to join")
        return ()
    return ready


def _is_cool(draft: Draft) -> bool:
    """Whether the job may grow again so soon; what an operator asks for is done at once."""
    status, intent = draft.status, draft.job.intent
    if not status.grown_at:
        return True
    if intent is not None and intent.value.nnodes_max and intent.value.at > status.grown_at:
        return True
    left_s = draft.spec.grow_cooldown_s - _since_s(draft, status.grown_at)
    if left_s <= 0:
        return True
    draft.wake(draft.now + left_s)
    draft.say("it has grown a moment ago; it grows again after its cooldown")
    return False


def _since_s(draft: Draft, stamp: str) -> float:
    at = parse_iso(stamp)
    # Wall clocks will do for a policy, but one that was wrong must not put it off for ever.
    return float("inf") if at is None or at > draft.moment.wall else draft.moment.wall - at


# Making it ---------------------------------------------------------------------------


def is_due(draft: Draft, members: Sequence[Seat], change: Resize) -> bool:
    """Take the checkpoint that the attempt ends with; True once it is committed, and ranks hold at it.

    Called instead of ``checkpoints.drive``. One that fails is taken again later: training goes on.
    """
    text = f"{sentence(draft, change)}; a checkpoint is taken first"
    if draft.status.reason != text:
        reason = EventReason.GROWING if change.joiners else EventReason.SHRINKING
        draft.event(reason, text, f"attempt/{draft.status.attempt}")
    draft.explain(text)
    if not committing.own_open(draft) and (deaf := draining.not_answering(draft, members)):
        draft.say(f"agent {deaf} does not answer; the checkpoint waits for it")
        return False
    held = _held(draft)
    checkpoints.drive(draft, members, hold_s=draft.spec.checkpoint.timeout_s)
    return any(record.seq in held for record in draft.committed)


def note_end(draft: Draft, change: Resize) -> frozenset[AgentName]:
    """Record that the attempt ends to change its size, which costs no restart; who is in the next one."""
    status = draft.status
    stay = {member.agent for member in status.members} - set(change.leavers)
    changes = {"grown_at": iso(draft.moment.wall)} if change.joiners else {}
    draft.set(charge=False, fruitless=0, **changes)
    return frozenset(stay | set(change.joiners))


def sentence(draft: Draft, change: Resize) -> str:
    """What changes, in words."""
    now = len(draft.status.members)
    if change.joiners:
        more = count(now + len(change.joiners), "agent")
        return f"growing from {now} to {more}: {_names(change.joiners)} will join"
    fewer = count(now - len(change.leavers), "agent")
    return f"shrinking from {now} to {fewer}: {_names(change.leavers)} will leave"


def is_joining(draft: Draft, agent: AgentName) -> bool:
    """Whether what an agent that is no member holds of the job is there because it will be one."""
    if agent not in draft.status.joining:
        return False
    snapshot = draft.job.workers[agent].value
    # What another submission or an attempt left there would keep it from getting ready.
    ours = snapshot.uid == draft.status.uid and snapshot.phase is WorkerPhase.IDLE
    return ours and not snapshot.ranks


def _names(names: Sequence[AgentName]) -> str:
    return some(names, placement.SHOWN_MAX)
