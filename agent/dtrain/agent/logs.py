"""Log files of ranks: where they lie, and reading them by global rank.

``<root>/<job>-<uid>/attempt_<n>/<local_rank>/{stdout,stderr,stacks}.log``, as under
torchrun. ``ranks.json`` beside the local ranks says which global rank the first
of them was (in another attempt it may be another one) and where the logs are copied.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.protocol.ids import Attempt, JobName, Rank, Uid, parse_name

STREAMS = ("stdout", "stderr", "stacks")
BYTES_MAX = 1024 * 1024
"""Of one answer."""

KEPT = "kept"
"""Folder of an attempt in which everything is copied to the store with its logs."""

_UID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_]{0,63}")
_ATTEMPT = re.compile(r"attempt_(\d{1,9})")


@dataclass(frozen=True, slots=True)
class LogPlace:
    """One log file. It need not exist yet."""

    path: Path
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class AttemptLogs:
    """One attempt's folder on this machine, and what ``ranks.json`` says of it."""

    folder: Path
    job: JobName
    uid: Uid
    attempt: Attempt
    first_rank: Rank
    ranks: int
    """0: it was not written down, by an earlier release."""
    store: str

    def file(self, local: int, stream: str) -> Path:
        return self.folder / str(local) / f"{stream}.log"


@dataclass(frozen=True, slots=True)
class LogPart:
    """Bytes from a file; ``at_end``: the file holds no more at present."""

    data: bytes
    next_offset: int
    at_end: bool
    offset: int = 0
    """Of the first byte."""


class RankLogs:
    """The folder of all logs of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def prepare(
        self, job: JobName, uid: Uid, attempt: Attempt, first_rank: Rank, *, ranks: int = 0, store: str = ""
    ) -> AttemptLogs:
        """Make an attempt's folder; raises OSError."""
        folder = self._job(job, uid) / f"attempt_{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        about = {"first_rank": first_rank, "ranks": ranks, "store": store, "job": job, "uid": uid}
        (folder / "ranks.json").write_text(json.dumps(about))
        return AttemptLogs(folder, job, uid, attempt, first_rank, ranks, store)

    def keep(self, job: JobName, uid: Uid, attempt: Attempt, name: str, line: bytes) -> None:
        """Append to a file that outlives the machine with the attempt's logs; raises OSError."""
        folder = self._job(job, uid) / f"attempt_{attempt}" / KEPT
        folder.mkdir(exist_ok=True)
        with (folder / name).open("ab") as file:
            file.write(line)

    def kept(self, job: JobName, uid: Uid, attempt: Attempt, name: str, bytes_max: int) -> bytes:
        """Return the end of what ``keep`` has written; raises OSError, as where it has written nothing."""
        with (self._job(job, uid) / f"attempt_{attempt}" / KEPT / name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - bytes_max))
            return file.read(bytes_max)

    def folder(self, job: JobName, uid: Uid) -> Path:
        """Of all attempts of a submission."""
        return self._job(job, uid)

    def all(self) -> Iterator[AttemptLogs]:
        """Every attempt of which there are logs here, and of which enough is known."""
        for folder in self._root.glob("*/attempt_*"):
            found = _ATTEMPT.fullmatch(folder.name)
            try:
                about = json.loads((folder / "ranks.json").read_text())
                job, uid = JobName(about["job"]), Uid(about["uid"])
                first, ranks, store = Rank(int(about["first_rank"])), int(about["ranks"]), str(about["store"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if found is not None:
                yield AttemptLogs(folder, job, uid, Attempt(int(found[1])), first, ranks, store)

    def find(self, job: str, uid: str, attempt: int, rank: int, stream: str) -> LogPlace:
        """Return where a rank's log lies; ``attempt`` 0 is the newest one here.

        Raises:
            Refused: BAD_NAME or USAGE; the names are none of ours.
            NotFound: NOT_FOUND; no such job, attempt or rank on this machine.
        """
        if stream not in STREAMS:
            raise Refused(
                ErrorCode.USAGE, f"there is no stream {stream[:20]!r}", fix="use stdout, stderr or stacks"
            )
        folder = self._job(job, uid)
        if attempt == 0:
            attempt = max(self._attempts(folder), default=0)
        attempt_folder = folder / f"attempt_{attempt}"
        if attempt < 1 or not attempt_folder.is_dir():
            raise NotFound(ErrorCode.NOT_FOUND, f"attempt {attempt} of job {job} has no logs on this machine")
        local = rank - self._first_rank(attempt_folder)
        place = attempt_folder / str(local)
        if local < 0 or not place.is_dir():
            raise NotFound(ErrorCode.NOT_FOUND, f"rank {rank} of job {job} has no logs on this machine")
        return LogPlace(place / f"{stream}.log", Attempt(attempt))

    def _job(self, job: str, uid: str) -> Path:
        # Built from validated names only: what a client sends never walks the file system.
        parse_name(job, "job")
        if not _UID.fullmatch(uid):
            raise Refused(ErrorCode.BAD_NAME, f"{uid[:80]!r} is no uid of a job")
        return self._root / f"{job}-{uid}"

    def _attempts(self, folder: Path) -> list[int]:
        try:
            names = os.listdir(folder)  # noqa: PTH208
        except OSError:
            return []
        return [int(found.group(1)) for name in names if (found := _ATTEMPT.fullmatch(name))]

    def _first_rank(self, folder: Path) -> int:
        try:
            return int(json.loads((folder / "ranks.json").read_text())["first_rank"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def read_part(path: Path, offset: int, bytes_max: int) -> LogPart:
    """Read up to ``bytes_max`` bytes from ``offset``; a negative one counts from the end.

    A file that is not there yet is empty.
    """
    limit = min(bytes_max, BYTES_MAX) if bytes_max > 0 else BYTES_MAX
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size + offset) if offset < 0 else min(offset, size)
            file.seek(start)
            data = file.read(limit)
            return LogPart(data, start + len(data), start + len(data) >= size, start)
    except FileNotFoundError:
        return LogPart(b"", max(0, offset), True)
    except OSError as error:
        raise NotFound(ErrorCode.NOT_FOUND, f"the log cannot be read: {error.strerror}") from error
