"""A series of numbers that never grows beyond its room, and still reaches back to its beginning. Pure.

Full, it puts each two neighbours together into their mean: what is old and
what is new become coarser alike, and a curve of days keeps its shape.
"""

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class Ring:
    """``room`` points at most, an even number. Each is the mean of ``stride`` values, at the last's time."""

    room: int
    stride: int = 1
    at: "array[float]" = field(default_factory=lambda: array("d"))
    step: "array[int]" = field(default_factory=lambda: array("q"))
    value: "array[float]" = field(default_factory=lambda: array("d"))
    _sum: float = 0.0
    _count: int = 0

    def add(self, at: float, step: int, value: float) -> None:
        """Take in one value; the newest is always there, even if its point is not complete yet."""
        if 0 < self._count < self.stride:
            self._drop_last()
        else:
            self._sum, self._count = 0.0, 0
            if len(self.at) >= self.room:
                self._halve()
        self._sum += value
        self._count += 1
        self.at.append(at)
        self.step.append(step)
        self.value.append(self._sum / self._count)

    def points(self, points_max: int) -> list[tuple[float, int, float]]:
        """Return at most so many points in order of time, each the mean of its neighbours."""
        count = len(self.at)
        width = max(1, -(-count // max(1, points_max)))
        found = []
        for first in range(0, count, width):
            last = min(first + width, count)
            mean = sum(self.value[first:last]) / (last - first)
            found.append((self.at[last - 1], self.step[last - 1], mean))
        return found

    def _drop_last(self) -> None:
        for column in (self.at, self.step, self.value):
            column.pop()

    def _halve(self) -> None:
        self.at = self.at[1::2]
        self.step = self.step[1::2]
        pairs = zip(self.value[0::2], self.value[1::2], strict=True)
        self.value = array("d", [(one + other) / 2 for one, other in pairs])
        self.stride *= 2
