"""Where an audit gets its history from: etcd, from its oldest revision on, or a recorded stream.

A ``Replay`` reads etcd and hands every revision to its sinks, an ``Auditor``
and perhaps a ``Recorder``. Where history is compacted it begins with a list at
the oldest revision there is; if compaction overtakes it, it lists again, and the
sinks are told that they have missed something.

A recorded stream is JSON lines, ``.gz`` if named so::

    {"v":1,"kind":"AuditStream","cluster":"c"}
    {"list":7,"k":KEY,"v":VALUE,"c":CREATE_REVISION}    one per key of a list at revision 7
    {"listed":7}
    {"r":8,"e":[{"k":KEY,"v":VALUE,"c":8},{"k":KEY}]}   a revision; without "v": deleted
    {"end":8}                                           the recorder was closed in order

Of job files only the uid is kept: their environment may hold secrets. Values
that are no text come as ``"b"``, in base64.
"""

import base64
import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from dtrain.protocol.audit import Change
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, TimedOut, Unavailable
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import Etcd, Event, KeyValue, WatchStream, prefix_end

PAGE_KEYS = 500
QUIET_S = 0.3
"""After so much silence a replay that should be complete is compared with a list."""

RETRY_S = 0.5
LINE_BYTES_MAX = 16 * 1024 * 1024
STREAM_VERSION = 1

T = TypeVar("T")


class Sink(Protocol):
    """Takes a history, in order; an ``Auditor`` is one."""

    def begin_at(self, revision: int, records: Sequence[Change]) -> None:
        """All there is at ``revision``; what came before cannot be read."""
        ...

    def feed(self, revision: int, changes: Sequence[Change]) -> None: ...


class Replay:
    """One pass over a cluster's history in etcd. Not thread-safe. It never writes."""

    def __init__(self, etcd: Etcd, cluster: ClusterName, *sinks: Sink) -> None:
        self._etcd = etcd
        self._root = Keys(cluster).root
        self._end = prefix_end(self._root)
        self._sinks = sinks
        self._stream: WatchStream | None = None
        self._begun = False
        self._live: dict[str, int] = {}
        """Mod revision of every key at ``revision``: what a list is compared with."""
        self.revision = 0
        """Everything up to it has been handed on."""
        self.gaps = 0
        """How often compaction has overtaken it."""

    def close(self) -> None:
        """End the watch."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def catch_up(self, deadline_s: float) -> None:
        """Hand on everything that etcd holds at the time of the call.

        Raises:
            TimedOut: not in ``deadline_s``; what was read is handed on.
            Refused, Unavailable: etcd cannot be read.
        """
        deadline = time.monotonic() + deadline_s
        wanted = self._patiently(deadline, lambda: self._etcd.range(self._root, limit=1).revision)
        while self.revision < wanted:
            if self._patiently(deadline, lambda: self.step(QUIET_S)) or self.revision >= wanted:
                continue
            # Changes outside the prefix do not show in the watch: only a list tells that none is missing.
            truth = self._patiently(deadline, self._list)
            if {kv.key: kv.mod_revision for kv in truth[1]} == self._live:
                self.revision = max(self.revision, wanted)
            elif time.monotonic() > deadline:
                raise TimedOut(
                    ErrorCode.WAIT_TIMED_OUT,
                    f"the history was read up to revision {self.revision}, etcd is at {truth[0]}",
                    fix="try again: etcd is busy, or writes arrive faster than they can be checked",
                )

    def step(self, timeout_s: float) -> bool:
        """Hand on what comes next; False: nothing did in ``timeout_s``.

        Raises:
            Unavailable: the watch ended; the next call resumes it.
            Refused: etcd does not let us read.
        """
        try:
            if not self._begun:
                self._begin()
            if self._stream is None:
                self._stream = self._etcd.watch(self._root, self._end, self.revision + 1)
            batch = self._stream.next(timeout_s)
        except DtrainError as error:
            self.close()
            if error.code is not ErrorCode.ETCD_COMPACTED:
                raise
            self.gaps += self._begun
            self._begun = False
            return True
        if batch is None or not batch.events:
            return False
        fresh = [event for event in batch.events if event.kv.mod_revision > self.revision]
        for revision, events in itertools.groupby(fresh, key=lambda event: event.kv.mod_revision):
            self._hand_on(revision, list(events))
        return True

    def _begin(self) -> None:
        oldest = 1
        if not self._is_readable(1):
            oldest = self._oldest()
        if oldest > 1:
            items = self._pages(oldest)
            self._live = {kv.key: kv.mod_revision for kv in items}
            changes = [Change(kv.key, kv.value, kv.create_revision) for kv in items]
            for sink in self._sinks:
                sink.begin_at(oldest, changes)
            self.revision = oldest
        self._begun = True

    def _oldest(self) -> int:
        """The oldest revision that is not compacted: halving, since no request tells it."""
        low, high = max(1, self.revision), self._etcd.range(self._root, limit=1).revision
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_readable(middle) else (middle, high)
        return high

    def _is_readable(self, revision: int) -> bool:
        try:
            self._etcd.range(self._root, revision=revision, limit=1)
        except Refused as error:
            if error.code is ErrorCode.ETCD_COMPACTED:
                return False
            raise
        return True

    def _pages(self, revision: int) -> list[KeyValue]:
        page = self._etcd.range(self._root, self._end, revision=revision, limit=PAGE_KEYS)
        items = list(page.items)
        while page.more:
            page = self._etcd.range(items[-1].key + "\0", self._end, revision=revision, limit=PAGE_KEYS)
            items += page.items
        return items

    def _list(self) -> tuple[int, list[KeyValue]]:
        revision = self._etcd.range(self._root, limit=1).revision
        return revision, self._pages(revision)

    def _hand_on(self, revision: int, events: Sequence[Event]) -> None:
        changes = []
        for event in events:
            kv = event.kv
            if event.kind == "delete":
                self._live.pop(kv.key, None)
                changes.append(Change(kv.key, None))
            else:
                self._live[kv.key] = kv.mod_revision
                changes.append(Change(kv.key, kv.value, kv.create_revision))
        for sink in self._sinks:
            sink.feed(revision, changes)
        self.revision = revision

    def _patiently(self, deadline: float, read: Callable[[], T]) -> T:
        while True:
            try:
                return read()
            except (Unavailable, OutcomeUnknown):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)
            except Refused as error:
                # Compacted between two pages of a list.
                if error.code is not ErrorCode.ETCD_COMPACTED or time.monotonic() > deadline:
                    raise


class Recorder:
    """A sink that writes the history down. Close it: a stream without its end counts as cut off."""

    def __init__(self, path: Path, cluster: ClusterName) -> None:
        """Create the file.

        Raises:
            Refused: it cannot be written.
        """
        self._keys = Keys(cluster)
        self._revision = 0
        try:
            self._file: gzip.GzipFile | BinaryIO = (
                gzip.GzipFile(path, "wb") if path.suffix == ".gz" else path.open("wb")
            )
        except OSError as error:
            raise Refused(ErrorCode.USAGE, f"{path} cannot be written: {error}") from error
        self._write({"v": STREAM_VERSION, "kind": "AuditStream", "cluster": cluster})

    def begin_at(self, revision: int, records: Sequence[Change]) -> None:
        for change in records:
            self._write({"list": revision, **self._change(change)})
        self._write({"listed": revision})
        self._revision = revision

    def feed(self, revision: int, changes: Sequence[Change]) -> None:
        self._write({"r": revision, "e": [self._change(change) for change in changes]})
        self._revision = revision

    def close(self) -> None:
        """Write the end."""
        self._write({"end": self._revision})
        self._file.close()

    def _change(self, change: Change) -> dict[str, Any]:
        found: dict[str, Any] = {"k": change.key}
        if change.value is None:
            return found
        value, place = change.value, self._keys.parse(change.key)
        if place is None or place.kind == "spec":
            value = _uid_alone(value) if place is not None else b""
        try:
            found["v"] = value.decode()
        except UnicodeDecodeError:
            found["b"] = base64.b64encode(value).decode()
        return found | {"c": change.create_revision}

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")


class Recorded:
    """A recorded stream. ``whole`` after ``play``: it has its end."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its first line.

        Raises:
            Refused: it cannot be read, or is no stream of this version.
        """
        self._path = path
        self._lines = self._read()
        self.whole = False
        head = next(self._lines, {})
        if head.get("kind") != "AuditStream" or not isinstance(head.get("cluster"), str):
            raise self._bad("is no recorded audit stream")
        if head.get("v") != STREAM_VERSION:
            raise self._bad(f"has version {head.get('v')!r}; this dtrain reads version {STREAM_VERSION}")
        self.cluster = ClusterName(head["cluster"])

    def play(self, *sinks: Sink) -> None:
        """Hand everything on, to the end or to where the stream was cut off.

        Raises:
            Refused: a line is damaged.
        """
        listed: list[Change] = []
        for line in self._lines:
            try:
                if "list" in line:
                    listed.append(_change_of(line))
                elif "listed" in line:
                    for sink in sinks:
                        sink.begin_at(int(line["listed"]), listed)
                    listed = []
                elif "r" in line:
                    changes = [_change_of(one) for one in line["e"]]
                    for sink in sinks:
                        sink.feed(int(line["r"]), changes)
                self.whole = "end" in line
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._bad(f"has a damaged line ({error})") from error

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            with gzip.open(self._path) if self._path.suffix == ".gz" else self._path.open("rb") as file:
                while line := file.readline(LINE_BYTES_MAX):
                    if not line.endswith(b"\n"):
                        return  # cut off while it was written
                    found = json.loads(line)
                    if not isinstance(found, dict):
                        raise ValueError("not an object")
                    yield found
        except EOFError:
            return
        except (OSError, ValueError, RecursionError) as error:
            raise self._bad(f"cannot be read: {error}") from error

    def _bad(self, what: str) -> Refused:
        return Refused(
            ErrorCode.BAD_RECORD, f"{self._path} {what}", fix="record it again: dtrain audit --record"
        )


def _change_of(line: dict[str, Any]) -> Change:
    value = None
    if "v" in line:
        value = line["v"].encode()
    elif "b" in line:
        value = base64.b64decode(line["b"], validate=True)
    return Change(str(line["k"]), value, int(line.get("c", 0)))


def _uid_alone(spec: bytes) -> bytes:
    try:
        found = json.loads(spec)
        uid = found.get("uid", "") if isinstance(found, dict) else ""
    except ValueError:
        uid = ""
    return json.dumps({"v": 1, "uid": uid}).encode()
