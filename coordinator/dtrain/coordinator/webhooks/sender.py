"""Calls one webhook, event after event, in the order of etcd's revisions: a thread of its own.

What is promised: while somebody leads, each event that is wanted arrives at least once, unless its receiver
refuses it, or more than a job's ring of events happened since. What is not: that it arrives only once. A
leader that dies between a call and the cursor's next write leaves the event to its successor, under its id.

Nothing waits for a receiver: neither decisions nor other webhooks. The cursor is a record, written fenced by
the term: a new leader neither forgets nor begins anew.
"""

import contextlib
import http.client
import random
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dtrain.coordinator.webhooks import message
from dtrain.coordinator.webhooks.settings import Webhook
from dtrain.protocol import codec
from dtrain.protocol.cluster import WebhookCursor
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventRecord, EventType
from dtrain.protocol.ids import ClusterName, JobName, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import Clock
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.port import Compare, Etcd, Get, KeyValue, Put, Target, Txn

CALL_S = 10.0
RETRY_S_FIRST, RETRY_S_MAX = 1.0, 60.0
REFUSED_TIMES_MAX = 5
"""An event that a receiver refuses by a status that means 'not this one' is passed over after that."""

CURSOR_EVERY_S = 2.0
CURSOR_IDLE_S = 300.0
"""While nothing is sent: what nobody wanted is then not looked at again after a change of leader."""
LOOK_S = 0.5
WAITING_MAX = DUE_MAX = 10_000
"""Changes of events that are not looked at yet; beyond that they are read from the mirror anew."""

TROUBLE_AFTER_S = 60.0
ANSWER_BYTES_MAX = 4096
_LATER = frozenset({401, 403, 404, 408, 425, 429})
"""Statuses below 500 that somebody will mend, or that ask for patience: the event is kept."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` 0: none came. ``why``: in words that hold neither URL nor secret."""

    status: int
    why: str = ""
    after_s: float = 0.0

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class _Due:
    revision: int
    job: JobName
    event: EventRecord


class Sender:
    """One webhook's thread. ``term``: of this replica while it may act as leader, else None."""

    def __init__(
        self,
        hook: Webhook,
        cluster: ClusterName,
        etcd: Etcd,
        mirror: Mirror,
        clock: Clock,
        *,
        term: Callable[[], Term | None],
        log: Callable[..., None],
    ) -> None:
        self._hook = hook
        self._cluster = cluster
        self._keys = Keys(cluster)
        self._etcd = etcd
        self._mirror = mirror
        self._clock = clock
        self._term = term
        self._log = log
        self._rng = random.Random()  # noqa: S311 - jitter only
        self._lock = threading.Condition()
        self._fresh: deque[KeyValue] = deque(maxlen=WAITING_MAX)
        self._missed = False
        self._stopping = False
        self._led: Term | None = None
        self._cursor_mod = 0
        self._stored = 0
        self._done = 0
        """Everything up to this revision is delivered, or not wanted."""
        self._done_in: Term | None = None
        self._sent = False
        """Something was delivered that the cursor does not tell yet."""
        self._looked = 0
        """The newest revision of an event that was looked at."""
        self._said = ""
        self._written_at = 0.0
        self._due: deque[_Due] = deque()
        self._tries = self._refusals = 0
        """Of the event at hand."""
        self._retry_at = 0.0
        self._failing_since: float | None = None
        self._why = ""

    def note(self, changes: Iterable[Change]) -> None:
        """The mirror has moved: on its thread, so nothing is done here."""
        prefix = self._keys.jobs
        for change in changes:
            if change.after is not None and "/events/" in change.key and change.key.startswith(prefix):
                with self._lock:
                    self._missed = self._missed or len(self._fresh) == WAITING_MAX
                    self._fresh.append(change.after)
                    self._lock.notify_all()

    def stop(self) -> None:
        """End soon; a call that is under way is not waited for."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()

    def problem(self) -> str:
        """What is wrong with the receiver, for people; "": nothing."""
        since = self._failing_since
        if since is None or self._clock.monotonic() - since < TROUBLE_AFTER_S:
            return ""
        away_s = self._clock.monotonic() - since
        return f"webhook {self._hook.name} has taken nothing for {away_s:.0f} s: {self._why}"

    def run(self) -> None:
        """Send until stopped."""
        while not self._stopping:
            wait_s = LOOK_S
            try:
                wait_s = self.work()
                self._said = ""
            except DtrainError as error:
                # Told once. What was delivered is remembered: it is not sent again because of it.
                if error.message != self._said:
                    self._log("webhook waits for etcd", webhook=self._hook.name, problem=error.message)
                self._said = error.message
            with self._lock:
                if not self._stopping and not self._fresh:
                    self._lock.wait(wait_s)

    def work(self) -> float:
        """Do what is due now; return after how many seconds there may be more."""
        term = self._term()
        if term is None:
            self._led = None
            with self._lock:
                self._fresh.clear()
            return LOOK_S
        if self._led != term and not self._take_over(term):
            return LOOK_S
        self._collect()
        while self._due and not self._stopping and self._term() == term:
            # News does not shorten the pause of a receiver that has failed.
            if (rest_s := self._retry_at - self._clock.monotonic()) > 0:
                self._write_cursor(term)
                return min(rest_s, LOOK_S)
            due = self._due[0]
            if wait_s := self._deliver(due):
                self._retry_at = self._clock.monotonic() + wait_s
                continue
            self._due.popleft()
            self._sent = True
            # Of several events of one revision the last one moves the cursor.
            if not self._due or self._due[0].revision > due.revision:
                self._done = due.revision
            if self._clock.monotonic() - self._written_at >= CURSOR_EVERY_S:
                self._write_cursor(term)
            self._collect()
        if not self._due:
            self._done = max(self._done, self._looked)
        self._write_cursor(term)
        return LOOK_S

    # Whose turn it is ----------------------------------------------------------------

    def _take_over(self, term: Term) -> bool:
        if not self._mirror.wait_for(term, LOOK_S):
            return False
        found = self._etcd.range(self._keys.webhook(self._hook.name)).items
        self._cursor_mod = found[0].mod_revision if found else 0
        cursor = codec.decode(WebhookCursor, found[0].value) if found else None
        self._stored = 0 if cursor is None else cursor.revision
        # Of this very term it may know more than it could write.
        self._done = max(self._stored, self._done if self._done_in == term else 0)
        self._done_in = term
        self._looked = self._done
        with self._lock:
            self._fresh.clear()
            self._missed = True
        self._due.clear()
        self._tries, self._refusals, self._retry_at = 0, 0, 0.0
        self._led = term
        if cursor is None:
            # Named for the first time: what happened before is no news.
            self._done = self._looked = max(self._done, self._mirror.revision)
            self._sent = True
            self._write_cursor(term)
        return self._led == term

    def _collect(self) -> None:
        if len(self._due) >= DUE_MAX:
            with self._lock:
                # Looked for again, in what is left of the rings, once these are delivered.
                self._fresh.clear()
                self._missed = True
            return
        with self._lock:
            fresh, missed = list(self._fresh), self._missed
            self._fresh.clear()
            self._missed = False
        if missed:
            fresh = [kv for kv in self._mirror.prefix(self._keys.jobs) if "/events/" in kv.key] + fresh
        known = max(self._done, self._due[-1].revision if self._due else 0)
        if missed:
            self._due.clear()
            known = self._done
        once = {kv.key: kv for kv in fresh if kv.mod_revision > known}
        for kv in sorted(once.values(), key=lambda kv: (kv.mod_revision, kv.key)):
            self._looked = max(self._looked, kv.mod_revision)
            place = self._keys.parse(kv.key)
            if place is None or place.kind != "event":
                continue
            try:
                event = codec.decode(EventRecord, kv.value)
            except DtrainError:
                continue  # of a newer release
            if self._is_wanted(place.job, event):
                self._due.append(_Due(kv.mod_revision, place.job, event))

    def _is_wanted(self, job: JobName, event: EventRecord) -> bool:
        hook = self._hook
        if hook.jobs and job not in hook.jobs:
            return False
        return event.reason in hook.reasons if hook.reasons else event.type is EventType.WARNING

    def _write_cursor(self, term: Term) -> None:
        if self._done <= self._stored and self._cursor_mod:
            return
        if not self._sent and self._clock.monotonic() - self._written_at < CURSOR_IDLE_S:
            return
        key = self._keys.webhook(self._hook.name)
        fence = Compare(self._keys.leader, Target.CREATE, term)
        mine = Compare(key, Target.MOD, self._cursor_mod)
        record = codec.encode(WebhookCursor(term, self._hook.name, self._done))
        result = self._etcd.txn(Txn((fence, mine), (Put(key, record),), (Get(key),)))
        if not result.succeeded:
            self._led = None
            return
        self._cursor_mod, self._stored, self._sent = result.revision, self._done, False
        self._written_at = self._clock.monotonic()

    # One event -----------------------------------------------------------------------

    def _deliver(self, due: _Due) -> float:
        """Call the receiver once; return how long to rest before the same again, 0 if that is not needed."""
        identity = message.event_id(self._cluster, due.job, due.event)
        tries = self._tries = self._tries + 1
        answer = self._call(identity, message.body(self._cluster, due.job, due.event), tries)
        if answer.ok:
            if self._failing_since is not None:
                self._log("webhook answers again", webhook=self._hook.name)
            self._failing_since, self._why = None, ""
            self._tries = self._refusals = 0
            return 0.0
        if self._why != answer.why:
            self._log("webhook failed", webhook=self._hook.name, id=identity, problem=answer.why, tries=tries)
        self._why = answer.why
        if self._failing_since is None:
            self._failing_since = self._clock.monotonic()
        # Counted apart: a receiver that was away for long and stumbles once as it comes back refuses nothing.
        self._refusals += 300 <= answer.status < 500 and answer.status not in _LATER
        if self._refusals >= REFUSED_TIMES_MAX:
            self._log("webhook refuses an event", webhook=self._hook.name, id=identity)
            self._tries = self._refusals = 0
            return 0.0
        pause_s = min(RETRY_S_MAX, RETRY_S_FIRST * 2.0 ** min(tries - 1, 10))
        return max(pause_s * (0.5 + 0.5 * self._rng.random()), min(answer.after_s, 300.0))

    def _call(self, identity: str, data: bytes, tries: int) -> Answer:
        parts = urlsplit(self._hook.url)
        stamp = str(int(self._clock.wall()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "dtrain",
            "X-Dtrain-Event": identity,
            "X-Dtrain-Timestamp": stamp,
            "X-Dtrain-Try": str(tries),
        }
        if self._hook.secret:
            headers["X-Dtrain-Signature"] = message.signature(self._hook.secret, stamp, data)
        assert parts.hostname is not None
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=CALL_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=CALL_S)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            # A redirect is not followed: it would take the event, and its signature, to somebody else.
            connection.request("POST", target, data, headers)
            response = connection.getresponse()
            response.read(ANSWER_BYTES_MAX)
            after = response.headers.get("Retry-After", "")
            after_s = float(after) if after.isdecimal() and len(after) < 6 else 0.0
            return Answer(response.status, f"it answers with status {response.status}", after_s)
        except (OSError, http.client.HTTPException) as error:
            # The kind of error only: a URL in its text may be a password.
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            return Answer(0, f"it does not answer: {why}")
        finally:
            with contextlib.suppress(OSError):
                connection.close()


class Senders:
    """All webhooks of a replica."""

    def __init__(self, senders: Iterable[Sender]) -> None:
        self._senders = tuple(senders)

    def start(self, guarded: Callable[[Callable[[], None]], Any]) -> None:
        """Start a thread for each; one that dies takes the process with it, by ``guarded``."""
        for sender in self._senders:
            threading.Thread(target=guarded, args=(sender.run,), name="webhook", daemon=True).start()

    def note(self, changes: tuple[Change, ...]) -> None:
        """Tell all of them what has changed."""
        for sender in self._senders:
            sender.note(changes)

    def stop(self) -> None:
        """End all of them soon."""
        for sender in self._senders:
            sender.stop()

    def problems(self) -> list[str]:
        """Sentences on receivers that take nothing."""
        return [text for sender in self._senders if (text := sender.problem())]
