"""``python -m dtrain.coordinator.web``: started by the guardian, and gone with it."""

import ctypes
import os
import signal
import sys

from dtrain.coordinator.web.keeper import PARENT_VARIABLE

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve; return the exit code."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent.isdecimal():
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # It may have died before the line above: then no signal will ever come.
        if os.getppid() != int(parent):
            return 0
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from dtrain.coordinator.web.process import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
