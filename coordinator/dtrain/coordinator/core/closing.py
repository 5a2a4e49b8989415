"""How a job is over (succeeded, failed, cancelled), and how agents are told to let go of what they hold.

Open checkpoints are settled before: committed, or never to be.
"""

from collections.abc import Sequence

from dtrain.coordinator.core import elastic, nonfinite, outcomes, retention, settling, spares
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import LIVE_PHASES, Seat, Standing, seats
from dtrain.protocol.commands import Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import JobPhase, Wanted
from dtrain.protocol.wording import count

CANCEL_SLACK_S = 30.0
"""Beyond the job's own grace: after that a cancelled job is over even if an agent is silent."""

RELEASE_S = 60.0
"""How long the last sweep of a finished job waits for its agents to let go of it."""


def succeed(draft: Draft) -> None:
    """All ranks of all members exited with 0."""
    settling.settle(draft, patient=False)
    last = outcomes.final_commit(draft)
    step = draft.status.step if last is None else last.step
    if last is not None:
        reason = f"training ended; checkpoint {last.seq} of step {step} is the last one"
    elif not draft.status.store:
        reason = "training ended; no store is configured, so there is no checkpoint of its end"
    elif unfit := nonfinite.unfit_at_end(draft):
        reason = f"training ended; there is no checkpoint of its end, as {unfit}"
    elif outcomes.gave_up_final(draft):
        reason = "training ended; the checkpoint of its end failed too often"
    else:
        reason = "training ended; its ranks did not ask for a checkpoint of the end"
    draft.enter(JobPhase.SUCCEEDED, reason)
    draft.event(EventReason.JOB_SUCCEEDED, reason, warning=outcomes.gave_up_final(draft))


def fail(draft: Draft, event: EventReason, reason: str) -> None:
    """End the job as FAILED; open checkpoints must have been settled."""
    draft.event(event, reason, warning=True)
    draft.enter(JobPhase.FAILED, reason, charge=False)
    draft.event(EventReason.JOB_FAILED, reason, warning=True)


def wants_cancel(draft: Draft) -> bool:
    """An operator cancelled this submission, or another one has taken its place."""
    if draft.spec.uid != draft.status.uid:
        return True
    intent = draft.job.intent
    return (
        intent is not None and intent.value.uid == draft.status.uid and intent.value.wanted is Wanted.CANCEL
    )


def cancel(draft: Draft) -> None:
    """Begin to stop a placed job."""
    by = "" if draft.job.intent is None else draft.job.intent.value.by
    draft.enter(JobPhase.CANCELLING, "stopping all ranks: the job was cancelled")
    draft.event(EventReason.USER_REQUESTED, "cancel" + (f" by {by}" if by else ""))
    cancelling(draft)


def cancelling(draft: Draft) -> None:
    """Stop all ranks, gracefully, and wait until they are gone."""
    grace = draft.spec.shutdown_grace_s
    since = draft.in_phase_since
    due = (draft.now if since is None else since) + grace + CANCEL_SLACK_S
    alive = still_alive(seats(draft))
    if not alive or draft.now >= due:
        settling.settle(draft, patient=False)
        cancelled(draft, "cancelled")
        return
    draft.wake(due)
    draft.say(f"waiting for ranks on {count(len(alive), 'agent')} to end")
    header = draft.header(f"cancel.{draft.status.attempt}")
    for agent in alive:
        draft.command(agent, Stop(header, grace, release=False, why="the job was cancelled"))


def still_alive(members: Sequence[Seat]) -> list[AgentName]:
    """Machines on which ranks of the attempt live, or may live for all that is known."""
    return [
        seat.member.agent
        for seat in members
        if seat.standing is not Standing.LOST
        and (seat.phase in LIVE_PHASES or (seat.agent is None and seat.standing is Standing.SETTLING))
    ]


def cancelled(draft: Draft, reason: str) -> None:
    """End the job as CANCELLED."""
    draft.enter(JobPhase.CANCELLED, reason, charge=False)
    draft.event(EventReason.JOB_CANCELLED, reason)


def terminal(draft: Draft) -> None:
    """Release what agents and the store still hold; the phase never changes again."""
    draft.say(draft.status.reason or f"the job is over: {draft.status.phase}")
    settling.settle(draft, patient=False)
    holding = sorted(draft.job.workers)
    for agent in holding:
        header = draft.header(f"release.{draft.status.attempt}")
        snapshot = draft.job.workers[agent].value
        if snapshot.uid != draft.status.uid or snapshot.attempt > draft.status.attempt:
            # Of an earlier submission: its agent could not be reached before the name was used again.
            # A later one, and a later attempt, was forgotten by an etcd restored from a backup.
            header = draft.header_of(snapshot)
        draft.command(agent, Stop(header, draft.spec.shutdown_grace_s, release=True, why="the job is over"))
    since = draft.in_phase_since
    if since is None:
        return
    if holding and draft.now < since + RELEASE_S and not draft.status.swept:
        if draft.status.store:
            draft.wake(since + RELEASE_S)
        return
    retention.sweep_last(draft)


def stop_survivors(draft: Draft) -> None:
    """End what still runs of an attempt that is over and has no successor yet."""
    header = draft.header(f"stop.{draft.status.attempt}")
    for agent, stored in sorted(draft.job.workers.items()):
        snapshot = stored.value
        if snapshot.uid == draft.status.uid and snapshot.phase in LIVE_PHASES:
            why = f"attempt {snapshot.attempt} is over"
            draft.command(agent, Stop(header, draft.spec.shutdown_grace_s, release=False, why=why))


def release_strays(draft: Draft) -> None:
    """End what agents hold of this job without being members of its attempt."""
    members = {member.agent for member in draft.status.members}
    for agent, stored in sorted(draft.job.workers.items()):
        snapshot = stored.value
        if agent in members or snapshot.attempt > draft.status.attempt:
            continue
        if spares.is_kept(draft, agent) or elastic.is_joining(draft, agent):
            continue
        why = "this agent is not part of the attempt"
        draft.command(agent, Stop(draft.header_of(snapshot), 0.0, release=True, why=why))
