"""What the agent must not forget: one row per job, and the ids of commands taken on.

sqlite in WAL mode with full synchronisation: a write has reached the disk when
``apply`` returns. A journal that cannot be read is moved aside, never deleted:
its launchers are then unknown here and end by themselves after the orphan grace.
"""

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from dtrain.agent.core.decisions import (
    ForgetJob,
    JournalCoordinators,
    JournalJob,
    JournalOver,
    JournalTerm,
    JournalWrite,
)
from dtrain.agent.core.state import RELEASED_KEPT, JobState
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, Unavailable
from dtrain.protocol.ids import Attempt, JobName, Term, Uid

SCHEMA_VERSION = 1
COMMAND_IDS_KEPT = 1000
"""Per job. A leader repeats a command for seconds, and not a thousand others between."""

JOB_BYTES_MAX = 8 * 1024 * 1024
_OVER = "over/"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE job (name TEXT PRIMARY KEY, state BLOB NOT NULL) STRICT;
CREATE TABLE seen (n INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, id TEXT NOT NULL) STRICT;
CREATE INDEX seen_by_job ON seen (job, n);
"""
_ADDED = "CREATE TABLE IF NOT EXISTS coordinator (address TEXT PRIMARY KEY) STRICT"
"""Later than the first journals, and of no use to agents that do not know it: no new version."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a former life of the agent left."""

    term: Term
    jobs: dict[JobName, JobState]
    seen: dict[JobName, tuple[str, ...]]
    over: dict[Uid, Attempt]
    coordinators: tuple[str, ...] = ()


class Journal:
    """The open file. Used by one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, problem: str) -> None:
        self._connection = connection
        self.problem = problem
        """Why a former journal was moved aside; "" if it was not."""

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Open or create the journal.

        Raises:
            Unavailable: the file system does not let us.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # It holds the environments of jobs; sqlite gives its other files the same mode.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
        problem = ""
        if path.exists():
            problem = _examine(path)
            if problem:
                aside = _move_aside(path)
                problem = f"the agent's journal {problem}; it was moved to {aside}"
        try:
            return cls(_connect(path), problem)
        except sqlite3.Error as error:
            raise _failed(error) from error

    def load(self) -> Remembered:
        """Read everything."""
        jobs: dict[JobName, JobState] = {}
        for name, state in self._connection.execute("SELECT name, state FROM job ORDER BY name"):
            jobs[JobName(name)] = codec.decode(JobState, state, bytes_max=JOB_BYTES_MAX)
        seen: dict[JobName, tuple[str, ...]] = {}
        for name, id_ in self._connection.execute("SELECT job, id FROM seen ORDER BY n"):
            seen[JobName(name)] = (*seen.get(JobName(name), ()), id_)
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'term'").fetchone()
        over: dict[Uid, Attempt] = {}
        for key, attempt in self._connection.execute(
            "SELECT key, value FROM meta WHERE key GLOB ? ORDER BY rowid", (f"{_OVER}*",)
        ):
            over[Uid(key.removeprefix(_OVER))] = Attempt(attempt)
        found = self._connection.execute("SELECT address FROM coordinator ORDER BY address")
        coordinators = tuple(str(address) for (address,) in found)
        return Remembered(Term(row[0] if row else 0), jobs, seen, over, coordinators)

    def apply(self, writes: Sequence[JournalWrite]) -> None:
        """Make all of ``writes`` durable, or none.

        Raises:
            Unavailable: the disk is full or broken, nothing was written.
        """
        if not writes:
            return
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                for write in writes:
                    self._apply(write)
        except sqlite3.Error as error:
            raise _failed(error) from error

    def close(self) -> None:
        self._connection.close()

    def _apply(self, write: JournalWrite) -> None:
        execute = self._connection.execute
        match write:
            case JournalTerm(term):
                execute("INSERT OR REPLACE INTO meta VALUES ('term', ?)", (term,))
            case JournalJob(job, ids):
                execute("INSERT OR REPLACE INTO job VALUES (?, ?)", (job.name, codec.encode(job)))
                for id_ in ids:
                    execute("INSERT INTO seen (job, id) VALUES (?, ?)", (job.name, id_))
                if ids:
                    execute(
                        "DELETE FROM seen WHERE job = ?1 AND n <= (SELECT n FROM seen WHERE job = ?1 "
                        "ORDER BY n DESC LIMIT 1 OFFSET ?2)",
                        (job.name, COMMAND_IDS_KEPT),
                    )
            case JournalOver(uid, attempt):
                execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"{_OVER}{uid}", attempt))
                execute(
                    "DELETE FROM meta WHERE key GLOB ?1 AND rowid NOT IN "
                    "(SELECT rowid FROM meta WHERE key GLOB ?1 ORDER BY rowid DESC LIMIT ?2)",
                    (f"{_OVER}*", RELEASED_KEPT),
                )
            case JournalCoordinators(addresses):
                execute("DELETE FROM coordinator")
                for address in addresses:
                    execute("INSERT INTO coordinator VALUES (?)", (address,))
            case ForgetJob(name):
                execute("DELETE FROM job WHERE name = ?", (name,))
                execute("DELETE FROM seen WHERE job = ?", (name,))
            case _:
                assert_never(write)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if not connection.execute("PRAGMA user_version").fetchone()[0]:
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    connection.execute(_ADDED)
    return connection


def _examine(path: Path) -> str:
    """Return why the file cannot be used, "" if it can."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                return f"has version {version}, and this agent reads {SCHEMA_VERSION}"
            verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
            if verdict != "ok":
                return f"is damaged ({verdict})"
        with contextlib.closing(_connect(path)) as connection:
            cls_problem = _unreadable(Journal(connection, ""))
    except sqlite3.Error as error:
        return f"is damaged ({error})"
    return cls_problem


def _unreadable(journal: Journal) -> str:
    try:
        journal.load()
    except DtrainError as error:
        return f"cannot be read ({error})"
    return ""


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        extra = path.with_name(path.name + suffix)
        if extra.exists():
            # Beside a new file it would be replayed into it.
            extra.rename(aside.with_name(aside.name + suffix))
    return aside


def _failed(error: sqlite3.Error) -> Unavailable:
    return Unavailable(
        ErrorCode.AGENT_UNAVAILABLE,
        f"the agent's journal could not be written: {error}",
        fix="check free space and permissions of the agent's data directory",
    )
