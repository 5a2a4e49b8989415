"""Whoever dies at whatever call: nothing committed is lost, nothing half is seen, nothing is left over.

``python -m tests.crashpoints --all`` dies at every one.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.crashpoints import files, ports
from tests.crashpoints.playing import fast_folder, play_story
from tests.crashpoints.ports import Call

EVERY = {"upload": 4, "upload, aborted": 6, "merge": 2, "merge, aborted": 3, "collect": 1, "sweep": 1}
"""At which system calls processes die here; ``--all`` takes each."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=fast_folder()) as temporary:
        yield Path(temporary)


def test_every_change_of_a_save_commit_retirement_and_collection_survives_a_death(folder: Path) -> None:
    tally = play_story(folder, "train", ports.changing)
    assert list(tally.problems) == []
    told = " ".join(str(call) for call in tally.calls)
    # The recorded run goes through all of it, or the claim would be empty.
    for part in ("put jobs/digits/open/", "put jobs/digits/checkpoints/", "delete jobs/digits/checkpoints/"):
        assert part in told
    assert "transfer: put" in told
    assert "leader: put" in told
    assert "leader: delete" in told
    assert tally.deaths >= 40


def test_an_aborted_checkpoint_is_swept_whoever_dies_meanwhile(folder: Path) -> None:
    def aborting(calls: Sequence[Call]) -> list[int]:
        return [
            i
            for i in ports.changing(calls)
            if ("delete jobs/digits/open/" in calls[i].what and "checkpoints" not in calls[i].what)
            or (calls[i].operation == "delete" and "/blobs/*0002/" in calls[i].what)
        ]

    tally = play_story(folder, "machine lost", aborting)
    assert list(tally.problems) == []
    assert tally.deaths >= 4


@pytest.mark.parametrize("name", files.PIECES)
def test_sigkill_at_a_system_call_loses_nothing_and_leaves_nothing(folder: Path, name: str) -> None:
    tally = files.play(files.PIECES[name], folder, every=EVERY[name])
    assert list(tally.problems) == []
    assert tally.deaths >= 10


def test_a_store_that_loses_a_committed_blob_is_noticed(folder: Path) -> None:
    site = files.Site(folder / "site")
    site.open(1)
    site.commit(1, site.verify(1, site.upload(1)))
    assert not [*site.problems(), *site.leftovers()]
    next(site.root.rglob("*.st")).unlink()
    assert len([*site.problems(), *site.leftovers()]) == 2
