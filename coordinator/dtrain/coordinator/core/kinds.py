"""Machines whose releases cut a checkpoint in different ways: they train together, and cannot save together.

While agents are upgraded one by one a fleet has both kinds. A job gets machines of one kind where there are
enough; one that had to take both goes on with one kind as soon as it can, since until then it loses
all that it computes with the next machine that goes.
"""

from collections.abc import Iterable, Sequence

from dtrain.coordinator.core import placement, releases
from dtrain.coordinator.core.draft import Draft
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import Member


def are_mixed(versions: Iterable[str]) -> bool:
    """Whether ranks of these releases could not save together; "" is one that nobody has noted."""
    return len({releases.is_former(version) for version in versions if version}) > 1


def of_members(members: Sequence[Member]) -> bool:
    """Whether an attempt of these cannot save. What started the ranks counts, not what watches them now."""
    return are_mixed(member.version for member in members)


def tell_begin(draft: Draft, members: Sequence[Member]) -> None:
    """Say it when such an attempt begins."""
    if of_members(members):
        draft.event(EventReason.MIXED_RELEASES, _sentence(members), warning=True)


def due(draft: Draft) -> frozenset[AgentName]:
    """Machines of one kind that the job could go on with; () if it can save, or there are not enough."""
    status = draft.status
    if draft.fleet.brake or not of_members(status.members):
        return frozenset()
    free = placement.candidates(draft)
    chosen = placement.of_one_kind(draft.spec, free)
    if are_mixed(view.node.version for view in chosen.values()) or len(chosen) < draft.spec.nnodes_min:
        draft.explain(_sentence(status.members))
        return frozenset()
    return frozenset(chosen)


def note_end(draft: Draft, chosen: frozenset[AgentName]) -> str:
    """Record that the attempt ends because of it, which costs no restart; return the reason."""
    names = ", ".join(sorted(chosen)[: placement.SHOWN_MAX])
    text = f"going on with machines of one release ({names}) to save again"
    draft.event(EventReason.MIXED_RELEASES, text)
    draft.set(charge=False, fruitless=0)
    return text


def _sentence(members: Sequence[Member]) -> str:
    shown = ", ".join(f"{member.agent} {member.version}" for member in members[: placement.SHOWN_MAX])
    more = len(members) - placement.SHOWN_MAX
    shown += f" and {more} more" if more > 0 else ""
    return f"nothing can be saved: the ranks are of two releases ({shown}); see docs/upgrades"
