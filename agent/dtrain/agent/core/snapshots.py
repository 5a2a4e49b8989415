"""The job's snapshot as other processes see it, a function of the state."""

import dataclasses

from dtrain.agent.core import hangs, moving
from dtrain.agent.core.health import stuck
from dtrain.agent.core.state import AgentState, JobState
from dtrain.agent.core.warming import is_warm
from dtrain.protocol.ids import Seq, Step
from dtrain.protocol.snapshot import WorkerPhase, WorkerSnapshot

WARNING_CHARS_MAX = 300


def snapshot_of(state: AgentState, job: JobState) -> WorkerSnapshot:
    """Return what is to be published of a job; ``at`` is filled in when it is written."""
    return WorkerSnapshot(
        agent=state.machine.agent,
        uid=job.uid,
        incarnation=state.incarnation,
        attempt=job.attempt,
        phase=job.phase,
        ranks=tuple(rank.facts() for rank in job.ranks if rank.process is not None),
        command=job.command,
        saving=tuple(saving.seq for saving in job.saving),
        seq_over=job.seq_over,
        durable=job.durable,
        problems=job.problems,
        failure=job.failure,
        bad=job.bad,
        rendezvous=job.rendezvous,
        restored=bool(job.ranks) and all(rank.restored for rank in job.ranks),
        note=job.note,
        stuck=stuck(job),
        stalls=hangs.stalls(state, job),
        stacks=job.stacks,
        dumps=job.dumps,
        dumped_at=job.dumped_at,
        warm=is_warm(job),
        warning=job.launcher.warning[:WARNING_CHARS_MAX],
        transfers=moving.transfers(job),
    )


def is_progress(before: WorkerSnapshot | None, after: WorkerSnapshot) -> bool:
    """Only steps, numbers and bytes moved: the snapshot need not be written at once.

    The first time that a number is not finite is told at once, what follows now and then.
    """
    return before is not None and _structure(before) == _structure(after)


def group_phase(job: JobState) -> WorkerPhase:
    """Return the phase of the least advanced local rank; ERROR stays."""
    if job.phase not in (WorkerPhase.RESTORING, WorkerPhase.TRAINING) or not job.ranks:
        return job.phase
    # A rank that is told to end may well exit with 0: that is not the end of training.
    if job.stopping is None and all(rank.exit_code == 0 for rank in job.ranks):
        return WorkerPhase.DONE
    if all(rank.restored for rank in job.ranks):
        return WorkerPhase.TRAINING
    return WorkerPhase.RESTORING


def _structure(snapshot: WorkerSnapshot) -> WorkerSnapshot:
    ranks = tuple(
        dataclasses.replace(
            rank,
            # The very first one: until it is told there seems to be nothing that a pause could lose.
            step=Step(min(rank.step, 1)),
            metrics={},
            sealed=Seq(0),
            timing=None,
            held_s=0.0,
            nonfinite=(),
            nonfinite_seen=dict.fromkeys(rank.nonfinite_seen, Step(0)),
        )
        for rank in snapshot.ranks
    )
    return dataclasses.replace(snapshot, ranks=ranks, transfers=())
