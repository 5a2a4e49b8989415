"""What words on the command line select."""

import pytest

from dtrain.cli import selecting
from dtrain.cli.selecting import Selection
from dtrain.protocol.errors import NotFound, Refused
from dtrain.protocol.phases import JobPhase
from dtrain.protocol.rows import JobRow

ROWS = [
    JobRow("digits", JobPhase.RUNNING, labels={"team": "vision", "gpu": ""}),
    JobRow("digits-2", JobPhase.FAILED, labels={"team": "text"}),
    JobRow("sweep-1", JobPhase.QUEUED),
    JobRow("sweep-2", JobPhase.SUCCEEDED, labels={"team": "vision"}),
]


def chosen(*names: str, phases: str = "", labels: str = "") -> list[str]:
    selection = Selection(names, selecting.phases([phases]), selecting.labels([labels]))
    return [row.name for row in selection.choose(ROWS, "job")]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), ["digits", "digits-2", "sweep-1", "sweep-2"]),
        (("digits",), ["digits"]),
        (("job/digits-",), ["digits-2"]),
        (("sweep-*",), ["sweep-1", "sweep-2"]),
        (("nothing*",), []),
        (("sweep-2", "digits"), ["digits", "sweep-2"]),
    ],
)
def test_names_beginnings_and_patterns(names: tuple[str, ...], found: list[str]) -> None:
    assert chosen(*names) == found


def test_a_beginning_of_several_is_refused_and_an_unknown_name_is_not_found() -> None:
    with pytest.raises(Refused, match="could be sweep-1, sweep-2"):
        chosen("sweep")
    with pytest.raises(NotFound):
        chosen("nobody")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("running", ["digits"]),
        ("FAILED,queued", ["digits-2", "sweep-1"]),
        ("active", ["digits", "sweep-1"]),
        ("finished", ["digits-2", "sweep-2"]),
    ],
)
def test_phases_and_groups_of_them(text: str, found: list[str]) -> None:
    assert chosen(phases=text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("team=vision", ["digits", "sweep-2"]),
        ("team==vision,gpu", ["digits"]),
        ("team!=vision", ["digits-2", "sweep-1"]),
        ("!team", ["sweep-1"]),
        ("gpu=", ["digits"]),
    ],
)
def test_labels(text: str, found: list[str]) -> None:
    assert chosen(labels=text) == found


@pytest.mark.parametrize("text", ["=x", "a=b=c", "!a=b", "!"])
def test_what_selects_nothing_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="selects nothing"):
        selecting.labels([text])


def test_a_misspelt_phase_gets_a_suggestion() -> None:
    with pytest.raises(Refused) as caught:
        selecting.phases(["runing"])
    assert caught.value.fix == "did you mean RUNNING?"
    with pytest.raises(Refused):
        selecting.states(["sleepy"])
