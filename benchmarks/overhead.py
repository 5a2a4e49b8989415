"""What dtrain costs a step: the same script under dtrain and under torchrun, and the bare loop."""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import jobs, marks
from benchmarks.report import Result, result
from benchmarks.torchrun import Torchrun
from dtrain.local import ports
from dtrain.local.cluster import LocalCluster

WARM_STEPS = 300
STEPS = 3000
TIMEOUT_S = 120.0


def measure(rounds: int) -> list[Result]:
    """Interleave runs of a machine of two ranks without checkpoints; compare mean step times."""
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        ours.append(_under_dtrain())
        peer.append(_under_torchrun())
    loop, bare = _loops(rounds)
    return [
        result("time per step, 2 ranks", "ms", ours, peer, "torchrun", ratio_max=1.01),
        result("run.steps() per step beside a bare loop", "us", loop, bare, "bare loop", ours_max=20.0),
    ]


def _under_dtrain() -> float:
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        steps = folder / "marks"
        steps.mkdir()
        with LocalCluster(folder / "cluster", agents=1, slots=2, store="dir", etcd_fsync=False) as cluster:
            jobs.submit(cluster, "overhead", steps, STEPS, pause_ms=0.0, nnodes=1)
            return _step_ms(steps)


def _under_torchrun() -> float:
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        port = ports.reserve(1)
        arguments = ["--steps", str(STEPS), "--marks", name, "--pause-ms", "0", "--save-every", str(STEPS)]
        peer = Torchrun(Path(name), port[0], arguments, nnodes="1")
        try:
            peer.start()
            return _step_ms(Path(name))
        finally:
            peer.stop()
            ports.release(port)


def _step_ms(folder: Path) -> float:
    found = marks.await_steps(folder, 0, STEPS, TIMEOUT_S)[WARM_STEPS:]
    times = [(after.at_ns - before.at_ns) / 1e6 for before, after in itertools.pairwise(found)]
    # Without the slowest hundredth: checkpoints and the other core's work are not per-step costs.
    return statistics.mean(sorted(times)[: -len(times) // 100])


def _loops(rounds: int) -> tuple[list[float], list[float]]:
    from dtrain import trainer

    ours, bare = [], []
    count = 200_000
    for _ in range(rounds):
        run = trainer.join()
        began = time.perf_counter()
        for _step in run.steps(count):
            pass
        ours.append((time.perf_counter() - began) / count * 1e6)
        run.close()
        began = time.perf_counter()
        for _step in range(count):
            pass
        bare.append((time.perf_counter() - began) / count * 1e6)
    return ours, bare
