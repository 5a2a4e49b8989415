"""Commands: who may order what, and what an accepted order sets in motion."""

import dataclasses
from typing import assert_never

from dtrain.agent.core import draining, hangs, launchers, preparing, saving, starting, warming
from dtrain.agent.core.decisions import Action, Answer, DeleteSnapshot, LauncherOrder
from dtrain.agent.core.events import CommandArrived, ShutDown
from dtrain.agent.core.saving import tell_all
from dtrain.agent.core.state import AgentState, JobState, LauncherStatus, Stopping
from dtrain.protocol.commands import (
    AbortCheckpoint,
    BeginCheckpoint,
    Command,
    ConfirmCheckpoint,
    DumpStacks,
    Prepare,
    Start,
    Stop,
    Warm,
)
from dtrain.protocol.ids import Term
from dtrain.protocol.ranklink import Outcome, StopRank
from dtrain.protocol.snapshot import CommandOutcome, WorkerPhase

COMMAND_IDS_KEPT = 1000
STOP_SLACK_S = 10.0
"""Beyond the grace: a launcher that has not ended its ranks by then is killed."""


def take(
    state: AgentState, event: CommandArrived, now: float, out: list[Action]
) -> tuple[AgentState, Answer]:
    """Take a command on, or say why not. A repeated one is accepted and changes nothing."""
    command = event.command
    head = command.header
    if head.cluster != state.machine.cluster:
        return state, Answer(False, f"this agent belongs to cluster {state.machine.cluster}")
    if head.term < state.term:
        return state, Answer(False, f"term {head.term} is over; term {state.term} has been confirmed")
    if head.term > state.term:
        if not event.confirmed:
            # A number over gRPC is no proof: anybody could end training with a large one.
            return state, Answer(False, f"term {head.term} could not be confirmed in etcd")
        state = dataclasses.replace(state, term=head.term)
    if state.refused_term:
        state = dataclasses.replace(state, refused_term=Term(0))
    if _is_namesake(state, command):
        return state, Answer(False, f"another attempt {head.attempt} has been here")
    known = head.id in state.seen.get(head.job, ())
    if known and not _is_wanted_again(state, command):
        return state, Answer(True, "known")
    refusal = _refusal(state, command)
    if refusal is not None:
        return state, refusal
    job = _apply(state, command, now, out)
    if job is None:
        return state, Answer(True, "nothing to do")
    if known:
        # That it was obeyed is told already; told again it would count as another one.
        return state.with_job(job), Answer(True)
    job = dataclasses.replace(
        job, command=CommandOutcome(head.id, type(command).__name__, True, term=head.term)
    )
    ids = (*state.seen.get(head.job, ()), head.id)[-COMMAND_IDS_KEPT:]
    state = dataclasses.replace(state.with_job(job), seen={**state.seen, head.job: ids})
    return state, Answer(True)


def shut_down(state: AgentState, event: ShutDown, now: float, out: list[Action]) -> AgentState:
    """End every rank and launcher; the jobs stay known, as IDLE."""
    why = "the agent is being stopped"
    for job in state.jobs.values():
        if job.launcher.status is LauncherStatus.GONE:
            continue
        tell_all(job, StopRank(why), out)
        out.append(LauncherOrder(job.name, job.uid, launchers.stop_order(job, True, event.grace_s)))
        release = job.stopping is not None and job.stopping.release
        state = state.with_job(
            dataclasses.replace(
                job,
                stopping=Stopping(release, why, now + event.grace_s + STOP_SLACK_S),
                launcher=dataclasses.replace(job.launcher, quitting=True),
                kill_at=None,
                note=why,
            )
        )
    return state


def _refusal(state: AgentState, command: Command) -> Answer | None:
    head, job = command.header, state.jobs.get(command.header.job)
    if isinstance(command, Stop):
        return None
    if isinstance(command, Warm):
        why = warming.refusal(state, job, command)
        return Answer(False, why) if why else None
    if isinstance(command, Prepare):
        if why := draining.refusal(
            state, job if job is not None and job.uid == head.uid else None, head.attempt
        ):
            return Answer(False, why)
        if job is None:
            if head.attempt <= state.over.get(head.uid, 0):
                return Answer(False, f"attempt {head.attempt} was released here")
            return None
        if job.uid != head.uid:
            return _older_submission(job, command)
        if head.attempt < job.attempt:
            return Answer(False, f"attempt {head.attempt} is over; attempt {job.attempt} is here")
        if job.stopping is not None and job.stopping.release:
            return Answer(False, "the job is being released here; prepare it again afterwards")
        return None
    if job is None or job.uid != head.uid:
        return Answer(False, f"job {head.job} ({head.uid}) is not prepared here")
    if head.attempt != job.attempt:
        return Answer(False, f"attempt {head.attempt} is not here; attempt {job.attempt} is")
    if isinstance(command, Start) and job.start is None and job.phase is not WorkerPhase.READY:
        return Answer(False, f"attempt {head.attempt} is {job.phase} here, not READY")
    return None


def _is_namesake(state: AgentState, command: Command) -> bool:
    """Tell whether PREPARE gives a number to another attempt: etcd has forgotten the first one."""
    job = state.jobs.get(command.header.job)
    if not isinstance(command, Prepare) or job is None or job.prepare is None:
        return False
    known = job.prepare
    if (job.uid, job.attempt) != (command.header.uid, command.header.attempt):
        return False
    return (known.node_rank, known.nnodes, known.first_rank, known.ranks_here, known.world_size) != (
        command.node_rank,
        command.nnodes,
        command.first_rank,
        command.ranks_here,
        command.world_size,
    )


def _is_wanted_again(state: AgentState, command: Command) -> bool:
    """Whether what came of an obeyed command is gone: one that was obeyed stays known for ever.

    A rank that moved without completing a step has taken its stacks with it. Standing still once more it is
    at the same step with the same deadline, which is all that the leader's order is named after.
    """
    job = state.jobs.get(command.header.job)
    return isinstance(command, DumpStacks) and job is not None and job.dump != command.header.id


def _older_submission(job: JobState, command: Prepare) -> Answer | None:
    """A late PREPARE of an earlier submission must not end the later one's ranks."""
    known = job.prepare.spec.submitted_at if job.prepare else ""
    if known and command.spec.submitted_at and command.spec.submitted_at < known:
        return Answer(False, f"job {job.name} was submitted again since")
    return None


def _apply(state: AgentState, command: Command, now: float, out: list[Action]) -> JobState | None:
    """Return the job with the command under way; None: nothing here is concerned."""
    job = state.jobs.get(command.header.job)
    match command:
        case Prepare():
            if (
                job is not None
                and (job.uid, job.attempt) == (command.header.uid, command.header.attempt)
                and not warming.awaits_prepare(job)
            ):
                # Asked again (by another leader, or of another incarnation): attempts are one-shot.
                return job
            return preparing.prepare(state.machine, job, command, now, out)
        case Stop():
            return _stop(job, command, now, out)
        case Start():
            assert job is not None
            return job if job.start is not None else starting.start(state.machine, job, command, now, out)
        case BeginCheckpoint():
            assert job is not None
            return saving.begin(job, command, out)
        case AbortCheckpoint():
            assert job is not None
            outcome = Outcome(command.seq, committed=False, final=command.final, why=command.why)
            return saving.settle(job, outcome, out)
        case ConfirmCheckpoint():
            assert job is not None
            saving.keep_manifest(job, command, out)
            return saving.settle(job, Outcome(command.seq, committed=True, final=command.final), out)
        case Warm():
            return warming.warm(job, command, out)
        case DumpStacks():
            assert job is not None
            return hangs.dump(job, command, out)
        case _:
            assert_never(command)


def _stop(job: JobState | None, command: Stop, now: float, out: list[Action]) -> JobState | None:
    head = command.header
    if job is None:
        # Released before; a snapshot that outlived its deletion goes now.
        out.append(DeleteSnapshot(head.job))
        return None
    if job.uid != head.uid or head.attempt < job.attempt:
        return None
    tell_all(job, StopRank(command.why), out)
    # A STOP that was overtaken takes nothing back: the one that releases is known, and not obeyed again.
    release = command.release or (job.stopping is not None and job.stopping.release)
    stopping = Stopping(release, command.why, now + command.grace_s + STOP_SLACK_S)
    launcher = job.launcher
    # Taking the header's attempt over refuses a PREPARE or START that this STOP overtook.
    job = dataclasses.replace(job, attempt=head.attempt)
    if launcher.status is not LauncherStatus.GONE:
        order = launchers.stop_order(job, command.release, command.grace_s)
        out.append(LauncherOrder(job.name, job.uid, order))
        launcher = dataclasses.replace(launcher, quitting=launcher.quitting or command.release)
    if command.release:
        job = saving.drop(job, out)
    return dataclasses.replace(job, stopping=stopping, launcher=launcher, kill_at=None, note="")
