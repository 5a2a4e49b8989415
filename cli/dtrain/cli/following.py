"""Follows a job: its log lines and its changes, across attempts and replicas, until it ends.

One thread per rank and stream reads the log; the caller's thread watches the
job. Both go on for ever through lost replicas and agents: a follower that gives
up while the job runs is worse than none.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from dtrain.cli import naming, records
from dtrain.cli.answers import LogChunk
from dtrain.cli.client import Client
from dtrain.cli.loglines import Cutter, Line
from dtrain.cli.records import Job
from dtrain.protocol.errors import DtrainError, NotFound, Refused

STREAMS = ("stdout", "stderr")
RANKS_MAX = 32
"""So many are followed at once: of each log one call waits at a replica, which lets 72 wait for all of us."""

_POLL_S = 2.0
_DRAIN_S = 10.0
"""How long to go on reading logs after the job or attempt has ended."""


def show(line: Line, *, prefix: bool) -> bytes:
    """The line as it is written; ``agent/rank | `` before it when several are mixed."""
    start = f"{line.agent}/{line.rank} | ".encode() if prefix else b""
    return start + line.text + (b"" if line.text.endswith(b"\n") else b"\n")


def _ignore(_: object) -> None:
    pass


class Tail:
    """Reads one rank's stream of one attempt from ``offset`` on."""

    def __init__(
        self,
        client: Client,
        job: str,
        *,
        attempt: int,
        rank: int,
        stream: str,
        write: Callable[[Line], None],
        offset: int = 0,
    ) -> None:
        self._client, self._write = client, write
        self._job, self._attempt, self._rank, self._stream = job, attempt, rank, stream
        self._offset = offset
        self._cutter = Cutter()
        self._agent = ""
        self.over = threading.Event()
        """Set once nothing more will be written: read what is there and end."""
        self.problem = ""
        """Why the log could not be read, if it could not."""
        self._stopped = threading.Event()

    def start(self) -> threading.Thread:
        """Read in a thread of its own."""
        thread = threading.Thread(target=self.run, name=f"tail-{self._rank}-{self._stream}", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """End soon, whatever is left."""
        self._stopped.set()

    def run(self) -> None:
        """Read until the end of a log that is ``over``."""
        tries = 0
        while not self._stopped.is_set():
            was_over = self.over.is_set()
            try:
                chunk = self._client.read_log(
                    self._job,
                    self._rank,
                    self._stream,
                    attempt=self._attempt,
                    offset=self._offset,
                    wait_s=0.0 if was_over else _POLL_S,
                )
            except DtrainError as error:
                # Not written yet, or its machine or our replica is away for a moment.
                tries += 1
                self.problem = error.message
                if was_over and (tries >= 3 or isinstance(error, NotFound | Refused)):
                    break
                self._stopped.wait(0.3)
                continue
            tries, self.problem = 0, ""
            self._offset = chunk.next_offset
            self._emit(chunk)
            if not chunk.data:
                if was_over:
                    break
                # The rank may have ended while its attempt goes on: ask gently.
                self._stopped.wait(0.3 if chunk.eof else 0.1)
        self._flush()

    def _emit(self, chunk: LogChunk) -> None:
        self._agent = chunk.agent
        for at_ms, text in self._cutter.feed(chunk.data, chunk.offset, chunk.marks):
            self._write(self._line(at_ms, text))

    def _flush(self) -> None:
        for at_ms, text in self._cutter.flush():
            self._write(self._line(at_ms, text))

    def _line(self, at_ms: int, text: bytes) -> Line:
        return Line(self._agent, self._attempt, self._rank, self._stream, text, at_ms)


class Follower:
    """Follows one job to its end.

    ``ranks`` picks the ranks to read from a job with members, and is asked at every change: what it
    picks later is read from its beginning, RANKS_MAX at most in one attempt; ``changed`` hears
    of every change of the job; ``write`` gets the lines, one at a time. What ``check``
    raises, asked each time around, ends it. ``start_at``: how far logs, by attempt, rank and
    stream, were read already.
    """

    def __init__(
        self,
        client: Client,
        job: str,
        *,
        ranks: Callable[[Job], Sequence[int]],
        write: Callable[[Line], None],
        changed: Callable[[Job], None] = _ignore,
        streams: Sequence[str] = STREAMS,
        trouble: Callable[[str], None] = _ignore,
        check: Callable[[], None] = lambda: None,
        start_at: Mapping[tuple[int, int, str], int] | None = None,
    ) -> None:
        self._start_at = start_at or {}
        self._client, self._job = client, job
        self._ranks, self._changed, self._trouble = ranks, changed, trouble
        self._check = check
        self._streams = tuple(streams)
        self._lock = threading.Lock()
        self._sink = write
        self._tails: list[tuple[Tail, threading.Thread]] = []
        self._attempt = 0
        self._followed: set[int] = set()
        self._left_out = 0

    def run(self, *, after_revision: int = 0) -> Job:
        """Return the job once it has ended and its logs are read.

        Raises:
            NotFound: the job does not exist.
        """
        revision, told = after_revision, ""
        first = True
        try:
            while True:
                self._check()
                try:
                    reading = self._client.read(
                        f"jobs/{self._job}/",
                        after_revision=0 if first else revision,
                        wait_s=0 if first else _POLL_S,
                    )
                except (NotFound, Refused):
                    raise
                except DtrainError as error:
                    if error.message != told:
                        told = error.message
                        self._trouble(f"{error.message}; trying again")
                    time.sleep(0.5)
                    continue
                if told:
                    told = ""
                    self._trouble(f"connected again, to {reading.replica}")
                jobs = records.group(reading).jobs
                if self._job not in jobs and (reading.revision >= after_revision):
                    naming.find(jobs, self._job, "job")
                if self._job in jobs:
                    first, revision = False, reading.revision
                    job = jobs[self._job]
                    self._see(job)
                    if job.finished:
                        self._drain()
                        return job
        finally:
            for tail, _ in self._tails:
                tail.stop()

    def _see(self, job: Job) -> None:
        self._changed(job)
        if job.status is None or not job.status.members:
            return
        if job.attempt != self._attempt:
            for tail, _ in self._tails:
                tail.over.set()
            self._attempt = job.attempt
            self._followed.clear()
            self._left_out = 0
        fresh = [rank for rank in self._ranks(job) if rank not in self._followed]
        room = max(0, RANKS_MAX - len(self._followed))
        if (left_out := len(fresh) - room) > self._left_out:
            self._left_out = left_out
            self._trouble(
                f"{RANKS_MAX} ranks of attempt {job.attempt} are followed, {left_out} more are not: "
                "choose them with --rank, or read all of it with 'dtrain logs' without -f"
            )
        for rank in fresh[:room]:
            self._followed.add(rank)
            for stream in self._streams:
                self._follow(job.attempt, rank, stream)

    def _follow(self, attempt: int, rank: int, stream: str) -> None:
        tail = Tail(
            self._client,
            self._job,
            attempt=attempt,
            rank=rank,
            stream=stream,
            write=self._write,
            offset=self._start_at.get((attempt, rank, stream), 0),
        )
        self._tails.append((tail, tail.start()))

    def _drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_S
        for tail, _ in self._tails:
            tail.over.set()
        for _, thread in self._tails:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _write(self, line: Line) -> None:
        with self._lock:
            self._sink(line)
