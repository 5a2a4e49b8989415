"""Reading log files by global rank."""

from pathlib import Path

import pytest

from dtrain.agent.logs import RankLogs, read_part
from dtrain.protocol.errors import NotFound, Refused
from dtrain.protocol.ids import Attempt, JobName, Rank, Uid


def _write(root: Path, attempt: int, first_rank: int, local: int, text: str) -> None:
    RankLogs(root).prepare(JobName("train"), Uid("u1"), Attempt(attempt), Rank(first_rank))
    folder = root / "train-u1" / f"attempt_{attempt}" / str(local)
    folder.mkdir()
    (folder / "stdout.log").write_text(text)


def test_a_global_rank_is_found_under_its_local_rank_of_that_attempt(tmp_path: Path) -> None:
    _write(tmp_path, 1, 4, 1, "of attempt 1")
    _write(tmp_path, 2, 0, 1, "of attempt 2")
    logs = RankLogs(tmp_path)
    assert logs.find("train", "u1", 1, 5, "stdout").path.read_text() == "of attempt 1"
    assert logs.find("train", "u1", 2, 1, "stdout").path.read_text() == "of attempt 2"


def test_attempt_zero_is_the_newest(tmp_path: Path) -> None:
    for attempt in (2, 10):
        _write(tmp_path, attempt, 0, 0, "")
    assert RankLogs(tmp_path).find("train", "u1", 0, 0, "stdout").attempt == 10


@pytest.mark.parametrize(
    ("job", "uid", "stream"),
    [
        ("../etc", "u1", "stdout"),
        ("train", "../u1", "stdout"),
        ("train", "u1/..", "stdout"),
        ("train", "u1", "../../../etc/passwd"),
        ("train", "", "stdout"),
        ("", "u1", "stdout"),
    ],
)
def test_no_name_leads_out_of_the_log_folder(tmp_path: Path, job: str, uid: str, stream: str) -> None:
    with pytest.raises(Refused):
        RankLogs(tmp_path).find(job, uid, 1, 0, stream)


def test_a_rank_of_another_machine_is_not_found(tmp_path: Path) -> None:
    _write(tmp_path, 1, 4, 0, "x")
    for rank in (0, 3, 5, -1):
        with pytest.raises(NotFound):
            RankLogs(tmp_path).find("train", "u1", 1, rank, "stdout")


def test_parts_join_without_gap_or_overlap(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(range(100)))
    first = read_part(path, 0, 60)
    assert not first.at_end
    second = read_part(path, first.next_offset, 60)
    assert second.at_end
    assert first.data + second.data == bytes(range(100))


def test_a_negative_offset_counts_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("0123456789")
    assert read_part(path, -3, 100).data == b"789"
    assert read_part(path, -300, 100).data == b"0123456789"


def test_a_file_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert read_part(tmp_path / "log", -100, 10).data == b""
