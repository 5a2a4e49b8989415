"""A job whose working directory comes packed: it is unpacked here before a launcher is started in it."""

import dataclasses

from dtrain.agent.core.decisions import Action, TransferOrder
from dtrain.agent.core.failures import MESSAGE_CHARS_MAX, fail
from dtrain.agent.core.state import AgentState, JobState, Machine
from dtrain.agent.transferring import DropTree, Unpack, Unpacked, UnpackFailed
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import JobSpec
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

UNPACK_TRIES_MAX = 3
"""Transfer processes that may end over one package."""

AGAIN_S = 30.0
"""Between tries of a spare machine: nobody waits for it."""


def working_dir(machine: Machine, spec: JobSpec) -> str:
    """Where the ranks of a job start on this machine."""
    if spec.package is not None:
        return f"{machine.tree_dir}/{tree(spec.name, spec.uid)}"
    return spec.working_dir or machine.working_dir


def tree(job: JobName, uid: Uid) -> str:
    """Name of the folder of one submission."""
    return f"{job}-{uid}"


def is_ready(job: JobState, spec: JobSpec) -> bool:
    """Whether a launcher can be started in the job's folder."""
    return spec.package is None or job.unpacked


def order(state: AgentState, job: JobState, spec: JobSpec, now: float, out: list[Action]) -> JobState:
    """Have the folder made, once for each transfer process."""
    assert spec.package is not None
    if job.unpacking:
        return job
    if job.unpack_tries >= UNPACK_TRIES_MAX:
        text = f"the transfer process ended {UNPACK_TRIES_MAX} times while it unpacked the working directory"
        return _failed(state, job, text, now, hopeless=False, wall=0.0)
    out.append(
        TransferOrder(
            Unpack(
                cluster=state.machine.cluster,
                job=job.name,
                uid=job.uid,
                package=spec.package,
                tree=tree(job.name, job.uid),
                keep=in_use(state),
            )
        )
    )
    return dataclasses.replace(job, unpacking=True, unpack_tries=job.unpack_tries + 1)


def in_use(state: AgentState) -> tuple[str, ...]:
    """Folders that may have processes in them."""
    found = {tree(job.name, job.uid) for job in state.jobs.values()}
    found |= {tree(job.name, one.uid) for job in state.jobs.values() for one in job.departing}
    return tuple(sorted(found))


def unpacked(state: AgentState, report: Unpacked) -> AgentState:
    """The folder is there."""
    job = state.jobs.get(report.job)
    if job is None or job.uid != report.uid:
        return state
    return state.with_job(dataclasses.replace(job, unpacked=True, unpacking=False, unpack_tries=0))


def unpack_failed(state: AgentState, report: UnpackFailed, now: float, wall: float) -> AgentState:
    """The folder will not be there: the attempt ends, or a spare machine tries again later."""
    job = state.jobs.get(report.job)
    if job is None or job.uid != report.uid:
        return state
    return state.with_job(_failed(state, job, report.message, now, hopeless=report.hopeless, wall=wall))


def forgotten(job: JobState) -> JobState:
    """The transfer process ended, and its orders with it."""
    return dataclasses.replace(job, unpacking=False)


def release(job: JobState, out: list[Action]) -> None:
    """The job leaves this machine: so does what was unpacked for it."""
    spec = job.prepare.spec if job.prepare else job.warm.spec if job.warm else None
    if spec is not None and spec.package is not None:
        out.append(TransferOrder(DropTree(tree(job.name, job.uid))))


def _failed(
    state: AgentState, job: JobState, message: str, now: float, *, hopeless: bool, wall: float
) -> JobState:
    text = f"the working directory could not be unpacked: {message}"[:MESSAGE_CHARS_MAX]
    job = dataclasses.replace(job, unpacking=False, unpack_tries=0)
    if job.phase is WorkerPhase.IDLE:
        return dataclasses.replace(job, warm_at=now + AGAIN_S, note=text)
    failure = Failure(
        FailureKind.PREPARE,
        text,
        agent=state.machine.agent,
        attempt=job.attempt,
        at=wall,
        hopeless=hopeless,
    )
    return fail(job, failure, now)
