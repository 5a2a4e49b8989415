"""One sentence or line on a job, for lists and for those who follow it. Pure."""

from collections.abc import Sequence

from dtrain.cli.records import Job
from dtrain.cli.render.failures import failure_title
from dtrain.cli.render.table import UNKNOWN
from dtrain.protocol.job import JobPhase

RANKS_SHOWN = 4


def reason(job: Job) -> str:
    """The leader's sentence on a job."""
    if job.status is None:
        return "waiting for a leader to look at it"
    return "; ".join([job.status.reason, *of_steps(job), *of_ranks(job)])


def of_steps(job: Job) -> list[str]:
    """Ranks that stand still for longer than they may, and what those do that were found at work."""
    if job.phase is not JobPhase.RUNNING:
        return []
    workers = job.current_workers.values()
    stalls = sorted((stall.rank, stall.step) for one in workers for stall in one.stalls)
    moving = sorted((stack.rank, stack.where) for one in workers for stack in one.stacks if stack.moving)
    texts = []
    if stalls:
        step = min(step for _, step in stalls)
        texts.append(f"{_rank_names([rank for rank, _ in stalls])} completed no step after step {step}")
    texts += [f"rank {rank} is at work" + (f" in {where}" if where else "") for rank, where in moving[:1]]
    return texts


def of_ranks(job: Job) -> list[str]:
    """What is said of its ranks while it trains: slow ones, numbers that are not finite."""
    conditions = job.status.conditions if job.status else ()
    return [
        one.message for one in conditions if one.type in ("NonFinite", "Straggling") and one.status == "True"
    ]


def restarts(job: Job, now: float) -> str:
    """Restarts that count against the budget, and the budget."""
    if job.spec is None:
        return UNKNOWN
    start = now - job.spec.restarts.window_s
    used = sum(1 for at in (job.status.restarts if job.status else ()) if at >= start)
    return f"{used}/{job.spec.restarts.max_restarts}"


def headline(job: Job) -> str:
    """One sentence: how the job is, and why."""
    sentence = f"{job.name} is {job.phase}: {reason(job)}"
    failure = job.status.failure if job.status else None
    if failure is None:
        return sentence
    cause = failure_title(failure)
    # The leader's own sentence mostly has it already.
    if job.finished or " ".join(failure.message.split()) in sentence:
        return sentence
    return f"{sentence}; attempt {failure.attempt} had ended because of {cause}"


def job_change(job: Job) -> str:
    """One line for someone who follows a job."""
    parts = [job.name, str(job.phase)]
    if job.attempt:
        parts.append(f"attempt {job.attempt}")
    return "  ".join([*parts, reason(job)])


class Changes:
    """What to tell someone who follows a job: each change once, a failed attempt with its cause."""

    def __init__(self) -> None:
        self._told = ""
        self._failed = 0

    def lines(self, job: Job) -> list[str]:
        """Lines for this state of the job, [] if it says nothing new."""
        lines = []
        failure = job.status.failure if job.status else None
        if failure is not None and failure.attempt > self._failed:
            self._failed = failure.attempt
            lines.append(f"{job.name}  attempt {failure.attempt} failed: {failure_title(failure)}")
        line = job_change(job)
        if line != self._told:
            self._told = line
            lines.append(line)
        return lines


def _rank_names(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN]))
    more = f" and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}{more}"
