"""A small training script with checkpoints: what the failover test beside it breaks."""

import argparse
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pause-ms", type=float, default=20.0, help="rest after each step")
    args = parser.parse_args()

    torch.manual_seed(0)  # the same initial weights on every rank and in every run
    run = trainer.join()
    model = nn.Linear(16, 1).to(run.device)
    ddp = DistributedDataParallel(model) if run.world_size > 1 else model
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    data = trainer.Sampler(1000, batch_size=8, seed=1)
    run.track(model=ddp, optimizer=optimizer, data=data)

    batches = iter(data)
    for _ in run.steps(args.steps):
        picked = torch.tensor(next(batches), dtype=torch.float32, device=run.device)
        inputs = torch.sin(picked[:, None] * torch.arange(1, 17, device=run.device) / 50)
        loss = nn.functional.mse_loss(ddp(inputs).squeeze(1), inputs.sum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss.item())
        time.sleep(args.pause_ms / 1000)
    print(f"rank {run.rank} of {run.world_size} is done: loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
