"""Which histories of the records are valid: the invariants, replayed.

etcd's revisions are a total order of everything that dtrain decided. Feed an
``Auditor`` every revision under the cluster's prefix, in order, and it names
each one that breaks a promise. It knows the records only, none of the code that
writes them. Where history before some revision is gone, ``begin_at`` seeds it
from a list: from there on it judges exactly, about what was before it is silent.

Checked (numbers as in ``docs/guarantees.md``):

* I1  every record of the leader carries the term that led at that revision, and
  none is deleted while nobody leads;
* I2  terms strictly increase, each by a leader key created after the former went;
* I3  a commit record appears once, never changes, and goes only by a retirement:
  together with its tombstone, not while it is pinned, restored from or newest;
* I4  ``latest`` never goes back, always points at a commit record, the newest one;
* I5  attempts rise by one; at any revision at most one attempt can commit, and
  what it commits is what was opened;
* I6  no agent goes back to an older attempt or term, obeys one that was never
  decided, or runs ranks that its attempt did not give it;
* I7  one command id, one effect;
* I9  nothing is declared lost, or placed, by a decision that saw the brake on.

Five more names occur: ``phase`` (a job went where the phase diagram does not
lead, or has members although it waits), ``slots`` (a machine is given more ranks
than it has slots), ``ledger`` (a job's time does not add up, or changed after its
end), ``tally`` (a count of a job fell, or rose without what it counts) and
``readable`` (a record that does not parse). I8 and I10 to I12 are not
in a history; the simulation and the chaos tests check them.

An etcd that was restored from a backup with its revisions raised far above all
former ones begins another history: what was decided after the backup is not
held against it. An attempt that agents brought along from the forgotten time
may be taken over or ended, by a number that they prove.

Memory is bounded by the records that exist, not by how long they have existed.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.audit_agents import AgentAudit
from dtrain.protocol.audit_job import KEPT_KINDS, AuditedJob, Record, as_kind
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord, Quarantine, Verification
from dtrain.protocol.errors import Refused
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import RESTORE_BUMP_LEAST, AgentName, ClusterName, JobName
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobStatus, Tally
from dtrain.protocol.keys import Keys, Parsed
from dtrain.protocol.ledger import faults, faults_between
from dtrain.protocol.phases import PHASE_CHANGES
from dtrain.protocol.snapshot import FailureKind, NodeRecord, WorkerSnapshot

VIOLATIONS_KEPT = 1000
"""Told in full; further ones are only counted."""

_LEADERS_KINDS = {
    "status": JobStatus,
    "open": OpenRecord,
    "checkpoint": CommitRecord,
    "latest": Latest,
    "garbage": Garbage,
    "bad": Quarantine,
    "verified": Verification,
    "event": EventRecord,
}
_READ_KINDS = _LEADERS_KINDS | {"worker": WorkerSnapshot, "node": NodeRecord}


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
    """Replays one cluster's history; feed every revision once, in order.

    ``terms``, ``commits``, ``attempts`` and ``commands`` count what was judged.
    """

    def __init__(self, cluster: ClusterName) -> None:
        self.violations: list[Violation] = []
        self.violations_more = 0
        """Beyond the ``VIOLATIONS_KEPT`` that are told in full."""
        self.revisions = 0
        self.terms = 0
        self.commits = 0
        self.attempts = 0
        self.snapshots = 0
        self.begun_at = 0
        """Revision of the list that the judgement rests on; 0: the whole history was seen."""
        self._keys = Keys(cluster)
        self._term: int | None = None
        self._term_last = 0
        self._revision = 0
        self._jobs: dict[JobName, AuditedJob] = {}
        self._agents = AgentAudit(self._bad)
        self._slots: dict[AgentName, int] = {}
        """As the machines said last."""
        self._placed: dict[JobName, dict[AgentName, int]] = {}
        """Ranks that placed attempts have on each machine."""

    def begin_at(self, revision: int, records: Iterable[Change]) -> None:
        """Take ``records``, all that there are at ``revision``, for the state to go on from.

        Also in the middle, after a gap: then only what must not go back is compared.
        """
        reached = self._revision
        self.begun_at = self._revision = revision
        found = list(self._parse(records))
        self._find_restoration([reached, *(change.create_revision for _, change, _ in found), revision])
        leapt = 0 < reached < self._agents.restored_at
        former, self._jobs = ({} if leapt else self._jobs), {}
        self._agents.forget()
        self._slots.clear()
        self._placed.clear()
        self._term = None
        for place, change, record in found:
            if place.kind == "leader":
                self._term = change.create_revision
                if self._term < self._term_last and not leapt:
                    self._bad("I2", f"term {self._term} after term {self._term_last}")
                self._term_last = max(self._term_last, self._term)
            elif place.kind == "node":
                self._agents.node(place, as_kind(NodeRecord, record), change.create_revision)
                self._note_slots(record)
            elif place.job and place.kind in KEPT_KINDS:
                self._job(place.job).records[place] = record
            if place.kind in _LEADERS_KINDS and record is not None:
                term: int = record.term  # type: ignore[attr-defined]
                self._term_last = max(self._term_last, term)
        for name, job in self._jobs.items():
            job.begin(name)
            before = former.get(name)
            if before is not None:
                self._check_gap(name, before, job)
            job.tell_breaches(name, self._bad)
            status = job.status(name)
            if status is not None:
                self._agents.status(Parsed("status", job=name), status)
                self._note_ranks(name, status)
        # Leaders of a time that is forgotten have left their terms with the agents alone.
        term_last = revision if self._agents.restored_at else self._term_last
        for place, _, record in found:
            # What agents showed before the backup is no news to whoever has seen what they showed later.
            if place.kind == "worker" and not leapt:
                self._agents.snapshot(place, as_kind(WorkerSnapshot, record), term_last)

    def feed(self, revision: int, changes: Sequence[Change]) -> None:
        """Check one revision against everything before it, then apply it."""
        self.revisions += 1
        self._revision = revision
        parsed = self._parse(changes)
        for place, change, record in parsed:
            if place.kind == "leader":
                self._lead(change)
            elif place.kind == "node":
                self._agents.node(place, as_kind(NodeRecord, record), change.create_revision)
                self._note_slots(record)
        now: dict[Parsed, Record | None] = {place: record for place, _, record in parsed if place.job}
        for place, record in now.items():
            if place.kind in _LEADERS_KINDS:
                self._check_term(place, record)
            job = self._job(place.job)
            match place.kind:
                case "status":
                    self._check_status(place, job, record)
                case "open":
                    self._check_open(place, job, record)
                case "checkpoint":
                    self._check_checkpoint(place, job, record, now)
                case "latest":
                    self._check_latest(place, job, record)
        touched = {place.job for place in now if place.kind in KEPT_KINDS}
        for place, record in now.items():
            if place.kind in KEPT_KINDS:
                self._job(place.job).put(place, record)
        for name in touched:
            self._jobs[name].tell_breaches(name, self._bad)
        for place, record in now.items():
            if place.kind == "event":
                self._check_event(place, record)
            elif place.kind == "worker":
                self.snapshots += record is not None
                self._agents.snapshot(place, as_kind(WorkerSnapshot, record), self._term_last)

    # Inside ---------------------------------------------------------------------------

    def _find_restoration(self, revisions: Iterable[int]) -> None:
        """Note the newest leap of the revisions that only a restored backup explains."""
        for before, after in itertools.pairwise(sorted(revisions)):
            if 0 < before <= after - RESTORE_BUMP_LEAST:
                self._agents.restored_at = max(self._agents.restored_at, after)

    def _bad(self, invariant: str, message: str) -> None:
        if len(self.violations) < VIOLATIONS_KEPT:
            self.violations.append(Violation(self._revision, invariant, message))
        else:
            self.violations_more += 1

    def _job(self, name: JobName) -> AuditedJob:
        return self._jobs.setdefault(name, AuditedJob())

    def _parse(self, changes: Iterable[Change]) -> list[tuple[Parsed, Change, Record | None]]:
        found: list[tuple[Parsed, Change, Record | None]] = []
        for change in changes:
            place = self._keys.parse(change.key)
            if place is not None:
                found.append((place, change, self._decode(place, change)))
        return found

    def _decode(self, place: Parsed, change: Change) -> Record | None:
        if change.value is None:
            return None
        if place.kind == "spec":
            return _uid_of(change.value)
        kind = _READ_KINDS.get(place.kind)
        if kind is None:
            return change.value
        try:
            return codec.decode(kind, change.value)
        except Refused as error:
            self._bad("readable", f"{change.key}: {error}")
            return None

    def _check_gap(self, name: JobName, before: AuditedJob, after: AuditedJob) -> None:
        """Compare what only rises across revisions that nobody could read."""
        if after.attempt_last < before.attempt_last:
            self._bad("I5", f"{name} went from attempt {before.attempt_last} to {after.attempt_last}")
        was, now = before.latest(name), after.latest(name)
        if was is not None and now is not None and now.seq < was.seq:
            self._bad("I4", f"latest of {name} went from {was.seq} back to {now.seq}")
        after.seq_opened = max(after.seq_opened, before.seq_opened)

    def _lead(self, change: Change) -> None:
        if change.value is None:
            self._term = None
            return
        revision = self._revision
        if change.create_revision != revision:
            self._bad("I2", "the leader key was overwritten instead of created")
        elif self._term is not None:
            self._bad("I2", f"term {revision} began while term {self._term} led")
        if revision <= self._term_last:
            self._bad("I2", f"term {revision} after term {self._term_last}")
        self._term = revision
        self._term_last = max(self._term_last, revision)
        self.terms += 1

    def _check_term(self, place: Parsed, record: Record | None) -> None:
        if record is None:
            if self._term is None:
                self._bad("I1", f"{_name(place)} was deleted while nobody led")
            return
        term = record.term  # type: ignore[attr-defined]
        if term != self._term:
            self._bad("I1", f"{_name(place)} was written by term {term} while {self._term or 'nobody'} led")

    def _check_status(self, place: Parsed, job: AuditedJob, record: Record | None) -> None:
        before = job.status(place.job)
        if not isinstance(record, JobStatus):
            if before is not None:
                self._bad("phase", f"the status of {place.job} was deleted")
            return
        last = job.attempt_last
        # A job's first record may already be of its first attempt.
        if record.attempt not in (last, last + 1) and not self._is_proven(place.job, record):
            self._bad("I5", f"{place.job} went from attempt {last} to {record.attempt}")
        self.attempts += record.attempt > last
        self._agents.status(place, record)
        if record.members and record.phase not in PLACED_PHASES | TERMINAL_PHASES:
            self._bad("phase", f"{place.job} is {record.phase} and has {len(record.members)} members")
        self._check_ledger(place.job, before, record)
        self._check_tally(place.job, before, record)
        self._note_ranks(place.job, record)
        if record.attempt > last and not self._is_proven(place.job, record):
            self._check_slots(place.job)
        if before is None:
            return
        if record.seq_last < before.seq_last:
            self._bad("I5", f"{place.job} forgot checkpoint numbers up to {before.seq_last}")
        begins_from = record.restore if record.attempt > before.attempt else None
        if begins_from is not None and begins_from.seq in record.passed_over:
            which = f"attempt {record.attempt} of {place.job} begins from checkpoint {begins_from.seq}"
            self._bad("I5", f"{which}, which training was rolled back past")
        if record.uid != before.uid:
            if before.phase not in TERMINAL_PHASES:
                self._bad("phase", f"{place.job} was replaced while {before.phase}")
        elif record.phase != before.phase and record.phase not in PHASE_CHANGES[before.phase]:
            self._bad("phase", f"{place.job} went from {before.phase} to {record.phase}")
        self._check_brake(place, before, record)

    def _note_slots(self, record: Record | None) -> None:
        if isinstance(record, NodeRecord):
            self._slots[record.agent] = record.slots

    def _note_ranks(self, job: JobName, status: JobStatus) -> None:
        if status.phase in PLACED_PHASES:
            self._placed[job] = {member.agent: member.nproc for member in status.members}
        else:
            self._placed.pop(job, None)

    def _check_slots(self, job: JobName) -> None:
        """An attempt that begins finds its slots free, whichever jobs have the others."""
        for agent in self._placed.get(job, ()):
            ranks = sum(members.get(agent, 0) for members in self._placed.values())
            if ranks > self._slots.get(agent, ranks):
                self._bad("slots", f"{agent} has {self._slots[agent]} slots and is given {ranks} ranks")

    def _check_ledger(self, job: JobName, before: JobStatus | None, record: JobStatus) -> None:
        if record.ledger is None:
            return
        found = faults(record.ledger)
        if before is not None and before.uid == record.uid and before.ledger is not None:
            found += faults_between(before.ledger, record.ledger)
        for text in found:
            self._bad("ledger", f"the ledger of {job}: {text}")

    def _check_tally(self, job: JobName, before: JobStatus | None, record: JobStatus) -> None:
        if before is None or before.uid != record.uid or record.tally == Tally():
            # Written by a release that keeps none, perhaps.
            return
        former, tally = before.tally, record.tally
        for what, was, now in (
            *(
                (f"attempts {why}", times, tally.attempts.get(why, 0))
                for why, times in former.attempts.items()
            ),
            *((f"aborts {why}", times, tally.aborts.get(why, 0)) for why, times in former.aborts.items()),
            ("commits", former.commits, tally.commits),
            ("committed bytes", former.committed_bytes, tally.committed_bytes),
        ):
            if now < was:
                self._bad("tally", f"{job} has counted {now} {what} after {was}")
        begun = sum(tally.attempts.values()) - sum(former.attempts.values())
        if begun > max(0, record.attempt - before.attempt):
            self._bad("tally", f"{job} has counted {begun} attempts more at attempt {record.attempt}")

    def _is_proven(self, job: JobName, record: JobStatus) -> bool:
        """Tell whether agents have shown the attempt, which a restored etcd has forgotten."""
        later = record.attempt > self._job(job).attempt_last
        return later and record.attempt in self._agents.forgotten(job, record.uid)

    def _check_brake(self, place: Parsed, before: JobStatus, record: JobStatus) -> None:
        braked = any(
            (one.type, one.status, one.reason) == ("Degraded", "True", "BrakeOn") for one in record.conditions
        )
        if not braked:
            return
        if record.attempt > before.attempt:
            self._bad("I9", f"attempt {record.attempt} of {place.job} was placed under the brake")
        lost = record.failure is not None and record.failure.kind is FailureKind.AGENT_LOST
        if lost and record.failure != before.failure:
            self._bad("I9", f"an agent of {place.job} was declared lost under the brake: {record.reason}")

    def _check_open(self, place: Parsed, job: AuditedJob, record: Record | None) -> None:
        before = job.records.get(place)
        if not isinstance(record, OpenRecord):
            return
        if isinstance(before, OpenRecord):
            same = (record.attempt, record.step, record.nonce) == (before.attempt, before.step, before.nonce)
            if not same:
                self._bad("I5", f"{_name(place)} was changed into another checkpoint")
            return
        if place.seq <= job.seq_opened:
            self._bad("I5", f"{_name(place)} was opened twice, or after {job.seq_opened}")
        job.seq_opened = max(job.seq_opened, place.seq)

    def _check_checkpoint(
        self, place: Parsed, job: AuditedJob, record: Record | None, now: Mapping[Parsed, Record | None]
    ) -> None:
        before = job.records.get(place)
        if not isinstance(record, CommitRecord):
            if isinstance(before, CommitRecord):
                self._check_retired(place, job, before, now)
            return
        if isinstance(before, CommitRecord):
            self._bad("I3", f"{_name(place)} was written twice")
        self.commits += 1
        key = Parsed("open", job=place.job, seq=place.seq)
        intent = job.records.get(key)
        if not isinstance(intent, OpenRecord):
            self._bad("I5", f"{_name(place)} was committed without an open record")
        elif (intent.attempt, intent.step, intent.nonce) != (record.attempt, record.step, record.nonce):
            self._bad("I5", f"{_name(place)} is not the checkpoint that was opened")
        if key not in now or now[key] is not None:
            self._bad("I5", f"{_name(place)} left its open record behind")
        # The status before this revision: what settles an attempt may begin the next one.
        status = job.status(place.job)
        if status is not None and status.attempt != record.attempt:
            self._bad(
                "I5", f"{_name(place)} of attempt {record.attempt} was committed during {status.attempt}"
            )

    def _check_retired(
        self, place: Parsed, job: AuditedJob, before: CommitRecord, now: Mapping[Parsed, Record | None]
    ) -> None:
        name = _name(place)
        tombstone = now.get(Parsed("garbage", job=place.job, seq=place.seq))
        if not isinstance(tombstone, Garbage):
            self._bad("I3", f"{name} disappeared without a tombstone")
            return
        if (tombstone.manifest, tombstone.digest) != (before.manifest, before.digest):
            self._bad("I3", f"the tombstone of {name} is of another checkpoint")
        if any(one.kind == "pin" and one.seq == place.seq and one not in now for one in job.records):
            self._bad("I3", f"{name} was retired while somebody read it")
        if job.records.get(Parsed("spec", job=place.job), before.uid) != before.uid:
            return  # the name was submitted again: nothing of the former job is kept
        latest = job.latest(place.job)
        if latest is not None and latest.seq == place.seq:
            self._bad("I3", f"{name} was the newest and was retired")
        status = now.get(Parsed("status", job=place.job)) or job.status(place.job)
        if (
            isinstance(status, JobStatus)
            and status.phase not in TERMINAL_PHASES
            and status.uid == before.uid
            and status.restore is not None
            and status.restore.seq == place.seq
        ):
            self._bad("I3", f"{name} was retired while attempt {status.attempt} restored from it")

    def _check_latest(self, place: Parsed, job: AuditedJob, record: Record | None) -> None:
        before = job.records.get(place)
        if isinstance(record, Latest):
            if isinstance(before, Latest) and record.seq < before.seq:
                self._bad("I4", f"latest of {place.job} went from {before.seq} back to {record.seq}")
            return
        status, spec = job.status(place.job), job.records.get(Parsed("spec", job=place.job))
        if isinstance(before, Latest) and status is not None and spec in (None, status.uid):
            self._bad("I4", f"latest of {place.job} was deleted")

    def _check_event(self, place: Parsed, record: Record | None) -> None:
        """What was told to be committed is there: an acknowledgement that etcd itself keeps."""
        told = (EventReason.CHECKPOINT_COMMITTED, EventReason.CHECKPOINT_SETTLED)
        if not isinstance(record, EventRecord) or record.reason not in told:
            return
        kind, _, number = record.object.partition("/")
        if kind == "checkpoint" and number.isdecimal():
            key = Parsed("checkpoint", job=place.job, seq=int(number))  # type: ignore[arg-type]
            if not isinstance(self._job(place.job).records.get(key), CommitRecord):
                self._bad("I3", f"checkpoint {number} of {place.job} was acknowledged without a record")


def _uid_of(spec: bytes) -> str:
    """The uid in a job file; a recorded stream keeps nothing else of it."""
    try:
        found = json.loads(spec)
        return str(found.get("uid", "")) if isinstance(found, dict) else ""
    except ValueError:
        return ""


def _name(place: Parsed) -> str:
    return f"{place.kind} {place.seq} of {place.job}" if place.seq else f"{place.kind} of {place.job}"
