"""Random numbers go on where they stood, on each rank; for other ranks, from what can be derived."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.trainer import pipeline

from dtrain import trainer
from dtrain.trainer.checkpoint import rng


def draw() -> list[float]:
    """One number of each of the process's generators."""
    return [random.random(), float(np.random.random()), torch.rand(1).item()]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save(folder: Path, tracked: list[dict[str, Any]]) -> tuple[Any, list[list[float]]]:
    """Save as so many ranks with generators of their own; also what each draws next."""
    orders, following = None, []
    folder.mkdir()
    world = len(tracked)
    sealed = []
    for rank, state in enumerate(tracked):
        seed_all(100 + rank)
        draw()
        sealed.append(pipeline.seal(state, rank, world))
        following.append(draw())
    orders = pipeline.upload_all(folder, sealed)
    return orders, following


def test_each_rank_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    tracked: list[dict[str, Any]] = [{"plain": {"a": 1}} for _ in range(3)]
    order, following = save(tmp_path / "store", tracked)
    assert len({tuple(numbers) for numbers in following}) == 3
    for rank in range(3):
        seed_all(1)
        pipeline.load(tmp_path / "store", order, {"plain": {}}, rank, 3)
        assert draw() == following[rank]


def test_another_number_of_ranks_draws_from_seeds_that_follow_from_the_step_and_the_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order, following = save(tmp_path / "store", [{"plain": {"a": 1}} for _ in range(2)])
    drawn = []
    for _ in range(2):
        for rank in range(3):
            seed_all(random.randrange(1000))
            with caplog.at_level(logging.WARNING):
                pipeline.load(tmp_path / "store", order, {"plain": {}}, rank, 3)
            drawn.append(tuple(draw()))
    assert drawn[:3] == drawn[3:]  # whatever the process had drawn before
    assert len(set(drawn)) == 3
    assert not set(map(tuple, following)) & set(drawn)
    assert "random numbers of rank 2 go on from a seed derived from step 10" in caplog.text


GENERATORS = {
    "numpy PCG64": lambda seed: np.random.default_rng(seed),
    "numpy MT19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "numpy Philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "numpy SFC64": lambda seed: np.random.Generator(np.random.SFC64(seed)),
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "random": lambda seed: random.Random(seed),
}


def number(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand(1, generator=generator).item()
    # Two bits at a time: numpy keeps half a word back.
    return (
        float(generator.random())
        if not isinstance(generator, np.random.Generator)
        else float(generator.integers(0, 1 << 30, dtype=np.uint32))
    )


def track(generator: Any, rank: int, world: int) -> dict[str, Any]:
    """As ``run.track(noise=generator)`` does."""
    return {f"noise/{rank}": rng.adopt("noise", generator, rank, world)}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_the_script_goes_on_on_each_rank(tmp_path: Path, kind: str) -> None:
    make = GENERATORS[kind]
    generators = [make(rank) for rank in range(2)]
    for generator in generators:
        number(generator)
    order = pipeline.save(tmp_path / "store", [track(one, rank, 2) for rank, one in enumerate(generators)])
    following = [[number(generator) for _ in range(3)] for generator in generators]
    for rank in range(2):
        again = make(77)
        pipeline.load(tmp_path / "store", order, track(again, rank, 2), rank, 2)
        assert [number(again) for _ in range(3)] == following[rank]


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_that_agreed_agree_at_another_number_of_ranks(tmp_path: Path, kind: str) -> None:
    make = GENERATORS[kind]
    generators = [make(5) for _ in range(2)]
    order = pipeline.save(tmp_path / "store", [track(one, rank, 2) for rank, one in enumerate(generators)])
    following = number(generators[0])
    for rank in range(3):
        again = make(77)
        pipeline.load(tmp_path / "store", order, track(again, rank, 3), rank, 3)
        assert number(again) == following


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_that_differed_are_derived_at_another_number_of_ranks(tmp_path: Path, kind: str) -> None:
    make = GENERATORS[kind]
    order = pipeline.save(tmp_path / "store", [track(make(rank), rank, 2) for rank in range(2)])
    drawn = []
    for seed in (77, 78):
        for rank in range(3):
            again = make(seed)
            pipeline.load(tmp_path / "store", order, track(again, rank, 3), rank, 3)
            drawn.append(number(again))
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) == 3


def test_a_run_tracks_a_generator_under_its_ranks_name() -> None:
    run = trainer.Run(0, 1, 0, None)
    run.track(noise=np.random.default_rng(1), model=torch.nn.Linear(1, 1))
    assert sorted(run._tracked) == ["model", "noise/0"]
    run.close()
