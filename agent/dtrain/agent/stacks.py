"""What ranks do, seen from outside: their state, their wait for a CPU, and their stacks.

A rank that was started as a Python program, and any script that has joined through the SDK, writes the
stacks of its threads to ``stacks.log`` in its log folder when it is sent a real-time signal; the handler
is C code that needs no interpreter lock, so it answers from within a collective too. Other programs are
asked through ``py-spy``, if it is installed. Whoever handles no such signal is never sent one: it would die.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.agent.core import stacktext
from dtrain.agent.core.events import Event, RankLook, StacksCollected, StacksShown
from dtrain.agent.core.stacktext import Frames
from dtrain.agent.launch import processes as proc
from dtrain.agent.launching import ProcessId
from dtrain.agent.logs import RankLogs
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import Attempt, JobName, Rank, Uid
from dtrain.protocol.ranklink import STACKS_SIGNAL
from dtrain.protocol.snapshot import Stack, StackKind
from dtrain.runtime.clock import iso

AGAIN_S = 0.7
"""Between the two looks at a rank's stack."""
ANSWER_S_MAX = 1.0
QUIET_S = 0.06
"""A dump is whole when it has got to the main thread and nothing has come for so long."""
QUIET_S_MAX = 0.3
"""The same for one whose main thread did not take the signal."""
PY_SPY_S_MAX = 5.0
TEXT_BYTES_MAX = 256 * 1024
CHILDREN_MAX = 32
THREADS_MAX = 16
FORGET_S = 15.0
"""A look that is older is no beginning for the next one."""
FILE_BYTES = 1 << 20
"""Who has read or written so much between two looks goes on."""


@dataclass(slots=True)
class Glimpse:
    """One rank, and what it has started, at one moment."""

    state: str = ""
    text: str = ""
    main: Frames = ()
    workers: dict[int, Frames] = field(default_factory=dict)
    cpu_s: dict[int, float] = field(default_factory=dict)
    """Of the rank itself first."""
    main_s: float = 0.0
    """CPU time of the rank's main thread alone: others report to the agent while it waits."""
    file_bytes: int = 0
    at: float = 0.0

    def frames(self, pid: int) -> Frames:
        """Of the main thread of one of them."""
        return self.workers.get(pid, ()) if pid in self.workers else self.main


class RankWatch:
    """``driver.WatchPort``. ``post`` hands an event to the driver's thread."""

    def __init__(self, logs: RankLogs, post: Callable[[Event], None]) -> None:
        self._logs = logs
        self._post = post
        self._delays: dict[int, tuple[float, dict[int, float]]] = {}
        self._pool = ThreadPoolExecutor(THREADS_MAX, "stacks")
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        """Two dumps into one file would be read as one."""

    def look(self, rank: Rank, process: ProcessId) -> RankLook:
        """Return how a rank is now, and how long it has waited for a CPU since it was looked at last."""
        seen = proc.look(process.pid)
        if seen is None or seen.start_time != process.start_time:
            return RankLook(rank, "")
        now = time.monotonic()
        delays = proc.run_delays(process.pid)
        for child in _children(process.pid):
            delays.update(proc.run_delays(child))
        at, before = self._delays.get(process.pid, (0.0, {}))
        self._delays = {pid: one for pid, one in self._delays.items() if now - one[0] < FORGET_S}
        self._delays[process.pid] = (now, delays)
        if now - at > FORGET_S:
            before = {}
        # Of the thread that waited longest: the others may well wait for it.
        waited = (delay - before[thread] for thread, delay in delays.items() if thread in before)
        return RankLook(rank, seen.state, max(0.0, max(waited, default=0.0)))

    def collect(
        self, job: JobName, uid: Uid, attempt: Attempt, dump: str, processes: Mapping[Rank, ProcessId]
    ) -> None:
        """Collect stacks, twice, in the background; they come back as ``StacksCollected``."""
        args = (job, uid, attempt, dump, dict(processes))
        threading.Thread(target=self._collect, args=args, name="stacks", daemon=True).start()

    def now(
        self, job: JobName, uid: Uid, attempt: Attempt, processes: Mapping[Rank, ProcessId], why: str
    ) -> list[tuple[Stack, str]]:
        """Collect stacks for a person, once: each in short and in full."""
        found = self._glimpse_all(job, uid, attempt, processes, why)
        self._post(StacksShown(job, uid, attempt))
        return [(_stack(rank, "", one, None), one.text) for rank, one in found.items()]

    def _collect(
        self, job: JobName, uid: Uid, attempt: Attempt, dump: str, processes: Mapping[Rank, ProcessId]
    ) -> None:
        try:
            first = self._glimpse_all(job, uid, attempt, processes, dump)
            time.sleep(AGAIN_S)
            second = self._glimpse_all(job, uid, attempt, processes, dump)
            stacks = tuple(_stack(rank, dump, first[rank], second[rank]) for rank in processes)
        except Exception as error:  # noqa: BLE001 - the leader waits for an answer, whatever it is
            why = f"{type(error).__name__}: {error}"[: stacktext.WHERE_CHARS_MAX]
            stacks = tuple(Stack(rank, StackKind.UNKNOWN, why, dump) for rank in processes)
        self._post(StacksCollected(job, uid, attempt, dump, stacks))

    def _glimpse_all(
        self, job: JobName, uid: Uid, attempt: Attempt, processes: Mapping[Rank, ProcessId], why: str
    ) -> dict[Rank, Glimpse]:
        def one(rank: Rank) -> Glimpse:
            try:
                path = self._logs.find(job, uid, attempt, rank, "stacks").path
                with self._locks[path]:
                    return _glimpse(processes[rank], path, why)
            except (DtrainError, OSError) as error:
                return Glimpse(text=f"no stacks: {error}\n", at=time.monotonic())

        return dict(zip(processes, self._pool.map(one, processes), strict=True))


def _glimpse(process: ProcessId, path: Path, why: str) -> Glimpse:
    seen = proc.look(process.pid)
    if seen is None or seen.start_time != process.start_time:
        return Glimpse(text="the rank has ended\n", at=time.monotonic())
    found = Glimpse(seen.state, main_s=proc.main_cpu_s(process.pid), at=time.monotonic())
    for pid in (process.pid, *_children(process.pid)):
        state = proc.look(pid)
        if state is None or state.is_zombie:
            continue
        who = "rank" if pid == process.pid else f"pid {state.parent}'s process"
        text = _dump(pid, state.state, path, f"{iso(time.time())} {who}, pid {pid} ({why})")
        found.text += text
        frames = stacktext.main_thread(text)
        if pid == process.pid:
            found.main = frames
        else:
            found.workers[pid] = frames
        found.cpu_s[pid] = proc.cpu_s(pid)
        found.file_bytes += proc.file_bytes(pid)
    return found


def _dump(pid: int, state: str, path: Path, title: str) -> str:
    """Have one process write its stacks; return what it wrote, with a heading."""
    head = f"\n== {title}\n"
    if state in ("T", "t"):
        return _note(path, f"{head}   it is stopped, by a signal or a debugger\n")
    if not proc.catches(pid, STACKS_SIGNAL):
        return _note(path, head + _foreign(pid))
    _note(path, head)
    begin = path.stat().st_size
    process = proc.identify(pid)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return head
    try:
        if process is not None and proc.catches(pid, STACKS_SIGNAL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, STACKS_SIGNAL)
    finally:
        os.close(pidfd)
    return head + _read(path, begin)


def _read(path: Path, begin: int) -> str:
    """Wait until nothing more is written; return it."""
    deadline = time.monotonic() + ANSWER_S_MAX
    text, grown_at = "", time.monotonic()
    while (now := time.monotonic()) < deadline:
        with path.open("rb") as file:
            file.seek(begin)
            new = file.read(TEXT_BYTES_MAX).decode(errors="replace")
        if new != text:
            text, grown_at = new, now
        quiet_s = now - grown_at
        if text and quiet_s >= (QUIET_S if stacktext.is_complete(text) else QUIET_S_MAX):
            break
        time.sleep(0.01)
    return text


def _note(path: Path, text: str) -> str:
    with path.open("a") as file:
        file.write(text)
    return text


def _foreign(pid: int) -> str:
    """The stacks of a program that does not answer the signal."""
    tool = shutil.which("py-spy")
    # Whole names tell libraries from scripts; older releases do not know the flag.
    for names in (("--full-filenames",), ()) if tool is not None else ():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [str(tool), "dump", "--nonblocking", *names, "--pid", str(pid)],
                capture_output=True,
                timeout=PY_SPY_S_MAX,
                check=False,
            )
            if done.returncode == 0:
                return done.stdout[:TEXT_BYTES_MAX].decode(errors="replace")
    return f"   it does not answer; it waits in the kernel function {proc.waits_in(pid) or 'unknown'}\n"


def _children(pid: int) -> list[int]:
    """What a rank has started, such as the workers of its data loader."""
    found: list[int] = []
    for thread in proc.threads(pid):
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            if len(found) < CHILDREN_MAX:
                found += [child, *_children(child)]
    return found[:CHILDREN_MAX]


def _stack(rank: Rank, dump: str, first: Glimpse, second: Glimpse | None) -> Stack:
    """A rank's stack in short, from two looks at it."""
    last = second or first
    busy = second is not None and second.main_s - first.main_s >= stacktext.IDLE_SHARE * (
        second.at - first.at
    )
    # Seen twice, or it was but a moment.
    state = last.state if second is None or first.state == second.state else "S"
    kind = stacktext.classify(last.main, state, busy=busy)
    frames = last.main
    if kind is StackKind.DATA:
        frames = stacktext.deepest_of_workers(list(last.workers.values())) or frames
    text = stacktext.where(frames)
    return Stack(rank, kind, text, dump, moving=second is not None and _is_moving(first, second))


def _is_moving(first: Glimpse, second: Glimpse) -> bool:
    if second.file_bytes - first.file_bytes >= FILE_BYTES:
        return True
    for pid in first.cpu_s:
        one, other = first.frames(pid), second.frames(pid)
        # What gives no stack and uses the CPU may do anything.
        if _is_busy(first, second, pid) and not (one and stacktext.is_same(one, other)):
            return True
    return False


def _is_busy(first: Glimpse, second: Glimpse, pid: int) -> bool:
    used_s = second.cpu_s.get(pid, 0.0) - first.cpu_s[pid]
    return used_s >= stacktext.IDLE_SHARE * (second.at - first.at)
