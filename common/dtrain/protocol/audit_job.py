"""The records of one job, as the auditor keeps them, and what must be true of them at every revision."""

from collections.abc import Iterator
from typing import Protocol, TypeVar

from dtrain.protocol.checkpoint import CommitRecord, Latest, OpenRecord
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.keys import Parsed

T = TypeVar("T")

Record = object
"""A decoded record; for a spec its uid, for a pin the bytes as they are."""

KEPT_KINDS = frozenset({"status", "open", "checkpoint", "latest", "garbage", "pin", "spec"})
"""What the rules look back at, of a job."""


class Bad(Protocol):
    """Hears of each breach."""

    def __call__(self, invariant: str, message: str) -> None: ...


class AuditedJob:
    """The records of one job, and what outlives them."""

    def __init__(self) -> None:
        self.records: dict[Parsed, Record] = {}
        self.attempt_last = 0
        self.seq_opened = 0
        self._told: set[str] = set()

    def latest(self, name: JobName) -> Latest | None:
        return as_kind(Latest, self.records.get(Parsed("latest", job=name)))

    def status(self, name: JobName) -> JobStatus | None:
        return as_kind(JobStatus, self.records.get(Parsed("status", job=name)))

    def put(self, place: Parsed, record: Record | None) -> None:
        if record is None:
            self.records.pop(place, None)
        else:
            self.records[place] = record
        if isinstance(record, JobStatus):
            self.attempt_last = max(self.attempt_last, record.attempt)

    def begin(self, name: JobName) -> None:
        """Take the numbers that only rise from the records."""
        status = self.status(name)
        if status is not None:
            self.attempt_last, self.seq_opened = status.attempt, status.seq_last
        seqs = [place.seq for place in self.records if place.kind in ("open", "checkpoint", "garbage")]
        self.seq_opened = max([self.seq_opened, *seqs])

    def tell_breaches(self, name: JobName, bad: Bad) -> None:
        """Check what must hold of the records of any one revision; each breach is told once."""
        found = [
            *self._breaches_of_open(name),
            *self._breaches_of_latest(name),
            *self._breaches_of_pause(name),
        ]
        for invariant, message in found:
            if message not in self._told:
                bad(invariant, message)
        self._told = {message for _, message in found}

    def _breaches_of_open(self, name: JobName) -> Iterator[tuple[str, str]]:
        status = self.status(name)
        if status is None:
            return
        mine = [
            record
            for record in self.records.values()
            if isinstance(record, OpenRecord) and record.uid == status.uid
        ]
        for record in mine:
            what = f"checkpoint {record.seq} of {name} is open"
            if record.attempt != status.attempt:
                yield "I5", f"{what} for attempt {record.attempt} in attempt {status.attempt}"
            elif status.phase in TERMINAL_PHASES or status.phase is JobPhase.SUSPENDED:
                yield "I5", f"{what} although the job is {status.phase}"
        if len({record.attempt for record in mine}) > 1:
            yield "I5", f"several attempts of {name} can commit at once"

    def _breaches_of_pause(self, name: JobName) -> Iterator[tuple[str, str]]:
        status = self.status(name)
        if status is None or not status.held:
            return
        record = self.records.get(Parsed("checkpoint", job=name, seq=status.held))
        if not isinstance(record, CommitRecord) or record.attempt != status.attempt:
            yield "I5", f"{name} is paused at checkpoint {status.held}, which attempt {status.attempt} lacks"
        if status.phase is not JobPhase.RUNNING:
            yield "I5", f"{name} is paused although it is {status.phase}"

    def _breaches_of_latest(self, name: JobName) -> Iterator[tuple[str, str]]:
        latest, status = self.latest(name), self.status(name)
        commits = {
            place.seq: record for place, record in self.records.items() if isinstance(record, CommitRecord)
        }
        if latest is not None:
            pointed = commits.get(latest.seq)
            if pointed is None:
                yield "I4", f"latest of {name} points at {latest.seq}, which is not committed"
            elif pointed.step != latest.step:
                yield "I4", f"latest of {name} says step {latest.step}, its checkpoint {pointed.step}"
            if commits and max(commits) > latest.seq:
                yield "I4", f"latest of {name} is {latest.seq}, and {max(commits)} is committed"
        elif (
            status is not None
            and any(record.uid == status.uid for record in commits.values())
            and self.records.get(Parsed("spec", job=name)) in (None, status.uid)
        ):
            # Submitted again, the former job's pointer goes before its commits do.
            yield "I4", f"{name} has commits but no latest"


def as_kind(kind: type[T], record: Record | None) -> T | None:
    """Return a record that is of one kind, or None."""
    return record if isinstance(record, kind) else None
