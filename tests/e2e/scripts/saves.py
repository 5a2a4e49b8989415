"""Saves steps of its own choice: ``every N`` on all ranks, ``odd S`` on rank 0 alone."""

import sys

import torch

from dtrain import trainer
from dtrain.protocol.errors import Refused


def main() -> None:
    every, odd, total = (int(word) for word in sys.argv[1:4])
    run = trainer.join()
    weights = torch.zeros(1000)
    run.track(weights=weights)
    for step in run.steps(total):
        if run.world_size > 1:
            torch.distributed.barrier()
        weights += 1
        done = step + 1
        if done % every == 0 or (done == odd and run.rank == 0):
            try:
                found = f"step {done} is checkpoint {run.save(done)}"
            except Refused as refusal:
                found = refusal.message
            sys.stdout.write(f"rank {run.rank}: {found}\n")


if __name__ == "__main__":
    main()
