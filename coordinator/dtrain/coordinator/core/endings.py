"""Why an attempt ends: what its ranks report, what is seen of its machines, and which of it is the cause.

Machines that go away or do not answer are nobody's fault; what the ranks say of
themselves counts against the job's budget.
"""

from collections.abc import Sequence

from dtrain.coordinator.core import failures, hangs, nonfinite, outcomes, quarantine
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.failures import Ending
from dtrain.coordinator.core.liveness import Seat, Standing, is_ready
from dtrain.coordinator.core.views import Damage
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import EXIT_CODE_DO_NOT_RETRY, JobPhase
from dtrain.protocol.snapshot import BadBlob, Failure, FailureKind, WorkerPhase, WorkerSnapshot

SILENT_S = 10.0
"""An agent that shows nothing of the attempt while others are READY is replaced after that."""

PREPARE_S = 120.0
"""From the attempt's beginning to READY on every machine: a cold import of torch takes a minute."""

UNREACHABLE_S = 5.0
"""An agent that did not answer before the attempt either has that long to answer PREPARE."""


def why_over(draft: Draft, members: Sequence[Seat]) -> Ending | None:
    """What ends the attempt now, if anything does."""
    if not members:
        return Ending(_leader_failure(draft, FailureKind.PREPARE, "the attempt has no members"), charge=False)
    snapshots = _snapshots_of_attempt(draft, members)
    bad = _bad_restore(draft, snapshots)
    if bad is not None:
        _quarantine(draft, *bad)
        text = f"checkpoint {bad[1].seq} is damaged: {bad[1].message or bad[1].blob}"
        return Ending(_leader_failure(draft, FailureKind.RESTORE, text, bad[0]), charge=False)
    found = failures.reported(snapshots)
    if failures.wants_no_retry(snapshots):
        meant = [f for f in found if f.exit_code == EXIT_CODE_DO_NOT_RETRY]
        final = meant or [f for f in found if f.exit_code is not None] or found
        cause = (
            failures.root_cause(final) if final else _leader_failure(draft, FailureKind.EXIT, "exit code 93")
        )
        others = tuple(failure for failure in found if failure is not cause)
        return Ending(cause, charge=True, do_not_retry=True, others=others)
    if (sick := nonfinite.failure(draft, members)) is not None:
        # A script that ends because of it only says the same again.
        return Ending(sick, charge=True)
    # Machines that go away or do not answer are nobody's fault: they cost no restart.
    free = _losses(draft, members)
    if draft.status.phase is JobPhase.STARTING:
        free += _not_starting(draft, members)
    else:
        free += _forgotten(draft, members)
        found += _disagreement(draft, members)
    if not found and not free:
        hang = hangs.find(draft, members)
        return None if hang is None else Ending(hang, charge=True)
    if all(failure.kind is FailureKind.COLLECTIVE for failure in found):
        # Ranks whose peers have gone notice it long before anybody may call a machine lost.
        free += _gone(draft, members)
    cause = failures.root_cause([*found, *free])
    charged = [failure for failure in found if failure.kind not in failures.FREE]
    others = tuple(failure for failure in (*found, *free) if failure is not cause)
    return Ending(cause, charge=any(cause is failure for failure in charged), others=others)


def _snapshots_of_attempt(draft: Draft, members: Sequence[Seat]) -> list[WorkerSnapshot]:
    """Newest snapshot of each member, of those that have gone too."""
    found = []
    for seat in members:
        gone = draft.job.departed.get(seat.member.agent)
        if seat.snapshot is not None:
            found.append(seat.snapshot)
        elif gone is not None and (gone.uid, gone.attempt) == (draft.status.uid, draft.status.attempt):
            found.append(gone)
    return found


def _leader_failure(draft: Draft, kind: FailureKind, text: str, agent: AgentName | None = None) -> Failure:
    return Failure(
        kind,
        text,
        agent=agent or AgentName(""),
        attempt=draft.status.attempt,
        step=draft.status.step,
        at=draft.moment.wall,
    )


def _losses(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    return [
        _leader_failure(draft, FailureKind.AGENT_LOST, seat.why, seat.member.agent)
        for seat in members
        if seat.standing is Standing.LOST
    ]


def _gone(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    text = "ranks elsewhere have lost its ranks"
    return [
        _leader_failure(draft, FailureKind.ISOLATED, f"{seat.why}, and {text}", seat.member.agent)
        for seat in members
        if seat.agent is None and seat.standing is Standing.SETTLING
    ]


def _forgotten(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    """Members whose agent reports the running attempt without ranks: they cannot come back into it."""
    idle = (WorkerPhase.IDLE, WorkerPhase.STARTING, WorkerPhase.READY)
    return [_ended(draft, seat) for seat in members if seat.phase in idle]


def _ended(draft: Draft, seat: Seat) -> Failure:
    # An agent that was cut off for too long has ended them, and says so: it is not called lost.
    note = "" if seat.snapshot is None else seat.snapshot.note
    kind = FailureKind.ISOLATED if note else FailureKind.AGENT_LOST
    return _leader_failure(draft, kind, note or "the agent has lost its ranks", seat.member.agent)


def _not_starting(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    """Members that do not get ready: replaced without waiting for their lease."""
    if draft.fleet.brake:
        return []
    # Attempts are one-shot: ranks that an agent ended, cut off from etcd, it does not start again.
    ended = [seat for seat in members if seat.current and seat.phase is WorkerPhase.IDLE]
    if ended:
        return [_ended(draft, seat) for seat in ended]
    since = draft.status_seen_at
    others_ready = any(is_ready(seat) for seat in members)
    if all(is_ready(seat) for seat in members):
        waiting = [seat for seat in members if seat.phase is WorkerPhase.READY]
        due = since + 2 * PREPARE_S
        if not waiting or draft.now < due:
            if waiting:
                draft.wake(due)
            return []
        text = f"is ready but has not started its ranks within {2 * PREPARE_S:g} s"
        return [_leader_failure(draft, FailureKind.PREPARE, text, seat.member.agent) for seat in waiting]
    found = []
    for seat in members:
        if is_ready(seat):
            continue
        agent = seat.member.agent
        unreachable = draft.fleet.unreachable.get(agent)
        if unreachable is not None and seat.agent is not None and unreachable >= seat.agent.seen_at:
            due = since if unreachable >= since else since + UNREACHABLE_S
            if draft.now >= due:
                text = "does not answer PREPARE"
                found.append(_leader_failure(draft, FailureKind.UNREACHABLE, text, agent))
                continue
            draft.wake(due)
        limit = SILENT_S if others_ready and seat.snapshot is None else PREPARE_S
        if draft.now >= since + limit:
            text = f"is not ready within {limit:g} s"
            found.append(_leader_failure(draft, FailureKind.PREPARE, text, agent))
        else:
            draft.wake(since + limit)
    return found


def _disagreement(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    ended = outcomes.end_of_training(members)
    if ended is None or ended.agree:
        return []
    steps = ", ".join(str(step) for step in ended.steps)
    return [_leader_failure(draft, FailureKind.EXCEPTION, f"ranks ended at different steps: {steps}")]


def _bad_restore(draft: Draft, snapshots: Sequence[WorkerSnapshot]) -> tuple[AgentName, BadBlob] | None:
    """Evidence that the checkpoint this attempt restores from is damaged in the store."""
    restore = draft.status.restore
    for snapshot in snapshots:
        if restore is not None and snapshot.bad is not None and snapshot.bad.seq == restore.seq:
            return snapshot.agent, snapshot.bad
    return None


def _quarantine(draft: Draft, agent: AgentName, bad: BadBlob) -> None:
    damage = Damage(bad.blob, bad.chunk, bad.expected, bad.found, bad.rank)
    quarantine.put_aside(draft, bad.seq, damage, agent)
