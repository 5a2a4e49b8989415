"""The Grafana dashboard as a table: rows of panels, each with its queries on declared metrics.

``gen_monitoring.py`` writes it. Names come from the declarations, so that a metric that is
renamed or goes takes its panel along or fails here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.agent import metrics as a
from dtrain.coordinator import metrics as c
from dtrain.runtime.metrics import BUILD_INFO, Metric
from dtrain.storage.blobs import metered as store
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS
from dtrain.storage.etcd import lease_metrics as lease
from dtrain.storage.etcd import metered as etcd

HEIGHT, WIDTH, COLUMNS = 8, 8, 24
RATE = "$__rate_interval"
JOB = 'job=~"$job"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: what it answers, in which unit, from which queries (expression, legend)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False


def quantiles(metric: Metric, by: str = "", legend: str = "", where: str = "") -> tuple[tuple[str, str], ...]:
    """Return the median and the 99th percentile of a histogram, by one of its labels or none."""
    groups = f"le, {by}" if by else "le"
    chosen = f"{metric.name}_bucket{{{where}}}" if where else f"{metric.name}_bucket"
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({groups}) (rate({chosen}[{RATE}])))",
            f"p{q * 100:g} {legend}".strip(),
        )
        for q in (0.5, 0.99)
    )


def rate(metric: Metric, by: str, legend: str, where: str = "") -> tuple[tuple[str, str], ...]:
    """Return the rate of a counter of processes."""
    chosen = f"{metric.name}{{{where}}}" if where else metric.name
    return ((f"sum by ({by}) (rate({chosen}[{RATE}]))", legend),)


def of_job(metric: Metric, by: str = "job", legend: str = "{{job}}") -> tuple[tuple[str, str], ...]:
    """Return a job's value, once: in the moments of a failover two replicas may show it."""
    return ((f"max by ({by}) ({metric.name}{{{JOB}}})", legend),)


ROWS: Mapping[str, Sequence[Panel]] = {
    "Leadership": (
        Panel("Who leads", "short", ((c.IS_LEADER.name, "{{instance}}"),), stacked=True),
        Panel("Term", "none", ((f"max ({c.TERM.name})", "term"),)),
        Panel("Takeover", "s", quantiles(c.TAKEOVER_SECONDS)),
        Panel("Renewing leases", "s", quantiles(lease.RENEW_SECONDS)),
        Panel("Lease left", "s", ((f"min by (instance) ({lease.REMAINING.name})", "{{instance}}"),)),
        Panel(
            "Brake, refused decisions, killed processes, problems",
            "short",
            (
                (f"max ({c.BRAKE_ON.name})", "brake"),
                (f"sum (increase({c.FENCED.name}[{RATE}]))", "refused"),
                (f"sum by (reason) (increase({lease.KILLED.name}[{RATE}]))", "killed: {{reason}}"),
                (f"sum by (instance) ({c.PROBLEMS.name})", "problems of {{instance}}"),
            ),
        ),
    ),
    "etcd": (
        Panel(
            "Calls", "reqps", ((f"sum by (op) (rate({etcd.REQUEST_SECONDS.name}_count[{RATE}]))", "{{op}}"),)
        ),
        Panel("How long they take", "s", quantiles(etcd.REQUEST_SECONDS, "op", "{{op}}")),
        Panel("Errors", "reqps", rate(etcd.ERRORS, "op, code", "{{op}} {{code}}")),
        Panel("Age of the copies", "s", ((f"max by (instance) ({c.MIRROR_AGE.name})", "{{instance}}"),)),
        Panel(
            "Everything read anew",
            "short",
            ((f"sum by (reason) (increase({c.RELISTS.name}[{RATE}]))", "{{reason}}"),),
        ),
        Panel(
            "Database", "bytes", ((f"max ({c.DB_SIZE.name})", "size"), (f"max ({c.DB_QUOTA.name})", "quota"))
        ),
    ),
    "Decisions": (
        Panel("Deciding about one job", "s", quantiles(c.PLAN_SECONDS)),
        Panel("Commands to agents", "s", quantiles(c.COMMAND_SECONDS, "kind", "{{kind}}")),
        Panel(
            "What failed",
            "reqps",
            (
                (f"sum (rate({c.PLAN_FAILURES.name}[{RATE}]))", "decisions that crashed"),
                *rate(c.COMMAND_FAILURES, "kind, code", "{{kind}} {{code}}"),
            ),
        ),
    ),
    "Jobs": (
        Panel("Jobs by phase", "short", ((f"max by (phase) ({c.JOBS.name})", "{{phase}}"),), stacked=True),
        Panel("Step", "short", of_job(c.STEP)),
        Panel(
            "Since the last step",
            "s",
            ((f"time() - max by (job) ({c.PROGRESS_AT.name}{{{JOB}}})", "{{job}}"),),
        ),
        Panel(
            "Time per step",
            "s",
            quantiles(a.STEP_SECONDS, "job", "{{job}}", JOB),
        ),
        Panel("Attempts", "short", of_job(c.ATTEMPTS, "job, reason", "{{job}}: {{reason}}")),
        Panel("Slow machines", "none", of_job(c.STRAGGLER, "job, agent", "{{job}} on {{agent}}")),
    ),
    "Goodput": (
        Panel("Goodput", "percentunit", of_job(c.GOODPUT)),
        Panel(
            "Where the time goes",
            "s",
            ((f"sum by (category) (max by (job, category) ({c.TIME.name}{{{JOB}}}))", "{{category}}"),),
            stacked=True,
        ),
        Panel("Standing still for snapshots", "s", rate(a.STALL, "job", "{{job}}", JOB)),
    ),
    "Checkpoints": (
        Panel("Stages", "s", quantiles(STAGE_SECONDS, "stage", "{{stage}}")),
        Panel("Bytes", "Bps", rate(a.BYTES, "direction", "{{direction}}")),
        Panel("Last commit", "s", ((f"time() - max by (job) ({c.COMMITTED_AT.name}{{{JOB}}})", "{{job}}"),)),
        Panel("Committed", "short", of_job(c.COMMITS)),
        Panel("Not committed", "short", of_job(c.CHECKPOINT_FAILURES, "job, reason", "{{job}}: {{reason}}")),
        Panel("Restored from", "Bps", rate(a.RESTORED, "kind", "{{kind}}")),
    ),
    "Agents": (
        Panel(
            "Agents by state", "short", ((f"max by (state) ({c.AGENTS.name})", "{{state}}"),), stacked=True
        ),
        Panel(
            "Ranks by state",
            "short",
            ((f"sum by (job, state) ({a.RANKS.name}{{{JOB}}})", "{{job}} {{state}}"),),
            stacked=True,
        ),
        Panel(
            "Ranks that ended",
            "short",
            ((f"sum by (job, reason) (increase({a.EXITS.name}{{{JOB}}}[{RATE}]))", "{{job}} {{reason}}"),),
        ),
        Panel(
            "Machines cut off from etcd",
            "short",
            ((f'sum by (state) ({a.LINK.name}{{state!="ok"}})', "{{state}}"),),
        ),
        Panel("Slots", "short", ((f"sum ({a.SLOTS.name})", "slots"), (f"sum ({a.RANKS.name})", "ranks"))),
        Panel(
            "Releases",
            "short",
            ((f"count by (role, version) ({BUILD_INFO.name})", "{{role}} {{version}}"),),
            stacked=True,
        ),
    ),
    "Store": (
        Panel(
            "Requests",
            "reqps",
            ((f"sum by (op) (rate({store.REQUEST_SECONDS.name}_count[{RATE}]))", "{{op}}"),),
        ),
        Panel("How long they take", "s", quantiles(store.REQUEST_SECONDS, "op", "{{op}}")),
        Panel("To be tried again", "reqps", rate(store.RETRIES, "op, code", "{{op}} {{code}}")),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return what Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            }
        )
        top += 1
        for number, panel in enumerate(row):
            at = {
                "h": HEIGHT,
                "w": WIDTH,
                "x": number * WIDTH % COLUMNS,
                "y": top + number * WIDTH // COLUMNS * HEIGHT,
            }
            panels.append(_graph(panel, at))
        top += -(-len(row) * WIDTH // COLUMNS) * HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "uid": "dtrain",
        "title": "dtrain",
        "tags": ["dtrain"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "type": "datasource",
                    "query": "prometheus",
                    "label": "Source",
                },
                {
                    "name": "job",
                    "type": "query",
                    "label": "Job",
                    "datasource": SOURCE,
                    "query": {"query": f"label_values({c.STEP.name}, job)", "refId": "jobs"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": ["All"], "value": ["$__all"]},
                },
            ]
        },
        "panels": panels,
    }


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _graph(panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 15 if panel.stacked else 0, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
            for number, (expr, legend) in enumerate(panel.queries)
        ],
    }
