"""The journal survives what the agent does not."""

import sqlite3
from pathlib import Path

import pytest

from dtrain.agent.core.decisions import ForgetJob, JournalCoordinators, JournalJob, JournalOver, JournalTerm
from dtrain.agent.core.state import RELEASED_KEPT, durable_view
from dtrain.agent.journal import COMMAND_IDS_KEPT, Journal
from dtrain.protocol.errors import Unavailable
from dtrain.protocol.ids import Attempt, JobName, Term, Uid

from .core_builder import JOB, RESTORE, Table, sealed


def _busy_job() -> JournalJob:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    return JournalJob(durable_view(table.job), ("a", "b"))


def test_everything_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write = _busy_job()
    journal = Journal.open(tmp_path / "journal")
    journal.apply([JournalTerm(Term(9)), write])
    journal.close()
    found = Journal.open(tmp_path / "journal").load()
    assert found.term == 9
    assert found.jobs == {JOB: write.job}
    assert found.seen == {JOB: ("a", "b")}


def test_a_restoring_job_comes_back_with_its_restore_point(tmp_path: Path) -> None:
    table = Table().forked(restore=RESTORE)
    journal = Journal.open(tmp_path / "journal")
    journal.apply([JournalJob(durable_view(table.job))])
    job = journal.load().jobs[JOB]
    assert job.start is not None
    assert job.start.restore == RESTORE


def test_a_forgotten_job_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    journal.apply([_busy_job()])
    journal.apply([ForgetJob(JOB)])
    found = journal.load()
    assert not found.jobs
    assert not found.seen


def test_command_ids_are_bounded_per_job(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    job = _busy_job().job
    for first in range(0, 1200, 100):
        journal.apply([JournalJob(job, tuple(str(n) for n in range(first, first + 100)))])
    seen = journal.load().seen[JOB]
    assert len(seen) == COMMAND_IDS_KEPT
    assert seen[-1] == "1199"


def test_writes_are_applied_together_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    other = sqlite3.connect(tmp_path / "journal", isolation_level=None, timeout=0)
    other.execute("BEGIN EXCLUSIVE")
    journal._connection.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(Unavailable):
        journal.apply([JournalTerm(Term(3)), _busy_job()])
    other.execute("ROLLBACK")
    other.close()
    assert journal.load().term == 0
    journal.apply([JournalTerm(Term(3))])
    assert journal.load().term == 3


def test_a_damaged_journal_is_moved_aside_and_said(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"this was never a database, not even for a moment" * 100)
    journal = Journal.open(path)
    assert "broken-1" in journal.problem
    assert (tmp_path / "journal.broken-1").exists()
    assert not journal.load().jobs


def test_a_journal_of_a_newer_version_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    journal = Journal.open(path)
    assert "version 99" in journal.problem


def test_a_journal_with_an_unreadable_job_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.apply([_busy_job()])
    journal._connection.execute("UPDATE job SET state = ?", (b'{"v":1}',))
    journal.close()
    again = Journal.open(path)
    assert "cannot be read" in again.problem
    assert JobName("train") not in again.load().jobs


def test_whom_to_ask_is_remembered(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    assert journal.load().coordinators == ()
    journal.apply([JournalCoordinators(("a:1", "b:1"))])
    journal.apply([JournalCoordinators(("b:1", "c:1"))])
    journal.close()
    assert Journal.open(tmp_path / "journal").load().coordinators == ("b:1", "c:1")


def test_a_journal_without_coordinators_is_as_good_as_any(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal.open(path)
    journal.apply([_busy_job()])
    journal._connection.execute("DROP TABLE coordinator")
    journal.close()
    again = Journal.open(path)
    assert not again.problem
    assert JobName("train") in again.load().jobs
    again.apply([JournalCoordinators(("a:1",))])
    assert again.load().coordinators == ("a:1",)


def test_the_attempt_of_a_released_submission_is_remembered(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    journal.apply([JournalOver(Uid("u1"), Attempt(3)), JournalOver(Uid("u2"), Attempt(1))])
    journal.apply([JournalOver(Uid("u1"), Attempt(4))])
    assert journal.load().over == {Uid("u1"): 4, Uid("u2"): 1}
    journal.apply([JournalOver(Uid(f"v{n}"), Attempt(1)) for n in range(RELEASED_KEPT)])
    assert len(journal.load().over) == RELEASED_KEPT
