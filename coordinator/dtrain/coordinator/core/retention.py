"""What may be deleted, in which order: record, tombstone, blobs, tombstone.

A checkpoint is retired by a transaction that removes its record and leaves a
tombstone; blobs are deleted only after that. Untouchable are the newest, the
one the attempt restored from, and those that somebody is reading; retention also
spares the last one that was read back whole, whatever its age.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from dtrain.coordinator.core.decisions import CollectGarbage, SweepOrphans
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.views import Stored
from dtrain.protocol.checkpoint import CommitRecord, Garbage
from dtrain.protocol.ids import Seq
from dtrain.protocol.job import TERMINAL_PHASES, Former, JobStatus

RETIRED_AT_ONCE = 8
COLLECTED_AT_ONCE = 4

SWEEP_S = 600.0
"""Pause between two searches for orphaned blobs of a placed job."""

UNSWEPT_MAX = 8
"""Earlier submissions that are remembered for a sweep: each is a line of the status record."""

COLLECT_RETRY_S = 30.0
"""How soon a job that is over asks again for garbage that could not be collected."""


def tidy(draft: Draft) -> None:
    """Retire what the policy no longer keeps, and drop tombstones whose blobs are gone.

    Called last: it writes only if nothing else does, so that a pin that appears
    meanwhile can refuse a deletion but never a commit.
    """
    if not draft.has_writes:
        for stored in draft.job.garbage:
            if stored.value.seq in draft.job.collected and draft.room > 2:
                _forget(draft, stored)
    if not draft.has_writes:
        for commit in surplus(draft)[:RETIRED_AT_ONCE]:
            retire(draft, commit)
    _collect(draft)
    _sweep_former(draft)


@dataclass(frozen=True, slots=True)
class Shelf:
    """What retention decides from: the checkpoints of one submission, and who needs which."""

    commits: tuple[CommitRecord, ...]
    """Of this submission, by seq."""
    keep_last: int
    keep_every_steps: int = 0
    bad: Set[Seq] = frozenset()
    pinned: Set[Seq] = frozenset()
    latest: Seq | None = None
    restore: Seq | None = None
    """What the attempt that is under way started from."""
    verified: Set[Seq] = frozenset()
    """Those of which every byte has been read back."""
    passed_over: Set[Seq] = frozenset()
    """Those that training was rolled back past."""

    def good(self) -> list[CommitRecord]:
        """Those that an attempt may begin from."""
        return [c for c in self.commits if c.seq not in self.bad and c.seq not in self.passed_over]


def why_kept(shelf: Shelf) -> dict[Seq, str]:
    """Return the checkpoints that stay, each with the reason; all others may go.

    Only committed ones that are not quarantined count: a damaged one must not
    push out a good one, nor may one that training was rolled back past.
    """
    good = shelf.good()
    kept: dict[Seq, str] = {}
    for commit in _every(good, shelf.keep_every_steps):
        kept[commit.seq] = f"the first at or after a multiple of {shelf.keep_every_steps} steps"
    for commit in good[-max(1, shelf.keep_last) :]:
        kept[commit.seq] = f"one of the last {max(1, shelf.keep_last)}"
    # What nothing begins from is kept as evidence until a good one is newer.
    newest_good = good[-1].seq if good else Seq(0)
    for commit in shelf.commits:
        if commit.seq in shelf.bad and commit.seq > newest_good:
            kept[commit.seq] = "damaged, and none that is good is newer"
        elif commit.seq in shelf.passed_over and commit.seq > newest_good:
            kept[commit.seq] = "training was rolled back past it, and none that is good is newer"
    verified = [commit.seq for commit in good if commit.seq in shelf.verified]
    if verified:
        kept[verified[-1]] = "the last one that was read back whole"
    return kept | untouchable(shelf)


def untouchable(shelf: Shelf) -> dict[Seq, str]:
    """Return the checkpoints that not even an operator can delete, with the reason."""
    found: dict[Seq, str] = {}
    for seq in shelf.pinned:
        found[seq] = "pinned"
    good = shelf.good()
    if good:
        found[good[-1].seq] = "the newest that is not damaged"
    if shelf.restore is not None:
        found[shelf.restore] = "what the current attempt started from"
    if shelf.latest is not None:
        found[shelf.latest] = "the newest"
    return found


def _every(good: Sequence[CommitRecord], every: int) -> list[CommitRecord]:
    """The lowest step at or after each multiple, and of several commits of that step the newest."""
    first: dict[int, CommitRecord] = {}
    if every > 0:
        for commit in good:
            known = first.get(commit.step // every)
            if commit.step >= every and (known is None or commit.step <= known.step):
                first[commit.step // every] = commit
    return list(first.values())


def shelf(draft: Draft) -> Shelf:
    """The checkpoints of the draft's job, as retention looks at them."""
    restore = draft.status.restore
    placed = restore is not None and draft.status.phase not in TERMINAL_PHASES
    return Shelf(
        tuple(stored.value for stored in draft.commits()),
        draft.spec.checkpoint.keep_last,
        draft.spec.checkpoint.keep_every_steps,
        set(draft.job.bad) | draft.quarantined,
        draft.job.pinned,
        None if draft.job.latest is None else draft.job.latest.value.seq,
        restore.seq if restore is not None and placed else None,
        set(draft.job.verified),
        set(draft.status.passed_over),
    )


def surplus(draft: Draft) -> list[Stored[CommitRecord]]:
    """Commits that retention no longer keeps, oldest first."""
    kept = why_kept(shelf(draft))
    stale = [c for c in draft.job.commits if c.value.uid != draft.status.uid]
    return [c for c in stale + draft.commits() if c.value.seq not in kept]


def retire(draft: Draft, commit: Stored[CommitRecord], why: str = "") -> None:
    """Remove a commit record and leave a tombstone, unless somebody begins to read it."""
    record, name, keys = commit.value, draft.job.name, draft.keys
    if not why:
        why = "retention" if record.uid == draft.status.uid else "of an earlier job of this name"
    draft.delete(keys.checkpoint(name, record.seq), commit.mod_revision)
    draft.put(
        keys.garbage(name, record.seq),
        Garbage(draft.fleet.term, record.seq, record.manifest, record.digest, why, draft.status.store),
        0,
    )
    if record.seq in draft.job.verified:
        draft.delete(keys.verified(name, record.seq), None)
    draft.nobody_under(keys.pins(name, record.seq))
    latest = draft.job.latest
    if not draft.writes_key(keys.latest(name)):
        draft.guard(keys.latest(name), 0 if latest is None else latest.mod_revision)
    draft.say(f"retiring checkpoint {record.seq} ({why})")


def _forget(draft: Draft, stored: Stored[Garbage]) -> None:
    seq = stored.value.seq
    draft.delete(draft.keys.garbage(draft.job.name, seq), stored.mod_revision)
    if seq in draft.job.bad:
        draft.delete(draft.keys.bad(draft.job.name, seq), None)
    draft.say(f"checkpoint {seq} is deleted")


def _collect(draft: Draft) -> None:
    waiting = [g for g in draft.job.garbage if g.value.seq not in draft.job.collected]
    for stored in waiting[:COLLECTED_AT_ONCE]:
        store = stored.value.store or draft.status.store
        if store:
            draft.work(CollectGarbage(draft.job.name, store, stored.value))
            if draft.status.phase in TERMINAL_PHASES:
                draft.wake(draft.now + COLLECT_RETRY_S)


def sweep(draft: Draft) -> None:
    """Look for orphaned blobs now and then while the job is placed."""
    if not draft.status.store:
        return
    swept_at = draft.job.swept_at
    # A new leader does not sweep at once: it has more urgent things to do.
    due = (draft.fleet.took_office_at if swept_at is None else swept_at) + SWEEP_S
    if draft.now >= due:
        draft.work(orphans(draft))
    else:
        draft.wake(due)


def sweep_last(draft: Draft) -> bool:
    """Sweep once after the job is over; True when that is done and recorded."""
    if draft.status.swept or not draft.status.store:
        return True
    since = draft.in_phase_since
    swept_at = draft.job.swept_at
    if since is not None and swept_at is not None and swept_at >= since:
        draft.set(swept=True)
        return True
    draft.work(orphans(draft))
    draft.wake(draft.now + COLLECT_RETRY_S)
    return False


def unswept(before: JobStatus) -> tuple[Former, ...]:
    """Return the submissions whose orphans are still to be looked for once ``before`` has a successor."""
    own = () if before.swept or not before.store else (Former(before.uid, before.store),)
    return (*before.unswept, *own)[-UNSWEPT_MAX:]


def _sweep_former(draft: Draft) -> None:
    """Sweep after an earlier submission, as at its end, once no agent holds anything of it."""
    held = {stored.value.uid for stored in draft.job.workers.values()}
    left = tuple(former for former in draft.status.unswept if former.uid not in draft.job.swept_former)
    if left != draft.status.unswept and not draft.has_writes:
        draft.set(unswept=left)
    for former in left[:1]:
        if former.uid not in held:
            draft.work(SweepOrphans(draft.fleet.cluster, draft.job.name, former.uid, former.store))
            draft.wake(draft.now + COLLECT_RETRY_S)


def orphans(draft: Draft) -> SweepOrphans:
    """The work of searching the store for what no record of this submission names."""
    return SweepOrphans(draft.fleet.cluster, draft.job.name, draft.status.uid, draft.status.store)
