"""What is due for a job, whatever happened last: the level-triggered half of ``step``."""

import dataclasses

from dtrain.agent.core import draining, hangs, isolation, preparing, saving, transfers, warming
from dtrain.agent.core.decisions import Action, KillLauncher, LauncherOrder
from dtrain.agent.core.snapshots import group_phase
from dtrain.agent.core.state import AgentState, JobState, LauncherStatus
from dtrain.agent.launching import SignalRanks
from dtrain.protocol.snapshot import WorkerPhase

PLAIN_AFTER_S = 1.0
"""A script that has run this long without saying Hello counts as training, until it does."""

SIGKILL = 9
KILL_AGAIN_S = 10.0


def advance(state: AgentState, job: JobState, tick: bool, now: float, out: list[Action]) -> AgentState:
    """Do what is due; return the state with the job moved on, or without it."""
    before = job
    job = isolation.advance(state, job, now, out)
    job = preparing.chase(job, tick, now, out)
    if job.stopping is not None:
        moved = _stop(job, now, out)
        if moved is None:
            return state.without_job(job.name)
        job = moved
    elif job.phase is WorkerPhase.STARTING:
        job = _prepare(state, job, now, out)
    elif job.warm is not None:
        job = warming.advance(state, job, now, out)
    job = _count_plain_ranks(job, now)
    job = dataclasses.replace(job, phase=group_phase(job))
    job = transfers.order_fetch(state, job, now, out)
    job = saving.order_uploads(state, job, out)
    job = saving.tell_durable(job, out)
    job = _kill_survivors(job, now, out)
    job = hangs.advance(state, job, now, out)
    # Identity, not equality, tells what was touched: keep it where nothing changed.
    return state if job == before else state.with_job(job)


def wake_at(state: AgentState, now: float) -> float | None:
    """When something depends on time alone, or None."""
    times: list[float] = isolation.wake_at(state) + draining.wake_at(state) + hangs.wake_at(state)
    for job in state.jobs.values():
        times.extend(preparing.wake_at(job, now))
        times.extend(warming.wake_at(job))
        if job.kill_at is not None:
            times.append(job.kill_at)
        if job.stopping is not None:
            times.append(job.stopping.kill_at)
        times.extend(
            rank.forked_at + PLAIN_AFTER_S
            for rank in job.ranks
            if rank.forked_at is not None and _may_be_plain(job) and not rank.restored and not rank.sdk
        )
    return min(times, default=None)


def _prepare(state: AgentState, job: JobState, now: float, out: list[Action]) -> JobState:
    job = preparing.ensure_launcher(state, job, now, out)
    if preparing.is_ready(job):
        return dataclasses.replace(job, phase=WorkerPhase.READY)
    return job


def _stop(job: JobState, now: float, out: list[Action]) -> JobState | None:
    """Finish a STOP whose processes are gone; None: the job is released."""
    stopping, launcher = job.stopping, job.launcher
    assert stopping is not None
    if launcher.status is LauncherStatus.GONE and not job.leftovers:
        if stopping.release:
            return None if not job.departing else job
        return dataclasses.replace(job, stopping=None, phase=WorkerPhase.IDLE)
    if launcher.process is not None and now >= stopping.kill_at:
        out.append(KillLauncher(job.name, job.uid, launcher.process))
        stopping = dataclasses.replace(stopping, kill_at=now + KILL_AGAIN_S)
        launcher = dataclasses.replace(launcher, killed=True)
        return dataclasses.replace(job, stopping=stopping, launcher=launcher)
    return job


def _may_be_plain(job: JobState) -> bool:
    """A job that restores, or whose ranks have joined before, is waited for."""
    return not job.sdk and job.start is not None and job.start.restore is None


def _count_plain_ranks(job: JobState, now: float) -> JobState:
    if job.phase is not WorkerPhase.RESTORING or not _may_be_plain(job):
        return job
    for rank in job.ranks:
        alive = rank.process is not None and rank.exit_code is None and not rank.sdk and not rank.restored
        if alive and rank.forked_at is not None and now >= rank.forked_at + PLAIN_AFTER_S:
            moved = dataclasses.replace(rank, phase=WorkerPhase.TRAINING, restored=True)
            job = saving.replace_rank(job, moved)
    return job


def _kill_survivors(job: JobState, now: float, out: list[Action]) -> JobState:
    """State is restored anyway: ranks that wait for a dead peer only delay the next attempt."""
    if job.kill_at is None or now < job.kill_at:
        return job
    if job.alive and job.launcher.status is not LauncherStatus.GONE:
        out.append(LauncherOrder(job.name, job.uid, SignalRanks(job.attempt, SIGKILL)))
    return dataclasses.replace(job, kill_at=None)
