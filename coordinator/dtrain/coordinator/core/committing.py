"""One open checkpoint: which of its parts are durable, what verifying it found, and its commit or abort.

It is decided by one etcd transaction and by nothing else.
"""

from collections.abc import Iterable
from dataclasses import replace

from dtrain.coordinator.core import tally
from dtrain.coordinator.core.decisions import VerifyCheckpoint
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.core.tally import Cause
from dtrain.coordinator.core.views import Stored, Verdict
from dtrain.protocol.checkpoint import CommitRecord, Latest, OpenRecord
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank
from dtrain.protocol.snapshot import DurablePart, WorkerSnapshot

SLACK_DOUBLINGS_MAX = 10

VERIFY_RETRY_S = 2.0
"""Pause before a store that did not answer is asked again about an open checkpoint."""

FINAL_TRIES_MAX = 3
"""Tries of the checkpoint at the end of training; then ranks are let go without it."""

TOLD_MAX = 8
"""So many ranks are told by number."""


def durable_parts(draft: Draft, record: OpenRecord) -> dict[Rank, DurablePart]:
    """Durable parts of one open checkpoint by rank, whoever remembers them.

    A part counts only if seq, attempt, step and nonce are those of the intent:
    what a zombie of another attempt reports is not looked at.
    """
    if record.imported:
        order = draft.job.orders.get(record.imported)
        part = None if order is None or order.value.uid != record.uid else order.value.part
        return {part.rank: part} if part is not None and _belongs(part, record) else {}
    reports: list[Iterable[DurablePart]] = [record.reports]
    snapshots = [(name, draft.job.workers[name].value) for name in sorted(draft.job.workers)]
    snapshots += [(name, draft.job.departed[name]) for name in sorted(draft.job.departed)]
    reports += [_own(draft, record, name, snapshot) for name, snapshot in snapshots]
    found: dict[Rank, DurablePart] = {}
    for parts in reports:
        for part in parts:
            if _belongs(part, record):
                found.setdefault(part.rank, part)
    return found


def _own(draft: Draft, record: OpenRecord, name: AgentName, snapshot: WorkerSnapshot) -> list[DurablePart]:
    """Parts that an agent may speak of: of its own ranks, as long as it is known who has which."""
    if snapshot.uid != record.uid:
        return []
    if draft.status.attempt != record.attempt or not draft.status.members:
        return list(snapshot.durable)
    seats = [member for member in draft.status.members if member.agent == name]
    return [
        part
        for part in snapshot.durable
        if any(seat.first_rank <= part.rank < seat.first_rank + seat.nproc for seat in seats)
    ]


def _belongs(part: DurablePart, record: OpenRecord) -> bool:
    return (part.seq, part.attempt, part.step, part.nonce) == (
        record.seq,
        record.attempt,
        record.step,
        record.nonce,
    ) and 0 <= part.rank < record.world_size


def is_complete(parts: dict[Rank, DurablePart], record: OpenRecord) -> bool:
    """Whether every rank's part is durable."""
    return len(parts) == record.world_size


def own_open(draft: Draft) -> list[Stored[OpenRecord]]:
    """Open checkpoints of this submission, by seq."""
    return [stored for stored in draft.job.open if stored.value.uid == draft.status.uid]


def adopt(draft: Draft) -> bool:
    """Rewrite open records of earlier leaders under this term; True if there were any.

    Nothing else is decided about them in the same decision: from here on every
    step is guarded by a revision that this leader wrote.
    """
    adopted = False
    for stored in own_open(draft):
        if stored.value.term != draft.fleet.term:
            key = draft.keys.open(draft.job.name, stored.value.seq)
            draft.put(key, replace(stored.value, term=draft.fleet.term), stored.mod_revision)
            adopted = True
    return adopted


def remember_departed(draft: Draft, stored: Stored[OpenRecord]) -> bool:
    """Copy durable parts of agents that are gone into the open record; True if it did.

    Snapshots die with the agent's lease: without this a machine lost after its
    upload would waste a durable checkpoint at the next change of leader.
    """
    record = stored.value
    known = {part.rank for part in record.reports}
    missing = [
        part
        for name in sorted(draft.job.departed)
        for part in _own(draft, record, name, draft.job.departed[name])
        if _belongs(part, record) and part.rank not in known
    ]
    if not missing:
        return False
    by_rank = {part.rank: part for part in missing}
    reports = (*record.reports, *(by_rank[rank] for rank in sorted(by_rank)))
    key = draft.keys.open(draft.job.name, record.seq)
    draft.put(key, replace(record, term=draft.fleet.term, reports=reports), stored.mod_revision)
    return True


def verdict_of(draft: Draft, record: OpenRecord) -> Verdict | None:
    """What this leader's verification of the checkpoint found; None: not verified yet."""
    return draft.job.verdicts.get((record.seq, record.nonce))


def ask_verdict(draft: Draft, record: OpenRecord, parts: dict[Rank, DurablePart]) -> None:
    """Have a complete checkpoint verified; again after a pause if the store did not answer."""
    verdict = verdict_of(draft, record)
    if verdict is not None and draft.now < verdict.at + VERIFY_RETRY_S:
        draft.wake(verdict.at + VERIFY_RETRY_S)
        return
    parent = draft.newest_good()
    draft.work(
        VerifyCheckpoint(
            draft.fleet.cluster,
            draft.job.name,
            draft.status.uid,
            draft.status.store,
            record,
            tuple(parts[rank] for rank in sorted(parts)),
            None if parent is None else parent.seq,
        )
    )


def commit(draft: Draft, stored: Stored[OpenRecord], verdict: Verdict, *, settled: bool = False) -> None:
    """Decide that the checkpoint exists.

    Guards: the open record as read, no commit record yet, ``latest`` as read.
    The attempt is not compared: a death after everything was durable must not
    waste the checkpoint.
    """
    record, name, keys = stored.value, draft.job.name, draft.keys
    parent = draft.newest_good()
    made = CommitRecord(
        draft.fleet.term,
        record.uid,
        record.seq,
        record.step,
        record.attempt,
        record.nonce,
        record.world_size,
        verdict.size_bytes,
        verdict.manifest,
        verdict.manifest_bytes,
        verdict.digest,
        None if parent is None else parent.seq,
        record.final,
        iso(draft.moment.wall),
    )
    draft.put(keys.checkpoint(name, record.seq), made, 0)
    draft.delete(keys.open(name, record.seq), stored.mod_revision)
    latest = draft.job.latest
    latest_mod = 0 if latest is None else latest.mod_revision
    if draft.writes_key(keys.latest(name)):
        pass  # a lower seq was committed before in this decision; callers go from the newest down
    elif latest is None or latest.value.seq < record.seq:
        draft.put(keys.latest(name), Latest(draft.fleet.term, record.seq, record.step), latest_mod)
    else:
        draft.guard(keys.latest(name), latest_mod)
    draft.committed.append(made)
    status = draft.status
    draft.set(
        late_saves=max(0, status.late_saves - 1),
        failed_saves=0,
        token_done=record.token or status.token_done,
        tally=tally.committed(status, verdict.size_bytes),
    )
    draft.event(
        EventReason.CHECKPOINT_SETTLED if settled else EventReason.CHECKPOINT_COMMITTED,
        f"checkpoint {record.seq} of step {record.step} is committed"
        + (" although its attempt has ended" if settled else "")
        + (", the last one of the job" if record.final else ""),
        f"checkpoint/{record.seq}",
    )


def abort(
    draft: Draft,
    stored: Stored[OpenRecord],
    why: str,
    cause: Cause = Cause.SUPERSEDED,
    *,
    late: bool = False,
    warning: bool = True,
) -> None:
    """Decide that the checkpoint will never be."""
    record = stored.value
    draft.delete(draft.keys.open(draft.job.name, record.seq), stored.mod_revision)
    draft.aborted[record.seq] = why
    status = draft.status
    draft.set(tally=tally.aborted(status, Cause.LATE if late else cause))
    if late:
        draft.set(late_saves=min(SLACK_DOUBLINGS_MAX, status.late_saves + 1))
    elif warning:
        draft.set(failed_saves=status.failed_saves + 1)
    if record.final and not late:
        draft.set(final_tries=status.final_tries + 1)
    draft.event(
        EventReason.CHECKPOINT_ABORTED,
        f"checkpoint {record.seq} of step {record.step} is aborted: {why}",
        f"checkpoint/{record.seq}",
        warning=warning and not late,
    )


def abort_unfit(draft: Draft, stored: Stored[OpenRecord], why: str) -> None:
    """Abort what a number speaks against; at the end of training another try would find the same."""
    abort(draft, stored, why, Cause.UNFIT)
    if stored.value.final:
        draft.set(final_tries=FINAL_TRIES_MAX)
