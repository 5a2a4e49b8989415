"""Short runs of chaos and of the soak, and ``dtrain chaos`` on a cluster of ``dtrain up --test``."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e import chaos, soak
from tests.support.harness import SCRIPTS

from dtrain.local.cluster import LocalCluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

JOB = f"""
name: victim
nnodes: 2
nproc_per_node: 1
script: {SCRIPTS / "train.py"}
args: --steps 1000000 --pause-ms 50
checkpoint: {{every_steps: 50, keep_last: 3}}
restarts: {{max: 1000, window: 1h}}
"""


def test_random_faults_change_no_bit_of_the_weights(tmp_path: Path) -> None:
    report = chaos.run(seed=9, kills=6, agents=3, minutes=10.0, folder=tmp_path)
    assert len(report.struck) == 6
    assert len({one.label for one in report.struck}) > 3


def test_nothing_grows_and_nothing_is_left_in_a_short_soak(tmp_path: Path) -> None:
    with (tmp_path / "soak.jsonl").open("w") as out:
        outcome = soak.run(seed=3, minutes=0.5, folder=tmp_path, out=out)
    sys.stderr.write("\n".join(outcome.lines()) + "\n")
    assert outcome.problems == []
    assert outcome.calms >= 1
    assert len(outcome.report.struck) >= 2
    lines = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    roles = {one["role"] for line in lines for one in line.get("processes", ())}
    assert roles >= {"coordinator", "coordinator guardian", "agent", "agent guardian", "launcher", "etcd"}


# The verb.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verb")


@pytest.fixture(scope="module")
def env(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "ETCDCTL_"))}
    return kept | {"XDG_CONFIG_HOME": str(folder / "config"), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def up(folder: Path, env: dict[str, str]) -> Iterator[None]:
    """``dtrain up --test`` with a job that trains."""
    shape = ["--agents", "2", "--coordinators", "2", "--store", "dir", "--folder", str(folder / "cluster")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrain.cli", "up", "--test", *shape],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert "is ready" in process.stdout.readline()
        (folder / "job.yaml").write_text(JOB)
        assert dtrain(env, "submit", str(folder / "job.yaml")).returncode == 0
        end = time.monotonic() + 90
        while '"RUNNING"' not in dtrain(env, "get", "jobs", "-o", "json").stdout:
            assert time.monotonic() < end, "the job does not train"
            time.sleep(0.3)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()


def dtrain(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_the_verb_breaks_the_cluster_and_tells_how_it_recovered(up: None, env: dict[str, str]) -> None:
    done = dtrain(
        env, "chaos", "--seed", "4", "--count", "3", "--every", "0.5s", "--hold", "2s",
        "--kinds", "kill,cut,slow", "--targets", "rank,agent,leader", "-o", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["violations"], len(report["struck"])) == (True, [], 3)
    assert all(one["whole_s"] > 0 for one in report["struck"])
    assert report["audited"]["revisions"] > 0


def test_a_plan_is_printed_and_nothing_happens(up: None, env: dict[str, str]) -> None:
    first, again = (dtrain(env, "chaos", "--dry-run", "--seed", "4", "--count", "5") for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == again.stdout
    assert len(first.stdout.splitlines()) == 6


def test_ctrl_c_heals_what_is_broken_and_reports(up: None, env: dict[str, str]) -> None:
    words = ["chaos", "--kinds", "freeze", "--targets", "agent", "--hold", "100s", "--seed", "1"]
    running = subprocess.Popen(
        [sys.executable, "-m", "dtrain.cli", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stderr is not None
    try:
        while "freeze agent" not in (line := running.stderr.readline()):
            assert line, "it ended before it broke anything"
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=120)
    finally:
        running.kill()
    assert "interrupted" in out
    assert "no violation" in out
    assert running.returncode == 0, out
    assert '"a1"' in dtrain(env, "get", "agents", "-o", "json").stdout


def test_a_cluster_without_the_mark_is_left_alone(tmp_path: Path, env: dict[str, str]) -> None:
    shape = {"coordinators": 1, "agents": 0, "store": "dir", "etcd_fsync": False}
    with LocalCluster(tmp_path / "cluster", name="prod", **shape) as cluster:  # type: ignore[arg-type]
        meant = ["--endpoints", ",".join(cluster.endpoints), "--cluster", "prod"]
        for words in (["chaos"], ["chaos", "--dry-run"], ["chaos", "--kinds", "kill", "--count", "1"]):
            done = dtrain(env, *words, *meant)
            assert done.returncode == 7, done.stderr
            assert "not marked as a test cluster" in done.stderr
        assert dtrain(env, "chaos", "--mark", *meant).returncode == 2, "it must be confirmed"
        assert dtrain(env, "chaos", "--mark", "--yes", *meant).returncode == 0
        pid = cluster.coordinators["c1"].process_pid
        # Marked by hand: processes of this machine can be hit, links cannot be cut.
        done = dtrain(env, "chaos", "--kinds", "cut", "--count", "1", *meant)
        assert done.returncode == 2
        assert "dtrain up --test" in done.stderr
        done = dtrain(env, "chaos", "--kinds", "kill", "--targets", "leader", "--count", "1", *meant)
        assert done.returncode == 0, done.stdout + done.stderr
        assert cluster.coordinators["c1"].process_pid != pid
        assert dtrain(env, "chaos", "--unmark", *meant).returncode == 0
        assert dtrain(env, "chaos", *meant).returncode == 7
