"""How far transfers are, told by the transfer process to its agent while something moves."""

import math
import time
from collections.abc import Callable

from dtrain.agent.transferring import Moved

TELL_EVERY_S = 1.0

QUIET_AFTER_S = 15.0
"""What moves no more is still told for so long: until its rate over the last seconds is known to be 0."""


class Observer:
    """Knows what has been told. For one thread."""

    def __init__(self, look: Callable[[], Moved], now: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._now = now
        self._told = Moved()
        self._moved_at = -math.inf

    def news(self) -> Moved | None:
        """Return how far everything is; None: nothing has moved for a while, or nothing runs."""
        found = self._look()
        if found != self._told:
            self._told, self._moved_at = found, self._now()
        if not (found.parts or found.fetches):
            return None
        return found if self._now() - self._moved_at <= QUIET_AFTER_S else None
