"""Jobs that give their machines back and go on later: an operator asked, or a more important job waits.

First a checkpoint that all ranks hold at, as when a machine is drained: no step
is done twice. Then all ranks are stopped, and only when they are gone are the
machines free: the phase SUSPENDING keeps their slots. What cannot be saved, in
the time that a checkpoint may take, is given up; a job that fails meanwhile is
suspended without. From SUSPENDED an operator's word leads back into the queue,
from a preemption the queue itself. The next attempt begins where the last one
ended, as any attempt does.
"""

from collections.abc import Sequence

from dtrain.coordinator.core import (
    checkpoints,
    closing,
    committing,
    draining,
    endings,
    failures,
    outcomes,
    pausing,
    settling,
)
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.failures import Ending
from dtrain.coordinator.core.liveness import Seat, seats
from dtrain.protocol.commands import Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase, Wanted
from dtrain.protocol.snapshot import WorkerPhase

STOP_SLACK_S = 30.0
"""Beyond the job's own grace: after that its machines count as free even if an agent is silent."""


def intervene(draft: Draft) -> bool:
    """Do instead of the phase's own work what suspending asks for; False: nothing."""
    if closing.wants_cancel(draft):
        return False
    match draft.status.phase:
        case JobPhase.STARTING | JobPhase.RUNNING:
            return _begin(draft)
        case JobPhase.QUEUED | JobPhase.RECOVERING:
            return _keep(draft)
        case _:
            return False


def is_wanted(draft: Draft) -> bool:
    """An operator wants this submission to be suspended."""
    intent = draft.job.intent
    return (
        intent is not None and intent.value.uid == draft.status.uid and intent.value.wanted is Wanted.SUSPEND
    )


def _begin(draft: Draft) -> bool:
    by: str = draft.fleet.queue.victims.get(draft.job.name, "")
    if not is_wanted(draft) and (not by or draft.fleet.brake):
        return False
    if draft.fleet.withheld:
        draft.say(f"it is suspended once all coordinators know how: {draft.fleet.withheld}")
        return False
    # Without a step that all ranks have done there is nothing to save; where they are held at one, it is.
    stopping = draft.status.phase is JobPhase.STARTING or pausing.stands(draft, seats(draft))
    if is_wanted(draft):
        by = ""
        draft.event(EventReason.USER_REQUESTED, f"suspend{_asked_by(draft)}")
    else:
        waiting = draft.fleet.queue.waiting.get(JobName(by))
        theirs = "" if waiting is None else f" of priority {waiting.priority}"
        text = f"makes room for {by}{theirs}; its own priority is {draft.spec.priority}"
        draft.event(EventReason.PREEMPTED, text, f"job/{by}")
    draft.enter(JobPhase.SUSPENDING, _stage(by, stopping), stopping=stopping, preempted_by=by)
    suspending(draft)
    return True


def _keep(draft: Draft) -> bool:
    """Suspend a job that waits for machines: it has none to give back."""
    if not is_wanted(draft) or any(stored.value.imported for stored in committing.own_open(draft)):
        return False
    if draft.fleet.withheld:
        draft.say(f"it is suspended once all coordinators know how: {draft.fleet.withheld}")
        return False
    if not settling.settle(draft, patient=draft.status.phase is JobPhase.RECOVERING):
        closing.stop_survivors(draft)
        return True
    draft.event(EventReason.USER_REQUESTED, f"suspend{_asked_by(draft)}")
    _end(draft)
    return True


# SUSPENDING -----------------------------------------------------------------------


def suspending(draft: Draft) -> None:
    """Take the checkpoint, then stop all ranks and wait until they are gone."""
    if closing.wants_cancel(draft):
        closing.cancel(draft)
        return
    members = seats(draft)
    if not draft.status.stopping:
        if (ending := endings.why_over(draft, members)) is not None:
            _spoilt(draft, ending)
        elif all(seat.phase is WorkerPhase.DONE for seat in members):
            closing.succeed(draft)
        elif _is_saved(draft, members):
            draft.set(stopping=True)
        else:
            outcomes.tell_outcomes(draft, members)
            closing.release_strays(draft)
        if not draft.status.stopping:
            return
        draft.explain(_stage(draft.status.preempted_by, stopping=True))
    _stop(draft, members)


def _is_saved(draft: Draft, members: Sequence[Seat]) -> bool:
    """Take the checkpoint that ranks hold at; True once there is one, or none is to be expected."""
    if any(rank.last_step is not None for seat in members for rank in seat.ranks):
        # Training has ended: it is nearly over, and its machines are free sooner if it is let go.
        checkpoints.drive(draft, members)
        return False
    since = draft.in_phase_since
    until = (draft.now if since is None else since) + draft.spec.checkpoint.timeout_s
    if going := draining.leaving(members):
        until = min(until, draining.ends_at(draft, going))
    if draft.now >= until or checkpoints.is_pointless(draft, members):
        return True
    draft.wake(until)
    if not committing.own_open(draft) and (deaf := draining.not_answering(draft, members)):
        draft.say(f"agent {deaf} does not answer; the checkpoint waits for it")
        return False
    return draining.is_decided(draft, members, until)


def _spoilt(draft: Draft, ending: Ending) -> None:
    """The attempt failed before it was saved: what is there must do."""
    failure = ending.failure
    reason, about = failures.event_of(failure)
    draft.event(reason, failures.sentence(failure), about, warning=True)
    draft.set(failure=failure)
    if ending.do_not_retry:
        settling.settle(draft, patient=False)
        text = f"{failures.sentence(failure)}; exit code 93 means do not retry"
        closing.fail(draft, EventReason.DO_NOT_RETRY, text)
        return
    draft.set(stopping=True)


def _stop(draft: Draft, members: Sequence[Seat]) -> None:
    grace = draft.spec.shutdown_grace_s
    since = draft.in_phase_since
    due = (draft.now if since is None else since) + grace + STOP_SLACK_S
    settled = settling.settle(draft, patient=draft.now < due)
    alive = closing.still_alive(members)
    # One phase after the other: where no rank lives yet, it would begin and end in one decision.
    if settled and since is not None and (not alive or draft.now >= due):
        _end(draft)
        return
    draft.wake(due)
    plural = "" if len(alive) == 1 else "s"
    draft.say(f"waiting for ranks on {len(alive)} agent{plural} to end")
    header = draft.header(f"suspend.{draft.status.attempt}")
    for agent in alive:
        draft.command(agent, Stop(header, grace, release=False, why="the job is being suspended"))


def _end(draft: Draft) -> None:
    """The machines are free: wait for an operator, or in the queue for others that come free."""
    status = draft.status
    newest = draft.newest_good()
    if newest is not None:
        where = f"at step {newest.step}, with checkpoint {newest.seq}"
    elif status.attempt:
        where = "without a checkpoint"
    else:
        where = "before its first attempt"
    lost = newest is None and status.attempt > 0
    # Nobody joins a job that has no machines: what they have imported is let go of with the rest.
    draft.set(members=(), stopping=False, charge=False, fruitless=0, joining=(), joining_since="")
    if is_wanted(draft):
        text = f"suspended{_asked_by(draft)} {where}"
        draft.enter(JobPhase.SUSPENDED, text, preempted_by="")
    elif status.preempted_by:
        text = f"made room for {status.preempted_by} {where}"
        draft.enter(JobPhase.QUEUED, text)
    else:
        # Resumed before it was suspended: its ranks were being stopped already.
        text = f"stopped {where}, and resumed"
        draft.enter(JobPhase.QUEUED, text)
    draft.event(EventReason.SUSPENDED, text, f"attempt/{status.attempt}", warning=lost)
    closing.release_strays(draft)


# SUSPENDED ------------------------------------------------------------------------


def suspended(draft: Draft) -> None:
    """Keep nothing but the checkpoints, until an operator wants it to go on."""
    if closing.wants_cancel(draft):
        settling.settle(draft, patient=False)
        closing.cancelled(draft, "cancelled while it was suspended")
        return
    closing.release_strays(draft)
    if is_wanted(draft):
        draft.say(draft.status.reason)
        return
    text = f"resumed{_asked_by(draft)}"
    draft.enter(JobPhase.QUEUED, text)
    draft.event(EventReason.RESUMED, text)


def _stage(preemptor: str, stopping: bool) -> str:
    what = "all ranks are being stopped" if stopping else "a checkpoint is taken before its ranks are stopped"
    return f"making room for {preemptor}: {what}" if preemptor else f"being suspended: {what}"


def _asked_by(draft: Draft) -> str:
    by = "" if draft.job.intent is None else draft.job.intent.value.by
    return f" by {by}" if by else ""
