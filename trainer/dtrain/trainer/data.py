"""Which samples come next, as a position that any number of ranks can resume from."""

import random
from collections.abc import Iterator
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer import process_group, timing


class Sampler:
    """Endless batches of indices for this rank; track it as ``run.track(data=sampler)``.

    All ranks walk one stream: epoch after epoch, each a permutation drawn from
    (seed, epoch). A step takes ``batch_size`` samples per rank from it, strided by
    rank, and a batch may span two epochs, so no sample is dropped or repeated.
    The state is the number of samples consumed by all ranks together.

    Each ``next()`` moves the position: take one batch per step. A DataLoader with
    workers would take more, reading ahead of training: use ``Loader`` for that.

    Args:
        n: samples in the dataset.
        batch_size: samples per rank and step.
        seed: of the permutations; a resumed run must use the same.
        shuffle: False walks in order.
        rank: of this process; None takes torchrun's RANK.
        world_size: None takes torchrun's WORLD_SIZE.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if n < 1 or batch_size < 1:
            raise Refused(ErrorCode.USAGE, "a sampler needs at least one sample and one per batch")
        env_rank, env_world, _ = process_group.world()
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._rank = env_rank if rank is None else rank
        self._world = env_world if world_size is None else world_size
        self._consumed = 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def consumed(self) -> int:
        """Samples consumed by all ranks."""
        return self._consumed

    @property
    def epoch(self) -> int:
        """Epoch of the next sample, from 0."""
        return self._consumed // self.n

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        batch = self.indices(self._consumed)
        self.advance()
        return batch

    @property
    def samples_per_step(self) -> int:
        """Samples that all ranks together take per step."""
        return self.batch_size * self._world

    def advance(self) -> None:
        """Count one step's samples as consumed."""
        self._consumed += self.samples_per_step

    def indices(self, consumed: int) -> list[int]:
        """This rank's batch at a position, without moving."""
        first = consumed + self._rank
        return [self._sample(first + i * self._world) for i in range(self.batch_size)]

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self._consumed, "n": self.n, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            Refused: RESTORE_FAILED; it belongs to another dataset, seed or order.
        """
        for name in ("n", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise Refused(
                    ErrorCode.RESTORE_FAILED,
                    f"the sampler has {name}={getattr(self, name)!r}, the checkpoint {state[name]!r}",
                    fix="resume with the same data, or leave the sampler untracked to start over",
                )
        self._consumed = state["consumed"]

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, self.n)
        if not self.shuffle:
            return index
        if self._order[0] != epoch:
            order = list(range(self.n))
            # A generator of its own: drawing from the global one would move it on some ranks only.
            random.Random(f"{self.seed}/{epoch}").shuffle(order)  # noqa: S311
            self._order = (epoch, order)
        return self._order[1][index]


class Loader:
    """A DataLoader that may read ahead, whose position is that of training: ``run.track(data=loader)``.

    Iterating is endless and begins at the sampler's position when the first batch
    is taken, so after a restore. The process's own random numbers are not drawn
    from; those that workers draw (``num_workers`` > 0) start afresh on a resume.

    Args:
        dataset: map-style.
        sampler: of this rank; only the loader moves it.
        options: of ``torch.utils.data.DataLoader``, without those about sampling.
    """

    def __init__(self, dataset: Any, sampler: Sampler, **options: Any) -> None:
        clash = sorted({"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"} & options.keys())
        if clash:
            raise Refused(ErrorCode.USAGE, f"{', '.join(clash)}: the sampler decides this")
        self.sampler = sampler
        self._dataset = dataset
        self._options = options

    def __iter__(self) -> Iterator[Any]:
        import torch
        from torch.utils.data import DataLoader

        # Its own generator: drawing a seed for the workers from the global one would
        # make a resumed run differ from an uninterrupted one.
        options = {"generator": torch.Generator().manual_seed(self.sampler.seed), **self._options}
        for batch in timing.waited(DataLoader(self._dataset, batch_sampler=_Ahead(self.sampler), **options)):
            # Counted when it is handed out: what workers hold ready is not consumed.
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``Sampler.load_state_dict``."""
        self.sampler.load_state_dict(state)


class _Ahead:
    """Batches from the sampler's position on, without moving it."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        position = self._sampler.consumed
        while True:
            yield self._sampler.indices(position)
            position += self._sampler.samples_per_step
