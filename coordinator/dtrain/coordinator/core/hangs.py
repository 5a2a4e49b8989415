"""No rank of a job completes a step: is it hung, and who holds up the others?

A machine can only say that its own ranks stand still, and one that is slow makes all others wait. So a job
is hung only if every rank that still trains is over its deadline, on machines that are all there. Then all
are asked for stacks. Whoever has gone on until those are there, or was found at work, takes its stall back.
The decision holds only if no snapshot has changed since.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat, Standing
from dtrain.protocol.commands import DumpStacks
from dtrain.protocol.ids import AgentName
from dtrain.protocol.snapshot import Failure, FailureKind, Stack, StackKind, Stall, WorkerPhase

GUARDS_MAX = 60
"""Snapshots that a decision is tied to: of one transaction."""

AGAIN_S = 40.0
"""Less than the interval at which snapshots are written anew: counted from their last change."""

_LIKELY = (
    StackKind.STOPPED,
    StackKind.KERNEL,
    StackKind.DATA,
    StackKind.CODE,
    StackKind.UNKNOWN,
    StackKind.COLLECTIVE,
)
"""Who is in a collective waits for the others: the last to be blamed."""

_DOES = {
    StackKind.STOPPED: "was stopped by a signal",
    StackKind.KERNEL: "does not come back from a system call",
    StackKind.DATA: "waits for data",
    StackKind.CODE: "does not come back from its own code",
    StackKind.UNKNOWN: "does nothing that can be seen",
    StackKind.COLLECTIVE: "waits in a collective",
}


@dataclass(frozen=True, slots=True)
class Suspect:
    """A rank that stands still, and what it does."""

    agent: AgentName
    stack: Stack


def find(draft: Draft, members: Sequence[Seat]) -> Failure | None:
    """The hang that ends the attempt, if it is one; asks for stacks where they are needed to tell."""
    stalls = _all_stalled(members)
    if not stalls or draft.fleet.brake:
        return None
    if draft.fleet.withheld:
        draft.say(f"no rank completes a step; hangs are ended once all know of them: {draft.fleet.withheld}")
        return None
    dump = _name(draft, stalls)
    suspects = []
    for seat in members:
        snapshot = seat.snapshot
        assert snapshot is not None
        known = {stack.rank: stack for stack in snapshot.stacks if stack.dump == dump}
        if all(stall.rank in known for stall in snapshot.stalls):
            suspects += [Suspect(seat.member.agent, known[stall.rank]) for stall in snapshot.stalls]
        elif snapshot.stalls:
            why = "no rank completes a step"
            draft.command(seat.member.agent, DumpStacks(draft.header(dump), why))
    if len(suspects) < len(stalls):
        draft.say(f"no rank completes a step any more; stacks of {len(suspects)} of {len(stalls)} are there")
        return None
    behind = who(suspects)
    if _again(draft, behind) and draft.now < (due := max(seat.seen_at for seat in members) + AGAIN_S):
        draft.wake(due)
        draft.say("no rank completes a step, as in the attempt before: this time they get longer")
        return None
    for seat in members[:GUARDS_MAX]:
        stored = draft.job.workers[seat.member.agent]
        draft.guard(draft.keys.worker(seat.member.agent, draft.job.name), stored.mod_revision)
    return Failure(
        FailureKind.HANG,
        sentence(behind, suspects),
        agent=behind.agent,
        attempt=draft.status.attempt,
        rank=behind.stack.rank,
        step=behind.stack.step,
        at=draft.moment.wall,
    )


def _all_stalled(members: Sequence[Seat]) -> list[Stall]:
    """The stalls, if no rank that still trains is without one."""
    found: list[Stall] = []
    for seat in members:
        if seat.phase is WorkerPhase.DONE:
            continue
        if seat.standing is not Standing.PRESENT or not seat.current or seat.snapshot is None:
            return []
        stalled = {stall.rank: stall for stall in seat.snapshot.stalls}
        for rank in seat.ranks:
            # One that has announced its end waits for nothing but the leader.
            if rank.exit_code is None and rank.last_step is None:
                if rank.rank not in stalled:
                    return []
                found.append(stalled[rank.rank])
    return found


def _name(draft: Draft, stalls: Sequence[Stall]) -> str:
    """Of this standstill: after any progress, and for a longer deadline, stacks are asked for anew."""
    text = repr(sorted((stall.rank, stall.step, stall.deadline_s) for stall in stalls))
    return f"stacks.{draft.status.attempt}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def who(suspects: Sequence[Suspect]) -> Suspect:
    """The rank that the others wait for: the lowest step, then what it does, then the fewest collectives.

    Of ranks that all wait in collectives, the one that waits in another than most.
    """
    numbers = [_collective(one.stack) for one in suspects]
    places = Counter(one.stack.where for one in suspects)
    known = None not in numbers

    def order(one: Suspect) -> tuple[int, int, int, int, int]:
        number = _collective(one.stack) if known else None
        return (
            one.stack.step,
            _LIKELY.index(one.stack.kind),
            0 if number is None else number,
            places[one.stack.where],
            one.stack.rank,
        )

    return min(suspects, key=order)


def _again(draft: Draft, behind: Suspect) -> bool:
    """Whether the attempt before was ended for just this, with all ranks in a collective: it may be slow.

    Agents see to it where a rank was not; of one in a collective they cannot know what it waits for.
    """
    before = draft.status.failure
    return (
        behind.stack.kind is StackKind.COLLECTIVE
        and before is not None
        and before.kind is FailureKind.HANG
        and before.attempt == draft.status.attempt - 1
        and before.step >= behind.stack.step
        and _text(behind.stack) in before.message
    )


def _collective(stack: Stack) -> int | None:
    number = stack.collective.partition(" ")[0]
    return int(number) if number.isdecimal() else None


def sentence(behind: Suspect, suspects: Sequence[Suspect]) -> str:
    """What is known of a hang, in one sentence."""
    stack = behind.stack
    text = f"no step is completed after step {stack.step}: this rank {_text(stack)}"
    others = Counter(one.stack.kind for one in suspects if one is not behind)
    if others:
        counts = [f"{count} {kind.value}" for kind, count in sorted(others.items())]
        text += f"; the other {sum(others.values())}: {', '.join(counts)}"
    return text


def _text(stack: Stack) -> str:
    return _DOES[stack.kind] + (f", in {stack.where}" if stack.where else "")
