"""Whoever dies at whatever call: nothing committed is lost, nothing half is seen, nothing is left over.

``python -m tests.crashpoints --all`` dies at every one.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
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


def test_no_blob_is_written_before_its_intent(folder: Path) -> None:
    outcome = ports.run(folder / "stage", story="machine lost")
    calls = [str(call) for call in outcome.calls]
    for seq in (1, 2, 3, 4):
        opened = next(i for i, call in enumerate(calls) if f"put jobs/digits/open/*{seq:04d}" in call)
        written = [i for i, call in enumerate(calls) if f": put stage/digits/u1/blobs/*{seq:04d}/" in call]
        assert written
        assert opened < min(written)


def test_training_that_returns_to_a_step_takes_another_number_for_it(folder: Path) -> None:
    outcome = ports.run(folder / "stage", story="machine lost")
    aborted = outcome.opened[1]
    first, again = (one for one in outcome.opened if one.step == aborted.step)
    assert (again.seq, again.attempt) == (first.seq + 1, first.attempt + 1)
    assert first.nonce != again.nonce
    assert [one.seq for one in outcome.opened] == sorted({one.seq for one in outcome.opened})


def test_no_file_of_the_store_is_ever_renamed_or_written_over(folder: Path) -> None:
    for name in ("upload", "merge", "collect", "sweep"):
        site = files.Site(folder / name)
        context = files.PIECES[name].prepare(site)
        calls = files.in_a_process(partial(files.PIECES[name].work, site, context))
        assert calls
        assert not [call for call in calls if call.startswith(("rename", "replace"))]


def test_a_store_that_loses_a_committed_blob_is_noticed(folder: Path) -> None:
    site = files.Site(folder / "site")
    site.open(1)
    site.commit(1, site.verify(1, site.upload(1)))
    assert not [*site.problems(), *site.leftovers()]
    next(site.root.rglob("*.st")).unlink()
    assert len([*site.problems(), *site.leftovers()]) == 2
