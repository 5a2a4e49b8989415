"""Handwritten digits with DistributedDataParallel, on machines that fail.

    dtrain run examples/digits/job.yaml          # a cluster of its own, torn down at the end
    dtrain submit examples/digits/job.yaml       # on a running cluster
    python examples/digits/train.py --steps 200  # one process, no dtrain needed

1,797 images of 8x8 pixels ship with scikit-learn, so nothing is downloaded.
Kill any process at any moment: training goes on from the newest checkpoint and
ends with the same weights, bit for bit.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--pause-ms", type=float, default=0.0, help="rest after each step, to have time to watch"
    )
    args = parser.parse_args()

    torch.manual_seed(0)  # the same initial weights on every rank and in every run
    run = trainer.join()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held_out, training = order[:300], order[300:]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10)).to(run.device)
    # DDP regroups gradients after its first step, which changes the order of
    # additions; looking for unused parameters keeps one grouping, so that a
    # resumed run adds in the same order as an uninterrupted one.
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if run.world_size > 1 else model
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=args.lr)
    data = trainer.Sampler(len(training), batch_size=args.batch, seed=2)

    run.track(model=ddp, optimizer=optimizer, data=data)
    batches = iter(data)
    for step in run.steps(args.steps):
        picked = training[next(batches)]
        loss = nn.functional.cross_entropy(ddp(images[picked].to(run.device)), labels[picked].to(run.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss.item())
        if run.rank == 0 and step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)

    if run.rank == 0:
        model.eval()
        with torch.no_grad():
            right = (
                (model(images[held_out].to(run.device)).argmax(1).cpu() == labels[held_out]).float().mean()
            )
        print(f"accuracy {right.item():.4f} on {len(held_out)} images never trained on", flush=True)


if __name__ == "__main__":
    main()
