"""``Run``: what a training script holds while it trains."""

import atexit
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from dtrain.protocol import ranklink
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import Seq
from dtrain.protocol.ranklink import Begin, RestorePlan
from dtrain.trainer import process_group
from dtrain.trainer.checkpoint import plain, rng, state
from dtrain.trainer.checkpoint import restore as restoring
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.checkpoint.source import DemandSource, PlanSource
from dtrain.trainer.link import EXIT_ATTEMPT_OVER, AgentLink, connect_from_env
from dtrain.trainer.stateful import check_loader

log = logging.getLogger("dtrain.trainer")

METRICS_MAX = 64
_CLOSE_S = 2.0


def join(backend: str | None = None) -> "Run":
    """Join the job: process group up, device chosen, agent connected.

    Started by hand, without torchrun or an agent, the run is its own only rank
    and everything about checkpoints does nothing.

    Args:
        backend: of ``torch.distributed.init_process_group``, called if there are
            several ranks and nobody did before. None: gloo, with nccl where CUDA is.
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
        self._step = 0
        self._restored = False
        self._prepared = False
        self._due: Begin | None = None
        self._metrics: dict[str, float] = {}
        self._closed = False
        self._pid = os.getpid()
        if world_size > 1:
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
        self.restore()
        while self._step < total:
            self._leave_if_stopped()
            yield self._step
            self._complete(self._step + 1)
        self.finish()

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
        self._restored = True
        return self._step

    def should_checkpoint(self, step: int) -> bool:
        """Count ``step`` steps as completed; True if a snapshot is wanted of exactly this one.

        For loops of one's own; ``steps`` does this by itself. Answer True with ``save(step)``
        before the state changes.
        """
        self._step = step
        self._due = self._session.complete(step) if self._session is not None else None
        return self._due is not None

    def save(self, step: int) -> None:
        """Take the snapshot that ``should_checkpoint(step)`` asked for. A failure is reported, not raised.

        Raises:
            Refused: USAGE; no snapshot is wanted at this step. The coordinator
                chooses one step for all ranks; ask it with ``dtrain checkpoint JOB``.
        """
        begin = self._due
        if begin is None or begin.step != step:
            raise Refused(
                ErrorCode.USAGE,
                f"no checkpoint is wanted at step {step}",
                fix="call it only if should_checkpoint(step) is true; `dtrain checkpoint JOB` asks for one",
            )
        self._due = None
        self._seal(begin)

    def finish(self) -> None:
        """Announce that training has ended here, and wait for its last checkpoint.

        Returns once the coordinator has settled it, committed or not; at once if
        there is no agent or the job keeps no checkpoints.
        """
        if self._session is None:
            return
        while True:
            begin = self._session.await_end(self._step)
            if begin is None:
                break
            self._seal(begin)
        self._leave_if_stopped()

    def report(self, **metrics: float) -> None:
        """Show numbers beside the progress; the newest of each name wins."""
        for name, value in metrics.items():
            number = float(value)
            if math.isfinite(number):
                self._metrics[name] = number
                self._metrics.pop(f"nonfinite/{name}", None)
            else:
                # JSON has no NaN; that it is one is what people must see.
                self._metrics.pop(name, None)
                self._metrics[f"nonfinite/{name}"] = 1.0
        if self._session is not None:
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
        """Name what happens inside, such as ``data`` or ``evaluate``."""
        del name
        yield

    def close(self) -> None:
        """Send the last report and take down what ``join`` set up; repeated calls do nothing."""
        if self._closed or self._pid != os.getpid():
            return  # a forked worker leaves to the rank what is the rank's
        self._closed = True
        atexit.unregister(self.close)
        if self._link is not None:
            self._link.close(_CLOSE_S)
        if self._owns_group:
            process_group.tear_down()

    def _set_up(self) -> None:
        self._device, self._owns_group = process_group.set_up(self._backend, self.world_size, self.local_rank)

    def _complete(self, step: int) -> None:
        self._step = step
        if self._session is None:
            return
        begin = self._session.complete(step)
        if not self._prepared:
            # After the first step, as optimizers have no state before it.
            self._prepare()
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

    def _seal(self, begin: Begin) -> None:
        assert self._session is not None
        began = time.perf_counter()
        try:
            saver = self._make_saver()
            if saver is None:
                self._session.give_up(begin, "this rank has no memory for snapshots (DTRAIN_ARENA_FD)")
                return
            sealed = saver.seal(begin)
        except Exception as error:  # noqa: BLE001
            # A failed save never stops training, whatever a state_dict of the script raised.
            log.warning("no snapshot at step %d: %s", begin.step, error)
            self._session.give_up(begin, f"{type(error).__name__}: {error}"[:500])
            return
        self._metrics["checkpoint_stall_s"] = time.perf_counter() - began
        self._session.set_metrics(dict(self._metrics))
        self._session.keep(sealed)
        if begin.hold_s > 0:
            self._session.await_outcome(begin.seq, begin.hold_s)

    def _make_saver(self) -> Saver | None:
        if self._saver is None:
            fd = os.environ.get(ranklink.ENV_ARENA_FD)
            if not fd:
                return None
            self._saver = Saver(self._tracked, self.rank, self.world_size, Arena(int(fd)))
        return self._saver

    def _leave_if_stopped(self) -> None:
        if self.should_stop():
            assert self._session is not None
            sys.stderr.write(f"dtrain: {self._session.stop_reason}; the rank leaves at step {self._step}\n")
            raise SystemExit(EXIT_ATTEMPT_OVER)
