"""Which jobs wait for machines and which have them: kept change by change, arranged when asked for.

``core/queue.py`` says what follows. It is asked only if something that it depends
on has changed since, so that most decisions find its answer ready.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from dtrain.coordinator.core.queue import Machine, Queue, Running, Waiting, arrange
from dtrain.protocol.ids import AgentName, JobName

K = TypeVar("K")
V = TypeVar("V")

Machines = Callable[[], tuple[Mapping[AgentName, Machine], float | None]]
"""The machines that may be used, and when they are others by time alone."""

_EMPTY = Queue()


class Line:
    """Not thread-safe: the world owns it."""

    def __init__(self) -> None:
        self._waiting: dict[JobName, Waiting] = {}
        self._running: dict[JobName, Running] = {}
        self._queue = _EMPTY
        self._stale = False

    def waits(self, job: JobName) -> Waiting | None:
        """Return what is known of a job that waits."""
        return self._waiting.get(job)

    def runs(self, job: JobName) -> Running | None:
        """Return what is known of a job that has machines."""
        return self._running.get(job)

    def put(self, job: JobName, one: Waiting | Running | None) -> None:
        """Take over what a job does now; None: neither."""
        waiting = one if isinstance(one, Waiting) else None
        running = one if isinstance(one, Running) else None
        if self._waiting.get(job) == waiting and self._running.get(job) == running:
            return
        self._stale = True
        _set(self._waiting, job, waiting)
        _set(self._running, job, running)

    def machines_changed(self) -> None:
        """Some machine, or what is free on it, is another now."""
        self._stale = True

    def queue(self, now: float, machines: Machines) -> tuple[Queue, set[JobName]]:
        """Return the order of things, and the jobs for which it is another than it was."""
        before = self._queue
        if not self._waiting:
            self._queue, self._stale = _EMPTY, False
        elif self._stale or (before.changes_at is not None and now >= before.changes_at):
            able, until = machines()
            found = arrange(self._waiting.values(), self._running.values(), able, now, before.fitting)
            if until is not None:
                found = replace(found, changes_at=min(until, found.changes_at or until))
            self._queue, self._stale = found, False
        if self._queue is before:
            return before, set()
        return self._queue, _changed(before, self._queue)


def _changed(before: Queue, after: Queue) -> set[JobName]:
    found = {job for job, place in after.places.items() if before.places.get(job) != place}
    found |= {job for job, by in after.victims.items() if before.victims.get(job) != by}
    if before.claims != after.claims:
        # What one gives up another can take.
        found |= {job for job in after.fitting if after.claims.get(job) != before.claims.get(job)}
    return found


def _set(where: dict[K, V], key: K, value: V | None) -> None:
    if value is None:
        where.pop(key, None)
    else:
        where[key] = value
