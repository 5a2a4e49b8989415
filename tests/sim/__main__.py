"""Replay one seed (``--seed N``) or schedule (``--schedule FILE``), or run many seeds.

``--seeds N [--first K] [--jobs J]`` runs seeds K to K+N-1. ``--shrink`` reduces the failing schedule of
``--seed`` or ``--schedule`` and writes it to ``--out``. ``--folder DIR`` is for long runs: failures are
shrunk and written there as they come, the range done is remembered, and the next call goes on behind it.
"""

# ruff: noqa: T201 - its purpose is to print

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.sim.cluster import Result, play, run
from tests.sim.schedule import Schedule, load
from tests.sim.shrink import Shrinker, name_of

PROGRESS_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed")
    parser.add_argument("--schedule", type=Path, help="replay this schedule")
    parser.add_argument("--trace", action="store_true", help="tell what happens, line by line")
    parser.add_argument("--calm", action="store_true", help="without faults")
    parser.add_argument("--shrink", action="store_true", help="reduce what fails")
    parser.add_argument("--out", type=Path, help="where the reduced schedule goes")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that shrinking may take")
    parser.add_argument("--seeds", type=int, default=200, help="how many to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes to run them in")
    parser.add_argument("--folder", type=Path, help="failures and progress of a long run")
    parser.add_argument("--failures", type=int, default=0, help="stop at so many (0: never)")
    options = parser.parse_args()
    if options.seed is not None or options.schedule is not None:
        if options.schedule is not None:
            result = play(load(options.schedule), trace=options.trace)
        else:
            result = run(options.seed, calm=options.calm, trace=options.trace)
        show(result)
        if options.shrink and result.violations:
            small = shrink(result, options.limit, aloud=True)
            if options.out is not None:
                options.out.write_text(small.dumps())
        return 1 if result.violations else 0
    seeds = range(options.first, options.first + options.seeds)
    if options.folder is None:
        return many(seeds, options.jobs, failures_max=options.failures)
    return nightly(seeds, options.jobs, options.folder, failures_max=options.failures, limit_s=options.limit)


def show(result: Result) -> None:
    for line in result.trace:
        print(line)
    print(
        f"seed {result.seed}: {result.virtual_s:.0f} virtual s, {result.events} events,"
        f" {result.attempts} attempts, {result.commits} commits, {result.terms} terms,"
        f" as desired {result.settled_s:.0f} s and done {result.calm_s:.0f} s after the faults;"
        f" fingerprint {result.fingerprint}"
    )
    print(result.schedule.describe())
    if result.vacuous:
        print(f"vacuous: {result.vacuous}")
    for violation in result.violations:
        print(f"VIOLATION {violation}")


def shrink(result: Result, limit_s: float, *, aloud: bool = False) -> Schedule:
    """Reduce the schedule of a failed run."""
    told: Callable[[str], None] = print if aloud else (lambda _line: None)
    shrinker = Shrinker(
        result.schedule,
        result.violations[0],
        lambda schedule: play(schedule).violations,
        limit_s=limit_s,
        say=told,
    )
    small = shrinker.run()
    told(f"shrunk in {shrinker.runs} runs: {small.violation}\n{small.describe()}")
    return small


@dataclass
class Tally:
    """What many runs have shown so far."""

    done: int = 0
    failed: list[int] = field(default_factory=list)
    vacuous: int = 0
    virtual_s: float = 0.0
    attempts: int = 0
    commits: int = 0
    terms: int = 0
    settled_s: float = 0.0
    calm_s: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def add(self, result: Result) -> None:
        self.done += 1
        self.vacuous += bool(result.vacuous)
        self.virtual_s += result.virtual_s
        self.attempts += result.attempts
        self.commits += result.commits
        self.terms += result.terms
        self.settled_s = max(self.settled_s, result.settled_s)
        self.calm_s = max(self.calm_s, result.calm_s)
        if result.violations:
            self.failed.append(result.seed)

    def __str__(self) -> str:
        took_s = time.monotonic() - self.began
        return (
            f"{self.done} seeds, {len(self.failed)} failed, {self.vacuous} vacuous;"
            f" {self.virtual_s / 3600:.2f} virtual hours in {took_s:.1f} s"
            f" = {self.virtual_s / 60 / took_s:.2f} virtual hours per minute;"
            f" {self.done / took_s:.2f} seeds/s\n"
            f"{self.attempts} attempts, {self.commits} commits, {self.terms} terms;"
            f" after the faults as desired within {self.settled_s:.0f} s, done within {self.calm_s:.0f} s"
        )


@contextmanager
def results(seeds: range, jobs: int) -> Iterator[Iterator[Result]]:
    """The results of ``seeds`` in order."""
    if jobs <= 1:
        yield map(run, seeds)
        return
    # A fresh process now and then: whatever a run leaves behind in memory goes with it.
    with multiprocessing.Pool(jobs, maxtasksperchild=500) as pool:
        yield pool.imap(run, seeds)


def many(seeds: range, jobs: int, *, failures_max: int = 0) -> int:
    tally = Tally()
    with results(seeds, jobs) as found:
        for result in found:
            tally.add(result)
            if result.violations:
                print(f"seed {result.seed} FAILED: {result.violations[0].splitlines()[0]}")
                print(f"  replay: make sim SEED={result.seed}", flush=True)
                if failures_max and len(tally.failed) >= failures_max:
                    break
    print(tally)
    if tally.failed:
        print(f"failed: {' '.join(map(str, tally.failed))}")
    return 1 if tally.failed else 0


def nightly(seeds: range, jobs: int, folder: Path, *, failures_max: int, limit_s: float) -> int:
    """Run ``seeds`` from where the last call with this folder ended."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    done = json.loads(progress.read_text())["next"] if progress.exists() else seeds.start
    if done > seeds.start:
        print(f"seeds {seeds.start} to {done - 1} are done already; remove {progress} to begin anew")
    tally, said, names = Tally(), time.monotonic(), dict[str, int]()
    with results(range(max(done, seeds.start), seeds.stop), jobs) as found:
        for result in found:
            tally.add(result)
            if result.violations:
                name = name_of(result.violations[0])
                names[name] = names.get(name, 0) + 1
                print(f"seed {result.seed} FAILED: {result.violations[0].splitlines()[0]}", flush=True)
                _keep(folder, result, name, limit_s if names[name] == 1 else 0.0)
            progress.write_text(json.dumps({"first": seeds.start, "next": result.seed + 1}))
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                print(f"up to seed {result.seed}: {tally}", flush=True)
            if failures_max and len(tally.failed) >= failures_max:
                print(f"stopped at {failures_max} failures")
                break
    print(tally)
    for name, count in sorted(names.items()):
        print(f"{count:5} x {name}")
    return 1 if tally.failed else 0


def _keep(folder: Path, result: Result, name: str, limit_s: float) -> None:
    """Write a failure down: as it was, and the first of each name as small as it gets."""
    schedule = result.schedule
    path = folder / f"seed-{result.seed}.json"
    if limit_s:
        schedule = shrink(result, limit_s)
        print(schedule.describe(), flush=True)
    path.write_text(schedule.dumps())
    (folder / f"seed-{result.seed}.txt").write_text(
        f"{name}\n{schedule.describe()}\n\n{result.violations[0]}\n"
    )
    print(f"  replay: python -m tests.sim --schedule {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
