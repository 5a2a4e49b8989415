"""Write what follows from the declared metrics and from deploy/grafana/alerts.yaml; --check proves it fresh.

The Grafana dashboard, and the copies of both that kustomize and helm need inside their own folders.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tools.dashboard import dashboard

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
ALERTS = DEPLOY / "grafana/alerts.yaml"
RULE_HEAD = """# Generated from deploy/grafana/alerts.yaml by tools/gen_monitoring.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: dtrain
  labels:
    app.kubernetes.io/name: dtrain
spec:
"""


def drawn() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def rules() -> str:
    """Return the rules as they stand in the file, from ``groups:`` on."""
    _, mark, groups = ALERTS.read_text().partition("groups:\n")
    assert mark, f"{ALERTS} has no groups"
    return mark + groups


def prometheus_rule() -> str:
    return RULE_HEAD + "".join(
        f"  {line}" if line.strip() else line for line in rules().splitlines(keepends=True)
    )


FILES: dict[str, Callable[[], str]] = {
    "grafana/dtrain.json": drawn,
    "kubernetes/components/monitoring/dashboard.json": drawn,
    "kubernetes/components/monitoring/prometheusrule.yaml": prometheus_rule,
    "helm/dtrain/files/dashboard.json": drawn,
    "helm/dtrain/files/alerts.yaml": rules,
}


def main() -> None:
    stale = []
    for name, make in FILES.items():
        path = DEPLOY / name
        if not path.exists() or path.read_text() != make():
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(make())
    if stale and "--check" in sys.argv:
        sys.exit(f"stale below deploy/: {', '.join(stale)}; run python -m tools.gen_monitoring")


if __name__ == "__main__":
    main()
