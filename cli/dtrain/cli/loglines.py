"""Lines of logs: cut from chunks, given their times, merged and filtered. Pure.

A rank's file has no times in it. Agents note when it was how long; a line's time is that of
the first such mark beyond its first byte. Within one log times never go back, so that merging
keeps the order of each; between machines they are as good as their clocks.
"""

import bisect
import heapq
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

LINE_BYTES_MAX = 1024 * 1024
"""A longer one is shown in pieces: what never ends must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a rank's log, newline included (the last one may have none)."""

    agent: str
    attempt: int
    rank: int
    stream: str
    text: bytes
    at_ms: int = 0
    """When it had been written (epoch, its machine's clock); 0: not known."""


Marks = Sequence[tuple[int, int]]
"""(size, milliseconds): when the log was how long."""


class Cutter:
    """Cuts one log's chunks, which come in order, into lines with their times."""

    def __init__(self) -> None:
        self._rest = b""
        self._rest_at_ms = 0
        self._latest_ms = 0

    @property
    def unfinished(self) -> int:
        """Bytes of a line whose end has not been seen."""
        return len(self._rest)

    def feed(self, data: bytes, offset: int, marks: Marks) -> Iterator[tuple[int, bytes]]:
        """Yield (milliseconds, line) of each line that ``data``, from ``offset`` on, completes."""
        sizes = [size for size, _ in marks]
        at = 0
        while (end := data.find(b"\n", at)) >= 0:
            yield self._begun(offset + at, sizes, marks), self._rest + data[at : end + 1]
            self._rest, at = b"", end + 1
        if at < len(data):
            self._rest_at_ms = self._begun(offset + at, sizes, marks)
            self._rest += data[at:]
            if len(self._rest) > LINE_BYTES_MAX:
                yield from self.flush()

    def flush(self) -> Iterator[tuple[int, bytes]]:
        """Yield the last line, if it has no end."""
        if self._rest:
            yield self._rest_at_ms, self._rest
            self._rest = b""

    def _begun(self, position: int, sizes: Sequence[int], marks: Marks) -> int:
        if self._rest:
            return self._rest_at_ms
        found = bisect.bisect_right(sizes, position)
        if found < len(marks):
            # A machine's clock may be set back; its log's order is known better.
            self._latest_ms = max(self._latest_ms, marks[found][1])
        return self._latest_ms


def merged(logs: Sequence[Iterable[Line]]) -> Iterator[Line]:
    """Lines of several logs in the order of their times; of one log, and of one time, in the order given."""
    yield from heapq.merge(*logs, key=lambda line: line.at_ms)


def last(lines: Iterable[Line], count: int) -> Iterator[Line]:
    """The last ``count`` of them."""
    yield from deque(lines, maxlen=count)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which lines are shown: those since a time, that a pattern is found in."""

    since_ms: int = 0
    pattern: re.Pattern[str] | None = None

    def __call__(self, line: Line) -> bool:
        # One whose time is not known may be from then.
        if self.since_ms and 0 < line.at_ms < self.since_ms:
            return False
        return self.pattern is None or bool(self.pattern.search(line.text.decode("utf-8", "replace")))


Keep = Callable[[Line], bool]
