"""Which machines an attempt runs on, and which ranks each of them gets.

All or nothing (gang), one member per machine. Machines that held ranks keep
their place where possible, so that warm launchers and caches are of use.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from dtrain.coordinator.core import releases
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import STARTED_PHASES
from dtrain.coordinator.core.queue import held_back
from dtrain.coordinator.core.views import AgentView
from dtrain.protocol.ids import AgentName, JobName, Rank
from dtrain.protocol.job import JobPhase, JobSpec, Member
from dtrain.protocol.snapshot import WorkerPhase
from dtrain.protocol.wording import count, more, some

JOIN_WINDOW_S = 2.0
"""How long a job with enough machines waits for more of those it may have."""

UNREACHABLE_REST_S = 15.0
"""How long an agent that did not answer is left alone. After that it is tried again:
nothing but a command can find out that it answers again."""

SHOWN_MAX = 4
"""Names of machines in a sentence."""


@dataclass(frozen=True, slots=True)
class Placement:
    """``members`` (), and why, if the job cannot be placed now."""

    members: tuple[Member, ...] = ()
    why: str = ""


def place(
    draft: Draft,
    *,
    avoid: Set[AgentName] = frozenset(),
    without: Set[AgentName] = frozenset(),
    only: Set[AgentName] = frozenset(),
    join_window: bool,
) -> Placement:
    """Choose members for the next attempt.

    ``avoid`` and ``without``, and if ``only`` is not empty what is not in it, are used only if there
    are not enough others for the smallest size. With ``join_window`` fewer than ``nnodes_max`` machines are
    taken only after JOIN_WINDOW_S, unless the job goes on with machines that it had.
    """
    spec = draft.spec
    if draft.fleet.brake:
        draft.say(draft.fleet.brake)  # its numbers change: they are not stored
        return Placement(why="nothing is placed while the brake is on")
    if why := _behind_others(draft):
        return Placement(why=why)
    usable = candidates(draft)
    if len(usable) < spec.nnodes_min:
        return Placement(why=_short_of(draft, usable))
    usable = _enough(spec, usable, usable.keys() - avoid)
    usable = _enough(spec, usable, usable.keys() - without)
    if only:
        return Placement(_seat_ranks(draft, of_one_kind(spec, _enough(spec, usable, only)), avoid))
    usable = of_one_kind(spec, usable)
    if draft.status.phase is JobPhase.RECOVERING:
        # A job that may grow later waits now for nobody who has to import everything first.
        known = previous_places(draft).keys()
        ready = {name: view for name, view in usable.items() if name in known or is_warm(draft, name)}
        if len(ready) >= spec.nnodes_min:
            return Placement(_seat_ranks(draft, ready, avoid))
    if join_window and len(usable) < spec.nnodes_max:
        # Counted from when the last of the needed machines was first seen.
        needed = sorted(view.seen_at for view in usable.values())[spec.nnodes_min - 1]
        begun = max(needed, draft.in_phase_since if draft.in_phase_since is not None else draft.now)
        if draft.now < begun + JOIN_WINDOW_S:
            draft.wake(begun + JOIN_WINDOW_S)
            return Placement(why=f"waiting a moment for more than {spec.nnodes_min} agents")
    return Placement(_seat_ranks(draft, usable, avoid))


def _behind_others(draft: Draft) -> str:
    """Why it is not its turn; "": it is, or nobody else waits."""
    if draft.fleet.queue.changes_at is not None:
        draft.wake(draft.fleet.queue.changes_at)
    return draft.fleet.queue.why(draft.job.name)


def _enough(
    spec: JobSpec, usable: dict[AgentName, AgentView], wanted: Set[AgentName]
) -> dict[AgentName, AgentView]:
    """Those that are wanted, if a job can run on them; else all."""
    found = {name: view for name, view in usable.items() if name in wanted}
    return found if len(found) >= spec.nnodes_min else usable


def of_one_kind(spec: JobSpec, usable: dict[AgentName, AgentView]) -> dict[AgentName, AgentView]:
    """Those whose ranks can save together, the newer ones if both kinds have room for as many; else all."""
    former = {name: view for name, view in usable.items() if releases.is_former(view.node.version)}
    newer = {name: view for name, view in usable.items() if name not in former}
    kind = max(newer, former, key=lambda found: min(len(found), spec.nnodes_max))
    return kind if len(kind) >= spec.nnodes_min else usable


def ranks_on(spec: JobSpec, view: AgentView) -> int:
    """Ranks that the job has on a machine of its; 0: it can have none there."""
    if spec.package is not None and releases.is_former(view.node.version):
        return 0  # its agent would look for the folder on its own disk
    if not spec.nproc_per_node and releases.is_former(view.node.version):
        return 0  # its agent takes that number from the job file, and would start none
    return spec.nproc_per_node or view.node.slots


def has_room(spec: JobSpec, view: AgentView, used: int) -> bool:
    """Whether a machine on which other jobs take ``used`` slots has enough for this one."""
    return 0 < ranks_on(spec, view) <= view.node.slots - used


def candidates(
    draft: Draft, *, silent: Set[AgentName] = frozenset(), growing: bool = False
) -> dict[AgentName, AgentView]:
    """Agents that could take this job's ranks now.

    ``silent``: also if they did not answer lately. ``growing``: without those that any waiting
    job claims, wherever this one stands.
    """
    fleet = draft.fleet
    held = fleet.queue.claimed() if growing else fleet.queue.held_from(draft.job.name)
    found = {}
    for name, view in fleet.agents.items():
        if name in fleet.cordoned or blocked(draft, name, view) or view.draining_at is not None:
            continue
        if not has_room(draft.spec, view, fleet.used.get(name, 0) + held.get(name, 0)):
            continue
        if name not in silent and resting(draft, name, view):
            continue
        found[name] = view
    return found


def blocked(draft: Draft, name: AgentName, view: AgentView) -> bool:
    """Whether something on the machine does not die: nothing is started beside it until it is gone."""
    stored = draft.job.workers.get(name)
    return bool(view.node.problem) or (stored is not None and bool(stored.value.stuck))


def resting(draft: Draft, name: AgentName, view: AgentView) -> bool:
    """Whether an agent did not answer lately, in its present life."""
    since = draft.fleet.unreachable.get(name)
    if since is None or since < view.seen_at or draft.now >= since + UNREACHABLE_REST_S:
        return False
    draft.wake(since + UNREACHABLE_REST_S)
    return True


def _seat_ranks(
    draft: Draft, usable: dict[AgentName, AgentView], avoid: Set[AgentName]
) -> tuple[Member, ...]:
    spec = draft.spec
    before = previous_places(draft)
    chosen = sorted(usable, key=lambda name: preference(draft, name, before, avoid))[: spec.nnodes_max]
    places: dict[int, AgentName] = {}
    for name in chosen:
        place_before = before.get(name)
        if place_before is not None and place_before < len(chosen) and place_before not in places:
            places[place_before] = name
    rest = [name for name in chosen if name not in places.values()]
    for node_rank in range(len(chosen)):
        if node_rank not in places:
            places[node_rank] = rest.pop(0)
    members: list[Member] = []
    first = 0
    for node_rank in range(len(chosen)):
        view = usable[places[node_rank]]
        nproc = ranks_on(spec, view)
        node = view.node
        members.append(
            Member(places[node_rank], node_rank, Rank(first), nproc, node.incarnation, node.version)
        )
        first += nproc
    return tuple(members)


def preference(
    draft: Draft,
    name: AgentName,
    before: Mapping[AgentName, int] | None = None,
    avoid: Set[AgentName] = frozenset(),
) -> tuple[bool, bool, int, str]:
    """Sorts machines: those that answer, those whose launcher is warm, those that held ranks before."""
    places = before or {}
    doubtful = name in avoid or name in draft.fleet.unreachable
    place = places.get(name, len(draft.fleet.agents) + len(places))
    return doubtful, not is_warm(draft, name), place, name


def is_warm(draft: Draft, name: AgentName) -> bool:
    """Whether the agent, in its present life, has a launcher of this submission that could fork at once."""
    stored, view = draft.job.workers.get(name), draft.fleet.agents.get(name)
    if stored is None or view is None or stored.value.uid != draft.status.uid:
        return False
    snapshot = stored.value
    # Of a failed attempt the launcher may be what failed: its agent says whether there is one.
    started = snapshot.phase in STARTED_PHASES - {WorkerPhase.ERROR} or snapshot.phase is WorkerPhase.READY
    # Beside an attempt (between two there are no members) ranks of others were left behind. A machine
    # that lost them and is back within a TTL is still shown in its former life: all would stand
    # still while it imports.
    members = draft.status.members
    runs = started and (not members or any(member.agent == name for member in members))
    return snapshot.incarnation == view.node.incarnation and (snapshot.warm or runs)


def previous_places(draft: Draft) -> dict[AgentName, int]:
    """Node rank of each machine in the newest attempt it took part in.

    From the stored members or, between attempts, from the snapshots: a member
    that is gone has no place to keep.
    """
    firsts: dict[AgentName, int] = {}
    for name, stored in draft.job.workers.items():
        snapshot = stored.value
        if snapshot.uid == draft.status.uid and snapshot.ranks:
            firsts[name] = min(rank.rank for rank in snapshot.ranks)
    if nproc := draft.spec.nproc_per_node:
        places = {name: first // nproc for name, first in firsts.items()}
    else:
        # Machines differ: only their order is known.
        places = {name: place for place, name in enumerate(sorted(firsts, key=firsts.__getitem__))}
    stored_status = draft.stored
    if stored_status is not None and stored_status.uid == draft.status.uid:
        places.update({member.agent: member.node_rank for member in stored_status.members})
    return places


def draining(names: Sequence[AgentName]) -> str:
    """Who is about to go, in words."""
    return f"{some(names, SHOWN_MAX)} {'is' if len(names) == 1 else 'are'} draining"


def _short_of(draft: Draft, usable: dict[AgentName, AgentView]) -> str:
    spec, fleet = draft.spec, draft.fleet
    held = fleet.queue.held_from(draft.job.name)
    missing = spec.nnodes_min - len(usable)
    plural = "" if spec.nnodes_min == 1 else "s"
    slots = count(spec.nproc_per_node, "free slot")
    if not spec.nproc_per_node:
        slots = "all slots free"
    parts = []
    leaving = sorted(name for name, view in fleet.agents.items() if view.draining_at is not None)
    staying = {name: view for name, view in fleet.agents.items() if view.draining_at is None}
    cordoned = sum(1 for name in staying if name in fleet.cordoned)
    sound = {
        name: view
        for name, view in staying.items()
        if name not in fleet.cordoned and not blocked(draft, name, view)
    }
    stuck = len(staying) - cordoned - len(sound)
    former, small, full, kept = 0, 0, 0, dict[JobName, list[AgentName]]()
    for name, view in sorted(sound.items()):
        used = fleet.used.get(name, 0)
        if view.node.slots and not ranks_on(spec, view):
            former += 1
        elif not has_room(spec, view, 0):
            small += 1
        elif not has_room(spec, view, used):
            full += 1
        elif not has_room(spec, view, used + held.get(name, 0)):
            kept.setdefault(fleet.queue.holders(draft.job.name, name)[0], []).append(name)
    silent = len(sound) - former - small - full - sum(map(len, kept.values())) - len(usable)
    if leaving:
        parts.append(draining(leaving))
    if full:
        parts.append(f"{full} without {slots}")
    if small:
        parts.append(
            f"{small} with fewer slots in all" if spec.nproc_per_node else f"{small} without any slot"
        )
    for job, names in kept.items():
        parts.append(held_back(names[:SHOWN_MAX], job) + more(len(names), SHOWN_MAX))
    if former:
        lacking = "packed working directories" if spec.package is not None else "nproc_per_node: auto"
        parts.append(f"{former} of a release without {lacking}")
    if cordoned:
        parts.append(f"{cordoned} cordoned")
    if stuck:
        parts.append(f"{stuck} with a process that cannot be killed")
    if silent:
        parts.append(f"{silent} not answering")
    detail = f" ({', '.join(parts)})" if parts else ""
    return f"waiting for {missing} of {spec.nnodes_min} agent{plural} with {slots}{detail}"
