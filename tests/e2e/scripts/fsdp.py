"""Trains with fully_shard on any number of ranks; notes a digest of the gathered state after each step."""

import argparse
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dtrain import trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--digests", type=Path, required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    args = parser.parse_args()
    args.marks.mkdir(parents=True, exist_ok=True)

    run = trainer.join()
    torch.set_num_threads(1)
    torch.manual_seed(
        7 + run.rank
    )  # fully_shard takes each rank's own rows: restored, they are what was saved
    # Rows that three ranks and two share unevenly, and fewer rows than ranks.
    model = torch.nn.Sequential(torch.nn.Linear(7, 10), torch.nn.Tanh(), torch.nn.Linear(10, 2))
    mesh = init_device_mesh("cpu", (run.world_size,))
    for part in model:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = trainer.Sampler(1000, batch_size=4, seed=3)
    run.track(model=model, optimizer=optimizer, data=data)

    marks = (args.marks / f"{run.rank}-{os.getpid()}").open("a", buffering=1)
    attempt = os.environ.get("DTRAIN_ATTEMPT", "0")
    batches = iter(data)
    last = args.steps
    noted = False
    for step in run.steps(args.steps):
        if not noted:
            note(args.digests, run, f"{attempt} {run.world_size} {step}", model, optimizer)
            noted = True
        if step >= last:
            run.finish()
            break
        picked = torch.tensor(next(batches), dtype=torch.float32)
        loss = model(torch.sin(picked[:, None] * torch.arange(1, 8) / 50)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note(args.digests, run, f"{attempt} {run.world_size} {step + 1}", model, optimizer)
        stop = torch.tensor(float(run.rank == 0 and args.stop_file.exists()))
        dist.all_reduce(stop)
        if stop > 0:
            last = step + 1
        run.report(loss=loss.item())
        marks.write(f"{time.monotonic_ns()} {os.getpid()} {attempt} {run.rank} {step}\n")
        time.sleep(args.pause_ms / 1000)


def note(
    path: Path, run: trainer.Run, where: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Collective: every rank gives its shards."""
    found = hashlib.sha256()
    tensors = list(model.state_dict().values())
    for part in optimizer.state_dict()["state"].values():
        tensors += part.values()
    for tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(whole.detach().contiguous().numpy().tobytes())
    if run.rank == 0:
        with path.open("a") as file:
            file.write(f"{where} {found.hexdigest()}\n")


if __name__ == "__main__":
    main()
