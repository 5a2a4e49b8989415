"""An ordinary torchrun script: nothing of dtrain is imported here.

    torchrun --nproc-per-node 2 examples/plain_torchrun/train.py
    dtrain run examples/plain_torchrun/job.yaml

dtrain starts it, watches it and restarts it as torchrun would. Its progress
is its own business: without the SDK there are no coordinated checkpoints.
"""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel


@record
def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    print(
        f"rank {rank} of {world}, local rank {os.environ['LOCAL_RANK']}, "
        f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}",
        flush=True,
    )

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wanted = torch.arange(16.0)
    for step in range(200):
        batch = torch.randn(32, 16, generator=torch.Generator().manual_seed(step * world + rank))
        loss = nn.functional.mse_loss(model(batch).squeeze(1), batch @ wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    # gloo's thread may still be letting go of the last all-reduce, for which it needs the interpreter;
    # a process group that is destroyed in that moment waits for the thread, and the thread for it.
    time.sleep(0.1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
