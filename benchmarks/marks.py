"""Reads the step files that ``script.py`` writes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mark:
    """One finished step of one rank; ``at_ns`` is CLOCK_MONOTONIC."""

    at_ns: int
    pid: int
    step: int


def read(folder: Path, rank: int) -> list[Mark]:
    """All complete lines of a rank's file so far."""
    path = folder / f"rank-{rank}"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [Mark(*(int(word) for word in line.split())) for line in lines if line.count(" ") == 2]


def first_of_another_process(folder: Path, rank: int, pid: int, timeout_s: float) -> Mark | None:
    """Wait for the first step that ``rank`` finishes in another process than ``pid``."""
    for marks in _poll(folder, rank, timeout_s):
        if marks and marks[-1].pid != pid:
            return next(mark for i, mark in enumerate(marks) if mark.pid != pid and _is_after(marks, i, pid))
    return None


def await_steps(folder: Path, rank: int, count: int, timeout_s: float) -> list[Mark]:
    """Wait until the newest process of ``rank`` has finished ``count`` steps.

    Raises:
        TimeoutError: it has not.
    """
    for marks in _poll(folder, rank, timeout_s):
        if marks and sum(mark.pid == marks[-1].pid for mark in marks) >= count:
            return marks
    raise TimeoutError(f"rank {rank} did not finish {count} steps in {timeout_s:g} s")


def _is_after(marks: list[Mark], index: int, pid: int) -> bool:
    return all(mark.pid != pid for mark in marks[index:])


def _poll(folder: Path, rank: int, timeout_s: float) -> Iterator[list[Mark]]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield read(folder, rank)
        time.sleep(0.02)
