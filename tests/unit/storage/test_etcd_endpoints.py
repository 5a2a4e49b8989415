import random

import pytest

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.etcd.endpoints import BACKOFF_S_MAX, REST_S, Endpoints, backoff_s, parse_endpoint


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


URLS = ["http://a:1", "http://b:2", "http://c:3"]


def test_one_member_is_kept_until_it_fails() -> None:
    endpoints = Endpoints(URLS, HandClock(), random.Random(1))
    first = endpoints.in_order()[0]
    assert all(endpoints.in_order()[0] == first for _ in range(5))
    endpoints.failed(first)
    second = endpoints.in_order()[0]
    assert second != first
    assert endpoints.in_order()[-1] == first


def test_a_failed_member_rests_and_is_asked_again_later() -> None:
    clock = HandClock()
    endpoints = Endpoints(URLS, clock, random.Random(1))
    first, second, third = endpoints.in_order()
    endpoints.failed(first)
    endpoints.failed(second)
    assert endpoints.in_order() == [third, first, second]
    clock.now += REST_S
    assert endpoints.in_order() == [third, first, second]
    endpoints.failed(third)
    assert endpoints.in_order() == [first, second, third]


def test_a_member_that_works_stays_the_current_one() -> None:
    endpoints = Endpoints(URLS, HandClock(), random.Random(1))
    last = endpoints.in_order()[-1]
    endpoints.worked(last)
    assert endpoints.in_order()[0] == last


def test_clients_spread_over_the_members() -> None:
    firsts = {str(Endpoints(URLS, HandClock(), random.Random(seed)).in_order()[0]) for seed in range(30)}
    assert firsts == set(URLS)


def test_waits_grow_with_full_jitter_to_a_bound() -> None:
    rng = random.Random(3)
    assert all(0 <= backoff_s(0, rng) <= 0.05 for _ in range(100))
    late = [backoff_s(50, rng) for _ in range(200)]
    assert max(late) <= BACKOFF_S_MAX
    assert min(late) < 0.2 < 1.8 < max(late)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h:1", "http://h:1"),
        ("h:1", "http://h:1"),
        ("https://h", "https://h:2379"),
        ("http://[::1]:5/", "http://[::1]:5"),
    ],
)
def test_endpoints_are_read(text: str, shown: str) -> None:
    assert str(parse_endpoint(text)) == shown


@pytest.mark.parametrize(
    "text", ["", "ftp://h:1", "http://", "http://h:x", "http://h:1/path", "http://u@h:1"]
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_endpoint(text)
    assert caught.value.code is ErrorCode.BAD_SETTING
