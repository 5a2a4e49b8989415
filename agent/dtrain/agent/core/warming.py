"""A spare machine: a launcher that has imported everything, for a PREPARE that may come.

The job is here as IDLE, with the attempt that ran elsewhere when it was ordered; the next
attempt's PREPARE finds the launcher and is answered at once. A job that was stopped but not
released is warm just the same. A launcher that ends is started again after a while; STOP with
``release`` ends it.
"""

import dataclasses

from dtrain.agent.core import packages, preparing, saving
from dtrain.agent.core.decisions import Action
from dtrain.agent.core.state import AgentState, JobState, LauncherStatus
from dtrain.protocol.commands import Warm
from dtrain.protocol.snapshot import WorkerPhase

AGAIN_S = 30.0
"""Between launchers that end by themselves: what breaks them is seldom gone in a moment."""

NOTE_CHARS_MAX = 200


def refusal(state: AgentState, job: JobState | None, command: Warm) -> str:
    """Why no launcher is kept ready here, "" if one may be."""
    head = command.header
    if state.drain is not None:
        return "this agent is draining"
    if head.attempt <= state.over.get(head.uid, 0):
        return f"attempt {head.attempt} was released here"
    if job is None:
        return ""
    if job.uid != head.uid:
        return f"another submission of job {head.job} is still here"
    if head.attempt < job.attempt:
        return f"attempt {head.attempt} is over; attempt {job.attempt} is here"
    if job.phase is not WorkerPhase.IDLE or job.stopping is not None:
        return f"attempt {job.attempt} is {job.phase} here, not IDLE"
    return ""


def warm(job: JobState | None, command: Warm, out: list[Action]) -> JobState:
    """Take the order on; ``advance`` starts the launcher. Of former ranks here nothing is left to tell."""
    head = command.header
    fresh = JobState(head.job, head.uid, head.attempt, WorkerPhase.IDLE, warm=command)
    return fresh if job is None else preparing.succeed(saving.drop(job, out), fresh)


def advance(state: AgentState, job: JobState, now: float, out: list[Action]) -> JobState:
    """Start a launcher where one is wanted and there is none."""
    if job.warm is None or not awaits_prepare(job) or job.launcher.status is not LauncherStatus.GONE:
        return job
    if job.leftovers or job.departing or now < job.warm_at:
        return job
    if not packages.is_ready(job, job.warm.spec):
        return packages.order(state, job, job.warm.spec, now, out)
    return preparing.launch(state.machine, job, job.warm.spec, now, out, nproc=job.warm.nproc)


def wake_at(job: JobState) -> list[float]:
    """When ``advance`` has something to do by time alone."""
    waits = awaits_prepare(job) and job.launcher.status is LauncherStatus.GONE
    return [job.warm_at] if waits and job.warm_at else []


def ended(job: JobState, log_tail: str, now: float) -> JobState:
    """The launcher is gone; the next one is not started at once."""
    if not awaits_prepare(job):
        return job
    text = f"the launcher kept ready ended by itself: {log_tail.strip()[-NOTE_CHARS_MAX:]}"
    return dataclasses.replace(job, warm_at=now + AGAIN_S, note=text)


def awaits_prepare(job: JobState) -> bool:
    """Whether nothing but a launcher is, or is to be, kept here."""
    return job.warm is not None and job.phase is WorkerPhase.IDLE and job.stopping is None


def is_warm(job: JobState) -> bool:
    """Whether a PREPARE would find everything imported."""
    return (
        job.phase in (WorkerPhase.IDLE, WorkerPhase.ERROR)
        and job.stopping is None
        and job.launcher.status is LauncherStatus.READY
        and not job.launcher.quitting
        and not job.leftovers
    )
