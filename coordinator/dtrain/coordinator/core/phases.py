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
    closing,
    conditions,
    draining,
    elastic,
    endings,
    failures,
    importing,
    kinds,
    nonfinite,
    outcomes,
    pausing,
    placement,
    retention,
    rollback,
    rules,
    settling,
    spares,
    stragglers,
    suspicion,
    tally,
)
from dtrain.coordinator.core.decisions import ProbeStore
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.failures import Ending
from dtrain.coordinator.core.liveness import (
    TRAINING_PHASES,
    Seat,
    Standing,
    has_started,
    is_ready,
    seats,
)
from dtrain.protocol.commands import Prepare, Start
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, Step
from dtrain.protocol.job import JobPhase, Member, RestorePoint, RuleAction
from dtrain.protocol.snapshot import FailureKind, WorkerPhase
from dtrain.protocol.wording import count, some

PROBE_RETRY_S = 5.0


# QUEUED ---------------------------------------------------------------------------


def queued(draft: Draft) -> None:
    """Wait for a store that answers and for enough machines."""
    if closing.wants_cancel(draft):
        settling.settle(draft, patient=False)
        closing.cancelled(draft, "cancelled while it waited for machines")
        return
    if importing.follow(draft):
        closing.release_strays(draft)
        return
    # Where a checkpoint was imported to, the first attempt looks for it.
    store = draft.status.store or draft.spec.checkpoint.store or draft.fleet.default_store
    if store and not _store_is_usable(draft, store):
        closing.release_strays(draft)
        return
    if importing.begin(draft, store):
        closing.release_strays(draft)
        return
    found = placement.place(draft, join_window=True)
    if found.members:
        start_attempt(draft, found.members, store)
    else:
        draft.explain(found.why)
        closing.release_strays(draft)


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
        f"starting attempt {number}: {count(world, 'rank')} on {count(len(members), 'agent')}, {origin}",
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
        EventReason.ATTEMPT_STARTED, f"{count(world, 'rank')} on {names}, {origin}", f"attempt/{number}"
    )
    kinds.tell_begin(draft, members)
    _prepare(draft, seats(draft))


# STARTING -------------------------------------------------------------------------


def starting(draft: Draft) -> None:
    """PREPARE everywhere, then START everywhere, until all ranks train."""
    if closing.wants_cancel(draft):
        closing.cancel(draft)
        return
    members = seats(draft)
    ending = endings.why_over(draft, members)
    if ending is not None:
        attempt_over(draft, ending, avoid=_at_fault(ending, members))
        return
    if going := draining.leaving(members):
        move(draft, going)
        return
    ready = [seat for seat in members if is_ready(seat)]
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
    closing.release_strays(draft)


def _prepare(draft: Draft, members: Sequence[Seat]) -> None:
    status = draft.status
    header = draft.header(f"prepare.{status.attempt}")
    if has_started(draft):
        return  # ranks run, or have run: a machine that lost its own cannot join them any more
    for seat in members:
        if is_ready(seat):
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
    draft.enter(JobPhase.RUNNING, f"training on {count(world, 'rank')}")
    draft.event(
        EventReason.ALL_RANKS_TRAINING,
        f"{count(world, 'rank')} of attempt {draft.status.attempt} are training",
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
        waiting = [seat.member.agent for seat in members if not is_ready(seat)]
        draft.say(f"{ready} of {len(members)} agents ready; waiting for {some(waiting, placement.SHOWN_MAX)}")
    else:
        training = sum(1 for seat in members if _is_training(seat))
        draft.say(f"restoring: ranks of {training} of {len(members)} agents train")


def _is_training(seat: Seat) -> bool:
    if seat.snapshot is None or seat.phase not in TRAINING_PHASES:
        return False
    return seat.snapshot.restored or seat.phase is WorkerPhase.DONE


def _at_fault(ending: Ending, members: Sequence[Seat]) -> Set[AgentName]:
    """Who held up the start. Those that were still on their way when something else failed did not."""
    if ending.failure.kind not in (FailureKind.PREPARE, FailureKind.UNREACHABLE):
        return frozenset()
    return {seat.member.agent for seat in members if not is_ready(seat)}


# RUNNING --------------------------------------------------------------------------


def running(draft: Draft) -> None:
    """Watch the ranks, take checkpoints, and see the job to its end."""
    if closing.wants_cancel(draft):
        closing.cancel(draft)
        return
    members = seats(draft)
    ending = endings.why_over(draft, members)
    if ending is not None:
        attempt_over(draft, ending)
        return
    if all(seat.phase is WorkerPhase.DONE for seat in members):
        closing.succeed(draft)
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
        training = f"training on {count(draft.status.world_size, 'rank')}"
        draft.explain(kinds.obstacle(draft.status.members) or training)
    if draft.fleet.brake:
        draft.say(f"no loss is declared while the brake is on: {draft.fleet.brake}")
    for seat in members:
        if seat.standing is Standing.SETTLING:
            draft.say(f"{seat.why}; waiting before it is called lost")
    if not (going or pause or change):
        checkpoints.drive(draft, members)
    outcomes.tell_outcomes(draft, members)
    nonfinite.note(draft, members)
    stragglers.note(draft, members)
    closing.release_strays(draft)
    spares.keep_warm(draft)
    if draft.status.store:
        retention.sweep(draft)


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
        settling.settle(draft, patient=False)
        closing.fail(draft, consequence.event, text)
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
    if closing.wants_cancel(draft):
        settling.settle(draft, patient=False)
        closing.cancelled(draft, "cancelled between attempts")
        return
    if not settling.settle(draft, patient=True):
        closing.stop_survivors(draft)
        return
    if importing.is_awaited(draft):
        text = "no checkpoint of it is left that is not damaged, and it must not begin from scratch"
        closing.fail(draft, EventReason.DO_NOT_RETRY, text)
        return
    if not _charge(draft):
        return
    pause = failures.backoff_s(draft.status.fruitless)
    since = draft.in_phase_since
    due = (draft.now if since is None else since) + pause
    if draft.now < due:
        draft.wake(due)
        draft.say("waiting before the next attempt: the last ones got nowhere")
        closing.stop_survivors(draft)
        return
    found = placement.place(
        draft, avoid=avoid, without=rules.shunned(draft), only=only, join_window=since is not None
    )
    if found.members:
        start_attempt(draft, found.members, draft.status.store)
        closing.release_strays(draft)
        return
    draft.lacks_machines = True
    draft.explain(found.why)
    closing.stop_survivors(draft)


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
        closing.fail(
            draft,
            EventReason.BUDGET_EXHAUSTED,
            f"{cause}; the budget of {count(allowed, 'restart')} is spent",
        )
        return False
    draft.set(restarts=(*used, draft.moment.wall), charge=False)
    return True
