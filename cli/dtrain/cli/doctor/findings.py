"""What a check finds. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured, in one sentence, and what to do; ``fix`` is "" where nothing needs to be."""

    level: Level
    measured: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. ``probe`` measures and judges; it may raise, which is a failure too."""

    scope: str
    name: str
    probe: Callable[[], Iterable[Verdict]]
    limit_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict with its place."""

    scope: str
    check: str
    level: Level
    measured: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields of ``-o json``."""
        return {
            "scope": self.scope,
            "check": self.check,
            "level": self.level.value,
            "measured": self.measured,
            "fix": self.fix,
        }


def passed(measured: str) -> Verdict:
    """It is as it should be."""
    return Verdict(Level.PASS, measured)


def warn(measured: str, fix: str) -> Verdict:
    """It works, and will not for ever, or not as well as it could."""
    return Verdict(Level.WARN, measured, fix)


def fail(measured: str, fix: str) -> Verdict:
    """Jobs will not run, or not survive what they should."""
    return Verdict(Level.FAIL, measured, fix)


def skipped(why: str, fix: str = "") -> Verdict:
    """It could not be looked at."""
    return Verdict(Level.SKIPPED, why, fix)
