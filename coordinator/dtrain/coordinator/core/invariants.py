"""What must hold in every state of a job; checked after each step of tests and simulation."""

from dtrain.coordinator.core.views import JobView
from dtrain.protocol.checkpoint import CommitRecord, OpenRecord
from dtrain.protocol.ids import Attempt
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.ledger import faults


def check(job: JobView) -> list[str]:
    """Return a sentence for each invariant that the records of ``job`` break."""
    broken: list[str] = []
    if job.status is None:
        if job.open:
            broken.append("there are open checkpoints but no status")
        return broken
    status = job.status.value
    broken += _members(status)
    broken += _numbers(job, status)
    broken += _checkpoints(job, status)
    broken += _conditions(status)
    if status.ledger is not None:
        broken += [f"ledger: {text}" for text in faults(status.ledger)]
        if (status.phase in TERMINAL_PHASES) != (not status.ledger.doing):
            broken.append(f"{status.phase} and its time counts as {status.ledger.doing!r}")
    return broken


def _members(status: JobStatus) -> list[str]:
    broken = []
    if status.phase in PLACED_PHASES and not status.members:
        broken.append(f"{status.phase} without members")
    if status.phase in PLACED_PHASES and status.attempt < 1:
        broken.append(f"{status.phase} in attempt {status.attempt}")
    if status.phase not in PLACED_PHASES and status.phase not in TERMINAL_PHASES and status.members:
        broken.append(f"{status.phase} with {len(status.members)} members")
    first = 0
    for index, member in enumerate(status.members):
        if member.node_rank != index or member.first_rank != first:
            broken.append(f"member {index} has node rank {member.node_rank}, first rank {member.first_rank}")
        first += member.nproc
    agents = [member.agent for member in status.members]
    if len(agents) != len(set(agents)):
        broken.append("an agent is a member twice")
    if (status.phase in TERMINAL_PHASES) != bool(status.finished_at):
        broken.append(f"{status.phase} with finished_at {status.finished_at!r}")
    return broken


def _numbers(job: JobView, status: JobStatus) -> list[str]:
    broken = []
    records: list[CommitRecord | OpenRecord] = [c.value for c in job.commits if c.value.uid == status.uid]
    records += [o.value for o in job.open if o.value.uid == status.uid]
    for record in records:
        if record.seq > status.seq_last:
            broken.append(f"checkpoint {record.seq} is newer than seq_last {status.seq_last}")
        # Of no attempt is only what was imported before the first one.
        ranks = isinstance(record, OpenRecord) and not record.imported
        if not Attempt(1 if ranks else 0) <= record.attempt <= status.attempt:
            broken.append(f"checkpoint {record.seq} is of attempt {record.attempt}, now is {status.attempt}")
    if job.events and job.events[-1] > status.event_last:
        broken.append(f"event {job.events[-1]} is newer than event_last {status.event_last}")
    return broken


def _checkpoints(job: JobView, status: JobStatus) -> list[str]:
    broken = []
    commits = {c.value.seq: c.value for c in job.commits if c.value.uid == status.uid}
    opened = [o.value for o in job.open if o.value.uid == status.uid]
    if len(opened) > 1:
        broken.append(f"{len(opened)} checkpoints are open at once")
    for record in opened:
        if record.seq in commits:
            broken.append(f"checkpoint {record.seq} is open and committed")
        if status.phase in TERMINAL_PHASES or status.phase is JobPhase.SUSPENDED:
            broken.append(f"checkpoint {record.seq} is open although the job is {status.phase}")
        elif record.attempt != status.attempt:
            broken.append(f"checkpoint {record.seq} of attempt {record.attempt} was not settled")
    if job.spec is not None and job.spec.value.uid != status.uid and status.phase in TERMINAL_PHASES:
        return broken  # a new submission has taken the name: what is left is being cleared away
    if commits and job.latest is None:
        broken.append("there are commits but no latest")
    if job.latest is not None:
        latest = job.latest.value
        if latest.seq not in commits and status.seq_last >= latest.seq:
            broken.append(f"latest points at checkpoint {latest.seq}, which is not there")
        if commits and max(commits) > latest.seq:
            broken.append(f"latest {latest.seq} is behind commit {max(commits)}")
    broken += [
        f"checkpoint {stored.value.seq} is committed and garbage"
        for stored in job.garbage
        if stored.value.seq in commits
    ]
    if status.held and (status.held not in commits or commits[status.held].attempt != status.attempt):
        broken.append(f"ranks are held at checkpoint {status.held}, which is not there")
    if status.held and status.phase is not JobPhase.RUNNING:
        broken.append(f"ranks are held although the job is {status.phase}")
    restore = status.restore
    if status.phase in PLACED_PHASES and restore is not None and restore.seq not in commits:
        broken.append(f"checkpoint {restore.seq} is restored from but not there")
    return broken


def _conditions(status: JobStatus) -> list[str]:
    finished = [condition for condition in status.conditions if condition.type == "Finished"]
    if finished and (finished[0].status == "True") != (status.phase in TERMINAL_PHASES):
        return [f"condition Finished is {finished[0].status} in phase {status.phase}"]
    return []
