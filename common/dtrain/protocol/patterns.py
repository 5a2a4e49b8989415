"""Regular expressions of users that a leader searches texts for: only such as cannot hold it up.

Python's engine backtracks, and holds the interpreter's lock while it does: with nested repeats a few
lines of a log are work for years, and the leader's lease is over after seconds. So repeats do not nest,
there are few of them, and each line is searched for itself.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

LENGTH_MAX = 200
REPEATS_MAX = 2
"""Of ``*``, ``+`` and ``{m,n}`` in one expression: the work grows with a power of the line for each."""

CHOICES_MAX = 8
"""Of ``?`` and ``|``: each may double the work."""

LINE_MAX = 400
LINES_MAX = 100


def problem(pattern: str) -> str:
    """Return why ``pattern`` cannot be used, or ""."""
    if len(pattern) > LENGTH_MAX:
        return f"is longer than {LENGTH_MAX} characters"
    if "\0" in pattern:
        return "contains a NUL character"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    return _too_costly(pattern)


def found(pattern: str, texts: Iterable[str]) -> bool:
    """Whether a line of ``texts`` matches; False for a pattern that has a problem."""
    if _usable(pattern):
        return any(re.search(pattern, line[:LINE_MAX]) for text in texts for line in _lines(text))
    return False


def _lines(text: str) -> list[str]:
    return text.splitlines()[-LINES_MAX:]


@lru_cache(maxsize=256)
def _usable(pattern: str) -> bool:
    return not problem(pattern)


def _too_costly(pattern: str) -> str:
    repeats = choices = 0
    before = ""
    in_class = False
    at = 0
    while at < len(pattern):
        char = pattern[at]
        width = 2 if char == "\\" else 1
        if in_class:
            # The first character after [ or [^ may be a ] that closes nothing.
            in_class = char != "]"
        elif char == "[":
            in_class = True
            width = 3 if pattern[at + 1 : at + 3] == "^]" else 2 if pattern[at + 1 : at + 2] == "]" else 1
        elif char == "\\" and (pattern[at + 1 : at + 2].isdigit() and pattern[at + 1] != "0"):
            return "refers back to a group"
        elif char == "(" and pattern[at + 1 : at + 2] == "?" and pattern[at + 2 : at + 3] != ":":
            return "uses (?...) for something else than (?:...)"
        elif char in "*+{":
            if before == ")":
                return "repeats a group"
            repeats += 1
        elif char == "|" or (char == "?" and before not in "(*+}?"):
            choices += 1
        before = char if width == 1 else "x"
        at += width
    if repeats > REPEATS_MAX:
        return f"has more than {REPEATS_MAX} repeats (*, + and {{}})"
    return f"has more than {CHOICES_MAX} choices (? and |)" if choices > CHOICES_MAX else ""
