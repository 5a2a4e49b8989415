"""What ``wait`` can wait for, as questions to a job's records. Pure but for ``until``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from dtrain.cli import exits, reading
from dtrain.cli.client import Client
from dtrain.cli.live import Live
from dtrain.cli.records import Job
from dtrain.protocol.errors import ErrorCode, Refused, TimedOut
from dtrain.protocol.job import JobPhase

POLL_S = 0.5
"""Progress is in the agents' snapshots, and a wait covers the job's own records only."""


class Answer(Enum):
    """Has it happened?"""

    YES = "yes"
    NOT_YET = "not yet"
    NEVER = "never"
    """The job has ended without it."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Something to wait for: ``finished``, ``running``, ``checkpoint`` or ``step`` with a number."""

    what: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.what}={self.number}" if self.what in ("checkpoint", "step") else self.what

    def answer(self, job: Job) -> Answer:
        """Ask the records; numbers mean 'at least'."""
        match self.what:
            case "finished":
                return Answer.YES if job.finished else Answer.NOT_YET
            case "running":
                happened = job.phase is JobPhase.RUNNING
            case "checkpoint":
                happened = job.latest is not None and job.latest.seq >= self.number
            case _:
                happened = job.step >= self.number
        if happened:
            return Answer.YES
        return Answer.NEVER if job.finished else Answer.NOT_YET


def parse(text: str) -> Goal:
    """Read ``finished``, ``running``, ``checkpoint=SEQ`` or ``step=N``.

    Raises:
        Refused: it is none of these.
    """
    what, equals, number = text.strip().lower().partition("=")
    if what in ("finished", "running") and not equals:
        return Goal(what)
    if what in ("checkpoint", "step") and number.isdecimal():
        return Goal(what, int(number))
    raise Refused(
        ErrorCode.USAGE,
        f"cannot wait for {text!r}",
        fix="use --for finished, running, checkpoint=SEQ or step=N; numbers mean 'at least'",
    )


def until(
    client: Client, name: str, done: Callable[[Job], bool], *, what: str, timeout_s: float | None
) -> Job:
    """Return the job as soon as ``done`` says so of its records; meanwhile show what its checkpoints do.

    Raises:
        TimedOut: not within ``timeout_s`` (None: no limit).
        NotFound: the job does not exist.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    revision, wait_s = 0, 0.0
    with Live() as live:
        while True:
            job, revision = reading.one(client, name, after_revision=revision, wait_s=wait_s)
            if done(job):
                return job
            live.show(job.row(time.time()).moving)
            wait_s = POLL_S
            if deadline is not None:
                wait_s = min(wait_s, deadline - time.monotonic())
                if wait_s <= 0:
                    raise TimedOut(
                        ErrorCode.WAIT_TIMED_OUT,
                        f"job {name} is {job.phase}: {what} did not happen within {timeout_s:g} s",
                        cause=job.status.reason if job.status else "no leader has looked at the job yet",
                        fix=f"wait longer, or look: dtrain describe job {name}",
                    )
            wait_s = max(wait_s, 0.001)


def exit_code(goal: Goal, job: Job) -> int:
    """Exit code once ``goal`` has its answer: the job's own for ``finished``, and where it ended before."""
    if goal.what == "finished":
        return job.exit_code
    if goal.answer(job) is Answer.YES:
        return exits.OK
    return job.exit_code or exits.CONFLICT
