"""A deterministic job for the end-to-end tests: small, fast, and able to misbehave on demand.

Each step depends on the weights, the optimizer's momentum, the random number
generator and the data position, so that a resume that forgets any of them ends
with other weights. Every completed step leaves a line in ``--marks``.
"""

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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--marks", type=Path)
    parser.add_argument("--size", type=int, default=64, help="width of the model: its state grows with it")
    parser.add_argument("--stop-file", type=Path, help="end training, everywhere at one step, once it exists")
    parser.add_argument("--stubborn", action="store_true", help="live on when the other ranks are gone")
    parser.add_argument("--bad-rank", type=int, default=-1)
    parser.add_argument("--bad-step", type=int, default=-1)
    parser.add_argument("--bad", default="", help="exit=CODE, raise=TEXT or hang")
    args = parser.parse_args()

    run = trainer.join()
    torch.manual_seed(7)  # the same initial weights everywhere
    model = torch.nn.Sequential(torch.nn.Linear(args.size, args.size), torch.nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = trainer.Sampler(1000, batch_size=4, seed=3)
    run.track(model=model, optimizer=optimizer, data=data)
    torch.manual_seed(100 + run.rank)  # dropout differs between ranks

    marks = None
    if args.marks is not None:
        args.marks.mkdir(parents=True, exist_ok=True)
        marks = (args.marks / f"{run.rank}-{os.getpid()}").open("a", buffering=1)
    attempt = os.environ.get("DTRAIN_ATTEMPT", "0")

    batches = iter(data)
    last = args.steps
    for step in run.steps(args.steps):
        if step >= last:
            run.finish()
            break
        if run.rank == args.bad_rank and step == args.bad_step:
            misbehave(args.bad)
        picked = torch.tensor(next(batches), dtype=torch.float32)
        inputs = torch.sin(picked[:, None] * torch.arange(1, args.size + 1) / 50)
        loss = model(inputs).square().mean() + model[0].weight.square().mean()
        optimizer.zero_grad()
        loss.backward()
        # Rank 0 looks at the file, and the sum tells everyone in the same step.
        stop = float(run.rank == 0 and args.stop_file is not None and args.stop_file.exists())
        gradients = torch.cat([*(p.grad.flatten() for p in model.parameters()), torch.tensor([stop])])
        if run.world_size > 1:
            try:
                dist.all_reduce(gradients)
            except RuntimeError:
                if args.stubborn:
                    time.sleep(3600)
                raise
        if gradients[-1] > 0:
            last = step + 1
        offset = 0
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.grad.copy_(gradients[offset : offset + count].view_as(parameter))
            offset += count
        optimizer.step()
        run.report(loss=loss.item())
        if marks is not None:
            marks.write(f"{time.monotonic_ns()} {os.getpid()} {attempt} {run.rank} {step}\n")
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)
    print(f"rank {run.rank} is done", flush=True)  # noqa: T201


def misbehave(how: str) -> None:
    kind, _, detail = how.partition("=")
    if kind == "exit":
        sys.exit(int(detail))
    if kind == "raise":
        raise RuntimeError(detail)
    if kind == "hang":
        time.sleep(3600)


if __name__ == "__main__":
    main()
