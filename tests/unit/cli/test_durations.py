"""Durations and sizes, both ways."""

import pytest

from dtrain.cli.durations import parse_s, show_bytes, show_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (5, 5.0),
        (0.5, 0.5),
        ("30", 30.0),
        ("30s", 30.0),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("500ms", 0.5),
        ("2d", 172800.0),
        ("1.5h", 5400.0),
    ],
)
def test_what_is_read(text: object, seconds: float) -> None:
    assert parse_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", -5, True, None, "5 parsecs", "1h 30m", float("nan"), "m5", []]
)
def test_what_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_s(text)


def test_how_they_are_shown() -> None:
    assert [show_s(x) for x in (0, 0.25, 41, 192, 3600, 3660, 90061)] == [
        "0s",
        "250ms",
        "41s",
        "3m12s",
        "1h",
        "1h1m",
        "1d1h",
    ]
    assert [show_bytes(x) for x in (0, 999, 1200, 1.2e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.2 kB",
        "1.2 GB",
        "5.0 TB",
    ]
