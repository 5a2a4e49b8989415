"""What a rank and its agent owe each other: all decisions of the link, without its socket.

Two threads meet here: the training thread counts steps, seals and waits; the
link thread hands in messages and takes the newest report. Everything under one
lock that is held for microseconds; the training thread takes it once per step.

A script may also save a step of its own choice (``ask_save``), from any thread: the
state of that step is at hand, wherever training is by then.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.protocol.errors import ErrorCode, Refused, TimedOut
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import (
    Begin,
    ChunkSpan,
    Durable,
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
from dtrain.protocol.snapshot import SaveProblem, Timing, WorkerPhase
from dtrain.trainer.numbers import Unfit

_WAIT_S = 1.0
"""Longest single wait: Python handles signals between two."""

ANSWER_SLACK_S = 15.0
"""Beyond the time that a checkpoint may take: for a leader that has just changed to say how it ended."""

_INTENDED_MAX = 16


@dataclass(slots=True)
class Ask:
    """One save that the script asked for, from ``Session.ask_save`` to its outcome."""

    step: int
    seq: Seq | None = None
    """The checkpoint that is taken because of it."""
    answer: Outcome | None = None
    wants_durable: bool = False
    durable: bool = False


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
        self._unfit = Unfit()
        self._finite: tuple[str, ...] = ()
        self.section = ""
        self.held_s = 0.0
        """How long checkpoints have held the training thread, which alone writes it."""
        """What the script says it is doing."""
        self.steps_total = 0
        """As many steps as it means to take; 0: it has not said."""
        self.beats: Callable[[], int] = lambda: 0
        self.timing: Callable[[], Timing | None] = lambda: None
        """Both are asked on the link thread, for each report."""
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
        self._save_timeout_s = 0.0
        self._intended: list[int] = []
        self._ask: Ask | None = None
        self._collective = ""
        self._wanted: Begin | None = None
        """The order for a checkpoint that scripts ask for, this one or another rank's."""

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
            self._unfit.complete(step)
            if self._wanted is not None and self._wanted.step < step and not self._will_save(self._wanted):
                self._refuse(
                    self._wanted, late=True, message=f"its script did not save step {self._wanted.step}"
                )
                self._wake()
            begin = self._begin
            if begin is None or begin.step > step:
                return None
            if begin.step < step:
                self._refuse(begin, late=True, message=f"step {step} is completed already")
            elif self._sealed is not None or self._taking is not None:
                held = self._sealed or self._taking
                assert held is not None
                self._refuse(begin, late=False, message=f"checkpoint {held.seq} is still being saved")
            elif not self._is_unfit(begin, step):
                return begin
        self._wake()
        return None

    def set_metrics(self, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics

    def set_nonfinite(self, names: Collection[str], now: tuple[str, ...]) -> None:
        """``names`` were reported as NaN or infinite, in the step that is under way; ``now`` all that are.

        A snapshot of the state that they were computed from is withdrawn.
        """
        with self._changed:
            new = self._unfit.report(names, now, self._step)
            sealed = self._sealed
            if sealed is not None and sealed.step == self._step and self._refuse_unfit(sealed):
                new = True
        if new:
            self._wake()

    def set_collective(self, text: str) -> None:
        """The newest collective, of torch's flight recorder; the link thread looks for it."""
        self._collective = text

    def taking(self, begin: Begin) -> None:
        """The snapshot is copied while training goes on; ``keep`` or ``give_up`` follows, on any thread."""
        with self._changed:
            if self._begin is not None and self._begin.seq == begin.seq:
                self._begin = None
            self._taking = begin

    def keep(self, sealed: Sealed) -> None:
        """The snapshot is frozen: it stays so until its outcome is known."""
        with self._changed:
            if self._wanted is not None and self._wanted.seq == sealed.seq:
                self._wanted = None
            self._end_taking(sealed.seq)
            # Whoever has made it: a copy of a state that numbers speak against is never handed on.
            if sealed.seq > self._settled_seq and not self._refuse_unfit(sealed):
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
        self,
        token: str,
        chunks: Sequence[ChunkSpan],
        *,
        whole: bool = False,
        again: bool = False,
        unverified: bool = False,
    ) -> Have | None:
        """Say what this rank needs of the plan with this token, and wait for the answer.

        None: the attempt is over, or another plan has come in place of it.
        """
        with self._changed:
            self._asked += 1
            need = self._need = Need(token, self._asked, tuple(chunks), whole, again, unverified)
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
            if self._wanted is not None and not self._will_save(self._wanted):
                self._refuse(self._wanted, late=True, message=f"training ended at step {step}")
            while self._final is None and self._checkpoints is not False and self._stop is None:
                # With the slot still held, the outcome of what is in it comes first.
                begin = self._begin
                if begin is not None and self._sealed is None and self._taking is None:
                    if not self._is_unfit(begin, step):
                        return begin
                    self._wake()
                self._changed.wait(_WAIT_S)
            if self._stop is None:
                self._phase = WorkerPhase.DONE
        self._wake()
        return None

    # A save that the script asks for -------------------------------------------

    def intend(self, step: int) -> None:
        """Say that ``ask_save(step)`` will come, however far training is by then."""
        with self._changed:
            self._intended = [*self._intended[1 - _INTENDED_MAX :], step]

    def ask_save(self, step: int) -> tuple[Ask, Begin]:
        """Ask for a checkpoint of ``step``; return the order to seal it, once the slot is free.

        Answer the order with ``keep`` or ``give_up``; ``await_answer`` tells what became of it.

        Raises:
            Refused: CHECKPOINT_ABORTED; not all ranks asked for this step, or there is no store.
            TimedOut: WAIT_TIMED_OUT; no leader answered in the time that a checkpoint may take.
        """
        with self._changed:
            self._check_can_ask(step)
            deadline = time.monotonic() + self._save_timeout_s + ANSWER_SLACK_S
            while self._ask is not None:
                self._wait_until(deadline, f"step {self._ask.step} is still being saved")
            ask = self.request(step)
            try:
                while (begin := self.granted(ask)) is None:
                    self._wait_until(deadline, f"no coordinator opened a checkpoint of step {step}")
            except BaseException:
                # Also Ctrl-C: the other ranks must not wait for a save that nobody is in any more.
                self.withdraw(ask)
                raise
            return ask, begin

    def request(self, step: int) -> Ask:
        """The first half of ``ask_save``, which does not wait."""
        with self._changed:
            ask = self._ask = Ask(step)
            if step in self._intended:
                self._intended.remove(step)
            if self._wanted is not None:
                self._on_asked(self._wanted)
        self._wake()
        return ask

    def granted(self, ask: Ask) -> Begin | None:
        """The order to seal what was asked for; None: not yet.

        Raises:
            Refused: CHECKPOINT_ABORTED; there will be none.
        """
        with self._changed:
            _raise_aborted(ask)
            begin = self._wanted
            # With the slot still held, the outcome of what is in it comes first.
            busy = self._sealed is not None or self._taking is not None
            return begin if begin is not None and begin.seq == ask.seq and not busy else None

    def withdraw(self, ask: Ask) -> None:
        """Ask no more; an order that has come is refused."""
        with self._changed:
            if self._ask is ask:
                self._ask = None
                if self._wanted is not None and self._wanted.seq == ask.seq:
                    self._refuse(self._wanted, late=True, message=f"its script gave step {ask.step} up")
        self._wake()

    def await_answer(self, ask: Ask, *, durable: bool) -> None:
        """Wait until what was sealed is committed; with ``durable`` only until it is in the store.

        Raises:
            Refused: CHECKPOINT_ABORTED; with the reason. Training may go on.
            TimedOut: WAIT_TIMED_OUT; it may still be committed.
        """
        deadline = time.monotonic() + self._save_timeout_s + ANSWER_SLACK_S
        with self._changed:
            if durable:
                ask.wants_durable = True
                self._wake()
            while ask.answer is None and not (durable and ask.durable):
                self._wait_until(deadline, f"the outcome of checkpoint {ask.seq} is not known")
            _raise_aborted(ask)

    def _check_can_ask(self, step: int) -> None:
        while self._checkpoints is None:
            self._check_running()
            self._changed.wait(_WAIT_S)
        if not self._checkpoints:
            raise Refused(
                ErrorCode.CHECKPOINT_ABORTED,
                f"step {step} cannot be saved: the job has no checkpoint store",
                fix="set checkpoint.store in the job file, or a default store for the cluster",
            )
        if self._save_timeout_s <= 0:
            raise Refused(
                ErrorCode.CHECKPOINT_ABORTED,
                f"step {step} cannot be saved: this machine's agent is of an older release",
                fix="upgrade agents and coordinators to this release",
            )
        if self._last_step is not None:
            raise Refused(ErrorCode.USAGE, f"training has ended at step {self._last_step}")

    def _wait_until(self, deadline: float, what: str) -> None:
        self._check_running()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimedOut(
                ErrorCode.WAIT_TIMED_OUT, f"{what} within {self._save_timeout_s + ANSWER_SLACK_S:g} s"
            )
        self._changed.wait(min(_WAIT_S, left_s))

    def _check_running(self) -> None:
        if self._stop is not None:
            raise Refused(ErrorCode.CHECKPOINT_ABORTED, f"the attempt is over: {self._stop}")

    def _will_save(self, begin: Begin) -> bool:
        return (self._ask is not None and self._ask.step == begin.step) or begin.step in self._intended

    def _on_asked(self, begin: Begin) -> None:
        if self._ask is not None:
            # Its outcome is the answer to what this rank asked for, whether or not it has a part in it.
            self._ask.seq = begin.seq
            if self._ask.step == begin.step:
                self._wanted = begin
            else:
                self._refuse(begin, late=True, message=f"its script saves step {self._ask.step}")
        elif self._last_step is not None:
            self._refuse(begin, late=True, message=f"training ended at step {self._last_step}")
        elif begin.step < self._step and not self._will_save(begin):
            self._refuse(begin, late=True, message=f"its script did not save step {begin.step}")
        else:
            self._wanted = begin  # its script may still come to it

    # The link thread ----------------------------------------------------------

    def report(self) -> Report:
        """The rank's whole state as of now."""
        with self._changed:
            ask = self._ask
            return Report(
                phase=self._phase,
                step=Step(self._step),
                last_step=None if self._last_step is None else Step(self._last_step),
                metrics=self._metrics,
                sealed=self._sealed,
                problem=self._problem,
                restore_failed=self._restore_failed,
                wants_restore=self._wants_restore,
                save_at=None if ask is None else Step(ask.step),
                settled=Seq(0 if ask is None else max(0, self._settled_seq)),
                wants_durable=None if ask is None or not ask.wants_durable else ask.seq,
                need=self._need,
                timing=self.timing(),
                nonfinite=self._unfit.names,
                nonfinite_seen={name: Step(step) for name, step in self._unfit.seen.items()},
                section=self.section,
                beats=self.beats(),
                collective=self._collective,
                steps_total=Step(self.steps_total),
                held_s=round(self.held_s, 3),
            )

    def handle(self, message: Message) -> None:
        """Take in one message; repeated ones change nothing."""
        with self._changed:
            if isinstance(message, Welcome):
                self._checkpoints = message.checkpoints
                self._save_timeout_s = message.save_timeout_s
                self._finite = message.finite
            elif isinstance(message, RestorePlan):
                # What lay behind the plan before ended with the process that held it.
                before = self._plan
                replaces = before is None or before.on_demand or message.on_demand
                self._plan = message if replaces else before
            elif isinstance(message, Have):
                self._have = message
            elif isinstance(message, Begin):
                if self._is_answered(message):
                    pass
                elif message.asked:
                    self._on_asked(message)
                else:
                    self._on_begin(message)
            elif isinstance(message, Durable):
                if self._ask is not None and self._ask.seq == message.seq:
                    self._ask.durable = True
            elif isinstance(message, Outcome):
                self._on_outcome(message)
            elif isinstance(message, StopRank):
                self._stop = message.why or "the attempt is over"
            self._changed.notify_all()

    def _on_begin(self, begin: Begin) -> None:
        # Whether the slot is free counts when the step is reached: the outcome of the
        # checkpoint before may have been overtaken by this order.
        if self._last_step is None and begin.step <= self._step:
            self._refuse(begin, late=True, message=f"step {self._step} is completed already")
        elif self._last_step is not None and begin.step != self._last_step:
            late = begin.step < self._last_step
            self._refuse(begin, late=late, message=f"training ended at step {self._last_step}")
        else:
            self._begin = begin

    def _is_answered(self, begin: Begin) -> bool:
        """Whether it is said again: the report has the answer already."""
        return (
            begin.seq <= self._settled_seq
            or (self._begin is not None and self._begin.seq == begin.seq)
            or (self._wanted is not None and self._wanted.seq == begin.seq)
            or (self._taking is not None and self._taking.seq == begin.seq)
            or (self._sealed is not None and self._sealed.seq == begin.seq)
            or (self._problem is not None and self._problem.seq == begin.seq)
        )

    def _on_outcome(self, outcome: Outcome) -> None:
        self._settled_seq = max(self._settled_seq, outcome.seq)
        if self._sealed is not None and self._sealed.seq <= outcome.seq:
            self._sealed = None
        if self._begin is not None and self._begin.seq <= outcome.seq:
            self._begin = None
        if self._problem is not None and self._problem.seq <= outcome.seq:
            self._problem = None
        if self._wanted is not None and self._wanted.seq <= outcome.seq:
            self._wanted = None
        if self._ask is not None:
            ask = self._ask
            if ask.seq is not None and ask.seq <= outcome.seq:
                # That of a later one says of this only that it is over.
                lost = Outcome(ask.seq, committed=False, final=False)
                ask.answer = outcome if ask.seq == outcome.seq else lost
                self._ask = None
            self._wake()  # what was said before an outcome counts no more
        if outcome.final:
            self._final = outcome

    def _end_taking(self, seq: Seq) -> None:
        if self._taking is not None and self._taking.seq == seq:
            self._taking = None
        if self._begin is not None and self._begin.seq <= seq:
            self._begin = None
        self._changed.notify_all()

    def _is_unfit(self, begin: Begin, step: int) -> bool:
        """Whether numbers speak against the state at ``step``: ``begin`` is refused, and nothing copied."""
        why = self._unfit.against(step, self._finite)
        if why:
            self._refuse(begin, late=False, message=why)
            self._tell_unfit()
        return bool(why)

    def _refuse_unfit(self, sealed: Sealed) -> bool:
        why = self._unfit.against(sealed.step, self._finite)
        if why:
            self._problem = SaveProblem(sealed.seq, self._rank, late=False, step=sealed.step, message=why)
            self._tell_unfit()
        return bool(why)

    def _tell_unfit(self) -> None:
        assert self._problem is not None
        self._problem = replace(self._problem, unfit=True)

    def _refuse(self, begin: Begin, *, late: bool, message: str) -> None:
        if begin.asked:
            self._wanted = None
        else:
            self._begin = None
        self._problem = SaveProblem(begin.seq, self._rank, late=late, step=Step(self._step), message=message)


def _raise_aborted(ask: Ask) -> None:
    answer = ask.answer
    if answer is not None and not answer.committed:
        raise Refused(
            ErrorCode.CHECKPOINT_ABORTED,
            f"checkpoint {answer.seq} of step {ask.step} is aborted: "
            + (answer.why or "its reason is among the job's events"),
        )
