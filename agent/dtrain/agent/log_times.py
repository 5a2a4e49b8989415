"""When the lines of a log were written, without a process between the rank and its file.

Ranks write straight into their files, which outlive everything but the machine. So the
agent looks at the files' sizes and notes beside each, in ``<stream>.times``, when it was how
long: ``SIZE TIME`` a line. A line's time is that of the first note that covers its first byte:
late by one look at most, later where no agent ran.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.protocol.archive import Mark, marks_from, marks_text, thinned

MARKS_MAX = 8192
"""Of one file; beyond them every other one goes, so that an old line's time becomes coarser."""


def of(path: Path) -> Path:
    """Where the times of a log file are noted."""
    return path.with_suffix(".times")


def read(path: Path) -> tuple[Mark, ...]:
    """The marks in a file of times; none if it is not there."""
    try:
        return marks_from(path.read_text("ascii", "replace"))
    except OSError:
        return ()


def within(marks: Sequence[Mark], start: int, end: int) -> Iterator[Mark]:
    """Those that tell the time of bytes from ``start`` up to ``end``."""
    for mark in marks[bisect.bisect_right(marks, start, key=lambda mark: mark.size) :]:
        yield mark
        if mark.size >= end:
            return


class Times:
    """Notes the times of one file. ``note`` is cheap while the file does not grow."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._path = of(log)
        marks = read(self._path)
        self._size = marks[-1].size if marks else 0
        self._count = len(marks)

    def note(self, at_ms: int) -> int:
        """Look at the file; return its size. Raises OSError other than for a file that is not there."""
        try:
            size = os.stat(self._log).st_size  # noqa: PTH116 - many times a second
        except FileNotFoundError:
            return 0
        if size > self._size:
            with self._path.open("a", encoding="ascii") as file:
                file.write(marks_text([Mark(size, at_ms)]))
            self._size = size
            self._count += 1
            if self._count > MARKS_MAX:
                self._thin()
        return size

    def _thin(self) -> None:
        kept = thinned(read(self._path), MARKS_MAX // 2)
        beside = self._path.with_suffix(".times.new")
        beside.write_text(marks_text(kept), "ascii")
        beside.replace(self._path)
        self._count = len(kept)
