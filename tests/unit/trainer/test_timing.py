"""Where the time of a step goes."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dtrain.protocol.snapshot import Timing
from dtrain.trainer import timing
from dtrain.trainer.timing import STEPS_MIN, WARM_STEPS, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Iterator[Stopwatch]:
    yield Stopwatch(clock)
    timing.remove()


def steps(watch: Stopwatch, body: object, count: int = STEPS_MIN + WARM_STEPS) -> Timing | None:
    for _ in range(count):
        watch.begin()
        body()  # type: ignore[operator]
        watch.end()
    return watch.timing()


def test_a_step_is_split_into_data_own_time_and_waiting_for_others(watch: Stopwatch, clock: Clock) -> None:
    def body() -> None:
        with watch.span("data"):
            clock.now += 0.2
        clock.now += 0.3
        with watch.span("wait"):
            clock.now += 0.5
        with watch.span("aside"):
            clock.now += 7.0

    assert steps(watch, body) == Timing(step_s=1.0, data_s=0.2, own_s=0.5)


def test_the_first_steps_say_nothing(watch: Stopwatch, clock: Clock) -> None:
    assert steps(watch, lambda: None, STEPS_MIN + WARM_STEPS - 1) is None


def test_of_spans_within_each_other_the_outermost_counts(watch: Stopwatch, clock: Clock) -> None:
    def body() -> None:
        clock.now += 1.0
        with watch.span("aside"), watch.span("data"):
            clock.now += 5.0

    assert steps(watch, body) == Timing(step_s=1.0, data_s=0.0, own_s=1.0)


def test_a_span_that_goes_over_the_boundary_is_split_there(watch: Stopwatch, clock: Clock) -> None:
    watch.begin()
    watch.enter("aside")
    clock.now += 3.0
    watch.end()
    watch.begin()
    clock.now += 4.0
    watch.leave()
    clock.now += 1.0
    watch.end()
    assert steps(watch, lambda: None, 1) is None
    assert watch._samples[-1] == (0.0, 0.0, 0.0)
    watch.begin()


def test_gradients_and_collectives_of_the_script_are_waited_for_by_several_ranks_only(
    watch: Stopwatch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_args: object, **_kwargs: object) -> None:
        clock.now += 1.0

    monkeypatch.setattr(torch.autograd, "backward", slow)
    loss = torch.ones(1, requires_grad=True).sum()
    timing.install(watch, world_size=1)
    assert steps(watch, loss.backward) == Timing(1.0, 0.0, 1.0)
    timing.install(watch, world_size=2)
    assert steps(watch, loss.backward, 200) == Timing(1.0, 0.0, 0.0)
    timing.remove()
    assert torch.autograd.backward is slow


def test_batches_of_any_loader_are_waited_for(watch: Stopwatch, clock: Clock) -> None:
    class Slow(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            clock.now += 0.25
            return super().__getitem__(index)

    timing.install(watch, world_size=1)
    batches = iter(DataLoader(Slow(torch.zeros(100, 1)), batch_size=2))
    beats = watch.beats
    assert steps(watch, lambda: next(batches)) == Timing(0.5, 0.5, 0.5)
    assert watch.beats > beats


def test_nothing_is_left_in_what_a_script_copies_saves_or_compiles(watch: Stopwatch) -> None:
    timing.install(watch, world_size=2)
    model = torch.nn.Linear(2, 2)
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def body() -> None:
        compiled(torch.ones(1, 2)).sum().backward()

    assert steps(watch, body) is not None


def test_a_step_that_is_compiled_as_a_whole_is_measured_too(watch: Stopwatch) -> None:
    timing.install(watch, world_size=2)
    model = torch.nn.Linear(2, 2)

    def body() -> None:
        model(torch.ones(1, 2)).sum().backward()

    beats = watch.beats
    steps(watch, torch.compile(body, backend="eager"))
    assert watch.beats > beats


def test_what_somebody_else_has_replaced_since_is_left_alone(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.autograd.backward
    timing.install(watch, world_size=2)
    monkeypatch.setattr(torch.autograd, "backward", lambda *_a, **_k: None)
    theirs = torch.autograd.backward
    timing.remove()
    assert torch.autograd.backward is theirs
    monkeypatch.setattr(torch.autograd, "backward", original)


class Event:
    """One on the GPU's time line, which is ``lag`` behind the Python thread until ``catch_up``."""

    passed = False
    clock: Clock

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def query(self) -> bool:
        return type(self).passed

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


def gpu(watch: Stopwatch, clock: Clock, monkeypatch: pytest.MonkeyPatch, *, capturing: bool = False) -> None:
    """Have ``watch`` measure on the time line of ``Event``."""
    Event.clock, Event.passed = clock, False
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    watch.use_gpu()


def test_on_a_gpu_its_own_time_line_counts_and_nobody_waits_for_it(
    watch: Stopwatch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(watch, clock, monkeypatch)

    def body() -> None:
        with watch.span("data"):
            clock.now += 0.1
        clock.now += 0.2
        with watch.span("wait"):
            clock.now += 0.4

    assert steps(watch, body) == Timing(0.7, 0.1, 0.0)  # not known yet
    Event.passed = True
    assert steps(watch, body, 100) == Timing(0.7, 0.1, 0.3)


def test_what_goes_into_a_cuda_graph_is_not_measured(
    watch: Stopwatch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(watch, clock, monkeypatch, capturing=True)
    recorded: list[float] = []
    monkeypatch.setattr(Event, "record", lambda event: recorded.append(clock.now))

    def body() -> None:
        clock.now += 0.2
        with watch.span("wait"):
            clock.now += 0.4

    assert steps(watch, body, 1) is None
    assert recorded == [100.0]  # the step's beginning alone


def test_events_of_two_gpus_do_not_end_training(
    watch: Stopwatch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(watch, clock, monkeypatch)

    def refuse(first: Event, last: Event) -> float:
        raise RuntimeError("events are on different devices")

    Event.passed = True
    monkeypatch.setattr(Event, "elapsed_time", refuse)

    def body() -> None:
        clock.now += 0.2

    assert steps(watch, body, 20) == Timing(0.2, 0.0, 0.0)
