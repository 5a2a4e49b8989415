"""Processes that SIGKILL does not end: frozen by the first version of the cgroup freezer.

A task in it sits in the kernel, shows state D, and dies only when it is thawed,
just as one that waits for a hung NFS server does. (The second version's freezer
lets SIGKILL through.) Needs root.
"""

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

WAIT_S = 10.0


class Freezer:
    """One group of frozen processes. ``close`` thaws them and removes it."""

    def __init__(self, name: str) -> None:
        self._mounted: Path | None = None
        self._group = self._root() / f"dtrain-{name}-{os.getpid()}"
        self._group.mkdir()

    def __enter__(self) -> "Freezer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def freeze(self, pid: int) -> None:
        """Freeze a process with all its threads; return once it is."""
        (self._group / "cgroup.procs").write_text(str(pid))
        self._set("FROZEN")

    def thaw(self) -> None:
        """Let all of them go on, or die of what was sent to them meanwhile."""
        self._set("THAWED")

    def close(self) -> None:
        self.thaw()
        deadline = time.monotonic() + WAIT_S
        for pid in (self._group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        while (self._group / "cgroup.procs").read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._group.rmdir()
        if self._mounted is not None:
            subprocess.run(["umount", str(self._mounted)], check=True)
            self._mounted.rmdir()

    def _set(self, state: str) -> None:
        file = self._group / "freezer.state"
        file.write_text(state)
        deadline = time.monotonic() + WAIT_S
        while file.read_text().strip() != state:
            assert time.monotonic() < deadline, f"the group does not become {state}"
            time.sleep(0.02)

    def _root(self) -> Path:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, kind, options, *_ = line.split()
            if kind == "cgroup" and "freezer" in options.split(","):
                return Path(where)
        self._mounted = Path(tempfile.mkdtemp(prefix="freezer-"))
        subprocess.run(["mount", "-t", "cgroup", "-o", "freezer", "none", str(self._mounted)], check=True)
        return self._mounted
