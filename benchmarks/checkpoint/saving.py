"""Stall, CPU time and memory of a save: 0.3 GB in 32 MiB tensors, one rank.

Every round starts a process for each mode and lets them save in turn: first once each, then warm,
A B C A B C. Only one of them does anything at a time.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checkpoint.modes import MODES
from benchmarks.checkpoint.worker import STATE_BYTES
from benchmarks.report import Result, result

WARM = 3
SETTLE_S = 1.0
"""From the end of the first step to the first save: a run that saves in its very first second is rare."""

_GB = STATE_BYTES / 1e9
_MIB = 1024 * 1024


def measure(rounds: int) -> list[Result]:
    """Save in all modes, interleaved."""
    first: dict[str, list[float]] = {name: [] for name in MODES}
    warm: dict[str, list[float]] = {name: [] for name in MODES}
    cpu: dict[str, list[float]] = {name: [] for name in MODES}
    prepared: list[float] = []
    extra: list[float] = []
    for _ in range(rounds):
        with _workers() as workers:
            idle = _own_bytes(workers["ours"].family())
            once = workers["ours"].do("prepare")
            time.sleep(SETTLE_S)
            prepared.append(once["stall_s"] * 1e3 / _GB)
            for name, worker in workers.items():
                first[name].append(worker.do("save")["stall_s"] * 1e3 / _GB)
            for _ in range(WARM):
                for name, worker in workers.items():
                    saved = worker.do("save")
                    warm[name].append(saved["stall_s"] * 1e3 / _GB)
                    cpu[name].append(saved["cpu_s"] / _GB)
            extra.append((workers["ours"].peak_bytes() - idle - STATE_BYTES) / _MIB)
    # The one stall at the first step belongs to the first save: it is what makes that short.
    ours_first = [a + b for a, b in zip(prepared, first["ours"], strict=True)]
    ours = "ours"
    return [
        result(
            "first-save stall, what is done ahead at the first step included", "ms/GB", ours_first,
            first["DCP async"], "DCP async", ratio_max=0.5,
        ),
        result("warm stall", "ms/GB", warm[ours], warm["torch.save"], "torch.save", ratio_max=0.2),
        result("warm stall", "ms/GB", warm[ours], warm["DCP async"], "DCP async", ratio_max=0.45),
        result(
            "warm stall", "ms/GB", warm[ours], warm["DCP async, reused stager"], "DCP async, reused stager",
            ratio_max=1.05,
        ),
        result(
            "CPU of a save to disk, checksummed and synced", "s/GB", cpu[ours], cpu["DCP save"], "DCP save",
            ratio_max=0.7,
        ),
        result("extra memory beyond one copy of the state", "MiB", extra, [], "", ours_max=64.0),
    ]  # fmt: skip


class _Worker:
    """One process of ``worker.py``."""

    def __init__(self, mode: str, folder: Path) -> None:
        folder.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.checkpoint.worker", mode, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, order: str) -> dict[str, Any]:
        """Let it work, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self.answer()

    def family(self) -> list[psutil.Process]:
        """The process and its children."""
        own = psutil.Process(self._process.pid)
        return [own, *own.children()]

    def peak_bytes(self) -> int:
        """One more save, watched: the most that it and its children have as their own and share."""
        family = self.family()
        done = threading.Event()
        seen = [_own_bytes(family)]

        def watch() -> None:
            while not done.wait(0.01):
                seen.append(_own_bytes(family))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            shared: int = self.do("save")["shared_bytes"]
        finally:
            done.set()
            watcher.join()
        return max(seen) + shared

    def end(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.write("quit\n")
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _workers() -> Iterator[dict[str, _Worker]]:
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        workers = {mode: _Worker(mode, Path(name) / f"{number}") for number, mode in enumerate(MODES)}
        try:
            for worker in workers.values():
                worker.answer()
            yield workers
        finally:
            for worker in workers.values():
                worker.end()


def _own_bytes(family: list[psutil.Process]) -> int:
    return sum(
        int(line.split()[1]) * 1024
        for process in family
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Anonymous:")
    )
