"""Handwritten digits with FSDP2, saved through torch.distributed.checkpoint into checkpoints of dtrain.

    dtrain run examples/dcp/job.yaml             # a cluster of its own, torn down at the end

A script that calls ``dcp.save`` and ``dcp.load`` keeps doing so: only the storage
changes, and with it what is there after a failure. Each save is one commit, of all
ranks or of none; every byte has a digest and is verified when it is loaded; and
the ranks that start again, as many as there are then, load the newest commit.
"""

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain import trainer


class App(Stateful):
    """Model, optimizer and data: one checkpoint holds everything."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: trainer.Sampler) -> None:
        self.model, self.optimizer, self.data = model, optimizer, data

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "data": self.data.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.data.load_state_dict(state_dict["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="rest after each step")
    args = parser.parse_args()

    torch.manual_seed(0)  # the same initial weights on every rank and in every run
    run = trainer.join()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)

    model = nn.Sequential(nn.Linear(64, 129), nn.ReLU(), nn.Linear(129, 10)).to(run.device)
    if run.world_size > 1:
        fully_shard(model, mesh=init_device_mesh(run.device.type, (run.world_size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = trainer.Sampler(len(images), batch_size=args.batch, seed=2)
    state = {"app": App(model, optimizer, data)}
    # async_save plans in a thread: collectives of its own must not mix with those of training.
    group = dist.new_group(backend="gloo") if run.world_size > 1 else None

    reader = run.dcp_reader()
    if reader.exists:
        dcp.load(state, storage_reader=reader)  # was: checkpoint_id="checkpoints/latest"
        if run.rank == 0:
            print(f"goes on from step {reader.step}", flush=True)

    batches = iter(data)
    saving = None
    for step in run.steps(args.steps):
        picked = next(batches)
        loss = nn.functional.cross_entropy(
            model(images[picked].to(run.device)), labels[picked].to(run.device)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss.item())
        done = step + 1
        if done % args.every == 0 or done == args.steps:
            if saving is not None:
                saving.result()  # raises if the one before was aborted; training could as well go on
            writer = run.dcp_writer(done)  # was: checkpoint_id=f"checkpoints/{done}"
            saving = dcp.async_save(state, storage_writer=writer, process_group=group)
            if run.rank == 0:
                print(f"step {done} loss {loss.item():.4f}", flush=True)
        if args.pause_ms:
            time.sleep(args.pause_ms / 1000)
    if saving is not None:
        saving.result()


if __name__ == "__main__":
    main()
