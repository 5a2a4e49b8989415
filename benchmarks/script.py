"""The training program that every recovery and overhead measure runs, under dtrain and under torchrun.

The digits example's model, data and optimizer. Under dtrain it uses the SDK; elsewhere it
saves with torch.save every ``--save-every`` steps, as such scripts do. Each
rank appends ``<monotonic ns> <pid> <step>`` per finished step to its own file, and what comes
before its first step to ``way-<rank>``.
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

IMPORTED_NS = time.monotonic_ns()


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
    joined_ns = time.monotonic_ns()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)
    loaded_ns = time.monotonic_ns()
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10)),
        find_unused_parameters=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    built_ns = time.monotonic_ns()
    marks = (args.marks / f"rank-{rank}").open("a", buffering=1)

    def say_way() -> None:
        way = {
            "imported": IMPORTED_NS,
            "group up": joined_ns,
            "data loaded": loaded_ns,
            "model wrapped": built_ns,
            "restored": time.monotonic_ns(),
        }
        with (args.marks / f"way-{rank}").open("a") as file:
            file.write("".join(f"{at} {os.getpid()} {name}\n" for name, at in way.items()))

    def train(step: int) -> None:
        picked = torch.randint(len(images), (32,), generator=torch.Generator().manual_seed(step * 64 + rank))
        loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)
        marks.write(f"{time.monotonic_ns()} {os.getpid()} {step}\n")

    if under_dtrain:
        run.track(model=model, optimizer=optimizer)
        run.restore()
        say_way()
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
    say_way()
    for step in range(first, args.steps):
        train(step)
        if rank == 0 and (step + 1) % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)
    dist.barrier()


if __name__ == "__main__":
    main()
