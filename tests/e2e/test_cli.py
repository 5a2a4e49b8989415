"""The examples, started, watched and stopped through the ``dtrain`` command as a person would."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.harness import SCRIPTS, Harness

from dtrain.local import sweeping
from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = (sys.executable, "-m", "dtrain.cli")
LIMIT_S = 150.0


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: Unix sockets below it must fit into 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def clean_env(**more: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "PET_"))}
    return env | more


def dtrain(harness: Harness, *args: str, code: int = 0) -> str:
    """Run the command against the harness's cluster and return what it printed."""
    config = str(harness.folder / "config")
    env = clean_env(DTRAIN_COORDINATORS=",".join(harness.cluster.addresses), XDG_CONFIG_HOME=config)
    done = subprocess.run(
        [*COMMAND, *args], env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def as_json(harness: Harness, *args: str) -> Any:
    return json.loads(dtrain(harness, *args, "-o", "json"))


def test_the_doctor_finds_a_sound_cluster_sound_and_names_a_replica_that_is_gone(harness: Harness) -> None:
    cluster = harness.cluster
    env = clean_env(
        XDG_CONFIG_HOME=str(harness.folder / "config"),
        DTRAIN_COORDINATORS=",".join(cluster.addresses),
        ETCDCTL_ENDPOINTS=",".join(cluster.endpoints),
        **cluster.store_env,
    )

    def findings(*words: str, code: int) -> list[dict[str, str]]:
        done = subprocess.run(
            [*COMMAND, "doctor", "--cluster", cluster.name, *words, "-o", "json"],
            env=env,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        found: list[dict[str, str]] = json.loads(done.stdout)["findings"]
        assert done.returncode == code, [one for one in found if one["level"] == "fail"]
        return found

    # A disk beside other tests may be slow, which is not what this is about.
    found = findings("--skip", "machine", "--ttl", "600", code=0)
    assert {one["scope"] for one in found if one["level"] == "pass"} == {
        "etcd",
        "store",
        "coordinators",
        "agents",
    }
    victim = cluster.coordinators["c3"]
    victim.terminate()
    assert victim.wait(20.0)
    try:
        said = [
            one["measured"] for one in findings("--only", "coordinators", code=0) if one["level"] == "warn"
        ]
        assert any("does not answer" in one for one in said), said
    finally:
        victim.start()


def test_digits_is_submitted_followed_and_inspected(harness: Harness) -> None:
    job = JobName("digits")
    changes = ("--set", "args=--steps 120 --pause-ms 10", "--set", "checkpoint.every_steps=40")
    assert dtrain(harness, "submit", str(EXAMPLES / "digits" / "job.yaml"), *changes, "-o", "name") == (
        "job/digits\n"
    )
    dtrain(harness, "wait", "digits", "--for", "checkpoint=1", "--timeout", "2m")
    listed = as_json(harness, "get", "jobs")
    assert "digits" in json.dumps(listed)
    dtrain(harness, "wait", "digits", "--timeout", "2m")
    described = as_json(harness, "describe", "job", "digits")
    assert "SUCCEEDED" in json.dumps(described)
    log = dtrain(harness, "logs", "digits", "--stdout")
    assert "step 100 loss" in log
    assert "accuracy" in log
    checkpoints = as_json(harness, "get", "checkpoints", "digits")
    assert [int(record.seq) for record in harness.commits(job)] == sorted(set(seqs(checkpoints)))
    assert "JobSucceeded" in json.dumps(as_json(harness, "get", "events", "digits"))
    assert "a1" in dtrain(harness, "get", "agents")
    assert "c1" in dtrain(harness, "get", "coordinators")
    harness.assert_succeeded(job, 120)


def seqs(document: Any) -> list[int]:
    """Every ``seq`` anywhere in a document."""
    if isinstance(document, dict):
        own = [document["seq"]] if "seq" in document else []
        return own + [seq for value in document.values() for seq in seqs(value)]
    if isinstance(document, list):
        return [seq for value in document for seq in seqs(value)]
    return []


def test_chargpt_trains_a_few_steps(harness: Harness) -> None:
    file = str(EXAMPLES / "chargpt" / "job.yaml")
    dtrain(harness, "submit", file, "--set", "args=--steps 4", "--set", "nnodes=1", "--follow")
    harness.assert_succeeded(JobName("chargpt"), 4)


def test_a_failed_job_is_explained_and_has_its_exit_code(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        f"name: broken\nnproc_per_node: 2\nworking_dir: {SCRIPTS}\nscript: train.py\n"
        "args: --bad-rank 1 --bad-step 2 --bad raise=out-of-luck\nrestarts:\n  max: 0\n"
    )
    dtrain(harness, "submit", str(file))
    dtrain(harness, "wait", "broken", "--timeout", "2m", code=22)
    told = dtrain(harness, "describe", "broken")
    assert "out-of-luck" in told
    assert "rank 1" in told
    assert "Traceback" in dtrain(harness, "logs", "broken", "--stderr")
    harness.assert_released(JobName("broken"))


def test_run_starts_a_cluster_of_its_own_and_leaves_nothing(short: Path) -> None:
    env = clean_env(TMPDIR=str(short), XDG_CONFIG_HOME=str(short / "config"))
    command = [*COMMAND, "run", str(EXAMPLES / "plain_torchrun" / "job.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 150 loss" in done.stdout
    assert not sweeping.find(short)
    assert not list(short.glob("dtrain-run-*"))


def test_ctrl_c_ends_a_run_and_everything_it_started(short: Path) -> None:
    env = clean_env(TMPDIR=str(short), XDG_CONFIG_HOME=str(short / "config"))
    script = str(EXAMPLES / "digits" / "train.py")
    command = [*COMMAND, "run", "--nproc-per-node", "2", script, "--steps", "1000000"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    guard = threading.Timer(LIMIT_S, process.kill)
    guard.start()
    try:
        seen = next((line for line in process.stdout if "step 100 loss" in line), None)
        assert seen is not None, process.stderr.read() if process.stderr else ""
        assert sweeping.find(short)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=LIMIT_S)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130, told
    assert "cancelling" in told
    assert not sweeping.find(short)
    assert not list(short.glob("dtrain-run-*"))


def started(short: Path, *words: str, until: str) -> "subprocess.Popen[str]":
    """A run that has printed ``until``."""
    env = clean_env(TMPDIR=str(short), XDG_CONFIG_HOME=str(short / "config"))
    command = [*COMMAND, "run", *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    guard = threading.Timer(LIMIT_S, process.kill)
    guard.start()
    seen = next((line for line in process.stdout if until in line), None)
    guard.cancel()
    assert seen is not None, process.stderr.read() if process.stderr else ""
    return process


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait()


def test_what_is_kept_in_a_folder_is_saved_by_ctrl_c_and_gone_on_with(short: Path) -> None:
    words = ("--folder", str(short / "kept"), str(EXAMPLES / "digits" / "train.py"), "--steps")
    process = started(short, *words, "400", "--pause-ms", "20", until="step 100 loss")
    process.send_signal(signal.SIGINT)
    _, told = finish(process)
    assert process.returncode == 130, told
    assert "go on with the same command" in told
    assert not sweeping.find(short)
    again = started(short, *words, "400", "--pause-ms", "20", until="step ")
    out, told = finish(again)
    assert again.returncode == 0, told
    assert "going on with train: suspended by" in told
    assert "step 100 loss" not in out
    assert "accuracy" in out
    assert not sweeping.find(short)


@pytest.mark.parametrize(
    ("module", "what"), [("etcd", "etcd ended"), ("dtrain.coordinator", "coordinator c1 ended")]
)
def test_a_run_whose_cluster_is_killed_ends_and_says_so(short: Path, module: str, what: str) -> None:
    script = str(EXAMPLES / "digits" / "train.py")
    process = started(short, script, "--steps", "1000000", until="step 100 loss")
    children = psutil.Process(process.pid).children()
    victims = [child for child in children if module in child.cmdline() or module in child.name()]
    assert len(victims) == 1, [child.cmdline() for child in children]
    victims[0].kill()
    _, told = finish(process)
    assert process.returncode == 3, told
    assert f"the cluster of this run has broken: {what} (killed by signal 9)" in told
    assert "Traceback" not in told
    assert not sweeping.find(short)
    assert not list(short.glob("dtrain-run-*"))
