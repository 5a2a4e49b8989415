"""Copies behind training: the order of everything, on streams that run in any order they may."""

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dtrain.trainer.checkpoint import cuda
from dtrain.trainer.checkpoint.cuda import Overlap

Op = Callable[[], bool]
"""Runs, if it may run yet."""


class FakeEvent:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.error: Exception | None = None

    def synchronize(self) -> None:
        assert self.reached.wait(10)
        if self.error is not None:
            raise self.error


class FakeStream:
    """What is queued runs later, in order, when ``FakeGpu.run`` lets it."""

    def __init__(self) -> None:
        self.ops: deque[Op] = deque()
        self.awaited = False

    def queue(self, work: Callable[[], object]) -> None:
        def op() -> bool:
            work()
            return True

        self.ops.append(op)

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        self.queue(event.reached.set)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.ops.append(event.reached.is_set)

    def synchronize(self) -> None:
        self.awaited = True


class FakeGpu:
    """Two streams whose work interleaves as chance wants; every tensor not named as the CPU's is here."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chance = random.Random(seed)
        self.streams = {"training": FakeStream(), "side": FakeStream()}
        self.cpu: list[Any] = []
        self.elsewhere = False
        self._on: FakeStream | None = None
        real = cuda._copy

        def copy(targets: Any, sources: Any) -> None:
            if self._on is None:
                real(targets, sources)
                return
            for target, source in zip(targets, sources, strict=True):
                self._on.queue(lambda target=target, source=source: target.copy_(source.detach()))

        monkeypatch.setattr(cuda, "_copy", copy)

    def training(self) -> FakeStream:
        return self.streams["training"]

    def side(self) -> FakeStream:
        return self.streams["side"]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self._on = stream
        yield
        self._on = None

    def is_here(self, tensor: Any) -> bool:
        if self.elsewhere:
            raise ValueError("another device")
        return not any(tensor is each for each in self.cpu)

    def run(self) -> None:
        """Run everything queued, streams in any order that their waits allow."""
        while any(stream.ops for stream in self.streams.values()):
            ready = [s for s in self.streams.values() if s.ops]
            self.chance.shuffle(ready)
            assert any(self._step(stream) for stream in ready), "the streams wait for each other"

    def _step(self, stream: FakeStream) -> bool:
        if stream.ops[0]():
            stream.ops.popleft()
            return True
        return False


class Optimizer:
    """Queues its step on the training stream, behind its hooks."""

    def __init__(self, gpu: FakeGpu, *parameters: torch.Tensor) -> None:
        self._gpu = gpu
        self._hooks: list[Any] = []
        self.param_groups = [{"params": list(parameters)}]
        self.state = {p: {"average": torch.full_like(p, 5.0), "count": 1} for p in parameters}

    def register_step_pre_hook(self, hook: Any) -> None:
        self._hooks.append(hook)

    def step(self) -> None:
        for hook in self._hooks:
            hook(self, (), {})
        for parameter, held in self.state.items():
            self._gpu.training().queue(lambda p=parameter: p.add_(100))
            self._gpu.training().queue(lambda h=held: h["average"].add_(100))


class Scene:
    """A model of one parameter and one running statistic, with an average of the optimizer's."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = FakeGpu(seed, monkeypatch)
        self.weight, self.running, self.on_cpu = (torch.full((4,), float(n)) for n in (1, 2, 3))
        self.gpu.cpu = [self.on_cpu]
        self.optimizer = Optimizer(self.gpu, self.weight)
        average = self.optimizer.state[self.weight]["average"]
        self.sources: list[Any] = [self.running, self.weight, self.on_cpu, average]
        self.targets = [torch.zeros(4) for _ in self.sources]
        self.overlap = Overlap(self.gpu)
        self.heard: list[Exception | None] = []

    def start(self, **tracked: Any) -> bool:
        return self.overlap.start(tracked, self.targets, self.sources, self.heard.append)

    def forward(self) -> None:
        self.gpu.training().queue(lambda: self.running.add_(100))

    def found(self) -> list[float]:
        return [float(target[0]) for target in self.targets]


SNAPSHOT = [2.0, 1.0, 3.0, 5.0]


@pytest.mark.parametrize("seed", range(50))
def test_the_snapshot_is_of_its_step_however_the_streams_interleave(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(seed, monkeypatch)
    scene.optimizer.step()  # the step that the snapshot is of is queued, and has not run
    want = [value + 100 if value in (1.0, 5.0) else value for value in SNAPSHOT]
    assert scene.start(optimizer=scene.optimizer)
    scene.on_cpu.add_(100)  # this thread goes on at once
    for _ in range(2):
        scene.forward()
        scene.optimizer.step()
    scene.gpu.run()
    scene.overlap.finish()
    assert scene.found() == want
    assert scene.heard == [None]


def test_without_the_hook_the_snapshot_would_be_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for all this, and the proof that the test above can fail."""
    torn = 0
    for seed in range(50):
        scene = Scene(seed, monkeypatch)
        monkeypatch.setattr(scene.overlap, "join", lambda: None)
        assert scene.start(optimizer=scene.optimizer)
        scene.optimizer.step()
        scene.gpu.run()
        torn += scene.found() != SNAPSHOT
    assert torn


@pytest.mark.parametrize("seed", range(20))
def test_what_no_tracked_optimizer_owns_may_change_at_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(seed, monkeypatch)
    assert scene.start()  # an optimizer that is not tracked has no hook
    scene.forward()
    scene.optimizer.step()
    scene.gpu.run()
    scene.overlap.finish()
    assert scene.found() == SNAPSHOT


def test_nothing_is_announced_before_every_byte_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(0, monkeypatch)
    seen: list[list[float]] = []
    tracked = {"optimizer": scene.optimizer}
    assert scene.overlap.start(
        tracked, scene.targets, scene.sources, lambda _error: seen.append(scene.found())
    )
    assert not seen
    scene.gpu.run()
    scene.overlap.finish()
    assert seen == [SNAPSHOT]


def test_a_failed_copy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(0, monkeypatch)
    real = FakeStream.record_event

    def broken(stream: FakeStream) -> FakeEvent:
        event = real(stream)
        event.error = RuntimeError("an illegal address")
        return event

    monkeypatch.setattr(FakeStream, "record_event", broken)
    assert scene.start(optimizer=scene.optimizer)
    scene.gpu.run()
    scene.overlap.finish()
    assert [str(error) for error in scene.heard] == ["an illegal address"]


def test_the_next_snapshot_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(0, monkeypatch)
    assert scene.start(optimizer=scene.optimizer)
    runner = threading.Timer(0.05, scene.gpu.run)
    runner.start()
    scene.overlap.finish()
    assert scene.heard == [None]
    runner.join()


def test_tensors_of_another_device_are_not_copied_behind_training(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(0, monkeypatch)
    scene.gpu.elsewhere = True
    assert not scene.start(optimizer=scene.optimizer)
    assert not any(stream.ops for stream in scene.gpu.streams.values())
    assert scene.found() == [0.0] * 4


def test_what_was_queued_before_an_error_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not run into the next snapshot."""
    scene = Scene(0, monkeypatch)
    scene.targets[2] = torch.zeros(3)  # of another shape than what the CPU has for it
    with pytest.raises(RuntimeError):
        scene.start(optimizer=scene.optimizer)
    assert scene.gpu.side().awaited
    assert not scene.heard


def test_a_real_optimizer_joins_before_it_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(0, monkeypatch)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    scene.sources, scene.targets = [weight], [torch.zeros(4)]
    assert scene.start(optimizer=optimizer)
    queued = len(scene.gpu.training().ops)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert len(scene.gpu.training().ops) == queued + 1
    optimizer.step()
    assert len(scene.gpu.training().ops) == queued + 1  # joined once is enough
    scene.gpu.run()
    scene.overlap.finish()


def test_without_a_gpu_or_without_being_asked_there_is_no_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.overlap_for(None) is None
    assert cuda.overlap_for(torch.device("cpu")) is None
    assert cuda.overlap_for(torch.device("cuda", 0)) is None
    monkeypatch.setenv(cuda.ENV_OVERLAP, "1")
    assert cuda.overlap_for(torch.device("cpu")) is None
    assert cuda.overlap_for(torch.device("cuda", 0)) is not None
