"""Counting where things happen, for ``metrics`` to show.

A meter is made by whoever owns the process and handed to what counts: there are no
globals. Each is safe for several threads, costs about a microsecond, and holds at most
``SERIES_MAX`` series: what would be one more is counted under the label ``other``, so that
names chosen by others cannot fill the memory or the monitoring.
"""

import bisect
import threading
from collections.abc import Callable, Iterable, Mapping

from dtrain.runtime.metrics import Distribution, Metric, Sample, Samples

SERIES_MAX = 1000
OTHER = "other"


class Counter:
    """A number that only rises, by labels. One without labels, or with ``known`` ones, begins at 0."""

    def __init__(self, metric: Metric, known: Iterable[tuple[str, ...]] = ()) -> None:
        self.metric = metric
        self._lock = threading.Lock()
        first = known if metric.labels else [()]
        self._values: dict[tuple[str, ...], float] = dict.fromkeys(first, 0.0)

    def add(self, *labels: str, amount: float = 1.0) -> None:
        """Count ``amount`` more of these labels."""
        with self._lock:
            key = _key(labels, self._values, self.metric)
            self._values[key] = self._values.get(key, 0.0) + amount

    def drop(self, over: Callable[[tuple[str, ...]], bool]) -> None:
        """Forget the series whose labels are ``over``."""
        with self._lock:
            for labels in [labels for labels in self._values if over(labels)]:
                del self._values[labels]

    def read(self) -> dict[tuple[str, ...], Sample]:
        """Return all series as they are now."""
        with self._lock:
            return dict(self._values)


class Histogram:
    """How long things took, or how large they were, by labels."""

    def __init__(self, metric: Metric, known: Iterable[tuple[str, ...]] = ()) -> None:
        self.metric = metric
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._totals: dict[tuple[str, ...], float] = {}
        for labels in known if metric.labels else [()]:
            self._begin(labels)

    def observe(self, value: float, *labels: str, times: int = 1) -> None:
        """Take in ``value``, ``times`` times."""
        # A clock that was set back must not make a sum go back.
        value = max(0.0, value)
        at = bisect.bisect_left(self.metric.buckets, value)
        with self._lock:
            key = self._at(labels)
            self._counts[key][at] += times
            self._totals[key] += value * times

    def merge(self, more: Distribution, *labels: str) -> None:
        """Take in what another process has observed."""
        with self._lock:
            key = self._at(labels)
            self._counts[key] = [n + m for n, m in zip(self._counts[key], more.counts, strict=True)]
            self._totals[key] += more.total

    def drop(self, over: Callable[[tuple[str, ...]], bool]) -> None:
        """Forget the series whose labels are ``over``."""
        with self._lock:
            for labels in [labels for labels in self._counts if over(labels)]:
                del self._counts[labels], self._totals[labels]

    def read(self) -> dict[tuple[str, ...], Sample]:
        """Return all series as they are now."""
        with self._lock:
            return {
                labels: Distribution(tuple(counts), self._totals[labels])
                for labels, counts in self._counts.items()
            }

    def _at(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        key = _key(labels, self._counts, self.metric)
        if key not in self._counts:
            self._begin(key)
        return key

    def _begin(self, labels: tuple[str, ...]) -> None:
        self._counts[labels] = [0] * (len(self.metric.buckets) + 1)
        self._totals[labels] = 0.0


Meter = Counter | Histogram


def read(meters: Iterable[Meter]) -> Samples:
    """Return what all ``meters`` hold."""
    return {meter.metric: meter.read() for meter in meters}


def _key(labels: tuple[str, ...], known: Mapping[tuple[str, ...], object], metric: Metric) -> tuple[str, ...]:
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}"
    if labels in known or len(known) < SERIES_MAX:
        return labels
    return (OTHER,) * len(labels)
