"""How fast a store may be used: pure arithmetic, ``now`` is an argument.

Two limits. ``TokenBucket`` holds a cap that a person has set. ``AdaptiveRate``
finds the one that the store has in mind: it halves when the store says "slow
down", and doubles again while the store says nothing.
"""

import math

BURST_S = 0.25
"""A bucket that stood still lets this much of a second through at once."""

RATE_MIN = 1.0
"""Requests a second: below that a checkpoint would not end, and its deadline is the better answer."""

CUT = 0.5
CUT_PAUSE_S = 1.0
"""Refusals that close together are one event: the requests behind them left before the first was heard."""

DOUBLING_S = 20.0
FREE_FACTOR = 8.0
"""A rate that has grown to so much of the one that was refused bounds nothing any more."""

HINT_S_MAX = 30.0
"""A server that asks for a longer pause is asked again after this."""


class TokenBucket:
    """A cap in bytes per second. Not thread-safe.

    Bytes are paid for after they were taken: a piece larger than the bucket
    passes, and the next one waits for it.
    """

    def __init__(self, bytes_per_s: float) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"a cap of {bytes_per_s} bytes a second lets nothing through")
        self._rate = bytes_per_s
        self._tokens = bytes_per_s * BURST_S
        self._at = -math.inf

    def take(self, size: int, now: float) -> float:
        """Take ``size`` bytes; return after how many seconds they may leave."""
        if now > self._at:
            gained = (now - self._at) * self._rate
            self._tokens = min(self._rate * BURST_S, self._tokens + gained)
            self._at = now
        before = self._tokens
        self._tokens -= size
        return max(0.0, -before / self._rate)


class AdaptiveRate:
    """Requests a second that a store has shown to bear; unlimited until it complains. Not thread-safe."""

    def __init__(self) -> None:
        self._base = math.inf  # what was left after the last cut
        self._cut_at = 0.0
        self._free_at = -math.inf  # when the next request may leave
        self._pause_until = -math.inf
        self._second = -math.inf
        self._count = self._count_before = 0

    def rate(self, now: float) -> float:
        """Return the requests a second allowed now; infinite: no limit."""
        if math.isinf(self._base):
            return math.inf
        factor = 2 ** ((now - self._cut_at) / DOUBLING_S)
        return math.inf if factor >= FREE_FACTOR / CUT else self._base * factor

    def take(self, now: float) -> float:
        """Count one request; return after how many seconds it may leave."""
        if now - self._second >= 1.0:
            self._count_before = self._count if now - self._second < 2.0 else 0
            self._second, self._count = now, 0
        self._count += 1
        start = max(now, self._pause_until)
        rate = self.rate(now)
        if not math.isinf(rate):
            start = max(start, self._free_at)
            self._free_at = start + 1.0 / rate
        return start - now

    def slowed(self, now: float, hint_s: float = 0.0) -> None:
        """Take in that the store was too busy for a request; ``hint_s``: the pause it asks for."""
        self._pause_until = max(self._pause_until, now + min(hint_s, HINT_S_MAX))
        if now - self._cut_at < CUT_PAUSE_S and not math.isinf(self._base):
            return
        rate = self.rate(now)
        if math.isinf(rate):
            rate = float(max(self._count, self._count_before, 1))
        self._base = max(RATE_MIN, rate * CUT)
        self._cut_at = now
