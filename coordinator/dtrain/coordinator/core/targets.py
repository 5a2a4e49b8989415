"""At which step the next checkpoint is taken: soon, on the policy's grid, and ahead of every rank.

A rank that is past the step when it hears of it can only say so, and the checkpoint is aborted.
"""

import math
from collections.abc import Sequence

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.coordinator.core.stamps import parse_iso
from dtrain.protocol.ids import Step
from dtrain.protocol.job import Wanted

COMMAND_LATENCY_S = 0.5
"""From a decision to the moment at which a rank knows the target step."""

HOLD_LATENCY_S = 1.0
"""The same for a step that ranks are to hold at."""

HOLD_AHEAD_SHARE = 0.2
"""Of the time that is left: how far ahead such a step may be."""

SLACK_STEPS = 2
"""Added to the target step: ranks of a synchronous job are at most one step apart."""

LEAD_S = 1.0
"""A periodic checkpoint is opened that much earlier than it must, so that it hits its step."""

REPORT_AGE_S_MAX = 60.0
"""Reports are refreshed at least that often: an older one says nothing about the rate."""


def hold_target(draft: Draft, members: Sequence[Seat], rate: float, hold_s: float) -> Step:
    """Step to hold at: no step before it is lost, so it is further ahead than others; too late costs a try.

    A rank that hears of it late is not past it but in the next step, where it waits for those that hold.
    """
    if rate <= 0:
        # Too young to be measured: what it has done since it began to train.
        since = parse_iso(draft.status.since)
        age_s = 0.0 if since is None else draft.moment.wall - since
        done = max((rank.step for seat in members for rank in seat.ranks), default=0) - _base_step(draft)
        rate = max(0, done) / max(1.0, age_s)
    reached = estimated_step(draft, members, rate)
    slack = (SLACK_STEPS + rate * HOLD_LATENCY_S) * 2.0**draft.status.late_saves
    # Never so far that the time is over before it is reached.
    return Step(math.ceil(reached + min(slack, SLACK_STEPS + rate * hold_s * HOLD_AHEAD_SHARE)))


def target(draft: Draft, reached: float, slack: float, soonest: int, rate: float) -> Step | None:
    """Step of the checkpoint that is due now; asks to be called again when one will be."""
    policy = draft.spec.checkpoint
    if token(draft):
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


def token(draft: Draft) -> str:
    """Return the request of an operator for a checkpoint that has not been met yet, or ""."""
    intent = draft.job.intent
    if intent is None or intent.value.uid != draft.status.uid or intent.value.wanted is not Wanted.RUN:
        return ""
    token = intent.value.checkpoint_token
    return token if token != draft.status.token_done else ""


def estimated_step(draft: Draft, members: Sequence[Seat], rate: float) -> float:
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
