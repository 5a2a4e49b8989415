"""Damage to arenas and caches, at rest and while a rank reads them, never reaches training."""

import random
from collections.abc import Iterator

import pytest

from dtrain.protocol import checksum
from dtrain.storage.blobs import digest
from tests.corruption import near

ROUNDS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[near.Place]:
    made = near.new_place(tmp_path_factory.mktemp("near"))
    yield made
    made.close()


@pytest.fixture(params=["the rank verifies", "the agent verifies"], autouse=True)
def _verifier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    given = digest.crc32c if request.param == "the rank verifies" else None
    monkeypatch.setattr(checksum, "_provided", given)


@pytest.mark.parametrize("name", near.CASES)
def test_what_is_damaged_here_comes_from_the_next_tier(place: near.Place, name: str) -> None:
    rng = random.Random(name)
    assert [near.play(place, name, rng) for _ in range(ROUNDS)] == [""] * ROUNDS


@pytest.mark.parametrize("arenas", [True, False])
def test_what_changes_while_a_rank_reads_it_is_noticed(place: near.Place, arenas: bool) -> None:
    rng = random.Random(4)
    assert [near.play_under_way(place, rng, arenas=arenas) for _ in range(ROUNDS)] == [""] * ROUNDS


def test_a_blob_that_is_damaged_everywhere_is_named(place: near.Place) -> None:
    rng = random.Random(5)
    assert [near.play_everywhere(place, rng) for _ in range(ROUNDS)] == [""] * ROUNDS
