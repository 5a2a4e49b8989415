"""Metrics: what is declared, shown and documented is the same."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dtrain.agent import metrics as of_agent
from dtrain.coordinator import metrics as of_coordinator
from dtrain.runtime.metrics import BUILD_INFO, PROCESS, Metric, exposition

DOC = Path(__file__).parents[3] / "docs" / "metrics.md"
DECLARED = (BUILD_INFO, *of_coordinator.METRICS, *of_agent.METRICS)

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
    assert sorted(rows) == sorted(wanted)
    for name in PROCESS:
        assert f"`{name}`" in DOC.read_text()


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in DECLARED]
    assert len(set(names)) == len(names)
    for metric in DECLARED:
        assert metric.name.startswith("dtrain_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
