"""A DDP job whose numbers go wrong, and whose ranks are slow, as files beside it say.

``--nan-file``: once it exists, rank 1 of attempt 1 reports one loss that is NaN. ``--slow-file`` has a line
``RANK data|step MILLISECONDS`` for each slow rank.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain import trainer


class Samples(torch.utils.data.Dataset):
    def __init__(self, slow: "Slow") -> None:
        self.slow = slow

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        self.slow.maybe("data")
        return torch.sin(index * torch.arange(1, 17) / 50)


class Slow:
    def __init__(self, path: Path | None, rank: int) -> None:
        self.path, self.rank = path, rank

    def maybe(self, where: str) -> None:
        if self.path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text().splitlines():
                rank, place, ms = line.split()
                if (int(rank), place) == (self.rank, where):
                    time.sleep(int(ms) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--marks", type=Path)
    parser.add_argument("--pause-ms", type=float, default=10.0)
    parser.add_argument("--nan-file", type=Path)
    parser.add_argument("--slow-file", type=Path)
    parser.add_argument("--stop-file", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = trainer.join()
    torch.manual_seed(7)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    slow = Slow(args.slow_file, run.rank)
    data = trainer.Loader(Samples(slow), trainer.Sampler(1000, batch_size=1, seed=3))
    run.track(model=model, optimizer=optimizer, data=data)
    net = DistributedDataParallel(model)
    batches = iter(data)
    args.marks.mkdir(parents=True, exist_ok=True)
    marks = (args.marks / f"{run.rank}-{os.getpid()}").open("a", buffering=1)
    attempt = int(os.environ["DTRAIN_ATTEMPT"])
    sick = run.rank == 1 and attempt == 1 and args.nan_file is not None
    for step in run.steps(1_000_000):
        inputs = next(batches)
        slow.maybe("step")
        stop = torch.tensor([float(run.rank == 0 and args.stop_file.exists())])
        dist.all_reduce(stop)
        if stop.item():
            run.finish()
            break
        loss = net(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told = loss.item()
        if sick and args.nan_file.exists():
            told, sick = float("nan"), False
        run.report(loss=told)
        marks.write(f"{time.monotonic_ns()} {os.getpid()} {attempt} {run.rank} {step}\n")
        time.sleep(args.pause_ms / 1000)


if __name__ == "__main__":
    main()
