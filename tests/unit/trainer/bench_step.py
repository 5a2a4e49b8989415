"""What a step costs without a checkpoint and with one.

Run as ``python -m tests.unit.trainer.bench_step``.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from tests.unit.trainer import pipeline
from tests.unit.trainer.fake_agent import FakeAgent

from dtrain import trainer
from dtrain.protocol import ranklink
from dtrain.protocol.ids import Attempt, Rank, Seq, Step
from dtrain.protocol.ranklink import Begin, Hello
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.link import AgentLink


def step_overhead_us(steps: int = 200_000) -> float:
    with tempfile.TemporaryDirectory() as folder, FakeAgent(Path(folder)) as agent:
        os.environ[ranklink.ENV_ARENA_FD] = str(os.memfd_create("bench"))
        hello = Hello(1, pipeline.JOB, pipeline.UID, Attempt(1), Rank(0), 0, os.getpid())
        link = AgentLink(agent.socket_path, hello)
        link.start()
        run = trainer.Run(0, 1, 0, link)
        run.track(x=torch.zeros(3))
        began = 0.0
        for step in run.steps(steps):
            if step == 1:
                began = time.perf_counter()
            if step == steps - 1:
                return (time.perf_counter() - began) / (steps - 2) * 1e6
    raise AssertionError


def stall_ms_per_gb(tensors: int, rows: int) -> tuple[float, float, float]:
    """First and median later stall, and milliseconds per save of bookkeeping included."""
    tracked = {"h": {str(i): torch.randn(rows, 1024) for i in range(tensors)}}
    saver = Saver(tracked, 0, 1, pipeline.new_arena())
    saver.prepare()
    stalls = []
    for seq in range(1, 8):
        began = time.perf_counter()
        sealed = saver.seal(Begin(Seq(seq), "n", Step(seq)))
        stalls.append((time.perf_counter() - began) * 1e3)
    gb = sealed.size_bytes / 1e9
    median = sorted(stalls[1:])[3]
    return stalls[0] / gb, median / gb, median


if __name__ == "__main__":
    sys.stdout.write(f"step overhead: {step_overhead_us():.2f} us\n")
    for count, rows in ((10, 8192), (8000, 1)):
        first, later, ms = stall_ms_per_gb(count, rows)
        sys.stdout.write(
            f"{count} tensors of {rows} KiB*4: first {first:.0f}, later {later:.0f} ms/GB ({ms:.1f} ms)\n"
        )
