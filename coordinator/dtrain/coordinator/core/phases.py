"""What is done in each phase of a job: one function per phase.

Each looks at the state as it is and adds what is missing, so that a repeated,
lost or late input changes nothing. A phase function may go on into the next
phase within the same decision: the end of one attempt and the start of the
next are one transaction.
"""

from collections.abc import Sequence, Set
from dataclasses import replace

from dtrain.coordinator.core import (
    checkpoints,
    conditions,
    draining,
    elastic,
    failures,
    hangs,
    importing,
    kinds,
    nonfinite,
    pausing,
    placement,
    quarantine,
    retention,
    rollback,
    rules,
    spares,
    stragglers,
    suspicion,
    tally,
)
from dtrain.coordinator.core.decisions import ProbeStore
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.failures import Ending
from dtrain.coordinator.core.liveness import (
    LIVE_PHASES,
    STARTED_PHASES,
    TRAINING_PHASES,
    Seat,
    Standing,
    has_started,
    seats,
)
from dtrain.coordinator.core.views import Damage
from dtrain.protocol.commands import Prepare, Start, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, Step
from dtrain.protocol.job import EXIT_CODE_DO_NOT_RETRY, JobPhase, Member, RestorePoint, RuleAction, Wanted
from dtrain.protocol.snapshot import BadBlob, Failure, FailureKind, WorkerPhase, WorkerSnapshot
from dtrain.protocol.wording import some

SILENT_S = 10.0
"""An agent that shows nothing of the attempt while others are READY is replaced after that."""

PREPARE_S = 120.0
"""From the attempt's beginning to READY on every machine: a cold import of torch takes a minute."""

UNREACHABLE_S = 5.0
"""An agent that did not answer before the attempt either has that long to answer PREPARE."""

PROBE_RETRY_S = 5.0

CANCEL_SLACK_S = 30.0
"""Beyond the job's own grace: after that a cancelled job is over even if an agent is silent."""

RELEASE_S = 60.0
"""How long the last sweep of a finished job waits for its agents to let go of it."""


# QUEUED ---------------------------------------------------------------------------


def queued(draft: Draft) -> None:
    """Wait for a store that answers and for enough machines."""
    if wants_cancel(draft):
        checkpoints.settle(draft, patient=False)
        cancelled(draft, "cancelled while it waited for machines")
        return
    if importing.follow(draft):
        release_strays(draft)
        return
    # Where a checkpoint was imported to, the first attempt looks for it.
    store = draft.status.store or draft.spec.checkpoint.store or draft.fleet.default_store
    if store and not _store_is_usable(draft, store):
        release_strays(draft)
        return
    if importing.begin(draft, store):
        release_strays(draft)
        return
    found = placement.place(draft, join_window=True)
    if found.members:
        start_attempt(draft, found.members, store)
    else:
        draft.explain(found.why)
        release_strays(draft)


def _store_is_usable(draft: Draft, store: str) -> bool:
    job = draft.job
    if job.store_ok:
        return True
    due = draft.now if job.store_probed_at is None else job.store_probed_at + PROBE_RETRY_S
    if job.store_ok is None or draft.now >= due:
        draft.work(ProbeStore(job.name, store))
    draft.wake(due if due > draft.now else draft.now + PROBE_RETRY_S)
    if job.store_ok is None:
        draft.explain(f"checking the checkpoint store {store}")
        return False
    text = f"the checkpoint store {store} is not usable"
    if draft.status.reason != text:
        draft.event(EventReason.STORE_UNAVAILABLE, f"{text}: {job.store_problem}", warning=True)
    draft.explain(text)
    if job.store_problem:
        draft.say(job.store_problem)
    return False


def start_attempt(draft: Draft, members: tuple[Member, ...], store: str) -> None:
    """Fix members, ranks and restore point, and ask the members to prepare.

    Open checkpoints must have been settled: the restore point is the newest
    commit, those of this very decision included.
    """
    newest = draft.newest_good()
    restore = None
    origin = "from scratch"
    if newest is not None:
        restore = RestorePoint(newest.seq, newest.step, newest.manifest, newest.digest)
        origin = f"from checkpoint {newest.seq} (step {newest.step})"
    number = Attempt(draft.status.attempt + 1)
    world = sum(member.nproc for member in members)
    draft.enter(
        JobPhase.STARTING,
        f"starting attempt {number}: {_count(world, 'rank')} on {_count(len(members), 'agent')}, {origin}",
        attempt=number,
        members=members,
        restore=restore,
        store=store,
        charge=False,
        late_saves=0,
        failed_saves=0,
        final_tries=0,
        nonfinite_step=Step(0),
        stragglers=(),
        joining=(),
        joining_since="",
        tally=tally.attempt_begun(draft.status),
    )
    names = some((member.agent for member in members), conditions.NAMED_MAX)
    draft.event(
        EventReason.ATTEMPT_STARTED, f"{_count(world, 'rank')} on {names}, {origin}", f"attempt/{number}"
    )
    kinds.tell_begin(draft, members)
    _prepare(draft, seats(draft))


# STARTING -------------------------------------------------------------------------


def starting(draft: Draft) -> None:
    """PREPARE everywhere, then START everywhere, until all ranks train."""
    if wants_cancel(draft):
        cancel(draft)
        return
    members = seats(draft)
    ending = why_over(draft, members)
    if ending is not None:
        attempt_over(draft, ending, avoid=_at_fault(ending, members))
        return
    if going := draining.leaving(members):
        move(draft, going)
        return
    ready = [seat for seat in members if _is_ready(seat)]
    _prepare(draft, members)
    rendezvous = "" if members[0].snapshot is None else members[0].snapshot.rendezvous
    if len(ready) == len(members) and rendezvous:
        header = draft.header(f"start.{draft.status.attempt}")
        for seat in members:
            if seat.phase is WorkerPhase.READY:
                draft.command(seat.member.agent, Start(header, rendezvous, draft.status.restore))
    if all(_is_training(seat) for seat in members):
        _all_training(draft)
    else:
        _say_progress_of_start(draft, members, len(ready))
    release_strays(draft)


def _prepare(draft: Draft, members: Sequence[Seat]) -> None:
    status = draft.status
    header = draft.header(f"prepare.{status.attempt}")
    if has_started(draft):
        return  # ranks run, or have run: a machine that lost its own cannot join them any more
    for seat in members:
        if _is_ready(seat):
            continue
        member = seat.member
        draft.command(
            member.agent,
            Prepare(
                header,
                draft.spec,
                status.store,
                member.node_rank,
                len(members),
                member.first_rank,
                status.world_size,
                serve_store=member.node_rank == 0,
                max_restarts=draft.spec.restarts.max_restarts,
                nproc=member.nproc,
            ),
        )


def _all_training(draft: Draft) -> None:
    world = draft.status.world_size
    draft.enter(JobPhase.RUNNING, f"training on {_count(world, 'rank')}")
    draft.event(
        EventReason.ALL_RANKS_TRAINING,
        f"{_count(world, 'rank')} of attempt {draft.status.attempt} are training",
        f"attempt/{draft.status.attempt}",
    )
    restore = draft.status.restore
    if restore is not None:
        draft.event(
            EventReason.RESTORED,
            f"all ranks have restored checkpoint {restore.seq} of step {restore.step}",
            f"checkpoint/{restore.seq}",
        )


def _say_progress_of_start(draft: Draft, members: Sequence[Seat], ready: int) -> None:
    if ready < len(members):
        waiting = [seat.member.agent for seat in members if not _is_ready(seat)]
        draft.say(f"{ready} of {len(members)} agents ready; waiting for {some(waiting, placement.SHOWN_MAX)}")
    else:
        training = sum(1 for seat in members if _is_training(seat))
        draft.say(f"restoring: ranks of {training} of {len(members)} agents train")


def _is_ready(seat: Seat) -> bool:
    # An agent that restarted after READY is asked again: what it readied may have died with it.
    return (seat.phase is WorkerPhase.READY and seat.current) or seat.phase in STARTED_PHASES


def _is_training(seat: Seat) -> bool:
    if seat.snapshot is None or seat.phase not in TRAINING_PHASES:
        return False
    return seat.snapshot.restored or seat.phase is WorkerPhase.DONE


def _at_fault(ending: Ending, members: Sequence[Seat]) -> Set[AgentName]:
    """Who held up the start. Those that were still on their way when something else failed did not."""
    if ending.failure.kind not in (FailureKind.PREPARE, FailureKind.UNREACHABLE):
        return frozenset()
    return {seat.member.agent for seat in members if not _is_ready(seat)}


# RUNNING --------------------------------------------------------------------------


def running(draft: Draft) -> None:
    """Watch the ranks, take checkpoints, and see the job to its end."""
    if wants_cancel(draft):
        cancel(draft)
        return
    members = seats(draft)
    ending = why_over(draft, members)
    if ending is not None:
        attempt_over(draft, ending)
        return
    if all(seat.phase is WorkerPhase.DONE for seat in members):
        succeed(draft)
        return
    going = draining.leaving(members)
    if not going and (alike := kinds.due(draft)):
        reunite(draft, alike)
        return
    pausing.let_go(draft, members)
    pause = pausing.is_wanted(draft)
    change = None if going or pause else elastic.due(draft, members)
    if going:
        if draft.status.held or draining.is_due(draft, members, going):
            move(draft, going)
            return
    elif pause:
        pausing.drive(draft, members)
    elif change is not None:
        if elastic.is_due(draft, members, change):
            resize(draft, change)
            return
    else:
        training = f"training on {_count(draft.status.world_size, 'rank')}"
        draft.explain(kinds.obstacle(draft.status.members) or training)
    if draft.fleet.brake:
        draft.say(f"no loss is declared while the brake is on: {draft.fleet.brake}")
    for seat in members:
        if seat.standing is Standing.SETTLING:
            draft.say(f"{seat.why}; waiting before it is called lost")
    if not (going or pause or change):
        checkpoints.drive(draft, members)
    checkpoints.tell_outcomes(draft, members)
    nonfinite.note(draft, members)
    stragglers.note(draft, members)
    release_strays(draft)
    spares.keep_warm(draft)
    if draft.status.store:
        retention.sweep(draft)


def succeed(draft: Draft) -> None:
    """All ranks of all members exited with 0."""
    checkpoints.settle(draft, patient=False)
    last = checkpoints.final_commit(draft)
    step = draft.status.step if last is None else last.step
    if last is not None:
        reason = f"training ended; checkpoint {last.seq} of step {step} is the last one"
    elif not draft.status.store:
        reason = "training ended; no store is configured, so there is no checkpoint of its end"
    elif unfit := nonfinite.unfit_at_end(draft):
        reason = f"training ended; there is no checkpoint of its end, as {unfit}"
    elif checkpoints.gave_up_final(draft):
        reason = "training ended; the checkpoint of its end failed too often"
    else:
        reason = "training ended; its ranks did not ask for a checkpoint of the end"
    draft.enter(JobPhase.SUCCEEDED, reason)
    draft.event(EventReason.JOB_SUCCEEDED, reason, warning=checkpoints.gave_up_final(draft))


# Why an attempt ends ----------------------------------------------------------------


def why_over(draft: Draft, members: Sequence[Seat]) -> Ending | None:
    """What ends the attempt now, if anything does."""
    if not members:
        return Ending(_leader_failure(draft, FailureKind.PREPARE, "the attempt has no members"), charge=False)
    snapshots = _snapshots_of_attempt(draft, members)
    bad = _bad_restore(draft, snapshots)
    if bad is not None:
        _quarantine(draft, *bad)
        text = f"checkpoint {bad[1].seq} is damaged: {bad[1].message or bad[1].blob}"
        return Ending(_leader_failure(draft, FailureKind.RESTORE, text, bad[0]), charge=False)
    found = failures.reported(snapshots)
    if failures.wants_no_retry(snapshots):
        meant = [f for f in found if f.exit_code == EXIT_CODE_DO_NOT_RETRY]
        final = meant or [f for f in found if f.exit_code is not None] or found
        cause = (
            failures.root_cause(final) if final else _leader_failure(draft, FailureKind.EXIT, "exit code 93")
        )
        others = tuple(failure for failure in found if failure is not cause)
        return Ending(cause, charge=True, do_not_retry=True, others=others)
    if (sick := nonfinite.failure(draft, members)) is not None:
        # A script that ends because of it only says the same again.
        return Ending(sick, charge=True)
    # Machines that go away or do not answer are nobody's fault: they cost no restart.
    free = _losses(draft, members)
    if draft.status.phase is JobPhase.STARTING:
        free += _not_starting(draft, members)
    else:
        free += _forgotten(draft, members)
        found += _disagreement(draft, members)
    if not found and not free:
        hang = hangs.find(draft, members)
        return None if hang is None else Ending(hang, charge=True)
    if all(failure.kind is FailureKind.COLLECTIVE for failure in found):
        # Ranks whose peers have gone notice it long before anybody may call a machine lost.
        free += _gone(draft, members)
    cause = failures.root_cause([*found, *free])
    charged = [failure for failure in found if failure.kind not in failures.FREE]
    others = tuple(failure for failure in (*found, *free) if failure is not cause)
    return Ending(cause, charge=any(cause is failure for failure in charged), others=others)


def _snapshots_of_attempt(draft: Draft, members: Sequence[Seat]) -> list[WorkerSnapshot]:
    """Newest snapshot of each member, of those that have gone too."""
    found = []
    for seat in members:
        gone = draft.job.departed.get(seat.member.agent)
        if seat.snapshot is not None:
            found.append(seat.snapshot)
        elif gone is not None and (gone.uid, gone.attempt) == (draft.status.uid, draft.status.attempt):
            found.append(gone)
    return found


def _leader_failure(draft: Draft, kind: FailureKind, text: str, agent: AgentName | None = None) -> Failure:
    return Failure(
        kind,
        text,
        agent=agent or AgentName(""),
        attempt=draft.status.attempt,
        step=draft.status.step,
        at=draft.moment.wall,
    )


def _losses(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    return [
        _leader_failure(draft, FailureKind.AGENT_LOST, seat.why, seat.member.agent)
        for seat in members
        if seat.standing is Standing.LOST
    ]


def _gone(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    text = "ranks elsewhere have lost its ranks"
    return [
        _leader_failure(draft, FailureKind.ISOLATED, f"{seat.why}, and {text}", seat.member.agent)
        for seat in members
        if seat.agent is None and seat.standing is Standing.SETTLING
    ]


def _forgotten(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    """Members whose agent reports the running attempt without ranks: they cannot come back into it."""
    idle = (WorkerPhase.IDLE, WorkerPhase.STARTING, WorkerPhase.READY)
    return [_ended(draft, seat) for seat in members if seat.phase in idle]


def _ended(draft: Draft, seat: Seat) -> Failure:
    # An agent that was cut off for too long has ended them, and says so: it is not called lost.
    note = "" if seat.snapshot is None else seat.snapshot.note
    kind = FailureKind.ISOLATED if note else FailureKind.AGENT_LOST
    return _leader_failure(draft, kind, note or "the agent has lost its ranks", seat.member.agent)


def _not_starting(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    """Members that do not get ready: replaced without waiting for their lease."""
    if draft.fleet.brake:
        return []
    # Attempts are one-shot: ranks that an agent ended, cut off from etcd, it does not start again.
    ended = [seat for seat in members if seat.current and seat.phase is WorkerPhase.IDLE]
    if ended:
        return [_ended(draft, seat) for seat in ended]
    since = draft.status_seen_at
    others_ready = any(_is_ready(seat) for seat in members)
    if all(_is_ready(seat) for seat in members):
        waiting = [seat for seat in members if seat.phase is WorkerPhase.READY]
        due = since + 2 * PREPARE_S
        if not waiting or draft.now < due:
            if waiting:
                draft.wake(due)
            return []
        text = f"is ready but has not started its ranks within {2 * PREPARE_S:g} s"
        return [_leader_failure(draft, FailureKind.PREPARE, text, seat.member.agent) for seat in waiting]
    found = []
    for seat in members:
        if _is_ready(seat):
            continue
        agent = seat.member.agent
        unreachable = draft.fleet.unreachable.get(agent)
        if unreachable is not None and seat.agent is not None and unreachable >= seat.agent.seen_at:
            due = since if unreachable >= since else since + UNREACHABLE_S
            if draft.now >= due:
                text = "does not answer PREPARE"
                found.append(_leader_failure(draft, FailureKind.UNREACHABLE, text, agent))
                continue
            draft.wake(due)
        limit = SILENT_S if others_ready and seat.snapshot is None else PREPARE_S
        if draft.now >= since + limit:
            text = f"is not ready within {limit:g} s"
            found.append(_leader_failure(draft, FailureKind.PREPARE, text, agent))
        else:
            draft.wake(since + limit)
    return found


def _disagreement(draft: Draft, members: Sequence[Seat]) -> list[Failure]:
    ended = checkpoints.end_of_training(members)
    if ended is None or ended.agree:
        return []
    steps = ", ".join(str(step) for step in ended.steps)
    return [_leader_failure(draft, FailureKind.EXCEPTION, f"ranks ended at different steps: {steps}")]


def _bad_restore(draft: Draft, snapshots: Sequence[WorkerSnapshot]) -> tuple[AgentName, BadBlob] | None:
    """Evidence that the checkpoint this attempt restores from is damaged in the store."""
    restore = draft.status.restore
    for snapshot in snapshots:
        if restore is not None and snapshot.bad is not None and snapshot.bad.seq == restore.seq:
            return snapshot.agent, snapshot.bad
    return None


def _quarantine(draft: Draft, agent: AgentName, bad: BadBlob) -> None:
    damage = Damage(bad.blob, bad.chunk, bad.expected, bad.found, bad.rank)
    quarantine.put_aside(draft, bad.seq, damage, agent)


# RECOVERING -----------------------------------------------------------------------


def attempt_over(draft: Draft, ending: Ending, *, avoid: Set[AgentName] = frozenset()) -> None:
    """End the attempt, and begin the next one in the same decision if possible."""
    fruitless = draft.status.fruitless + 1 if failures.was_fruitless(draft) else 0
    failure = replace(
        ending.failure,
        attempt=draft.status.attempt,
        also=failures.folded(ending.others) or ending.failure.also,
    )
    consequence = rules.judge(draft, ending)
    rules.remember(draft, (failure, *ending.others))
    draft.set(failure=failure, charge=consequence.charge, fruitless=fruitless)
    reason, about = failures.event_of(failure)
    told = f"; {consequence.why}" if consequence.why else ""
    text = f"{failures.sentence(failure)}{told}"
    over = consequence.action is RuleAction.FAIL
    draft.event(reason, failures.sentence(failure) if over else text, about, warning=True)
    if not failure.hopeless:
        suspicion.note(draft, failure, ending.others, cordon_s=consequence.cordon_s)
    if over:
        checkpoints.settle(draft, patient=False)
        fail(draft, consequence.event, text)
        return
    if consequence.action is RuleAction.ROLLBACK:
        # Numbers that went wrong may have begun to before the oldest checkpoint.
        to_scratch = failure.kind is FailureKind.NONFINITE
        if not rollback.pass_over(draft, consequence.back, to_scratch=to_scratch):
            draft.say("there is no older checkpoint to go back to")
    draft.enter(JobPhase.RECOVERING, f"recovering from: {failures.sentence(failure)}", members=())
    recovering(draft, avoid=avoid)


def move(draft: Draft, going: Sequence[Seat]) -> None:
    """End the attempt because machines of it are about to go, and begin the next one without them."""
    draining.note_end(draft, going)
    draft.enter(JobPhase.RECOVERING, f"moving to other machines: {draining.sentence(going)}", members=())
    recovering(draft)


def reunite(draft: Draft, alike: Set[AgentName]) -> None:
    """End an attempt that cannot save, and begin the next one on machines of one release."""
    draft.enter(JobPhase.RECOVERING, kinds.note_end(draft, alike), members=())
    recovering(draft, only=alike)


def resize(draft: Draft, change: elastic.Resize) -> None:
    """End the attempt, whose ranks hold at a checkpoint, and begin the next one in another size."""
    text = elastic.sentence(draft, change)
    only = elastic.note_end(draft, change)
    draft.enter(JobPhase.RECOVERING, text, members=())
    recovering(draft, only=only)


def recovering(
    draft: Draft, *, avoid: Set[AgentName] = frozenset(), only: Set[AgentName] = frozenset()
) -> None:
    """Between attempts: settle, charge the budget, pause, place."""
    if wants_cancel(draft):
        checkpoints.settle(draft, patient=False)
        cancelled(draft, "cancelled between attempts")
        return
    if not checkpoints.settle(draft, patient=True):
        stop_survivors(draft)
        return
    if importing.is_awaited(draft):
        text = "no checkpoint of it is left that is not damaged, and it must not begin from scratch"
        fail(draft, EventReason.DO_NOT_RETRY, text)
        return
    if not _charge(draft):
        return
    pause = failures.backoff_s(draft.status.fruitless)
    since = draft.in_phase_since
    due = (draft.now if since is None else since) + pause
    if draft.now < due:
        draft.wake(due)
        draft.say("waiting before the next attempt: the last ones got nowhere")
        stop_survivors(draft)
        return
    found = placement.place(
        draft, avoid=avoid, without=rules.shunned(draft), only=only, join_window=since is not None
    )
    if found.members:
        start_attempt(draft, found.members, draft.status.store)
        release_strays(draft)
        return
    draft.lacks_machines = True
    draft.explain(found.why)
    stop_survivors(draft)


def _charge(draft: Draft) -> bool:
    """Count the failure against the budget; False if that ends the job."""
    used = failures.within_window(draft)
    if not draft.status.charge:
        if not used and draft.status.restarts:
            draft.set(restarts=())
        return True
    allowed = draft.spec.restarts.max_restarts
    if len(used) >= allowed:
        cause = "" if draft.status.failure is None else failures.sentence(draft.status.failure)
        fail(
            draft,
            EventReason.BUDGET_EXHAUSTED,
            f"{cause}; the budget of {_count(allowed, 'restart')} is spent",
        )
        return False
    draft.set(restarts=(*used, draft.moment.wall), charge=False)
    return True


def fail(draft: Draft, event: EventReason, reason: str) -> None:
    """End the job as FAILED; open checkpoints must have been settled."""
    draft.event(event, reason, warning=True)
    draft.enter(JobPhase.FAILED, reason, charge=False)
    draft.event(EventReason.JOB_FAILED, reason, warning=True)


# CANCELLING -----------------------------------------------------------------------


def wants_cancel(draft: Draft) -> bool:
    """An operator cancelled this submission, or another one has taken its place."""
    if draft.spec.uid != draft.status.uid:
        return True
    intent = draft.job.intent
    return (
        intent is not None and intent.value.uid == draft.status.uid and intent.value.wanted is Wanted.CANCEL
    )


def cancel(draft: Draft) -> None:
    """Begin to stop a placed job."""
    by = "" if draft.job.intent is None else draft.job.intent.value.by
    draft.enter(JobPhase.CANCELLING, "stopping all ranks: the job was cancelled")
    draft.event(EventReason.USER_REQUESTED, "cancel" + (f" by {by}" if by else ""))
    cancelling(draft)


def cancelling(draft: Draft) -> None:
    """Stop all ranks, gracefully, and wait until they are gone."""
    grace = draft.spec.shutdown_grace_s
    since = draft.in_phase_since
    due = (draft.now if since is None else since) + grace + CANCEL_SLACK_S
    alive = still_alive(seats(draft))
    if not alive or draft.now >= due:
        checkpoints.settle(draft, patient=False)
        cancelled(draft, "cancelled")
        return
    draft.wake(due)
    draft.say(f"waiting for ranks on {_count(len(alive), 'agent')} to end")
    header = draft.header(f"cancel.{draft.status.attempt}")
    for agent in alive:
        draft.command(agent, Stop(header, grace, release=False, why="the job was cancelled"))


def still_alive(members: Sequence[Seat]) -> list[AgentName]:
    """Machines on which ranks of the attempt live, or may live for all that is known."""
    return [
        seat.member.agent
        for seat in members
        if seat.standing is not Standing.LOST
        and (seat.phase in LIVE_PHASES or (seat.agent is None and seat.standing is Standing.SETTLING))
    ]


def cancelled(draft: Draft, reason: str) -> None:
    """End the job as CANCELLED."""
    draft.enter(JobPhase.CANCELLED, reason, charge=False)
    draft.event(EventReason.JOB_CANCELLED, reason)


# Terminal phases --------------------------------------------------------------------


def terminal(draft: Draft) -> None:
    """Release what agents and the store still hold; the phase never changes again."""
    draft.say(draft.status.reason or f"the job is over: {draft.status.phase}")
    checkpoints.settle(draft, patient=False)
    holding = sorted(draft.job.workers)
    for agent in holding:
        header = draft.header(f"release.{draft.status.attempt}")
        snapshot = draft.job.workers[agent].value
        if snapshot.uid != draft.status.uid or snapshot.attempt > draft.status.attempt:
            # Of an earlier submission: its agent could not be reached before the name was used again.
            # A later one, and a later attempt, was forgotten by an etcd restored from a backup.
            header = draft.header_of(snapshot)
        draft.command(agent, Stop(header, draft.spec.shutdown_grace_s, release=True, why="the job is over"))
    since = draft.in_phase_since
    if since is None:
        return
    if holding and draft.now < since + RELEASE_S and not draft.status.swept:
        if draft.status.store:
            draft.wake(since + RELEASE_S)
        return
    retention.sweep_last(draft)


def stop_survivors(draft: Draft) -> None:
    """End what still runs of an attempt that is over and has no successor yet."""
    header = draft.header(f"stop.{draft.status.attempt}")
    for agent, stored in sorted(draft.job.workers.items()):
        snapshot = stored.value
        if snapshot.uid == draft.status.uid and snapshot.phase in LIVE_PHASES:
            why = f"attempt {snapshot.attempt} is over"
            draft.command(agent, Stop(header, draft.spec.shutdown_grace_s, release=False, why=why))


def release_strays(draft: Draft) -> None:
    """End what agents hold of this job without being members of its attempt."""
    members = {member.agent for member in draft.status.members}
    for agent, stored in sorted(draft.job.workers.items()):
        snapshot = stored.value
        if agent in members or snapshot.attempt > draft.status.attempt:
            continue
        if spares.is_kept(draft, agent) or elastic.is_joining(draft, agent):
            continue
        why = "this agent is not part of the attempt"
        draft.command(agent, Stop(draft.header_of(snapshot), 0.0, release=True, why=why))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
