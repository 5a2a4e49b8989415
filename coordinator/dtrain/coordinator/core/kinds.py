"""Machines whose releases cut a checkpoint in different ways: they train together, and cannot save together.

While agents are upgraded one by one a fleet has both kinds. A job gets machines of one kind where there are
enough; one that had to take both goes on with one kind as soon as it can, since until then it loses
all that it computes with the next machine that goes.
"""

from collections.abc import Iterable, Sequence, Set

from dtrain.coordinator.core import placement, releases
from dtrain.coordinator.core.draft import Draft
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import Member
from dtrain.protocol.wording import some


def are_mixed(versions: Iterable[str]) -> bool:
    """Whether ranks of these releases could not save together; "" is one that nobody has noted."""
    return len({releases.is_former(version) for version in versions if version}) > 1


def obstacle(members: Sequence[Member]) -> str:
    """Why an attempt of these cannot save, or "". What started the ranks counts, not what watches them."""
    if not are_mixed(member.version for member in members):
        return ""
    shown = some((f"{member.agent} {member.version}" for member in members), placement.SHOWN_MAX)
    return f"nothing can be saved: the ranks are of two releases ({shown}); see docs/compatibility.md"


def tell_begin(draft: Draft, members: Sequence[Member]) -> None:
    """Say it when such an attempt begins."""
    if text := obstacle(members):
        draft.event(EventReason.MIXED_RELEASES, text, warning=True)


def due(draft: Draft) -> frozenset[AgentName]:
    """Machines of one kind that the job could go on with; () if it can save, or there are not enough."""
    if draft.fleet.brake or not obstacle(draft.status.members):
        return frozenset()
    chosen = placement.of_one_kind(draft.spec, placement.candidates(draft))
    if are_mixed(view.node.version for view in chosen.values()) or len(chosen) < draft.spec.nnodes_min:
        return frozenset()
    return frozenset(chosen)


def note_end(draft: Draft, chosen: Set[AgentName]) -> str:
    """Record that the attempt ends because of it, which costs no restart; return the reason."""
    names = some(sorted(chosen), placement.SHOWN_MAX)
    text = f"going on with machines of one release ({names}) to save again"
    draft.event(EventReason.MIXED_RELEASES, text)
    draft.set(charge=False, fruitless=0)
    return text
