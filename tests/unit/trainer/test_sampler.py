"""The data position is global: any number of ranks goes on from it."""

import pytest

from dtrain.protocol.errors import Refused
from dtrain.trainer import Loader, Sampler


def stream(world: int, steps: int, sampler_state: dict[str, object] | None = None) -> list[int]:
    """Samples in the order that all ranks together consume them."""
    samplers = [Sampler(10, 2, seed=1, rank=rank, world_size=world) for rank in range(world)]
    for sampler in samplers:
        if sampler_state is not None:
            sampler.load_state_dict(sampler_state)
    seen = []
    for _ in range(steps):
        batches = [next(sampler) for sampler in samplers]
        seen += [batch[i] for i in range(2) for batch in batches]
    return seen


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_epoch_visits_every_sample_once(world: int) -> None:
    seen = stream(world, 30 // world + 1)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_another_world_size_goes_on_with_the_same_stream(world: int) -> None:
    whole = stream(1, 40)
    before = Sampler(10, 2, seed=1, rank=1, world_size=4)
    next(before), next(before)
    assert before.consumed == 16
    assert before.epoch == 1
    after = stream(world, 4, before.state_dict())
    assert after == whole[16 : 16 + len(after)]


@pytest.mark.parametrize("workers", [-1, 0, 2])
def test_every_sample_is_seen_once_per_epoch_over_sizes_that_change(workers: int) -> None:
    """Two ranks, then one, then three: each size begins where the last one was saved, and what was done
    beyond a checkpoint, and is lost with its ranks, is done again."""
    n, batch = 50, 4
    seen: list[int] = []
    state: dict[str, object] | None = None
    for world, steps, lost in ((2, 7, 3), (1, 9, 0), (3, 8, 2), (2, 6, 0)):
        sources: list[Sampler | Loader] = []
        for rank in range(world):
            sampler = Sampler(n, batch, seed=1, rank=rank, world_size=world)
            # A Loader's workers read ahead of what is trained.
            sources.append(Loader(range(n), sampler, num_workers=workers) if workers >= 0 else sampler)
        iterators = [iter(source) for source in sources]
        for source in sources:
            if state is not None:
                source.load_state_dict(state)
        for step in range(steps + lost):
            if step == steps:
                state = sources[0].state_dict()
            batches = [[int(one) for one in next(iterator)] for iterator in iterators]
            if step < steps:
                seen += [each[i] for i in range(batch) for each in batches]
        if not lost:
            state = sources[0].state_dict()
    epochs = [seen[i : i + n] for i in range(0, len(seen), n)]
    assert len(epochs) > 4
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs[:-1])
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert epochs[0] != epochs[1]


def test_a_batch_may_span_two_epochs() -> None:
    sampler = Sampler(3, 4, shuffle=False, rank=0, world_size=1)
    assert [next(sampler), next(sampler)] == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_the_position_in_other_data_is_refused() -> None:
    with pytest.raises(Refused, match="n=11"):
        Sampler(11, 2, rank=0, world_size=1).load_state_dict(
            Sampler(10, 2, rank=0, world_size=1).state_dict()
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_reads_ahead_resumes_where_training_was(workers: int) -> None:
    import torch

    data = list(range(100, 110))

    def loader() -> Loader:
        return Loader(data, Sampler(10, 2, seed=1, rank=0, world_size=1), num_workers=workers)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = loader()
    batches = iter(first)
    seen = [next(batches).tolist() for _ in range(3)]
    state = first.state_dict()
    assert state["consumed"] == 6
    second = loader()
    more = iter(second)
    second.load_state_dict(state)  # after iter(), before the first batch
    seen += [next(more).tolist() for _ in range(4)]
    assert [value - 100 for batch in seen for value in batch] == stream(1, 7)
    assert torch.equal(before, torch.get_rng_state())
