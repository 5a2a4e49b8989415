"""The training program that every recovery and overhead measure runs, under dtrain and under torchrun.

The same model, data and optimizer. Under dtrain it uses the SDK; elsewhere it
saves with torch.save every ``--save-every`` steps, as such scripts do. Each
rank appends ``<monotonic ns> <pid> <step>`` per finished step to its own file.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--marks", type=Path, required=True, help="folder for the step files")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--pause-ms", type=float, default=5.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    under_dtrain = "DTRAIN_AGENT_SOCKET" in os.environ
    if under_dtrain:
        from dtrain import trainer

        run = trainer.join()
    else:
        dist.init_process_group("gloo")
    rank = dist.get_rank()

    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), find_unused_parameters=True
    )
    optimizer = torch.optim.AdamW(model.parameters())
    marks = (args.marks / f"rank-{rank}").open("a", buffering=1)

    def train(step: int) -> None:
        inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(step * 64 + rank))
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)
        marks.write(f"{time.monotonic_ns()} {os.getpid()} {step}\n")

    if under_dtrain:
        run.track(model=model, optimizer=optimizer)
        for step in run.steps(args.steps):
            train(step)
        return

    saved = args.marks / "checkpoint.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, args.steps):
        train(step)
        if rank == 0 and (step + 1) % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)
    dist.barrier()


if __name__ == "__main__":
    main()
