"""Which histories of the records are valid: the invariants, replayed.

etcd's revisions are a total order of everything that dtrain decided. Feed an
``Auditor`` every revision under the cluster's prefix, from the first, and it
names each one that breaks a promise. It knows the records only, none of the
code that writes them.

Checked (numbers as in ``docs/guarantees.md``'s invariants):

* I1  every record of the leader carries the term that led at that revision;
* I2  terms strictly increase;
* I3  a commit record appears once and goes only together with a tombstone;
* I4  ``latest`` never goes back and points at a commit record;
* I5  attempts rise by one; a commit belongs to the attempt of the status it
  was written under, had an open record of the same step and nonce, and removes
  it in the same revision;
* I6  an agent's snapshots of one submission never go back to an older attempt;
* I9  a terminal phase is final; phases only change as ``PHASE_CHANGES`` allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord, Quarantine
from dtrain.protocol.errors import Refused
from dtrain.protocol.events import EventRecord
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.keys import Keys, Parsed
from dtrain.protocol.snapshot import WorkerSnapshot

PHASE_CHANGES: Mapping[JobPhase, frozenset[JobPhase]] = {
    JobPhase.QUEUED: frozenset({JobPhase.STARTING, JobPhase.CANCELLED, JobPhase.FAILED, JobPhase.CANCELLING}),
    JobPhase.STARTING: frozenset(
        {
            JobPhase.RUNNING,
            JobPhase.RECOVERING,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.FAILED,
            JobPhase.SUCCEEDED,
        }
    ),
    JobPhase.RUNNING: frozenset(
        {
            JobPhase.STARTING,
            JobPhase.RECOVERING,
            JobPhase.CANCELLING,
            JobPhase.CANCELLED,
            JobPhase.FAILED,
            JobPhase.SUCCEEDED,
        }
    ),
    JobPhase.RECOVERING: frozenset(
        {JobPhase.STARTING, JobPhase.CANCELLING, JobPhase.CANCELLED, JobPhase.FAILED}
    ),
    JobPhase.CANCELLING: frozenset({JobPhase.CANCELLED}),
    JobPhase.CANCELLED: frozenset(),
    JobPhase.SUCCEEDED: frozenset(),
    JobPhase.FAILED: frozenset(),
}

_LEADERS_KINDS = {
    "status": JobStatus,
    "open": OpenRecord,
    "checkpoint": CommitRecord,
    "latest": Latest,
    "garbage": Garbage,
    "bad": Quarantine,
    "event": EventRecord,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One key changed in a revision; ``value`` None: deleted."""

    key: str
    value: bytes | None
    create_revision: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise broken by one revision."""

    revision: int
    invariant: str
    message: str

    def __str__(self) -> str:
        return f"revision {self.revision}: {self.invariant}: {self.message}"


class Auditor:
    """Replays one cluster's history; feed every revision once, in order."""

    def __init__(self, cluster: ClusterName) -> None:
        self.violations: list[Violation] = []
        self.revisions = 0
        self.commits = 0
        self.terms = 0
        self._keys = Keys(cluster)
        self._term: int | None = None
        self._term_last = 0
        self._records: dict[Parsed, object] = {}
        self._seqs_opened: set[tuple[str, int]] = set()
        self._commits_ever: set[tuple[str, int]] = set()
        self._snapshot_attempts: dict[tuple[str, str, str], int] = {}

    def feed(self, revision: int, changes: Sequence[Change]) -> None:
        """Check one revision against everything before it, then apply it."""
        self.revisions += 1
        parsed = [(self._keys.parse(change.key), change) for change in changes]
        now: dict[Parsed, object | None] = {}
        for place, change in parsed:
            if place is None or place.kind in (
                "leader",
                "coordinator",
                "node",
                "cordon",
                "spec",
                "intent",
                "pin",
            ):
                continue
            now[place] = self._decode(revision, place, change)
        for place, change in parsed:
            if place is not None and place.kind == "leader":
                self._lead(revision, change)
        for place, record in now.items():
            if record is not None and place.kind in _LEADERS_KINDS:
                self._check_term(revision, place, record)
            match place.kind:
                case "status":
                    self._check_status(revision, place, record)
                case "open":
                    self._check_open(revision, place, record)
                case "checkpoint":
                    self._check_checkpoint(revision, place, record, now)
                case "latest":
                    self._check_latest(revision, place, record, now)
                case "worker":
                    self._check_snapshot(revision, place, record)
        for place, record in now.items():
            if record is None:
                self._records.pop(place, None)
            else:
                self._records[place] = record

    def _bad(self, revision: int, invariant: str, message: str) -> None:
        self.violations.append(Violation(revision, invariant, message))

    def _decode(self, revision: int, place: Parsed, change: Change) -> object | None:
        if change.value is None:
            return None
        kind = _LEADERS_KINDS.get(place.kind, WorkerSnapshot)
        try:
            return codec.decode(kind, change.value)
        except Refused as error:
            self._bad(revision, "readable", f"{change.key}: {error}")
            return None

    def _lead(self, revision: int, change: Change) -> None:
        if change.value is None:
            self._term = None
            return
        if change.create_revision != revision:
            self._bad(revision, "I2", "the leader key was overwritten instead of created")
        if revision <= self._term_last:
            self._bad(revision, "I2", f"term {revision} after term {self._term_last}")
        self._term = self._term_last = revision
        self.terms += 1

    def _check_term(self, revision: int, place: Parsed, record: object) -> None:
        term = record.term  # type: ignore[attr-defined]
        if term != self._term:
            self._bad(
                revision,
                "I1",
                f"{_name(place)} was written by term {term} while {self._term or 'nobody'} led",
            )

    def _check_status(self, revision: int, place: Parsed, record: object | None) -> None:
        before = self._records.get(place)
        if not isinstance(before, JobStatus):
            return
        if not isinstance(record, JobStatus):
            self._bad(revision, "I9", f"the status of {place.job} was deleted")
            return
        if record.attempt not in (before.attempt, before.attempt + 1):
            self._bad(revision, "I5", f"{place.job} went from attempt {before.attempt} to {record.attempt}")
        if record.seq_last < before.seq_last:
            self._bad(revision, "I5", f"{place.job} forgot checkpoint numbers up to {before.seq_last}")
        if record.uid != before.uid:
            if before.phase not in TERMINAL_PHASES:
                self._bad(revision, "I9", f"{place.job} was replaced while {before.phase}")
        elif record.phase != before.phase and record.phase not in PHASE_CHANGES[before.phase]:
            self._bad(revision, "I9", f"{place.job} went from {before.phase} to {record.phase}")

    def _check_open(self, revision: int, place: Parsed, record: object | None) -> None:
        before = self._records.get(place)
        if not isinstance(record, OpenRecord):
            return
        if isinstance(before, OpenRecord):
            same = (record.attempt, record.step, record.nonce) == (before.attempt, before.step, before.nonce)
            if not same:
                self._bad(revision, "I5", f"{_name(place)} was changed into another checkpoint")
            return
        if (place.job, place.seq) in self._seqs_opened:
            self._bad(revision, "I5", f"{_name(place)} was opened twice")
        self._seqs_opened.add((place.job, place.seq))
        status = self._records.get(Parsed("status", job=place.job))
        if isinstance(status, JobStatus) and record.attempt != status.attempt:
            self._bad(revision, "I5", f"{_name(place)} is of attempt {record.attempt}, not {status.attempt}")

    def _check_checkpoint(
        self, revision: int, place: Parsed, record: object | None, now: Mapping[Parsed, object | None]
    ) -> None:
        before = self._records.get(place)
        if record is None:
            tombstone = now.get(Parsed("garbage", job=place.job, seq=place.seq))
            if isinstance(before, CommitRecord) and not isinstance(tombstone, Garbage):
                self._bad(revision, "I3", f"{_name(place)} disappeared without a tombstone")
            return
        if not isinstance(record, CommitRecord):
            return
        if (place.job, place.seq) in self._commits_ever:
            self._bad(revision, "I3", f"{_name(place)} was written twice")
        self._commits_ever.add((place.job, place.seq))
        self.commits += 1
        key = Parsed("open", job=place.job, seq=place.seq)
        intent = self._records.get(key)
        if not isinstance(intent, OpenRecord):
            self._bad(revision, "I5", f"{_name(place)} was committed without an open record")
        elif (intent.attempt, intent.step, intent.nonce) != (record.attempt, record.step, record.nonce):
            self._bad(revision, "I5", f"{_name(place)} is not the checkpoint that was opened")
        if key not in now or now[key] is not None:
            self._bad(revision, "I5", f"{_name(place)} left its open record behind")
        status = self._records.get(Parsed("status", job=place.job))
        if isinstance(status, JobStatus) and status.attempt != record.attempt:
            self._bad(
                revision,
                "I5",
                f"{_name(place)} of attempt {record.attempt} was committed during {status.attempt}",
            )

    def _check_latest(
        self, revision: int, place: Parsed, record: object | None, now: Mapping[Parsed, object | None]
    ) -> None:
        before = self._records.get(place)
        if not isinstance(record, Latest):
            return
        if isinstance(before, Latest) and record.seq < before.seq:
            self._bad(revision, "I4", f"latest of {place.job} went from {before.seq} back to {record.seq}")
        target = Parsed("checkpoint", job=place.job, seq=record.seq)
        pointed = now[target] if target in now else self._records.get(target)
        if not isinstance(pointed, CommitRecord):
            self._bad(revision, "I4", f"latest of {place.job} points at {record.seq}, which is not committed")

    def _check_snapshot(self, revision: int, place: Parsed, record: object | None) -> None:
        if not isinstance(record, WorkerSnapshot):
            return
        who = (place.agent, place.job, record.uid)
        if record.attempt < self._snapshot_attempts.get(who, 0):
            self._bad(
                revision,
                "I6",
                f"{place.agent} went from attempt {self._snapshot_attempts[who]} of {place.job} "
                f"back to {record.attempt}",
            )
        self._snapshot_attempts[who] = max(record.attempt, self._snapshot_attempts.get(who, 0))


def _name(place: Parsed) -> str:
    return f"{place.kind} {place.seq} of {place.job}" if place.seq else f"{place.kind} of {place.job}"
