"""What a source of preemption notices returns, and how texts of others become a line of ours."""

import datetime
from dataclasses import dataclass

REASON_CHARS_MAX = 160


@dataclass(frozen=True, slots=True)
class Notice:
    """This machine is about to go. ``reason``: one line, shown in events, the same as long as it is the same.

    ``left_s``: how many seconds from now on it may be used; None: that is not known.
    """

    reason: str
    left_s: float | None = None


def one_line(text: str) -> str:
    """Make anything a short line without control characters."""
    words = "".join(c if c.isprintable() else " " for c in text[: 4 * REASON_CHARS_MAX]).split()
    return " ".join(words)[:REASON_CHARS_MAX]


def epoch_s(text: str) -> float | None:
    """Read a time such as 2026-01-02T03:04:05Z; None: it is none."""
    if "T" not in text:
        return None
    try:
        found = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)).timestamp()
