"""Reads logs from the store, where agents have copied them.

A rank's log may lie in many small bundles or in one whole copy: what is read is the union of
their parts. A part of a long log may be missing in the middle, which is said where it was.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dtrain.protocol import archive
from dtrain.protocol.archive import BundleName, Mark, Part
from dtrain.protocol.errors import ErrorCode, NotFound, Unavailable
from dtrain.protocol.ids import ClusterName, JobName, Uid
from dtrain.runtime import retry
from dtrain.storage.blobs.port import BlobStore

T = TypeVar("T")

READS_AT_ONCE = 2
"""Of the store and of large bundles; other calls must find a free thread."""
BUSY_S_MAX = 2.0
READ_S_MAX = 8.0
LIST_S = 2.0
"""A listing is used again for so long: a reader asks many times a second."""
LISTINGS_KEPT = 64
BUNDLE_BYTES_KEPT = 64 * 1024 * 1024
"""Unpacked, of the bundles that were read last."""


@dataclass(frozen=True, slots=True)
class Archived:
    """Bytes of an archived log from ``offset`` on; ``until_ms``: when its last byte had been written."""

    data: bytes
    offset: int
    next_offset: int
    at_end: bool
    marks: tuple[Mark, ...]
    agent: str
    until_ms: int


class ArchivedLogs:
    """The archive of one cluster's logs, in whichever store a job has. Thread-safe."""

    def __init__(
        self,
        cluster: ClusterName,
        stores: Callable[[str], BlobStore],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._stores, self._monotonic = cluster, stores, monotonic
        self._lock = threading.Lock()
        self._reads = threading.BoundedSemaphore(READS_AT_ONCE)
        self._listings: OrderedDict[tuple[str, str], tuple[float, tuple[BundleName, ...]]] = OrderedDict()
        self._bundles: OrderedDict[tuple[str, str], tuple[Part, ...]] = OrderedDict()
        self._kept_bytes = 0

    def bundles(self, store: str, job: JobName, uid: Uid) -> tuple[BundleName, ...]:
        """What there is of a submission, in order of attempts.

        Raises:
            DtrainError: the store did not answer, or refused.
        """
        with self._reading():
            return self._list(store, job, uid)

    def read(
        self, store: str, job: JobName, uid: Uid, *, attempt: int, name: str, offset: int, bytes_max: int
    ) -> Archived | None:
        """Read a log (``name``: ``<rank>/<stream>``) from ``offset`` on; None: nothing of it is there.

        A negative offset counts from the end.

        Raises:
            DtrainError: the store did not answer, or refused.
        """
        rank = name.partition("/")[0]
        with self._reading():
            found = [
                bundle
                for bundle in self._list(store, job, uid)
                if bundle.attempt == attempt
                and (not rank.isdecimal() or bundle.first <= int(rank) <= bundle.last)
            ]
            parts: list[Part] = []
            for bundle in found:
                with contextlib.suppress(NotFound):  # replaced since it was listed
                    parts += [part for part in self._bundle(store, bundle.key) if part.name == name]
        if not parts:
            return None
        return _slice(parts, offset, bytes_max, found[-1].agent)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        if not self._reads.acquire(timeout=BUSY_S_MAX):
            raise Unavailable(
                ErrorCode.STORE_UNAVAILABLE, "the archive is busy", fix="try again in a few seconds"
            )
        try:
            yield
        finally:
            self._reads.release()

    def _list(self, store: str, job: JobName, uid: Uid) -> tuple[BundleName, ...]:
        prefix = archive.logs_prefix(self._cluster, job, uid)
        now = self._monotonic()
        with self._lock:
            at, known = self._listings.get((store, prefix), (float("-inf"), ()))
        if now - at < LIST_S:
            return known
        blobs = self._stores(store)
        keys = _ask(lambda: [info.key for info in blobs.list(prefix)])
        parsed = (archive.parse_bundle_key(prefix, key) for key in keys)
        found = tuple(sorted((one for one in parsed if one), key=lambda one: (one.attempt, one.number)))
        with self._lock:
            self._listings[store, prefix] = (now, found)
            while len(self._listings) > LISTINGS_KEPT:
                self._listings.popitem(last=False)
        return found

    def _bundle(self, store: str, key: str) -> tuple[Part, ...]:
        with self._lock:
            known = self._bundles.get((store, key))
            if known is not None:
                self._bundles.move_to_end((store, key))
                return known
        blobs = self._stores(store)
        parts = archive.unpack(_ask(lambda: blobs.get(key)))
        with self._lock:
            if (store, key) not in self._bundles:
                self._bundles[store, key] = parts
                self._kept_bytes += _size(parts)
            while self._kept_bytes > BUNDLE_BYTES_KEPT and len(self._bundles) > 1:
                _, dropped = self._bundles.popitem(last=False)
                self._kept_bytes -= _size(dropped)
        return parts


def _slice(parts: Sequence[Part], offset: int, bytes_max: int, agent: str) -> Archived:
    """Bytes from the first of the parts that goes beyond ``offset``."""
    end = max(part.end for part in parts)
    marks = sorted({mark for part in parts for mark in part.marks}, key=lambda mark: (mark.size, mark.at_ms))
    until_ms = marks[-1].at_ms if marks else 0
    start = max(0, end + offset) if offset < 0 else offset
    beyond = [part for part in parts if part.end > start]
    if not beyond:
        return Archived(b"", start, start, True, (), agent, until_ms)
    # Of those that hold the byte asked for, the one that goes furthest; else the next one after a gap.
    part = max(beyond, key=lambda part: (-max(part.offset, start), part.end))
    data, note, at = part.data, b"", start - part.offset
    if part.offset > start:
        at = _line_begins(data) if start or part.offset else 0
        note = _gap(part.offset + at - start)
    chunk = data[at : at + max(1, bytes_max)]
    next_offset = part.offset + at + len(chunk)
    told = tuple(mark for mark in marks if mark.size > part.offset + at)
    first = next((n for n, mark in enumerate(told) if mark.size >= next_offset), len(told))
    return Archived(
        note + chunk,
        next_offset - len(chunk) - len(note),
        next_offset,
        next_offset >= end,
        told[: first + 1],
        agent,
        until_ms,
    )


def _line_begins(data: bytes) -> int:
    found = data.find(b"\n")
    return 0 if found in (-1, len(data) - 1) else found + 1


def _gap(size: int) -> bytes:
    return f"\n[dtrain: {size} bytes of this log were not kept]\n".encode()


def _size(parts: Sequence[Part]) -> int:
    return sum(len(part.data) + 100 for part in parts)


def _ask(operation: Callable[[], T]) -> T:
    return retry.call(operation, attempts=2, deadline_s=READ_S_MAX, idempotent=True)
