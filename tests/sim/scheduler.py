"""Virtual time: one heap of events, one seeded source of chance, one trace.

Code that blocks (a transaction that waits for its answer, the mirror's loop) runs as a ``Task``: a
greenlet, so that exactly one runs at a time and every switch is an event. Equal seeds give equal
histories; nothing here reads a real clock.
"""

import heapq
import random
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

Trace = Callable[..., None]


class Killed(BaseException):
    """The process in which a task ran is dead: unwind, do nothing."""


class Event:
    """One callback to come; ``cancel`` unsets it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Scheduler:
    """Runs events in order of time. ``rng`` is the only source of chance in a world.

    What faults strike is drawn from ``chaos`` instead, so that the same faults, given as a schedule,
    meet the same world.
    """

    def __init__(self, seed: int, trace: Trace | None = None) -> None:
        self.now = 0.0
        self.rng = random.Random(f"dtrain-sim-{seed}")
        self.chaos = random.Random(f"dtrain-chaos-{seed}")
        self.events = 0
        self.tracing = trace is not None
        self._trace = trace
        self._heap: list[tuple[float, int, Event]] = []
        """Ties go to whoever asked first: stable, so that a seed is a history."""
        self._number = 0
        self._current: Task | None = None
        self._tasks: dict[int, Task] = {}

    def at(self, when: float, call: Callable[[], None]) -> Event:
        self._number += 1
        event = Event(call)
        heapq.heappush(self._heap, (max(when, self.now), self._number, event))
        return event

    def after(self, delay_s: float, call: Callable[[], None]) -> Event:
        return self.at(self.now + delay_s, call)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def delay(self, mean_s: float, cap_s: float = 5.0) -> float:
        """A latency: mostly short, sometimes long."""
        return min(cap_s, 0.2 * mean_s + self.rng.expovariate(1.0 / (0.8 * mean_s)))

    def log(self, who: str, what: str, **fields: Any) -> None:
        if self._trace is not None:
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            self._trace(f"{self.now:9.3f} {who:<12} {what} {shown}".rstrip())

    def run(self, until: float, after_each: Callable[[], None], stop: Callable[[], bool]) -> None:
        """Run events up to ``until``; ``after_each`` checks, ``stop`` ends early."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            at, _, event = heap[0]
            call = event.call
            if call is None:
                heapq.heappop(heap)
                continue
            if stop():
                return
            heapq.heappop(heap)
            event.call = None
            self.now = at
            self.events += 1
            call()
            after_each()
        self.now = max(self.now, until)

    # Tasks.

    def spawn(self, body: Callable[[], None], alive: Callable[[], bool], name: str = "") -> "Task":
        """Start ``body`` as a task, now or with the event at hand."""
        task = Task(self, body, alive, name)
        self._number += 1
        task.number = self._number
        self._tasks[task.number] = task
        task.resume(None)
        return task

    def current(self) -> "Task":
        assert self._current is not None, "a call that blocks was made outside of a task"
        return self._current

    def close(self) -> None:
        """Unwind every task that still waits."""
        for task in list(self._tasks.values()):
            task.kill()


class Task:
    """Blocking code under virtual time. ``resume`` hands it a value or an exception."""

    def __init__(
        self, scheduler: Scheduler, body: Callable[[], None], alive: Callable[[], bool], name: str
    ) -> None:
        self._scheduler = scheduler
        self._body = body
        self._alive = alive
        self.name = name
        self.number = 0
        self.waiting = 0
        """Number of the wait it is in: an answer to an earlier wait is dropped."""
        self.done = False
        self._value: Any = None
        self._killed = False
        self._inner: greenlet | None = None

    def sleep(self, seconds: float) -> None:
        token = self.waiting + 1
        self._scheduler.after(seconds, lambda: self.answer(token, None))
        self.wait()

    def wait(self) -> Any:
        """Let the world go on until ``answer`` is called for this wait. Called by the task itself."""
        assert self._inner is not None
        if self._killed or not self._alive():
            raise Killed
        self.waiting += 1
        # Back to whoever resumed this task: the event at hand, or another task's.
        self._inner.parent.switch()
        if self._killed or not self._alive():
            raise Killed
        value, self._value = self._value, None
        if isinstance(value, BaseException):
            raise value
        return value

    def answer(self, token: int, value: Any) -> None:
        if not self.done and self.waiting == token:
            self.resume(value)

    def resume(self, value: Any) -> None:
        outer, self._scheduler._current = self._scheduler._current, self
        self._value = value
        try:
            if self._inner is None:
                self._inner = greenlet(self._run)
            self._inner.parent = getcurrent()
            self._inner.switch()
        finally:
            self._scheduler._current = outer
        if self.done:
            self._scheduler._tasks.pop(self.number, None)
            self._inner = None
        failure = self._failure
        if failure is not None:
            self._failure = None
            raise failure

    _failure: BaseException | None = None

    def kill(self) -> None:
        """Unwind it now, if it has not ended."""
        if not self.done:
            self._killed = True
            self.waiting += 1
            self.resume(None)

    def _run(self) -> None:
        try:
            self._body()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the run can see it
            self._failure = error
        self.done = True
