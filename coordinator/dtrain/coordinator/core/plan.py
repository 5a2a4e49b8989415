"""The coordinator's decision about one job: the file to read first.

``plan`` is a pure function of what the mirror holds: a new leader that sees the
same decides the same. It never remembers; what must outlive a decision is in
the status record, what this leader saw for itself is in the views.
"""

from typing import assert_never

from dtrain.coordinator.core import (
    closing,
    committing,
    conditions,
    elastic,
    orders,
    phases,
    restored,
    retention,
    scrubbing,
    suspending,
)
from dtrain.coordinator.core.decisions import Decision, Reason
from dtrain.coordinator.core.draft import OPERATIONS_MAX, Draft
from dtrain.coordinator.core.views import FleetView, JobView, Moment
from dtrain.protocol.errors import ErrorCode, InvariantBroken
from dtrain.protocol.events import EventReason
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobPhase, JobSpec, JobStatus

TRANSITIONS: dict[JobPhase | None, frozenset[JobPhase]] = {
    None: frozenset({JobPhase.QUEUED, JobPhase.STARTING, JobPhase.SUSPENDED, JobPhase.CANCELLED}),
    JobPhase.QUEUED: frozenset({JobPhase.STARTING, JobPhase.SUSPENDED, JobPhase.CANCELLED}),
    JobPhase.STARTING: frozenset(
        {
            JobPhase.RUNNING,
            JobPhase.RECOVERING,
            JobPhase.SUSPENDING,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.FAILED,
        }
    ),
    JobPhase.RUNNING: frozenset(
        {
            JobPhase.STARTING,
            JobPhase.RECOVERING,
            JobPhase.SUSPENDING,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.SUCCEEDED,
            JobPhase.FAILED,
        }
    ),
    JobPhase.RECOVERING: frozenset(
        {JobPhase.STARTING, JobPhase.QUEUED, JobPhase.SUSPENDED, JobPhase.CANCELLED, JobPhase.FAILED}
    ),
    JobPhase.SUSPENDING: frozenset(
        {
            JobPhase.SUSPENDED,
            JobPhase.QUEUED,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.SUCCEEDED,
            JobPhase.FAILED,
        }
    ),
    JobPhase.SUSPENDED: frozenset({JobPhase.QUEUED, JobPhase.CANCELLED}),
    JobPhase.CANCELLING: frozenset({JobPhase.CANCELLED}),
    JobPhase.CANCELLED: frozenset(),
    JobPhase.SUCCEEDED: frozenset(),
    JobPhase.FAILED: frozenset(),
}
"""From a stored phase to what one decision may make of it. Staying is always
allowed; a new submission of a finished job's name counts as None."""

_TAKEN_OVER = frozenset(
    {JobPhase.STARTING, JobPhase.RUNNING, JobPhase.RECOVERING, JobPhase.SUSPENDING, JobPhase.CANCELLING}
)

EVENTS_CLEARED_AT_ONCE = 40
COMMITS_CLEARED_AT_ONCE = 10


def plan(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
    """Decide what to write, send and do next about ``job``.

    Raises:
        InvariantBroken: the decision contradicts the phase diagram; a bug. The
            driver quarantines the job and goes on with the others.
    """
    status = None if job.status is None else job.status.value
    if job.quarantined:
        return _nothing(f"left alone: {job.quarantined}")
    if job.spec is None:
        if status is None and job.workers:
            return restored.end_unknown(job, fleet)
        return _nothing("there is no job file under this name" if status is None else "its job file is gone")
    if status is not None and status.term > fleet.term:
        return _nothing(f"leader {status.term} has decided about it: this one is over")
    spec = elastic.effective(job.spec.value, job.intent)
    if status is None:
        return _checked(_submitted(job, fleet, moment, spec, None))
    draft = Draft(job, fleet, moment, spec, status)
    if status.uid != spec.uid and status.phase in TERMINAL_PHASES:
        if _clear(draft):
            return _checked(draft)
        return _checked(_submitted(job, fleet, moment, spec, status))
    if status.term != fleet.term and status.phase in _TAKEN_OVER:
        draft.event(EventReason.LEADER_CHANGED, f"coordinator {fleet.replica} leads (term {fleet.term})")
        draft.take_over()
    _tell_of_brake(draft)
    if committing.adopt(draft):
        draft.say("taking over the open checkpoints of an earlier leader")
        return _checked(draft)
    if restored.catch_up(draft):
        return _checked(draft)
    _decide(draft)
    orders.answer(draft)
    scrubbing.conclude(draft)
    retention.tidy(draft)
    scrubbing.scrub(draft)
    return _checked(draft)


def _tell_of_brake(draft: Draft) -> None:
    """Leave an event with a job whose machine is among those that vanished: once, as its condition shows."""
    status = draft.status
    if not draft.fleet.brake or status.phase not in PLACED_PHASES:
        return
    if all(member.agent in draft.fleet.agents for member in status.members):
        return
    if any(condition.reason == conditions.BRAKE_ON for condition in status.conditions):
        return
    text = f"{draft.fleet.brake}: nothing is declared lost, training goes on where it can"
    draft.event(EventReason.MASS_LOSS, text, f"attempt/{status.attempt}", warning=True)


def _decide(draft: Draft) -> None:
    if suspending.intervene(draft):
        return
    match draft.status.phase:
        case JobPhase.QUEUED:
            phases.queued(draft)
        case JobPhase.STARTING:
            phases.starting(draft)
        case JobPhase.RUNNING:
            phases.running(draft)
        case JobPhase.RECOVERING:
            phases.recovering(draft)
        case JobPhase.SUSPENDING:
            suspending.suspending(draft)
        case JobPhase.SUSPENDED:
            suspending.suspended(draft)
        case JobPhase.CANCELLING:
            closing.cancelling(draft)
        case JobPhase.SUCCEEDED | JobPhase.FAILED | JobPhase.CANCELLED:
            closing.terminal(draft)
        case other:
            assert_never(other)


def _submitted(
    job: JobView, fleet: FleetView, moment: Moment, spec: JobSpec, before: JobStatus | None
) -> Draft:
    """A new submission, placed at once if possible.

    Numbers go on where an earlier job of this name stopped: no key of it, and
    no name in the store, is ever used again.
    """
    status = JobStatus(fleet.term, spec.uid, JobPhase.QUEUED)
    if before is not None:
        status = JobStatus(
            fleet.term,
            spec.uid,
            JobPhase.QUEUED,
            attempt=before.attempt,
            seq_last=before.seq_last,
            event_last=before.event_last,
            unswept=retention.unswept(before),
        )
    draft = Draft(job, fleet, moment, spec, status)
    draft.enter(JobPhase.QUEUED, "submitted")
    draft.event(EventReason.JOB_SUBMITTED, f"submission {spec.uid}")
    if not restored.is_ahead(draft):
        _decide(draft)
    return draft


def _clear(draft: Draft) -> bool:
    """Remove a batch of what an earlier job of this name left; False if nothing is left.

    Its checkpoints become garbage, so that their blobs are collected; one that
    somebody reads stays until it is let go.
    """
    keys, job = draft.keys, draft.job
    if job.latest is not None:
        draft.delete(keys.latest(job.name), job.latest.mod_revision)
    for stored in job.open:
        if draft.room > 0:
            draft.delete(keys.open(job.name, stored.value.seq), stored.mod_revision)
    old = [c for c in job.commits if c.value.seq not in job.pinned and c.value.uid != draft.spec.uid]
    for commit in old[:COMMITS_CLEARED_AT_ONCE]:
        retention.retire(draft, commit, "of an earlier job of this name")
    for seq in job.events[:EVENTS_CLEARED_AT_ONCE]:
        draft.delete(keys.event(job.name, seq), None)
    if draft.has_writes:
        draft.say("clearing away an earlier job of this name")
    return draft.has_writes


def _checked(draft: Draft) -> Decision:
    """Finish the draft, and refuse a decision that the phase diagram does not know."""
    before = draft.stored
    same_job = before is not None and before.uid == draft.status.uid
    phase = before.phase if before is not None and same_job else None
    if draft.status.phase is not phase and draft.status.phase not in TRANSITIONS[phase]:
        raise InvariantBroken(
            ErrorCode.BUG, f"job {draft.job.name} may not go from {phase} to {draft.status.phase}"
        )
    decision = draft.finish()
    if len(decision.writes) > OPERATIONS_MAX:
        raise InvariantBroken(
            ErrorCode.BUG, f"a decision about job {draft.job.name} has {len(decision.writes)} writes"
        )
    return decision


def _nothing(reason: str) -> Decision:
    return Decision(reasons=(Reason(reason),))
