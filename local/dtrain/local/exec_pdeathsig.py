"""Run a command that dies with the process that started it.

``python -m dtrain.local.exec_pdeathsig CMD...`` asks the kernel for SIGKILL at
the parent's death and becomes CMD. ``DTRAIN_PARENT_PID`` names the parent: if it
died before the request was made, nothing is started. The signal also comes when
the *thread* that started this ends, so start it from one that lives as long as
the command should. Standard library only: it runs before everything else.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Become ``argv``; return 2 if there is none, 1 if the parent has gone or the kernel refuses."""
    if not argv:
        sys.stderr.write("usage: python -m dtrain.local.exec_pdeathsig COMMAND [ARGUMENT...]\n")
        return 2
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.stderr.write(f"cannot set a parent-death signal: {os.strerror(ctypes.get_errno())}\n")
        return 1
    # The parent may have died before the line above; then no signal will ever come.
    parent = os.environ.pop("DTRAIN_PARENT_PID", "")
    if parent and str(os.getppid()) != parent:
        return 1
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - becoming the command is the purpose
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]}: {error.strerror}\n")
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
