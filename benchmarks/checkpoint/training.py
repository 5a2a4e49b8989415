"""What saving costs training: its step rate while a save is under way, and a step of ``run.steps()``.

A whole local cluster: etcd, coordinators, an agent and its transfer process share the machine with
the one rank. The stall is not part of a step; it is measured by itself.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from benchmarks.report import Result, result
from dtrain.cli.client import Client
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, JobSpec, RestartPolicy

SCRIPT = Path(__file__).parent / "script.py"
EVERY_STEPS = 150
STEPS = 5 * EVERY_STEPS
BARE_STEPS = 300_000
TIMEOUT_S = 120.0


def measure(rounds: int) -> list[Result]:
    """Train with checkpoints under dtrain and with DCP, in turn."""
    ours, theirs, loop, bare = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        with LocalCluster(folder / "cluster", agents=1, slots=1, store="dir", etcd_fsync=False) as cluster:
            for number in range(rounds):
                out = folder / f"ours-{number}"
                _submit(cluster, f"saving-{number}", "--steps", str(STEPS), "--out", str(out))
                ours.append(_kept(_await(out)))
                theirs.append(_dcp(folder / f"dcp-{number}"))
                out = folder / f"bare-{number}"
                _submit(cluster, f"bare-{number}", "--bare", "--steps", str(BARE_STEPS), "--out", str(out))
                step, empty = map(float, _await(out).split())
                loop.append(step)
                bare.append(empty)
    return [
        result(
            "step rate while saving over step rate between saves", "x", ours, theirs,
            "DCP async, reused stager", ours_min=0.95,
        ),
        result("run.steps() per step, agent connected", "us", loop, bare, "bare loop", ours_max=20.0),
    ]  # fmt: skip


def _submit(cluster: LocalCluster, name: str, *arguments: str) -> None:
    spec = JobSpec(
        JobName(name),
        Uid(""),
        Entry(EntryKind.SCRIPT, str(SCRIPT), arguments),
        1,
        1,
        1,
        working_dir=str(SCRIPT.parent),
        checkpoint=CheckpointPolicy(every_steps=0 if "--bare" in arguments else EVERY_STEPS),
        restarts=RestartPolicy(0),
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
    )
    client = Client(cluster.addresses)
    try:
        client.submit(codec.encode(spec), uuid.uuid4().hex)
    finally:
        client.close()


def _dcp(out: Path) -> float:
    command = [
        sys.executable,
        str(SCRIPT),
        "--steps",
        str(STEPS),
        "--every",
        str(EVERY_STEPS),
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return _kept(out.read_text())


def _kept(text: str) -> float:
    """Rate while saving over rate between saves."""
    steps = [line.split() for line in text.splitlines()]
    durations = {flag: [int(ns) for ns, saving in steps if saving == flag] for flag in "01"}
    return statistics.mean(durations["0"]) / statistics.mean(durations["1"])


def _await(path: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the job did not write {path.name} in {TIMEOUT_S:g} s")
        time.sleep(0.1)
    return path.read_text()
