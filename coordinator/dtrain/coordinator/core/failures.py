"""Why an attempt ended, what it costs, and when the next one may begin."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dtrain.coordinator.core.draft import Draft
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.events import EventReason
from dtrain.protocol.job import EXIT_CODE_DO_NOT_RETRY
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase, WorkerSnapshot

_CAUSES_FIRST = list(FailureKind)

FREE = frozenset({FailureKind.UNKILLABLE, FailureKind.ISOLATED})
"""What agents report that is nobody's fault: it costs no restart."""

BACKOFF_FREE = 2
"""Fruitless attempts that are followed by another one at once."""

BACKOFF_S_MAX = 30.0

ALSO_MAX = 8
ALSO_CHARS_MAX = 200

FAILURE_TEXT_MAX = 500
"""Characters of a failure's message that go into a reason sentence."""


@dataclass(frozen=True, slots=True)
class Ending:
    """An attempt is over. ``charge``: it counts against the restart budget, unless a rule says otherwise.

    ``do_not_retry``: a rank exited with 93 and meant it. ``others`` failed with it, mostly because of it.
    """

    failure: Failure
    charge: bool
    do_not_retry: bool = False
    others: tuple[Failure, ...] = ()


def reported(snapshots: Iterable[WorkerSnapshot]) -> list[Failure]:
    """Failures that agents report, each with its agent and attempt."""
    found = []
    for snapshot in snapshots:
        if snapshot.failure is None and snapshot.phase is not WorkerPhase.ERROR:
            continue
        failure = snapshot.failure
        if failure is None:
            failure = Failure(
                FailureKind.EXIT, "a rank failed and its agent does not know why", at=snapshot.at
            )
        found.append(replace(failure, agent=failure.agent or snapshot.agent, attempt=snapshot.attempt))
    return found


def root_cause(failures: Iterable[Failure]) -> Failure:
    """The likeliest cause: by kind, causes before consequences, then by time, then by rank."""
    return min(
        failures,
        key=lambda failure: (
            _CAUSES_FIRST.index(failure.kind),
            failure.at,
            -1 if failure.rank is None else failure.rank,
            failure.agent,
        ),
    )


def folded(others: Iterable[Failure]) -> tuple[str, ...]:
    """Secondary failures in a sentence each, those of the cause's kind of story first; bounded."""
    ordered = sorted(others, key=lambda one: (_CAUSES_FIRST.index(one.kind), one.at, one.agent))
    told = [sentence(one)[:ALSO_CHARS_MAX] for one in ordered]
    more = len(told) - ALSO_MAX
    return (*told[:ALSO_MAX], *((f"{more} more",) if more > 0 else ()))


def wants_no_retry(snapshots: Iterable[WorkerSnapshot]) -> bool:
    """Whether any rank ended with the exit code that forbids another try."""
    return any(
        (snapshot.failure is not None and snapshot.failure.exit_code == EXIT_CODE_DO_NOT_RETRY)
        or any(rank.exit_code == EXIT_CODE_DO_NOT_RETRY for rank in snapshot.ranks)
        for snapshot in snapshots
    )


def sentence(failure: Failure) -> str:
    """What happened, for people: one line."""
    who = f"rank {failure.rank}" if failure.rank is not None else ""
    if failure.agent:
        who = f"{who} on {failure.agent}" if who else failure.agent
    text = " ".join(failure.message.split())[:FAILURE_TEXT_MAX]
    return f"{who}: {text}" if who else text


def event_of(failure: Failure) -> tuple[EventReason, str]:
    """Reason and object of the event that records ``failure``."""
    about = f"agent/{failure.agent}" if failure.rank is None else f"rank/{failure.rank}"
    if failure.hopeless:
        return EventReason.PACKAGE_UNUSABLE, about
    match failure.kind:
        case FailureKind.SIGNAL:
            return EventReason.RANK_SIGNALED, about
        case FailureKind.AGENT_LOST | FailureKind.ISOLATED:
            return EventReason.AGENT_LOST, about
        case FailureKind.UNKILLABLE:
            return EventReason.PROCESS_UNKILLABLE, about
        case FailureKind.UNREACHABLE | FailureKind.PREPARE:
            return EventReason.PREPARE_TIMEOUT, about
        case FailureKind.HANG:
            return EventReason.HANG_FOUND, about
        case FailureKind.NONFINITE:
            return EventReason.NON_FINITE, about
        case _:
            return EventReason.RANK_EXITED, about


def newest_commit(draft: Draft) -> CommitRecord | None:
    """The newest checkpoint that counts as progress: what training was rolled back past does not."""
    passed = draft.status.passed_over
    known = [*(commit.value for commit in draft.commits()), *draft.committed]
    return max((commit for commit in known if commit.seq not in passed), key=lambda c: c.seq, default=None)


def within_window(draft: Draft) -> tuple[float, ...]:
    """Restarts that still count; a commit of the attempt gives all of them back.

    Not if training is to go back past it: it would go that way for ever.
    """
    newest = newest_commit(draft)
    cause = draft.status.failure
    rolled = draft.status.charge and cause is not None and cause.kind is FailureKind.NONFINITE
    if newest is not None and newest.attempt == draft.status.attempt and not rolled:
        return ()
    horizon = draft.moment.wall - draft.spec.restarts.window_s
    return tuple(at for at in draft.status.restarts if at > horizon)


def was_fruitless(draft: Draft) -> bool:
    """Whether the attempt in the status got no further than where it began."""
    status = draft.status
    if any(commit.value.attempt == status.attempt for commit in draft.commits()):
        return False
    start = 0 if status.restore is None else status.restore.step
    snapshots = [stored.value for stored in draft.job.workers.values()] + list(draft.job.departed.values())
    return not any(
        rank.step > start
        for snapshot in snapshots
        if (snapshot.uid, snapshot.attempt) == (status.uid, status.attempt)
        for rank in snapshot.ranks
    )


def backoff_s(fruitless: int) -> float:
    """Pause before the next attempt after so many fruitless ones: 0, 0, then 1, 2, 4 to 30 s."""
    if fruitless <= BACKOFF_FREE:
        return 0.0
    return min(BACKOFF_S_MAX, 2.0 ** min(fruitless - BACKOFF_FREE - 1, 10))
