"""A copy of one etcd prefix in memory, kept by a list and a watch.

``MirrorState`` is the copy and pure. ``Mirror`` is the thread that keeps it:
list at revision R in pages, watch from there, resume on another member when a
stream ends, list again when the history needed is compacted.

A mirror is never wrong about the past and may be late about the present:
``age_s`` bounds how late. Decisions made from a stale mirror fail on their
guards; they cost a retry, not safety.
"""

import bisect
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.protocol.ids import RESTORE_BUMP_LEAST
from dtrain.runtime import log
from dtrain.runtime.clock import Clock, SystemClock
from dtrain.storage.etcd.endpoints import backoff_s
from dtrain.storage.etcd.port import Etcd, KeyValue, RangeResult, Status, WatchBatch, WatchStream, prefix_end

PAGE_KEYS = 500
PROGRESS_INTERVAL_S = 5.0
"""What dtrain's own etcd servers are told; elsewhere it may be 10 minutes."""

_POLL_S = 0.5
_REFUSAL_EVERY_S = 60.0
_QUIET_OPENS_MAX = 3
"""So many streams in a row that ended before their first message: the next message may be one that
cannot be read, such as a backlog beyond the longest line, and a list in pages gets past it."""


class Relist(StrEnum):
    """Why a mirror reads everything."""

    START = "start"
    COMPACTED = "compacted"
    """The history that it needed is gone: it was away for long."""
    SILENT = "silent"
    """Streams opened and said nothing."""
    WENT_BACK = "went-back"
    """etcd was restored or replaced."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key's step from one value to the next; None: absent.

    ``revision``: of the change itself; 0: it was found by a list, and there may have been others before it.
    """

    key: str
    before: KeyValue | None
    after: KeyValue | None
    revision: int = 0


class MirrorState:
    """The copy: what the prefix held at ``revision``. Not thread-safe."""

    def __init__(self) -> None:
        self.revision = 0
        self._items: dict[str, KeyValue] = {}
        self._sorted: list[str] = []

    def relist(self, items: Iterable[KeyValue], revision: int) -> tuple[Change, ...]:
        """Become what a list at ``revision`` says; return the differences.

        Deletions that no watch told of are among them.
        """
        fresh = {kv.key: kv for kv in items}
        changes = [Change(key, before, None) for key, before in self._items.items() if key not in fresh]
        for key, after in fresh.items():
            before = self._items.get(key)
            if before is None or before.mod_revision != after.mod_revision or before.value != after.value:
                changes.append(Change(key, before, after))
        self._items = fresh
        self._sorted = sorted(fresh)
        self.revision = revision
        return tuple(sorted(changes, key=lambda change: change.after.mod_revision if change.after else 0))

    def apply(self, batch: WatchBatch) -> tuple[Change, ...]:
        """Apply a batch; what is at or below ``revision`` was applied before and is skipped."""
        changes: list[Change] = []
        for event in batch.events:
            kv = event.kv
            if kv.mod_revision <= self.revision:
                continue
            before = self._items.get(kv.key)
            if event.kind == "delete":
                if before is not None:
                    del self._items[kv.key]
                    del self._sorted[bisect.bisect_left(self._sorted, kv.key)]
                    changes.append(Change(kv.key, before, None, kv.mod_revision))
                continue
            if before is None:
                bisect.insort(self._sorted, kv.key)
            self._items[kv.key] = kv
            changes.append(Change(kv.key, before, kv, kv.mod_revision))
        self.revision = max(self.revision, batch.revision)
        return tuple(changes)

    def get(self, key: str) -> KeyValue | None:
        """Return the key's value, or None."""
        return self._items.get(key)

    def prefix(self, prefix: str) -> list[KeyValue]:
        """Return what stands under ``prefix`` in key order."""
        names = self._sorted
        first = bisect.bisect_left(names, prefix)
        last = bisect.bisect_left(names, prefix_end(prefix), first) if prefix else len(names)
        return [self._items[name] for name in names[first:last]]

    def children(self, prefix: str) -> list[str]:
        """Return what comes between ``prefix`` and the next slash in its keys, each once, in key order."""
        names = self._sorted
        found = []
        at = bisect.bisect_left(names, prefix)
        while at < len(names) and names[at].startswith(prefix):
            child = names[at][len(prefix) :].partition("/")[0]
            found.append(child)
            # To the first key behind all of this child's: they may be many.
            at = bisect.bisect_left(names, prefix_end(f"{prefix}{child}/"), at + 1)
        return found

    def __len__(self) -> int:
        return len(self._items)


class Mirror:
    """The thread that keeps a ``MirrorState`` of ``prefix``. All else is thread-safe.

    Callbacks run on the mirror's thread and must only enqueue. ``on_changes``
    gets each batch once, in order, with the revision it leads to;
    ``on_relist`` follows it after a full list. ``on_alarm`` gets
    ``ETCD_WENT_BACK`` once: this etcd is another one, or an older one, than
    before. ``on_failure`` gets a bug's exception, with which the thread ends.
    ``revision_seen``: etcd is known to have been this far, from before this mirror.
    """

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        *,
        on_changes: Callable[[tuple[Change, ...], int], None] = lambda _changes, _revision: None,
        on_relist: Callable[[int], None] = lambda _revision: None,
        on_alarm: Callable[[DtrainError], None] = lambda _error: None,
        on_failure: Callable[[Exception], None] = lambda _error: None,
        revision_seen: int = 0,
        progress_interval_s: float = PROGRESS_INTERVAL_S,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._on_changes = on_changes
        self._on_relist = on_relist
        self._on_alarm = on_alarm
        self._on_failure = on_failure
        self._revision_seen = revision_seen
        self._interval_s = progress_interval_s
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter only
        self._log = log.get("mirror")
        self._state = MirrorState()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._stream: WatchStream | None = None
        self._identity: Status | None = None
        self._alarm: DtrainError | None = None
        self._failure: Exception | None = None
        self._fresh_at: float | None = None
        self._listed = False
        self._relists: dict[Relist, int] = dict.fromkeys(Relist, 0)
        self._relist_why = Relist.START
        self._quiet_opens = 0
        self._raft_term = 0
        self._present_seen = 0
        self._failures = 0
        self._refusal_at = float("-inf")

    def start(self) -> None:
        """Begin to list and watch; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it, a few seconds at most."""
        self._stop.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(10.0)

    # Reading.

    @property
    def revision(self) -> int:
        """The revision of the copy; 0 before the first list."""
        with self._changed:
            return self._state.revision

    @property
    def alarm(self) -> DtrainError | None:
        """``ETCD_WENT_BACK`` once it was seen; stays until the process ends."""
        return self._alarm

    def get(self, key: str) -> KeyValue | None:
        """Return a key's value, or None."""
        with self._changed:
            return self._state.get(key)

    def snapshot(self, prefix: str) -> tuple[int, list[KeyValue]]:
        """Return the revision of the copy and what stands under ``prefix`` at exactly that revision."""
        with self._changed:
            return self._state.revision, self._state.prefix(prefix)

    def prefix(self, prefix: str) -> list[KeyValue]:
        """Return what stands under ``prefix``, in key order, all of one revision."""
        with self._changed:
            return self._state.prefix(prefix)

    def children(self, prefix: str) -> list[str]:
        """Return the names of the folders right under ``prefix``, which ends with a slash."""
        with self._changed:
            return self._state.children(prefix)

    def wait_for(self, revision: int, timeout_s: float) -> bool:
        """Wait until the copy has reached ``revision``; False: not in time, or closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._state.revision >= revision or self._stop.is_set() or self._failure is not None,
                timeout_s,
            )
            return self._state.revision >= revision

    def age_s(self) -> float:
        """Return how long ago the copy was last known to be complete; inf before the first list."""
        fresh_at = self._fresh_at
        return float("inf") if fresh_at is None else max(0.0, self._clock.monotonic() - fresh_at)

    def relists(self) -> dict[Relist, int]:
        """Return how often everything was read, the first time included, by why."""
        return dict(self._relists)

    # The thread.

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._check_identity()
                # A watch from a revision that a restored etcd has yet to reach would just be silent.
                if not self._listed or self._present() < self.revision:
                    self._list()
                self._follow()
            except Refused as error:
                self._refused(error)
            except (Unavailable, OutcomeUnknown) as error:
                if self._stop.is_set():
                    return
                if self._quiet_opens >= _QUIET_OPENS_MAX:
                    self._list_again(Relist.SILENT)
                self._log.warning(
                    "mirror interrupted", prefix=self._prefix, error=str(error), failures=self._failures
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end this thread unnoticed
                self._log.error("mirror failed", exc_info=True)
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                self._on_failure(error)
                return
            if self._stop.is_set():
                return
            self._stop.wait(backoff_s(self._failures, self._rng))
            self._failures += 1

    def _refused(self, error: Refused) -> None:
        if self._stop.is_set():
            return
        if error.code is ErrorCode.ETCD_COMPACTED:
            self._log.warning("mirror lists again", prefix=self._prefix, why=str(error))
            self._list_again(Relist.COMPACTED)
        elif error.code is ErrorCode.ETCD_WENT_BACK:
            self._raise_alarm(error)
        elif self._clock.monotonic() >= self._refusal_at:
            # Until a person has put the user or its role right, there is nothing new to say.
            self._refusal_at = self._clock.monotonic() + _REFUSAL_EVERY_S
            self._log.error("etcd refuses the mirror", error=str(error), fix=error.fix)

    def _list_again(self, why: Relist) -> None:
        self._listed, self._relist_why = False, why

    def _raise_alarm(self, error: DtrainError) -> None:
        self._list_again(Relist.WENT_BACK)
        if self._alarm is None:
            self._alarm = error
            self._log.error("etcd went back", error=str(error), fix=error.fix)
            self._on_alarm(error)

    def _check_identity(self) -> None:
        """Refuse another cluster. All else a status tells is one member's word, and that member may lag."""
        status = self._etcd.status()
        known = self._identity
        if known is not None and status.cluster_id != known.cluster_id:
            raise _went_back(f"the etcd cluster is {status.cluster_id:x}, it was {known.cluster_id:x}")
        self._identity = status

    def _check_term(self, answer: RangeResult) -> None:
        """Refuse a quorum's answer of an older raft term than an earlier one's: etcd was restored.

        A member that lags cannot give such an answer. A lower term is as good as
        the old one if the revisions were raised far above all that were seen.
        """
        seen = max(self._present_seen, self.revision)
        if 0 < seen <= answer.revision - RESTORE_BUMP_LEAST:
            self._log.warning("etcd was restored, its revisions raised", revision=answer.revision)
            self._raft_term = answer.raft_term
        elif 0 < answer.raft_term < self._raft_term:
            raise _went_back(f"the raft term is {answer.raft_term}, it was {self._raft_term}")
        self._raft_term = max(self._raft_term, answer.raft_term)
        self._present_seen = answer.revision

    def _list(self) -> None:
        asked_at = self._clock.monotonic()
        end = prefix_end(self._prefix)
        page = self._etcd.range(self._prefix, end, limit=PAGE_KEYS)
        self._check_term(page)
        revision = page.revision
        items = list(page.items)
        while page.more:
            after = items[-1].key + "\0"
            page = self._etcd.range(after, end, revision=revision, limit=PAGE_KEYS)
            items += page.items
        known = max(self.revision, self._revision_seen)
        if revision < known:
            # The truth is what etcd holds now; that it forgot something is for a person to judge.
            self._raise_alarm(_went_back(f"etcd is at revision {revision}, it was at {known}"))
        with self._changed:
            changes = self._state.relist(items, revision)
            self._changed.notify_all()
        self._relists[self._relist_why] += 1
        self._listed = True
        self._quiet_opens = 0
        self._fresh_at = asked_at
        self._on_changes(changes, revision)
        self._on_relist(revision)

    def _follow(self) -> None:
        """Apply the watch until it ends, always by an exception unless closed."""
        # From the applied revision, not behind it: a deletion at exactly the compacted revision
        # is lost to a watch that starts there, so the overlap turns that case into a new list.
        stream = self._etcd.watch(self._prefix, prefix_end(self._prefix), max(1, self.revision))
        self._stream = stream
        try:
            self._quiet_opens += 1
            heard_at = self._clock.monotonic()
            probed_at = heard_at
            while not self._stop.is_set():
                batch = stream.next(min(_POLL_S, self._interval_s / 4))
                now = self._clock.monotonic()
                if batch is not None:
                    self._take(batch, now)
                    heard_at = probed_at = now
                elif now - probed_at > 2 * self._interval_s:
                    probed_at = now
                    if self._is_complete():
                        heard_at = now
                elif now - heard_at > 3 * self._interval_s:
                    if self._quiet_opens > 1:
                        # Resuming did not help: changes outside the prefix hide whether any is missing.
                        self._list_again(Relist.SILENT)
                    raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "the watch has fallen silent")
        finally:
            self._stream = None
            stream.close()

    def _take(self, batch: WatchBatch, now: float) -> None:
        self._quiet_opens = 0
        self._failures = 0
        if not batch.events:
            if batch.revision < self.revision and self._progress_is_exact():
                raise Refused(
                    ErrorCode.ETCD_COMPACTED, f"progress at {batch.revision} is behind {self.revision}"
                )
            if not self._progress_is_exact():
                self._fresh_at = now
                return
        with self._changed:
            changes = self._state.apply(batch)
            self._changed.notify_all()
        self._fresh_at = now
        if changes:
            self._on_changes(changes, self._state.revision)

    def _is_complete(self) -> bool:
        """Ask a quorum for the present revision: servers of others tell progress only each 10 minutes."""
        asked_at = self._clock.monotonic()
        present = self._present()
        if present < self.revision:
            raise Refused(ErrorCode.ETCD_COMPACTED, f"etcd is at {present}, the mirror at {self.revision}")
        if present > self.revision:
            return False
        self._fresh_at = asked_at
        return True

    def _present(self) -> int:
        answer = self._etcd.range(self._prefix, limit=1)
        self._check_term(answer)
        return answer.revision

    def _progress_is_exact(self) -> bool:
        """Before these versions a progress note could overtake the events it covers."""
        version = self._identity.version if self._identity else ""
        numbers = tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())
        return numbers >= (3, 5, 9) or (3, 4, 25) <= numbers < (3, 5)


def _went_back(what: str) -> Refused:
    return Refused(
        ErrorCode.ETCD_WENT_BACK,
        what,
        fix="etcd was restored or replaced: check its data, then restart the coordinators and agents",
    )
