"""A small transformer under FSDP2: each rank holds, saves and restores only its own shards.

    dtrain run examples/fsdp/job.yaml            # a cluster of its own, torn down at the end
    dtrain submit examples/fsdp/job.yaml         # on a running cluster

The task is to say a sequence of digits backwards. Checkpoints hold global shapes and rectangles, so that
one of four ranks is restored by two, or by eight: the only line about it is ``run.track``.
"""

import argparse
import time

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain import trainer

DIGITS = 10
LENGTH = 8


class Reverse(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, DIGITS)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(digits) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.flatten(0, 1))  # of shape (batch * LENGTH, DIGITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences per rank and step")
    parser.add_argument(
        "--pause-ms", type=float, default=0.0, help="rest after each step, to have time to watch"
    )
    args = parser.parse_args()

    run = trainer.join()
    torch.manual_seed(0)  # the same initial weights on every rank, however many there are
    model = Reverse().to(run.device)
    mesh = init_device_mesh(run.device.type, (run.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    # Each number is one sequence: its digits are the sample.
    data = trainer.Sampler(100_000, batch_size=args.batch, seed=1)
    run.track(model=model, optimizer=optimizer, data=data)
    batches = iter(data)
    powers = 10 ** torch.arange(LENGTH)
    for step in run.steps(args.steps):
        seeds = torch.tensor(next(batches)) * 7919 % 10**LENGTH
        digits = (seeds[:, None] // powers % DIGITS).to(run.device)
        loss = nn.functional.cross_entropy(model(digits), digits.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss.item())
        if run.rank == 0 and step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} on {run.world_size} ranks", flush=True)
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)


if __name__ == "__main__":
    main()
