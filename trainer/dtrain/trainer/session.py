"""What a rank and its agent owe each other: all decisions of the link, without its socket.

Two threads meet here: the training thread counts steps, seals and waits; the
link thread hands in messages and takes the newest report. Everything under one
lock that is held for microseconds; the training thread takes it once per step.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import (
    Begin,
    ChunkSpan,
    Have,
    Message,
    Need,
    Outcome,
    Report,
    RestoreFailed,
    RestorePlan,
    Sealed,
    StopRank,
    Welcome,
)
from dtrain.protocol.snapshot import SaveProblem, WorkerPhase

_WAIT_S = 1.0
"""Longest single wait: Python handles signals between two."""


class Session:
    """State of one rank towards its agent. ``wake`` is called when a report must leave at once."""

    def __init__(self, rank: int, wake: Callable[[], None]) -> None:
        self._rank = Rank(rank)
        self._wake = wake
        self._reset_lock()
        self._phase = WorkerPhase.RESTORING
        self._step = 0
        self._last_step: int | None = None
        self._metrics: Mapping[str, float] = {}
        self._sealed: Sealed | None = None
        self._problem: SaveProblem | None = None
        self._restore_failed: RestoreFailed | None = None
        self._wants_restore = False
        self._plan: RestorePlan | None = None
        self._need: Need | None = None
        self._asked = 0
        self._have: Have | None = None
        self._begin: Begin | None = None
        self._taking: Begin | None = None
        self._settled_seq = -1
        self._final: Outcome | None = None
        self._checkpoints: bool | None = None
        self._stop: str | None = None

    def _reset_lock(self) -> None:
        self._changed = threading.Condition()

    def after_fork(self) -> None:
        """In a forked child: the lock may have been held by a thread that is not here."""
        self._reset_lock()

    # The training thread ------------------------------------------------------

    @property
    def step(self) -> int:
        return self._step

    @property
    def stop_reason(self) -> str | None:
        """Why the rank should leave its loop, or None."""
        return self._stop

    def complete(self, step: int) -> Begin | None:
        """Count ``step`` as completed; return the order to seal a snapshot of it now, if there is one."""
        with self._changed:
            self._step = step
            begin = self._begin
            if begin is None or begin.step > step:
                return None
            if begin.step < step:
                self._refuse(begin, late=True, message=f"step {step} is completed already")
            elif self._sealed is not None or self._taking is not None:
                held = self._sealed or self._taking
                assert held is not None
                self._refuse(begin, late=False, message=f"checkpoint {held.seq} is still being saved")
            else:
                return begin
        self._wake()
        return None

    def set_metrics(self, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics

    def taking(self, begin: Begin) -> None:
        """The snapshot is copied while training goes on; ``keep`` or ``give_up`` follows, on any thread."""
        with self._changed:
            if self._begin is not None and self._begin.seq == begin.seq:
                self._begin = None
            self._taking = begin

    def keep(self, sealed: Sealed) -> None:
        """The snapshot is frozen: it stays so until its outcome is known."""
        with self._changed:
            self._end_taking(sealed.seq)
            if sealed.seq > self._settled_seq:
                self._sealed = sealed
                if self._problem is not None and self._problem.seq <= sealed.seq:
                    self._problem = None
        self._wake()

    def give_up(self, begin: Begin, message: str) -> None:
        """The snapshot could not be taken; training goes on."""
        with self._changed:
            self._end_taking(begin.seq)
            if begin.seq > self._settled_seq:
                self._refuse(begin, late=False, message=message)
        self._wake()

    def is_held(self, seq: Seq) -> bool:
        """Whether the outcome of what was sealed as ``seq`` is still to come."""
        return self._sealed is not None and self._sealed.seq == seq and self._stop is None

    def await_outcome(self, seq: Seq, at_most_s: float) -> None:
        """Stay at this step until it is known what became of checkpoint ``seq``.

        The attempt ends with that checkpoint, so a step taken meanwhile would be taken again.
        """
        deadline = time.monotonic() + at_most_s
        with self._changed:
            while self.is_held(seq) and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(min(_WAIT_S, left_s))

    def await_plan(self) -> RestorePlan | None:
        """Wait for what to restore; None if the job saves nothing or the attempt is over."""
        with self._changed:
            self._wants_restore = True
            self._wake()
            while self._plan is None and self._checkpoints is not False and self._stop is None:
                self._changed.wait(_WAIT_S)
            return self._plan

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None:
        """Wait for a plan that replaces the one with this token, for so long; None: none came."""
        deadline = time.monotonic() + at_most_s
        with self._changed:
            while self._stop is None and (left_s := deadline - time.monotonic()) > 0:
                if self._plan is not None and self._plan.token != token:
                    return self._plan
                self._changed.wait(min(_WAIT_S, left_s))
        return None

    def ask(
        self, token: str, chunks: Sequence[ChunkSpan], *, whole: bool = False, again: bool = False
    ) -> Have | None:
        """Say what this rank needs of the plan with this token, and wait for the answer.

        None: the attempt is over, or another plan has come in place of it.
        """
        with self._changed:
            self._asked += 1
            need = self._need = Need(token, self._asked, tuple(chunks), whole, again)
            self._wake()
            while self._stop is None and self._plan is not None and self._plan.token == token:
                have = self._have
                if have is not None and (have.plan, have.number) == (token, need.number):
                    return have
                self._changed.wait(_WAIT_S)
        return None

    def restored(self, step: int) -> None:
        """Every rank has its state: training begins."""
        with self._changed:
            self._wants_restore = False
            self._need = None
            self._step = step
            self._phase = WorkerPhase.TRAINING
        self._wake()

    def restore_failed(self, seq: Seq, message: str) -> None:
        with self._changed:
            self._restore_failed = RestoreFailed(seq, message)
        self._wake()

    def await_stop(self) -> None:
        """Wait to be ended: this rank cannot go on, and the whole attempt ends with it."""
        with self._changed:
            while self._stop is None:
                self._changed.wait(_WAIT_S)

    def await_end(self, step: int) -> Begin | None:
        """Announce ``step`` as the last one; return the order to seal it, or None once all is over."""
        with self._changed:
            self._last_step = step
            self._wake()
            begin = self._begin
            if begin is not None and begin.step > step:
                self._refuse(begin, late=False, message=f"training ended at step {step}")
            while self._final is None and self._checkpoints is not False and self._stop is None:
                # With the slot still held, the outcome of what is in it comes first.
                if self._begin is not None and self._sealed is None and self._taking is None:
                    return self._begin
                self._changed.wait(_WAIT_S)
            if self._stop is None:
                self._phase = WorkerPhase.DONE
        self._wake()
        return None

    # The link thread ----------------------------------------------------------

    def report(self) -> Report:
        """The rank's whole state as of now."""
        with self._changed:
            return Report(
                phase=self._phase,
                step=Step(self._step),
                last_step=None if self._last_step is None else Step(self._last_step),
                metrics=self._metrics,
                sealed=self._sealed,
                problem=self._problem,
                restore_failed=self._restore_failed,
                wants_restore=self._wants_restore,
                need=self._need,
            )

    def handle(self, message: Message) -> None:
        """Take in one message; repeated ones change nothing."""
        with self._changed:
            if isinstance(message, Welcome):
                self._checkpoints = message.checkpoints
            elif isinstance(message, RestorePlan):
                # What lay behind the plan before ended with the process that held it.
                before = self._plan
                replaces = before is None or before.on_demand or message.on_demand
                self._plan = message if replaces else before
            elif isinstance(message, Have):
                self._have = message
            elif isinstance(message, Begin):
                self._on_begin(message)
            elif isinstance(message, Outcome):
                self._on_outcome(message)
            elif isinstance(message, StopRank):
                self._stop = message.why or "the attempt is over"
            self._changed.notify_all()

    def _on_begin(self, begin: Begin) -> None:
        if (
            begin.seq <= self._settled_seq
            or (self._begin is not None and self._begin.seq == begin.seq)
            or (self._taking is not None and self._taking.seq == begin.seq)
            or (self._sealed is not None and self._sealed.seq == begin.seq)
            or (self._problem is not None and self._problem.seq == begin.seq)
        ):
            return  # said again: the report has the answer already
        # Whether the slot is free counts when the step is reached: the outcome of the
        # checkpoint before may have been overtaken by this order.
        if self._last_step is None and begin.step <= self._step:
            self._refuse(begin, late=True, message=f"step {self._step} is completed already")
        elif self._last_step is not None and begin.step != self._last_step:
            late = begin.step < self._last_step
            self._refuse(begin, late=late, message=f"training ended at step {self._last_step}")
        else:
            self._begin = begin

    def _on_outcome(self, outcome: Outcome) -> None:
        self._settled_seq = max(self._settled_seq, outcome.seq)
        if self._sealed is not None and self._sealed.seq <= outcome.seq:
            self._sealed = None
        if self._begin is not None and self._begin.seq <= outcome.seq:
            self._begin = None
        if self._problem is not None and self._problem.seq <= outcome.seq:
            self._problem = None
        if outcome.final:
            self._final = outcome

    def _end_taking(self, seq: Seq) -> None:
        if self._taking is not None and self._taking.seq == seq:
            self._taking = None
        if self._begin is not None and self._begin.seq <= seq:
            self._begin = None
        self._changed.notify_all()

    def _refuse(self, begin: Begin, *, late: bool, message: str) -> None:
        self._begin = None
        self._problem = SaveProblem(begin.seq, self._rank, late=late, step=Step(self._step), message=message)
