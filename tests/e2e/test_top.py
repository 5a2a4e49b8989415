"""``dtrain top`` on a real terminal, of a real cluster whose leader is killed."""

import os
import re
import subprocess
import sys

import pytest
from tests.support.harness import Harness
from tests.support.tty import Terminal

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COMMAND = (sys.executable, "-m", "dtrain.cli", "top")


def environment(harness: Harness) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("DTRAIN_")}
    return env | {
        "DTRAIN_COORDINATORS": ",".join(harness.cluster.addresses),
        "XDG_CONFIG_HOME": str(harness.folder / "config"),
    }


def test_top_shows_steps_through_the_loss_of_the_leader_and_the_end_of_the_job(harness: Harness) -> None:
    stop = harness.stop_file("shown")
    job = harness.start("shown", f"--steps 100000 --pause-ms 50 --stop-file {stop}", every_steps=40)

    def step(terminal: Terminal) -> int:
        found = re.search(rf"^{job} +RUNNING +(\d+) ", terminal.text, re.M)
        return int(found[1]) if found else 0

    with Terminal(COMMAND, env=environment(harness)) as terminal:
        terminal.shows("agents 3 (3 Ready)", "3 replicas", f"cluster {harness.cluster.name}")
        terminal.until(
            "steps per second", lambda: re.search(r"RUNNING +\d+ +\S+ +[1-9][\d.]* ", terminal.text)
        )
        term, before = harness.term(), step(terminal)
        assert f"(term {term})" in terminal.lines[0]
        harness.cluster.kill_leader_process()
        other = re.compile(rf"\(term (?!{term}\))")
        terminal.until("a new leader", lambda: other.search(terminal.lines[0]))
        terminal.until("training went on", lambda: step(terminal) > before + 10)
        terminal.lacks("trying again")
        terminal.press("\r")
        terminal.shows(f"job {job}", "Checkpoints   latest")
        stop.touch()
        terminal.press("\x1b")
        terminal.until("the job has ended", lambda: re.search(rf"{job} +SUCCEEDED .*100%", terminal.text))
        terminal.press("3")
        terminal.shows("LeaderChanged", "CheckpointCommitted")
        terminal.press("q")
        assert terminal.ended() == 0
    once = subprocess.run(
        COMMAND, env=environment(harness), capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert f"leader {harness.cluster.leader()}" in once
    assert re.search(rf"^{job} +SUCCEEDED +\d+ +100%", once, re.M)
