"""How far a job's checkpoint is, on stderr beside whatever else is written while somebody waits.

On a terminal it is the last line, redrawn in place; anywhere else a plain line every few seconds.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import click

from dtrain.cli import listing, output, terminal
from dtrain.cli.client import Client
from dtrain.cli.records import Job
from dtrain.cli.render import moving
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.job import JobPhase
from dtrain.protocol.rows import Movement

LOOK_S = 1.0
"""Agents tell no oftener."""

PLAIN_S = 5.0
WIDTH_UNKNOWN = 80

_ERASE = "\r\x1b[K"
_RESTORING = frozenset({JobPhase.STARTING, JobPhase.RECOVERING})


class Live:
    """The line; a context manager that takes it away. Safe for several threads."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._in_place = terminal.moves(sys.stderr)
        self._lock = threading.RLock()
        self._line = ""
        self._closed = False
        self._told: list[str] = []
        self._told_at = -math.inf

    def __enter__(self) -> "Live":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away for good: a thread that still looks may be late."""
        with self._lock:
            self.show(())
            self._closed = True

    def show(self, found: Sequence[Movement]) -> None:
        """Show how far this is; with nothing, nothing."""
        with self._lock:
            if self._closed:
                return
            if self._in_place:
                self._draw(moving.bar(found[-1], _width() - 1) if found else "")
                return
            lines = [moving.line(one) for one in found]
            now = self._monotonic()
            if lines and lines != self._told and now - self._told_at >= PLAIN_S:
                self._told, self._told_at = lines, now
                for line in lines:
                    output.say(line)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Write something else inside the block: the line makes room, and comes back below it."""
        with self._lock:
            line = self._line
            self._draw("")
            try:
                yield
            finally:
                self._draw(line)

    def _draw(self, line: str) -> None:
        if line != self._line:
            self._line = line
            click.echo(_ERASE + line, err=True, nl=False)


class Looking:
    """Asks for a job's row while its checkpoint may be on its way; a context manager."""

    def __init__(self, client: Client, name: str) -> None:
        self._client, self._name = client, name
        self._live = Live()
        self._wanted = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looking", daemon=True)
        self.aside = self._live.aside

    def __enter__(self) -> "Looking":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._wanted.set()
        # The thread is not waited for: it may wait for a replica that is away.
        self._live.close()

    def see(self, job: Job | None) -> None:
        """Take note of where the job stands: most of the time nothing moves, and nothing is asked."""
        if job is not None and not job.finished and (job.open or job.phase in _RESTORING):
            self._wanted.set()
        else:
            self._wanted.clear()
            self._live.show(())

    def say(self, text: str) -> None:
        """Say it on stderr beside the line."""
        with self.aside():
            output.say(text)

    def _run(self) -> None:
        while self._wanted.wait() and not self._over.is_set():
            with contextlib.suppress(DtrainError):
                rows = listing.jobs(self._client).rows
                row = next((row for row in rows if row.name == self._name), None)
                if self._wanted.is_set() and not self._over.is_set():
                    self._live.show(row.moving if row is not None else ())
            self._over.wait(LOOK_S)


def _width() -> int:
    try:
        return os.get_terminal_size(2).columns
    except OSError:
        return WIDTH_UNKNOWN
