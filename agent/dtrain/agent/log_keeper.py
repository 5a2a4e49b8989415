"""Deletes logs of attempts that are over, so that a machine that runs for months does not fill its disk.

A thread of its own: it looks at files only, nothing waits for it, and what it cannot delete it leaves. Which
logs may go is decided in ``core/keeping.py``; ``dtrain logs`` reads them from the store from then on.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from dtrain.agent.archiver import is_copied
from dtrain.agent.core.keeping import YOUNG_S, Kept, surplus
from dtrain.runtime.clock import Clock

LOOK_S_FIRST, LOOK_S = 60.0, 3600.0
"""From the agent's start to the first look, and between two."""

GONE = ".gone-"
"""Begins the name of a folder that is being deleted: no reader finds half of an attempt."""


class LogKeeper:
    """``busy``: folders of attempts that run or are still to be copied; ``here``: of jobs on this machine."""

    def __init__(
        self,
        root: Path,
        *,
        busy: Callable[[], Collection[Path]],
        here: Callable[[], Collection[Path]],
        clock: Clock,
        keep_s: float,
        bytes_max: int,
        log: Callable[..., None],
    ) -> None:
        self._root = root
        self._busy, self._here = busy, here
        self._clock = clock
        self._keep_s, self._bytes_max = keep_s, bytes_max
        self._log = log
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look now and then until ``close``."""
        wait_s = LOOK_S_FIRST
        while not self._stopped.wait(wait_s):
            self.turn()
            wait_s = LOOK_S

    def close(self) -> None:
        """End ``run`` soon."""
        self._stopped.set()

    def turn(self) -> None:
        """Delete what may go."""
        found = self._look()
        gone = surplus(found, keep_s=self._keep_s, bytes_max=self._bytes_max)
        # What has begun since it was looked at is younger than anything that goes; asked again all the same.
        busy = {str(folder) for folder in self._busy()}
        freed = [one for one in gone if one.folder not in busy and self._delete(Path(one.folder))]
        if freed:
            self._log("logs deleted", attempts=len(freed), bytes=sum(one.size for one in freed))
        left = sum(one.size for one in found) - sum(one.size for one in freed)
        if self._bytes_max and left > self._bytes_max:
            self._log("logs need more than their room", bytes=left, room=self._bytes_max)
        self._tidy()

    def _look(self) -> list[Kept]:
        busy, here, now = set(self._busy()), set(self._here()), self._clock.wall()
        found = []
        for folder in self._root.glob("*/attempt_*"):
            with contextlib.suppress(OSError):
                size, newest = _measure(folder)
                found.append(
                    Kept(
                        str(folder),
                        now - newest,
                        size,
                        running=folder in busy,
                        here=folder.parent in here,
                        copied=is_copied(folder),
                    )
                )
        return found

    def _delete(self, folder: Path) -> bool:
        away = folder.with_name(f"{GONE}{folder.name}")
        try:
            folder.rename(away)
        except OSError as error:
            self._log("logs not deleted", folder=str(folder), problem=str(error))
            return False
        shutil.rmtree(away, ignore_errors=True)
        return True

    def _tidy(self) -> None:
        """Finish what a former life has begun; jobs' folders go once they have been empty for a while."""
        for away in self._root.glob(f"*/{GONE}*"):
            shutil.rmtree(away, ignore_errors=True)
        for job in self._root.glob("*"):
            # An attempt may be about to be made in one that is new.
            with contextlib.suppress(OSError):
                if self._clock.wall() - job.stat().st_mtime >= YOUNG_S and job not in self._here():
                    job.rmdir()


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes on disk below a folder, and when anything was last written."""
    size, newest = 0, folder.stat().st_mtime
    for where, _, names in os.walk(folder):
        for name in names:
            about = os.lstat(Path(where) / name)
            size += about.st_blocks * 512
            newest = max(newest, about.st_mtime)
    return size, newest
