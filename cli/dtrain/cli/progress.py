"""How far long work is, on stderr: one line in place on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

import click

from dtrain.cli import terminal
from dtrain.cli.durations import show_bytes, show_s

IN_PLACE_S = 0.2
PLAIN_S = 5.0


class Progress:
    """Shows bytes done, their rate and the time left; a context manager that ends its line."""

    def __init__(self, what: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._monotonic = monotonic
        self._in_place = terminal.moves(sys.stderr)
        self._begun = monotonic()
        # Nothing at all for work that is over in a moment.
        self._told_at = self._begun
        self._told = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._told and self._in_place:
            click.echo("\r\x1b[K", err=True, nl=False)

    def __call__(self, done: int, total: int) -> None:
        """Say it, if it was not said a moment ago."""
        now = self._monotonic()
        if now - self._told_at < (IN_PLACE_S if self._in_place else PLAIN_S):
            return
        self._told_at, self._told = now, True
        line = self.line(done, total, now - self._begun)
        click.echo(f"\r\x1b[K{line}" if self._in_place else line, err=True, nl=not self._in_place)

    def line(self, done: int, total: int, elapsed_s: float) -> str:
        """The sentence for so much work in so much time."""
        rate = done / elapsed_s if elapsed_s > 0 else 0.0
        left = f", {show_s((total - done) / rate)} left" if rate > 0 and total > done else ""
        share = f" ({100 * done // total} %)" if total else ""
        return (
            f"{self._what}: {show_bytes(done)} of {show_bytes(total)}{share}, {show_bytes(int(rate))}/s{left}"
        )
