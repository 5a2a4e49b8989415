"""What chaos tells in the end: recovery times of each kind of fault, and everything that went wrong."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Struck:
    """One fault that struck. Times in seconds since it did; None: not yet."""

    number: int
    label: str
    what: str
    at_s: float
    """Since the run began."""
    works_s: float | None = None
    """There is a leader, and every job that trained does new steps on all ranks."""
    whole_s: float | None = None
    """The same, and everything that was registered is again."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "number": self.number,
            "kind": self.label,
            "what": self.what,
            "at_s": round(self.at_s, 3),
            "works_s": None if self.works_s is None else round(self.works_s, 3),
            "whole_s": None if self.whole_s is None else round(self.whole_s, 3),
        }


@dataclass(slots=True)
class Report:
    """The whole run."""

    seed: int
    struck: list[Struck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What did not recover or could not be healed, one sentence each."""
    violations: list[str] = field(default_factory=list)
    judged: tuple[int, int, int] = (0, 0, 0)
    """Revisions, terms and commits that the auditor judged."""
    took_s: float = 0.0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Everything recovered and no promise was broken."""
        return (
            not self.problems and not self.violations and all(one.whole_s is not None for one in self.struck)
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        revisions, terms, commits = self.judged
        return {
            "v": 1,
            "kind": "ChaosReport",
            "ok": self.ok,
            "seed": self.seed,
            "took_s": round(self.took_s, 1),
            "interrupted": self.interrupted,
            "faults": [row.to_json() for row in self.rows()],
            "struck": [one.to_json() for one in self.struck],
            "problems": self.problems,
            "violations": self.violations,
            "audited": {"revisions": revisions, "terms": terms, "commits": commits},
        }

    def rows(self) -> list["Row"]:
        """One row for each kind of fault that struck, and one for all."""
        labels = sorted({one.label for one in self.struck})
        rows = [Row.of(label, [one for one in self.struck if one.label == label]) for label in labels]
        return [*rows, Row.of("all", self.struck)] if len(rows) > 1 else rows

    def lines(self) -> list[str]:
        """The report for people."""
        head = f"{'fault':27} {'times':>5} {'recovered':>9} | {'works again':^26} | {'whole again':^17}"
        lines = [
            head,
            f"{'':27} {'':5} {'':9} | {'median':>8} {'p90':>8} {'max':>8} | {'median':>8} {'max':>8}",
        ]
        lines += [row.line() for row in self.rows()]
        revisions, terms, commits = self.judged
        if revisions or self.violations:
            verdict = f"{len(self.violations)} VIOLATIONS" if self.violations else "no violation"
            lines.append(f"audited: {revisions} revisions, {terms} terms, {commits} commits; {verdict}")
        lines += [f"  {text}" for text in self.violations[:20]]
        lines += [f"problem: {text}" for text in self.problems]
        lines.append(f"seed {self.seed}, {self.took_s:.0f} s" + (", interrupted" if self.interrupted else ""))
        return lines


@dataclass(frozen=True, slots=True)
class Row:
    """Recovery times of one kind of fault."""

    label: str
    count: int
    recovered: int
    works_s: tuple[float, ...]
    whole_s: tuple[float, ...]

    @classmethod
    def of(cls, label: str, struck: Sequence[Struck]) -> "Row":
        """Sum up."""
        works = tuple(sorted(one.works_s for one in struck if one.works_s is not None))
        whole = tuple(sorted(one.whole_s for one in struck if one.whole_s is not None))
        return cls(label, len(struck), len(whole), works, whole)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "kind": self.label,
            "count": self.count,
            "recovered": self.recovered,
            "works_s": _summary(self.works_s),
            "whole_s": _summary(self.whole_s),
        }

    def line(self) -> str:
        """As a line of the table."""
        works = [_text(self.works_s, part) for part in (0.5, 0.9, 1.0)]
        whole = [_text(self.whole_s, part) for part in (0.5, 1.0)]
        return (
            f"{self.label:27} {self.count:5} {self.recovered:9} | {works[0]} {works[1]} {works[2]} "
            f"| {whole[0]} {whole[1]}"
        )


def quantile(values: Sequence[float], part: float) -> float:
    """Return the smallest of the sorted ``values`` that ``part`` of them do not exceed; the usual median."""
    if part == 0.5:
        return statistics.median(values)
    return values[max(0, math.ceil(part * len(values)) - 1)]


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    parts = {"median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: round(quantile(values, part), 3) for name, part in parts.items()}


def _text(values: Sequence[float], part: float) -> str:
    return f"{quantile(values, part):7.2f}s" if values else f"{'-':>8}"
