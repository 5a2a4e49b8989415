"""The half of the audit that judges agents by their snapshots: I6 and I7.

A snapshot says what a machine runs for one job and which command it took on
last. etcd orders snapshots and the leader's decisions in one sequence, and
commands leave only after their decision is written; so an agent that shows more
than was decided, or something twice, has obeyed what it should have refused.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from dtrain.protocol.ids import Attempt, JobName, Rank, Term, Uid
from dtrain.protocol.job import JobStatus
from dtrain.protocol.keys import Parsed
from dtrain.protocol.snapshot import DurablePart, NodeRecord, WorkerSnapshot

COMMAND_IDS_KEPT = 1000
"""Of one job on one machine: as many as an agent remembers itself."""

STOPPING_KINDS = frozenset({"Stop"})
"""A stopped agent takes over the number of the attempt that ends its ranks, which may not be theirs."""


@dataclass(slots=True)
class _Seen:
    """What one machine has shown of one job. Bounded, whatever comes."""

    session: int = 0
    """Create revision of the node record."""
    incarnation: str = ""
    uid: Uid = Uid("")
    attempt: Attempt = Attempt(0)
    term: Term = Term(0)
    command: str = ""
    taken: "OrderedDict[str, str]" = field(default_factory=OrderedDict)
    """Command ids and kinds, oldest first."""
    pids: dict[Rank, int] = field(default_factory=dict)
    pids_of: Attempt = Attempt(0)
    parts: dict[tuple[int, Rank], DurablePart] = field(default_factory=dict)


@dataclass(slots=True)
class _Placed:
    """Who was given which ranks in the newest attempt of a job."""

    uid: Uid = Uid("")
    attempt: Attempt = Attempt(0)
    ranks: dict[str, range] = field(default_factory=dict)


class AgentAudit:
    """Feed it node records, statuses and snapshots in order; ``bad`` hears invariant and message."""

    def __init__(self, bad: Callable[[str, str], None]) -> None:
        self._bad = bad
        self._nodes: dict[str, tuple[int, str]] = {}
        """By agent: create revision and incarnation."""
        self._placed: dict[JobName, _Placed] = {}
        self._seen: dict[tuple[str, JobName], _Seen] = {}
        self.restored_at = 0
        """The first revision known after etcd was restored from a backup with raised revisions; 0: never."""

    def forget(self) -> None:
        """Start anew after a gap in the history; what only ever rises is kept."""
        self._nodes.clear()
        self._placed.clear()
        for seen in self._seen.values():
            seen.session, seen.incarnation, seen.command = 0, "", ""
            seen.taken.clear()
            seen.pids.clear()
            seen.parts.clear()

    def forgotten(self, job: JobName, uid: Uid) -> set[int]:
        """Attempts that agents have shown of a submission, if a restored etcd may have forgotten them."""
        if not self.restored_at:
            return set()
        return {seen.attempt for (_, name), seen in self._seen.items() if (name, seen.uid) == (job, uid)}

    def node(self, place: Parsed, record: NodeRecord | None, create_revision: int) -> None:
        """An agent's session began, was renewed by another life, or ended."""
        if record is None:
            self._nodes.pop(place.agent, None)
        else:
            self._nodes[place.agent] = (create_revision, record.incarnation)

    def status(self, place: Parsed, record: JobStatus) -> None:
        """The leader decided about a job."""
        placed = self._placed.setdefault(place.job, _Placed())
        if (placed.uid, placed.attempt) != (record.uid, record.attempt):
            placed.uid, placed.attempt, placed.ranks = record.uid, record.attempt, {}
        for member in record.members:
            placed.ranks[member.agent] = range(member.first_rank, member.first_rank + member.nproc)

    def snapshot(self, place: Parsed, record: WorkerSnapshot | None, term_last: int) -> None:
        """A machine published what it runs; ``term_last``: the newest term there has been."""
        key = (str(place.agent), place.job)
        seen = self._seen.get(key)
        if record is None:
            if seen is not None:
                # Released, or its session ended: nothing of it can be told apart from a new beginning.
                seen.pids, seen.parts, seen.command = {}, {}, ""
            return
        if seen is None:
            seen = self._seen[key] = _Seen()
        self._check_session(place, record, seen)
        if record.uid != seen.uid:
            seen.uid, seen.attempt, seen.pids, seen.parts = record.uid, record.attempt, {}, {}
        self._check_attempt(place, record, seen)
        self._check_command(place, record, seen, term_last)
        if record.command is None or record.command.kind not in STOPPING_KINDS:
            self._check_ranks(place, record, seen)
        self._check_parts(place, record, seen)

    # I6.

    def _check_session(self, place: Parsed, record: WorkerSnapshot, seen: _Seen) -> None:
        node = self._nodes.get(place.agent)
        if node is None:
            self._bad("I6", f"{place.agent} reported on {place.job} without a session")
            return
        session, incarnation = node
        if record.incarnation != incarnation:
            self._bad(
                "I6",
                f"{place.agent} reported on {place.job} as {record.incarnation} "
                f"while {incarnation} is registered",
            )
        if session != seen.session:
            # The machine may be another one: its ranks prove nothing about those of before.
            seen.session = session
            seen.pids.clear()
        if record.incarnation != seen.incarnation:
            # Its journal may be lost, and with it the memory of what it took on; but no rank
            # that runs is forked again for that.
            seen.incarnation = record.incarnation
            seen.taken.clear()
            seen.command = ""

    def _check_attempt(self, place: Parsed, record: WorkerSnapshot, seen: _Seen) -> None:
        if record.attempt < seen.attempt:
            self._bad(
                "I6",
                f"{place.agent} went from attempt {seen.attempt} of {place.job} back to {record.attempt}",
            )
        seen.attempt = max(seen.attempt, record.attempt)
        placed = self._placed.get(place.job)
        # What it was told in a time that etcd has forgotten is no disobedience.
        brought = record.command is None or record.command.term < self.restored_at
        if self.restored_at and brought:
            return
        if placed is not None and record.uid == placed.uid and record.attempt > placed.attempt:
            self._bad(
                "I6",
                f"{place.agent} obeys attempt {record.attempt} of {place.job}; "
                f"only {placed.attempt} was decided",
            )

    def _check_ranks(self, place: Parsed, record: WorkerSnapshot, seen: _Seen) -> None:
        numbers = [rank.rank for rank in record.ranks]
        alive = [rank.pid for rank in record.ranks if rank.exit_code is None]
        if len(numbers) != len(set(numbers)) or len(alive) != len(set(alive)):
            self._bad("I6", f"{place.agent} runs two sets of ranks of {place.job}: {sorted(numbers)}")
        placed = self._placed.get(place.job)
        current = placed is not None and (record.uid, record.attempt) == (placed.uid, placed.attempt)
        if placed is not None and current and placed.ranks:
            given = placed.ranks.get(place.agent, range(0))
            # A STOP of this attempt may have overtaken its PREPARE: what it ends is of the one before.
            stopped = record.command is not None and record.command.kind == "Stop"
            living = [rank.rank for rank in record.ranks if rank.exit_code is None]
            strange = [number for number in living if number not in given]
            if strange and not stopped:
                self._bad(
                    "I6",
                    f"{place.agent} runs ranks {strange} of {place.job}, which attempt {record.attempt} "
                    "did not give it: there are two sets of them",
                )
        if seen.pids_of != record.attempt:
            seen.pids, seen.pids_of = {}, record.attempt
        for rank in record.ranks:
            before = seen.pids.setdefault(rank.rank, rank.pid)
            if before != rank.pid:
                self._bad(
                    "I7",
                    f"start.{record.attempt} took effect twice on {place.agent}: rank {rank.rank} of "
                    f"{place.job} was process {before} and is {rank.pid}",
                )
                seen.pids[rank.rank] = rank.pid

    # I7, and I6 for terms.

    def _check_command(self, place: Parsed, record: WorkerSnapshot, seen: _Seen, term_last: int) -> None:
        command = record.command
        if command is None or command.id == seen.command:
            return
        seen.command = command.id
        if command.id in seen.taken:
            self._bad("I7", f"{place.agent} took {command.id} of {place.job} on a second time")
        seen.taken[command.id] = command.kind
        while len(seen.taken) > COMMAND_IDS_KEPT:
            seen.taken.popitem(last=False)
        if not command.term:
            return  # written before snapshots told the term
        if command.term > term_last:
            self._bad("I6", f"{place.agent} obeyed term {command.term}, which never was")
        elif command.term < seen.term:
            self._bad("I6", f"{place.agent} obeyed term {command.term} after term {seen.term}")
        seen.term = max(seen.term, command.term)

    def _check_parts(self, place: Parsed, record: WorkerSnapshot, seen: _Seen) -> None:
        for part in record.durable:
            before = seen.parts.setdefault((part.seq, part.rank), part)
            if before != part:
                self._bad(
                    "I7",
                    f"{place.agent} took its part of checkpoint {part.seq} of {place.job} twice: "
                    f"rank {part.rank} reported another one before",
                )
        # A part is reported until its checkpoint's outcome is known, and never again.
        kept = {(part.seq, part.rank) for part in record.durable}
        for key in [key for key in seen.parts if key not in kept]:
            del seen.parts[key]
