"""Finds and ends every process of a folder. Standard library only: the reaper runs it.

Launchers and ranks live in sessions of their own and outlive agents on
purpose, so neither process groups nor parents lead to them. What does: the
environment variable ``MARK``, which every child of a local cluster inherits, any
other ``DTRAIN_`` variable that names the folder, and the arguments of our own
daemons. An editor or shell that merely names the folder is left alone.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "DTRAIN_LOCAL_FOLDER"
_OURS = (b"dtrain.agent", b"dtrain.coordinator", b"dtrain.trainer")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Found:
    """A live process of a folder. ``module`` is what ``python -m`` runs, "" for anything else."""

    pid: int
    parent: int
    module: str
    command: tuple[str, ...]


def find(folder: Path) -> list[Found]:
    """Return the live processes that belong to ``folder`` or a folder in it, never ourselves."""
    wanted = os.fsencode(folder.resolve())
    spared = _ancestry()
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and int(entry.name) not in spared:
            process = _look(int(entry.name), wanted)
            if process is not None:
                found.append(process)
    return found


def signal_if_found(pid: int, folder: Path, number: int) -> bool:
    """Send a signal to ``pid`` if it still belongs to ``folder``; a pid used again is never hit."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # The descriptor pins the process, so what is looked at now is what gets the signal.
        if _look(pid, os.fsencode(folder.resolve())) is None:
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def end_all(folder: Path, *, timeout_s: float = 10.0) -> list[int]:
    """Kill everything of ``folder`` at once; return the pids that are still there after ``timeout_s``.

    All are stopped before the first is killed, so that none can react to the
    death of another, or start a new one.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        stopped: set[int] = set()
        while fresh := [process.pid for process in find(folder) if process.pid not in stopped]:
            for pid in fresh:
                signal_if_found(pid, folder, signal.SIGSTOP)
            stopped.update(fresh)
        if not stopped:
            return []
        for pid in stopped:
            signal_if_found(pid, folder, signal.SIGKILL)
        while left := [process.pid for process in find(folder) if process.pid in stopped]:
            if time.monotonic() > deadline:
                return left
            time.sleep(0.02)


def _look(pid: int, wanted: bytes) -> Found | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
        state, parent = stat.rpartition(")")[2].split()[:2]
        # A zombie is dead; only its parent can take it away.
        if state in ("Z", "X"):
            return None
        command = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]
        module = _module(command)
        if not _names(command, module, wanted) and not _carries(pid, wanted):
            return None
    except (OSError, ValueError):
        # Ended meanwhile, or another user's.
        return None
    words = tuple(os.fsdecode(word) for word in command)
    return Found(pid, int(parent), os.fsdecode(module), words)


def _module(command: list[bytes]) -> bytes:
    with contextlib.suppress(ValueError, IndexError):
        return command[command.index(b"-m") + 1]
    return b""


def _names(command: list[bytes], module: bytes, wanted: bytes) -> bool:
    if not module.startswith(_OURS):
        return False
    return any(_inside(word.rpartition(b"=")[2], wanted) for word in command)


def _carries(pid: int, wanted: bytes) -> bool:
    for entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name.startswith(b"DTRAIN_") and _inside(value, wanted):
            return True
    return False


def _inside(value: bytes, wanted: bytes) -> bool:
    return value == wanted or value.startswith(wanted + b"/")


def _ancestry() -> set[int]:
    """Ourselves and everything above: a cluster inside a rank must not end what runs it."""
    pid, above = os.getpid(), set()
    while pid > 0 and pid not in above:
        above.add(pid)
        try:
            stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
    return above
