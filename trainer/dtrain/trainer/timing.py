"""Where the time of a step goes: medians of the step, of waiting for data, and of the rank's own part.

Ranks of a synchronous job take equally long for a step, whoever is slow. What tells them apart is the
time that does not wait for others: all but the span of ``backward``, in which gradients are
exchanged, and of collectives that the script calls itself. On a GPU the same spans are measured on
its stream, as the Python thread runs ahead of it.
"""

import contextlib
import functools
import importlib
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any, ClassVar, Literal, TypeVar

from dtrain.protocol.snapshot import Timing

T = TypeVar("T")
Kind = Literal["wait", "data", "aside"]
"""``wait``: for other ranks, ``aside``: not part of the step at all, such as a checkpoint or evaluation."""

STEPS = 64
"""Newest steps that medians are of."""

WARM_STEPS = 2
"""First steps of an attempt, which import and compile: they say nothing."""

STEPS_MIN = 4
EVENTS_EACH_S = 0.005
"""Steps that take at least that long are all measured on the GPU, of shorter ones each sixteenth."""

_WAITS = (
    ("torch.autograd", "backward"),
    ("torch.distributed", "all_reduce"),
    ("torch.distributed", "all_gather"),
    ("torch.distributed", "all_gather_into_tensor"),
    ("torch.distributed", "all_gather_object"),
    ("torch.distributed", "all_to_all_single"),
    ("torch.distributed", "barrier"),
    ("torch.distributed", "broadcast"),
    ("torch.distributed", "broadcast_object_list"),
    ("torch.distributed", "gather"),
    ("torch.distributed", "reduce"),
    ("torch.distributed", "reduce_scatter_tensor"),
    ("torch.distributed", "scatter"),
)
_LOADER = ("torch.utils.data.dataloader", "_BaseDataLoaderIter", "__next__")


class Stopwatch:
    """Times of one rank's steps. The training thread writes, any thread reads ``timing``."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._thread: int | None = None
        self._began: float | None = None
        self._inside: Kind | None = None
        self._entered = 0.0
        self._wait = self._data = self._aside = 0.0
        self._count = 0
        self._last_s = 0.0
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=STEPS)
        self._gpu: _GpuClock | None = None
        self._gpu_now = False
        self.beats = 0
        """Counts what proves life without a step: batches, gradients, sections, snapshots."""

    def use_gpu(self) -> None:
        """Take the rank's own time from the current CUDA stream instead of the clock."""
        self._gpu = _GpuClock()

    def begin(self) -> None:
        """The step begins, on the thread that trains."""
        self._thread = threading.get_ident()
        self._wait = self._data = self._aside = 0.0
        if self._gpu is not None:
            self._gpu_now = self._last_s >= EVENTS_EACH_S or self._count % 16 == 0
            if self._gpu_now:
                self._gpu.begin()
        self._began = self._clock()
        if self._inside is not None:
            self._entered = self._began

    def end(self) -> None:
        """The step is over."""
        began = self._began
        if began is None:
            return
        now = self._clock()
        if self._inside is not None:  # a span that goes over the boundary
            self._add(self._inside, now - self._entered)
            self._entered = now
        self._began = None
        self._count += 1
        step_s = self._last_s = max(0.0, now - began - self._aside)
        own_s = max(0.0, step_s - self._wait)
        if self._gpu is not None:
            if self._gpu_now:
                self._gpu.end()
            own_s = self._gpu.own_s()
        if self._count > WARM_STEPS:
            self._samples.append((step_s, self._data, own_s))

    def drop(self) -> None:
        """What was begun was no step."""
        self._began = None

    def enter(self, kind: Kind) -> bool:
        """Begin a span; False if it does not count: inside of another one, or not on the training thread."""
        if self._inside is not None or threading.get_ident() != self._thread:
            return False
        self._inside = kind
        if self._gpu is not None and self._gpu_now and kind != "data" and self._began is not None:
            self._gpu.mark()
        self._entered = self._clock()
        return True

    def leave(self) -> None:
        """End the span that ``enter`` began."""
        kind, self._inside = self._inside, None
        self.beats += 1
        if kind is None:
            return
        self._add(kind, self._clock() - self._entered)
        if self._gpu is not None and self._gpu_now and kind != "data" and self._began is not None:
            self._gpu.mark()

    @contextlib.contextmanager
    def span(self, kind: Kind) -> Iterator[None]:
        """``enter`` and ``leave``; its beginning is a sign of life, too."""
        self.beats += 1
        counts = self.enter(kind)
        try:
            yield
        finally:
            if counts:
                self.leave()
            else:
                self.beats += 1

    def timing(self) -> Timing | None:
        """Medians of the newest steps, with three digits; None: too few steps to say."""
        samples = list(self._samples)
        if len(samples) < STEPS_MIN:
            return None
        step_s, data_s, own_s = (statistics.median(column) for column in zip(*samples, strict=True))
        return Timing(_short(step_s), _short(data_s), _short(own_s))

    def _add(self, kind: Kind, seconds: float) -> None:
        if kind == "wait":
            self._wait += seconds
        elif kind == "data":
            self._data += seconds
        else:
            self._aside += seconds


class _GpuClock:
    """The same on the GPU's own time line, by events that are read once they have passed: no wait for it."""

    PENDING_MAX = 8

    def __init__(self) -> None:
        self._now: list[Any] = []
        self._pending: deque[list[Any]] = deque()
        self._own_s = 0.0

    def begin(self) -> None:
        self._now = [self._event()]

    def mark(self) -> None:
        if self._now and _is_capturing():
            # As part of a CUDA graph an event can be neither queried nor timed.
            self._now = []
        elif self._now:
            self._now.append(self._event())

    def end(self) -> None:
        if self._now and len(self._now) % 2 and len(self._pending) < self.PENDING_MAX:
            self._pending.append([*self._now, self._event()])
        self._now = []

    def own_s(self) -> float:
        """Of the newest step that the GPU has got behind; 0.0: none yet."""
        while self._pending and self._pending[0][-1].query():
            first, *marks, last = self._pending.popleft()
            # A script may go to another GPU within a step; times of two cannot be compared.
            with contextlib.suppress(RuntimeError):
                excluded = sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True))
                self._own_s = max(0.0, first.elapsed_time(last) - excluded) / 1e3
        return self._own_s

    def _event(self) -> Any:
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _is_capturing() -> bool:
    """Whether what is done now goes into a CUDA graph instead of to the GPU."""
    import torch

    return torch.cuda.is_current_stream_capturing()


class _Installed:
    """What this process has of its run: the stopwatch, and what is replaced for it."""

    watch: Stopwatch | None = None
    undo: ClassVar[list[tuple[Any, str, Any, Any]]] = []
    forks_seen: bool = False


def waited(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; the time until each is there is waiting for data."""
    iterator = None
    while True:
        watch = _Installed.watch
        with watch.span("data") if watch is not None else contextlib.nullcontext():
            try:
                # Here, too: making one may start workers, and read the first batch.
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def install(watch: Stopwatch, *, world_size: int) -> None:
    """Have spans of ``watch`` begin and end by themselves: around torch's own functions, if it is loaded.

    Not by hooks on modules: those are copied and pickled with their module, and compiled with it.
    """
    remove()
    _Installed.watch = watch
    if not _Installed.forks_seen:
        # A worker of a data loader has neither steps nor, perhaps, a GPU that it may touch.
        os.register_at_fork(after_in_child=remove)
        _Installed.forks_seen = True
    if world_size > 1:  # alone there is nobody to wait for
        for module_name, name in _WAITS:
            _wrap(sys.modules.get(module_name), name, "wait")
    module_name, class_name, name = _LOADER
    _wrap(getattr(sys.modules.get(module_name), class_name, None), name, "data")


def remove() -> None:
    """Put torch's own functions back, where nobody else has replaced them since."""
    _Installed.watch = None
    while _Installed.undo:
        owner, name, original, wrapped = _Installed.undo.pop()
        if getattr(owner, name, None) is wrapped:
            setattr(owner, name, original)


def _wrap(owner: Any, name: str, kind: Kind) -> None:
    original = getattr(owner, name, None)
    if original is None:
        return
    compiling = getattr(getattr(sys.modules.get("torch"), "compiler", None), "is_compiling", lambda: False)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        # Compiled into a graph it would break the graph, and measure the compiler.
        if compiling():
            return original(*args, **kwargs)
        watch = _Installed.watch
        if watch is None or not watch.enter(kind):
            return original(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            watch.leave()

    with contextlib.suppress(Exception):
        # Called from compiled code after a graph break it would be compiled itself, as if it were in a graph.
        function: Any = timed
        _leave_uncompiled(function.__code__)
    setattr(owner, name, timed)
    _Installed.undo.append((owner, name, original, timed))


def _leave_uncompiled(code: CodeType) -> None:
    """What torch._dynamo does to skip a function: from beneath it, as importing it takes seconds."""
    frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    if hasattr(frames, "skip_code"):  # older torch
        frames.skip_code(code)
        return
    action = frames._FrameAction
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(action.SKIP, action.DEFAULT))


def _short(seconds: float) -> float:
    return float(f"{seconds:.3g}")
