"""Ends what a local cluster leaves behind when its owner is killed.

``python -m dtrain.local.reaper PID FOLDER [remove]`` waits until process PID is
gone, then kills everything of FOLDER and, with ``remove``, deletes it. The
servers die with their owner by themselves; launchers and ranks outlive agents
on purpose, and this is who ends them. Standard library only: it sits there
for as long as the cluster does.
"""

import fcntl
import os
import select
import shutil
import signal
import sys
from pathlib import Path

from dtrain.local import sweeping

LOCK = "reaper.lock"
"""Held while a reaper lives: a new cluster in the folder waits for it, or it would be swept, too."""


def main(argv: list[str]) -> int:
    """Wait, sweep, leave; 1 if something could not be killed."""
    owner, folder = int(argv[0]), Path(argv[1])
    # The terminal's Ctrl-C and hang-up are meant for the owner.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Tells the owner that it is being watched from now on.
    sys.stdout.write("watching\n")
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    _await_end(owner)
    left = sweeping.end_all(folder)
    if "remove" in argv[2:] and not left:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if left else 0


def _await_end(owner: int) -> None:
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:
        return
    # It started us: anybody else under its pid means that it is gone.
    if os.getppid() == owner:
        poller = select.poll()  # select() knows no descriptor above 1023
        poller.register(handle, select.POLLIN)
        poller.poll()
    os.close(handle)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
