"""``Run``: what a training script holds while it trains."""

import atexit
import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from dtrain.protocol import ranklink
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import Seq
from dtrain.protocol.ranklink import Begin, RestorePlan, Sealed
from dtrain.trainer import process_group, timing
from dtrain.trainer.checkpoint import plain, rng, state
from dtrain.trainer.checkpoint import restore as restoring
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.checkpoint.source import DemandSource, PlanSource
from dtrain.trainer.link import EXIT_ATTEMPT_OVER, AgentLink, connect_from_env
from dtrain.trainer.session import Session
from dtrain.trainer.stateful import check_loader

if TYPE_CHECKING:
    from dtrain.trainer.dcp.reader import Reader
    from dtrain.trainer.dcp.writer import Writer

Wait = Literal["snapshotted", "durable", "committed"]

log = logging.getLogger("dtrain.trainer")

METRICS_MAX = 64
SECTION_CHARS_MAX = 64
_NO_ARENA = "this rank has no memory for snapshots (DTRAIN_ARENA_FD)"
_CLOSE_S = 2.0


def join(backend: str | None = None) -> "Run":
    """Join the job: process group up, device chosen, agent connected.

    Started by hand, without torchrun or an agent, the run is its own only rank
    and everything about checkpoints does nothing.

    Args:
        backend: of ``torch.distributed.init_process_group``, called if there are several
            ranks, or under an agent, and nobody did before. None: gloo, with nccl where CUDA is.
    """
    rank, world_size, local_rank = process_group.world()
    return Run(rank, world_size, local_rank, connect_from_env(rank, local_rank), backend)


class Run:
    """One rank's part in a job. Not thread-safe: use it from the training thread."""

    def __init__(
        self, rank: int, world_size: int, local_rank: int, link: AgentLink | None, backend: str | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self._link = link
        self._session = link.session if link is not None else None
        self._backend = backend
        self._device: Any = None
        self._owns_group = False
        self._tracked: dict[str, Any] = {}
        self._saver: Saver | None = None
        self._arena: Arena | None = None
        self._arena_lock = threading.Lock()
        """Held while a snapshot is copied: a save that is over may still be copying when the next begins."""
        self._through_dcp = False
        self._step = 0
        self._restored = False
        self._prepared = False
        self._due: Begin | None = None
        self._metrics: dict[str, float] = {}
        self._nonfinite: dict[str, None] = {}
        self._watch = timing.Stopwatch()
        self._closed = False
        self._pid = os.getpid()
        if world_size > 1 or (link is not None and "torch" in sys.modules):
            self._set_up()
        atexit.register(self.close)

    @property
    def device(self) -> Any:
        """The torch device of this rank."""
        if self._device is None:
            self._set_up()
        return self._device

    @property
    def step(self) -> int:
        """Steps completed."""
        return self._step

    def track(self, **objects: Any) -> None:
        """Save and restore these with every checkpoint; call it before ``steps`` or ``restore``.

        Modules (also wrapped in DDP), optimizers, schedulers and anything else
        with ``state_dict`` and ``load_state_dict``; tensors; dicts and lists of JSON
        values that are changed in place; generators of numpy, torch and ``random``.
        The process's own random numbers need no mention.

        Raises:
            Refused: STATE_NOT_SAVABLE; an object of none of these kinds.
                USAGE; the state was restored already.
        """
        if self._restored:
            raise Refused(ErrorCode.USAGE, "track() comes before steps() and restore()")
        if self._through_dcp:
            raise _mixed()
        for name, thing in objects.items():
            check_loader(name, thing)
            found = rng.adopt(name, thing, self.rank, self.world_size)
            state.check_trackable(name, found)
            self._tracked[f"{name}/{self.rank}" if plain.is_per_rank(found) else name] = found

    def steps(self, total: int) -> Iterator[int]:
        """Restore, then yield the index of each step still to do, and see the job to its end.

        The body of the loop is one step; leaving it by ``break`` or an exception
        ends neither training nor the job: call ``finish`` to end early. When the
        attempt is over the process exits with status 75 instead of going on
        behind the loop, where a script expects trained weights.
        """
        if self._session is not None:
            self._session.steps_total = total
        self.restore()
        while self._step < total:
            self._leave_if_stopped()
            step = self._step
            self._watch.begin()
            yield step
            self._watch.end()
            # Not from ``_step`` again: a save in the body has counted this step already.
            self._complete(step + 1)
        self.finish()

    def starts_at(self) -> int:
        """Return the steps completed in the checkpoint that this attempt starts from, 0 without one.

        Before anything is restored: for frameworks that must know where they go on before they have
        made what is tracked. Waits until the agent knows.
        """
        if self._session is None or self._restored:
            return self._step
        plan = self._session.await_plan()
        self._leave_if_stopped()
        return 0 if plan is None or plan.seq is None else int(plan.step)

    def restore(self) -> int:
        """Load the checkpoint this attempt starts from, once; return the steps completed in it.

        Waits until every rank has its state. If this rank cannot load, it says so
        and waits to be ended, as all ranks then go back to another checkpoint.
        """
        if self._restored:
            return self._step
        if self._session is not None:
            self._restore_from_agent()
            self._session.restored(self._step)
            self._measure(self._session)
        self._restored = True
        return self._step

    def should_checkpoint(self, step: int) -> bool:
        """Count ``step`` steps as completed; True if a snapshot is wanted of exactly this one.

        For loops of one's own; ``steps`` does this by itself. Answer True with ``save(step)``
        before the state changes.
        """
        self._step = step
        self._watch.end()
        self._due = self._session.complete(step) if self._session is not None else None
        self._watch.begin()
        return self._due is not None

    def save(self, step: int, wait: Wait | None = None) -> int | None:
        """Take a snapshot of the state after ``step`` steps; all ranks call it for the same step.

        After ``should_checkpoint(step)`` was true, without ``wait``, it answers that: it returns
        None, and a failure is reported, not raised. Otherwise the script itself asks for a
        checkpoint, and the number of it is returned

        * ``"snapshotted"``: as soon as the state is copied; what becomes of it is among the job's events,
        * ``"durable"``: once this rank's part is in the store,
        * ``"committed"`` (the default): once the checkpoint exists.

        It waits for the other ranks, and for an earlier checkpoint that is still being saved,
        as long as one checkpoint may take at most. In the body of ``steps`` it is
        ``save(step)`` before the step is done, ``save(step + 1)`` after.

        Raises:
            Refused: CHECKPOINT_ABORTED; it was aborted, with the reason, or the job has no
                store. Training may go on.
                STATE_NOT_SAVABLE; the state has a part that cannot be saved.
                USAGE; there is no job, or the step is behind.
            TimedOut: WAIT_TIMED_OUT; it may still be committed.
        """
        begin = self._due
        if begin is not None and begin.step == step and wait is None:
            self._due = None
            with self._watch.span("aside"):
                self._seal(begin)
            return None
        if wait not in (None, "snapshotted", "durable", "committed"):
            raise Refused(ErrorCode.USAGE, f"wait is {wait!r}, not snapshotted, durable or committed")
        if self._through_dcp:
            raise _mixed()
        with self._watch.span("aside"):
            return self._save_asked(step, wait)

    def dcp_writer(self, step: int, wait: Literal["snapshotted", "committed"] = "committed") -> "Writer":
        """The ``storage_writer`` of one ``dcp.save`` or ``dcp.async_save``: it makes a checkpoint of dtrain.

        ``step``: steps completed in the state that is given to it. ``wait``: when ``dcp.save``
        returns, or the future of ``async_save`` is done; as in ``save``.

        Raises:
            Refused: USAGE; there is no job, the step is behind, or state is tracked as well.
        """
        from dtrain.trainer.dcp.writer import Writer

        if self._tracked:
            raise _mixed()
        session = self._begin_save(step)
        self._through_dcp = True
        return Writer(
            session,
            rank=self.rank,
            world_size=self.world_size,
            step=step,
            wait=wait,
            lock_arena=self._lock_arena,
        )

    def dcp_reader(self) -> "Reader":
        """The ``storage_reader`` for ``dcp.load``: the checkpoint that this attempt starts from, verified.

        Load before ``steps`` or ``restore``, which let go of what was fetched. ``exists`` is
        false where there is none yet.

        Raises:
            Refused: USAGE; there is no job, or it comes too late.
        """
        from dtrain.trainer.dcp.reader import Reader

        if self._session is None:
            raise _no_job("nothing can be loaded")
        if self._restored:
            raise Refused(ErrorCode.USAGE, "dcp_reader() comes before steps(), restore() and saves")
        if not self._tracked:
            self._through_dcp = True
        session = self._session
        plan = session.await_plan()
        self._leave_if_stopped()
        if plan is None or plan.seq is None:
            return Reader(None, 0)
        seq = Seq(plan.seq)

        def failed(why: str) -> None:
            session.restore_failed(seq, why)

        if not plan.on_demand:
            return Reader(PlanSource(plan), plan.step, on_failure=failed)
        source = DemandSource(plan, session)
        return Reader(source, plan.step, good=source.is_still_good, on_failure=failed)

    def finish(self) -> None:
        """Announce that training has ended here, and wait for its last checkpoint.

        Returns once the coordinator has settled it, committed or not; at once if
        there is no agent or the job keeps no checkpoints.
        """
        if self._session is None:
            return
        if self._through_dcp:
            # What is saved, the script has saved; a checkpoint of nothing must not become the newest.
            self._leave_if_stopped()
            return
        while True:
            begin = self._session.await_end(self._step)
            if begin is None:
                break
            self._seal(begin, behind=False)
        self._leave_if_stopped()

    def report(self, **metrics: float) -> None:
        """Show numbers beside the progress; the newest of each name wins.

        What is NaN or infinite is told by its name. If the job file's ``nonfinite.metrics`` has it, the
        state that it was computed from is no checkpoint, nor is any later one until it is finite again.
        """
        bad: dict[str, None] = {}
        for name, value in metrics.items():
            number = float(value)
            if math.isfinite(number):
                self._metrics[name] = number
            else:
                # JSON has no NaN.
                self._metrics.pop(name, None)
                bad[name] = None
        if self._session is not None:
            if bad or self._nonfinite:
                self._nonfinite = {name: None for name in self._nonfinite if name not in metrics} | bad
                self._session.set_nonfinite(bad, tuple(self._nonfinite)[:METRICS_MAX])
            if len(self._metrics) > METRICS_MAX:
                for name in list(self._metrics)[: len(self._metrics) - METRICS_MAX]:
                    del self._metrics[name]
            # A copy: the link thread reads it whenever it likes.
            self._session.set_metrics(dict(self._metrics))

    def should_stop(self) -> bool:
        """True once the attempt is over and the loop should be left."""
        return self._session is not None and self._session.stop_reason is not None

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name what happens inside, such as ``evaluate``: it does not count as time of the step.

        No step is expected until it is over. ``data`` is waiting for data: it counts as that part of the
        step, which has to go on.
        """
        session = self._session
        if session is None:
            yield
            return
        if name == "data":
            with self._watch.span("data"):
                yield
            return
        before, session.section = session.section, name[:SECTION_CHARS_MAX] or "section"
        try:
            with self._watch.span("aside"):
                yield
        finally:
            session.section = before

    def close(self) -> None:
        """Send the last report and take down what ``join`` set up; repeated calls do nothing."""
        if self._closed or self._pid != os.getpid():
            return  # a forked worker leaves to the rank what is the rank's
        self._closed = True
        timing.remove()
        atexit.unregister(self.close)
        if self._saver is not None:
            # A GPU that failed must not keep the last report from leaving.
            with contextlib.suppress(Exception):
                self._saver.close()
        if self._link is not None:
            self._link.close(_CLOSE_S)
        if self._owns_group:
            process_group.tear_down()

    def _set_up(self) -> None:
        self._device, self._owns_group = process_group.set_up(self._backend, self.world_size, self.local_rank)

    def _measure(self, session: Session) -> None:
        """Have the times of steps measured and reported."""
        device = getattr(self._device, "type", "")
        if device == "cuda":
            self._watch.use_gpu()
        timing.install(self._watch, world_size=self.world_size)
        session.timing = self._watch.timing
        session.beats = lambda: self._watch.beats

    def _complete(self, step: int) -> None:
        self._step = step
        if self._session is None:
            return
        begin = self._session.complete(step)
        if not self._prepared and not self._through_dcp:
            # After the first step, as optimizers have no state before it.
            self._prepare()
        elif self._saver is not None:
            self._saver.join()
        if begin is not None:
            self._seal(begin)

    def _restore_from_agent(self) -> None:
        assert self._session is not None
        plan = self._session.await_plan()
        self._leave_if_stopped()
        if plan is not None and plan.seq is not None:
            try:
                self._load(plan)
            except DtrainError as error:
                self._leave_if_stopped()
                log.error("%s", error)
                self._session.restore_failed(Seq(plan.seq), str(error))
                self._session.await_stop()
                self._leave_if_stopped()
            self._step = plan.step
        session = self._session
        process_group.meet(self.world_size, lambda: session.stop_reason is not None)
        self._leave_if_stopped()

    def _load(self, plan: RestorePlan) -> None:
        assert self._session is not None
        source = DemandSource(plan, self._session) if plan.on_demand else PlanSource(plan)
        restoring.load(source, self._tracked, self.rank, self.world_size)

    def _prepare(self) -> None:
        self._prepared = True
        try:
            saver = self._make_saver()
            if saver is not None:
                saver.prepare()
        except Exception as error:  # noqa: BLE001
            # Training goes on; each checkpoint that is asked for will say the same.
            log.warning("this state cannot be saved: %s", error)

    def _seal(self, begin: Begin, *, behind: bool = True) -> None:
        """Take the snapshot; ``behind``: its bytes may be copied while training goes on."""
        session = self._session
        assert session is not None
        began = time.perf_counter()
        try:
            if self._through_dcp:
                raise _mixed()
            saver = self._make_saver()
            if saver is None:
                raise Refused(ErrorCode.STATE_NOT_SAVABLE, _NO_ARENA)
            # Where the rank stays at this step anyway there is nothing to copy behind.
            if not (behind and begin.hold_s == 0 and self._seal_behind(saver, begin)):
                with self._arena_lock:
                    session.keep(saver.seal(begin))
        except Exception as error:  # noqa: BLE001
            # A failed save never stops training, whatever a state_dict of the script raised.
            log.warning("no snapshot at step %d: %s", begin.step, error)
            session.give_up(begin, _sentence(error))
            return
        self._metrics["checkpoint_stall_s"] = time.perf_counter() - began
        self._watch.beats += 1
        session.set_metrics(dict(self._metrics))
        if begin.hold_s > 0:
            session.await_outcome(begin.seq, begin.hold_s)
        if behind:
            # Else training has ended, and the leader itself sees how long ranks wait.
            session.held_s += time.perf_counter() - began

    def _seal_behind(self, saver: Saver, begin: Begin) -> bool:
        session = self._session
        assert session is not None

        def done(sealed: Sealed, error: Exception | None) -> None:
            # Not before: a snapshot that is announced may be uploaded at once, and outlive this process.
            if error is None:
                session.keep(sealed)
            else:
                log.warning("no snapshot at step %d: %s", begin.step, error)
                session.give_up(begin, _sentence(error))

        return saver.seal_behind(begin, done, lambda: session.taking(begin))

    def _save_asked(self, step: int, wait: Wait | None) -> int:
        session = self._begin_save(step)
        self._due = None
        began = time.perf_counter()
        try:
            return self._hand_over(session, step, wait)
        finally:
            session.held_s += time.perf_counter() - began

    def _hand_over(self, session: Session, step: int, wait: Wait | None) -> int:
        ask, begin = session.ask_save(step)
        try:
            session.keep(self._snapshot(begin))
        except Exception as error:
            session.give_up(begin, _sentence(error))
            if isinstance(error, DtrainError):
                raise
            message = f"no snapshot at step {step}: {_sentence(error)}"
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, message) from error
        if wait != "snapshotted":
            session.await_answer(ask, durable=wait == "durable")
        return begin.seq

    def _begin_save(self, step: int) -> Session:
        """Check that the script may save this step, and count it."""
        if self._session is None:
            raise _no_job(f"no checkpoint is wanted at step {step}")
        if step < self._step:
            raise Refused(ErrorCode.USAGE, f"step {step} is behind: {self._step} steps are completed")
        self.restore()
        self._step = step
        # A snapshot that is due here of itself gives way to the one that the script asks for.
        self._session.complete(step)
        return self._session

    def _snapshot(self, begin: Begin) -> Sealed:
        began = time.perf_counter()
        saver = self._make_saver()
        if saver is None:
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, _NO_ARENA)
        with self._arena_lock:
            sealed = saver.seal(begin)
        self._metrics["checkpoint_stall_s"] = time.perf_counter() - began
        assert self._session is not None
        self._session.set_metrics(dict(self._metrics))
        return sealed

    @contextlib.contextmanager
    def _lock_arena(self) -> Iterator[Arena]:
        arena = self._open_arena()
        if arena is None:
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, _NO_ARENA)
        with self._arena_lock:
            yield arena

    def _open_arena(self) -> Arena | None:
        fd = os.environ.get(ranklink.ENV_ARENA_FD)
        if self._arena is None and fd:
            self._arena = Arena(int(fd))
        return self._arena

    def _make_saver(self) -> Saver | None:
        if self._saver is None:
            arena = self._open_arena()
            if arena is None:
                return None
            self._saver = Saver(self._tracked, self.rank, self.world_size, arena, self._device)
        return self._saver

    def _leave_if_stopped(self) -> None:
        if self.should_stop():
            assert self._session is not None
            sys.stderr.write(f"dtrain: {self._session.stop_reason}; the rank leaves at step {self._step}\n")
            raise SystemExit(EXIT_ATTEMPT_OVER)


def _sentence(error: Exception) -> str:
    return (error.message if isinstance(error, DtrainError) else f"{type(error).__name__}: {error}")[:500]


def _no_job(what: str) -> Refused:
    return Refused(
        ErrorCode.USAGE,
        f"{what}: this script was not started by dtrain",
        fix="start it with `dtrain run` or `dtrain submit`",
    )


def _mixed() -> Refused:
    return Refused(
        ErrorCode.USAGE,
        "a script either tracks state or saves it through torch.distributed.checkpoint, at its own steps",
        fix="one checkpoint holds everything: put what is tracked into the state given to dcp.save, "
        "and set every_steps and every_seconds to 0",
    )
