"""Time as a value that is passed in.

Deadlines use ``Clock.monotonic``; ``Clock.wall`` is for people only. The
monotonic clock is CLOCK_BOOTTIME, which also counts the time a machine was
suspended: a leader that slept through its lease must see that on waking.
"""

import datetime
import time
from typing import Protocol


class Clock(Protocol):
    """Source of time of one process."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary instant; never steps, counts suspension."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch, for people and records; may step."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return time.time()


def iso(wall_s: float) -> str:
    """Format a wall-clock time as UTC ISO-8601 with milliseconds."""
    moment = datetime.datetime.fromtimestamp(wall_s, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
