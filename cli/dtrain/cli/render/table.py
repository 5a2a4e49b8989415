"""A table of text, and ages for its columns. Pure."""

import datetime
from dataclasses import dataclass

from dtrain.cli import terminal
from dtrain.cli.durations import show_s

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows of text; the last column may be cut to the width."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def lines(self, width: int = 0) -> list[str]:
        """Aligned lines, each cut to ``width`` if it is given."""
        table = [tuple(terminal.text(cell) for cell in row) for row in (self.headings, *self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.headings))]
        lines = []
        for row in table:
            cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
            line = "   ".join(cells).rstrip()
            lines.append(line if not width or len(line) <= width else line[: max(1, width - 1)] + "…")
        return lines


def age_s(since: str, now: float) -> float | None:
    """Seconds from an ISO-8601 time until ``now`` (epoch seconds); None if it cannot be read."""
    try:
        return max(0.0, now - datetime.datetime.fromisoformat(since).timestamp())
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class When:
    """How times are shown: as ages for people, or as they are stored (UTC, ISO-8601)."""

    now: float
    iso: bool = False

    def __call__(self, since: str) -> str:
        """A cell for the time ``since``."""
        seconds = age_s(since, self.now)
        if seconds is None:
            return UNKNOWN
        return since if self.iso else show_s(seconds)


def ago(since: str, now: float) -> str:
    """An age for a column."""
    return When(now)(since)
