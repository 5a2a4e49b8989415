"""What of a run is told, and how: one line per fact, without nonces, digests, ports and times.

Everything durable is read off etcd's own history, so that a line can neither come too early nor be
forgotten: phases with their reason, events, checkpoints opened and committed, what snapshots show.
"""

import re
from collections.abc import Callable
from typing import Any

from dtrain.coordinator.core.decisions import Directed
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, OpenRecord
from dtrain.protocol.cluster import Cordon, ReplicaRecord, WebhookCursor
from dtrain.protocol.events import EventReason, EventRecord, EventType
from dtrain.protocol.job import JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord, WorkerSnapshot
from dtrain.storage.etcd.port import Event

_VOLATILE = (
    (re.compile(r"\b(begin\.\d+)\.[0-9a-f]{16}"), r"\1"),
    (re.compile(r"[^\s(]*/(?:blobs|manifests)/[^\s,]+"), "<blob>"),
    (re.compile(r"\b(expected|found) [0-9a-f]{8,}"), r"\1 <digest>"),
)
_TERM = re.compile(r"\bterm (\d+)")
"""A term is a revision of etcd: told as the first, the second, ..."""


def plain(text: str) -> str:
    """Return the text without what differs from run to run or from backend to backend."""
    for pattern, instead in _VOLATILE:
        text = pattern.sub(instead, text)
    return text


class Transcript:
    """Lines since the last ``take``; equal facts of several agents in a row share a line."""

    def __init__(self, keys: Keys, now: Callable[[], float]) -> None:
        self._keys = keys
        self._now = now
        self.written_at: dict[str, float] = {}
        """When the newest status of each job was written."""
        self._lines: list[tuple[str, list[str], str]] = []
        self._statuses: dict[str, JobStatus] = {}
        self._snapshots: dict[tuple[str, str], WorkerSnapshot] = {}
        """By agent and job."""
        self.several = False
        """More than one job is told of: each line says of which."""
        self._terms: dict[int, int] = {}
        self.events: list[EventReason] = []
        """Of all events so far."""
        self._commands: set[tuple[str, str, int, bool]] = set()
        self._event_at: dict[int, int] = {}
        """The number of the newest event by its revision."""

    def take(self) -> list[str]:
        """Return what has happened, and begin anew."""
        lines, self._lines = self._lines, []
        return [f"{head}{' '.join(names)}: {text}" for head, names, text in lines]

    def line(self, who: str, text: str, head: str = "") -> None:
        """Add a fact about ``who``."""
        text = plain(text)
        if self._lines:
            last_head, names, last_text = self._lines[-1]
            if (last_head, last_text) == (head, text) and who not in names:
                names.append(who)
                return
        self._lines.append((head, [who], text))

    def phase(self, agent: str) -> str:
        """The phase of an agent's newest snapshot."""
        found = [snapshot.phase for (name, _), snapshot in self._snapshots.items() if name == agent]
        return found[-1] if found else ""

    def durable(self, seq: int) -> int:
        """How many parts of a checkpoint the snapshots show."""
        return sum(part.seq == seq for snapshot in self._snapshots.values() for part in snapshot.durable)

    # Commands and logs.

    def command(self, sender: str, directed: Directed, ok: bool, message: str, copy: int) -> None:
        """An agent has answered a command. Repeats that change nothing are told only of doubled ones."""
        head, message = directed.command.header, self._ordinal(message)
        place = (directed.agent, f"{head.job} {head.id}", head.term, ok)
        what = f"{type(directed.command).__name__} {head.id}"
        if self.several:
            what += f" for {head.job}"
        if copy and ok:
            self.line(directed.agent, f"{what} once more ({message or 'taken'})", f"{sender} -> ")
        elif place not in self._commands:
            self._commands.add(place)
            known = " (known)" if message == "known" else ""
            self.line(
                directed.agent, f"{what}{known}" if ok else f"{what} is refused: {message}", f"{sender} -> "
            )

    def on_the_way(self, sender: str, directed: Directed, fate: str) -> None:
        """A command does not arrive; told once, however often it is sent."""
        head = directed.command.header
        place = (directed.agent, f"{head.job} {head.id} {fate}", head.term, False)
        if place not in self._commands:
            self._commands.add(place)
            self.line(directed.agent, f"{type(directed.command).__name__} {head.id} {fate}", f"{sender} -> ")

    def _ordinal(self, text: str) -> str:
        return _TERM.sub(lambda found: f"term {self._terms[int(found[1])]}", text)

    def log(self, who: str, event: str, fields: dict[str, Any]) -> None:
        """A coordinator's line; the few that are part of the story."""
        if event in ("commit failed", "plan failed", "work failed"):
            self.line(who, f"{event}: {fields['problem']}")
        elif event == "brake":
            self.line(who, f"the brake is {'on' if fields['on'] else 'off'}: {fields['reason']}")

    # etcd's history.

    def etcd(self, event: Event) -> None:
        """A key has changed."""
        place = self._keys.parse(event.kv.key)
        value = None if event.kind == "delete" else event.kv.value
        if value and event.kv.key.startswith(self._keys.webhook("")):
            self._cursor(codec.decode(WebhookCursor, value))
        match place.kind if place else "":
            case "leader":
                self._leader(value, event.kv.create_revision)
            case "node" if place is not None:
                drains = value is not None and codec.decode(NodeRecord, value).draining is not None
                there = "says that it drains" if drains else "registered"
                self.line(place.agent, there if value else "its session is gone")
            case "status" if value and place is not None:
                self._job(place.job, codec.decode(JobStatus, value))
            case "event" if value and place is not None:
                record = codec.decode(EventRecord, value)
                self.events.append(record.reason)
                self._event_at[event.kv.mod_revision] = record.seq
                sign = "!" if record.type is EventType.WARNING else ""
                head = f"event {self._of(place.job)}"
                self.line(f"{record.reason}{sign}", self._ordinal(record.message), head)
            case "open" if value and place is not None:
                self._open(place.job, codec.decode(OpenRecord, value), event)
            case "checkpoint" if value and place is not None:
                made = codec.decode(CommitRecord, value)
                term = self._terms[made.term]
                self.line(
                    "commit",
                    f"checkpoint {made.seq} of step {made.step}, attempt {made.attempt}, term {term}",
                    self._of(place.job),
                )
            case "checkpoint" if place is not None:
                self.line("retired", f"checkpoint {place.seq}")
            case "cordon" if place is not None and value:
                cordon = codec.decode(Cordon, value)
                what = "is to be empty" if cordon.drain else "is cordoned"
                self.line(place.agent, f"{what}: {cordon.reason}")
            case "cordon" if place is not None:
                self.line(place.agent, "is cordoned no more")
            case "worker" if place is not None:
                new = codec.decode(WorkerSnapshot, value) if value else None
                self._snapshot(place.agent, place.job, new)

    def _leader(self, value: bytes | None, revision: int) -> None:
        if value is None:
            self.line("leader", "nobody")
            return
        self._terms[revision] = len(self._terms) + 1
        replica = codec.decode(ReplicaRecord, value).replica
        self.line("leader", f"{replica}, term {self._terms[revision]}")

    def _cursor(self, cursor: WebhookCursor) -> None:
        told = max((seq for at, seq in self._event_at.items() if at <= cursor.revision), default=0)
        self.line("cursor", f"all is told up to event {told}" if told else "nothing is told yet")

    def _of(self, job: str) -> str:
        return f"{job} " if self.several else ""

    def _job(self, name: str, new: JobStatus) -> None:
        old = self._statuses.get(name)
        self._statuses[name] = new
        self.written_at[name] = self._now()
        if old is None or (old.phase, old.attempt, old.reason) != (new.phase, new.attempt, new.reason):
            self.line(new.phase, new.reason, f"job {self._of(name)}")
        if len(new.restarts) != (0 if old is None else len(old.restarts)):
            self.line("budget", f"{len(new.restarts)} used")

    def _open(self, job: str, record: OpenRecord, event: Event) -> None:
        final = ", the final one" if record.final else ""
        if event.kv.create_revision == event.kv.mod_revision:
            self.line("open", f"checkpoint {record.seq} at step {record.step}{final}", self._of(job))
        elif record.reports:
            ranks = " ".join(str(part.rank) for part in record.reports)
            text = f"checkpoint {record.seq} remembers the parts of ranks {ranks}"
            self.line("open", text, self._of(job))

    def _snapshot(self, agent: str, job: str, new: WorkerSnapshot | None) -> None:
        old = self._snapshots.pop((agent, job), None)
        who = f"{agent} for {job}" if self.several else agent
        if new is None:
            self.line(who, "its snapshot is gone")
            return
        self._snapshots[agent, job] = new
        if old is not None and old.attempt != new.attempt:
            old = None
        if old is None or (old.phase, old.incarnation) != (new.phase, new.incarnation):
            self.line(who, new.phase)
        if new.failure is not None and (old is None or old.failure != new.failure):
            rank = "" if new.failure.rank is None else f"rank {new.failure.rank}: "
            self.line(who, f"{rank}{new.failure.message}")
        ends = sorted({rank.last_step for rank in new.ranks if rank.last_step is not None})
        known = {rank.last_step for rank in old.ranks} if old is not None else set()
        if ends and not known & set(ends):
            self.line(who, f"training ended at step {' '.join(map(str, ends))}")
        parts = [part for part in new.durable if old is None or part not in old.durable]
        for seq in sorted({part.seq for part in parts}):
            ranks = " ".join(str(part.rank) for part in parts if part.seq == seq)
            self.line(ranks, f"durable in checkpoint {seq}", "rank ")
        for problem in new.problems:
            if old is None or problem not in old.problems:
                late = " (late)" if problem.late else ""
                self.line(
                    str(problem.rank),
                    f"no part in checkpoint {problem.seq}{late}: {problem.message}",
                    "rank ",
                )
        if new.bad is not None and (old is None or old.bad != new.bad):
            self.line(who, f"checkpoint {new.bad.seq} is damaged: {new.bad.message}")
