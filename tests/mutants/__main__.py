"""Apply every mutant and see it caught: ``python -m tests.mutants [--only ID ...] [--jobs N]``."""

# ruff: noqa: T201 - its purpose is to print

import argparse
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.runner import Copy, Ran, is_test

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="these; a part of the id will do")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree that work at once")
    parser.add_argument("--skip-check", action="store_true", help="do not run killers on the unmutated tree")
    parser.add_argument("--verbose", action="store_true", help="show what every killer said")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if not options.only or any(part in m.id for part in options.only)]
    if not mutants:
        print("no such mutant")
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dtrain-mutants-") as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(options.jobs)]
        if foreign := copies[0].foreign():
            print("the copy is not what would be tested:", *foreign, sep="\n  ")
            return 1
        bad = 0
        try:
            if not options.skip_check:
                bad += healthy(copies, mutants)
            if not bad:
                bad += caught(copies, mutants, verbose=options.verbose)
        finally:
            # Interrupted: what runs in a thread's hands would go on without us.
            for copy in copies:
                copy.sweep()
    took_s = time.monotonic() - began
    print(f"{len(mutants)} mutants, {bad} not caught, {took_s:.0f} s")
    return 1 if bad else 0


def healthy(copies: list[Copy], mutants: list[Mutant]) -> int:
    """Run each killer on the unmutated tree; return how many do not pass."""
    bad = 0
    killers = list(dict.fromkeys(mutant.killer for mutant in mutants))
    # All tests in a few goes where that works: most of a single test's time is the start of pytest.
    tests = sorted({node for killer in killers if is_test(killer) for node in killer})
    groups = [tuple(tests[number :: len(copies)]) for number in range(len(copies))]
    together = [ran.outcome for _, ran in spread(copies, [g for g in groups if g], lambda c, g: c.run(g))]
    if all(outcome == "passed" for outcome in together):
        killers = [killer for killer in killers if not is_test(killer)]
    for killer, ran in spread(copies, killers, lambda copy, killer: copy.run(killer)):
        if ran.outcome != "passed":
            bad += 1
            print(f"NOT HEALTHY {' '.join(killer)}\n{ran.output[-3000:]}", flush=True)
    print(f"without any mutant {bad or 'none'} of the killers fail", flush=True)
    return bad


def caught(copies: list[Copy], mutants: list[Mutant], *, verbose: bool) -> int:
    """Run every mutant against its killer; return how many were not caught."""
    bad = 0
    for mutant, ran in spread(copies, mutants, lambda copy, mutant: copy.judge(mutant)):
        word = {"failed": "caught", "passed": "SURVIVED", "broken": "BROKEN"}[ran.outcome]
        print(f"{word:9} {mutant.id:45} {ran.seconds:6.1f} s  {mutant.killer[-1]}", flush=True)
        if ran.outcome != "failed":
            bad += 1
            print(f"  {mutant.breaks}\n{ran.output[-2500:]}", flush=True)
        elif verbose:
            print(ran.output[-2500:], flush=True)
    return bad


def spread(copies: list[Copy], items: Iterable[T], do: Callable[[Copy, T], Ran]) -> Iterable[tuple[T, Ran]]:
    """Do the items on the copies, one at a time on each; yield them in the order in which they end."""
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    count = waiting.qsize()
    done: queue.SimpleQueue[tuple[T, Ran] | BaseException] = queue.SimpleQueue()

    def work(copy: Copy) -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, do(copy, item)))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                done.put(error)
                return

    threads = [threading.Thread(target=work, args=(copy,), daemon=True) for copy in copies]
    for thread in threads:
        thread.start()
    for _ in range(count):
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        yield result


if __name__ == "__main__":
    sys.exit(main())
