"""Hugging Face's and Lightning's trainers against a small agent: interrupted anywhere, the same bits.

Where training is interrupted decides what has to be right: in the middle of an epoch, at its end, where
a validation is due. All of that draws random numbers: dropout, shuffling, loaders without a generator.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.trainer.conftest import arena_fd, new_run
from tests.unit.trainer.fake_agent import FakeAgent

from dtrain import trainer
from dtrain.protocol.errors import ErrorCode, Refused

__all__ = ["arena_fd", "new_run"]

NewRun = Callable[[FakeAgent], trainer.Run]
STEPS = 14
EPOCH_STEPS = 5


class InterruptedRunError(Exception):
    """Where the process would have been killed."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "DTRAIN_SOCKET"))]:
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def await_order(run: trainer.Run) -> None:
    """The order to save is there before the step that it is for."""
    deadline = time.monotonic() + 10
    while run._session is not None and run._session._begin is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def await_commit(agent: FakeAgent) -> None:
    deadline = time.monotonic() + 30
    while not agent.committed:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.inputs[index], "labels": self.inputs[index].sum()}


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))


def bits(model: torch.nn.Module) -> list[Any]:
    return [tensor.tolist() for tensor in model.state_dict().values()]


# Hugging Face --------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.net(x).squeeze(1)
        return {"loss": (found - labels).square().mean(), "logits": found}


def hf_trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(5)
    args = TrainingArguments(
        output_dir=str(folder / "hf"), max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=3, eval_strategy="steps",
        eval_steps=3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=5,
        **options,
    )  # fmt: skip
    data = Rows(4 * EPOCH_STEPS)
    return Trainer(
        model=Net(), args=args, train_dataset=data, eval_dataset=Rows(6), callbacks=list(callbacks)
    )


def hf_interrupting(run: trainer.Run, agent: FakeAgent, at: int) -> Any:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):  # type: ignore[misc,valid-type]
        def on_step_end(self, args: Any, state: Any, control: Any, **_have: Any) -> None:
            if state.global_step == 1:
                await_order(run)
            if state.global_step == at + 1:
                await_commit(agent)
                raise InterruptedRunError

    return Interrupt()


def evaluated(made: Any) -> list[tuple[int, float]]:
    return [(one["step"], one["eval_loss"]) for one in made.state.log_history if "eval_loss" in one]


needs_hf = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs dtrain[hf]")


@needs_hf
@pytest.mark.parametrize("at", [2, 3, EPOCH_STEPS, EPOCH_STEPS + 1, 2 * EPOCH_STEPS])
def test_hf_goes_on_with_the_same_bits(tmp_path: Path, new_run: NewRun, at: int) -> None:
    from dtrain.integrations.huggingface import DtrainCallback

    straight = hf_trainer(tmp_path)
    straight.train()

    with FakeAgent(tmp_path, saves=(at,)) as agent:
        run = new_run(agent)
        callback = DtrainCallback(run)
        with pytest.raises(InterruptedRunError):
            callback.train(hf_trainer(tmp_path, callback, hf_interrupting(run, agent, at)))
        (checkpoint,) = agent.committed
        assert checkpoint.step == at
        run.close()

    with FakeAgent(tmp_path, restore=replace(checkpoint, id="again")) as agent:
        callback = DtrainCallback(new_run(agent))
        again = hf_trainer(tmp_path, callback)
        torch.rand(7)  # another process has drawn other numbers before
        callback.train(again)
        assert [one.step for one in agent.committed] == [STEPS]
    assert bits(again.model) == bits(straight.model)
    assert again.state.global_step == STEPS
    assert again.state.epoch == straight.state.epoch
    assert evaluated(again) == [one for one in evaluated(straight) if one[0] > at]


@needs_hf
def test_hf_callbacks_keep_what_they_have_counted(tmp_path: Path, new_run: NewRun) -> None:
    from transformers import EarlyStoppingCallback

    from dtrain.integrations.huggingface import DtrainCallback

    options = {"metric_for_best_model": "loss", "greater_is_better": True}
    stopping = EarlyStoppingCallback(100)
    with FakeAgent(tmp_path, saves=(10,)) as agent:
        run = new_run(agent)
        callback = DtrainCallback(run)
        with pytest.raises(InterruptedRunError):
            callback.train(
                hf_trainer(tmp_path, callback, stopping, hf_interrupting(run, agent, 10), **options)
            )
        (checkpoint,) = agent.committed
        run.close()
    fresh = EarlyStoppingCallback(100)
    with FakeAgent(tmp_path, restore=replace(checkpoint, id="again")) as agent:
        callback = DtrainCallback(new_run(agent))
        again = hf_trainer(tmp_path, callback, fresh, **options)
        seen: list[int] = []
        begin = callback.on_train_begin

        def look(*args: Any, **have: Any) -> None:
            begin(*args, **have)
            seen.append(fresh.early_stopping_patience_counter)

        callback.on_train_begin = look
        callback.train(again)
    assert seen[0] >= 1
    assert again.state.best_metric is not None


@needs_hf
def test_hf_is_refused_where_it_would_begin_anew(tmp_path: Path, new_run: NewRun) -> None:
    from dtrain.integrations.huggingface import DtrainCallback

    with FakeAgent(tmp_path, saves=(2,)) as agent:
        run = new_run(agent)
        callback = DtrainCallback(run)
        with pytest.raises(InterruptedRunError):
            callback.train(hf_trainer(tmp_path, callback, hf_interrupting(run, agent, 2)))
        (checkpoint,) = agent.committed
        run.close()
    with FakeAgent(tmp_path, restore=replace(checkpoint, id="again")) as agent:
        callback = DtrainCallback(new_run(agent))
        with pytest.raises(Refused, match=r"train\(trainer\)|is of step 2") as told:
            hf_trainer(tmp_path, callback).train()
        assert told.value.code is ErrorCode.USAGE


@needs_hf
def test_hf_without_an_agent_trains_as_ever(tmp_path: Path) -> None:
    from dtrain.integrations.huggingface import DtrainCallback

    straight = hf_trainer(tmp_path)
    straight.train()
    callback = DtrainCallback(trainer.Run(0, 1, 0, None))
    same = hf_trainer(tmp_path, callback)
    callback.train(same)
    assert bits(same.model) == bits(straight.model)
    with pytest.raises(Refused, match="ignore_data_skip"):
        callback.train(hf_trainer(tmp_path, callback, ignore_data_skip=True))


# Lightning -----------------------------------------------------------------------------

needs_lightning = pytest.mark.skipif(
    not importlib.util.find_spec("lightning"), reason="needs dtrain[lightning]"
)


def module() -> Any:
    import lightning as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.validated: list[int] = []

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            loss = (self.net(batch["x"]).squeeze(1) - batch["labels"]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, _index: int) -> None:
            torch.rand(3)
            self.validated.append(self.trainer.global_step)
            self.log("val", (self.net(batch["x"]).squeeze(1) - batch["labels"]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def fit(run: trainer.Run, *callbacks: Any, accumulate: int = 2) -> Any:
    import lightning as pl
    from lightning.pytorch.callbacks import EarlyStopping

    from dtrain.integrations.lightning import Batches, DtrainCallback

    batches = Batches(Rows(31), batch_size=2, steps_per_epoch=accumulate * EPOCH_STEPS, seed=4)
    pl.seed_everything(5, verbose=False)
    made = module()
    fitting = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, accumulate_grad_batches=accumulate, logger=False,
        val_check_interval=3 * accumulate if 3 * accumulate < len(batches) else 1.0, log_every_n_steps=2,
        callbacks=[DtrainCallback(batches, run), EarlyStopping("val", patience=1000), *callbacks],
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        fitting.fit(made, batches, torch.utils.data.DataLoader(Rows(6), batch_size=3))
    finally:
        made.fitting = fitting
    return made


def pl_interrupting(run: trainer.Run, agent: FakeAgent, at: int) -> Any:
    from lightning.pytorch.callbacks import Callback

    class Interrupt(Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *_rest: Any) -> None:
            if trainer.global_step == 1:
                await_order(run)
            if trainer.global_step == at + 1:
                await_commit(agent)
                raise InterruptedRunError

    return Interrupt()


@needs_lightning
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [2, 3, EPOCH_STEPS, EPOCH_STEPS + 1, 2 * EPOCH_STEPS])
def test_lightning_goes_on_with_the_same_bits(
    tmp_path: Path, new_run: NewRun, at: int, accumulate: int
) -> None:
    straight = fit(trainer.Run(0, 1, 0, None), accumulate=accumulate)

    with FakeAgent(tmp_path, saves=(at,)) as agent:
        run = new_run(agent)
        with pytest.raises(InterruptedRunError):
            fit(run, pl_interrupting(run, agent, at), accumulate=accumulate)
        (checkpoint,) = agent.committed
        assert checkpoint.step == at
        run.close()

    with FakeAgent(tmp_path, restore=replace(checkpoint, id="again")) as agent:
        again = fit(new_run(agent), accumulate=accumulate)
        assert [one.step for one in agent.committed] == [STEPS]
    assert bits(again.net) == bits(straight.net)
    assert again.fitting.global_step == STEPS
    assert again.fitting.current_epoch == straight.fitting.current_epoch
    later = [step for step in straight.validated if step > at]
    assert [step for step in again.validated if step > at] == later


@needs_lightning
def test_an_epoch_has_its_steps_and_the_stream_goes_on_behind_it() -> None:
    from dtrain.integrations.lightning import Batches

    batches = Batches(Rows(10), batch_size=2, steps_per_epoch=4, seed=1)
    first, second = list(batches), list(batches)
    assert (len(batches), len(first), len(second)) == (4, 4, 4)
    other = Batches(Rows(10), batch_size=2, steps_per_epoch=4, seed=1)
    other.go_to(6)
    rest = list(other)
    assert [one["x"].tolist() for one in rest] == [one["x"].tolist() for one in second[2:]]
    with pytest.raises(Refused):
        Batches(Rows(10), batch_size=2, steps_per_epoch=0)
