"""Machines beyond an attempt's own that are kept ready to take a lost one's place.

A spare is not reserved: any other job may have its slots, and then it is none any more. Which
machines they are is a function of the views alone; what an agent shows of the job tells whether it
is ready. While the attempt starts nothing is imported beside it.
"""

from dtrain.coordinator.core import placement
from dtrain.coordinator.core.draft import Draft
from dtrain.protocol.commands import Warm
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import WorkerPhase

_KEPT_IN = frozenset({JobPhase.STARTING, JobPhase.RUNNING, JobPhase.RECOVERING})


def chosen(draft: Draft) -> tuple[AgentName, ...]:
    """The spares of this attempt, those first that the next one would take first."""
    if not draft.spec.spares or draft.status.phase not in _KEPT_IN:
        return ()
    taken = {*(member.agent for member in draft.status.members), *draft.status.joining}
    free = [
        name for name in placement.candidates(draft) if name not in taken and not _was_released(draft, name)
    ]
    return tuple(sorted(free, key=lambda name: placement.preference(draft, name))[: draft.spec.spares])


def keep_warm(draft: Draft) -> None:
    """Have the spares import what the job imports; repeated, it changes nothing."""
    for name in chosen(draft):
        warm(draft, name)


def warm(draft: Draft, name: AgentName) -> None:
    """Have one machine made ready for this job, if it is not and nothing of it runs there."""
    stored = draft.job.workers.get(name)
    if stored is not None and not _may_be_warmed(draft, name):
        return  # it is ready, or what is left there has to go first
    if _was_released(draft, name):
        return  # a late order must not bring back what was released; the next attempt's is another one
    nproc = placement.ranks_on(draft.spec, draft.fleet.agents[name])
    draft.command(name, Warm(draft.header(f"warm.{draft.status.attempt}"), draft.spec, nproc))


def is_kept(draft: Draft, name: AgentName) -> bool:
    """Whether what an agent shows of the job is a spare's launcher, which is wanted."""
    snapshot = draft.job.workers[name].value
    ours = snapshot.uid == draft.status.uid and snapshot.phase is WorkerPhase.IDLE
    if not ours or not draft.spec.spares:
        return False
    view = draft.fleet.agents.get(name)
    # One that did not answer lately is not chosen, but nothing is wrong with what it has imported.
    return name in chosen(draft) or (view is not None and placement.resting(draft, name, view))


def _was_released(draft: Draft, name: AgentName) -> bool:
    """Whether this very life of the agent has let go of the job during the attempt, and shows nothing of it.

    It cannot be a spare before the next attempt, so another machine has to be.
    """
    if name in draft.job.workers:
        return False
    gone = draft.job.departed.get(name)
    return (
        gone is not None
        and (gone.uid, gone.attempt) == (draft.status.uid, draft.status.attempt)
        and gone.incarnation == draft.fleet.agents[name].node.incarnation
    )


def _may_be_warmed(draft: Draft, name: AgentName) -> bool:
    snapshot = draft.job.workers[name].value
    ours = snapshot.uid == draft.status.uid and snapshot.attempt <= draft.status.attempt
    return ours and snapshot.phase is WorkerPhase.IDLE and not placement.is_warm(draft, name)
