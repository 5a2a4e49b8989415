"""A decision in the making: the working copy of a job's status and what goes with it.

The functions of ``core/`` read the views through a ``Draft`` and add to it;
``finish`` turns it into a ``Decision``. It writes the status only if it differs
from what is stored, numbers events in the same transaction as the status that
counts them, and keeps the whole within what one etcd transaction may hold.
"""

from dataclasses import replace
from typing import Any

from dtrain.coordinator.core import conditions, ledger
from dtrain.coordinator.core.decisions import (
    Decision,
    DeleteRecord,
    Directed,
    Guard,
    NoKeysUnder,
    PutRecord,
    Reason,
    Work,
    Write,
)
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.core.views import FleetView, JobView, Moment, Stored
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.commands import Command, Header
from dtrain.protocol.events import EVENTS_KEPT, EventReason, EventRecord, EventType
from dtrain.protocol.ids import AgentName, Seq, Step
from dtrain.protocol.job import TERMINAL_PHASES, Condition, JobPhase, JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import WorkerSnapshot

OPERATIONS_MAX = 100
"""Writes of one decision; etcd allows 128 operations and 128 compares in a transaction."""


class Draft:
    """Mutable; lives for one call of ``plan`` only."""

    def __init__(
        self, job: JobView, fleet: FleetView, moment: Moment, spec: JobSpec, status: JobStatus
    ) -> None:
        self.job = job
        self.fleet = fleet
        self.moment = moment
        self.spec = spec
        self.status = status
        self.keys = Keys(fleet.cluster)
        self.wake_at: float | None = None
        self.quarantined: set[Seq] = set()
        """Checkpoints that this very decision puts under ``bad/``."""
        self.committed: list[CommitRecord] = []
        """Checkpoints that this very decision commits."""
        self.aborted: dict[Seq, str] = {}
        """Checkpoints that this very decision aborts, and why."""
        self._guards: dict[str, int] = {}
        self._absent: list[NoKeysUnder] = []
        self._writes: dict[str, Write] = {}
        self._events: list[EventRecord] = []
        self._commands: list[Directed] = []
        self._work: list[Work] = []
        self._reasons: list[Reason] = []
        self._takeover = False
        self._noted: dict[str, Condition] = {}
        self.lacks_machines = False
        """The next attempt waits for nothing but machines."""

    # Reading ------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.moment.now

    @property
    def stored(self) -> JobStatus | None:
        """The status as the mirror holds it."""
        return None if self.job.status is None else self.job.status.value

    @property
    def status_seen_at(self) -> float:
        """When this leader first saw the stored status; now, if there is none."""
        return self.now if self.job.status is None else self.job.status.seen_at

    @property
    def in_phase_since(self) -> float | None:
        """First sight of the stored status if it is of the draft's phase, stage of it and attempt, else None.

        None means that this decision itself brings the phase about: deadlines
        begin with its first sight in the next view.
        """
        stored = self.stored
        if stored is None or (stored.phase, stored.stopping, stored.attempt, stored.uid) != (
            self.status.phase,
            self.status.stopping,
            self.status.attempt,
            self.status.uid,
        ):
            return None
        return self.status_seen_at

    @property
    def has_writes(self) -> bool:
        return bool(self._writes or self._events) or self._status_changed()

    def commits(self) -> list[Stored[CommitRecord]]:
        """Commits of this submission, by seq."""
        return [commit for commit in self.job.commits if commit.value.uid == self.status.uid]

    def newest_good(self) -> CommitRecord | None:
        """What the next attempt would restore: the newest commit that is neither damaged nor passed over."""
        return max(self.good_commits(), key=lambda c: c.seq, default=None)

    def good_commits(self) -> list[CommitRecord]:
        """Commits that an attempt may begin from."""
        unfit = self.quarantined | set(self.job.bad) | set(self.status.passed_over)
        return [c for c in [*(s.value for s in self.commits()), *self.committed] if c.seq not in unfit]

    # Deciding -----------------------------------------------------------------

    def set(self, **changes: Any) -> None:
        """Change fields of the status."""
        self.status = replace(self.status, **changes)

    def enter(self, phase: JobPhase, reason: str, **changes: Any) -> None:
        """Go to another phase; the time of the change goes with it."""
        stamp = iso(self.moment.wall)
        finished = stamp if phase in TERMINAL_PHASES else ""
        # Only ranks of an attempt that goes on can be held.
        over = {"held": Seq(0), **changes}
        self.set(phase=phase, reason=reason, since=stamp, finished_at=finished, **over)
        self.say(reason)

    def explain(self, reason: str) -> None:
        """Say where the job stands, in words without volatile numbers: they are stored."""
        if reason != self.status.reason:
            self.set(reason=reason)
        self.say(reason)

    def say(self, text: str) -> None:
        """Say something for the log and the REASON column only."""
        if Reason(text) not in self._reasons:
            self._reasons.append(Reason(text))

    def wake(self, at: float) -> None:
        """Ask to be called again by ``at`` (monotonic); the earliest wish wins."""
        at = max(at, self.now)
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def event(self, reason: EventReason, message: str, about: str = "", *, warning: bool = False) -> None:
        """Record what happened, in the transaction that makes it happen."""
        seq = self.status.event_last + 1
        stamp = iso(self.moment.wall)
        self.set(event_last=seq)
        self._events.append(
            EventRecord(
                self.fleet.term,
                seq,
                EventType.WARNING if warning else EventType.NORMAL,
                reason,
                message,
                about,
                self.status.attempt,
                1,
                stamp,
                stamp,
            )
        )

    def condition(self, name: str) -> Condition | None:
        """A condition as it is stored."""
        return next((one for one in self.status.conditions if one.type == name), None)

    def note(self, name: str, status: str, reason: str, message: str) -> None:
        """Change a condition that no other part of the status tells; an event goes with it."""
        self._noted[name] = Condition(name, status, reason, message)

    def take_over(self) -> None:
        """Write the status even if nothing else changes: it must carry this term."""
        self._takeover = True

    def guard(self, key: str, mod_revision: int) -> None:
        """Decide only if ``key`` still is at the revision it was read at."""
        self._guards[key] = mod_revision

    def nobody_under(self, prefix: str) -> None:
        """Decide only if no key is under ``prefix``."""
        self._absent.append(NoKeysUnder(prefix))

    def put(self, key: str, value: Any, expect_mod: int, *, lease_ttl_s: float = 0.0) -> None:
        """Write a record; with ``lease_ttl_s`` one that goes by itself after so long."""
        assert key not in self._writes, f"{key} is written twice in one decision"
        self._writes[key] = PutRecord(key, value, expect_mod, lease_ttl_s)

    def delete(self, key: str, expect_mod: int | None) -> None:
        assert key not in self._writes, f"{key} is written twice in one decision"
        self._writes[key] = DeleteRecord(key, expect_mod)

    def writes_key(self, key: str) -> bool:
        return key in self._writes

    def deletes_key(self, key: str) -> bool:
        return isinstance(self._writes.get(key), DeleteRecord)

    @property
    def room(self) -> int:
        """Writes that still fit, with the status and the events accounted for."""
        return OPERATIONS_MAX - len(self._writes) - 3 * len(self._events) - 4

    def header(self, command_id: str) -> Header:
        """Header of a command for the draft's attempt; the id is a function of what is asked."""
        status = self.status
        return Header(
            self.fleet.cluster, self.fleet.term, self.job.name, status.uid, status.attempt, command_id
        )

    def header_of(self, snapshot: WorkerSnapshot, prefix: str = "release.") -> Header:
        """Header of a command about what an agent shows, which need not be of the draft's attempt."""
        header = self.header(f"{prefix}{snapshot.attempt}")
        return replace(header, uid=snapshot.uid, attempt=snapshot.attempt)

    def command(self, agent: AgentName, command: Command) -> None:
        """Send to ``agent`` if it has a session: without one there is no address."""
        view = self.fleet.agents.get(agent)
        if view is not None:
            node = view.node
            self._commands.append(Directed(agent, node.address, command, incarnation=node.incarnation))

    def work(self, work: Work) -> None:
        self._work.append(work)

    # Finishing ----------------------------------------------------------------

    def finish(self) -> Decision:
        """Build the decision. A written status carries term, step and conditions."""
        writes = dict(self._writes)
        guards = dict(self._guards)
        for event in self._events:
            writes[self.keys.event(self.job.name, event.seq)] = PutRecord(
                self.keys.event(self.job.name, event.seq), event, 0
            )
        self._trim_events(writes)
        status_key = self.keys.status(self.job.name)
        status_mod = 0 if self.job.status is None else self.job.status.mod_revision
        if self._status_changed() or self._events:
            status = replace(self.status, term=self.fleet.term, step=self._step())
            newest = self.newest_good()
            derived = conditions.derive(
                self.fleet, self.moment, self.spec, status, newest=newest, noted=self._noted
            )
            status = replace(status, conditions=derived)
            status = replace(status, ledger=ledger.advance(self.stored, status, self._turn(newest)))
            writes[status_key] = PutRecord(status_key, status, status_mod)
        elif writes:
            guards[status_key] = status_mod
        if writes and self.job.spec is not None:
            guards[self.keys.spec(self.job.name)] = self.job.spec.mod_revision
        reasons = tuple(self._reasons) or (Reason(self.status.reason or self.status.phase.value),)
        return Decision(
            guards=tuple(Guard(key, mod) for key, mod in guards.items() if key not in writes),
            absent=tuple(self._absent),
            writes=tuple(writes.values()),
            commands=tuple(self._commands),
            work=tuple(self._work),
            wake_at=self.wake_at,
            reasons=reasons,
        )

    def _turn(self, newest: CommitRecord | None) -> ledger.Turn:
        return ledger.Turn(
            self.now,
            self.moment.wall,
            self.status_seen_at,
            self.spec.submitted_at,
            self.job.pace,
            tuple(record.step for record in self.committed if record.uid == self.status.uid),
            Step(0) if newest is None else newest.step,
            any(one.value.final and one.value.attempt == self._attempt_before for one in self.commits()),
            self.lacks_machines,
            self.stored is not None and self.stored.term == self.fleet.term,
        )

    @property
    def _attempt_before(self) -> int:
        return 0 if self.stored is None else self.stored.attempt

    def _status_changed(self) -> bool:
        return self._takeover or self.stored != self.status

    def _trim_events(self, writes: dict[str, Write]) -> None:
        if not self._events:
            return
        surplus = len(self.job.events) + len(self._events) - EVENTS_KEPT
        # Twice as many as come in, so that a ring that overflowed shrinks again.
        for seq in self.job.events[: max(0, min(surplus, 2 * len(self._events)))]:
            key = self.keys.event(self.job.name, seq)
            if key not in writes:
                writes[key] = DeleteRecord(key, None)

    def _step(self) -> Any:
        """Newest step known of the draft's attempt."""
        steps = [
            rank.step
            for snapshot in self.job.workers.values()
            if (snapshot.value.uid, snapshot.value.attempt) == (self.status.uid, self.status.attempt)
            for rank in snapshot.value.ranks
        ]
        start = 0 if self.status.restore is None else self.status.restore.step
        if self.status.phase in (JobPhase.STARTING, JobPhase.RUNNING):
            return max([start, *steps])
        return max([self.status.step, *steps])
