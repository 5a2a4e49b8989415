"""One sentence or line on a job, for lists and for those who follow it. Pure."""

from dtrain.cli.records import Job
from dtrain.cli.render.failures import failure_title


def job_change(job: Job) -> str:
    """One line for someone who follows a job."""
    parts = [job.name, str(job.phase)]
    if job.attempt:
        parts.append(f"attempt {job.attempt}")
    return "  ".join([*parts, job.reason])


class Turns:
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
