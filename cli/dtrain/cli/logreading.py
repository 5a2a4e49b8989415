"""Reads logs up to now: which ranks, from where, in which order.

Nothing here ends because one machine is lost: what cannot be read is said, what can is shown.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dtrain.cli.answers import LogPlace
from dtrain.cli.client import Client
from dtrain.cli.loglines import Cutter, Keep, Line, last, merged
from dtrain.cli.records import Job
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused

TRIES = 3
PAUSE_S = 0.3


@dataclass(slots=True)
class Log:
    """One rank's stream of one attempt, read up to its present end by iterating over it."""

    client: Client
    job: str
    attempt: int
    rank: int
    stream: str
    uid: str = ""
    """Of an earlier submission."""
    offset: int = 0
    """Where the next reader goes on: behind the last whole line."""
    goes_on: bool = False
    """There is a next reader: a line without its end is left to it."""
    problem: str = ""
    """Why it could not be read to its end."""
    note: str = ""
    """Why it comes from the archive."""

    def __iter__(self) -> Iterator[Line]:
        cutter, tries, agent, position = Cutter(), 0, "", self.offset
        while True:
            try:
                chunk = self.client.read_log(
                    self.job,
                    self.rank,
                    self.stream,
                    attempt=self.attempt,
                    offset=position,
                    uid=self.uid,
                )
            except DtrainError as error:
                # Not written yet, or its machine or our replica is away for a moment.
                tries += 1
                self.problem = error.message
                if tries >= TRIES or isinstance(error, NotFound | Refused):
                    break
                time.sleep(PAUSE_S)
                continue
            tries, self.problem = 0, ""
            agent, self.note, position = chunk.agent, chunk.note or self.note, chunk.next_offset
            if not chunk.data:
                break
            for at_ms, text in cutter.feed(chunk.data, chunk.offset, chunk.marks):
                yield Line(agent, self.attempt, self.rank, self.stream, text, at_ms)
            self.offset = position - cutter.unfinished
        if not self.goes_on:
            for at_ms, text in cutter.flush():
                yield Line(agent, self.attempt, self.rank, self.stream, text, at_ms)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which ranks: ``ranks`` as written on the command line, of one machine or of any."""

    ranks: str | None = None
    agent: str | None = None

    @property
    def several(self) -> bool:
        """More than one rank was asked for, or may have been."""
        return self.agent is not None or self.ranks == "all" or "," in (self.ranks or "")

    def followed(self, job: Job) -> list[int]:
        """Return their numbers in the attempt that has begun; a machine with no part in it has none.

        Raises:
            Refused: BAD_RANKS; it cannot be read.
        """
        if self.agent is None:
            return self.of(job, job.attempt, lambda: ())
        members = job.status.members if job.status else ()
        there = {
            rank
            for member in members
            if member.agent == self.agent
            for rank in range(member.first_rank, member.first_rank + member.nproc)
        }
        return sorted(there if self.ranks in (None, "all") else there & set(self._numbers()))

    def of(self, job: Job, attempt: int, places: Callable[[], Sequence[LogPlace]]) -> list[int]:
        """Return their numbers: as asked for, else rank 0 and those that failed.

        Raises:
            Refused: BAD_RANKS; it cannot be read, or nothing fits.
        """
        if self.agent is not None:
            return self._on_agent(job, attempt, places())
        if self.ranks == "all":
            if attempt == job.attempt and job.world_size:
                return list(range(job.world_size))
            known = [rank for place in places() if place.attempt == attempt for rank in _ranks(place)]
            return sorted({*known, *range(job.world_size)})
        if self.ranks:
            return self._numbers()
        return sorted({0} | failed(job, attempt))

    def _numbers(self) -> list[int]:
        parts = [part.strip() for part in (self.ranks or "").split(",") if part.strip()]
        if not parts or not all(part.isdecimal() and len(part) < 7 for part in parts):
            raise Refused(
                ErrorCode.USAGE,
                f"--rank {self.ranks}: there are no such ranks",
                fix="write numbers such as 0,3, or all",
            )
        return sorted({int(part) for part in parts})

    def _on_agent(self, job: Job, attempt: int, places: Sequence[LogPlace]) -> list[int]:
        there = {
            rank
            for place in places
            if place.attempt == attempt and place.agent == self.agent
            for rank in _ranks(place)
        }
        if self.ranks not in (None, "all"):
            there &= set(self._numbers())
        if not there:
            known = sorted({place.agent for place in places if place.attempt == attempt})
            raise NotFound(
                ErrorCode.NOT_FOUND,
                f"no rank of attempt {attempt} of {job.name} is known to have been on {self.agent}",
                fix=f"its machines were {', '.join(known)}" if known else "",
            )
        return sorted(there)


def failed(job: Job, attempt: int) -> set[int]:
    """Ranks of an attempt that are known to have failed."""
    if job.status is None:
        return set()
    found = {mark.rank for mark in job.status.marks if mark.attempt == attempt}
    failure = job.status.failure
    if failure is not None and failure.attempt == attempt:
        found.add(failure.rank)
    return {int(rank) for rank in found if rank is not None}


@dataclass(slots=True)
class Shown:
    """What was shown of some logs."""

    lines: int = 0
    logs: list[Log] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One sentence for each log that could not be read."""
        return [f"rank {log.rank} {log.stream}: {log.problem}" for log in self.logs if log.problem]

    @property
    def notes(self) -> list[str]:
        """One sentence for each rank whose log came from the archive."""
        return list(dict.fromkeys(log.note for log in self.logs if log.note))


def show(logs: Sequence[Log], write: Callable[[Line], None], *, keep: Keep, tail: int | None) -> Shown:
    """Write the lines of logs up to now, in the order of their times."""
    shown = Shown(logs=list(logs))

    def chosen(log: Log) -> Iterator[Line]:
        yield from (line for line in log if keep(line))

    streams = [chosen(log) if tail is None else last(chosen(log), tail) for log in logs]
    for line in merged(streams):
        shown.lines += 1
        write(line)
    return shown


def _ranks(place: LogPlace) -> range:
    return range(place.first_rank, place.last_rank + 1)
