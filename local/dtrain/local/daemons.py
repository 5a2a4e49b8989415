"""One daemon of a local cluster: its guardian, what runs below it, and its log.

A daemon's process tree: the guardian (our child, dies with us), the real
process below it, and for agents launchers and ranks, which belong to nobody
but are found by their folder (``sweeping``).
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from dtrain.local import sweeping
from dtrain.local.sweeping import Found

T = TypeVar("T")


class Keeper:
    """A thread that starts processes and lives as long as they should.

    The kernel's parent-death signal comes at the end of the *thread* that
    started a process, so none may be started from a thread that passes by.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"keeper-{name}", daemon=True)
        self._thread.start()

    def begin(self, function: Callable[[], T]) -> Callable[[], T]:
        """Run ``function`` in the thread; call what is returned to get its result or error."""
        done = threading.Event()
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome["result"] = function()
            except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
                outcome["error"] = error
            done.set()

        self._work.put(work)

        def result() -> T:
            # In slices, so that a signal handler of the main thread gets its turn.
            while not done.wait(0.2):
                pass
            if "error" in outcome:
                raise outcome["error"]
            found: T = outcome["result"]
            return found

        return result

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the thread and return its result."""
        return self.begin(function)()

    def close(self) -> None:
        """End the thread, and with it what it started that is still alive."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class Daemon:
    """A coordinator or an agent. ``folder`` is what its processes are known by."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        log_path: Path,
        env: Mapping[str, str],
        keeper: Keeper,
    ) -> None:
        self.name = name
        self.folder = folder
        self.log_path = log_path
        self._command = tuple(command)
        self._env = dict(env)
        self._keeper = keeper
        self._process: subprocess.Popen[bytes] | None = None

    def use(self, python: str) -> None:
        """Run it with this interpreter from its next start on: another environment is another release."""
        self._command = (python, *self._command[1:])

    def start(self) -> None:
        """Start it; does nothing while it runs."""
        if not self.is_running:
            self._keeper.call(self._spawn)

    @property
    def is_running(self) -> bool:
        """Its guardian is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How its guardian ended; None while it runs or has not been started."""
        return self._process.poll() if self._process is not None else None

    @property
    def guardian_pid(self) -> int | None:
        """The guardian, None while it does not run."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def process_pid(self) -> int | None:
        """The real process below the guardian, None while there is none."""
        guardian = self.guardian_pid
        if guardian is None:
            return None
        children = [found for found in sweeping.find(self.folder) if found.parent == guardian]
        # A guardian may inherit orphaned launchers; those are not what it guards.
        guarded = [found for found in children if not _is_launcher(found) and not _is_dashboard(found)]
        return max(found.pid for found in guarded) if guarded else None

    def launcher_pids(self) -> list[int]:
        """Launchers of this agent, one per job."""
        everything = sweeping.find(self.folder)
        launchers = {found.pid for found in everything if _is_launcher(found)}
        # Ranks are forked from their launcher and look just like it.
        return sorted(
            found.pid for found in everything if found.pid in launchers and found.parent not in launchers
        )

    def pids(self) -> list[int]:
        """Everything alive that belongs to it: guardian, process, launchers, ranks and their children."""
        pids = {found.pid for found in sweeping.find(self.folder)}
        if self.guardian_pid is not None:
            pids.add(self.guardian_pid)
        for pid in tuple(pids):
            with contextlib.suppress(psutil.Error):
                pids |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        return sorted(pids)

    def send(self, number: int) -> bool:
        """Send a signal to the guardian."""
        if self._process is None or not self.is_running:
            return False
        self._process.send_signal(number)
        return True

    def terminate(self) -> None:
        """Ask it to stop cleanly; a frozen one is thawed, or it would not hear it."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the guardian's end; False if it still runs."""
        if self._process is None:
            return True
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True

    def power_cut(self) -> None:
        """Kill everything that belongs to it at once, as if its machine had lost power."""
        pids = []
        while fresh := [pid for pid in self.pids() if pid not in pids]:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            pids += fresh
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self.wait(5.0)
        sweeping.end_all(self.folder)

    def log_tail(self, lines: int = 5) -> str:
        """The end of its log, on one line."""
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError:
            return "it wrote no log"
        return " | ".join(text.strip().splitlines()[-lines:])[-1000:]

    def _spawn(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "dtrain.local.exec_pdeathsig", *self._command]
        env = self._env | {sweeping.MARK: str(self.folder), "DTRAIN_PARENT_PID": str(os.getpid())}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                # The terminal's Ctrl-C is for us: we stop things in order.
                start_new_session=True,
            )


def _is_launcher(found: Found) -> bool:
    return found.module == "dtrain.agent.launcher"


def _is_dashboard(found: Found) -> bool:
    return found.module == "dtrain.coordinator.web"


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
