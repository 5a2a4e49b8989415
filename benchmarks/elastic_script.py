"""The training program whose size changes while it runs, under dtrain and under torchrun.

Digits, DDP. Under dtrain the SDK's sampler says which samples come next; elsewhere each epoch's
permutation is split over the ranks and the state is saved with torch.save every ``--save-every``
steps, as such scripts do. Each rank appends ``<monotonic ns> <pid> <step>`` per finished step to
``rank-<rank>`` and ``<attempt> <ranks> <step> <loss> <samples ...>`` to ``samples-<rank>``: the loss
is that on a fixed part of the data, which has no noise of its own.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

BATCH = 16
JUDGED = 256
SEED = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--marks", type=Path, required=True, help="folder for the files")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--pause-ms", type=float, default=10.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    under_dtrain = "DTRAIN_AGENT_SOCKET" in os.environ
    if under_dtrain:
        from dtrain import trainer

        run = trainer.join()
    else:
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    attempt = os.environ.get("DTRAIN_ATTEMPT") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    marks = (args.marks / f"rank-{rank}").open("a", buffering=1)
    lines = (args.marks / f"samples-{rank}").open("a", buffering=1)

    def train(step: int, picked: list[int]) -> None:
        loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            judged = nn.functional.cross_entropy(model.module(images[:JUDGED]), labels[:JUDGED]).item()
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)
        lines.write(" ".join(map(str, (attempt, world, step, judged, *picked))) + "\n")
        marks.write(f"{time.monotonic_ns()} {os.getpid()} {step}\n")

    if under_dtrain:
        sampler = trainer.Sampler(len(images), BATCH, seed=SEED)
        run.track(model=model, optimizer=optimizer, data=sampler)
        for step in run.steps(args.steps):
            train(step, next(sampler))
        return

    saved = args.marks / "checkpoint.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, args.steps):
        train(step, split(len(images), step, rank, world))
        if rank == 0 and (step + 1) % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)


def split(n: int, step: int, rank: int, world: int) -> list[int]:
    """A rank's batch of a step: each epoch's permutation in equal parts, the rest dropped."""
    per_epoch = n // (BATCH * world)
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED + epoch))
    return order[rank + index * BATCH * world :][: BATCH * world : world].tolist()


if __name__ == "__main__":
    main()
