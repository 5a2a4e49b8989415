"""Replay one seed (``--seed N [--trace]``) or run many (``--seeds N [--first K] [--jobs J]``)."""

# ruff: noqa: T201 - its purpose is to print

import argparse
import multiprocessing
import sys
import time
from contextlib import nullcontext

from tests.sim.cluster import Result, run


def one(seed: int) -> Result:
    return run(seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed")
    parser.add_argument("--trace", action="store_true", help="tell what happens, line by line")
    parser.add_argument("--calm", action="store_true", help="without faults")
    parser.add_argument("--seeds", type=int, default=200, help="how many to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes to run them in")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed, calm=options.calm, trace=options.trace)
    return many(range(options.first, options.first + options.seeds), options.jobs)


def replay(seed: int, *, calm: bool, trace: bool) -> int:
    result = run(seed, calm=calm, trace=trace)
    for line in result.trace:
        print(line)
    print(
        f"seed {seed}: {result.virtual_s:.0f} virtual s, {result.events} events, {result.attempts} attempts,"
        f" {result.commits} commits, {result.terms} terms, calm after {result.calm_s:.0f} s;"
        f" fingerprint {result.fingerprint}"
    )
    print(f"faults: {', '.join(result.faults) or 'none'}")
    for violation in result.violations:
        print(f"VIOLATION {violation}")
    return 1 if result.violations else 0


def many(seeds: range, jobs: int) -> int:
    began = time.monotonic()
    virtual_s, failed, done, attempts, commits, terms = 0.0, [], 0, 0, 0, 0
    slowest = 0.0
    with multiprocessing.Pool(jobs) if jobs > 1 else nullcontext() as pool:
        for result in map(one, seeds) if pool is None else pool.imap(one, seeds):
            slowest = max(slowest, result.calm_s)
            done += 1
            virtual_s += result.virtual_s
            attempts, commits, terms = (
                attempts + result.attempts,
                commits + result.commits,
                terms + result.terms,
            )
            if result.violations:
                failed.append(result.seed)
                print(f"seed {result.seed} FAILED: {result.violations[0].splitlines()[0]}")
                print(f"  replay: make sim SEED={result.seed}", flush=True)
    took_s = time.monotonic() - began
    print(
        f"{done} seeds, {len(failed)} failed; {virtual_s / 3600:.2f} virtual hours in {took_s:.1f} s"
        f" = {virtual_s / 60 / took_s:.2f} virtual hours per minute; {done / took_s:.2f} seeds/s"
    )
    print(
        f"{attempts} attempts, {commits} commits, {terms} terms; done at most {slowest:.0f} s into the calm"
    )
    if failed:
        print(f"failed: {' '.join(map(str, failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
