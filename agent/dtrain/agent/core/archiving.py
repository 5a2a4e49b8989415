"""Which bytes of a log go to the store: its beginning and its end, whatever lies between them."""

from dataclasses import dataclass

HEAD_SHARE = 4
"""One part in so many of what is kept is the beginning: errors are at the end, their causes at both."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes from ``start`` up to ``end``."""

    start: int
    end: int


def whole(size: int, bytes_max: int) -> tuple[Range, ...]:
    """What is kept of a log of ``size`` bytes, at most ``bytes_max`` of it."""
    if size <= bytes_max:
        return (Range(0, size),) if size else ()
    head = bytes_max // HEAD_SHARE
    return tuple(Range(*one) for one in ((0, head), (size - (bytes_max - head), size)) if one[0] < one[1])


def increment(sent: int, size: int, bytes_max: int, at_once: int) -> tuple[Range, ...]:
    """What is copied next of a log of which everything up to ``sent`` has been looked after.

    At most ``at_once`` bytes; of a log that grows faster, what ``whole`` would not keep goes first.
    """
    if size <= sent:
        return ()
    if size - sent <= at_once:
        return (Range(sent, size),)
    head = min(max(0, bytes_max // HEAD_SHARE - sent), at_once // 2)
    tail = at_once - head
    ranges = (Range(sent, sent + head), Range(size - tail, size))
    return tuple(one for one in ranges if one.start < one.end)
