"""Notes when logs were written, and has them copied to the store: a thread beside the driver.

While an attempt runs, what its ranks wrote since the last look is copied every
``interval_s`` in one small bundle for the machine: a machine that is lost takes at
most so much with it. When the attempt has ended (and now and then before, so that bundles
stay few) each rank's log is copied whole, within its bound, and the small bundles go.

Nobody waits for any of it. One order is under way at a time; the transfer process carries
it out at low priority, and one that is lost with it, or refused by a store that is away, is
given again after a pause. What has been sent is in ``archive.json`` beside the logs, so that a
restarted agent goes on where its former self was.

Whatever else is to outlive the machine is appended to a file in ``kept/`` of the attempt's folder:
it is copied in the same way, as part ``kept/<name>``.
"""

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.agent import log_times
from dtrain.agent.core.archiving import Range, increment, whole
from dtrain.agent.logs import KEPT, STREAMS, AttemptLogs, RankLogs
from dtrain.agent.transferring import Archive, Archived, FilePart
from dtrain.protocol.archive import BUNDLE_BYTES_MAX, bundle_key, logs_prefix
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Rank, Uid
from dtrain.runtime.clock import Clock

LOOK_S = 0.25
"""How often the sizes of logs are looked at: how exact a line's time is."""

SETTLE_S = 1.0
"""From the end of an attempt's last rank to the last copy: stacks may still be written."""

SMALL_MAX = 40
"""Small bundles of one attempt before they are replaced by whole copies."""

INCREMENT_BYTES_MAX = 2 * 1024 * 1024
"""Of one log in a small bundle."""

ANSWER_S_MAX = 180.0
RETRY_S_FIRST, RETRY_S_MAX = 2.0, 60.0
RESUMED_DAYS_MAX = 7
"""Attempts that ended longer ago, and could never be copied, are given up."""

Ended = Callable[[str, str, Attempt, int], bool]


@dataclass(slots=True)
class _Book:
    """What is known of one attempt's copies; durable but for ``run``."""

    number: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    """Of all bundles that may be in the store."""
    whole_keys: list[str] = field(default_factory=list)
    """Those that replace others: of the newest finished run of whole copies."""
    done: bool = False


@dataclass(slots=True)
class _Run:
    """Whole copies under way, rank by rank."""

    last: bool
    next_local: int = 0
    keys: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """An attempt whose logs still grow, or are not all copied yet."""

    logs: AttemptLogs
    book: _Book
    times: dict[str, log_times.Times] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    ended_at: float | None = None
    copied_at: float = 0.0
    run: _Run | None = None


class Archiver:
    """``driver.LogPort``. ``send`` hands an order to the transfer process; ``ended``: a rank writes no more.

    ``bytes_max`` bounds what is kept of each log; 0: nothing is copied.
    """

    def __init__(
        self,
        logs: RankLogs,
        cluster: ClusterName,
        agent: AgentName,
        *,
        send: Callable[[Archive], None],
        ended: Ended,
        clock: Clock,
        interval_s: float,
        bytes_max: int,
        log: Callable[..., None],
    ) -> None:
        self._logs, self._cluster, self._agent = logs, cluster, agent
        self._send, self._ended, self._clock = send, ended, clock
        self._interval_s, self._bytes_max = interval_s, bytes_max
        self._log = log
        self._lock = threading.Lock()
        self._new: list[AttemptLogs] = []
        self._answers: list[Archived | None] = []
        self._wake = threading.Event()
        self._stopped = False
        self._hurries = False
        self._open: dict[Path, _Open] = {}
        self._waiting: tuple[Archive, _Open, float] | None = None
        self._asking: dict[str, int] = {}
        self._retry_at = 0.0
        self._retry_s = RETRY_S_FIRST
        self._told = ""

    # Other threads

    def prepare(
        self, job: JobName, uid: Uid, attempt: Attempt, first_rank: Rank, *, ranks: int, store: str
    ) -> None:
        """Make an attempt's folder and look after it from now on; raises OSError."""
        found = self._logs.prepare(job, uid, attempt, first_rank, ranks=ranks, store=store)
        with self._lock:
            self._new.append(found)
        self._wake.set()

    def take(self, report: Archived | None) -> None:
        """Hear what became of an order; None: whatever was under way is lost."""
        with self._lock:
            self._answers.append(report)
        self._wake.set()

    def hurry(self) -> None:
        """Copy what has ended without another pause: the agent is about to end."""
        self._hurries = True
        self._wake.set()

    @property
    def busy(self) -> bool:
        """Something is still to be copied, and the store takes it."""
        return bool((self._open or self._new) and not self._told)

    def folders(self) -> set[Path]:
        """Of the attempts whose ranks may still write, or whose logs are still to be copied.

        One that is just being made may be missing for a moment.
        """
        with self._lock:
            return {*dict(self._open), *(logs.folder for logs in self._new)}

    def close(self) -> None:
        """End ``run`` soon."""
        self._stopped = True
        self._wake.set()

    # Its own thread

    def run(self) -> None:
        """Work until ``close``."""
        self.resume()
        while not self._stopped:
            self.turn()
            # An idle agent has nothing to look at: it is woken by the next attempt.
            self._wake.wait(LOOK_S if self._open else None)
            self._wake.clear()

    def resume(self) -> None:
        """Go on with what a former life of the agent has left."""
        oldest = self._clock.wall() - RESUMED_DAYS_MAX * 86400
        for logs in self._logs.all():
            with contextlib.suppress(OSError):
                if logs.ranks and logs.folder.stat().st_mtime > oldest:
                    self._begin(logs)

    def turn(self) -> None:
        """Look once at every open attempt, and have one order under way if there is anything to copy."""
        with self._lock:
            new, self._new = self._new, []
            answers, self._answers = self._answers, []
        for logs in new:
            self._begin(logs)
        for answer in answers:
            self._answered(answer)
        now = self._clock.monotonic()
        for one in list(self._open.values()):
            self._look(one, now)
        if self._waiting is not None and now - self._waiting[2] > ANSWER_S_MAX:
            self._failed("the transfer process did not answer", now)
        if self._waiting is None and now >= self._retry_at:
            self._next(now)

    def _begin(self, logs: AttemptLogs) -> None:
        book = _read_book(logs.folder)
        if not book.done and logs.folder not in self._open:
            self._open[logs.folder] = _Open(logs, book, copied_at=self._clock.monotonic())

    def _look(self, one: _Open, now: float) -> None:
        at_ms = int(self._clock.wall() * 1000)
        for name, path in _files(one.logs):
            times = one.times.get(name)
            try:
                if times is None:
                    times = one.times[name] = log_times.Times(path)
                one.sizes[name] = times.note(at_ms)
            except OSError as error:
                self._tell("log times not noted", one, str(error))
        if one.ended_at is None:
            logs = one.logs
            over = (
                self._ended(logs.job, logs.uid, logs.attempt, logs.first_rank + local)
                for local in range(logs.ranks)
            )
            one.ended_at = now if all(over) else None
        elif not (one.logs.store and self._bytes_max) and self._has_settled(one, now):
            # Nothing to copy it to: only the times were noted.
            self._done(one)
        elif now - one.ended_at > RESUMED_DAYS_MAX * 86400 and not self._is_waiting_for(one):
            self._log("log copy given up", job=one.logs.job, attempt=one.logs.attempt, problem=self._told)
            self._open.pop(one.logs.folder, None)

    def _is_waiting_for(self, one: _Open) -> bool:
        return self._waiting is not None and self._waiting[1] is one

    def _next(self, now: float) -> None:
        for one in list(self._open.values()):
            if not (one.logs.store and self._bytes_max):
                continue
            if one.run is None:
                one.run = self._due(one, now)
            order = self._whole(one) if one.run is not None else self._increment(one, now)
            if order is not None:
                self._waiting = (order, one, now)
                self._send(order)
                return

    def _due(self, one: _Open, now: float) -> _Run | None:
        if self._has_settled(one, now):
            return _Run(last=True)
        small = len(one.book.keys) - len(one.book.whole_keys)
        return _Run(last=False) if small >= SMALL_MAX else None

    def _has_settled(self, one: _Open, now: float) -> bool:
        return one.ended_at is not None and (self._hurries or now - one.ended_at >= SETTLE_S)

    def _increment(self, one: _Open, now: float) -> Archive | None:
        if now - one.copied_at < self._interval_s:
            return None
        one.copied_at = now
        at_once = min(INCREMENT_BYTES_MAX, BUNDLE_BYTES_MAX // max(1, len(one.sizes)))
        parts: list[FilePart] = []
        self._asking = {}
        for name, path in _files(one.logs):
            found = increment(one.book.sent.get(name, 0), one.sizes.get(name, 0), self._bytes_max, at_once)
            parts += _parts(name, path, found)
            if found:
                self._asking[name] = found[-1].end
        if not parts:
            return None
        last = Rank(one.logs.first_rank + one.logs.ranks - 1)
        return self._order(one, one.logs.first_rank, last, parts, ())

    def _whole(self, one: _Open) -> Archive:
        """The next rank's whole log; with the last one goes what all of them replace."""
        run = one.run
        assert run is not None
        self._asking = {}
        for local in range(run.next_local, one.logs.ranks):
            run.next_local = local + 1
            parts: list[FilePart] = []
            rank = Rank(one.logs.first_rank + local)
            for name, path in _files(one.logs):
                if name.startswith(f"{rank}/") or (local == 0 and name.startswith(f"{KEPT}/")):
                    size = one.sizes.get(name, 0)
                    parts += _parts(name, path, whole(size, self._bytes_max))
                    self._asking[name] = size
            is_last = run.next_local == one.logs.ranks
            if parts or is_last:
                replaced = tuple(key for key in one.book.keys if key not in run.keys) if is_last else ()
                return self._order(one, rank, rank, parts, replaced)
        # Tried again after its last order failed.
        replaced = tuple(key for key in one.book.keys if key not in run.keys)
        return Archive(secrets.token_hex(8), one.logs.store, "", (), replaced)

    def _order(
        self, one: _Open, first: Rank, last: Rank, parts: list[FilePart], replaces: tuple[str, ...]
    ) -> Archive:
        logs, key = one.logs, ""
        if parts:
            one.book.number += 1
            prefix = logs_prefix(self._cluster, logs.job, logs.uid)
            nonce = secrets.token_hex(4)
            key = bundle_key(
                prefix, logs.attempt, self._agent, first=first, last=last, number=one.book.number, nonce=nonce
            )
            # Before it is written: whatever becomes of it, it is known to be replaced one day.
            one.book.keys.append(key)
            if one.run is not None:
                one.run.keys.append(key)
            self._save(one)
        return Archive(secrets.token_hex(8), logs.store, key, tuple(parts), replaces)

    # Answers

    def _answered(self, report: Archived | None) -> None:
        if self._waiting is None:
            return
        order, one, _ = self._waiting
        now = self._clock.monotonic()
        if report is None:
            self._failed("the transfer process ended", now)
            return
        if report.id != order.id:
            return
        if report.problem:
            self._failed(report.problem, now)
            return
        self._waiting = None
        self._retry_s, self._told = RETRY_S_FIRST, ""
        one.book.sent.update(self._asking)
        run = one.run
        if run is not None and run.next_local >= one.logs.ranks:
            one.book.keys = list(run.keys)
            one.book.whole_keys = list(run.keys)
            one.run = None
            if run.last:
                self._done(one)
                return
        self._save(one)

    def _failed(self, problem: str, now: float) -> None:
        assert self._waiting is not None
        _, one, _ = self._waiting
        self._waiting = None
        # From the beginning: what was written of this run is replaced by the next one.
        one.run = None
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        self._tell("log copy failed", one, problem)

    def _done(self, one: _Open) -> None:
        one.book.done = True
        self._save(one)
        self._open.pop(one.logs.folder, None)

    def _tell(self, event: str, one: _Open, problem: str) -> None:
        if problem != self._told:
            # A store that is away for an hour is one line.
            self._told = problem
            self._log(event, job=one.logs.job, attempt=one.logs.attempt, problem=problem)

    def _save(self, one: _Open) -> None:
        book = one.book
        about = {
            "number": book.number,
            "sent": book.sent,
            "keys": book.keys,
            "whole_keys": book.whole_keys,
            "done": book.done,
        }
        beside = one.logs.folder / "archive.json.new"
        try:
            beside.write_text(json.dumps(about))
            beside.replace(one.logs.folder / "archive.json")
        except OSError as error:
            # Forgotten by a restarted agent, it is copied once more.
            self._tell("archive book not written", one, str(error))


def is_copied(folder: Path) -> bool:
    """Whether the store has what is kept of an attempt that has ended."""
    book = _read_book(folder)
    return book.done and bool(book.whole_keys)


def _files(logs: AttemptLogs) -> Iterator[tuple[str, Path]]:
    for local in range(logs.ranks):
        for stream in STREAMS:
            yield f"{logs.first_rank + local}/{stream}", logs.file(local, stream)
    with contextlib.suppress(OSError):
        for path in sorted((logs.folder / KEPT).iterdir()):
            if path.suffix not in (".times", ".new"):
                yield f"{KEPT}/{path.name}", path


def _parts(name: str, path: Path, ranges: tuple[Range, ...]) -> list[FilePart]:
    times = str(log_times.of(path))
    return [FilePart(name, str(path), one.start, one.end - one.start, times) for one in ranges]


def _read_book(folder: Path) -> _Book:
    try:
        about: dict[str, Any] = json.loads((folder / "archive.json").read_text())
        return _Book(
            int(about["number"]),
            {str(name): int(size) for name, size in about["sent"].items()},
            [str(key) for key in about["keys"]],
            [str(key) for key in about["whole_keys"]],
            bool(about["done"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Book()
