"""What an etcd that was restored from a backup has forgotten, and agents and the store still know.

Decisions precede commands, commands precede what agents show, and etcd orders
all of it. So an agent that shows more than the status has ever decided is a
proof: etcd went back. Three things can have been forgotten.

* Checkpoint numbers. They go on above the highest that anybody has heard of;
  what the forgotten ones hold stays in the store, neither used nor deleted.
* Attempts. One whose ranks all train goes on and is taken over as it is; of any
  other the ranks are ended by an attempt with a higher number.
* Submissions. Nobody can say what they were: their ranks are ended in order.

The reports are bounded: an agent that lies cannot use up the numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.coordinator.core import committing, placement, settling
from dtrain.coordinator.core.decisions import Decision, Directed, Reason
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import TRAINING_PHASES, Standing, seats
from dtrain.coordinator.core.views import FleetView, JobView
from dtrain.protocol.commands import Header, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, Rank, Seq, Step
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, Member
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase, WorkerSnapshot
from dtrain.protocol.wording import some

SEQS_AHEAD_MAX = 1_000_000
ATTEMPTS_AHEAD_MAX = 10_000

UNKNOWN_GRACE_S = 30.0
"""Between SIGTERM and SIGKILL for ranks of a job whose file is gone."""

RELEASE_SLACK_S = 30.0
"""Beyond the job's own grace: then a submission that does not end holds up nothing any more."""

UNKNOWN = "unknown."
"""Command ids that begin so end the ranks of jobs that etcd does not know."""


def catch_up(draft: Draft) -> bool:
    """Take in what agents and the store know and the status does not; True: decide nothing else now."""
    if _numbers(draft):
        return True
    if draft.status.phase in TERMINAL_PHASES:
        return False
    return _submissions(draft) or _attempts(draft)


def is_ahead(draft: Draft) -> bool:
    """Whether agents run this submission already, of which etcd has forgotten all but its job file."""
    uid, attempt = draft.spec.uid, draft.status.attempt
    return any(one.value.uid == uid and one.value.attempt > attempt for one in draft.job.workers.values())


# Checkpoint numbers ---------------------------------------------------------------


def _numbers(draft: Draft) -> bool:
    """Go on above every number that was given out; True: open checkpoints were given up for it."""
    status = draft.status
    limit = status.seq_last + SEQS_AHEAD_MAX
    mine = [stored.value for stored in draft.job.workers.values() if stored.value.uid == status.uid]
    over = max((one.seq_over for one in mine if one.seq_over <= limit), default=Seq(0))
    heard = max((seq for one in mine for seq in one.saving if seq <= limit), default=Seq(0))
    stored_range = draft.job.unknown
    if stored_range is not None and stored_range[1] > limit:
        stored_range = None
    # Agents hear of an outcome after etcd: what is over for one and open there is of the past.
    stale = [stored for stored in committing.own_open(draft) if over and stored.value.seq <= over]
    found = [stored.value.seq for stored in stale]
    used = max(over, heard)
    if used > status.seq_last:
        found += [Seq(status.seq_last + 1), used]
    if stored_range is not None:
        found += stored_range
    if not found:
        return False
    known = [status.unknown_from, status.unknown_to] if status.unknown_to else []
    first, last = Seq(min(found + known)), Seq(max(found + known))
    changed = (first, last) != (status.unknown_from, status.unknown_to)
    for stored in stale:
        committing.abort(draft, stored, "it was over before etcd was restored from a backup", warning=False)
    if changed:
        draft.set(unknown_from=first, unknown_to=last, seq_last=Seq(max(status.seq_last, last)))
        draft.event(
            EventReason.ETCD_RESTORED,
            f"etcd was restored from a backup: checkpoint numbers {first} to {last} had been given out. What"
            f" the store holds of them is neither used nor deleted; next is {draft.status.seq_last + 1}",
            f"checkpoint/{last}",
            warning=True,
        )
    return bool(stale)


# Submissions ------------------------------------------------------------------------


def end_unknown(job: JobView, fleet: FleetView) -> Decision:
    """End in order what agents run of a job that etcd knows nothing of."""
    commands = []
    for agent, stored in sorted(job.workers.items()):
        view, snapshot = fleet.agents.get(agent), stored.value
        if view is None:
            continue
        why = "etcd knows no such job: it was submitted after the backup that etcd was restored from"
        header = Header(
            fleet.cluster,
            fleet.term,
            job.name,
            snapshot.uid,
            snapshot.attempt,
            f"{UNKNOWN}{snapshot.attempt}",
        )
        order = Stop(header, UNKNOWN_GRACE_S, release=True, why=why)
        commands.append(Directed(agent, view.node.address, order, incarnation=view.node.incarnation))
    names = some((directed.agent for directed in commands), placement.SHOWN_MAX)
    return Decision(
        commands=tuple(commands),
        reasons=(
            Reason(f"there is no job of this name in etcd; its ranks on {names or 'agents'} are ended"),
        ),
    )


def _submissions(draft: Draft) -> bool:
    """End what agents run of a later submission of this name; True: it is waited for."""
    status, waits = draft.status, False
    for agent, stored in sorted(draft.job.workers.items()):
        snapshot, view = stored.value, draft.fleet.agents.get(agent)
        # Numbers rise over all submissions of a name: a higher one is of a later submission.
        later = snapshot.uid not in (status.uid, draft.spec.uid) and snapshot.attempt > status.attempt
        if not later or view is None:
            continue
        why = "etcd does not know this submission: it is later than the backup that etcd was restored from"
        header = draft.header_of(snapshot, UNKNOWN)
        due = max(draft.fleet.took_office_at, view.seen_at) + draft.spec.shutdown_grace_s + RELEASE_SLACK_S
        if draft.now < due:
            draft.command(agent, Stop(header, draft.spec.shutdown_grace_s, release=True, why=why))
            draft.wake(due)
            draft.say(f"ending the ranks of a later submission on {agent}, which etcd does not know")
            waits = True
    return waits


# Attempts ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """An attempt that etcd has forgotten. ``members``: who runs it, if all of its ranks train."""

    attempt: Attempt
    members: tuple[Member, ...]


def _attempts(draft: Draft) -> bool:
    """Take over, wait for or end an attempt that is newer than the status; True: nothing else is due."""
    status = draft.status
    newer = {
        agent: stored.value
        for agent, stored in draft.job.workers.items()
        if stored.value.uid == status.uid
        and 0 < stored.value.attempt - status.attempt <= ATTEMPTS_AHEAD_MAX
        and agent in draft.fleet.agents
    }
    if not newer:
        return False
    found = _found(draft, newer)
    if status.phase is JobPhase.CANCELLING:
        draft.set(attempt=found.attempt)  # else agents would take STOP for one of the past
        return False
    if status.phase is JobPhase.SUSPENDING:
        draft.set(attempt=found.attempt, stopping=True)
        return False
    if status.phase is JobPhase.SUSPENDED:
        _give_up(draft, found.attempt)
        return True
    members = seats(draft)
    if members and all(one.standing is Standing.PRESENT and one.snapshot is not None for one in members):
        # The attempt that etcd knows is whole: what else turns up comes from the time that was forgotten.
        _release(draft, newer)
        return False
    seen = [draft.fleet.agents[agent].seen_at for agent in newer]
    # The status is seen anew when etcd is restored: a leader may have stayed in office through it.
    due = max(draft.fleet.took_office_at, draft.status_seen_at, *seen) + draft.fleet.agent_ttl_s
    complete = len(found.members) == draft.spec.nnodes_max
    if found.members and (complete or draft.now >= due):
        _take_over(draft, found)
        return True
    if draft.now < due:
        draft.wake(due)
        draft.say(
            f"agents run attempt {found.attempt}, etcd knows {status.attempt}: waiting for all of its ranks"
        )
        return True
    _give_up(draft, found.attempt)
    return True


def _found(draft: Draft, newer: Mapping[AgentName, WorkerSnapshot]) -> _Found:
    number = Attempt(max(snapshot.attempt for snapshot in newer.values()))
    members: list[Member] = []
    begins = {
        min((rank.rank for rank in snapshot.ranks), default=Rank(0)): (agent, snapshot)
        for agent, snapshot in newer.items()
        if snapshot.attempt == number and _trains(draft, agent, snapshot)
    }
    following = Rank(0)
    while following in begins:
        agent, snapshot = begins[following]
        incarnation = draft.fleet.agents[agent].node.incarnation
        members.append(Member(agent, len(members), following, len(snapshot.ranks), incarnation))
        following = Rank(following + len(snapshot.ranks))
    whole = len(members) == len([one for one in newer.values() if one.attempt == number])
    enough = draft.spec.nnodes_min <= len(members) <= draft.spec.nnodes_max
    return _Found(number, tuple(members) if whole and enough else ())


def _trains(draft: Draft, agent: AgentName, snapshot: WorkerSnapshot) -> bool:
    numbers = sorted(rank.rank for rank in snapshot.ranks)
    return (
        snapshot.phase in TRAINING_PHASES
        and (snapshot.restored or snapshot.phase is WorkerPhase.DONE)
        and snapshot.failure is None
        and snapshot.incarnation == draft.fleet.agents[agent].node.incarnation
        and len(numbers) == placement.ranks_on(draft.spec, draft.fleet.agents[agent])
        and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    )


def _take_over(draft: Draft, found: _Found) -> None:
    """Go on with an attempt of which only its agents know: nothing of it is lost."""
    before = draft.status.attempt
    settling.settle(draft, patient=False)
    draft.enter(
        JobPhase.STARTING,
        f"taking over attempt {found.attempt}, which trains",
        attempt=found.attempt,
        members=found.members,
        restore=None,
        store=draft.status.store or draft.spec.checkpoint.store or draft.fleet.default_store,
        charge=False,
        late_saves=0,
        failed_saves=0,
        final_tries=0,
        nonfinite_step=Step(0),
        stragglers=(),
    )
    draft.event(
        EventReason.ETCD_RESTORED,
        f"etcd was restored from a backup that knows attempt {before}; attempt {found.attempt} goes on",
        f"attempt/{found.attempt}",
        warning=True,
    )


def _give_up(draft: Draft, number: Attempt) -> None:
    """Count an attempt that is not whole as over: the next one, with a higher number, ends its ranks."""
    before = draft.status.attempt
    text = (
        f"etcd was restored from a backup that knows attempt {before}; attempt {number} is not whole any more"
    )
    settling.settle(draft, patient=False)
    placed = draft.status.phase in (JobPhase.STARTING, JobPhase.RUNNING)
    draft.set(attempt=number, members=())
    draft.event(EventReason.ETCD_RESTORED, text, f"attempt/{number}", warning=True)
    if placed:
        failure = Failure(
            FailureKind.ISOLATED, text, attempt=number, step=draft.status.step, at=draft.moment.wall
        )
        draft.enter(JobPhase.RECOVERING, f"recovering from: {text}", failure=failure, charge=False)


def _release(draft: Draft, newer: Mapping[AgentName, WorkerSnapshot]) -> None:
    members = {member.agent for member in draft.status.members}
    for agent, snapshot in sorted(newer.items()):
        if agent in members:
            continue
        why = "this agent is not part of the attempt"
        draft.command(agent, Stop(draft.header_of(snapshot), 0.0, release=True, why=why))
