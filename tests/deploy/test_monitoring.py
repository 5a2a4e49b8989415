"""Alert rules, dashboard and runbooks: they fit together, and name only what there is."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tools import gen_monitoring

from dtrain.agent import metrics as of_agent
from dtrain.coordinator import metrics as of_coordinator
from dtrain.runtime.metrics import BUILD_INFO, Metric
from tests.deploy.kube import CHART, KUSTOMIZE, ROOT, chart, find, kustomize
from tests.support.promtool import promtool

GRAFANA, RUNBOOKS = ROOT / "deploy/grafana", ROOT / "docs/runbooks"
DECLARED: dict[str, Metric] = {
    metric.name: metric for metric in (BUILD_INFO, *of_coordinator.METRICS, *of_agent.METRICS)
}
OF_TARGETS = {"cluster", "instance"}
"""Labels that Prometheus gives to whatever it scrapes."""


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Every query there is, with where it stands."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    drawn = json.loads((GRAFANA / "dtrain.json").read_text())
    for panel in drawn["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in drawn["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def declared(series: str) -> Metric | None:
    """The metric that a name in a query is of; None: there is none."""
    metric = DECLARED.get(series)
    if metric is None:
        metric = DECLARED.get(re.sub(r"_(bucket|count|sum)$", "", series))
        return metric if metric is not None and metric.kind == "histogram" else None
    return None if metric.kind == "histogram" else metric


@pytest.mark.parametrize(("where", "expr"), list(expressions()))
def test_a_query_names_metrics_and_labels_that_exist(where: str, expr: str) -> None:
    allowed = set(OF_TARGETS)
    used: set[str] = set()
    for series, matchers in re.findall(r"(dtrain_\w+)(?:\{([^}]*)\})?", expr):
        metric = declared(series)
        assert metric is not None, f"{where}: there is no {series}"
        labels = {*metric.labels, *(["le"] if series.endswith("_bucket") else [])}
        matched = set(re.findall(r"(\w+)\s*[=!]~?", matchers))
        assert matched <= labels | OF_TARGETS, f"{where}: {series} has no {matched - labels}"
        allowed |= labels
        if metric.kind == "counter" or series.endswith(("_bucket", "_count", "_sum")):
            # A count that is shown as it stands says nothing, unless its own record keeps it.
            kept = metric in of_coordinator.METRICS and "job" in metric.labels
            assert kept or re.search(rf"(rate|increase)\({series}", expr), f"{where}: {series} has no rate"
    for names in re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", expr):
        used |= {name.strip() for name in names.split(",")}
    assert used <= allowed, f"{where}: nothing has {used - allowed}"


def test_promtool_takes_the_rules_and_they_do_what_they_should() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "alerts.yaml", folder=GRAFANA)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml", folder=GRAFANA)


def test_every_alert_is_seen_to_come_and_to_stay_away() -> None:
    cases = yaml.safe_load((GRAFANA / "alerts_test.yaml").read_text())["tests"]
    tried = list(itertools.chain.from_iterable(case["alert_rule_test"] for case in cases))
    comes = {one["alertname"] for one in tried if one["exp_alerts"]}
    assert comes == {rule["alert"] for rule in alerts()}


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    pages = {path.name for path in RUNBOOKS.glob("*.md")} - {"README.md"}
    index = (RUNBOOKS / "README.md").read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        page = rule["annotations"]["runbook_url"].removeprefix("docs/runbooks/")
        text = (RUNBOOKS / page).read_text()
        assert text.startswith(f"# {rule['alert']}\n")
        assert all(f"\n## {part}\n" in text for part in ("See", "Do", "Worry"))
        assert f"[{rule['alert']}]({page})" in index
        pages.remove(page)
    assert not pages


def test_what_runbooks_link_to_exists() -> None:
    for page in RUNBOOKS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_dashboard_and_the_copies_are_fresh() -> None:
    for name, make in gen_monitoring.FILES.items():
        assert (gen_monitoring.DEPLOY / name).read_text() == make(), "run python -m tools.gen_monitoring"


def test_the_dashboard_has_a_row_for_each_part_and_no_panel_over_another() -> None:
    panels = json.loads((GRAFANA / "dtrain.json").read_text())["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    for row in ("Leadership", "etcd", "Jobs", "Goodput", "Checkpoints", "Agents", "Store"):
        assert row in rows
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dtrain_s_own_label_is_kept_wherever_it_is_scraped() -> None:
    monitors = [
        find(kustomize(KUSTOMIZE / "overlays/production"), "ServiceMonitor", "dtrain"),
        find(chart("serviceMonitor.enabled=true"), "ServiceMonitor", "dtrain"),
    ]
    assert all(monitor["spec"]["endpoints"][0]["honorLabels"] for monitor in monitors)
    scraped = yaml.safe_load((ROOT / "deploy/compose/monitoring/prometheus.yaml").read_text())
    ours = [job for job in scraped["scrape_configs"] if job["job_name"] in ("coordinator", "agent")]
    assert [job["honor_labels"] for job in ours] == [True, True]


def test_the_chart_and_kustomize_ship_the_same_rules_and_dashboard() -> None:
    given = chart("prometheusRule.enabled=true", "grafanaDashboard.enabled=true")
    rule = find(given, "PrometheusRule", "dtrain")
    theirs = kustomize(KUSTOMIZE / "overlays/production")
    assert rule["spec"] == find(theirs, "PrometheusRule", "dtrain")["spec"]
    mine, other = (
        find(given, "ConfigMap", "dtrain-dashboard"),
        find(theirs, "ConfigMap", "dtrain-dashboard"),
    )
    assert json.loads(mine["data"]["dtrain.json"]) == json.loads(other["data"]["dtrain.json"])
    assert (CHART / "files/alerts.yaml").exists()


def test_the_chart_names_runbooks_where_they_are_served() -> None:
    given = chart("prometheusRule.enabled=true", "prometheusRule.runbookBase=https://wiki.example.com/dtrain")
    spec = find(given, "PrometheusRule", "dtrain")["spec"]
    found = {rule["annotations"]["runbook_url"] for group in spec["groups"] for rule in group["rules"]}
    assert "https://wiki.example.com/dtrain/no-leader.md" in found
    assert all(url.startswith("https://wiki.example.com/dtrain/") for url in found)
