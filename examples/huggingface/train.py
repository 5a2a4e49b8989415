"""A tiny GPT-2 trained by Hugging Face's Trainer, on machines that fail.

    dtrain run examples/huggingface/job.yaml          # a cluster of its own, torn down at the end
    dtrain submit examples/huggingface/job.yaml       # on a running cluster
    python examples/huggingface/train.py --steps 40   # one process, no dtrain needed

Nothing is downloaded: the model is built from a configuration with random weights,
the text is generated. Kill any process at any moment: training goes on from the
newest checkpoint and ends with the same weights, bit for bit.
"""

import argparse
import os
import random
import tempfile
import time

import torch
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dtrain.integrations.huggingface import DtrainCallback

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS, LENGTH = 61, 32


class Sums(Dataset):
    """Sequences in which each number follows from the two before it."""

    def __init__(self, count: int, seed: int) -> None:
        chosen = random.Random(seed)
        self.rows = []
        for _ in range(count):
            row = [chosen.randrange(WORDS), chosen.randrange(WORDS)]
            while len(row) < LENGTH:
                row.append((row[-1] + row[-2]) % WORDS)
            self.rows.append(torch.tensor(row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Rest(TrainerCallback):
    """Time to watch."""

    def __init__(self, pause_ms: float) -> None:
        self.pause_ms = pause_ms

    def on_step_end(self, *_args: object, **_have: object) -> None:
        time.sleep(self.pause_ms / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pause-ms", type=float, default=0.0, help="rest after each step")
    args = parser.parse_args()

    dtrain = DtrainCallback()
    set_seed(7)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{tempfile.gettempdir()}/dtrain-huggingface",
            max_steps=args.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            warmup_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            metric_for_best_model="loss",
            load_best_model_at_end=False,
            logging_steps=10,
            save_strategy="no",  # dtrain saves
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            seed=7,
        ),
        train_dataset=Sums(500, seed=1),
        eval_dataset=Sums(40, seed=2),
        callbacks=[dtrain, EarlyStoppingCallback(10_000), Rest(args.pause_ms)],
    )
    dtrain.train(trainer)
    loss = trainer.evaluate()["eval_loss"]  # all ranks take part
    if dtrain.run.rank == 0:
        print(f"loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
