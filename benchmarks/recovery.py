"""kill -9 of a rank until its successor has finished a step: dtrain beside torchrun."""

import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks import jobs, marks
from benchmarks.report import Result, result
from benchmarks.torchrun import Torchrun
from dtrain.local import ports
from dtrain.local.cluster import LocalCluster

VICTIM = 3
TIMEOUT_S = 90.0
MANY_STEPS = 1_000_000


def measure(rounds: int) -> list[Result]:
    """Interleave ``rounds`` kills of a rank under each, 2 machines x 2 ranks, DDP."""
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        ours += under_dtrain()
        peer += under_torchrun()
    return [
        result(
            "kill -9 of a rank to the first step of its successor",
            "s",
            ours,
            peer,
            "torchrun, tuned flags",
            ours_max=3.0,
        )
    ]


def under_dtrain(kills: int = 2) -> list[float]:
    """Kill a rank ``kills`` times in one job."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        steps = folder / "marks"
        steps.mkdir()
        with LocalCluster(folder / "cluster", agents=2, slots=2, store="dir", etcd_fsync=False) as cluster:
            jobs.submit(cluster, "recovery", steps, MANY_STEPS, every_steps=100)
            return [_kill(steps) for _ in range(kills)]


def under_torchrun(kills: int = 1) -> list[float]:
    """The same under two torchrun agents."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        port = ports.reserve(1)
        peer = Torchrun(folder, port[0], ["--steps", str(MANY_STEPS), "--marks", name])
        try:
            peer.start()
            return [_kill(folder) for _ in range(kills)]
        finally:
            peer.stop()
            ports.release(port)


def _kill(folder: Path) -> float:
    pid = marks.await_steps(folder, VICTIM, 150, TIMEOUT_S)[-1].pid
    began = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    back = marks.first_of_another_process(folder, VICTIM, pid, TIMEOUT_S)
    return (back.at_ns - began) / 1e9 if back is not None else TIMEOUT_S
