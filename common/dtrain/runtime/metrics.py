"""Metrics as values: a role declares what it shows, and a function reads it when a scrape asks.

What can be read is read then; what only happens (a request took so long) is counted by
``meters``, at a microsecond each. ``prometheus_client`` is loaded by the first
``exposition``: a daemon without a status page never loads it.
"""

import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dtrain.runtime.serving import Page

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MILLISECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets of what a network answers."""

MICROSECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Buckets of what is computed."""

MINUTES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Buckets of what moves data, or trains."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One declared metric. ``name`` ends in its unit; that of a counter in ``_total``."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds, ascending, without infinity."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram holds: how many in each bucket, the last one without a bound, and their sum."""

    counts: tuple[int, ...]
    total: float


Sample = float | Distribution
Samples = Mapping[Metric, Mapping[tuple[str, ...], Sample]]
"""By metric, by the values of its labels; () for none."""

BUILD_INFO = Metric(
    "dtrain_build_info",
    "gauge",
    "Always 1: which dtrain this is, as which role it runs, and on which Python.",
    ("role", "version", "python"),
)

PROCESS = (
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
)
"""What ``prometheus_client`` tells of the process that answers, a daemon without its guardian."""


def exposition(
    role: str, declared: Sequence[Metric], read: Callable[[], Samples], *, process: bool = True
) -> Callable[[], Page]:
    """Return the page that shows ``declared`` as ``read`` finds them, beside what every role shows.

    What ``read`` leaves out has no sample; what is not declared is a bug and a failed page.
    """
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector

    build = (role, importlib.metadata.version("dtrain"), platform.python_version())

    class Reader(Collector):
        def collect(self) -> Iterator["Family"]:
            found: Samples = {BUILD_INFO: {build: 1.0}, **read()}
            unknown = found.keys() - {BUILD_INFO, *declared}
            if unknown:
                raise KeyError(f"not declared: {sorted(metric.name for metric in unknown)}")
            for metric in (BUILD_INFO, *declared):
                yield self._family(metric, found.get(metric, {}))

        def _family(self, metric: Metric, samples: Mapping[tuple[str, ...], Sample]) -> "Family":
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, value in samples.items():
                    assert isinstance(value, Distribution)
                    histogram.add_metric(labels, _buckets(metric, value), value.total)
                return histogram
            make = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            family = make(metric.name, metric.help, labels=metric.labels)
            for labels, value in samples.items():
                assert not isinstance(value, Distribution)
                family.add_metric(labels, value)
            return family

        def describe(self) -> Iterator["Family"]:
            # Registering must not read: the process is not up yet.
            return iter(())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Reader())
    if process:
        ProcessCollector(registry=registry)
    return lambda: Page(200, generate_latest(registry), CONTENT_TYPE)


def _buckets(metric: Metric, value: Distribution) -> list[tuple[str, float]]:
    bounds = [*map(repr, metric.buckets), "+Inf"]
    return list(zip(bounds, map(float, itertools.accumulate(value.counts)), strict=True))
