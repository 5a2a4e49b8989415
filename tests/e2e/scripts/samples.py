"""A job that writes down which samples each of its ranks trains on, step by step.

It ends with the first epoch that is over once ``--stop-file`` exists, however many ranks it has
meanwhile. A line of ``--samples``/RANK-PID: attempt, ranks, rank, step, loss, then the samples. Beside them
lies what each process was told of its place in the world, as RANK-PID.env.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dtrain import trainer

MANY = 1_000_000
PLACE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--size", type=int, default=1000, help="samples in the data")
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--stop-file", type=Path, required=True)
    args = parser.parse_args()

    run = trainer.join()
    torch.manual_seed(7)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sampler = trainer.Sampler(args.size, batch_size=4, seed=3)
    loader = trainer.Loader([torch.tensor(i) for i in range(args.size)], sampler)
    run.track(model=model, optimizer=optimizer, data=loader)
    args.samples.mkdir(parents=True, exist_ok=True)
    attempt = os.environ.get("DTRAIN_ATTEMPT", "0")
    place = {name: os.environ.get(name, "") for name in PLACE} | {"ATTEMPT": attempt}
    (args.samples / f"{run.rank}-{os.getpid()}.env").write_text(json.dumps(place))
    with (args.samples / f"{run.rank}-{os.getpid()}").open("a", buffering=1) as lines:
        batches = iter(loader)
        last = MANY
        for step in run.steps(MANY):
            if step > last:
                run.finish()
                break
            epoch = sampler.epoch
            picked = next(batches)
            inputs = torch.sin(picked[:, None] * torch.arange(1, 17) / 50)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            stop = float(run.rank == 0 and args.stop_file.exists())
            told = torch.cat([*(p.grad.flatten() for p in model.parameters()), torch.tensor([stop])])
            if run.world_size > 1:
                dist.all_reduce(told)
            told[:-1] /= run.world_size
            offset = 0
            for parameter in model.parameters():
                parameter.grad.copy_(told[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
            optimizer.step()
            run.report(loss=loss.item())
            words = (attempt, run.world_size, run.rank, step, loss.item(), *picked.tolist())
            lines.write(" ".join(str(word) for word in words) + "\n")
            if told[-1] > 0 and sampler.epoch > epoch:
                last = step
            if args.pause_ms:
                time.sleep(args.pause_ms / 1000)


if __name__ == "__main__":
    main()
