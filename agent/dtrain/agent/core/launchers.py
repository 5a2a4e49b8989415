"""What launchers report: readiness, ends of ranks, their own end."""

import dataclasses
from typing import assert_never

from dtrain.agent.core import health, preparing, starting, warming
from dtrain.agent.core.decisions import Action, LauncherOrder
from dtrain.agent.core.events import LauncherReported, LauncherStarted, ProcessesProbed
from dtrain.agent.core.failures import LOG_TAIL_CHARS_MAX, fail, rank_failure, signal_name
from dtrain.agent.core.saving import replace_rank
from dtrain.agent.core.state import AgentState, JobState, Launcher, LauncherStatus
from dtrain.agent.launching import (
    ClearBelow,
    Cleared,
    Forked,
    LauncherEnded,
    LauncherReady,
    LauncherState,
    LiveRank,
    Quit,
    RankEnded,
    StoreReady,
)
from dtrain.protocol.ids import Attempt
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

_BEFORE_START = (WorkerPhase.STARTING, WorkerPhase.READY)
_RUNNING = (WorkerPhase.RESTORING, WorkerPhase.TRAINING)


def started(state: AgentState, event: LauncherStarted) -> AgentState:
    """Remember the process: it is journaled, so that a restarted agent finds it."""
    job = state.jobs.get(event.job)
    if job is None or job.uid != event.uid:
        return state
    launcher = dataclasses.replace(job.launcher, process=event.process)
    return state.with_job(dataclasses.replace(job, launcher=launcher))


def probed(state: AgentState, event: ProcessesProbed, now: float, wall: float) -> AgentState:
    """Forget processes that are seen to be gone."""
    job = state.jobs.get(event.job)
    if job is None or job.uid != event.uid:
        return state
    waits = event.waits or ("",) * len(event.alive)
    alive = dict(zip(event.alive, waits, strict=True))
    return state.with_job(health.probed(state, job, alive, now, wall))


def reported(
    state: AgentState, event: LauncherReported, now: float, wall: float, out: list[Action]
) -> AgentState:
    """Take in one report; those of unknown launchers mean nothing."""
    job = state.jobs.get(event.job)
    if job is None:
        return state
    if job.uid != event.uid:
        if isinstance(event.report, LauncherEnded):
            left = tuple(one for one in job.departing if one.uid != event.uid)
            job = dataclasses.replace(job, departing=left)
        return state.with_job(job)
    report = event.report
    match report:
        case LauncherState():
            job = _state(state, job, report, now, out)
        case LauncherReady():
            launcher = dataclasses.replace(
                job.launcher, status=LauncherStatus.READY, warning=report.warning or job.launcher.warning
            )
            job = dataclasses.replace(job, launcher=launcher)
        case Cleared():
            job = _cleared(state, job, report, now, wall)
        case StoreReady():
            job = _store(state, job, report, now, wall)
        case Forked():
            if report.attempt == job.attempt:
                for live in report.ranks:
                    job = _live(job, live, now)
        case RankEnded():
            if report.attempt == job.attempt:
                job = _ended(state, job, report, now)
        case LauncherEnded():
            job = _launcher_ended(state, job, report, now, wall)
        case _:
            assert_never(report)
    return state.with_job(job)


def _state(
    state: AgentState, job: JobState, report: LauncherState, now: float, out: list[Action]
) -> JobState:
    """Compare the whole truth with what is known; each rank that has ended is reported after it."""
    adopted = job.launcher.adopted
    launcher = dataclasses.replace(
        job.launcher,
        status=LauncherStatus.READY if report.ready else LauncherStatus.STARTING,
        process=report.process,
        warning=report.warning or job.launcher.warning,
        adopted=False,
    )
    job = dataclasses.replace(job, launcher=launcher)
    prepared = job.prepare
    if report.store_attempt == job.attempt and report.store_port and prepared and prepared.serve_store:
        job = dataclasses.replace(job, rendezvous=_endpoint(state, report.store_port))
    ours = [live for live in report.ranks if live.attempt == job.attempt]
    for live in ours:
        job = _live(job, live, now)
    if adopted and job.stopping is not None:
        out.append(LauncherOrder(job.name, job.uid, stop_order(job, job.stopping.release, 0.0)))
        return job
    if adopted and job.phase is WorkerPhase.STARTING:
        return preparing.ask(state.machine, job, now, out)
    if adopted and job.phase in _RUNNING and len(ours) < len(job.ranks):
        # The former agent ended between its journal and the order.
        starting.fork(state.machine, job, out)
    return job


def stop_order(job: JobState, release: bool, grace_s: float) -> ClearBelow | Quit:
    """End all ranks of this attempt and older ones; with ``release`` the launcher too."""
    return Quit(grace_s) if release else ClearBelow(Attempt(job.attempt + 1), grace_s)


def _live(job: JobState, live: LiveRank, now: float) -> JobState:
    rank = job.rank(live.rank)
    if rank is None:
        return job
    forked_at = now if rank.forked_at is None else rank.forked_at
    return replace_rank(job, dataclasses.replace(rank, process=live.process, forked_at=forked_at))


def _cleared(state: AgentState, job: JobState, report: Cleared, now: float, wall: float) -> JobState:
    if report.attempt < job.attempt:
        return job
    if report.stuck:
        found = [(one.process, one.rank) for one in report.unkilled]
        job = health.hold(_answered(job), found, now, overdue=True)
        job = health.give_up(state.machine.agent, job, wall, pids=report.stuck)
        released = job.stopping is not None and job.stopping.release
        return job if released else dataclasses.replace(job, stopping=None)
    if job.stopping is not None and not job.stopping.release and report.attempt > job.attempt:
        job = dataclasses.replace(job, stopping=None, phase=WorkerPhase.IDLE)
    elif job.phase is WorkerPhase.STARTING:
        job = dataclasses.replace(job, cleared=True)
    return _answered(job)


def _store(state: AgentState, job: JobState, report: StoreReady, now: float, wall: float) -> JobState:
    if report.attempt != job.attempt or job.phase is not WorkerPhase.STARTING:
        return job
    if report.port:
        return dataclasses.replace(job, rendezvous=_endpoint(state, report.port))
    message = f"the attempt's TCPStore could not be opened: {report.problem}"
    return fail(job, _failure(state, job, FailureKind.PREPARE, message, wall), now)


def _ended(state: AgentState, job: JobState, report: RankEnded, now: float) -> JobState:
    rank = job.rank(report.rank)
    if rank is None or rank.exit_code is not None:
        return job
    good = report.exit_code == 0
    phase = WorkerPhase.DONE if good else WorkerPhase.ERROR
    rank = dataclasses.replace(
        rank,
        exit_code=report.exit_code,
        phase=phase,
        restored=rank.restored or good,
        connection=0,
        wants_restore=False,
    )
    job = replace_rank(job, rank)
    if good or job.stopping is not None or job.phase not in (*_RUNNING, WorkerPhase.ERROR):
        return job
    return fail(job, rank_failure(state.machine.agent, job, rank, report, now=now), now)


def _launcher_ended(
    state: AgentState, job: JobState, report: LauncherEnded, now: float, wall: float
) -> JobState:
    expected = job.launcher.killed or job.launcher.quitting
    # Its ranks are killed by the kernel as it ends; that they are gone must still be seen.
    left = [(rank.process, rank.rank) for rank in job.ranks if rank.process and rank.exit_code is None]
    ranks = tuple(
        rank
        if rank.exit_code is not None
        else dataclasses.replace(rank, exit_code=-9, phase=WorkerPhase.ERROR, connection=0)
        for rank in job.ranks
    )
    job = health.hold(job, left, now, overdue=False)
    # The arenas were its own: what lay there is gone.
    job = dataclasses.replace(job, launcher=Launcher(), cleared=False, rendezvous="", ranks=ranks, kept=())
    if job.stopping is not None or (expected and job.phase is WorkerPhase.STARTING):
        return job
    if job.phase not in (*_BEFORE_START, *_RUNNING):
        return warming.ended(job, report.log_tail, now)
    code = report.exit_code
    lost = f"is gone: {report.log_tail.strip()[-200:]}" if report.log_tail else "is gone"
    how = lost if code is None else signal_name(-code) if code < 0 else f"exited with code {code}"
    how = f"was ended by {how}" if code is not None and code < 0 else how
    kind = FailureKind.SIGNAL if code is not None and code < 0 else FailureKind.EXIT
    failure = _failure(
        state,
        job,
        FailureKind.PREPARE if job.phase in _BEFORE_START else kind,
        f"the launcher {how}, and its ranks with it",
        wall,
    )
    failure = dataclasses.replace(
        failure,
        exit_code=code,
        signal=-code if code is not None and code < 0 else None,
        log_tail=report.log_tail[-LOG_TAIL_CHARS_MAX:],
    )
    return fail(job, failure, now)


def _answered(job: JobState) -> JobState:
    return dataclasses.replace(job, launcher=dataclasses.replace(job.launcher, asked_at=0.0))


def _endpoint(state: AgentState, port: int) -> str:
    host = state.machine.host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _failure(state: AgentState, job: JobState, kind: FailureKind, message: str, wall: float) -> Failure:
    return Failure(kind, message, agent=state.machine.agent, attempt=job.attempt, at=wall)
