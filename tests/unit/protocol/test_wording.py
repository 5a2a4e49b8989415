"""Long lists in sentences."""

import pytest

from dtrain.protocol.wording import more, some


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, ""), (1, "r0"), (2, "r0, r1"), (3, "r0, r1 and 1 more"), (1000, "r0, r1 and 998 more")],
)
def test_a_few_are_named_and_the_rest_is_counted(count: int, told: str) -> None:
    assert some((f"r{number}" for number in range(count)), 2) == told


def test_whole_sentences_keep_their_sign() -> None:
    assert some(["a is full", "b is gone", "c"], 2, between="; ") == "a is full; b is gone; and 1 more"
    assert some(["a is full", "b is gone"], 2, between="; ") == "a is full; b is gone"


def test_numbers_are_named_as_they_are() -> None:
    assert some([3, 1, 2], 2) == "3, 1 and 1 more"


def test_nothing_is_said_of_none_left_out() -> None:
    assert [more(total, 2) for total in (0, 2, 3)] == ["", "", " and 1 more"]
