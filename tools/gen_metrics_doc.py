"""Write the tables of docs/metrics.md from the declarations in code; --check proves them fresh."""

import sys
from collections.abc import Mapping
from pathlib import Path

from dtrain.agent import metrics as of_agent
from dtrain.coordinator import metrics as of_coordinator
from dtrain.runtime.metrics import BUILD_INFO, PROCESS, Metric

DOC = Path(__file__).parent.parent / "docs/metrics.md"
BEGIN = "<!-- Below this line: generated from the declarations by tools/gen_metrics_doc.py. -->"
SECTIONS: tuple[tuple[str, Mapping[str, tuple[Metric, ...]]], ...] = (
    ("Every daemon", {"": (BUILD_INFO,)}),
    ("A coordinator", of_coordinator.GROUPS),
    ("An agent", of_agent.GROUPS),
)


def table(metrics: tuple[Metric, ...]) -> list[str]:
    """Return one table; what a histogram's buckets are is below all of them."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return lines


def generated() -> str:
    """Return all tables."""
    lines: list[str] = []
    for title, groups in SECTIONS:
        lines += ["", f"## {title}"]
        for name, metrics in groups.items():
            lines += ["", *([f"**{name}**", ""] if name else []), *table(metrics)]
        if title == "Every daemon":
            names = ", ".join(f"`{name}`" for name in PROCESS)
            lines += [
                "",
                f"{names}: of the process that answers; its guardian and an agent's ranks are not in them.",
            ]
    histograms = {
        metric.name: metric.buckets
        for _, groups in SECTIONS
        for metrics in groups.values()
        for metric in metrics
        if metric.kind == "histogram"
    }
    lines += ["", "## Buckets", "", "| histogram | upper bounds, seconds |", "|---|---|"]
    lines += [
        f"| `{name}` | {', '.join(f'{one:g}' for one in bounds)} |" for name, bounds in histograms.items()
    ]
    return "\n".join(lines) + "\n"


def document() -> str:
    """Return the whole page as it should be."""
    head, mark, _ = DOC.read_text().partition(BEGIN)
    if not mark:
        sys.exit(f"{DOC} has lost its marker: {BEGIN}")
    return f"{head}{mark}\n{generated()}"


def main() -> None:
    fresh = document()
    if "--check" in sys.argv:
        if DOC.read_text() != fresh:
            sys.exit("docs/metrics.md is stale: run python tools/gen_metrics_doc.py")
        return
    DOC.write_text(fresh)


if __name__ == "__main__":
    main()
