"""How evenly four ranks share the writing of replicated state with one big tensor in it.

Not a time: bytes that each rank writes, the most over the mean. ``python -m
benchmarks.checkpoint.balance FOLDER`` saves with DCP as four ranks into that folder.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from benchmarks.report import Result, result
from dtrain.local import ports
from dtrain.protocol.ids import Seq, Step
from dtrain.protocol.ranklink import Begin
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver

WORLD = 4


def measure(rounds: int) -> list[Result]:
    """Bytes do not vary: one round is enough."""
    del rounds
    ours = []
    for rank in range(WORLD):
        fd = os.memfd_create("bench-arena")
        ours.append(Saver(_state(), rank, WORLD, Arena(fd)).seal(Begin(Seq(1), "n", Step(1))).size_bytes)
        os.close(fd)
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.checkpoint.balance", folder], check=True)
        theirs = [
            sum(file.stat().st_size for file in Path(folder).glob(f"__{rank}_*.distcp"))
            for rank in range(WORLD)
        ]
    title = "bytes written by a rank, most over mean, 4 ranks, one big tensor"
    return [result(title, "x", [_uneven(ours)], [_uneven(theirs)], "DCP", ours_max=1.05)]


def _state() -> dict[str, dict[str, torch.Tensor]]:
    """An embedding of 128 MiB and 24 layers of 4 MiB."""
    layers = {f"layer.{index}": torch.zeros(1024, 1024) for index in range(24)}
    return {"model": {"embedding": torch.zeros(32 * 1024, 1024), **layers}}


def _uneven(sizes: list[int]) -> float:
    return max(sizes) / (sum(sizes) / len(sizes))


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    dcp.save(_state(), checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    reserved = ports.reserve(1)
    mp.spawn(_rank, (reserved[0], sys.argv[1]), nprocs=WORLD)  # type: ignore[no-untyped-call]
    ports.release(reserved)
