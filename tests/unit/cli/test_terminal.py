"""Colours and what changes in place: on real pseudo terminals that want them, and nowhere else."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.tty import Terminal
from tests.unit.cli.fakes import JOB, KEYS, FakeReplica, item, running_job, spec, status

from dtrain.cli import exits
from dtrain.cli.main import run
from dtrain.protocol.job import JobPhase

COMMAND = (sys.executable, "-m", "dtrain.cli")
WANTED = ("NO_COLOR", "FORCE_COLOR", "TERM")
COLOURED = {
    ("get", "jobs"): ("RUNNING", "green"),
    ("describe", "job", "digits"): ("RUNNING", "green"),
    # Whether it passes or fails, it is coloured.
    ("doctor", "--only", "coordinators"): ("coordinators/", None),
    ("watch", "digits"): ("RUNNING", "green"),
}
Words = tuple[str, ...]


@pytest.fixture
def env(replica: FakeReplica, address: str, tmp_path: Path) -> dict[str, str]:
    replica.items = running_job()
    kept = {name: value for name, value in os.environ.items() if name not in WANTED}
    return kept | {"DTRAIN_COORDINATORS": address, "XDG_CONFIG_HOME": str(tmp_path / "config")}


def on_terminal(words: Words, env: Mapping[str, str]) -> Terminal:
    """What stands on a terminal once the command has ended, or has said enough of what it watches."""
    with Terminal((*COMMAND, *words), env=env, columns=160, lines=60) as terminal:
        if words[0] == "watch":
            terminal.shows(COLOURED[words][0])
        else:
            terminal.until("it ends", lambda: terminal.process.poll() is not None)
        terminal.draw(0.2)
    return terminal


def into_pipe(words: Words, env: Mapping[str, str]) -> str:
    done = subprocess.run(
        [*COMMAND, *words], env=env, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode in (exits.OK, exits.CHECK_FAILED)
    return done.stdout


def colours(terminal: Terminal) -> set[str]:
    return {cell.fg for row in terminal.screen.buffer.values() for cell in row.values()} - {"default"}


def colour_of(terminal: Terminal, word: str) -> str:
    for number, line in enumerate(terminal.screen.display):
        if (place := line.find(f" {word}")) >= 0:
            found: str = terminal.screen.buffer[number][place + 1].fg
            return found
    raise AssertionError(f"{word} is not on the screen\n{terminal.text}")


@pytest.mark.parametrize("words", COLOURED, ids=" ".join)
def test_a_terminal_gets_colours(words: Words, env: dict[str, str]) -> None:
    terminal = on_terminal(words, env)
    word, wanted = COLOURED[words]
    if wanted is None:
        assert colours(terminal), terminal.text
    else:
        assert colour_of(terminal, word) == wanted
    assert word in terminal.text


@pytest.mark.parametrize("said", [{"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
@pytest.mark.parametrize("words", COLOURED, ids=" ".join)
def test_a_terminal_that_wants_no_colours_gets_no_escape_sequence(
    words: Words, said: dict[str, str], env: dict[str, str]
) -> None:
    terminal = on_terminal(words, env | said)
    assert COLOURED[words][0] in terminal.text
    assert b"\x1b" not in terminal.written


@pytest.mark.parametrize("words", [words for words in COLOURED if words[0] != "watch"], ids=" ".join)
def test_a_pipe_gets_colours_only_by_force(words: Words, env: dict[str, str]) -> None:
    # As a shell's own setting for another program might be: empty says nothing, and 0 says no.
    assert "\x1b" not in into_pipe(words, env | {"FORCE_COLOR": "0", "NO_COLOR": ""})
    assert "\x1b[3" in into_pipe(words, env | {"FORCE_COLOR": "1"})


@pytest.mark.parametrize("form", ["json", "yaml", "name"])
def test_what_programs_read_is_never_coloured(form: str, env: dict[str, str]) -> None:
    assert "\x1b" not in into_pipe(("get", "jobs", "-o", form), env | {"FORCE_COLOR": "1"})


def test_a_reason_that_names_a_phase_does_not_get_its_colour(
    replica: FakeReplica, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    failed = status(JobPhase.FAILED, reason="what it waited for was RUNNING still")
    replica.items = [item(KEYS.spec(JOB), spec()), item(KEYS.status(JOB), failed)]
    assert run(["get", "jobs", "--coordinators", address]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "\x1b[31mFAILED\x1b[0m" in line
    assert "was RUNNING still" in line


def test_a_list_that_stays_is_coloured_in_place(env: dict[str, str], replica: FakeReplica) -> None:
    words = (*COMMAND, "get", "jobs", "-w")
    with Terminal(words, env=env, columns=160) as terminal:
        terminal.shows("digits   RUNNING")
        assert colour_of(terminal, "RUNNING") == "green"
        replica.update([item(KEYS.spec(JOB), spec()), item(KEYS.status(JOB), status(JobPhase.FAILED))])
        terminal.shows("digits   FAILED")
        assert colour_of(terminal, "FAILED") == "red"
        terminal.lacks("RUNNING")


def test_a_list_that_stays_on_a_dumb_terminal_grows_by_what_is_new(
    env: dict[str, str], replica: FakeReplica
) -> None:
    words = (*COMMAND, "get", "jobs", "-w")
    with Terminal(words, env=env | {"TERM": "dumb"}, columns=160) as terminal:
        terminal.shows("digits   RUNNING")
        # A step more is no news there.
        replica.update([one for one in running_job() if "/workers/a2/" not in one.key])
        replica.update([item(KEYS.spec(JOB), spec()), item(KEYS.status(JOB), status(JobPhase.FAILED))])
        terminal.shows("digits   FAILED")
        assert terminal.text.count("NAME") == 1
        assert b"\x1b" not in terminal.written
