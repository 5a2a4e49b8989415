"""The arithmetic of how fast a store may be used."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.storage.blobs.pace import (
    BURST_S,
    CUT,
    DOUBLING_S,
    HINT_S_MAX,
    RATE_MIN,
    AdaptiveRate,
    TokenBucket,
)


@given(
    rate=st.floats(1.0, 1e9),
    sizes=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=50),
    gaps=st.lists(st.floats(0.0, 0.5), min_size=50, max_size=50),
)
def test_no_more_leaves_than_the_cap_lets_through(rate: float, sizes: list[int], gaps: list[float]) -> None:
    bucket, now, sent = TokenBucket(rate), 100.0, 0
    for size, gap in zip(sizes, gaps, strict=False):
        # One sender that waits as it is told: what had left before a piece fits the time that it took.
        now += gap + bucket.take(size, now + gap)
        assert sent <= rate * (now - 100.0 + BURST_S) * (1 + 1e-9) + 1e-6
        sent += size


def test_a_cap_is_used_up_and_not_undercut() -> None:
    bucket, now = TokenBucket(1000.0), 0.0
    for _ in range(100):
        now += bucket.take(100, now)
    assert now == pytest.approx((100 * 100 - 100) / 1000.0 - BURST_S, abs=0.11)


def test_several_senders_share_one_cap() -> None:
    bucket = TokenBucket(1000.0)
    waits = [bucket.take(250, 0.0) for _ in range(5)]
    assert waits == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.75])


def test_a_cap_of_nothing_is_a_bug() -> None:
    with pytest.raises(ValueError, match="nothing through"):
        TokenBucket(0.0)


def at(rate: AdaptiveRate, per_s: float, begin: float, seconds: float) -> float:
    now = begin
    while now < begin + seconds:
        rate.take(now)
        now += 1.0 / per_s
    return now


def test_without_a_complaint_nothing_waits() -> None:
    rate = AdaptiveRate()
    assert {rate.take(i / 1000) for i in range(5000)} == {0.0}
    assert math.isinf(rate.rate(5.0))


def test_a_complaint_halves_what_was_asked_and_requests_are_spaced() -> None:
    rate = AdaptiveRate()
    now = at(rate, 40.0, 0.0, 2.5)
    rate.slowed(now)
    assert rate.rate(now) == pytest.approx(40.0 * CUT, rel=0.1)
    waits = [rate.take(now) for _ in range(4)]
    assert waits == sorted(waits)
    assert waits[3] - waits[2] == pytest.approx(1.0 / rate.rate(now))


def test_complaints_that_come_together_are_one() -> None:
    rate = AdaptiveRate()
    now = at(rate, 40.0, 0.0, 2.5)
    for i in range(8):
        rate.slowed(now + i * 0.01)
    assert rate.rate(now + 0.1) == pytest.approx(40.0 * CUT, rel=0.1)
    rate.slowed(now + 2.0)
    assert rate.rate(now + 2.0) == pytest.approx(40.0 * CUT * CUT, rel=0.15)


def test_it_never_falls_below_what_a_checkpoint_needs() -> None:
    rate = AdaptiveRate()
    for i in range(20):
        rate.slowed(10.0 + 2 * i)
    assert rate.rate(48.0) == RATE_MIN


def test_it_grows_back_and_forgets() -> None:
    rate = AdaptiveRate()
    now = at(rate, 40.0, 0.0, 2.5)
    rate.slowed(now)
    low = rate.rate(now)
    assert rate.rate(now + DOUBLING_S) == pytest.approx(2 * low)
    assert math.isinf(rate.rate(now + 5 * DOUBLING_S))
    assert rate.take(now + 5 * DOUBLING_S) == 0.0


def test_a_pause_that_is_asked_for_is_kept_up_to_a_bound() -> None:
    rate = AdaptiveRate()
    rate.take(0.0)
    rate.slowed(0.0, 3.0)
    assert rate.take(1.0) == pytest.approx(2.0)
    rate.slowed(1.5, 3600.0)
    assert rate.take(2.0) <= HINT_S_MAX + 2.0
