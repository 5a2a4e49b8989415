"""The newest changes of a replica's mirror, in order, for whoever watches.

A mirror says what is so; whoever was away for a moment, or asks another replica
now, wants to know what happened meanwhile. Revisions are etcd's and the same
everywhere, so that any replica can go on where another one stopped. How far back
one reaches is bounded by memory, and it says so when it does not.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dtrain.storage.etcd.mirror import Change

BYTES_MAX = 16 * 1024 * 1024
CHANGES_MAX = 50_000
ANSWER_MAX = 2_000
"""Changes in one answer, unless one transaction made more."""


@dataclass(frozen=True, slots=True)
class Recent:
    """Changes after a revision up to ``revision``, all of it. ``lost``: not known here any more."""

    changes: tuple[Change, ...]
    revision: int
    lost: bool = False


class History:
    """What has changed below ``root``, but for snapshots, which change all the time. Thread-safe."""

    def __init__(self, root: str, *, bytes_max: int = BYTES_MAX, changes_max: int = CHANGES_MAX) -> None:
        self._root = root
        self._bytes_max = bytes_max
        self._changes_max = changes_max
        self._changed = threading.Condition()
        self._changes: deque[Change] = deque()
        self._bytes = 0
        self._from: int | None = None
        """All that came after it is here; None: nothing is yet."""
        self._revision = 0

    def add(self, changes: Sequence[Change], revision: int) -> None:
        """Take in what the mirror has applied, which leads to ``revision``."""
        with self._changed:
            if self._from is None or any(not change.revision for change in changes):
                # After a new list what came between is not known, only what came of it.
                self._changes.clear()
                self._bytes = 0
                self._from = revision
            else:
                for change in changes:
                    if not self._is_snapshot(change.key):
                        self._changes.append(change)
                        self._bytes += _size(change)
                self._trim()
            self._revision = max(self._revision, revision)
            self._changed.notify_all()

    def since(self, prefixes: Iterable[str], after: int) -> Recent:
        """What has changed below ``prefixes`` after revision ``after``."""
        beginnings = tuple(self._root + prefix for prefix in prefixes)
        with self._changed:
            if self._from is None or after < self._from:
                return Recent((), self._revision, lost=True)
            # From the newest back: those who wait ask for little, and often.
            newer = list(itertools.takewhile(lambda change: change.revision > after, reversed(self._changes)))
            found = [change for change in reversed(newer) if change.key.startswith(beginnings)]
            if len(found) <= ANSWER_MAX:
                return Recent(tuple(found), max(after, self._revision))
            # A revision is told whole or not at all: whoever asks on begins behind it.
            last = found[ANSWER_MAX - 1].revision
            return Recent(tuple(change for change in found if change.revision <= last), last)

    def wait(
        self, prefixes: Sequence[str], after: int, timeout_s: float, goes_on: Callable[[], bool]
    ) -> Recent:
        """The same once there is something, at the end of ``timeout_s``, or when nobody ``goes_on``."""
        found = self.since(prefixes, after)

        def arrived() -> bool:
            nonlocal found
            # Only what is new is looked through again.
            found = self.since(prefixes, found.revision if not found.lost else after)
            return bool(found.changes) or found.lost or not goes_on()

        if not found.changes and not found.lost:
            with self._changed:
                self._changed.wait_for(arrived, timeout_s)
        return found

    def _is_snapshot(self, key: str) -> bool:
        return key.startswith(f"{self._root}agents/") and "/workers/" in key

    def _trim(self) -> None:
        while self._changes and (self._bytes > self._bytes_max or len(self._changes) > self._changes_max):
            gone = self._changes[0].revision
            # Half a transaction would look like a whole one.
            while self._changes and self._changes[0].revision == gone:
                self._bytes -= _size(self._changes.popleft())
            self._from = gone


def _size(change: Change) -> int:
    return len(change.key) + (len(change.after.value) if change.after else 0)
