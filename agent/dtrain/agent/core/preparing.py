"""From PREPARE to READY: nothing older is alive, the launcher is warm, the store is open."""

import dataclasses
import hashlib

from dtrain.agent.core import hangs, health, packages, saving
from dtrain.agent.core.decisions import Action, EnsureLauncher, KillLauncher, LauncherOrder, ProbeProcesses
from dtrain.agent.core.state import (
    AgentState,
    Departing,
    JobState,
    Launcher,
    LauncherStatus,
    Machine,
)
from dtrain.agent.core.torch_env import launcher_env
from dtrain.agent.launching import ClearBelow, LaunchSettings, Quit, ServeStore
from dtrain.protocol.commands import Prepare
from dtrain.protocol.job import JobSpec
from dtrain.protocol.snapshot import WorkerPhase

ANSWER_S_MAX = 30.0
"""A warm launcher that has not answered by then is frozen or stuck: it is killed."""
WARM_UP_S_MAX = 300.0
"""The same for one that imports."""
QUIT_S_MAX = 15.0
PROBE_S = 0.1
PROBE_STUCK_S = 2.0
"""For processes that have been given up on."""


def prepare(
    machine: Machine, job: JobState | None, command: Prepare, now: float, out: list[Action]
) -> JobState:
    """Begin a new attempt: whatever an older one still has here is ended without grace."""
    head = command.header
    fresh = JobState(head.job, head.uid, head.attempt, WorkerPhase.STARTING, prepare=command)
    if job is None:
        return fresh
    job = saving.drop(job, out)
    if job.uid != head.uid:
        departing = job.departing
        if job.launcher.status is not LauncherStatus.GONE:
            out.append(LauncherOrder(job.name, job.uid, Quit(0.0)))
            departing = (*departing, Departing(job.uid, job.launcher.folder, job.launcher.process, now))
        return dataclasses.replace(fresh, departing=departing, leftovers=job.leftovers, held=job.held)
    fresh = succeed(job, fresh)
    if fresh.launcher.status is LauncherStatus.GONE or fresh.launcher.quitting:
        return fresh
    return ask(machine, fresh, now, out)


def succeed(job: JobState, fresh: JobState) -> JobState:
    """Take over what outlives an attempt: the launcher with its arenas, and what is still to be seen gone."""
    return dataclasses.replace(
        fresh,
        departing=job.departing,
        launcher=job.launcher,
        leftovers=job.leftovers,
        held=job.held,
        sdk=job.sdk,
        habit=hangs.learned(job),
        seq_over=job.seq_over,
        kept=job.kept,
        unpacked=job.unpacked,
        unpacking=job.unpacking,
        unpack_tries=job.unpack_tries,
    )


def ensure_launcher(state: AgentState, job: JobState, now: float, out: list[Action]) -> JobState:
    """Start a launcher if there is none, and give it the attempt's first orders."""
    if job.launcher.status is not LauncherStatus.GONE:
        return job
    assert job.prepare is not None
    if not packages.is_ready(job, job.prepare.spec):
        return packages.order(state, job, job.prepare.spec, now, out)
    machine = state.machine
    job = launch(machine, job, job.prepare.spec, now, out, nproc=job.prepare.ranks_here)
    return ask(machine, job, now, out)


def launch(
    machine: Machine, job: JobState, spec: JobSpec, now: float, out: list[Action], *, nproc: int
) -> JobState:
    """Start a launcher of the job."""
    # Short, because a socket lies in it, and of its own for each life: two launchers never share it.
    text = f"{job.name}/{job.uid}/{job.attempt}/{machine.life}/{now}"
    folder = f"{machine.run_dir}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    settings = LaunchSettings(
        folder=folder,
        working_dir=packages.working_dir(machine, spec),
        env=launcher_env(machine, spec),
        preload=spec.preload,
        orphan_grace_s=machine.orphan_grace_s,
        nproc=nproc,
    )
    out.append(EnsureLauncher(job.name, job.uid, settings))
    return dataclasses.replace(job, launcher=Launcher(LauncherStatus.STARTING, folder), cleared=False)


def ask(machine: Machine, job: JobState, now: float, out: list[Action]) -> JobState:
    """Give a launcher the attempt's first orders; giving them twice does no harm."""
    assert job.prepare is not None
    out.append(LauncherOrder(job.name, job.uid, ClearBelow(job.attempt, 0.0)))
    if job.prepare.serve_store:
        order = ServeStore(job.attempt, machine.host, job.prepare.world_size)
        out.append(LauncherOrder(job.name, job.uid, order))
    return dataclasses.replace(job, launcher=dataclasses.replace(job.launcher, asked_at=now or 1e-9))


def is_ready(job: JobState) -> bool:
    """Whether an attempt's ranks may be started."""
    prepared = job.prepare
    return (
        prepared is not None
        and job.cleared
        and not job.leftovers
        and not job.departing
        and job.launcher.status is LauncherStatus.READY
        and (bool(job.rendezvous) or not prepared.serve_store)
    )


def chase(job: JobState, tick: bool, now: float, out: list[Action]) -> JobState:
    """Kill launchers that do not answer, and look after processes whose end must be seen."""
    launcher = job.launcher
    limit_s = ANSWER_S_MAX if launcher.status is LauncherStatus.READY else WARM_UP_S_MAX
    if launcher.process is not None and launcher.asked_at and now >= launcher.asked_at + limit_s:
        out.append(KillLauncher(job.name, job.uid, launcher.process))
        job = dataclasses.replace(job, launcher=dataclasses.replace(launcher, asked_at=now, killed=True))
    for one in job.departing:
        if one.process is not None and now >= one.asked_at + QUIT_S_MAX:
            out.append(KillLauncher(job.name, one.uid, one.process))
            later = dataclasses.replace(one, asked_at=now)
            departing = tuple(later if other is one else other for other in job.departing)
            job = dataclasses.replace(job, departing=departing)
    if job.leftovers and tick:
        out.append(ProbeProcesses(job.name, job.uid, job.leftovers))
    return job


def wake_at(job: JobState, now: float) -> list[float]:
    """When ``chase`` has something to look at."""
    times = [one.asked_at + QUIT_S_MAX for one in job.departing]
    if job.leftovers:
        times.append(now + (PROBE_S if health.is_waiting(job) else PROBE_STUCK_S))
    if job.launcher.process is not None and job.launcher.asked_at:
        ready = job.launcher.status is LauncherStatus.READY
        times.append(job.launcher.asked_at + (ANSWER_S_MAX if ready else WARM_UP_S_MAX))
    return times
