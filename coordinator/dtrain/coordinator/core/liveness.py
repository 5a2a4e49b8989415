"""Who is there: each member of an attempt, its agent and its snapshot.

Liveness is the agent's lease alone. Two cases look like a loss and are none:
an agent that is missing, or goes missing, around a change of leader may be
about to renew its session, and an agent that restarted beside its running ranks
reports the same attempt again under a new incarnation. Both get one agent TTL.
A job may ask for more: with ``reschedule_grace_s`` an agent that has lost etcd,
not its ranks, is waited for that long after its session ended, unless it had
said that it would go.
"""

from dataclasses import dataclass
from enum import Enum, auto

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.views import AgentView
from dtrain.protocol.job import JobPhase, Member
from dtrain.protocol.snapshot import RankState, WorkerPhase, WorkerSnapshot

LIVE_PHASES = frozenset(
    {
        WorkerPhase.STARTING,
        WorkerPhase.READY,
        WorkerPhase.RESTORING,
        WorkerPhase.TRAINING,
        WorkerPhase.CHECKPOINTING,
    }
)
"""Phases in which something of the job is, or is about to be, alive on a machine."""

STARTED_PHASES = frozenset(
    {
        WorkerPhase.RESTORING,
        WorkerPhase.TRAINING,
        WorkerPhase.CHECKPOINTING,
        WorkerPhase.DONE,
        WorkerPhase.ERROR,
    }
)
"""Phases of a machine that has obeyed START."""

TRAINING_PHASES = frozenset({WorkerPhase.TRAINING, WorkerPhase.CHECKPOINTING, WorkerPhase.DONE})


class Standing(Enum):
    """What may be concluded about a member's agent."""

    PRESENT = auto()
    SETTLING = auto()
    """Missing, or it does not show the attempt, but not for long enough to say that it is lost."""
    LOST = auto()


@dataclass(frozen=True, slots=True)
class Seat:
    """One member with what is known of it now."""

    member: Member
    agent: AgentView | None
    snapshot: WorkerSnapshot | None
    """Only if it is of the attempt in the status."""
    seen_at: float
    """When this leader first saw the snapshot as it is."""
    standing: Standing
    why: str = ""

    @property
    def phase(self) -> WorkerPhase | None:
        return None if self.snapshot is None else self.snapshot.phase

    @property
    def ranks(self) -> tuple[RankState, ...]:
        return () if self.snapshot is None else self.snapshot.ranks

    @property
    def current(self) -> bool:
        """The snapshot was written by the agent's present life."""
        return (
            self.snapshot is not None
            and self.agent is not None
            and self.snapshot.incarnation == self.agent.node.incarnation
        )


def seats(draft: Draft) -> list[Seat]:
    """The members of the draft's attempt, in node order.

    Asks to be called again when a member that is settling would be lost.
    """
    started = has_started(draft)
    return [_seat(draft, member, started) for member in draft.status.members]


def has_started(draft: Draft) -> bool:
    """Whether ranks of the draft's attempt have run anywhere, as far as this leader has seen."""
    # Once all ranks have trained, no snapshot at all means that nobody remembers them.
    if draft.status.phase in (JobPhase.RUNNING, JobPhase.SUSPENDING):
        return True
    # An agent that lost its journal deletes what it had shown; its ranks may live on without it.
    shown = [*(stored.value for stored in draft.job.workers.values()), *draft.job.departed.values()]
    return any(
        snapshot.phase in STARTED_PHASES
        for snapshot in shown
        if (snapshot.uid, snapshot.attempt) == (draft.status.uid, draft.status.attempt)
    )


def _seat(draft: Draft, member: Member, started: bool) -> Seat:
    view = draft.fleet.agents.get(member.agent)
    stored = draft.job.workers.get(member.agent)
    snapshot = None
    seen_at = draft.now
    if stored is not None and (stored.value.uid, stored.value.attempt) == (
        draft.status.uid,
        draft.status.attempt,
    ):
        snapshot, seen_at = stored.value, stored.seen_at
    gone = draft.job.departed.get(member.agent)
    if (
        snapshot is None
        and gone is not None
        and gone.phase is WorkerPhase.DONE
        and (gone.uid, gone.attempt) == (draft.status.uid, draft.status.attempt)
    ):
        # Its ranks had all ended well: nothing of them can be lost with the machine.
        return Seat(member, view, gone, draft.now, Standing.PRESENT)
    standing, why = _standing(draft, member, view, snapshot, started)
    return Seat(member, view, snapshot, seen_at, standing, why)


def _standing(
    draft: Draft, member: Member, view: AgentView | None, snapshot: WorkerSnapshot | None, started: bool
) -> tuple[Standing, str]:
    fleet = draft.fleet
    if view is None:
        seen = member.agent in fleet.lost_at
        why = f"the session of agent {member.agent} ended" if seen else f"agent {member.agent} has no session"
        # Seen or not: what cost the last leader its lease, an etcd that stood still, has often
        # cost the agents theirs. They are back within a second, beside ranks that never stopped.
        due = max(fleet.took_office_at + fleet.agent_ttl_s, fleet.losses_settle_at)
        # A leader that did not see it go counts from when it could have seen it first.
        ended_at = fleet.lost_at.get(member.agent, fleet.took_office_at)
        # One that drained has ended its ranks, cut off or not: waiting would bring nothing back.
        grace_s = 0.0 if member.agent in fleet.left else draft.spec.reschedule_grace_s
        return _until(draft, max(due, ended_at + grace_s), why)
    if snapshot is not None and snapshot.incarnation == view.node.incarnation:
        return Standing.PRESENT, ""
    if not started:
        # Nothing runs yet: PREPARE is sent again, and its deadline covers the silence.
        return Standing.PRESENT, ""
    if snapshot is not None and view.node.incarnation == member.incarnation:
        # Written by a former life while the node record is back at the one chosen: ours is stale.
        return Standing.PRESENT, ""
    since = max(view.seen_at, draft.status_seen_at)
    return _after(
        draft, since, f"agent {member.agent} does not report attempt {draft.status.attempt} any more"
    )


def _after(draft: Draft, since: float, why: str) -> tuple[Standing, str]:
    return _until(draft, since + draft.fleet.agent_ttl_s, why)


def _until(draft: Draft, due: float, why: str) -> tuple[Standing, str]:
    if draft.now < due:
        draft.wake(due)
        return Standing.SETTLING, why
    return _lost(draft, why)


def _lost(draft: Draft, why: str) -> tuple[Standing, str]:
    # The brake: when many vanish together, the network or etcd is the likelier cause.
    return (Standing.SETTLING if draft.fleet.brake else Standing.LOST), why


def is_ready(seat: Seat) -> bool:
    """Whether it has what START needs, or has started."""
    # An agent that restarted after READY is asked again: what it readied may have died with it.
    return (seat.phase is WorkerPhase.READY and seat.current) or seat.phase in STARTED_PHASES
