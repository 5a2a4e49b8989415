"""Looking for rot before it is needed: committed checkpoints are read again now and then.

Soon after its commit each one is looked at (is every blob there, as long as it
was?), and in every interval the ones that nobody has read for so long are read
whole, the newest first of all. Slowly, one at a time, and never for a decision
that somebody waits for. What is found twice is put aside with the evidence.
"""

from enum import StrEnum

from dtrain.coordinator.core import quarantine
from dtrain.coordinator.core.decisions import InspectCheckpoint
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.stamps import iso, parse_iso
from dtrain.coordinator.core.views import Inspection, Stored
from dtrain.protocol.checkpoint import CommitRecord, Verification
from dtrain.protocol.ids import Seq

LOOK_S = 60.0
"""From a commit until its blobs are looked at again."""

FIRST_S = 600.0
"""From a job's first commit until one of its checkpoints is read whole."""

RETRY_S = 300.0
"""Pause after a store that did not answer, or would not let it."""


class Depth(StrEnum):
    """How much of a checkpoint is read."""

    HEADS = "heads"
    """Whether every blob is there and has its length and the checksum that the store keeps."""
    CHUNK = "chunk"
    """One chunk of one blob."""
    ALL = "all"


def inspection(draft: Draft, seq: Seq, depth: Depth, blob: str = "", chunk: int = 0) -> Inspection | None:
    """What this leader found when it last read so much of a checkpoint."""
    return draft.job.inspections.get((seq, depth.value, blob, chunk))


def inspect(
    draft: Draft, commit: CommitRecord, depth: Depth, blob: str = "", chunk: int = 0
) -> InspectCheckpoint:
    """The work of reading so much of a committed checkpoint."""
    name, store = draft.job.name, draft.status.store
    return InspectCheckpoint(
        name, store, commit.seq, commit.manifest, commit.digest, depth.value, blob, chunk
    )


def conclude(draft: Draft) -> None:
    """Record what was found: damage puts a checkpoint aside, a whole read is remembered."""
    if draft.has_writes:
        return
    for stored in _good(draft):
        commit = stored.value
        for depth in (Depth.ALL, Depth.HEADS):
            seen = inspection(draft, commit.seq, depth)
            if seen is None or seen.problem or draft.room < 8:
                continue
            if seen.damage is not None:
                # Not if it has been retired meanwhile: then its blobs are rightly gone.
                draft.guard(draft.keys.checkpoint(draft.job.name, commit.seq), stored.mod_revision)
                quarantine.put_aside(draft, commit.seq, seen.damage)
                break
            if depth is Depth.ALL:
                _remember(draft, stored, seen)


def _remember(draft: Draft, stored: Stored[CommitRecord], seen: Inspection) -> None:
    seq = stored.value.seq
    known = draft.job.verified.get(seq)
    if known is not None and known.seen_at >= seen.at:
        return
    draft.guard(draft.keys.checkpoint(draft.job.name, seq), stored.mod_revision)
    record = Verification(draft.fleet.term, seq, iso(draft.moment.wall), seen.bytes)
    draft.put(draft.keys.verified(draft.job.name, seq), record, 0 if known is None else known.mod_revision)


def scrub(draft: Draft) -> None:
    """Ask for the next look, or say when it is due."""
    every_s = draft.fleet.scrub_interval_s
    if every_s <= 0 or not draft.status.store:
        return
    good = _good(draft)
    for stored in good:
        looked = inspection(draft, stored.value.seq, Depth.HEADS)
        if stored.seen_at <= draft.fleet.took_office_at or (looked is not None and not looked.problem):
            continue
        due = stored.seen_at + LOOK_S if looked is None else looked.at + RETRY_S
        if draft.now < due:
            draft.wake(due)
        else:
            draft.work(inspect(draft, stored.value, Depth.HEADS))
    if not good:
        return
    due_in, commit = min(
        ((_due_in(draft, stored.value, every_s), stored.value) for stored in good), key=lambda pair: pair[0]
    )
    # Somebody reads one now and then, so that there always is one that is known to be whole.
    newest = good[-1].value
    first_in = _first_in(draft, good, every_s)
    if first_in < due_in:
        due_in, commit = first_in, newest
    failed = inspection(draft, commit.seq, Depth.ALL)
    if failed is not None and failed.problem:
        due_in = max(due_in, failed.at + RETRY_S - draft.now)
    if due_in > 0:
        draft.wake(draft.now + due_in)
    else:
        draft.work(inspect(draft, commit, Depth.ALL))


def _due_in(draft: Draft, commit: CommitRecord, every_s: float) -> float:
    """Seconds until a checkpoint has not been read for the whole interval. A policy: wall clocks will do."""
    known = draft.job.verified.get(commit.seq)
    at = parse_iso(commit.committed_at if known is None else known.value.at)
    wall = draft.moment.wall
    # A time in the future is a clock that was wrong: it must not put this off for ever.
    return every_s if at is None else min(wall, at) + every_s - wall


def _first_in(draft: Draft, good: list[Stored[CommitRecord]], every_s: float) -> float:
    """Seconds until the newest is read although it is young: once in an interval one of them is."""
    wall = draft.moment.wall
    read = [parse_iso(one.value.at) for one in draft.job.verified.values()]
    known = [min(wall, at) for at in read if at is not None]
    if known:
        return max(known) + every_s - wall
    begun = parse_iso(good[0].value.committed_at)
    return every_s if begun is None else min(wall, begun) + min(every_s, FIRST_S) - wall


def _good(draft: Draft) -> list[Stored[CommitRecord]]:
    bad = draft.quarantined | set(draft.job.bad)
    return [
        stored
        for stored in draft.commits()
        if stored.value.seq not in bad
        and not draft.deletes_key(draft.keys.checkpoint(draft.job.name, stored.value.seq))
    ]
