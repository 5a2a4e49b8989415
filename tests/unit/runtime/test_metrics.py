"""Metrics: what is declared, shown and documented is the same."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tools import gen_metrics_doc

from dtrain.agent import metrics as of_agent
from dtrain.coordinator import metrics as of_coordinator
from dtrain.runtime.meters import SERIES_MAX, Counter, Histogram, read
from dtrain.runtime.metrics import BUILD_INFO, PROCESS, Distribution, Metric, exposition

DOC = Path(__file__).parents[3] / "docs" / "metrics.md"
DECLARED = (BUILD_INFO, *of_coordinator.METRICS, *of_agent.METRICS)

LABELS = {"job", "agent", "reason", "op", "code", "category", "stage", "phase", "state", "kind", "direction"}
"""All labels that there are: none by rank, and none that grows without bound."""

COUNT = Metric("x_things_total", "counter", "Things.", ("kind",))
LEVEL = Metric("x_level", "gauge", "Level.")


def shown(page: bytes) -> dict[str, float]:
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_samples_are_read_when_they_are_asked_for() -> None:
    level = [1.0]
    page = exposition(
        "test", (COUNT, LEVEL), lambda: {LEVEL: {(): level[0]}, COUNT: {("a",): 3.0}}, process=False
    )
    assert shown(page().body)["x_level"] == 1.0
    level[0] = 2.0
    found = shown(page().body)
    assert found["x_level"] == 2.0
    assert found["x_things_total{'kind': 'a'}"] == 3.0
    assert any(name.startswith("dtrain_build_info{") and "'role': 'test'" in name for name in found)


def test_a_histogram_is_shown_in_buckets_that_add_up() -> None:
    metric = Metric("x_seconds", "histogram", "Seconds.", ("op",), (0.1, 1.0))
    meter = Histogram(metric)
    for seconds in (0.1, 0.5, 0.5, 7.0):
        meter.observe(seconds, "get")
    page = exposition("test", (metric,), lambda: read([meter]), process=False)
    found = shown(page().body)
    buckets = [found[f"x_seconds_bucket{{'le': '{le}', 'op': 'get'}}"] for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [1.0, 3.0, 4.0]
    assert found["x_seconds_count{'op': 'get'}"] == 4.0
    assert found["x_seconds_sum{'op': 'get'}"] == pytest.approx(8.1)


def test_a_meter_without_labels_begins_at_nothing() -> None:
    assert Counter(Metric("x_total", "counter", "X.")).read() == {(): 0.0}


def test_names_that_others_choose_cannot_fill_the_monitoring() -> None:
    counter, histogram = Counter(COUNT), Histogram(Metric("x_s", "histogram", "X.", ("kind",), (1.0,)))
    for number in range(SERIES_MAX + 50):
        counter.add(f"n{number}")
        histogram.observe(0.5, f"n{number}")
    assert len(counter.read()) == len(histogram.read()) == SERIES_MAX + 1
    assert counter.read()["other",] == 50.0


def test_a_clock_that_is_set_back_takes_nothing_away() -> None:
    histogram = Histogram(Metric("x_s", "histogram", "X.", buckets=(1.0,)))
    histogram.observe(-5.0)
    assert histogram.read() == {(): Distribution((1, 0), 0.0)}


def test_what_is_not_declared_is_a_failure() -> None:
    page = exposition("test", (LEVEL,), lambda: {COUNT: {("a",): 3.0}}, process=False)
    with pytest.raises(KeyError, match="x_things_total"):
        page()


def test_a_process_tells_of_itself() -> None:
    found = shown(exposition("test", (), dict)().body)
    assert set(PROCESS) <= set(found)


def test_the_documentation_lists_every_metric_as_it_is_declared() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", DOC.read_text(), re.MULTILINE)
    wanted = [
        (metric.name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels) or "–", metric.help)
        for metric in DECLARED
    ]
    assert set(rows) == set(wanted)
    for name in PROCESS:
        assert f"`{name}`" in DOC.read_text()


def test_the_documentation_is_fresh() -> None:
    assert DOC.read_text() == gen_metrics_doc.document(), "run python tools/gen_metrics_doc.py"


def test_names_follow_the_conventions() -> None:
    by_name = {metric.name: metric for metric in DECLARED}
    assert all(by_name[metric.name] == metric for metric in DECLARED), "two metrics of one name"
    for metric in DECLARED:
        assert metric.name.startswith("dtrain_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert tuple(sorted(metric.buckets)) == metric.buckets
        if metric is not BUILD_INFO:
            assert set(metric.labels) <= LABELS, metric.name
