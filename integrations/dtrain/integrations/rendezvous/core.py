"""Who takes part in which round, as pure functions over what etcd holds.

A run is one ``RunState``, which its nodes change by compare-and-swap, and one
key for each living node, bound to that node's lease. A *node* is one agent of
torchrun from its registration until its lease ends; an id is never used again,
so one whose key is gone is gone for good.

Rounds follow torch's own dynamic rendezvous. A round collects participants
until there are as many as it may have, or, if there are enough, until the last
call is over; then it is complete and ranks are fixed. Nodes that come later
wait, which makes the agents of the round restart their workers and meet in the
next one. Those for whom there is no room stand by.

Unlike torch's, liveness is the lease alone: no node's clock is compared with
another's, and the loss of a node ends its round at once instead of when some
collective times out. What is not promised: that two nodes never both believe
to be in a round; an agent that is cut off from etcd goes on with its workers.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass, replace

KEEPERS = 3
"""So many nodes renew the lease of the run's state: one may die without the others noticing in time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many nodes a round needs, and takes at most."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class RunState:
    """What the nodes of a run have agreed on."""

    round: int = 0
    complete: bool = False
    closed: bool = False
    """Nobody may join any more; a round that is complete goes on to its end."""
    participants: tuple[str, ...] = ()
    """In the order in which they joined. While the round is complete, those that have not left it."""
    world: tuple[str, ...] = ()
    """The last complete round's nodes by rank, whatever became of them."""
    waiting: tuple[str, ...] = ()
    """For the next round, which they cause."""
    standby: tuple[str, ...] = ()
    """For a place to become free, which they do not cause."""
    store: str = ""
    """``host:port`` of the TCPStore of the complete round; "": rank 0 has not opened it yet."""


@dataclass(frozen=True, slots=True)
class Write:
    """Replace the state, then look again."""

    state: RunState
    restart_clock: bool = False
    """The time allowed to join begins anew: it does not pass while a node stands by."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again when something has changed."""

    why: str


@dataclass(frozen=True, slots=True)
class Formed:
    """The round is complete and this node belongs to it."""

    round: int
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Closed:
    """Nobody joins any more. ``stood_by``: this node was not needed, which is no failure."""

    stood_by: bool


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The round did not form in time, and this node has taken itself out of it."""


Step = Write | Wait | Formed | Closed | TimedOut


def living(state: RunState, alive: Set[str]) -> RunState:
    """Return the state without the nodes whose leases have ended."""
    return _kept(state, lambda node: node in alive)


def leave(state: RunState, me: str) -> RunState:
    """Return the state without this node."""
    return _kept(state, lambda node: node != me)


def turn_over(state: RunState, me: str) -> RunState:
    """Return the state in which this node has left a complete round for the next one.

    In one step: between two, a node that stands by would see a free place.
    """
    if not state.complete or me not in state.participants:
        return state
    left = leave(state, me)
    if left.complete:
        return replace(left, waiting=(*left.waiting, me))
    return replace(left, participants=(me,))


def join(state: RunState, me: str, limits: Limits, *, expired: bool, last_call_over: bool) -> Step:
    """Say what a node that wants to take part does next.

    ``expired``: it has tried for as long as it may. ``last_call_over``: this
    round has had enough participants for as long as latecomers are waited for.
    """
    if state.closed:
        return Closed(stood_by=me in state.standby)
    taken = len(state.participants) + len(state.waiting)
    if me in state.standby:
        if taken >= limits.most:
            return Wait(f"all {limits.most} places are taken; standing by")
        return Write(_among_waiting(state, me), restart_clock=True)
    taking_part, waiting = me in state.participants, me in state.waiting
    if state.complete and taking_part:
        return Formed(state.round, state.world.index(me), len(state.world))
    if expired:
        return Write(leave(state, me)) if taking_part or waiting else TimedOut()
    if not taking_part and not waiting and taken >= limits.most:
        return Write(replace(state, standby=(*state.standby, me)))
    if state.complete:
        if waiting:
            return Wait(f"round {state.round} is under way; waiting for its agents to restart")
        return Write(_among_waiting(state, me))
    if not taking_part:
        joined = replace(state, participants=(*state.participants, me), waiting=_without(state.waiting, me))
        return Write(_completed(joined, limits) if _is_full(joined, limits) else joined)
    if _is_full(state, limits) or (enough(state, limits) and last_call_over):
        return Write(_completed(state, limits))
    wanted = limits.most if enough(state, limits) else limits.least
    return Wait(f"{len(state.participants)} of {wanted} nodes have joined round {state.round}")


def enough(state: RunState, limits: Limits) -> bool:
    """Tell whether an incomplete round could be completed now: the last call is on."""
    return not state.complete and len(state.participants) >= limits.least


def reasons_to_restart(state: RunState, alive: Set[str], me: str, round_number: int) -> int:
    """Return how many nodes wait for a new round, lost ones counted as one; 0: go on.

    ``round_number``: the one in which this node's workers run.
    """
    if state.closed:
        return 0
    mine = state.complete and state.round == round_number and me in state.participants
    lost = not mine or any(node not in alive for node in state.world)
    return len(state.waiting) + lost


def keeps_state(alive: Set[str], me: str) -> bool:
    """Tell whether this node is one of those that renew the lease of the state."""
    return me in sorted(alive)[:KEEPERS]


def _is_full(state: RunState, limits: Limits) -> bool:
    return len(state.participants) >= limits.most


def _completed(state: RunState, limits: Limits) -> RunState:
    """Give out the ranks: those of the last round keep their order, newcomers follow."""
    # Who waits for a place that does not exist would make a full round restart for ever.
    free = limits.most - len(state.participants)
    waiting, standby = state.waiting[:free], (*state.standby, *state.waiting[free:])
    former = [node for node in state.world if node in state.participants]
    new = [node for node in state.participants if node not in state.world]
    ranks = (*former, *new)
    return replace(state, complete=True, participants=ranks, world=ranks, waiting=waiting, standby=standby)


def _among_waiting(state: RunState, me: str) -> RunState:
    return replace(state, waiting=(*state.waiting, me), standby=_without(state.standby, me))


def _kept(state: RunState, stays: Callable[[str], bool]) -> RunState:
    kept = replace(
        state,
        participants=tuple(filter(stays, state.participants)),
        waiting=tuple(filter(stays, state.waiting)),
        standby=tuple(filter(stays, state.standby)),
    )
    if kept.complete and not kept.participants:
        return replace(kept, complete=False, round=kept.round + 1, store="")
    return kept


def _without(nodes: tuple[str, ...], gone: str) -> tuple[str, ...]:
    return tuple(node for node in nodes if node != gone)
