"""Processes as /proc shows them: identity, descent, threads."""

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.agent.launching import ProcessId


@dataclass(frozen=True, slots=True)
class Seen:
    """One process at one moment."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_time: int

    @property
    def is_zombie(self) -> bool:
        return self.state in {"Z", "X"}


@functools.cache
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def look(pid: int, path: str = "") -> Seen | None:
    """The process with this pid, zombies included; None if there is none. ``path``: of one of its threads."""
    try:
        # Not through Path: a clean-up reads this file of every process of the machine.
        descriptor = os.open(path or f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(descriptor, 4096).decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(descriptor)
    # The name is in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return Seen(
        pid=pid,
        state=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        start_time=int(fields[19]),
    )


def look_around() -> dict[int, Seen]:
    """Every process of this pid namespace."""
    found = (look(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    return {seen.pid: seen for seen in found if seen is not None}


def identify(pid: int) -> ProcessId | None:
    """The lasting identity of a pid; a zombie still has one."""
    seen = look(pid)
    return None if seen is None else ProcessId(pid, seen.start_time, boot_id())


def is_alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs; a zombie does not, unless one of its threads lives on."""
    seen = look(process.pid)
    return (
        seen is not None
        and seen.start_time == process.start_time
        and process.boot_id == boot_id()
        and not is_over(seen)
    )


def is_over(seen: Seen) -> bool:
    """Whether a process is a zombie through and through: its first thread may be one while others live on."""
    return seen.is_zombie and not _living_threads(seen.pid)


def waits_in(pid: int) -> str:
    """The kernel function that a process waits in; "" if it runs, is gone, or the kernel does not tell.

    Of its threads, the one that cannot be interrupted: the first thread is often a zombie by then.
    """
    threads = _living_threads(pid)
    ordered = sorted(threads, key=lambda thread: (threads[thread] != "D", thread))
    for thread in ordered:
        try:
            text = Path(f"/proc/{pid}/task/{thread}/wchan").read_text().strip("\0\n ")
        except OSError:
            continue
        if text not in ("", "0"):
            return text
    return ""


def _living_threads(pid: int) -> dict[int, str]:
    """The state of each thread that is no zombie."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
    except OSError:
        return {}
    found = {}
    for name in threads:
        seen = look(int(name), f"/proc/{pid}/task/{name}/stat")
        if seen is not None and not seen.is_zombie:
            found[int(name)] = seen.state
    return found


def descendants(of: int, around: Mapping[int, Seen]) -> set[int]:
    """The pids below ``of``, without itself."""
    children: dict[int, list[int]] = {}
    for seen in around.values():
        children.setdefault(seen.parent, []).append(seen.pid)
    found: set[int] = set()
    ahead = [of]
    while ahead:
        for pid in children.get(ahead.pop(), ()):
            if pid not in found:
                found.add(pid)
                ahead.append(pid)
    return found


def catches(pid: int, number: int) -> bool:
    """Whether the process handles this signal: one that does not is ended by it."""
    try:
        with Path(f"/proc/{pid}/status").open() as file:
            found = next(line for line in file if line.startswith("SigCgt:"))
        return bool(int(found.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError, StopIteration):
        return False


def run_delays(pid: int) -> dict[int, float]:
    """By thread: how long it has waited for a CPU since it began, s."""
    return {int(thread): _schedule(pid, thread)[1] for thread in threads(pid)}


def cpu_s(pid: int) -> float:
    """CPU time that the threads of a process have used, or waited for, s; 0.0 if it is gone.

    Where a CPU is short, who gets none is as busy as who does.
    """
    total = 0.0
    for thread in threads(pid):
        run_s, waited_s = _schedule(pid, thread)
        total += run_s + waited_s
    return total


def main_cpu_s(pid: int) -> float:
    """The same of a process's first thread alone."""
    return sum(_schedule(pid, str(pid)))


def threads(pid: int) -> list[str]:
    """The threads of a process, by their ids as text; none if it is gone."""
    try:
        return os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
    except OSError:
        return []


def _schedule(pid: int, thread: str) -> tuple[float, float]:
    """Seconds that a thread has run, and waited for a CPU; zeros if the kernel does not tell."""
    try:
        with open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:  # noqa: PTH123
            words = file.read().split()
        return int(words[0]) / 1e9, int(words[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0, 0.0


def file_bytes(pid: int) -> int:
    """Bytes that a process has read and written by system calls on files; 0 if that is not to be had."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    except (OSError, ValueError, IndexError):
        return 0


def environment_value(pid: int, name: str) -> str | None:
    """A variable of the environment a process was exec'd with."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    start = f"{name}=".encode()
    for item in block.split(b"\0"):
        if item.startswith(start):
            return item[len(start) :].decode(errors="replace")
    return None


def thread_count() -> int:
    """Threads of this process, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def thread_names() -> list[str]:
    """Names of this process's threads as the kernel has them, the first thread's first."""
    own = os.getpid()
    names = []
    for thread in sorted(os.listdir("/proc/self/task"), key=lambda name: (int(name) != own, int(name))):  # noqa: PTH208
        try:
            names.append(Path(f"/proc/self/task/{thread}/comm").read_text().strip())
        except OSError:
            continue  # it has ended
    return names


def open_descriptors() -> dict[int, str]:
    """This process's descriptors and what they point at."""
    found = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except OSError:
            continue  # the descriptor of the listing itself
    return found


def close_descriptors(keep: Iterable[int]) -> None:
    """Close all descriptors of this process but 0, 1, 2 and ``keep``."""
    spared = {0, 1, 2, *keep}
    for descriptor in open_descriptors():
        if descriptor not in spared:
            try:
                os.close(descriptor)
            except OSError:
                continue
