"""The prctl calls, looked up before any fork.

Resolving a symbol allocates and takes the loader's lock; a freshly forked child
should do neither before it has asked to die with its parent.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def _call(option: int, argument: object) -> None:
    if _prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL this process when its parent's forking thread ends; exit if it already has."""
    _call(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have gone between fork and prctl: nobody would send the signal any more.
    if os.getppid() != parent_pid:
        os._exit(143)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none escapes a clean-up."""
    _call(_PR_SET_CHILD_SUBREAPER, 1)


def name_process(name: str) -> None:
    """What ``ps -o comm`` and ``top`` show; the kernel keeps 15 bytes."""
    _call(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))
