"""Lightning's ``Trainer`` under dtrain: ``pip install 'dtrain[lightning]'``.

::

    from dtrain.integrations.lightning import Batches, DtrainCallback

    batches = Batches(dataset, batch_size=32, steps_per_epoch=500, seed=7)
    trainer = Trainer(max_steps=10_000, callbacks=[DtrainCallback(batches)], **placement())
    trainer.fit(module, batches)

The cluster says when a checkpoint is taken; module, optimizers, schedulers, loops, callbacks, random
numbers and the position in the data are in it. After a failure training goes on behind the last optimizer
step of the newest checkpoint. ``ModelCheckpoint`` is not needed, nor ``ckpt_path``. Without dtrain it
only feeds the data.

``Batches`` is what makes a resume exact: Lightning itself begins an interrupted epoch's data again. What
is drawn between two batches, by validation above all, is given back: the random numbers of a step do not
depend on whether one was validated before it.

What it does not do: several dataloaders, manual optimization with several optimizers in one batch, and
strategies that keep optimizers out of sight (DeepSpeed).
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.callbacks import Checkpoint

from dtrain import trainer as sdk
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import rng

_TENSOR_NUMBERS_MAX = 1024
"""Of a callback's tensor: they hold scores, not weights."""


def placement() -> dict[str, Any]:
    """What ``lightning.Trainer`` is to be told of the job's size, which is said in the environment.

    Gradients are added in one order from the first step on: DDP that looks for unused
    parameters does not regroup them, so that a resumed run is the same bit for bit.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    several = local * nodes > 1
    strategy = "ddp_find_unused_parameters_true" if several else "auto"
    return {"devices": local, "num_nodes": nodes, "strategy": strategy, "use_distributed_sampler": False}


class Batches:
    """This rank's batches of a map-style dataset, in epochs of ``steps_per_epoch`` batches.

    All ranks walk one endless stream of permutations, so that no sample is dropped at the end of an epoch.
    ``options`` are of ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self, dataset: Any, *, batch_size: int, steps_per_epoch: int, seed: int = 0, **options: Any
    ) -> None:
        if steps_per_epoch < 1:
            raise Refused(ErrorCode.USAGE, f"an epoch of {steps_per_epoch} steps has no end")
        self.sampler = sdk.Sampler(len(dataset), batch_size=batch_size, seed=seed)
        self._loader = sdk.Loader(dataset, self.sampler, **options)
        self._steps = steps_per_epoch
        self._rank = int(os.environ.get("RANK", "0"))
        self.randomness: Mapping[str, Any] | None = None
        """What the next batch and the step with it are to draw from; None: from what is there."""

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        source = iter(self._loader)
        done = self.sampler.consumed // self.sampler.samples_per_step % self._steps
        for _ in range(self._steps - done):
            if self.randomness is not None:
                rng.install(self._rank, self.randomness)
                self.randomness = None
            yield next(source)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the callback keeps the position. It is there to tell Lightning that it need not warn."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing, as well: see ``go_to``."""

    def go_to(self, batches: int) -> None:
        """Go on behind so many batches of each rank."""
        state = self.sampler.state_dict()
        self.sampler.load_state_dict({**state, "consumed": batches * self.sampler.samples_per_step})


class DtrainCallback(Checkpoint):
    """Saves when the cluster asks for it, and shows progress there.

    A ``Checkpoint``, because Lightning calls those last: what other callbacks did in the step is saved, too.
    """

    def __init__(self, batches: Batches, run: sdk.Run | None = None) -> None:
        self.run = run if run is not None else sdk.join()
        self._batches = batches

    # What Trainer calls -----------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore what Trainer has made by now, before its loops begin."""
        if trainer.train_dataloader is not None and trainer.train_dataloader is not self._batches:
            raise Refused(
                ErrorCode.USAGE,
                "fit() got other data than DtrainCallback",
                fix="make one Batches, and give it to both",
            )
        tracked: dict[str, Any] = {"model": pl_module, "lightning": _Book(trainer, self._batches, self)}
        for number, optimizer in enumerate(trainer.optimizers):
            tracked["optimizer" if number == 0 else f"optimizer{number}"] = optimizer
        for number, config in enumerate(trainer.lr_scheduler_configs):
            tracked[f"scheduler{number}"] = config.scheduler
        self.run.track(**tracked)
        if self.run.restore():
            self._batches.randomness = rng.collect(self.run.rank)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is wanted of this step."""
        del pl_module, outputs, batch, batch_idx
        step = int(trainer.global_step)
        if step > self.run.step:  # else gradients were only gathered
            if step % trainer.log_every_n_steps == 0:
                numbers = trainer.callback_metrics.items()
                self.run.report(**{name.replace("/", "_"): float(value) for name, value in numbers})
            if self.run.should_checkpoint(step):
                self.run.save(step)
        # Whatever comes between draws from it: validation here, and none of it after a restart.
        self._batches.randomness = rng.collect(self.run.rank)
        if self.run.should_stop():
            # Ends the process: behind fit() a script expects trained weights.
            self.run.finish()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """See the job's last checkpoint taken."""
        del trainer, pl_module
        self.run.finish()


class _Book:
    """Progress of the loops and state of the callbacks, as JSON."""

    def __init__(self, trainer: Any, batches: Batches, owner: DtrainCallback) -> None:
        self._trainer = trainer
        self._batches = batches
        self._owner = owner

    def state_dict(self) -> dict[str, Any]:
        loop = self._trainer.fit_loop
        whole = {
            "loop": loop.state_dict(),
            "batches": loop.epoch_loop.batch_progress.total.processed,
            "callbacks": {one.state_key: _plain(one.state_dict()) for one in self._callbacks()},
        }
        return {"json": json.dumps(whole)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        whole = json.loads(saved["json"])
        self._trainer.fit_loop.load_state_dict(whole["loop"])
        # Not what the loader has handed out: Trainer may have taken the next one already.
        self._batches.go_to(whole["batches"])
        for callback in self._callbacks():
            if callback.state_key in whole["callbacks"]:
                callback.load_state_dict(_tensors(whole["callbacks"][callback.state_key]))

    def _callbacks(self) -> Iterator[Any]:
        for callback in self._trainer.callbacks:
            if callback is not self._owner and callback.state_dict():
                yield callback


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        if value.numel() > _TENSOR_NUMBERS_MAX:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE,
                f"a callback keeps a tensor of {value.numel()} numbers",
                fix="keep it in the module, as a buffer",
            )
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "__tensor__" in value:
            import torch

            return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
        return {key: _tensors(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_tensors(inner) for inner in value]
    return value
