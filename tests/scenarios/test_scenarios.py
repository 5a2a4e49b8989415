"""Every scenario still tells the story that is written in it."""

import difflib
from pathlib import Path

import pytest

from tests.scenarios.script import ScriptError, parse, play, render

FOLDER = Path(__file__).parent
SCENARIOS = sorted(FOLDER.glob("*.txt"))
LINES_MAX = 75


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_story_is_still_the_same(path: Path, rewrite: bool) -> None:
    written = path.read_text()
    played = play(written)
    if rewrite:
        path.write_text(played)
        return
    diff = "\n".join(
        difflib.unified_diff(
            written.splitlines(), played.splitlines(), f"{path.name} as written", "as it went", lineterm=""
        )
    )
    if diff:
        pytest.fail(f"{diff}\n\nIf that is right: pytest tests/scenarios --rewrite, and read the diff.")


def test_a_run_is_the_same_every_time() -> None:
    text = (FOLDER / "submit_to_success.txt").read_text()
    assert play(text) == play(text)


def test_a_line_that_is_not_what_happened_is_noticed() -> None:
    text = "agents a1\n----\na1: registered\n"
    assert play(text) != text.replace("registered", "lost")
    assert "a1: registered" in play(text)


def test_a_scenario_is_written_as_it_was_read() -> None:
    for path in SCENARIOS:
        text = path.read_text()
        assert render(parse(text)) == text


def test_no_story_is_too_long_to_be_read() -> None:
    assert len(SCENARIOS) >= 10
    for path in SCENARIOS:
        assert len(path.read_text().splitlines()) <= LINES_MAX, path.name


def test_what_nobody_understands_is_refused() -> None:
    with pytest.raises(ScriptError, match="no command 'frobnicate'"):
        play("frobnicate a1\n")
    with pytest.raises(ScriptError, match="nobody knows when"):
        play("until doomsday\n")
