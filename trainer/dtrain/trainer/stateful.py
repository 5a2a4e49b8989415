"""torchdata's StatefulDataLoader, resumed exactly: each rank's own state, under a name of its own.

Its state says what this rank's workers have handed out: it fits the same ranks with
the same workers, and nothing else. ``Loader`` with ``Sampler`` keeps one global
position instead, which any number of ranks resumes from; prefer it where the data
is map-style.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer import process_group, timing
from dtrain.trainer.checkpoint import plain

STATE_BYTES_MAX = 1024 * 1024
"""Of one rank's loader, as JSON: it goes into the manifest, which every rank reads."""

log = logging.getLogger("dtrain.trainer")


class StatefulLoader:
    """Endless batches of a ``StatefulDataLoader``: ``run.track(data=StatefulLoader(loader))``.

    Iterating walks epoch after epoch and begins at the saved position when the
    first batch is taken, so after a restore. A sampler with ``set_epoch`` is told
    each epoch. Shuffling and worker seeds are drawn from (``seed``, epoch, rank)
    where the loader and its sampler have no generator of their own: the process's
    random numbers are not touched, as a resumed run would draw them once more.
    Random numbers that workers draw start afresh on a resume, unless the dataset's
    state holds them.

    Args:
        loader: of this rank; only this object iterates it.
        restart_epoch: where ranks or workers are other than when it was saved,
            begin the epoch again instead of refusing to load: samples of it are
            seen twice.
        seed: of shuffling and workers; a resumed run must use the same.
        rank: of this process; None takes torchrun's RANK.
        world_size: None takes torchrun's WORLD_SIZE.
    """

    def __init__(
        self,
        loader: Any,
        *,
        restart_epoch: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not _is_stateful_loader(loader):
            raise Refused(
                ErrorCode.USAGE,
                f"a StatefulLoader takes a torchdata StatefulDataLoader, not {type(loader).__name__}",
                fix="use trainer.Loader with trainer.Sampler for map-style datasets",
            )
        env_rank, env_world, _ = process_group.world()
        self.loader = loader
        self.seed = seed
        self._restart = restart_epoch
        self._rank = env_rank if rank is None else rank
        self._world = env_world if world_size is None else world_size
        self._epoch = 0
        self._begun = False
        self._pending: Any = None
        """A position that was loaded and not yet gone to."""
        self._generators = self._take_generators()

    @property
    def epoch(self) -> int:
        """Epoch of the batch that was handed out last, from 0."""
        return self._epoch

    def __iter__(self) -> Iterator[Any]:
        while True:
            resumed, handed_out = self._pending is not None, 0
            for batch in timing.waited(self._begin_epoch()):
                handed_out += 1
                yield batch
            # One that was saved behind its last batch resumes with none.
            if not handed_out and not resumed:
                raise Refused(ErrorCode.USAGE, "the data loader has no batch for this rank")
            self._epoch += 1
            self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: JSON values only.

        Raises:
            Refused: STATE_NOT_SAVABLE; the dataset's state is too large or no JSON.
        """
        # Asked before its first batch the loader would start its workers.
        state = self.loader.state_dict() if self._begun else self._pending
        encoded = plain.encode(state, "data")
        size = len(json.dumps(encoded))
        if size > STATE_BYTES_MAX:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE,
                f"the data loader's state has {size} bytes as JSON, at most {STATE_BYTES_MAX} can be saved",
                fix="keep positions and counters in the dataset's state, not samples",
            )
        return {
            "epoch": self._epoch,
            "loader": encoded,
            "workers": self.loader.num_workers,
            "world": self._world,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from this rank's part alone.

        Raises:
            Refused: RESTORE_FAILED; it is of other ranks or workers.
        """
        self.load_parts({self._rank: state})

    def load_parts(self, parts: Mapping[int, Any]) -> None:
        """Go on from the parts of all ranks that saved.

        Raises:
            Refused: RESTORE_FAILED; ranks or workers are others, and ``restart_epoch`` is off.
        """
        own = parts.get(self._rank)
        any_part = own if own is not None else next(iter(parts.values()))
        was, now = (any_part["world"], any_part["workers"]), (self._world, self.loader.num_workers)
        if own is not None and was == now:
            self._epoch = own["epoch"]
            self._pending = plain.decode(own["loader"])
            self._begun = False
            return
        what = f"{was[0]} ranks with {was[1]} workers each; here are {now[0]} with {now[1]}"
        if not self._restart:
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"the data loader's position was saved by {what}",
                fix="resume with the same ranks and workers, or pass restart_epoch=True to begin the epoch"
                " again, or use trainer.Loader with trainer.Sampler, whose position fits any number",
            )
        self._epoch = max(part["epoch"] for part in parts.values())
        self._pending = None
        self._begun = False
        log.warning("the data position was saved by %s: epoch %d begins again", what, self._epoch)

    def _begin_epoch(self) -> Iterator[Any]:
        for sampler in (self.loader.sampler, getattr(self.loader.batch_sampler, "sampler", None)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self._epoch)
        for what, generator in self._generators.items():
            text = f"{self.seed}/{self._epoch}/{self._rank}/{what}".encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        if self._pending is not None:
            self.loader.load_state_dict(self._pending)
            self._pending = None
        batches: Iterator[Any] = iter(self.loader)
        self._begun = True
        return batches

    def _take_generators(self) -> dict[str, Any]:
        """Generators of our own for whatever would draw from the process's."""
        import torch

        batch_sampler = self.loader.batch_sampler
        places = {
            "loader": self.loader,
            "sampler": getattr(batch_sampler, "sampler", self.loader.sampler),
        }
        taken = {}
        for what, place in places.items():
            if getattr(place, "generator", self) is None:
                place.generator = taken[what] = torch.Generator()
        return taken


def check_loader(name: str, thing: Any) -> None:
    """Refuse a data loader that would be tracked as if its state were the same on all ranks.

    Raises:
        Refused: STATE_NOT_SAVABLE.
    """
    if _is_stateful_loader(thing):
        raise Refused(
            ErrorCode.STATE_NOT_SAVABLE,
            f"{name} is a StatefulDataLoader: each rank has a position of its own",
            fix=f"track {name}=trainer.StatefulLoader(loader) and take the batches from that",
        )


def _is_stateful_loader(thing: Any) -> bool:
    return any(
        kind.__module__.startswith("torchdata.stateful_dataloader") and kind.__name__ == "StatefulDataLoader"
        for kind in type(thing).__mro__
    )
