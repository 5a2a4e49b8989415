"""A training program that hangs where it is told to: one rank at a time, each attempt in its own way.

``--plan kind:rank,...``: attempt n follows its n-th entry; after those nothing hangs. The kinds:

* ``elsewhere``: skips the gradients' all-reduce and waits for an event that never comes,
* ``mismatch``: goes into a collective of another group than the others,
* ``data``: its dataset does not return; ``worker``: the same in a process of the data loader,
* ``loop``: ``while True``,
* ``stop``: stopped by SIGSTOP.
"""

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from dtrain import trainer


class Samples(Dataset[Any]):
    """Endless; ``hang_at``: the sample that never comes."""

    def __init__(self, hang_at: int) -> None:
        self._hang_at = hang_at

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self._hang_at:
            time.sleep(1e6)
        return torch.full((64,), float(index % 7))


def spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--plan", default="")
    parser.add_argument("--after", type=int, default=60, help="steps of each attempt before it hangs")
    parser.add_argument("--pause-ms", type=float, default=20.0)
    parser.add_argument("--marks", type=Path, required=True)
    args = parser.parse_args()
    args.marks.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)

    run = trainer.join()
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    plan = [entry.split(":") for entry in args.plan.split(",") if entry]
    kind, victim = plan[attempt - 1] if attempt <= len(plan) else ("", "-1")
    mine = int(victim) == run.rank
    others = dist.new_group(list(range(run.world_size)))

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.track(model=model, optimizer=optimizer)
    first = run.restore()
    at = first + args.after
    lost = args.after if mine and kind in ("data", "worker") else -1
    loader = iter(
        DataLoader(Samples(lost), batch_size=None, num_workers=1 if kind == "worker" and mine else 0)
    )
    began = time.monotonic()

    for step in run.steps(args.steps):
        if mine and step == at:
            mark = {
                "kind": kind,
                "rank": run.rank,
                "step": step,
                "at": time.time(),
                "step_s": (time.monotonic() - began) / max(1, step - first),
            }
            (args.marks / f"hang-{attempt}.json").write_text(json.dumps(mark))
            if kind == "elsewhere":
                threading.Event().wait()
            elif kind == "mismatch":
                dist.all_reduce(torch.ones(1), group=others)
            elif kind == "loop":
                spin()
            elif kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        inputs = next(loader)
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(args.pause_ms / 1000)


if __name__ == "__main__":
    main()
