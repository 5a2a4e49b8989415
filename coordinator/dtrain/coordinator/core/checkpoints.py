"""Checkpoints of a running attempt: open one when it is due, follow it until it is committed or aborted.

A checkpoint is decided by one etcd transaction and by nothing else. Its intent
(``open/<seq>``) is written before any blob; it is committed only if every rank
of the attempt reported the same seq, nonce and step durable and the leader has
verified them; anything else deletes the intent. Training never waits for it.

``targets`` says at which step, ``committing`` decides about one, ``outcomes`` tells
the agents, ``settling`` clears what an attempt has left open.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from dtrain.coordinator.core import committing, nonfinite, outcomes, targets
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.core.tally import Cause
from dtrain.coordinator.core.views import Stored
from dtrain.protocol.checkpoint import OpenRecord, Order
from dtrain.protocol.commands import BeginCheckpoint
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.snapshot import SaveProblem, WorkerSnapshot
from dtrain.protocol.wording import some

FAILED_BACKOFF_S = 5.0
FAILED_BACKOFF_S_MAX = 60.0


def can_checkpoint(draft: Draft, members: Sequence[Seat]) -> bool:
    """A store is configured and every rank has joined through the SDK."""
    ranks = outcomes.all_ranks(members)
    return bool(draft.status.store) and ranks is not None and all(rank.sdk for rank in ranks)


def save_asks(members: Sequence[Seat]) -> dict[Rank, Step]:
    """Ranks whose script saves a step, and which."""
    return {
        rank.rank: rank.save_at
        for seat in members
        for rank in seat.ranks
        if rank.save_at is not None and rank.exit_code is None
    }


def is_pointless(draft: Draft, members: Sequence[Seat]) -> bool:
    """Whether a checkpoint now could hold nothing, or can never be taken in this attempt."""
    ranks = outcomes.all_ranks(members)
    if not draft.status.store or (ranks is not None and not all(rank.sdk for rank in ranks)):
        return True
    if not committing.own_open(draft) and nonfinite.unfit_now(draft, members):
        return True
    if ranks is None or committing.own_open(draft) or any(rank.step for rank in ranks):
        return False
    # Nothing is computed yet; but an agent that has come back does not know the steps before its ranks have.
    return all(
        seat.snapshot is not None and seat.snapshot.incarnation == seat.member.incarnation for seat in members
    )


def drive(draft: Draft, members: Sequence[Seat], *, hold_s: float = 0.0) -> None:
    """Follow the open checkpoint of the running attempt, or open the next one when due.

    With ``hold_s`` one is due now, may take that long, and ranks stay at its step.
    """
    current: Stored[OpenRecord] | None = None
    for stored in committing.own_open(draft):
        if stored.value.attempt != draft.status.attempt or current is not None:
            committing.abort(draft, stored, "it belongs to an attempt that is over", warning=False)
        else:
            current = stored
    if current is not None:
        _follow(draft, members, current)
    elif can_checkpoint(draft, members) or (draft.status.store and save_asks(members)):
        _open_if_due(draft, members, hold_s)
    elif targets.token(draft):
        why = "its ranks have not joined through the SDK" if draft.status.store else "it has no store"
        draft.say(f"the checkpoint asked for cannot be taken: {why}")


def _follow(draft: Draft, members: Sequence[Seat], stored: Stored[OpenRecord]) -> None:
    record = stored.value
    if committing.remember_departed(draft, stored):
        return
    parts = committing.durable_parts(draft, record)
    problem = _first_problem(members, record.seq)
    verdict = committing.verdict_of(draft, record)
    ended = outcomes.end_of_training(members)
    asks = save_asks(members)
    deadline = stored.seen_at + record.timeout_s
    if unfit := nonfinite.refusal(draft, record):
        committing.abort_unfit(draft, stored, unfit)
    elif verdict is not None and verdict.ok and committing.is_complete(parts, record):
        if ended is not None and ended.agree and ended.step == record.step:
            # Training ended at the step that was due anyway: a second one would hold the same.
            stored = replace(stored, value=replace(record, final=True))
        committing.commit(draft, stored, verdict)
    elif problem is not None:
        why = f"rank {problem.rank}: {problem.message}" + _who_asks(members, record)
        # A script's own step is not chosen anew: no slack would help.
        committing.abort(draft, stored, why, Cause.RANK, late=problem.late and not record.asked)
    elif not record.asked and not parts and asks and record.step >= (first := min(asks.values())):
        # Ranks that wait in a save never come to it, or hand over something else at it.
        committing.abort(draft, stored, f"the script saves step {first} itself", warning=False)
    elif verdict is not None and not verdict.ok and not verdict.retry:
        committing.abort(draft, stored, verdict.problem, Cause.VERIFY)
    elif ended is not None and ended.step < record.step:
        committing.abort(draft, stored, f"training ended at step {ended.step}", warning=False)
    elif draft.now >= deadline:
        missing = [rank for rank in range(record.world_size) if rank not in parts]
        late = (
            f"ranks {some(missing, committing.TOLD_MAX)} are not durable"
            if missing
            else "it could not be verified"
        )
        why = f": {verdict.problem}" if verdict is not None and verdict.problem else ""
        why = f"{late} within {record.timeout_s:g} s{why}" + _who_asks(members, record)
        committing.abort(draft, stored, why, Cause.TIMEOUT)
    else:
        draft.wake(deadline)
        if committing.is_complete(parts, record):
            draft.say(f"verifying checkpoint {record.seq} of step {record.step}")
            committing.ask_verdict(draft, record, parts)
        else:
            draft.say(
                f"saving checkpoint {record.seq} at step {record.step}:"
                f" {len(parts)} of {record.world_size} ranks durable"
            )
            _begin(draft, members, record)


def _who_asks(members: Sequence[Seat], record: OpenRecord) -> str:
    """Which ranks do not want what the others asked for; "" if all do."""
    if not record.asked:
        return ""
    groups: dict[str, list[int]] = {}
    for rank in (rank for seat in members for rank in seat.ranks):
        if rank.exit_code is not None:
            wish = "have ended"
        elif rank.save_at is None:
            wish = f"asked for none (at step {rank.step})"
        else:
            wish = f"asked for step {rank.save_at}"
        groups.setdefault(wish, []).append(rank.rank)
    if list(groups) == [f"asked for step {record.step}"]:
        return ""
    return "; " + ", ".join(
        f"ranks {some(ranks, committing.TOLD_MAX)} {wish}" for wish, ranks in groups.items()
    )


def _first_problem(members: Sequence[Seat], seq: Seq) -> SaveProblem | None:
    problems = [
        problem
        for seat in members
        if seat.snapshot is not None
        for problem in seat.snapshot.problems
        if problem.seq == seq
    ]
    # A real failure is told before a rank that was merely late.
    return min(problems, key=lambda problem: (problem.late, problem.rank), default=None)


def _begin(draft: Draft, members: Sequence[Seat], record: OpenRecord) -> None:
    header = draft.header(f"begin.{record.seq}.{record.nonce}")
    for seat in members:
        if not _knows(seat.snapshot, record.seq):
            begin = BeginCheckpoint(
                header, record.seq, record.nonce, record.step, record.hold_s, record.asked
            )
            draft.command(seat.member.agent, begin)


def _knows(snapshot: WorkerSnapshot | None, seq: Seq) -> bool:
    if snapshot is None:
        return False
    return (
        seq in snapshot.saving
        or any(part.seq == seq for part in snapshot.durable)
        or any(problem.seq == seq for problem in snapshot.problems)
    )


# Opening ---------------------------------------------------------------------------


def _open_if_due(draft: Draft, members: Sequence[Seat], hold_s: float) -> None:
    status = draft.status
    asks = save_asks(members)
    if asks:
        # An agent that has not heard how the last one ended may show what that one has answered.
        fresh = save_asks(
            [seat for seat in members if seat.snapshot is not None and not seat.snapshot.saving]
        )
        if fresh:
            # For the first that asks, so that the wait for the others has a deadline that outlives
            # this leader; before all else, as ranks that wait in a save come to no other step.
            _begin(draft, members, open_checkpoint(draft, max(fresh.values()), final=False, asked=True))
        return
    ended = outcomes.end_of_training(members)
    if ended is not None:
        if (
            ended.agree
            and not outcomes.may_go(draft, members)
            and (unfit := nonfinite.unfit_now(draft, members))
        ):
            draft.set(final_tries=committing.FINAL_TRIES_MAX)
            text = f"there will be no checkpoint of the end of training: {unfit}"
            draft.event(EventReason.NON_FINITE, text, warning=True)
        elif ended.agree and not outcomes.may_go(draft, members) and rested(draft):
            _begin(draft, members, open_checkpoint(draft, ended.step, final=True))
        return
    if any(rank.last_step is not None for seat in members for rank in seat.ranks):
        return  # some ranks have ended: the others are about to, and a later step never comes
    if not any(rank.step for seat in members for rank in seat.ranks) and not targets.token(draft):
        return  # nothing has been computed yet
    if unfit := nonfinite.unfit_now(draft, members):
        draft.say(f"no checkpoint is taken while {unfit}")
        return
    rate = max(0.0, draft.job.step_rate)
    reached = targets.estimated_step(draft, members, rate)
    slack = (targets.SLACK_STEPS + rate * targets.COMMAND_LATENCY_S) * 2.0**status.late_saves
    soonest = math.ceil(reached + slack)
    if hold_s > 0:
        held_at = targets.hold_target(draft, members, rate, hold_s)
        _begin(draft, members, open_checkpoint(draft, held_at, final=False, hold_s=hold_s))
        return
    target = targets.target(draft, reached, slack, soonest, rate)
    if target is not None and rested(draft):
        _begin(draft, members, open_checkpoint(draft, target, final=False))


def open_checkpoint(
    draft: Draft, step: Step, *, final: bool, hold_s: float = 0.0, asked: bool = False
) -> OpenRecord:
    """Write the intent under a number that was never used before."""
    timeout_s = draft.spec.checkpoint.timeout_s
    status = draft.status
    seq = Seq(status.seq_last + 1)
    record = OpenRecord(
        draft.fleet.term,
        status.uid,
        seq,
        status.attempt,
        step,
        draft.moment.nonce,
        status.world_size,
        min(timeout_s, round(hold_s, 3)) if hold_s > 0 else timeout_s,
        final,
        targets.token(draft),
        (),
        iso(draft.moment.wall),
        round(hold_s, 3),
        asked,
    )
    _intend(draft, record)
    draft.say(f"opening checkpoint {seq} at step {step}" + (", which the script saves" if asked else ""))
    return record


def open_import(draft: Draft, order_id: str, order: Order, world: int) -> None:
    """Write the intent of a checkpoint whose bytes come from elsewhere, of no attempt's ranks."""
    status = draft.status
    seq = Seq(status.seq_last + 1)
    record = OpenRecord(
        draft.fleet.term,
        status.uid,
        seq,
        # Between attempts nobody runs under this number, and none begins before the outcome.
        status.attempt,
        order.step,
        draft.moment.nonce,
        world,
        order.timeout_s,
        opened_at=iso(draft.moment.wall),
        imported=order_id,
    )
    _intend(draft, record)
    draft.event(
        EventReason.USER_REQUESTED,
        f"checkpoint {seq} of step {order.step} is being imported" + (f" by {order.by}" if order.by else ""),
        f"checkpoint/{seq}",
    )


def _intend(draft: Draft, record: OpenRecord) -> None:
    name, seq = draft.job.name, record.seq
    draft.put(draft.keys.open(name, seq), record, 0)
    # A number that has a commit record was given out before: a status from a backup, perhaps.
    draft.guard(draft.keys.checkpoint(name, seq), 0)
    draft.set(seq_last=seq)


def rested(draft: Draft) -> bool:
    """Whether enough time has passed since saves failed; late ones are tried again at once."""
    failed = draft.status.failed_saves
    if failed == 0:
        return True
    due = draft.status_seen_at + min(FAILED_BACKOFF_S_MAX, FAILED_BACKOFF_S * 2.0 ** min(failed - 1, 10))
    if draft.now >= due:
        return True
    draft.wake(due)
    draft.say("the last checkpoint failed; the next one waits a little")
    return False
