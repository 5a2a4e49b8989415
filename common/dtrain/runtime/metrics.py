"""Metrics as values: a role declares what it shows, and a function reads it when a scrape asks.

Nothing is counted in advance: a scrape reads what the process has published, so
that metrics cost nothing while nobody looks. ``prometheus_client`` is loaded by
the first ``exposition``: a daemon without a status page never loads it.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dtrain.runtime.serving import Page

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Metric:
    """One declared metric. ``name`` ends in its unit; that of a counter in ``_total``."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()


Samples = Mapping[Metric, Mapping[tuple[str, ...], float]]
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
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

    build = (role, importlib.metadata.version("dtrain"), platform.python_version())

    class Reader(Collector):
        def collect(self) -> Iterator["Family"]:
            found: Samples = {BUILD_INFO: {build: 1.0}, **read()}
            unknown = found.keys() - {BUILD_INFO, *declared}
            if unknown:
                raise KeyError(f"not declared: {sorted(metric.name for metric in unknown)}")
            for metric in (BUILD_INFO, *declared):
                make = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
                family = make(metric.name, metric.help, labels=metric.labels)
                for labels, value in found.get(metric, {}).items():
                    family.add_metric(labels, value)
                yield family

        def describe(self) -> Iterator["Family"]:
            # Registering must not read: the process is not up yet.
            return iter(())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Reader())
    if process:
        ProcessCollector(registry=registry)
    return lambda: Page(200, generate_latest(registry), CONTENT_TYPE)
