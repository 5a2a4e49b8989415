"""Processes that do not die: who they are, and what that means for the machine.

SIGKILL ends everything but a process that sits in the kernel and waits there
uninterruptibly, for a hung NFS server or a lost GPU. It keeps its memory and
its device, so no rank of the job is started beside it, and the machine says so
until it is gone.
"""

import dataclasses
from collections.abc import Iterable

from dtrain.agent.core.state import AgentState, Held, JobState
from dtrain.agent.launching import ProcessId
from dtrain.protocol.ids import AgentName, Rank
from dtrain.protocol.snapshot import Failure, FailureKind, StuckProcess, WorkerPhase
from dtrain.protocol.wording import some

STUCK_AFTER_S = 10.0
"""A process of a launcher that ended may take that long to leave: tens of gigabytes are given back."""

SHOWN_MAX = 8
WAITS_CHARS_MAX = 64


def hold(
    job: JobState, found: Iterable[tuple[ProcessId, Rank | None]], now: float, *, overdue: bool
) -> JobState:
    """Look after these processes until they are seen to be gone. ``overdue``: they are given up on."""
    held = {one.process: one for one in job.held}
    for process, rank in found:
        known = held.get(process, Held(process, rank, since=now))
        held[process] = dataclasses.replace(known, overdue=known.overdue or overdue)
    left = (*job.leftovers, *(process for process in held if process not in job.leftovers))
    return dataclasses.replace(job, leftovers=left, held=tuple(held.values()))


def probed(
    state: AgentState, job: JobState, alive: dict[ProcessId, str], now: float, wall: float
) -> JobState:
    """Forget processes that are gone; say which stay for too long. ``alive``: each with what it waits in."""
    left = tuple(process for process in job.leftovers if process in alive)
    known = {one.process: one for one in job.held}
    held = []
    for process in left:
        one = known.get(process, Held(process, since=now))
        if one.overdue or now >= one.since + STUCK_AFTER_S:
            # The first answer stays: it would be written to etcd each time it changes.
            waits_in = one.waits_in or alive[process][:WAITS_CHARS_MAX]
            one = dataclasses.replace(one, overdue=True, waits_in=waits_in)
        held.append(one)
    job = dataclasses.replace(job, leftovers=left, held=tuple(held))
    if job.phase is WorkerPhase.STARTING and any(one.overdue for one in held):
        return give_up(state.machine.agent, job, wall)
    return job


def give_up(agent: AgentName, job: JobState, wall: float, *, pids: tuple[int, ...] = ()) -> JobState:
    """The attempt cannot begin here: the leader is told at once instead of after its own patience."""
    known = [sentence(agent, one) for one in job.held if one.overdue]
    text = "; ".join(known) or f"processes cannot be killed: pid {', '.join(map(str, pids))}"
    failure = Failure(FailureKind.UNKILLABLE, text[:500], agent=agent, attempt=job.attempt, at=wall)
    return dataclasses.replace(job, phase=WorkerPhase.ERROR, failure=job.failure or failure)


def is_waiting(job: JobState) -> bool:
    """Some process may still go by itself any moment."""
    overdue = {one.process for one in job.held if one.overdue}
    return any(process not in overdue for process in job.leftovers)


def stuck(job: JobState) -> tuple[StuckProcess, ...]:
    """What the job's snapshot shows of them."""
    found = [StuckProcess(one.process.pid, one.rank, one.waits_in) for one in job.held if one.overdue]
    return tuple(found[:SHOWN_MAX])


def problem(state: AgentState) -> str:
    """What is wrong with this machine, in one sentence; "": nothing."""
    agent = state.machine.agent
    found = [
        f"job {name}: {sentence(agent, one)}"
        for name, job in sorted(state.jobs.items())
        for one in job.held
        if one.overdue
    ]
    if state.refused_term:
        found.insert(
            0,
            f"{agent} obeys nobody: the term of etcd's leader is {state.refused_term}, and it has obeyed term"
            f" {state.term}; etcd was restored from an older state (docs/operations.md: etcd lost its data)",
        )
    return some(found, SHOWN_MAX, between="; ")


def sentence(agent: AgentName, one: Held) -> str:
    """Who cannot be killed, and why."""
    pid = one.process.pid
    who = f"rank {one.rank} (pid {pid})" if one.rank is not None else f"process {pid}"
    where = f" ({one.waits_in})" if one.waits_in else ""
    return f"{who} on {agent} cannot be killed: it waits in the kernel{where}; is a device or NFS hung?"
