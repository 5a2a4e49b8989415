"""Lines of logs: cut, timed, merged and filtered."""

import re

import pytest

from dtrain.cli.loglines import LINE_BYTES_MAX, Cutter, Filter, Line, last, merged

MARKS = ((4, 1000), (8, 3000))


def line(rank: int, at_ms: int, text: str = "x") -> Line:
    return Line("a1", 1, rank, "stdout", text.encode(), at_ms)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_lines_have_the_time_of_their_first_byte_however_they_are_cut(step: int) -> None:
    data, cutter, found = b"a\nb\nc\nd", Cutter(), []
    for at in range(0, len(data), step):
        found += cutter.feed(data[at : at + step], at, MARKS)
    assert [*found, *cutter.flush()] == [(1000, b"a\n"), (1000, b"b\n"), (3000, b"c\n"), (3000, b"d")]


def test_a_clock_that_was_set_back_does_not_reorder_a_log() -> None:
    assert [at for at, _ in Cutter().feed(b"a\nb\n", 0, ((2, 5000), (4, 1000)))] == [5000, 5000]


def test_without_marks_a_line_has_no_time() -> None:
    assert list(Cutter().feed(b"a\n", 0, ())) == [(0, b"a\n")]


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    cutter, pieces = Cutter(), 0
    for n in range(40):
        pieces += len(list(cutter.feed(b"x" * 100_000, n * 100_000, ())))
        assert cutter.unfinished <= LINE_BYTES_MAX
    assert pieces == 3


def test_logs_are_merged_by_time_and_each_keeps_its_order() -> None:
    first = [line(0, 1, "a"), line(0, 1, "b"), line(0, 5, "c")]
    second = [line(1, 1, "d"), line(1, 3, "e")]
    assert [found.text for found in merged([first, second])] == [b"a", b"b", b"d", b"e", b"c"]


def test_since_keeps_lines_whose_time_is_not_known() -> None:
    keep = Filter(since_ms=100)
    assert [keep(line(0, at)) for at in (0, 99, 100)] == [True, False, True]


def test_grep_finds_a_pattern_in_any_bytes() -> None:
    keep = Filter(pattern=re.compile("loss=nan"))
    assert keep(Line("a", 1, 0, "stdout", b"\xff loss=nan\n"))
    assert not keep(Line("a", 1, 0, "stdout", b"loss=1\n"))


def test_the_last_lines_are_those_at_the_end() -> None:
    assert [found.at_ms for found in last([line(0, n) for n in range(5)], 2)] == [3, 4]
