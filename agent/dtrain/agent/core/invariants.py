"""What must hold of an agent's state after every step."""

from dtrain.agent.core.state import AgentState, JobState, LauncherStatus
from dtrain.protocol.errors import ErrorCode, InvariantBroken
from dtrain.protocol.snapshot import WorkerPhase


def check(state: AgentState) -> None:
    """Raise at the first claim that does not hold.

    Raises:
        InvariantBroken: BUG; names the job and the claim.
    """
    for name, job in state.jobs.items():
        for claim, holds in _claims(job):
            if not holds:
                raise InvariantBroken(ErrorCode.BUG, f"job {name}: {claim}")
        if name != job.name:
            raise InvariantBroken(ErrorCode.BUG, f"job {name} is filed under another name")
    connections = [rank.connection for job in state.jobs.values() for rank in job.ranks if rank.connection]
    if len(connections) != len(set(connections)):
        raise InvariantBroken(ErrorCode.BUG, "two ranks share a connection")


def _claims(job: JobState) -> list[tuple[str, bool]]:
    seqs = {saving.seq for saving in job.saving}
    running = job.phase in (WorkerPhase.RESTORING, WorkerPhase.TRAINING, WorkerPhase.DONE)
    return [
        ("an ERROR carries its failure", job.phase is not WorkerPhase.ERROR or job.failure is not None),
        ("a running phase has a START", not running or job.start is not None),
        ("ranks exist only after START", not job.ranks or job.start is not None),
        (
            "READY means that nothing older is alive",
            job.phase is not WorkerPhase.READY or (job.cleared and not job.leftovers and not job.departing),
        ),
        (
            # Not that it is warm: an adopted one has not told its state yet.
            "READY means that there is a launcher",
            job.phase is not WorkerPhase.READY or job.launcher.status is not LauncherStatus.GONE,
        ),
        (
            "DONE means that every rank exited with 0",
            job.phase is not WorkerPhase.DONE or all(rank.exit_code == 0 for rank in job.ranks),
        ),
        ("a durable part belongs to a checkpoint in flight", {part.seq for part in job.durable} <= seqs),
        ("a problem belongs to a checkpoint in flight", {one.seq for one in job.problems} <= seqs),
        ("a settled checkpoint is not in flight", not seqs & {one.seq for one in job.outcomes}),
        (
            "a durable part is of the current attempt, unless the job is being stopped",
            job.stopping is not None
            or job.phase is WorkerPhase.IDLE
            or all(part.attempt == job.attempt for part in job.durable),
        ),
    ]
