"""One measure's result, the table and the file."""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True, slots=True)
class Result:
    """``ours`` and ``peer`` are medians; ``spread`` is the range of ours; ``ratio`` is ours / peer."""

    measure: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    bar: str
    holds: bool
    runs: int
    spread: tuple[float, float]
    machine: str = ""


def result(
    measure: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    *,
    ours_max: float | None = None,
    ours_min: float | None = None,
    ratio_max: float | None = None,
) -> Result:
    """Summarise the runs of one measure against its bar."""
    mine = statistics.median(ours)
    theirs = statistics.median(peer) if peer else None
    ratio = mine / theirs if theirs else None
    bars = []
    holds = True
    if ours_max is not None:
        bars.append(f"<= {ours_max:g} {unit}")
        holds = holds and mine <= ours_max
    if ours_min is not None:
        bars.append(f">= {ours_min:g} {unit}")
        holds = holds and mine >= ours_min
    if ratio_max is not None:
        bars.append(f"<= {ratio_max:g}x {peer_name}")
        holds = holds and ratio is not None and ratio <= ratio_max
    return Result(
        measure,
        unit,
        round(mine, 4),
        None if theirs is None else round(theirs, 4),
        peer_name,
        None if ratio is None else round(ratio, 4),
        " and ".join(bars),
        holds,
        len(ours),
        (round(min(ours), 4), round(max(ours), 4)),
    )


def write(results: Sequence[Result]) -> None:
    """Put the results into the file, each in place of an older one of the same measure and peer."""
    machine = _machine()
    fresh = [json.dumps(dataclasses.asdict(dataclasses.replace(item, machine=machine))) for item in results]
    new = {(item.measure, item.peer_name) for item in results}
    before = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [line for line in before if _of(line) not in new]
    RESULTS.write_text("".join(line + "\n" for line in kept + fresh))


def _of(line: str) -> tuple[str, str]:
    document = json.loads(line)
    return document["measure"], document["peer_name"]


def _machine() -> str:
    """What it ran on, and how quiet that was."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    versions = (
        f"Linux {platform.release()}, Python {platform.python_version()}, torch {metadata.version('torch')}"
    )
    return f"{os.cpu_count()} cores of {model}, {versions}; nice {os.nice(0)}, load {os.getloadavg()[0]:.1f}"


def table(results: Sequence[Result]) -> str:
    """Lay the results out for a terminal."""
    rows = [("measure", "ours", "spread", "peer", "ratio", "bar", "holds")]
    for item in results:
        rows.append(  # noqa: PERF401 - a generator of this length reads worse
            (
                item.measure,
                f"{item.ours:.3g} {item.unit}",
                f"{item.spread[0]:.3g}-{item.spread[1]:.3g} ({item.runs})",
                "-" if item.peer is None else f"{item.peer:.3g} ({item.peer_name})",
                "-" if item.ratio is None else f"{item.ratio:.3g}x",
                item.bar,
                "yes" if item.holds else "NO",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )
