"""Which logs a machine deletes: never what runs or is all there is of a job that lives, and not for ever."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.agent.core.keeping import UNCOPIED_TIMES, YOUNG_S, Kept, surplus
from dtrain.agent.log_keeper import GONE, LogKeeper
from dtrain.agent.logs import RankLogs
from dtrain.protocol.errors import NotFound
from dtrain.protocol.ids import Attempt, JobName, Rank, Uid

DAY = 86400.0
KEEP = 7 * DAY


def logs(name: str, age_s: float, size: int = 100, *, running: bool = False, here: bool = False,
         copied: bool = True) -> Kept:  # fmt: skip
    return Kept(name, age_s, size, running, here, copied)


def gone(*found: Kept, keep_s: float = KEEP, bytes_max: int = 0) -> list[str]:
    return [one.folder for one in surplus(found, keep_s=keep_s, bytes_max=bytes_max)]


def test_what_the_store_has_goes_by_age_and_what_it_has_not_much_later() -> None:
    assert gone(logs("old", KEEP), logs("young", KEEP - 1)) == ["old"]
    assert gone(logs("only copy", UNCOPIED_TIMES * KEEP - 1, copied=False)) == []
    assert gone(logs("only copy", UNCOPIED_TIMES * KEEP, copied=False)) == ["only copy"]
    assert gone(logs("old", 1000 * KEEP), keep_s=0) == []


def test_what_runs_or_is_of_a_job_that_is_here_does_not_go_by_age() -> None:
    assert gone(logs("runs", 1000 * KEEP, running=True), logs("here", 1000 * KEEP, here=True)) == []


def test_for_want_of_room_the_oldest_go_and_copies_before_what_there_is_only_once() -> None:
    found = (
        logs("only copy", 6 * DAY, copied=False),
        logs("older", 5 * DAY),
        logs("newer", 2 * DAY),
        logs("of a job that is here", 3 * DAY, here=True),
        logs("runs", 9 * DAY, 1000, running=True),
        logs("only copy of a job that is here", 9 * DAY, here=True, copied=False),
    )
    order = ["older", "newer", "of a job that is here", "only copy"]
    for count in range(len(order) + 1):
        assert gone(*found, bytes_max=1500 - 100 * count) == order[:count]
    assert gone(*found, bytes_max=1) == order


def test_what_was_written_to_lately_stays_whatever_the_room() -> None:
    assert gone(logs("young", YOUNG_S - 1), keep_s=1.0, bytes_max=1) == []


@given(
    st.lists(
        st.builds(
            Kept, st.uuids().map(str), st.floats(0, 100 * DAY), st.integers(0, 1000), st.booleans(),
            st.booleans(), st.booleans(),
        )
    ),
    st.integers(0, 5000),
)  # fmt: skip
def test_nothing_goes_that_may_not_and_room_is_kept_where_it_can_be(found: list[Kept], room: int) -> None:
    deleted = surplus(found, keep_s=KEEP, bytes_max=room)
    assert len(set(deleted)) == len(deleted)
    assert not any(one.running or one.age_s < YOUNG_S or (one.here and not one.copied) for one in deleted)
    left = [one for one in found if one not in deleted]
    free = [one for one in left if not one.running and one.age_s >= YOUNG_S and (one.copied or not one.here)]
    assert not room or not free or sum(one.size for one in left) <= room


class Bench:
    """Real files, and a keeper of them on a clock of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = RankLogs(root)
        self.now = 2_000_000_000.0
        self.busy: set[Path] = set()
        self.here: set[Path] = set()
        self.said: list[tuple[str, dict[str, Any]]] = []

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def attempt(self, number: int, age_s: float, *, copied: bool = True, job: str = "train") -> Path:
        made = self.logs.prepare(JobName(job), Uid("u1"), Attempt(number), Rank(0), ranks=1, store="s").folder
        (made / "0").mkdir()
        (made / "0" / "stdout.log").write_text("a line\n" * 1000)
        book = {"number": 1, "sent": {}, "keys": ["k"], "whole_keys": ["k"] if copied else [], "done": copied}
        (made / "archive.json").write_text(json.dumps(book))
        for path in (*made.rglob("*"), made, made.parent):
            os.utime(path, (self.now - age_s,) * 2)
        return made

    def turn(self, keep_s: float = KEEP, bytes_max: int = 0) -> None:
        keeper = LogKeeper(
            self.root,
            busy=lambda: self.busy,
            here=lambda: self.here,
            clock=self,
            keep_s=keep_s,
            bytes_max=bytes_max,
            log=lambda event, **fields: self.said.append((event, fields)),
        )
        keeper.turn()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_files_of_old_attempts_are_deleted_and_then_not_found(bench: Bench) -> None:
    old, only, new = (
        bench.attempt(1, KEEP),
        bench.attempt(2, KEEP, copied=False),
        bench.attempt(3, KEEP - DAY),
    )
    bench.turn()
    assert not old.exists()
    assert (only / "0" / "stdout.log").exists()
    assert (new / "0" / "stdout.log").exists()
    with pytest.raises(NotFound):
        bench.logs.find("train", "u1", 1, 0, "stdout")
    assert [event for event, _ in bench.said] == ["logs deleted"]


def test_a_log_that_still_grows_keeps_its_attempt_whatever_its_folder_says(bench: Bench) -> None:
    folder = bench.attempt(1, 100 * KEEP)
    os.utime(folder / "0" / "stdout.log", (bench.now - 60.0,) * 2)
    bench.turn(bytes_max=1)
    assert folder.exists()


def test_what_is_busy_or_of_a_job_that_is_here_stays(bench: Bench) -> None:
    runs, here = bench.attempt(1, 100 * KEEP, job="runs"), bench.attempt(1, 100 * KEEP, job="here")
    bench.busy, bench.here = {runs}, {bench.logs.folder(JobName("here"), Uid("u1"))}
    bench.turn()
    assert runs.exists()
    assert here.exists()
    bench.turn(bytes_max=1)
    assert runs.exists()
    assert not here.exists()
    assert bench.said[-1][0] == "logs need more than their room"


def test_for_room_the_oldest_go_until_the_rest_fits(bench: Bench) -> None:
    folders = [bench.attempt(number, (10 - number) * 3600.0) for number in range(1, 6)]
    one = sum(path.lstat().st_blocks * 512 for path in folders[0].rglob("*") if path.is_file())
    bench.turn(bytes_max=3 * one)
    assert [folder.exists() for folder in folders] == [False, False, True, True, True]


def test_a_deletion_that_was_cut_short_is_finished_and_empty_folders_go(bench: Bench) -> None:
    folder = bench.attempt(1, KEEP)
    folder.rename(folder.with_name(f"{GONE}attempt_1"))
    new = bench.root / "new-u1"
    new.mkdir()
    os.utime(new, (bench.now - 1.0,) * 2)
    bench.turn()
    assert list(bench.root.iterdir()) == [new], "somebody may be about to make an attempt in it"
    os.utime(new, (bench.now - YOUNG_S,) * 2)
    bench.here = {new}
    bench.turn()
    assert new.exists()
    bench.here = set()
    bench.turn()
    assert not list(bench.root.iterdir())
