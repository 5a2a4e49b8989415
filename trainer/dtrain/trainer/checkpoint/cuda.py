"""Copies tensors into the arena: at once, or from a GPU on a side stream while training goes on.

The side stream runs under the next forward and backward pass. Two kinds of tensors tell apart
what may happen meanwhile. What a tracked optimizer owns, its parameters and its state, changes in
``optimizer.step()`` only: a hook in front of it makes the training stream wait for the copy.
Everything else (running statistics, averages, the script's own tensors) may change at any moment:
it is copied first, and the training stream waits for that part at once. Both waits are queued on
the GPU; the training thread waits for neither.

A script that changes parameters outside ``step()``, or replays a captured graph with the step in
it, passes no hook, and its snapshot would be torn. So the overlap has to be asked for:
``DTRAIN_CUDA_OVERLAP=1``. Without it the copies are queued together and awaited, as on a CPU.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dtrain.trainer.checkpoint import state

log = logging.getLogger("dtrain.trainer")

ENV_OVERLAP = "DTRAIN_CUDA_OVERLAP"
"""``1``: tracked parameters change in ``step()`` of tracked optimizers only, so copy under training."""


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait, on this thread, until the stream has come to it; raises what went wrong before it."""


class Stream(Protocol):
    """A queue of the GPU. ``torch.cuda.Stream`` is one."""

    def record_event(self) -> Any:
        """An event behind everything queued so far."""

    def wait_event(self, event: Any) -> None:
        """Queue a wait: what is queued from now on runs after ``event``."""

    def synchronize(self) -> None:
        """Wait, on this thread, for everything queued so far."""


class Streams(Protocol):
    """The two streams of a device."""

    def training(self) -> Stream:
        """The stream that the calling thread queues its work on."""

    def side(self) -> Stream:
        """A stream of our own."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Queue the copies inside on ``stream``."""

    def is_here(self, tensor: Any) -> bool:
        """Whether a tensor lies on this device; raises if it lies on another one than this and the CPU."""


def copy_and_wait(targets: Sequence[Any], sources: Sequence[Any]) -> None:
    """Copy every source into its target; all bytes are there when this returns."""
    import torch

    _copy(targets, sources)
    if any(source.is_cuda for source in sources):
        torch.cuda.synchronize()


def overlap_for(device: Any) -> "Overlap | None":
    """The means to copy under training; None where there is no GPU or nobody asked for it."""
    if getattr(device, "type", "cpu") != "cuda" or os.environ.get(ENV_OVERLAP, "") != "1":
        return None
    return Overlap(TorchStreams(device))


class Overlap:
    """Runs one copy at a time beside training."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._done: Event | None = None
        self._thread: threading.Thread | None = None
        self._hooked: set[int] = set()

    def start(
        self,
        tracked: Mapping[str, Any],
        targets: Sequence[Any],
        sources: Sequence[Any],
        done: Callable[[Exception | None], None],
    ) -> bool:
        """Queue the copies; ``done`` is called on a thread of its own once they have run.

        False: the tensors are not all on this device and the CPU; nothing was queued.
        """
        self.finish()
        try:
            here = [self._streams.is_here(source) for source in sources]
        except ValueError as error:
            log.warning("snapshots are not copied under training: %s", error)
            return False
        guarded = self._hook(tracked)
        now: list[tuple[Any, Any]] = []
        first: list[tuple[Any, Any]] = []
        later: list[tuple[Any, Any]] = []
        for target, source, on_device in zip(targets, sources, here, strict=True):
            group = now if not on_device else later if _memory_of(source) in guarded else first
            group.append((target, source))
        training, side = self._streams.training(), self._streams.side()
        try:
            # Behind the step that this snapshot is of.
            side.wait_event(training.record_event())
            with self._streams.on(side):
                _copy_pairs(first)
            training.wait_event(side.record_event())
            with self._streams.on(side):
                _copy_pairs(later)
            event = side.record_event()
            # This thread copies what lies in its own memory while the GPU copies the rest.
            _copy_pairs(now)
        except BaseException:
            # What was queued must not run into the next snapshot.
            side.synchronize()
            raise
        self._done = event
        self._thread = threading.Thread(
            target=_await, args=(event, sources, done), name="dtrain-snapshot", daemon=True
        )
        self._thread.start()
        return True

    def join(self) -> None:
        """Queue a wait for the copy in front of whatever training queues next."""
        if self._done is not None:
            self._streams.training().wait_event(self._done)
            self._done = None

    def finish(self) -> None:
        """Wait until no copy runs and ``done`` has returned."""
        self.join()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _hook(self, tracked: Mapping[str, Any]) -> set[int]:
        """See to it that every optimizer joins before it steps; return the memory that they own."""
        owned: set[int] = set()
        for thing in tracked.values():
            register = getattr(thing, "register_step_pre_hook", None)
            if register is None or not hasattr(thing, "param_groups"):
                continue
            if id(thing) not in self._hooked:
                register(lambda *_: self.join())
                self._hooked.add(id(thing))
            owned |= {_memory_of(each) for group in thing.param_groups for each in group["params"]}
            owned |= {
                _memory_of(part)
                for held in thing.state.values()
                for part in (held.values() if isinstance(held, Mapping) else ())
                if state.is_tensor(part)
            }
        return owned


class TorchStreams:
    """The streams of a CUDA device."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._side: Any = None

    def training(self) -> Any:
        import torch

        return torch.cuda.current_stream(self._device)

    def side(self) -> Any:
        import torch

        if self._side is None:
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._side

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(stream)

    def is_here(self, tensor: Any) -> bool:
        if tensor.device.type == "cpu":
            return False
        index = 0 if self._device.index is None else self._device.index
        if tensor.device.type != "cuda" or tensor.device.index != index:
            raise ValueError(f"a tensor lies on {tensor.device}, the rank's device is {self._device}")
        return True


def _await(event: Event, sources: Sequence[Any], done: Callable[[Exception | None], None]) -> None:
    # ``sources`` is only held: memory that the script lets go of must not be given to others yet.
    problem: Exception | None = None
    try:
        event.synchronize()
    except Exception as error:  # noqa: BLE001 - the snapshot is given up with these words
        problem = error
    del sources
    done(problem)


def _memory_of(tensor: Any) -> int:
    held = getattr(tensor, "_local_tensor", tensor)
    return int(held.untyped_storage().data_ptr())


def _copy_pairs(pairs: Sequence[tuple[Any, Any]]) -> None:
    if pairs:
        _copy([target for target, _ in pairs], [source for _, source in pairs])


def _copy(targets: Sequence[Any], sources: Sequence[Any]) -> None:
    import torch

    if not targets:
        return
    with torch.no_grad():
        # One call: for small tensors the loop in Python costs more than their bytes.
        torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
