"""Where a job's time goes: how the ledger in its status is carried on.

``advance`` is called for a status that is written anyway and causes no write. It divides what has passed
since the last one by what is known now, so that the sum is right by construction and only the division is an
estimate: to within a report of the ranks' progress, and coarser where no leader was there to see it.

Productive time is kept as a function of the step: ``marks`` has some of its points. An attempt that
begins from step R takes back what was productive beyond it, whenever that was and whoever led.

Clocks: the ledger's own time never goes back. A leader whose wall clock is behind it, or was set while it
led, counts on from the ledger with its monotonic clock. So clocks that differ shift the ledger's time by
their greatest difference, once; changing leaders does not add it up.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace

from dtrain.coordinator.core.stamps import parse_iso
from dtrain.coordinator.core.views import Pace
from dtrain.protocol.ids import Step
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.ledger import (
    BETWEEN,
    CHECKPOINT,
    DETECTION,
    HANG,
    LOST_WORK,
    PAUSED,
    PREPARE,
    PRODUCTIVE,
    QUEUED,
    RENDEZVOUS,
    RESTORE,
    STOPPING,
    SUSPENDED,
    WAITING,
    WARM_UP,
    Ledger,
    Mark,
)
from dtrain.protocol.snapshot import Failure, FailureKind

MARKS_MAX = 12
"""Beyond that the second oldest goes: between two marks, steps count as equally long."""

SET_MS = 60_000
"""A wall clock that differs by more from the monotonic one was set, whatever delays a write may have had."""

_NO_PACE = Pace()

_MISSED = frozenset({FailureKind.AGENT_LOST, FailureKind.ISOLATED, FailureKind.UNREACHABLE})
"""Failures that the leader concludes from silence."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is known of a job at the moment of a write, beside its status."""

    now: float
    wall: float
    seen_at: float = 0.0
    """When this leader first saw the status that is replaced."""
    submitted_at: str = ""
    pace: Pace = _NO_PACE
    committed: tuple[Step, ...] = ()
    """Steps of the checkpoints that this write commits."""
    good_step: Step = Step(0)
    """Step of the newest checkpoint that an attempt may begin from, those included; 0: there is none."""
    ended_well: bool = False
    """The attempt's last checkpoint was committed before this write."""
    lacks_machines: bool = False
    """The next attempt waits for nothing but machines."""
    own: bool = False
    """The status that is replaced is of this very leader's term."""


def advance(before: JobStatus | None, after: JobStatus, turn: Turn) -> Ledger | None:
    """Return the ledger that goes with ``after``, which replaces ``before``; what is over stays as it is."""
    if before is not None and before.uid != after.uid:
        before = None
    if before is not None and before.phase in TERMINAL_PHASES:
        # A leader of a release without ledgers, which ended the job, has left it open.
        return None if before.ledger is None else replace(before.ledger, doing="")
    book = _Book(before, turn)
    if before is not None and before.ledger is not None:
        if turn.pace.of != (before.uid, before.attempt):
            book.pace = _NO_PACE
        book.pass_time(before, after)
    book.keep(turn.committed)
    if before is not None:
        book.end_attempt(before, after)
    return book.close(after)


def is_paused(status: JobStatus) -> bool:
    """All ranks of the job are held at a step because somebody wants it."""
    return bool(status.held) and status.phase is JobPhase.RUNNING


class _Book:
    """A ledger while it is being carried on. Times are milliseconds, ``ago`` counts back from now."""

    def __init__(self, before: JobStatus | None, turn: Turn) -> None:
        wall_ms = round(turn.wall * 1000)
        old = None if before is None else before.ledger
        if old is None:
            # Of a job that an older release began nothing is known before now.
            submitted = parse_iso(turn.submitted_at) if before is None else None
            began_ms = wall_ms if submitted is None else min(wall_ms, round(submitted * 1000))
            old = Ledger(began_ms, began_ms)
        self.turn = turn
        self.pace = turn.pace
        self.began_ms = old.began_ms
        if before is None:
            self.until_ms = wall_ms
        else:
            ahead_ms = wall_ms - old.until_ms
            elapsed_ms = max(0, round((turn.now - turn.seen_at) * 1000))
            # What this leader itself has written, it knows the age of: then its clock was set.
            is_set = turn.own and abs(ahead_ms - elapsed_ms) > SET_MS
            self.until_ms = old.until_ms + (elapsed_ms if ahead_ms < 0 or is_set else ahead_ms)
        self.passed_ms = self.until_ms - old.until_ms
        self.spent = dict(old.spent)
        self.saved_ms = old.saved_ms
        self.attempt = old.attempt
        self.held_ms = old.held_ms
        # The last mark is the newest step, those before it are ways back.
        self.ways = list(old.marks[:-1])
        self.newest = old.marks[-1] if old.marks else Mark(Step(0), 0)
        self.between: tuple[Mark, ...] = ()
        """Points that are good for this write only."""
        if before is None:
            self.add(QUEUED, self.passed_ms)

    # Passing time -------------------------------------------------------------------

    def pass_time(self, before: JobStatus, after: JobStatus) -> None:
        """Divide the time since the last write."""
        assert before.ledger is not None
        failure = after.failure if after.failure != before.failure else None
        if failure is not None and failure.attempt != before.attempt:
            failure = None
        if before.phase is JobPhase.STARTING:
            self._start_up(failure)
        elif is_paused(before) and self.pace.step <= self.newest.step:
            self.add(PAUSED, self.passed_ms)
            # Ranks tell of it as of any checkpoint that has held them, once they go on.
            self.held_ms += self.passed_ms
        elif before.phase is JobPhase.RUNNING or (
            before.phase is JobPhase.SUSPENDING and not before.stopping
        ):
            self._train(before, failure)
        else:
            self.add(before.ledger.doing or BETWEEN, self.passed_ms)

    def _start_up(self, failure: Failure | None) -> None:
        ready = self.passed_ms - self._ago(self.pace.ready_at, 0)
        joined = max(ready, self.passed_ms - self._ago(self.pace.joined_at, 0))
        parts = [(PREPARE, ready), (RENDEZVOUS, joined - ready), (RESTORE, self.passed_ms - joined)]
        noticed = self._noticed(failure)
        for category, ms in reversed(parts):
            late = min(ms, noticed)
            noticed -= late
            self.add(DETECTION, late)
            self.add(category, ms - late)

    def _train(self, before: JobStatus, failure: Failure | None) -> None:
        pace, passed = self.pace, self.passed_ms
        begins_at = 0 if before.restore is None else before.restore.step
        last_ms = 0 if self.turn.ended_well else self._ago(pace.ended_at, 0)
        warm_ms = 0
        if pace.counts and self.newest.step <= begins_at:
            warm_ms = passed - last_ms
            if pace.step > begins_at:
                made_ms = round(pace.first_steps * pace.step_ms)
                # A leader that found it at work does not know since when.
                warm_ms = max(0, min(warm_ms, passed - self._ago(pace.first_at, passed) - made_ms))
        training_ms = passed - last_ms - warm_ms
        held_before = self.held_ms if self.attempt == before.attempt else 0
        held_ms = min(training_ms, max(0, pace.held_ms - held_before))
        self.attempt, self.held_ms = before.attempt, max(held_before, pace.held_ms)
        self.add(CHECKPOINT, last_ms + held_ms)
        self.add(PRODUCTIVE, training_ms - held_ms)
        self.add(WARM_UP, warm_ms)
        self._step_on(max(0, self._ago(pace.step_at, 0) - last_ms))
        if failure is None:
            return
        if pace.counts and pace.step > begins_at:
            self.move(PRODUCTIVE, *self._after_last_step(failure, begins_at))
        elif failure.kind is FailureKind.HANG:
            self.move(WARM_UP, HANG, warm_ms)
        else:
            self.move(WARM_UP if pace.counts else PRODUCTIVE, DETECTION, self._noticed(failure))

    def _step_on(self, ago_ms: int) -> None:
        """Note the newest step, completed so long ago."""
        if self.pace.step > self.newest.step:
            productive = self.spent.get(PRODUCTIVE, 0)
            self.between = (self.newest,)
            self.newest = Mark(Step(self.pace.step), max(self.newest.ms, productive - ago_ms))

    def _after_last_step(self, failure: Failure, begins_at: Step | int) -> tuple[str, int]:
        """What the time since the newest step was, that ended with ``failure``."""
        since_ms = self._since_newest()
        if failure.kind is FailureKind.HANG:
            return HANG, since_ms
        if failure.kind not in _MISSED:
            age_ms = self._age(failure)
            if age_ms > since_ms:
                since_ms += self._seen_late(age_ms - since_ms)
            return DETECTION, min(since_ms, age_ms)
        # Nobody saw it happen; ranks were at work on one more step at most.
        step_ms = self.pace.step_ms or (self.newest.ms - self._at(Step(begins_at))) / (
            self.newest.step - begins_at
        )
        return DETECTION, max(0, since_ms - round(step_ms))

    def _seen_late(self, most_ms: int) -> int:
        """Date the newest step back, as it was completed before a failure that is older; return by how much.

        So it is when nobody led while the attempt failed: who came back saw the step and the failure at once.
        """
        way = next((mark for mark in reversed(self.ways) if mark.step < self.newest.step), Mark(Step(0), 0))
        step_ms = self.pace.step_ms or way.ms / max(1, way.step)
        # The clock of the machine that failed may be wrong: steps took what steps take.
        least_ms = max(self.saved_ms, way.ms + round((self.newest.step - way.step) * step_ms))
        late_ms = max(0, min(most_ms, self.newest.ms - least_ms))
        self.newest = Mark(self.newest.step, self.newest.ms - late_ms)
        return late_ms

    def _noticed(self, failure: Failure | None) -> int:
        """How long ago an agent saw the failure; at most since the last write."""
        return 0 if failure is None else min(self.passed_ms, self._age(failure))

    def _age(self, failure: Failure) -> int:
        """How long ago an agent saw the failure, by its clock and ours; 0: no agent did."""
        return max(0, round((self.turn.wall - failure.at) * 1000)) if failure.at else 0

    def _ago(self, at: float | None, unknown_ms: int) -> int:
        if at is None:
            return unknown_ms
        return max(0, min(self.passed_ms, round((self.turn.now - at) * 1000)))

    # Productive time as a function of the step --------------------------------------

    def _at(self, step: Step) -> int:
        """Productive milliseconds when ``step`` was completed."""
        productive = self.spent.get(PRODUCTIVE, 0)
        if step > self.newest.step:
            return productive
        points = [Mark(Step(0), 0), *sorted({*self.ways, *self.between, self.newest}, key=_by_step)]
        place = bisect_left([mark.step for mark in points], step)
        after = points[place]
        if after.step == step or place == 0:
            return min(productive, after.ms)
        before = points[place - 1]
        share = (step - before.step) / (after.step - before.step)
        return min(productive, before.ms + round(share * (after.ms - before.ms)))

    def _since_newest(self) -> int:
        """Time that counts as productive since the newest step was completed."""
        return max(0, self.spent.get(PRODUCTIVE, 0) - self.newest.ms)

    def keep(self, steps: tuple[Step, ...]) -> None:
        """Checkpoints of these steps are committed: they are ways back."""
        for step in steps:
            ms = self._at(step)
            self.ways = [*(mark for mark in self.ways if mark.step != step), Mark(step, ms)]
            if step > self.newest.step:
                self.newest = Mark(step, ms)
            self.saved_ms = max(self.saved_ms, ms)
        self.ways.sort(key=_by_step)

    # The end of an attempt ----------------------------------------------------------

    def end_attempt(self, before: JobStatus, after: JobStatus) -> None:
        """Take back what was not kept, if that is known now."""
        began = after.attempt > before.attempt
        stops = after.stopping and not before.stopping
        planned = after.failure == before.failure and before.phase in PLACED_PHASES
        if planned and (began or stops) and self.turn.good_step == self.newest.step:
            # All ranks held at the checkpoint that the attempt was ended with.
            self.move(PRODUCTIVE, CHECKPOINT, self._since_newest())
        elif is_paused(after) and not is_paused(before):
            self.held_ms += self._since_newest()
            self.move(PRODUCTIVE, CHECKPOINT, self._since_newest())
        if after.phase is JobPhase.SUCCEEDED:
            self.saved_ms = self.spent.get(PRODUCTIVE, 0)
        elif began:
            self._go_back_to(Step(0) if after.restore is None else after.restore.step)
        elif after.phase in TERMINAL_PHASES or (
            after.phase in (JobPhase.QUEUED, JobPhase.SUSPENDED) and before.phase is JobPhase.SUSPENDING
        ):
            self._go_back_to(self.turn.good_step)

    def _go_back_to(self, step: Step) -> None:
        ms = self._at(step)
        self.move(PRODUCTIVE, LOST_WORK, self.spent.get(PRODUCTIVE, 0) - ms)
        self.saved_ms = ms
        self.ways = [mark for mark in self.ways if mark.step < step]
        self.newest = Mark(step, ms)
        if step > 0:
            self.ways.append(self.newest)

    # Writing ------------------------------------------------------------------------

    def add(self, category: str, ms: int) -> None:
        """Count time that has passed."""
        if ms:
            self.spent[category] = self.spent.get(category, 0) + ms

    def move(self, source: str, target: str, ms: int) -> None:
        """Count time otherwise than before."""
        ms = max(0, min(ms, self.spent.get(source, 0)))
        self.add(source, -ms)
        self.add(target, ms)

    def close(self, after: JobStatus) -> Ledger:
        """Return the ledger as it is to be written."""
        if self.attempt != after.attempt:
            self.attempt, self.held_ms = after.attempt, 0
        while len(self.ways) >= MARKS_MAX:
            del self.ways[1]
        return Ledger(
            self.began_ms,
            self.until_ms,
            self._doing(after),
            {name: ms for name, ms in sorted(self.spent.items()) if ms},
            self.saved_ms,
            self.attempt,
            self.held_ms,
            (*self.ways, self.newest),
        )

    def _doing(self, after: JobStatus) -> str:
        if is_paused(after):
            return PAUSED
        match after.phase:
            case JobPhase.QUEUED:
                return QUEUED
            case JobPhase.SUSPENDED:
                return SUSPENDED
            case JobPhase.STARTING:
                return self._stage_of_start(after)
            case JobPhase.RUNNING:
                return self._training(after)
            case JobPhase.SUSPENDING:
                return STOPPING if after.stopping else self._training(after)
            case JobPhase.CANCELLING:
                return STOPPING
            case JobPhase.RECOVERING:
                return WAITING if self.turn.lacks_machines else BETWEEN
            case JobPhase.SUCCEEDED | JobPhase.FAILED | JobPhase.CANCELLED:
                return ""

    def _stage_of_start(self, after: JobStatus) -> str:
        pace = self._pace_of(after)
        if pace.joined_at is not None:
            return RESTORE
        return PREPARE if pace.ready_at is None else RENDEZVOUS

    def _training(self, after: JobStatus) -> str:
        pace = self._pace_of(after)
        if pace.ended_at is not None and not self.turn.ended_well:
            return CHECKPOINT
        begins_at = 0 if after.restore is None else after.restore.step
        return WARM_UP if pace.counts and self.newest.step <= begins_at else PRODUCTIVE

    def _pace_of(self, status: JobStatus) -> Pace:
        pace = self.turn.pace
        return pace if pace.of == (status.uid, status.attempt) else _NO_PACE


def _by_step(mark: Mark) -> tuple[int, int]:
    return mark.step, mark.ms
