"""A job that talks: each rank says each of its steps, on both streams, until it is told to end."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dtrain import trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop-file", type=Path, required=True)
    args = parser.parse_args()
    run = trainer.join()
    model = torch.nn.Linear(4, 4)
    run.track(model=model)
    attempt = os.environ["DTRAIN_ATTEMPT"]
    for step in run.steps(1_000_000):
        # Rank 0 looks at the file, and the sum tells everyone in the same step.
        stop = torch.tensor([float(run.rank == 0 and args.stop_file.exists())])
        dist.all_reduce(stop)
        print(f"attempt {attempt} rank {run.rank} step {step} über", flush=True)  # noqa: T201
        if step % 10 == 0:
            print(f"attempt {attempt} rank {run.rank} tens {step}", file=sys.stderr, flush=True)  # noqa: T201
        if stop.item():
            run.finish()
            break
        time.sleep(0.02)


if __name__ == "__main__":
    main()
