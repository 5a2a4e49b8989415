"""Damage never reaches a training rank; see ``python -m tests.corruption`` for a thousand cases and more."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.local.weed import WeedServer
from tests.corruption import damage as damages
from tests.corruption import rivals
from tests.corruption.buckets import Bucket
from tests.corruption.campaign import Campaign, before_digest
from tests.corruption.making import Folder

ROUNDS = 4
"""How often each kind is played at rest."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Small checkpoints of three ranks and of one, in a folder."""
    return Campaign(Folder(tmp_path_factory.mktemp("corruption") / "store"), big=False)


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeedServer]:
    server = WeedServer(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.close()


@pytest.mark.parametrize("kind", damages.AT_REST, ids=lambda kind: kind.__name__)
def test_damage_at_rest_is_caught_with_the_right_evidence(campaign: Campaign, kind: damages.Kind) -> None:
    before = campaign.tally.caught.total()
    campaign.at_rest(ROUNDS, random.Random(kind.__name__), kinds=(kind,))
    assert campaign.tally.wrong == []
    assert campaign.tally.caught.total() == before + ROUNDS


@pytest.mark.parametrize("kind", damages.UNREAD, ids=lambda kind: kind.__name__)
def test_bytes_that_nobody_committed_change_nothing(campaign: Campaign, kind: damages.Kind) -> None:
    before = campaign.tally.harmless.total()
    campaign.at_rest(2, random.Random(kind.__name__), kinds=(kind,))
    assert campaign.tally.wrong == []
    assert campaign.tally.harmless.total() == before + 2


def test_damage_to_a_blob_of_several_chunks_is_caught_in_the_right_chunk(tmp_path: Path) -> None:
    campaign = Campaign(Folder(tmp_path / "store"), big=True, worlds=())
    assert campaign.big is not None
    kinds = (
        damages.flip_data,
        damages.flip_edge,
        damages.swap_chunks,
        damages.swap_ranks,
        damages.zombie,
        damages.truncate,
        damages.insert,
    )
    rng = random.Random(3)
    for kind in kinds:
        campaign.play(campaign.big, kind, rng)
    assert campaign.tally.wrong == []
    assert campaign.tally.caught.total() == len(kinds)


def test_damage_before_the_commit_is_refused_or_found_at_restore(campaign: Campaign) -> None:
    before = campaign.tally.caught.total()
    campaign.reported(16, random.Random(4))
    assert campaign.tally.wrong == []
    assert campaign.tally.caught.total() == before + 16


def test_a_snapshot_that_changes_during_its_upload_is_never_reported_durable(campaign: Campaign) -> None:
    before = campaign.tally.caught.total()
    campaign.arena(8, random.Random(5))
    assert campaign.tally.wrong == []
    assert campaign.tally.caught.total() == before + 8


def test_damage_in_an_s3_bucket_is_caught(weed: WeedServer) -> None:
    campaign = Campaign(Bucket(weed), big=False, worlds=(2,))
    rng = random.Random(6)
    campaign.at_rest(len(damages.AT_REST), rng)
    campaign.reported(4, rng)
    campaign.arena(2, rng)
    assert campaign.tally.wrong == []
    assert campaign.tally.caught.total() == campaign.tally.cases


def test_what_was_wrong_before_it_was_hashed_is_committed_as_it_was(tmp_path: Path) -> None:
    """The limit of every digest, said here so that nobody believes otherwise."""
    store, rng = Folder(tmp_path / "store").store, random.Random(8)
    found = Counter(before_digest(store, seq, rng, index=False) for seq in range(1, 7))
    assert found["unseen"] >= 1


def test_an_index_that_changes_in_memory_is_refused(tmp_path: Path) -> None:
    store, rng = Folder(tmp_path / "store").store, random.Random(9)
    found = Counter(before_digest(store, seq, rng, index=True) for seq in range(1, 9))
    assert found == {"caught": 8}


def test_the_campaign_notices_a_restore_that_checks_nothing(tmp_path: Path) -> None:
    class Forgiving(Folder):
        """Its bytes stay what they were: a fetch that succeeds although something was to be damaged."""

        def write(self, key: str, data: bytes) -> None:
            pass

    campaign = Campaign(Forgiving(tmp_path / "store"), big=False, worlds=(2,))
    campaign.play(campaign.small[0], damages.flip_data, random.Random(7))
    (sentence,) = campaign.tally.wrong
    assert "the restore succeeded" in sentence


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rival", rivals.RIVALS, ids=lambda rival: rival.name)
def test_other_formats_load_the_shard_of_another_step_without_a_word(rival: rivals.Rival) -> None:
    assert rivals.trials(rival, "same-named file of another step", 2, 1) == {"WRONG": 2}
    assert rivals.ours("same-named file of another step", 2, 1)["caught"] == 2
