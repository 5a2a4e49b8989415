"""Removes what a test cluster leaves behind in the container engine when its owner is killed.

Started as ``python -P reaper.py CLUSTER`` with a pipe as its standard input, which
ends when the owner does. It loads nothing until then: it sits there as long as the tests run.
"""

import contextlib
import os
import signal
import sys


def main(argv: list[str]) -> int:
    """Wait for the end of the owner, then remove everything; 1 if something could not be."""
    # The terminal's Ctrl-C and hang-up are meant for the owner.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        while os.read(0, 64):
            pass
    from dtrain.testing import engine

    return 1 if engine.remove(engine.connect(), argv[0]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
