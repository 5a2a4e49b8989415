"""``dtrain run`` at a keyboard: Ctrl-C reaches the whole foreground group of a real pseudo terminal."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.support.harness import SCRIPTS
from tests.support.tty import Terminal

from dtrain.cli import pulse
from dtrain.local import sweeping

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 150.0
AT_ONCE_S = 15.0
"""A busy machine needs a while to end some processes; ranks that are asked have 60 s here."""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: Unix sockets below it must fit into 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def started(short: Path, *words: str, until: str) -> Terminal:
    """A run in the foreground of a terminal that has shown ``until``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "PET_"))}
    env |= {"TMPDIR": str(short), "XDG_CONFIG_HOME": str(short / "config")}
    terminal = Terminal(
        (sys.executable, "-m", "dtrain.cli", "run", *words), env=env, columns=160, lines=60, owned=True
    )
    try:
        terminal.until(until, lambda: until in terminal.text or terminal.process.poll() is not None, LIMIT_S)
        assert terminal.process.poll() is None, terminal.text
    except BaseException:
        terminal.__exit__()
        raise
    return terminal


def family(terminal: Terminal) -> list[psutil.Process]:
    """The run and all that it has started."""
    run = psutil.Process(terminal.process.pid)
    return [run, *run.children(recursive=True)]


def assert_nothing_is_left(short: Path, before: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(before, timeout=10)
    assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE], left
    assert not sweeping.find(short)
    deadline = time.monotonic() + 10
    while (found := list(short.glob("dtrain-run-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not found


def test_the_second_ctrl_c_ends_a_run_at_once_though_its_ranks_hear_nothing(short: Path) -> None:
    words = ("--shutdown-timeout", "60", str(SCRIPTS / "stubborn.py"))
    with started(short, *words, until="nothing ends me") as terminal:
        before = family(terminal)
        assert len(before) > 4, before
        terminal.press("\x03")
        terminal.shows("Ctrl-C again stops at once")
        terminal.draw(1.0)
        assert terminal.process.poll() is None, "the first one asks, and waits"
        assert all(one.is_running() for one in before), "nobody but the run itself heard the first one"
        pressed = time.monotonic()
        terminal.press("\x03")
        terminal.until("it ends", lambda: terminal.process.poll() is not None)
        assert time.monotonic() - pressed < AT_ONCE_S
        assert terminal.process.returncode == 130
        assert "Traceback" not in terminal.text
    assert_nothing_is_left(short, before)


def test_a_run_whose_etcd_freezes_says_so_goes_on_when_it_is_back_and_ends_in_order(short: Path) -> None:
    script = str(EXAMPLES / "digits" / "train.py")
    words = (script, "--steps", "100000", "--pause-ms", "20")
    with started(short, *words, until="step 100 loss") as terminal:
        before = family(terminal)
        (etcd,) = [one for one in before if one.name() == "etcd"]
        etcd.suspend()
        try:
            shown = "etcd runs, but has not answered for"
            terminal.until(shown, lambda: shown in terminal.text, pulse.ENDED_S - 5)
        finally:
            etcd.resume()
        terminal.shows("etcd answers again")
        assert terminal.process.poll() is None
        terminal.press("\x03")
        terminal.until("it ends", lambda: terminal.process.poll() is not None, LIMIT_S)
        terminal.draw(0.2)
        assert terminal.process.returncode == 130
        assert "it did not end by itself" not in terminal.text
    assert_nothing_is_left(short, before)
