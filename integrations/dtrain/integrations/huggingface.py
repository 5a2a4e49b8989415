"""Hugging Face's ``Trainer`` under dtrain: ``pip install 'dtrain[hf]'``.

::

    from dtrain.integrations.huggingface import DtrainCallback

    dtrain = DtrainCallback()
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[dtrain])
    dtrain.train(trainer)            # instead of trainer.train()

The cluster says when a checkpoint is taken; model, optimizer, scheduler, scaler, random numbers, the
trainer's own state and the position in the data are in it. After a failure training goes on behind
the last optimizer step of the newest checkpoint, with the batches that would have come.
``save_strategy`` may be ``"no"``: what Trainer itself saves is for other uses. Without dtrain it does
nothing at all.

A snapshot is taken where the next step begins: evaluation and logging of the one before are over by
then, and the random numbers are those that the step will use.

What it does not do: DeepSpeed, which keeps its state out of sight; ``auto_find_batch_size``, which changes
what a step is; datasets without a length, whose position nobody knows. They are refused.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from dtrain import trainer as sdk
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import rng

_KEPT = ("epoch", "global_step", "total_flos", "num_input_tokens_seen", "best_metric", "best_global_step")
"""Of ``TrainerState``: what training has made of it and is the same on all ranks. Its ``log_history`` is not,
and begins with the attempt."""


class DtrainCallback(TrainerCallback):
    """Saves when the cluster asks for it, and shows progress there. ``run``: of ``dtrain.trainer.join``."""

    def __init__(self, run: sdk.Run | None = None) -> None:
        # Before TrainingArguments look for a process group: they take the one that is there.
        self.run = run if run is not None else sdk.join()
        self._book: _Book | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._aside = contextlib.ExitStack()

    def train(self, trainer: Any, **options: Any) -> Any:
        """Do what ``trainer.train(**options)`` does, from where the job's newest checkpoint left off.

        Raises:
            Refused: USAGE; the trainer is of a kind whose state cannot be restored exactly.
        """
        _check(trainer)
        self._book = _Book(trainer)
        step = self.run.starts_at()
        if not step:
            return trainer.train(**options)
        with tempfile.TemporaryDirectory(prefix="dtrain-hf-") as folder, _weights_elsewhere(trainer):
            # All that Trainer wants to know of a checkpoint before it has made what is restored: the step.
            size = trainer.args.train_batch_size
            known = TrainerState(global_step=step, train_batch_size=size)
            known.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
            return trainer.train(resume_from_checkpoint=folder, **options)

    # What Trainer calls -----------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **have: Any) -> None:
        """Restore what Trainer has made by now."""
        del control
        # What came from the folder has defaults in place of the arguments'.
        state.compute_steps(args, state.max_steps)
        tracked: dict[str, Any] = {"model": have["model"], "optimizer": _inner(have["optimizer"])}
        if have.get("lr_scheduler") is not None:
            tracked["scheduler"] = _inner(have["lr_scheduler"])
        book = self._book
        if book is not None:
            book.state = state
            tracked["trainer"] = book
            scaler = getattr(book.trainer.accelerator, "scaler", None)
            if scaler is not None:
                tracked["scaler"] = scaler
        self.run.track(**tracked)
        step = self.run.restore()
        if step != state.global_step:
            raise Refused(
                ErrorCode.USAGE,
                f"the job's checkpoint is of step {step}, and Trainer begins at step {state.global_step}",
                fix="call train(trainer) of the DtrainCallback instead of trainer.train()",
            )
        if step:
            self._resumed = rng.collect(self.run.rank)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_have: Any) -> None:
        """Take a snapshot if one is wanted of the step before."""
        del args, control
        self._aside.close()
        if self._resumed is not None:
            # Reading ahead to this batch has drawn some, which the run that was interrupted did long before.
            rng.install(self.run.rank, self._resumed)
            self._resumed = None
        elif state.global_step > self.run.step and self.run.should_checkpoint(state.global_step):
            self.run.save(state.global_step)
        self._leave_if_over()

    def on_step_end(self, args: Any, state: Any, control: Any, **_have: Any) -> None:
        """No step is expected while Trainer evaluates or saves."""
        del args
        if control.should_evaluate or control.should_save or state.global_step >= state.max_steps:
            self._aside.enter_context(self.run.section("evaluate"))

    def on_epoch_begin(self, *_args: Any, **_have: Any) -> None:
        """Go on after what was done at the end of an epoch."""
        self._aside.close()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_have: Any) -> None:
        """The same at the end of an epoch."""
        del args, state
        if control.should_evaluate or control.should_save:
            self._aside.enter_context(self.run.section("evaluate"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_have: Any) -> None:
        """Show the numbers beside the job's progress."""
        del args, state, control
        numbers = {str(name): value for name, value in (logs or {}).items() if _is_number(value)}
        self.run.report(**numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **_have: Any) -> None:
        """See the job's last checkpoint taken."""
        del args, control
        self._aside.close()
        if state.global_step > self.run.step and self.run.should_checkpoint(state.global_step):
            self.run.save(state.global_step)
        self.run.finish()

    def _leave_if_over(self) -> None:
        if self.run.should_stop():
            # Ends the process: behind the loop a script expects trained weights.
            self.run.finish()


class _Book:
    """The trainer's own state and that of its callbacks, as JSON that is the same on all ranks."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.state: Any = None

    def state_dict(self) -> dict[str, Any]:
        state = self.state
        whole = {
            "state": {name: getattr(state, name) for name in _KEPT if hasattr(state, name)},
            "callbacks": [[type(one).__name__, one.state()["attributes"]] for one in self._stateful()],
        }
        # As text: numbers such as NaN in a log are no reason not to save.
        return {"json": json.dumps(whole, default=str)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        whole = json.loads(saved["json"])
        for name, value in whole["state"].items():
            if hasattr(self.state, name):
                setattr(self.state, name, value)
        left = list(self._stateful())
        for kind, attributes in whole["callbacks"]:
            match = next((one for one in left if type(one).__name__ == kind), None)
            if match is not None:
                left.remove(match)
                for name, value in attributes.items():
                    setattr(match, name, value)

    def _stateful(self) -> Iterator[Any]:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                yield callback


@contextlib.contextmanager
def _weights_elsewhere(trainer: Any) -> Iterator[None]:
    """Have Trainer look for no weights in the folder: they come when the optimizer is there, too."""
    trainer._load_from_checkpoint = lambda *_args, **_options: None
    try:
        yield
    finally:
        del trainer._load_from_checkpoint


def _check(trainer: Any) -> None:
    why = ""
    if getattr(trainer, "is_deepspeed_enabled", False):
        why = "DeepSpeed keeps its state out of sight"
    elif trainer.args.auto_find_batch_size:
        why = "auto_find_batch_size changes what a step is"
    elif trainer.args.ignore_data_skip:
        why = "ignore_data_skip begins with other data after each restart"
    elif not hasattr(trainer.train_dataset, "__len__"):
        why = "nobody knows the position in a dataset without a length"
    if why:
        raise Refused(
            ErrorCode.USAGE,
            f"this Trainer cannot be restored exactly: {why}",
            fix="change that, or train with Trainer's own checkpoints and without DtrainCallback",
        )


def _inner(thing: Any) -> Any:
    """What accelerate has wrapped."""
    wrapped = {"AcceleratedOptimizer": "optimizer", "AcceleratedScheduler": "scheduler"}
    name = wrapped.get(type(thing).__name__)
    return thing if name is None else getattr(thing, name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
