"""Checkpoints and what is in their store, as rows. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.cli import terminal
from dtrain.cli.answers import GarbageItem
from dtrain.cli.durations import show_bytes
from dtrain.cli.records import Job
from dtrain.cli.render.table import UNKNOWN, Table, When

if TYPE_CHECKING:
    from dtrain.storage.checkpoints.reading import Damage


@dataclass(frozen=True, slots=True)
class CheckpointLine:
    """One checkpoint, from whichever of its records there are."""

    seq: int
    step: int
    attempt: int
    world_size: int
    bytes: int | None
    state: str
    latest: bool
    pinned: bool
    since: str
    note: str = ""


def checkpoint_lines(job: Job) -> list[CheckpointLine]:
    """All checkpoints of a job by number: committed, open, bad and those being deleted."""
    lines = {}
    pinned = set(job.pinned)
    if job.status and job.status.restore and not job.finished:
        pinned.add(job.status.restore.seq)
    newest = job.latest.seq if job.latest else -1
    for seq, tomb in job.garbage.items():
        lines[seq] = CheckpointLine(seq, 0, 0, 0, None, "Deleting", False, seq in pinned, "", tomb.reason)
    for seq, intent in job.open.items():
        note = "final" if intent.final else ""
        lines[seq] = CheckpointLine(
            seq, intent.step, intent.attempt, intent.world_size, None, "Open", False, seq in pinned,
            intent.opened_at, note,
        )  # fmt: skip
    for seq, record in job.commits.items():
        damaged = job.bad.get(seq)
        note = f"{damaged.blob} chunk {damaged.chunk}" if damaged else "final" if record.final else ""
        if job.status and seq in job.status.passed_over:
            note = "training was rolled back past it"
        lines[seq] = CheckpointLine(
            seq, record.step, record.attempt, record.world_size, record.bytes,
            "Bad" if damaged else "Committed", seq == newest, seq in pinned, record.committed_at, note,
        )  # fmt: skip
    for seq, damaged in job.bad.items():
        if seq not in lines:
            lines[seq] = CheckpointLine(
                seq, 0, 0, 0, None, "Bad", False, seq in pinned, damaged.at,
                f"{damaged.blob} chunk {damaged.chunk}",
            )  # fmt: skip
    return [lines[seq] for seq in sorted(lines)]


def checkpoints(job: Job, when: When, *, wide: bool = False) -> Table:
    """``get checkpoints``; ``*`` marks the newest committed one, VERIFIED is when one was last read whole."""
    rows = []
    for line in checkpoint_lines(job):
        row: tuple[str, ...] = (
            f"{line.seq}{'*' if line.latest else ''}",
            str(line.step) if line.attempt else UNKNOWN,
            str(line.attempt) if line.attempt else UNKNOWN,
            str(line.world_size) if line.world_size else UNKNOWN,
            UNKNOWN if line.bytes is None else show_bytes(line.bytes),
            line.state,
            "yes" if line.pinned else "",
            when(job.verified[line.seq].at) if line.seq in job.verified else "",
            when(line.since),
        )
        rows.append((*row, line.note) if wide else row)
    headings = ("SEQ", "STEP", "ATTEMPT", "WORLD", "SIZE", "STATE", "PINNED", "VERIFIED", "AGE")
    return Table((*headings, *(("NOTE",) if wide else ())), tuple(rows))


def damage_line(damage: "Damage") -> str:
    """One damaged chunk: what lies in it, and what was found instead."""
    return terminal.text(f"  {damage.where} is {damage.found}, {damage.expected} was committed")


def garbage(items: Sequence[GarbageItem], *, wide: bool = False) -> Table:
    """``checkpoints gc --dry-run``; ``wide``: what stays, too."""
    rows = []
    for item in items:
        row = (
            item.kind,
            str(item.seq) if item.seq else UNKNOWN,
            show_bytes(item.bytes) if item.bytes else UNKNOWN,
            *(("delete" if item.deleted else "keep",) if wide else ()),
            item.why,
            item.what,
        )
        rows.append(row)
    return Table(("KIND", "SEQ", "SIZE", *(("DOES",) if wide else ()), "WHY", "WHAT"), tuple(rows))


def imports(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> Table:
    """``checkpoints import --dry-run``: dtype, shape and bytes by the name that each tensor gets."""
    rows = [
        (name, dtype, str(list(shape)), show_bytes(size)) for name, (dtype, shape, size) in tensors.items()
    ]
    return Table(("TENSOR", "TYPE", "SHAPE", "SIZE"), tuple(rows))
