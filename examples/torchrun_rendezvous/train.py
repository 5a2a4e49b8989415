"""A plain torchrun script whose agents meet in etcd. Nothing in here knows of it.

    torchrun --rdzv-backend=dtrain --rdzv-endpoint=127.0.0.1:2379 --rdzv-id=demo \
        --nnodes=1:2 --nproc-per-node=2 --max-restarts=3 --rdzv-conf=last_call_timeout=2 \
        examples/torchrun_rendezvous/train.py --steps 200

Start it in two terminals, then end one, kill it, or start it later: the other
goes on from the last file that was saved, with as many ranks as there are.
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pace", type=float, default=0.05, help="seconds for each step")
    parser.add_argument("--checkpoint", type=Path, default=Path("torchrun_rendezvous.pt"))
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.module.load_state_dict(saved["model"])
        first = saved["step"]
    print(f"pid {os.getpid()}: rank {rank} of {size} starts at step {first}", flush=True)

    target = torch.linspace(-1, 1, 16)
    for step in range(first + 1, args.steps + 1):
        generator = torch.Generator().manual_seed(step * size + rank)
        inputs = torch.randn(32, 16, generator=generator)
        loss = nn.functional.mse_loss(model(inputs).squeeze(1), inputs @ target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(args.pace)
        if rank == 0 and step % 10 == 0:
            partial = args.checkpoint.with_suffix(".partial")
            torch.save({"model": model.module.state_dict(), "step": step}, partial)
            partial.replace(args.checkpoint)
            print(f"step {step} of {args.steps} with {size} ranks: loss {loss.item():.4f}", flush=True)

    dist.barrier()
    print(f"rank {rank} of {size} has done all {args.steps} steps", flush=True)
    # gloo's thread may still be letting go of the last collective, for which it needs the interpreter;
    # a process group that is destroyed in that moment waits for the thread, and the thread for it.
    time.sleep(0.1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
