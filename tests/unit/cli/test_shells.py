"""Completion as somebody at a keyboard has it: real shells on pseudo terminals, and the Tab key."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.tty import Terminal
from tests.unit.cli.fakes import FakeReplica, fleet, running_job

from dtrain.cli.main import run

pytestmark = pytest.mark.timeout(300)

SHELLS = {
    "bash": ("--noprofile", "-i"),
    "zsh": ("-i",),
    "fish": ("-i", "--private"),
}
PROMPT = "ready> "
TAB_S = 30.0
AGAIN_S = 5.0
"""Names have 300 ms, which a busy machine may need for more than that: Tab is pressed again."""


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path, replica: FakeReplica) -> Iterator[Terminal]:
    """A shell that has loaded its script as the documentation says, at its prompt."""
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed here: apt-get install {name}")
    replica.items = [one for one in (*running_job(), *fleet()[:1]) if "agents/a2/" not in one.key]
    _prepare(tmp_path, name)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "LANG": "C.UTF-8",
        "GRPC_VERBOSITY": "NONE",
    }
    with Terminal([name, *SHELLS[name]], env=env, columns=120, owned=True) as terminal:
        terminal.shows(PROMPT.strip())
        yield terminal


def _prepare(home: Path, name: str) -> None:
    command = home / "dtrain"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m dtrain.cli "$@"\n')
    command.chmod(0o755)
    if name == "bash":
        (home / ".bashrc").write_text(f"PS1='{PROMPT}'\neval \"$(dtrain completion bash)\"\n")
    elif name == "zsh":
        start = f"PS1='{PROMPT}'\nautoload -U compinit\ncompinit -u\n"
        (home / ".zshrc").write_text(start + 'eval "$(dtrain completion zsh)"\n')
    else:
        folder = home / "config" / "fish"
        (folder / "completions").mkdir(parents=True)
        prompt = f"set -g fish_greeting\nfunction fish_prompt; echo -n '{PROMPT}'; end\n"
        # Its guesses at the rest of a line are no completions.
        (folder / "config.fish").write_text(prompt + "set -g fish_autosuggestion_enabled 0\n")
        os.system(f"'{command}' completion fish > '{folder}/completions/dtrain.fish'")


def line(terminal: Terminal) -> str:
    """What stands behind the newest prompt."""
    found = [shown for shown in terminal.lines if PROMPT.strip() in shown]
    return found[-1].partition(PROMPT.strip())[2].strip() if found else ""


def tab(terminal: Terminal, typed: str, ready: Callable[[], object]) -> None:
    """Type on an empty line and press Tab until ``ready``."""
    terminal.press("\x15")
    terminal.until("an empty line", lambda: not line(terminal))
    terminal.press(typed)
    terminal.until("what was typed", lambda: line(terminal) == typed)
    deadline = time.monotonic() + TAB_S
    while not ready():
        assert time.monotonic() < deadline, terminal.text
        terminal.press("\t")
        until = time.monotonic() + AGAIN_S
        while not ready() and time.monotonic() < until:
            terminal.draw(0.05)


def test_verbs_flags_and_names_are_completed(shell: Terminal, address: str) -> None:
    # With a port: bash cuts a line at colons before it asks.
    there = f"--coordinators {address}"
    for typed, completed in (
        ("dtrain desc", "dtrain describe"),
        ("dtrain get coo", "dtrain get coordinators"),
        ("dtrain cancel --ye", "dtrain cancel --yes"),
        ("dtrain get jobs --output=js", "dtrain get jobs --output=json"),
        (f"dtrain cancel {there} di", f"dtrain cancel {there} digits"),
        (f"dtrain --coordinators={address} pause job/d", f"dtrain --coordinators={address} pause job/digits"),
        (f"dtrain describe {there} agent a", f"dtrain describe {there} agent a1"),
    ):
        tab(shell, typed, lambda completed=completed: line(shell) == completed)  # type: ignore[misc]


def test_nothing_is_said_of_a_line_that_is_wrong(shell: Terminal) -> None:
    shell.press("dtrain list x\tyz")
    shell.until("the rest of the line", lambda: line(shell).replace(" ", "") == "dtrainlistxyz")
    shell.draw(0.2)
    assert "error" not in shell.text


def test_a_bash_that_has_loaded_the_script_of_an_earlier_release_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_DTRAIN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "dtrain\ncancel\n--ye")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run([]) == 0
    assert capsys.readouterr().out.split() == ["plain,--yes"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dtrain cancel 'some job' --ye", ["plain,--yes"]),
        ('dtrain cancel "--ye', ["plain,--yes"]),
        ("dtrain get --output=na", []),
        ("dtrain get jobs --output=na", ["plain,name"]),
        (
            "dtrain get ",
            ["plain,agents", "plain,checkpoints", "plain,coordinators", "plain,events", "plain,jobs"],
        ),
    ],
)
def test_bash_asks_by_the_line(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_DTRAIN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_LINE", typed)
    assert run([]) == 0
    assert capsys.readouterr().out.split() == offered
