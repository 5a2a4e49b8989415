"""Plays a story once for each of its crash points."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.crashpoints import ports
from tests.crashpoints.ports import Call


@dataclass(frozen=True, slots=True)
class Tally:
    """``calls`` of the run without a death; ``problems``: what the deaths broke."""

    calls: tuple[Call, ...]
    deaths: int
    problems: tuple[str, ...]


def fast_folder() -> str | None:
    """Memory, where there is some: it is not the disk that is tested here."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def play_story(folder: Path, story: str, choose: Callable[[Sequence[Call]], Sequence[int]]) -> Tally:
    """Record the story, then die at each chosen call, before it and after it."""
    clean = _run(folder, story)
    problems = [f"{story}, without a death: {problem}" for problem in clean.problems]
    deaths = 0
    for at in choose(clean.calls):
        for after in (False, True):
            deaths += 1
            outcome = _run(folder, story, at, after=after)
            where = f"{story}, {'after' if after else 'before'} call {at} ({clean.calls[at]})"
            if outcome.calls[: at + 1] != clean.calls[: at + 1]:
                problems.append(f"{where}: the run is not the recorded one")
            elif outcome.died is None:
                problems.append(f"{where}: nobody died")
            elif outcome.problems:
                problems.append(f"{where}: {'; '.join(outcome.problems)}")
    return Tally(clean.calls, deaths, tuple(problems))


def _run(folder: Path, story: str, at: int | None = None, *, after: bool = False) -> ports.Outcome:
    root = folder / "stage"
    try:
        return ports.run(root, at, after=after, story=story)
    finally:
        shutil.rmtree(root, ignore_errors=True)
