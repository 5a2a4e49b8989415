"""An auditor that watches a cluster live, from a thread of its own.

It sees the whole history if etcd still has it, else everything from its start
on, and resumes through whatever happens to etcd. A gap (history compacted before
it was read) is counted, not hidden.
"""

import itertools
import threading
import time
from collections.abc import Callable

from dtrain.protocol.audit import Auditor, Change, Violation
from dtrain.protocol.errors import DtrainError, ErrorCode
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import Etcd, WatchStream, prefix_end

_NEXT_S = 0.5
_REST_S = 0.1
_SILENCE_S = 20.0
"""Progress is told each 5 s: after this long the member is not to be trusted."""


class Watchman:
    """Audits what happens under ``keys.root``; ``start`` it, ``close`` it. It owns the client."""

    def __init__(self, connect: Callable[[], Etcd], keys: Keys) -> None:
        self._etcd = connect()
        self._keys = keys
        self._auditor = Auditor(keys.cluster)
        self._stop = threading.Event()
        self._reached = 0
        self._gaps = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="watchman", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    @property
    def reached(self) -> int:
        """Everything up to this revision has been judged."""
        return self._reached

    @property
    def gaps(self) -> int:
        """How often history was gone before it could be read."""
        return self._gaps

    @property
    def judged(self) -> tuple[int, int, int]:
        """Revisions, terms and commits judged so far."""
        return self._auditor.revisions, self._auditor.terms, self._auditor.commits

    @property
    def violations(self) -> tuple[Violation, ...]:
        """What broke a promise so far.

        Raises:
            RuntimeError: the watch itself has died, by a bug.
        """
        if self._failure is not None:
            raise RuntimeError(f"the auditor's thread died: {self._failure!r}") from self._failure
        return tuple(self._auditor.violations)

    def settle(self, timeout_s: float = 20.0) -> bool:
        """Wait until everything written by now has been judged; False if that takes longer."""
        end = time.monotonic() + timeout_s
        wanted = 0
        while not wanted:
            try:
                found = self._etcd.range(self._keys.root, prefix_end(self._keys.root), deadline_s=3.0)
                wanted = max((item.mod_revision for item in found.items), default=1)
            except DtrainError:
                if time.monotonic() > end:
                    return False
                time.sleep(_REST_S)
        return self.await_revision(wanted, end - time.monotonic())

    def await_revision(self, revision: int, timeout_s: float) -> bool:
        """Wait until ``revision`` has been judged; False if that takes longer."""
        end = time.monotonic() + timeout_s
        while self._reached < revision:
            if time.monotonic() > end or self._failure is not None:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """End the thread and the client."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(10.0)
        self._etcd.close()

    # Inside ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._follow()
                except DtrainError as error:
                    if error.code is ErrorCode.ETCD_COMPACTED:
                        self._begin()
                    self._stop.wait(_REST_S)
        except BaseException as error:  # noqa: BLE001 - told to whoever asks for the verdict
            self._failure = error

    def _follow(self) -> None:
        root = self._keys.root
        stream = self._etcd.watch(root, prefix_end(root), self._reached + 1)
        try:
            heard = time.monotonic()
            while not self._stop.is_set() and time.monotonic() < heard + _SILENCE_S:
                if self._take(stream):
                    heard = time.monotonic()
        finally:
            stream.close()

    def _take(self, stream: WatchStream) -> bool:
        batch = stream.next(_NEXT_S)
        if batch is None:
            return False
        for revision, events in itertools.groupby(batch.events, key=lambda event: event.kv.mod_revision):
            changes = [
                Change(e.kv.key, None if e.kind == "delete" else e.kv.value, e.kv.create_revision)
                for e in events
            ]
            self._auditor.feed(revision, changes)
            self._reached = revision
        if not batch.events:
            self._reached = max(self._reached, batch.revision)
        return True

    def _begin(self) -> None:
        """Go on from a list, since the history up to here is gone."""
        root = self._keys.root
        found = self._etcd.range(root, prefix_end(root))
        self._gaps += self._reached > 0
        self._auditor.begin_at(
            found.revision, [Change(item.key, item.value, item.create_revision) for item in found.items]
        )
        self._reached = found.revision
