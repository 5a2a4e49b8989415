"""A webhook's receiver, the real sender in each replica, and what must hold between them.

The sender's own thread and calls are tasks and messages here. What it is told by an answer, what the
receiver has really taken and what the cursor in etcd says are three different things, and kept apart.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtrain.coordinator.webhooks import sender
from dtrain.coordinator.webhooks.sender import Answer, Sender
from dtrain.coordinator.webhooks.settings import Webhook
from dtrain.protocol import codec
from dtrain.protocol.cluster import WebhookCursor
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Term
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Event
from tests.sim.coordinator import QuietLog, SimFlag

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.coordinator import Coordinator

HOOK = Webhook("ops", "http://receiver.invalid/hook", reasons=frozenset(EventReason))
"""Wants everything: the more is told, the more can go wrong."""

CALL_DELAY_S = 0.02
TOLD_S_MAX = sender.RETRY_S_MAX + sender.CALL_S + sender.CURSOR_EVERY_S + 20.0
"""After receiver and cluster are well again: the longest rest, one call that hangs, the cursor."""


@dataclass
class Told:
    """One event that is wanted, at the revision that it has now."""

    revision: int
    job: str
    seq: int
    taken: int = 0
    refused: int = 0
    """How often the receiver took it, and said that it never will."""


class Receiver:
    """Somebody's server. Its moods are set by faults, and good in the calm."""

    def __init__(self) -> None:
        self.away = 0.0
        """Share of the calls that reach nobody."""
        self.failing = 0.0
        """Share of the calls that are answered with 503: not taken."""
        self.refusing = 0.0
        """Share of the calls that are answered with 400: not taken, and never will be."""
        self.slow_s = 0.0
        """An answer takes up to so long; what is taken by then is taken all the same."""
        self.deaf = 0.0
        """Share of the answers that are lost."""


class Webhooks:
    """The receiver of a cluster, the senders of its replicas, and the claims."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self.receiver = Receiver()
        self._cursor: int | None = None
        self._wanted: dict[str, Told] = {}
        """By key. What is pushed out of its ring is gone from here too."""
        self._newest: dict[str, int] = {}
        """Of each job, the newest event taken."""
        self._answered: set[tuple[int, str, int]] = set()
        """Term, event and its revision: its sender knows that it was taken."""
        self.calls = self.repeats = 0
        told = cluster.etcd.on_revision

        def on_revision(revision: int, events: Sequence[Event]) -> None:
            told(revision, events)
            for event in events:
                self._see(event)

        cluster.etcd.on_revision = on_revision

    def bad(self, what: str) -> None:
        # Two histories of etcd: numbers are given twice, and nobody can say what was told.
        if not self._cluster.checks.went_back:
            self._cluster.checks.bad(f"webhook: {what}")

    def sender(self, coordinator: "Coordinator") -> Sender:
        """The real sender of one life of a replica; it runs as a task."""
        return _Sender(self, coordinator)

    # What etcd says.

    def _see(self, event: Event) -> None:
        place = self._cluster.keys.parse(event.kv.key)
        if place is not None and place.kind == "event":
            if event.kind == "delete":
                self._wanted.pop(event.kv.key, None)
            else:
                self._wanted[event.kv.key] = Told(event.kv.mod_revision, place.job, int(place.seq or 0))
        elif event.kv.key == self._cluster.keys.webhook(HOOK.name) and event.kind != "delete":
            self._moves(codec.decode(WebhookCursor, event.kv.value).revision)

    def _moves(self, revision: int) -> None:
        before, self._cursor = self._cursor, revision
        if before is None:
            # Named for the first time: what happened before is no news.
            for key in [key for key, told in self._wanted.items() if told.revision <= revision]:
                del self._wanted[key]
            return
        if revision < before:
            self.bad(f"the cursor went from {before} back to {revision}")
        for told in self._wanted.values():
            if told.revision <= revision and not _is_done(told):
                self.bad(f"the cursor passes event {told.seq} of {told.job}, which nobody has taken")

    # Calls.

    def begins(self, term: Term | None, key: str) -> None:
        """A sender is about to tell of an event."""
        self.calls += 1
        told = self._wanted.get(key)
        leader = self._cluster.etcd.memory._live.get(self._cluster.keys.leader)
        if told is None or leader is None or leader.create_revision != term:
            return  # a deposed leader may send once more
        if self._cursor is not None and told.revision <= self._cursor:
            self.bad(f"event {told.seq} of {told.job} is told again, and the cursor is beyond it")
        if (term, key, told.revision) in self._answered:
            self.bad(f"event {told.seq} of {told.job} is told twice by one leader, whom it was answered")

    def arrives(self, key: str) -> Answer | None:
        """A call reaches the receiver; return what it answers, None: nothing."""
        receiver, chance, told = self.receiver, self._cluster.scheduler.chance, self._wanted.get(key)
        if chance(receiver.away):
            return None
        if chance(receiver.failing):
            return Answer(503, "it answers with status 503")
        if chance(receiver.refusing):
            if told is not None:
                told.refused += 1
            return Answer(400, "it answers with status 400")
        if told is not None:
            if not told.taken:
                self._first(told)
            self.repeats += bool(told.taken)
            told.taken += 1
        return Answer(200)

    def _first(self, told: Told) -> None:
        newest = self._newest.get(told.job, 0)
        if told.seq < newest:
            self.bad(f"event {told.seq} of {told.job} comes for the first time after event {newest}")
        self._newest[told.job] = max(newest, told.seq)

    def answered(self, term: Term | None, key: str) -> None:
        """A sender has heard that an event was taken."""
        told = self._wanted.get(key)
        if term is not None and told is not None:
            self._answered.add((term, key, told.revision))

    # The end.

    def behind(self) -> str:
        """What is not told although it should be by the end of a calm; "": nothing."""
        if self._cursor is None:
            return "the webhook has no cursor"
        for told in self._wanted.values():
            if not _is_done(told):
                return f"event {told.seq} of {told.job} was never told"
            if told.revision > self._cursor:
                return f"the cursor stands at {self._cursor}, event {told.seq} of {told.job} was told"
        return ""


def _is_done(told: Told) -> bool:
    return told.taken > 0 or told.refused >= sender.REFUSED_TIMES_MAX


class _Sender(Sender):
    """One life's sender: the real one, whose lock, waits and calls are the simulation's."""

    def __init__(self, hooks: Webhooks, coordinator: "Coordinator") -> None:
        super().__init__(
            HOOK,
            coordinator.cluster.name,
            coordinator.access,
            _Mirror(coordinator),  # type: ignore[arg-type]
            coordinator.clock,
            term=self._acting_term,
            log=QuietLog(coordinator.scheduler.log, coordinator.replica.name).info,
        )
        self._hooks, self._coordinator = hooks, coordinator
        self._lock = _Condition(SimFlag(coordinator.process))  # type: ignore[assignment]
        self._rng = coordinator.scheduler.rng

    def _acting_term(self) -> Term | None:
        leadership = self._coordinator.leadership
        return leadership.term if leadership.may_act() else None

    def _call(self, identity: str, data: bytes, _tries: int) -> Answer:
        hooks, process, scheduler = self._hooks, self._coordinator.process, self._coordinator.scheduler
        found = json.loads(data)
        assert found["id"] == identity
        key = self._keys.event(found["job"], found["event"]["seq"])
        term = self._led
        hooks.begins(term, key)
        task = scheduler.current()
        token = task.waiting + 1

        def back(answer: Answer) -> None:
            process.post(lambda: task.answer(token, answer))

        def arrive() -> None:
            # On its way, however its sender fares.
            answer = hooks.arrives(key)
            if answer is not None and not scheduler.chance(hooks.receiver.deaf):
                slow_s = scheduler.rng.uniform(0.0, hooks.receiver.slow_s)
                scheduler.after(scheduler.delay(CALL_DELAY_S) + slow_s, lambda: back(answer))

        timeout = process.later(
            sender.CALL_S, lambda: task.answer(token, Answer(0, "it does not answer: timed out"))
        )
        scheduler.after(scheduler.delay(CALL_DELAY_S), arrive)
        answer: Answer = task.wait()
        timeout.cancel()
        if answer.ok:
            hooks.answered(term, key)
        return answer


class _Mirror:
    """The replica's mirror, waited for in virtual time."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._mirror: Mirror = coordinator.mirror
        self._sleep: Callable[[float], Any] = SimFlag(coordinator.process).wait

    @property
    def revision(self) -> int:
        return self._mirror.revision

    def prefix(self, prefix: str) -> Any:
        return self._mirror.prefix(prefix)

    def wait_for(self, revision: int, timeout_s: float) -> bool:
        if self._mirror.revision < revision:
            self._sleep(timeout_s)
        return self._mirror.revision >= revision


class _Condition:
    """A ``threading.Condition`` where only one task runs at a time."""

    def __init__(self, flag: SimFlag) -> None:
        self._flag = flag

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        self._flag.clear()
        self._flag.wait(timeout_s)

    def notify_all(self) -> None:
        self._flag.set()
