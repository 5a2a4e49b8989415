"""torchdata's StatefulDataLoader resumes where each rank was, or says why it cannot."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.trainer import pipeline
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from dtrain import trainer
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.stateful import StatefulLoader

N = 48
WORLD = 2
STEPS = 14
"""More than two epochs of two ranks with batches of four."""


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


class Mixture(IterableDataset[int]):
    """Two endless sources, mixed by chance; its state counts what came from each."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.counts = {"books": 0, "web": 0}
        self.rng = random.Random(rank)

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        while True:
            source = "web" if (sum(self.counts.values()) * 7 + worker) % 10 < 7 else "books"
            self.counts[source] += 1
            yield 1_000_000 * self.rank + 10_000 * worker + 100 * self.counts[source] + len(source)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "weights": torch.tensor([0.7, 0.3])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["weights"], torch.tensor([0.7, 0.3]))
        self.counts = dict(state["counts"])


def shuffled(rank: int, world: int, workers: int, **more: Any) -> StatefulLoader:
    sampler = StatefulDistributedSampler(Numbers(), num_replicas=world, rank=rank, shuffle=True, seed=5)
    loader: StatefulDataLoader[int] = StatefulDataLoader(
        Numbers(), batch_size=4, sampler=sampler, num_workers=workers
    )
    return StatefulLoader(loader, rank=rank, world_size=world, **more)


def plain(rank: int, world: int, workers: int, **more: Any) -> StatefulLoader:
    """Shuffled by torchdata's own sampler, which draws its seed when it is made, as scripts do first."""
    torch.manual_seed(11 + rank)
    loader: StatefulDataLoader[int] = StatefulDataLoader(
        Numbers(), batch_size=4, shuffle=True, num_workers=workers
    )
    return StatefulLoader(loader, rank=rank, world_size=world, seed=9, **more)


def mixed(rank: int, world: int, workers: int, **more: Any) -> StatefulLoader:
    loader: StatefulDataLoader[int] = StatefulDataLoader(Mixture(rank), batch_size=4, num_workers=workers)
    return StatefulLoader(loader, rank=rank, world_size=world, **more)


def take(batches: Iterator[Any], count: int) -> list[list[int]]:
    return [next(batches).tolist() for _ in range(count)]


def save(folder: Path, loaders: list[StatefulLoader]) -> Any:
    """Save as ``run.track(data=loader)`` does on each rank."""
    return pipeline.save(folder, [{f"data/{rank}": loader} for rank, loader in enumerate(loaders)])


def load(folder: Path, order: Any, loader: StatefulLoader, rank: int, world: int) -> None:
    pipeline.load(folder, order, {f"data/{rank}": loader}, rank, world)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("workers", "at"), [(0, 5), (0, 6), (0, 12), (2, 6), (2, 8)])  # an epoch has six
@pytest.mark.parametrize("make", [shuffled, plain, mixed])
def test_the_ids_over_an_interruption_are_those_of_a_run_without_one(
    tmp_path: Path, make: Any, workers: int, at: int
) -> None:
    if make is plain and at == 6:
        at = N // 4  # every rank walks all of it
    whole = [take(iter(make(rank, WORLD, workers)), STEPS) for rank in range(WORLD)]
    loaders = [make(rank, WORLD, workers) for rank in range(WORLD)]
    before = [take(iter(loader), at) for loader in loaders]
    order = save(tmp_path / "store", loaders)
    for rank in range(WORLD):
        resumed = make(rank, WORLD, workers)
        batches = iter(resumed)  # before the restore: nothing is taken yet
        load(tmp_path / "store", order, resumed, rank, WORLD)
        assert before[rank] + take(batches, STEPS - at) == whole[rank]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_taking_batches_draws_none_of_the_processs_random_numbers(workers: int) -> None:
    loader = plain(0, 1, workers)
    before = torch.get_rng_state()
    take(iter(loader), 15)
    loader.state_dict()
    assert torch.equal(before, torch.get_rng_state())


def test_each_epoch_is_shuffled_anew_and_each_rank_sees_its_own() -> None:
    both = [take(iter(shuffled(rank, WORLD, 0)), 12) for rank in range(WORLD)]
    first = [sample for rank in both for batch in rank[:6] for sample in batch]
    second = [sample for rank in both for batch in rank[6:] for sample in batch]
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second


def test_ranks_save_under_names_of_their_own_and_counters_are_json(tmp_path: Path) -> None:
    loaders = [mixed(rank, WORLD, 0) for rank in range(WORLD)]
    for rank, loader in enumerate(loaders):
        take(iter(loader), 2 + rank)
    order = save(tmp_path / "store", loaders)
    manifest = pipeline.manifest(tmp_path / "store", order)
    counts = []
    for rank in range(WORLD):
        text = json.dumps(manifest.objects[f"data/{rank}"].value)
        found = re.search(r'"counts"[:,] \{"books": (\d+), "web": (\d+)\}', text)
        assert found, text
        counts.append(sum(int(count) for count in found.groups() if count))
    assert counts == [8, 12]
    assert not any(name.startswith("data") for name in manifest.tensors)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_another_number_of_ranks_or_workers_is_refused_with_the_ways_out(
    tmp_path: Path, world: int, workers: int
) -> None:
    loaders = [shuffled(rank, WORLD, 0) for rank in range(WORLD)]
    for loader in loaders:
        take(iter(loader), 8)
    order = save(tmp_path / "store", loaders)
    for rank in range(world):
        with pytest.raises(Refused, match="2 ranks with 0 workers each; here are") as refused:
            load(tmp_path / "store", order, shuffled(rank, world, workers), rank, world)
        assert refused.value.code is ErrorCode.RESTORE_FAILED
        assert "restart_epoch=True" in (refused.value.fix or "")
        assert "trainer.Sampler" in (refused.value.fix or "")


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_restarting_the_epoch_is_a_choice(tmp_path: Path, world: int, workers: int) -> None:
    loaders = [shuffled(rank, WORLD, 0) for rank in range(WORLD)]
    for loader in loaders:
        take(iter(loader), 8)  # two batches into the second epoch
    order = save(tmp_path / "store", loaders)
    seen: list[int] = []
    for rank in range(world):
        resumed = shuffled(rank, world, workers, restart_epoch=True)
        load(tmp_path / "store", order, resumed, rank, world)
        assert resumed.epoch == 1
        seen += [sample for batch in take(iter(resumed), N // world // 4) for sample in batch]
    assert sorted(seen) == list(range(N))


def test_a_position_that_was_loaded_and_not_gone_to_is_saved_again(tmp_path: Path) -> None:
    loader = shuffled(0, 1, 0)
    take(iter(loader), 5)
    order = save(tmp_path / "first", [loader])
    resumed = shuffled(0, 1, 0)
    load(tmp_path / "first", order, resumed, 0, 1)
    load(tmp_path / "first", order, resumed, 0, 1)  # a checkpoint that changed while it was read is read anew
    again = save(tmp_path / "second", [resumed])
    third = shuffled(0, 1, 0)
    load(tmp_path / "second", again, third, 0, 1)
    assert take(iter(third), 4) == take(iter(loader_at(5)), 4)


def loader_at(steps: int) -> Iterator[Any]:
    batches = iter(shuffled(0, 1, 0))
    take(batches, steps)
    return batches


def test_a_loader_that_is_tracked_bare_is_refused() -> None:
    run = trainer.Run(0, 1, 0, None)
    bare: StatefulDataLoader[int] = StatefulDataLoader(Numbers(), batch_size=4)
    with pytest.raises(Refused, match="each rank has a position of its own") as refused:
        run.track(data=bare)
    assert "StatefulLoader(loader)" in (refused.value.fix or "")
    run.track(data=StatefulLoader(bare))
    run.close()


def test_what_is_no_stateful_loader_is_refused() -> None:
    with pytest.raises(Refused, match="StatefulDataLoader, not DataLoader"):
        StatefulLoader(torch.utils.data.DataLoader(Numbers()))


def test_a_state_that_is_a_buffer_of_samples_is_refused() -> None:
    class Buffering(Mixture):
        def state_dict(self) -> dict[str, Any]:
            return {"buffer": torch.zeros(1_000_000, dtype=torch.uint8)}

    buffering: StatefulDataLoader[int] = StatefulDataLoader(Buffering(0), batch_size=4)
    loader = StatefulLoader(buffering, rank=0, world_size=1)
    take(iter(loader), 1)
    with pytest.raises(Refused, match="bytes as JSON, at most") as refused:
        loader.state_dict()
    assert refused.value.code is ErrorCode.STATE_NOT_SAVABLE


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 0), (3, 2), (4, 0)])
def test_the_global_loader_goes_on_at_any_number_of_ranks(tmp_path: Path, world: int, workers: int) -> None:
    """Each sample once per epoch, whatever the number of ranks before and after."""

    def loader(rank: int, ranks: int) -> trainer.Loader:
        sampler = trainer.Sampler(N, 4, seed=1, rank=rank, world_size=ranks)
        return trainer.Loader(Numbers(), sampler, num_workers=workers)

    before = [loader(rank, WORLD) for rank in range(WORLD)]
    taken = [take(iter(one), 3) for one in before]
    seen = [sample for step in zip(*taken, strict=True) for batch in step for sample in batch]
    order = pipeline.save(tmp_path / "store", [{"data": one} for one in before])
    after = [loader(rank, world) for rank in range(world)]
    for rank, one in enumerate(after):
        pipeline.load(tmp_path / "store", order, {"data": one}, rank, world)
    steps = (N - len(seen)) // (4 * world)
    rest = [take(iter(one), steps) for one in after]
    seen += [sample for step in zip(*rest, strict=True) for batch in step for sample in batch]
    assert len(seen) == len(set(seen))
    assert sorted(seen) == list(range(N)) if steps * 4 * world == N - 24 else set(seen) < set(range(N))
