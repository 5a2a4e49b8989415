"""Starts the dashboard's process beside the guardian, and again when it ends. Standard library only.

The guardian's thread for it only waits: nothing that the dashboard does can
delay a renewal. It is a child of the guardian and not of the coordinator, so
that a page stays open while leadership changes and coordinators are restarted.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from dtrain.runtime.notify import VARIABLES as NOTIFY_VARIABLES

PARENT_VARIABLE = "DTRAIN_DASHBOARD_PARENT"
"""Pid of the guardian: the dashboard ends with it."""

EX_CONFIG = 78
BACKOFF_S_FIRST, BACKOFF_S_MAX, BACKOFF_RESET_S = 0.5, 30.0, 60.0


class DashboardKeeper:
    """Runs ``python -m dtrain.coordinator.web`` with ``argv``, for as long as this process lives."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        # -P: a folder named dtrain in the working directory is not this program.
        self._argv = (sys.executable, "-P", "-m", "dtrain.coordinator.web", *argv)
        self._env = {name: value for name, value in environ.items() if name not in NOTIFY_VARIABLES}
        self._env[PARENT_VARIABLE] = str(os.getpid())
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return at once."""
        threading.Thread(target=self._run, name="dashboard", daemon=True).start()

    def stop(self) -> None:
        """Tell it to end; whatever it does, it is gone with this process."""
        self._ending.set()
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                process.terminate()

    def _run(self) -> None:
        backoff_s = BACKOFF_S_FIRST
        while not self._ending.is_set():
            began = time.monotonic()
            # The kernel's parent-death signal follows this thread, which ends with the process.
            try:
                self._process = subprocess.Popen(
                    self._argv, env=self._env, process_group=0, stdin=subprocess.DEVNULL
                )
                code = self._process.wait()
            except OSError as error:
                sys.stderr.write(f"dtrain coordinator: the dashboard cannot be started: {error}\n")
                code = 1
            if code == EX_CONFIG:
                # It has said why; the same settings would not do any better.
                return
            backoff_s = BACKOFF_S_FIRST if time.monotonic() - began > BACKOFF_RESET_S else backoff_s
            self._ending.wait(backoff_s)
            backoff_s = min(BACKOFF_S_MAX, 2 * backoff_s)
