"""The checkpoint transaction: open, follow, commit or abort, settle.

A checkpoint is decided by one etcd transaction and by nothing else. Its intent
(``open/<seq>``) is written before any blob; it is committed only if every rank
of the attempt reported the same seq, nonce and step durable and the leader has
verified them; anything else deletes the intent. Training never waits for it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dtrain.coordinator.core import nonfinite, sealed, tally
from dtrain.coordinator.core.decisions import VerifyCheckpoint
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.coordinator.core.stamps import iso, parse_iso
from dtrain.coordinator.core.tally import Cause
from dtrain.coordinator.core.views import Stored, Verdict
from dtrain.protocol.checkpoint import CommitRecord, Latest, OpenRecord, Order
from dtrain.protocol.commands import AbortCheckpoint, BeginCheckpoint, ConfirmCheckpoint
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank, Seq, Step
from dtrain.protocol.job import JobPhase, Wanted
from dtrain.protocol.snapshot import DurablePart, RankState, SaveProblem, WorkerSnapshot
from dtrain.protocol.wording import some

COMMAND_LATENCY_S = 0.5
"""From a decision to the moment at which a rank knows the target step."""

HOLD_LATENCY_S = 1.0
"""The same for a step that ranks are to hold at."""

HOLD_AHEAD_SHARE = 0.2
"""Of the time that is left: how far ahead such a step may be."""

SLACK_STEPS = 2
"""Added to the target step: ranks of a synchronous job are at most one step apart."""

SLACK_DOUBLINGS_MAX = 10
LEAD_S = 1.0
"""A periodic checkpoint is opened that much earlier than it must, so that it hits its step."""

REPORT_AGE_S_MAX = 60.0
"""Reports are refreshed at least that often: an older one says nothing about the rate."""

VERIFY_RETRY_S = 2.0
"""Pause before a store that did not answer is asked again about an open checkpoint."""

SETTLE_S = 15.0
"""How long a new attempt waits for a complete checkpoint of the old one to be verified."""

FAILED_BACKOFF_S = 5.0
FAILED_BACKOFF_S_MAX = 60.0

FINAL_TRIES_MAX = 3
"""Tries of the checkpoint at the end of training; then ranks are let go without it."""

TOLD_MAX = 8
"""So many ranks are told by number."""


# What is there ------------------------------------------------------------------


def durable_parts(draft: Draft, record: OpenRecord) -> dict[Rank, DurablePart]:
    """Durable parts of one open checkpoint by rank, whoever remembers them.

    A part counts only if seq, attempt, step and nonce are those of the intent:
    what a zombie of another attempt reports is not looked at.
    """
    if record.imported:
        order = draft.job.orders.get(record.imported)
        part = None if order is None or order.value.uid != record.uid else order.value.part
        return {part.rank: part} if part is not None and _belongs(part, record) else {}
    reports: list[Iterable[DurablePart]] = [record.reports]
    snapshots = [(name, draft.job.workers[name].value) for name in sorted(draft.job.workers)]
    snapshots += [(name, draft.job.departed[name]) for name in sorted(draft.job.departed)]
    reports += [_own(draft, record, name, snapshot) for name, snapshot in snapshots]
    found: dict[Rank, DurablePart] = {}
    for parts in reports:
        for part in parts:
            if _belongs(part, record):
                found.setdefault(part.rank, part)
    return found


def _own(draft: Draft, record: OpenRecord, name: AgentName, snapshot: WorkerSnapshot) -> list[DurablePart]:
    """Parts that an agent may speak of: of its own ranks, as long as it is known who has which."""
    if snapshot.uid != record.uid:
        return []
    if draft.status.attempt != record.attempt or not draft.status.members:
        return list(snapshot.durable)
    seats = [member for member in draft.status.members if member.agent == name]
    return [
        part
        for part in snapshot.durable
        if any(seat.first_rank <= part.rank < seat.first_rank + seat.nproc for seat in seats)
    ]


def _belongs(part: DurablePart, record: OpenRecord) -> bool:
    return (part.seq, part.attempt, part.step, part.nonce) == (
        record.seq,
        record.attempt,
        record.step,
        record.nonce,
    ) and 0 <= part.rank < record.world_size


def is_complete(parts: dict[Rank, DurablePart], record: OpenRecord) -> bool:
    """Whether every rank's part is durable."""
    return len(parts) == record.world_size


def own_open(draft: Draft) -> list[Stored[OpenRecord]]:
    """Open checkpoints of this submission, by seq."""
    return [stored for stored in draft.job.open if stored.value.uid == draft.status.uid]


def adopt(draft: Draft) -> bool:
    """Rewrite open records of earlier leaders under this term; True if there were any.

    Nothing else is decided about them in the same decision: from here on every
    step is guarded by a revision that this leader wrote.
    """
    adopted = False
    for stored in own_open(draft):
        if stored.value.term != draft.fleet.term:
            key = draft.keys.open(draft.job.name, stored.value.seq)
            draft.put(key, replace(stored.value, term=draft.fleet.term), stored.mod_revision)
            adopted = True
    return adopted


def remember_departed(draft: Draft, stored: Stored[OpenRecord]) -> bool:
    """Copy durable parts of agents that are gone into the open record; True if it did.

    Snapshots die with the agent's lease: without this a machine lost after its
    upload would waste a durable checkpoint at the next change of leader.
    """
    record = stored.value
    known = {part.rank for part in record.reports}
    missing = [
        part
        for name in sorted(draft.job.departed)
        for part in _own(draft, record, name, draft.job.departed[name])
        if _belongs(part, record) and part.rank not in known
    ]
    if not missing:
        return False
    by_rank = {part.rank: part for part in missing}
    reports = (*record.reports, *(by_rank[rank] for rank in sorted(by_rank)))
    key = draft.keys.open(draft.job.name, record.seq)
    draft.put(key, replace(record, term=draft.fleet.term, reports=reports), stored.mod_revision)
    return True


# Deciding about one -------------------------------------------------------------


def verdict_of(draft: Draft, record: OpenRecord) -> Verdict | None:
    """What this leader's verification of the checkpoint found; None: not verified yet."""
    return draft.job.verdicts.get((record.seq, record.nonce))


def ask_verdict(draft: Draft, record: OpenRecord, parts: dict[Rank, DurablePart]) -> None:
    """Have a complete checkpoint verified; again after a pause if the store did not answer."""
    verdict = verdict_of(draft, record)
    if verdict is not None and draft.now < verdict.at + VERIFY_RETRY_S:
        draft.wake(verdict.at + VERIFY_RETRY_S)
        return
    parent = draft.newest_good()
    draft.work(
        VerifyCheckpoint(
            draft.fleet.cluster,
            draft.job.name,
            draft.status.uid,
            draft.status.store,
            record,
            tuple(parts[rank] for rank in sorted(parts)),
            None if parent is None else parent.seq,
        )
    )


def commit(draft: Draft, stored: Stored[OpenRecord], verdict: Verdict, *, settled: bool = False) -> None:
    """Decide that the checkpoint exists.

    Guards: the open record as read, no commit record yet, ``latest`` as read.
    The attempt is not compared: a death after everything was durable must not
    waste the checkpoint.
    """
    record, name, keys = stored.value, draft.job.name, draft.keys
    parent = draft.newest_good()
    made = CommitRecord(
        draft.fleet.term,
        record.uid,
        record.seq,
        record.step,
        record.attempt,
        record.nonce,
        record.world_size,
        verdict.size_bytes,
        verdict.manifest,
        verdict.manifest_bytes,
        verdict.digest,
        None if parent is None else parent.seq,
        record.final,
        iso(draft.moment.wall),
    )
    draft.put(keys.checkpoint(name, record.seq), made, 0)
    draft.delete(keys.open(name, record.seq), stored.mod_revision)
    latest = draft.job.latest
    latest_mod = 0 if latest is None else latest.mod_revision
    if draft.writes_key(keys.latest(name)):
        pass  # a lower seq was committed before in this decision; callers go from the newest down
    elif latest is None or latest.value.seq < record.seq:
        draft.put(keys.latest(name), Latest(draft.fleet.term, record.seq, record.step), latest_mod)
    else:
        draft.guard(keys.latest(name), latest_mod)
    draft.committed.append(made)
    status = draft.status
    draft.set(
        late_saves=max(0, status.late_saves - 1),
        failed_saves=0,
        token_done=record.token or status.token_done,
        tally=tally.committed(status, verdict.size_bytes),
    )
    draft.event(
        EventReason.CHECKPOINT_SETTLED if settled else EventReason.CHECKPOINT_COMMITTED,
        f"checkpoint {record.seq} of step {record.step} is committed"
        + (" although its attempt has ended" if settled else "")
        + (", the last one of the job" if record.final else ""),
        f"checkpoint/{record.seq}",
    )


def abort(
    draft: Draft,
    stored: Stored[OpenRecord],
    why: str,
    cause: Cause = Cause.SUPERSEDED,
    *,
    late: bool = False,
    warning: bool = True,
) -> None:
    """Decide that the checkpoint will never be."""
    record = stored.value
    draft.delete(draft.keys.open(draft.job.name, record.seq), stored.mod_revision)
    draft.aborted[record.seq] = why
    status = draft.status
    draft.set(tally=tally.aborted(status, Cause.LATE if late else cause))
    if late:
        draft.set(late_saves=min(SLACK_DOUBLINGS_MAX, status.late_saves + 1))
    elif warning:
        draft.set(failed_saves=status.failed_saves + 1)
    if record.final and not late:
        draft.set(final_tries=status.final_tries + 1)
    draft.event(
        EventReason.CHECKPOINT_ABORTED,
        f"checkpoint {record.seq} of step {record.step} is aborted: {why}",
        f"checkpoint/{record.seq}",
        warning=warning and not late,
    )


def abort_unfit(draft: Draft, stored: Stored[OpenRecord], why: str) -> None:
    """Abort what a number speaks against; at the end of training another try would find the same."""
    abort(draft, stored, why, Cause.UNFIT)
    if stored.value.final:
        draft.set(final_tries=FINAL_TRIES_MAX)


# While the job runs --------------------------------------------------------------


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
    ranks = _all_ranks(members)
    if ranks is None:
        return None
    steps = [rank.last_step for rank in ranks if rank.last_step is not None or rank.exit_code != 0]
    if not steps:
        return None
    if any(step is None for step in steps):
        return None
    known = sorted({step for step in steps if step is not None})
    return Ended(known[-1], len(known) == 1, tuple(known))


def can_checkpoint(draft: Draft, members: Sequence[Seat]) -> bool:
    """A store is configured and every rank has joined through the SDK."""
    ranks = _all_ranks(members)
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
    ranks = _all_ranks(members)
    if not draft.status.store or (ranks is not None and not all(rank.sdk for rank in ranks)):
        return True
    if not own_open(draft) and nonfinite.unfit_now(draft, members):
        return True
    if ranks is None or own_open(draft) or any(rank.step for rank in ranks):
        return False
    # Nothing is computed yet; but an agent that has come back does not know the steps before its ranks have.
    return all(
        seat.snapshot is not None and seat.snapshot.incarnation == seat.member.incarnation for seat in members
    )


def _all_ranks(members: Sequence[Seat]) -> list[RankState] | None:
    ranks = [rank for seat in members for rank in seat.ranks]
    expected = sum(seat.member.nproc for seat in members)
    return ranks if ranks and len(ranks) == expected else None


def drive(draft: Draft, members: Sequence[Seat], *, hold_s: float = 0.0) -> None:
    """Follow the open checkpoint of the running attempt, or open the next one when due.

    With ``hold_s`` one is due now, may take that long, and ranks stay at its step.
    """
    current: Stored[OpenRecord] | None = None
    for stored in own_open(draft):
        if stored.value.attempt != draft.status.attempt or current is not None:
            abort(draft, stored, "it belongs to an attempt that is over", warning=False)
        else:
            current = stored
    if current is not None:
        _follow(draft, members, current)
    elif can_checkpoint(draft, members) or (draft.status.store and save_asks(members)):
        _open_if_due(draft, members, hold_s)
    elif _token(draft):
        why = "its ranks have not joined through the SDK" if draft.status.store else "it has no store"
        draft.say(f"the checkpoint asked for cannot be taken: {why}")


def _follow(draft: Draft, members: Sequence[Seat], stored: Stored[OpenRecord]) -> None:
    record = stored.value
    if remember_departed(draft, stored):
        return
    parts = durable_parts(draft, record)
    problem = _first_problem(members, record.seq)
    verdict = verdict_of(draft, record)
    ended = end_of_training(members)
    asks = save_asks(members)
    deadline = stored.seen_at + record.timeout_s
    if unfit := nonfinite.refusal(draft, record):
        abort_unfit(draft, stored, unfit)
    elif verdict is not None and verdict.ok and is_complete(parts, record):
        if ended is not None and ended.agree and ended.step == record.step:
            # Training ended at the step that was due anyway: a second one would hold the same.
            stored = replace(stored, value=replace(record, final=True))
        commit(draft, stored, verdict)
    elif problem is not None:
        why = f"rank {problem.rank}: {problem.message}" + _who_asks(members, record)
        # A script's own step is not chosen anew: no slack would help.
        abort(draft, stored, why, Cause.RANK, late=problem.late and not record.asked)
    elif not record.asked and not parts and asks and record.step >= (first := min(asks.values())):
        # Ranks that wait in a save never come to it, or hand over something else at it.
        abort(draft, stored, f"the script saves step {first} itself", warning=False)
    elif verdict is not None and not verdict.ok and not verdict.retry:
        abort(draft, stored, verdict.problem, Cause.VERIFY)
    elif ended is not None and ended.step < record.step:
        abort(draft, stored, f"training ended at step {ended.step}", warning=False)
    elif draft.now >= deadline:
        missing = [rank for rank in range(record.world_size) if rank not in parts]
        late = f"ranks {some(missing, TOLD_MAX)} are not durable" if missing else "it could not be verified"
        why = f": {verdict.problem}" if verdict is not None and verdict.problem else ""
        why = f"{late} within {record.timeout_s:g} s{why}" + _who_asks(members, record)
        abort(draft, stored, why, Cause.TIMEOUT)
    else:
        draft.wake(deadline)
        if is_complete(parts, record):
            draft.say(f"verifying checkpoint {record.seq} of step {record.step}")
            ask_verdict(draft, record, parts)
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
    return "; " + ", ".join(f"ranks {some(ranks, TOLD_MAX)} {wish}" for wish, ranks in groups.items())


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
    ended = end_of_training(members)
    if ended is not None:
        if ended.agree and not _may_go(draft, members) and (unfit := nonfinite.unfit_now(draft, members)):
            draft.set(final_tries=FINAL_TRIES_MAX)
            text = f"there will be no checkpoint of the end of training: {unfit}"
            draft.event(EventReason.NON_FINITE, text, warning=True)
        elif ended.agree and not _may_go(draft, members) and rested(draft):
            _begin(draft, members, open_checkpoint(draft, ended.step, final=True))
        return
    if any(rank.last_step is not None for seat in members for rank in seat.ranks):
        return  # some ranks have ended: the others are about to, and a later step never comes
    if not any(rank.step for seat in members for rank in seat.ranks) and not _token(draft):
        return  # nothing has been computed yet
    if unfit := nonfinite.unfit_now(draft, members):
        draft.say(f"no checkpoint is taken while {unfit}")
        return
    rate = max(0.0, draft.job.step_rate)
    reached = _estimated_step(draft, members, rate)
    slack = (SLACK_STEPS + rate * COMMAND_LATENCY_S) * 2.0**status.late_saves
    soonest = math.ceil(reached + slack)
    if hold_s > 0:
        held_at = _hold_target(draft, members, rate, hold_s)
        _begin(draft, members, open_checkpoint(draft, held_at, final=False, hold_s=hold_s))
        return
    target = _target(draft, reached, slack, soonest, rate)
    if target is not None and rested(draft):
        _begin(draft, members, open_checkpoint(draft, target, final=False))


def _hold_target(draft: Draft, members: Sequence[Seat], rate: float, hold_s: float) -> Step:
    """Step to hold at: no step before it is lost, so it is further ahead than others; too late costs a try.

    A rank that hears of it late is not past it but in the next step, where it waits for those that hold.
    """
    if rate <= 0:
        # Too young to be measured: what it has done since it began to train.
        since = parse_iso(draft.status.since)
        age_s = 0.0 if since is None else draft.moment.wall - since
        done = max((rank.step for seat in members for rank in seat.ranks), default=0) - _base_step(draft)
        rate = max(0, done) / max(1.0, age_s)
    reached = _estimated_step(draft, members, rate)
    slack = (SLACK_STEPS + rate * HOLD_LATENCY_S) * 2.0**draft.status.late_saves
    # Never so far that the time is over before it is reached.
    return Step(math.ceil(reached + min(slack, SLACK_STEPS + rate * hold_s * HOLD_AHEAD_SHARE)))


def _target(draft: Draft, reached: float, slack: float, soonest: int, rate: float) -> Step | None:
    """Step of the checkpoint that is due now; asks to be called again when one will be."""
    policy = draft.spec.checkpoint
    if _token(draft):
        return Step(soonest)
    if policy.every_seconds > 0:
        due_in = _last_save_wall(draft) + policy.every_seconds - draft.moment.wall
        if due_in <= 0:
            return Step(soonest)
        draft.wake(draft.now + due_in)
    if policy.every_steps > 0:
        every = policy.every_steps
        next_step = (_base_step(draft) // every + 1) * every
        ahead = next_step - (reached + slack + rate * LEAD_S)
        if ahead < 0.5:  # half a step early does no harm; instants are rounded
            return Step(next_step if soonest <= next_step else -(-soonest // every) * every)
        if rate > 0:
            draft.wake(draft.now + ahead / rate)
    return None


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
        _token(draft),
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


def _token(draft: Draft) -> str:
    intent = draft.job.intent
    if intent is None or intent.value.uid != draft.status.uid or intent.value.wanted is not Wanted.RUN:
        return ""
    token = intent.value.checkpoint_token
    return token if token != draft.status.token_done else ""


def _estimated_step(draft: Draft, members: Sequence[Seat], rate: float) -> float:
    """Step of the foremost rank by now: what it reported, and what it has done since."""
    return max(
        max((rank.step for rank in seat.ranks), default=0)
        + (0.0 if _is_held(draft, seat) else rate * min(REPORT_AGE_S_MAX, max(0.0, draft.now - seat.seen_at)))
        for seat in members
    )


def _is_held(draft: Draft, seat: Seat) -> bool:
    """Whether its ranks stand at a committed step, perhaps, whose outcome they have not heard.

    What has been paused for an hour is not an hour ahead when it is let go.
    """
    if seat.snapshot is None:
        return False
    step = max((rank.step for rank in seat.ranks), default=0)
    unheard = set(seat.snapshot.saving)
    return any(c.value.seq in unheard and c.value.step == step for c in draft.commits())


def _base_step(draft: Draft) -> int:
    """Step of the checkpoint that the attempt has behind it."""
    mine = [c.value.step for c in draft.commits() if c.value.attempt == draft.status.attempt]
    if mine:
        return mine[-1]
    return 0 if draft.status.restore is None else draft.status.restore.step


def _last_save_wall(draft: Draft) -> float:
    """When the attempt began to run, or its newest commit. A policy: wall clocks will do."""
    times = [parse_iso(draft.status.since)]
    times += [
        parse_iso(c.value.committed_at) for c in draft.commits() if c.value.attempt == draft.status.attempt
    ]
    # A time in the future is a clock that was wrong: it must not put checkpoints off for ever.
    return min(draft.moment.wall, max((at for at in times if at is not None), default=0.0))


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


# Outcomes -----------------------------------------------------------------------------


def final_commit(draft: Draft) -> CommitRecord | None:
    """The committed checkpoint at the end of this attempt's training."""
    known = [stored.value for stored in draft.commits()] + draft.committed
    mine = [c for c in known if c.attempt == draft.status.attempt and c.final]
    return mine[-1] if mine else None


def gave_up_final(draft: Draft) -> bool:
    """Whether the checkpoint at the end was tried often enough."""
    return draft.status.final_tries >= FINAL_TRIES_MAX


def _may_go(draft: Draft, members: Sequence[Seat]) -> bool:
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
    if not _may_go(draft, members) or own_open(draft):
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


# Between attempts ------------------------------------------------------------------------


def settle(draft: Draft, *, patient: bool) -> bool:
    """Commit each complete open checkpoint and delete the others; False while one is verified.

    A new attempt starts only after this: between choosing a restore point and
    restoring, no older checkpoint may still be committed. Not ``patient``: what
    is not verified by now is dropped.
    """
    waits = draft.status.phase in (JobPhase.RECOVERING, JobPhase.SUSPENDING)
    since = draft.in_phase_since if waits else None
    deadline = None if since is None else since + SETTLE_S
    settled = True
    for stored in reversed(own_open(draft)):  # newest first: ``latest`` is put once
        if draft.deletes_key(draft.keys.open(draft.job.name, stored.value.seq)):
            continue  # this very decision has committed or aborted it
        settled = _settle_one(draft, stored, patient, deadline) and settled
    return settled


def _settle_one(draft: Draft, stored: Stored[OpenRecord], patient: bool, deadline: float | None) -> bool:
    record = stored.value
    if record.imported:
        # Only before the first attempt, which is not to come.
        abort(draft, stored, "the job ended while it was imported", warning=False)
        return True
    if unfit := nonfinite.refusal(draft, record):
        abort_unfit(draft, stored, unfit)
        return True
    parts = durable_parts(draft, record)
    verdict = verdict_of(draft, record)
    if not is_complete(parts, record):
        missing = [Rank(rank) for rank in range(record.world_size) if rank not in parts]
        if patient and sealed.is_awaited(draft, record, missing):
            return False
        why = f"the attempt ended before ranks {some(missing, TOLD_MAX)} were durable"
        abort(draft, stored, why, warning=False)
        return True
    if verdict is not None and verdict.ok:
        commit(draft, stored, verdict, settled=True)
        return True
    if verdict is not None and not verdict.retry:
        abort(draft, stored, verdict.problem, Cause.VERIFY)
        return True
    if not patient or (deadline is not None and draft.now >= deadline):
        abort(draft, stored, "it could not be verified in time", Cause.TIMEOUT)
        return True
    if deadline is not None:
        draft.wake(deadline)
    draft.say(f"verifying checkpoint {record.seq} of step {record.step} before the next attempt")
    if not remember_departed(draft, stored):
        ask_verdict(draft, record, parts)
    return False
