"""Users' regular expressions: the ordinary ones are used, the costly ones refused."""

import time

import pytest

from dtrain.protocol.patterns import found, problem


@pytest.mark.parametrize(
    "pattern",
    [
        "CUDA error",
        r"CUDA error: .*memory",
        r"Errno (5|28)",
        r"^OSError: \[Errno \d+\]",
        r"rank [0-9]* died",
        "colou?r",
    ],
)
def test_what_people_write_is_taken(pattern: str) -> None:
    assert problem(pattern) == ""


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a+)+$", "repeats a group"),
        (r"(x)\1", "refers back"),
        ("a(?=b)", "something else"),
        (".*a.*b.*c", "more than 2 repeats"),
        ("a?" * 20 + "a" * 20, "more than 8 choices"),
        ("(", "no regular expression"),
        ("x" * 201, "longer than"),
        ("[]*+]*a+b*c{1,9}", "more than 2 repeats"),
    ],
)
def test_what_could_hold_up_a_leader_is_refused(pattern: str, why: str) -> None:
    assert why in problem(pattern)
    assert not found(pattern, ["aaaa"])


def test_a_class_and_an_escape_are_no_repeats() -> None:
    assert problem(r"[]*+{]x\*\+\{") == ""
    assert found(r"[]*]\+", ["]+"])


def test_lines_are_searched_for_themselves() -> None:
    assert found("^beta$", ["alpha\nbeta\ngamma"])
    assert not found("alpha.*gamma", ["alpha\nbeta\ngamma"])


def test_the_worst_that_is_taken_ends_soon() -> None:
    begun = time.process_time()
    found("a*a*b", ["a" * 400] * 6)
    assert time.process_time() - begun < 5.0
