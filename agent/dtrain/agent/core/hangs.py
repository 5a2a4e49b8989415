"""Ranks that stand still: how long each may, what does not count, and what is said of it.

Only ranks that speak the SDK have a deadline. It follows their own steps, three times the median and a
little, and never less than twice the longest standstill that ended well. Time does not count

* while the script is in a section, saves, restores, holds at a checkpoint or has announced its end,
* while the rank, or what it started, waited for a CPU, was traced, or waited for a disk (up to a bound),
* while this machine or this process stood still itself,
* while the machine is cut off from etcd.

A rank that is over its deadline is a ``Stall`` in the snapshot, and no more than that. The leader asks for
stacks once all ranks of the attempt stand still. Who is found at work by two looks at it gets a longer
deadline, once. So does who stands where the attempt before was ended for it: four times as long as then,
so that what was only slow comes through.
"""

import dataclasses
from statistics import median

from dtrain.agent.core.decisions import Action, CollectStacks, LookAtRanks
from dtrain.agent.core.events import RanksLookedAt, StacksCollected, StacksShown
from dtrain.agent.core.state import AgentState, Habit, JobState, LinkState, LocalRank, Watch, coarse
from dtrain.agent.launching import ProcessId
from dtrain.protocol.commands import DumpStacks
from dtrain.protocol.ids import Rank
from dtrain.protocol.ranklink import Report
from dtrain.protocol.snapshot import Stack, StackKind, Stall, WorkerPhase

STEPS = 3.0
SLACK_S = 1.8
"""With ``STEPS``: what is left of five seconds is for reports, two looks and the leader."""

LONGEST = 2.0
MEASURED, MEASURED_STEPS = 3, 10
"""So many reports of step times make a median, or so many steps in them: fast ones come many at a time."""
STEPS_KEPT = 31
UNMEASURED_S = 600.0
"""The deadline until then: compilers warm up."""

LOOK_S_LEAST, LOOK_S_MOST, LOOK_SHARE = 0.5, 5.0, 1 / 8
"""Between two looks, as a share of the deadline."""
LATE = 2.2
"""Times the interval: of a longer time between two looks no more counts, as this process was not there."""

DISK_S_MAX = 60.0
KERNEL_S = 60.0
"""The deadline of a rank that sits in the kernel, once."""
BUSY_S = 300.0
"""The same for one that is at work, as it may well be: an evaluation that the script has given no section."""
AGAIN = 4.0
CUT_S_MAX = 1800.0

_LIVING = (WorkerPhase.RESTORING, WorkerPhase.TRAINING)


# What ranks say -------------------------------------------------------------------------


def heard(job: JobState, rank: LocalRank, report: Report, now: float) -> tuple[JobState, LocalRank]:
    """Take in a report: whatever is new in it restarts the rank's clock. ``rank`` has taken it over."""
    watch, signs = rank.watch, _signs(report)
    if signs == watch.signs:
        return job, rank
    moved = Watch(signs, since=now, stepped=watch.stepped, usual=watch.usual, steps=watch.steps)
    steps = report.step - int(watch.signs[0]) if watch.signs else 0
    stood_s = _stood_s(watch, now)
    # Beats say that it goes on; anything else, that it did something beside its step.
    excused = watch.excused or stood_s is None or signs[2:] != watch.signs[2:]
    if steps > 0 and report.phase is WorkerPhase.TRAINING:
        if watch.stepped and stood_s is not None and not watch.missed:
            took_s = watch.before_s + stood_s
            usual = (*watch.usual, took_s / steps)[-STEPS_KEPT:]
            moved = dataclasses.replace(moved, usual=usual, steps=watch.steps + steps)
            job = _note_pace(job, moved)
            if not excused:
                job = _learn(job, took_s)
        moved = dataclasses.replace(moved, stepped=True)
    elif watch.signs:
        moved = dataclasses.replace(
            moved,
            excused=excused,
            before_s=watch.before_s + (stood_s or 0.0),
            missed=watch.missed or stood_s is None,
        )
    if job.dump:
        # Those that are still being collected, too: they would be of before.
        job = dataclasses.replace(job, stacks=(), dump="")
    return job, dataclasses.replace(rank, watch=moved)


def _signs(report: Report) -> tuple[str, ...]:
    sealed = 0 if report.sealed is None else report.sealed.seq
    problem = 0 if report.problem is None else report.problem.seq
    more = (sealed, problem, report.settled, report.save_at, report.last_step)
    return (str(report.step), str(report.beats), report.phase.value, report.section, *map(str, more))


def _stood_s(watch: Watch, now: float) -> float | None:
    """How long a standstill that is over has lasted; None: this process was not there all the time."""
    last = max(watch.looked_at, watch.since)
    if now - last > LATE * LOOK_S_MOST:
        return None
    return watch.counted_s + now - last


def _learn(job: JobState, took_s: float) -> JobState:
    if took_s <= job.habit.longest_s:
        return job
    return dataclasses.replace(job, habit=dataclasses.replace(job.habit, longest_s=took_s))


def _note_pace(job: JobState, watch: Watch) -> JobState:
    """Keep how long steps take for the agent's next life: its ranks may hang before they show it that."""
    if not _is_measured(watch):
        return job
    usual_s, known_s = median(watch.usual), job.habit.usual_s
    if known_s / 4 <= usual_s <= known_s:
        return job
    return dataclasses.replace(job, habit=dataclasses.replace(job.habit, usual_s=coarse(usual_s)))


def _is_measured(watch: Watch) -> bool:
    return len(watch.usual) >= MEASURED or watch.steps >= MEASURED_STEPS


def adopted(job: JobState) -> JobState:
    """Go on with what the agent's former life knew of this attempt's steps."""
    usual_s = job.habit.usual_s
    if not usual_s:
        return job
    watch = Watch(stepped=True, usual=(usual_s,) * MEASURED, steps=MEASURED)
    return dataclasses.replace(job, ranks=tuple(dataclasses.replace(rank, watch=watch) for rank in job.ranks))


def learned(job: JobState) -> Habit:
    """What the next attempt of this submission should know."""
    habit = job.habit
    over = [rank for rank in job.ranks if _is_over(job, rank)]
    if over and job.stacks:
        cut_s = max(rank.watch.counted_s for rank in over)
        places = tuple(sorted({_place(stack) for stack in job.stacks}))
        return Habit(habit.longest_s, max(rank.step for rank in over), cut_s, places)
    if any(rank.step > habit.cut_step for rank in job.ranks if rank.watch.stepped):
        return Habit(habit.longest_s)
    return habit


def _place(stack: Stack) -> str:
    return f"{stack.kind.value} {stack.where}"


# How long a rank may stand still ---------------------------------------------------------


def deadline_s(job: JobState, rank: LocalRank) -> float:
    """How long the rank may stand where it does."""
    assert job.prepare is not None
    policy, watch = job.prepare.spec.hang, rank.watch
    if not watch.stepped:
        return policy.startup_s
    if policy.timeout_s > 0:
        return policy.timeout_s
    if not _is_measured(watch):
        return max(watch.raised_s, min(UNMEASURED_S, policy.startup_s))
    return max(STEPS * median(watch.usual) + SLACK_S, LONGEST * job.habit.longest_s, watch.raised_s)


def is_excused(job: JobState, rank: LocalRank) -> bool:
    """Whether the rank has a reason to stand still."""
    if rank.section or rank.save_at is not None or rank.wants_durable is not None:
        return True
    if rank.wants_restore or rank.last_step is not None or rank.phase not in _LIVING:
        return True
    if rank.watch.signs and not rank.connection:
        return True
    for saving in job.saving:
        if saving.step > rank.step or any(
            one.seq == saving.seq and one.rank == rank.rank for one in job.problems
        ):
            continue
        # It copies its state, or it waits at that step for what becomes of it.
        if saving.hold_s > 0 or rank.sealed is None or rank.sealed.seq < saving.seq:
            return True
    return False


def _is_watched(job: JobState, rank: LocalRank) -> bool:
    return (
        job.prepare is not None
        and job.prepare.spec.hang.enabled
        and job.phase in _LIVING
        and job.stopping is None
        and job.failure is None
        and rank.process is not None
        and rank.exit_code is None
        and _since(job, rank) > 0
    )


def _since(job: JobState, rank: LocalRank) -> float:
    # One that has never said anything may hang in an import: where others speak, it will too.
    return rank.watch.since or (job.started_at if job.sdk else 0.0)


def _is_over(job: JobState, rank: LocalRank) -> bool:
    watched = _is_watched(job, rank) and not is_excused(job, rank)
    return watched and rank.watch.counted_s >= deadline_s(job, rank)


# Looking --------------------------------------------------------------------------------


def advance(state: AgentState, job: JobState, now: float, out: list[Action]) -> JobState:
    """Have a look at ranks that stand still."""
    if state.link.state is not LinkState.OK:
        return job
    due = {
        rank.rank: rank.process
        for rank in job.ranks
        if rank.process is not None and (at := _look_at(job, rank)) is not None and now >= at
    }
    if due:
        out.append(LookAtRanks(job.name, job.uid, job.attempt, due))
    return job


def wake_at(state: AgentState) -> list[float]:
    """When ``advance`` has something to do."""
    if state.link.state is not LinkState.OK:
        return []
    found = [_look_at(job, rank) for job in state.jobs.values() for rank in job.ranks]
    return [at for at in found if at is not None]


def _look_at(job: JobState, rank: LocalRank) -> float | None:
    if not _is_watched(job, rank) or _is_over(job, rank):
        return None
    interval_s = _interval_s(job, rank)
    left_s = deadline_s(job, rank) - rank.watch.counted_s
    return _last(job, rank) + min(interval_s, max(LOOK_S_LEAST / 5, left_s))


def _interval_s(job: JobState, rank: LocalRank) -> float:
    return min(LOOK_S_MOST, max(LOOK_S_LEAST, LOOK_SHARE * deadline_s(job, rank)))


def _last(job: JobState, rank: LocalRank) -> float:
    return max(rank.watch.looked_at, _since(job, rank))


def looked_at(state: AgentState, event: RanksLookedAt, now: float) -> AgentState:
    """Count the time since the last look, as far as it counts."""
    job = state.jobs.get(event.job)
    if job is None or (job.uid, job.attempt) != (event.uid, event.attempt):
        return state
    looks = {look.rank: look for look in event.looks}
    ranks = []
    for rank in job.ranks:
        look = looks.get(rank.rank)
        if look is None or not _is_watched(job, rank):
            ranks.append(rank)
            continue
        watch = rank.watch
        passed_s = min(now - _last(job, rank), LATE * _interval_s(job, rank))
        counted_s, disk_s, excused = 0.0, watch.disk_s, watch.excused
        if is_excused(job, rank):
            excused = True
        elif look.state == "D" and disk_s < DISK_S_MAX:
            disk_s += passed_s
        elif look.state not in ("", "t"):
            counted_s = max(0.0, passed_s - look.waited_s)
        watch = dataclasses.replace(
            watch,
            looked_at=now,
            counted_s=watch.counted_s + counted_s,
            disk_s=disk_s,
            excused=excused,
        )
        ranks.append(dataclasses.replace(rank, watch=watch))
    return state.with_job(dataclasses.replace(job, ranks=tuple(ranks)))


# What is said of it ---------------------------------------------------------------------


def stalls(state: AgentState, job: JobState) -> tuple[Stall, ...]:
    """The ranks that are over their deadline, for the snapshot."""
    if state.link.state is not LinkState.OK:
        return ()
    return tuple(
        Stall(rank.rank, rank.step, round(deadline_s(job, rank), 3))
        for rank in job.ranks
        if _is_over(job, rank)
    )


def dump(job: JobState, command: DumpStacks, out: list[Action]) -> JobState:
    """Collect the stacks of all ranks that live."""
    out.append(CollectStacks(job.name, job.uid, job.attempt, command.header.id, processes(job)))
    return dataclasses.replace(job, dump=command.header.id, stacks=())


def processes(job: JobState) -> dict[Rank, ProcessId]:
    """Of the ranks that live."""
    return {
        rank.rank: rank.process for rank in job.ranks if rank.process is not None and rank.exit_code is None
    }


def shown(state: AgentState, event: StacksShown, wall: float) -> AgentState:
    """Keep in mind that a person has had stacks collected, so that others find them."""
    job = state.jobs.get(event.job)
    if job is None or (job.uid, job.attempt) != (event.uid, event.attempt):
        return state
    return state.with_job(dataclasses.replace(job, dumps=job.dumps + 1, dumped_at=wall))


def collected(state: AgentState, event: StacksCollected, wall: float) -> AgentState:
    """Show stacks; a rank that is at work gets more time, once in a standstill."""
    job = state.jobs.get(event.job)
    if job is None or (job.uid, job.attempt, job.dump) != (event.uid, event.attempt, event.dump):
        return state
    stacks, ranks = [], []
    found = {stack.rank: stack for stack in event.stacks}
    for rank in job.ranks:
        stack = found.get(rank.rank)
        if stack is not None:
            stacks.append(dataclasses.replace(stack, step=rank.step, collective=rank.collective))
            rank = _raised(job, rank, stack)  # noqa: PLW2901
        ranks.append(rank)
    job = dataclasses.replace(job, stacks=tuple(stacks), ranks=tuple(ranks))
    return state.with_job(dataclasses.replace(job, dumps=job.dumps + 1, dumped_at=wall))


def _raised(job: JobState, rank: LocalRank, stack: Stack) -> LocalRank:
    assert job.prepare is not None
    watch = rank.watch
    if job.prepare.spec.hang.timeout_s > 0 or not watch.stepped or watch.raised_s or not _is_over(job, rank):
        return rank
    least_s = BUSY_S if stack.moving else KERNEL_S if stack.kind is StackKind.KERNEL else 0.0
    habit = job.habit
    # Who waits in a collective or was stopped would tell nothing: that looks the same each time.
    tells = stack.kind not in (StackKind.COLLECTIVE, StackKind.STOPPED)
    if tells and rank.step <= habit.cut_step and _place(stack) in habit.cut_places:
        least_s = max(least_s, min(CUT_S_MAX, AGAIN * habit.cut_s))
    if not least_s:
        return rank
    raised_s = max(least_s, deadline_s(job, rank) + least_s / AGAIN)
    return dataclasses.replace(rank, watch=dataclasses.replace(watch, raised_s=raised_s))
