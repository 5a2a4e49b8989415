"""Handwritten digits with Lightning, on machines that fail.

    dtrain run examples/lightning/job.yaml          # a cluster of its own, torn down at the end
    dtrain submit examples/lightning/job.yaml       # on a running cluster
    python examples/lightning/train.py --steps 40   # one process, no dtrain needed

The images ship with scikit-learn, so nothing is downloaded. Kill any process at any
moment: training goes on from the newest checkpoint and ends with the same weights, bit for bit.
"""

import argparse
import time

import lightning as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dtrain.integrations.lightning import Batches, DtrainCallback, placement


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.layers(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _index: int) -> None:
        images, labels = batch
        right = (self.layers(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rest(Callback):
    """Time to watch."""

    def __init__(self, pause_ms: float) -> None:
        self.pause_ms = pause_ms

    def on_train_batch_end(self, *_args: object) -> None:
        time.sleep(self.pause_ms / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pause-ms", type=float, default=0.0, help="rest after each batch")
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    everything = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1)).tolist()
    batches = Batches(Subset(everything, order[300:]), batch_size=16, steps_per_epoch=20, seed=2)
    dtrain = DtrainCallback(batches)

    pl.seed_everything(7)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        accumulate_grad_batches=2,
        val_check_interval=10,
        log_every_n_steps=5,
        callbacks=[dtrain, EarlyStopping("accuracy", patience=10_000, mode="max"), Rest(args.pause_ms)],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=True,  # dtrain's; there is no other one
        **placement(),
    )
    trainer.fit(Digits(), batches, DataLoader(Subset(everything, order[:300]), batch_size=100))
    if dtrain.run.rank == 0:
        print(f"accuracy {float(trainer.callback_metrics['accuracy']):.4f}", flush=True)


if __name__ == "__main__":
    main()
