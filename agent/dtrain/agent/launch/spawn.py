"""Starting children: by fork, or by exec where the launcher has grown threads."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dtrain.agent.launch import store
from dtrain.agent.launch.rank_main import RankSpec, run_rank
from dtrain.protocol import codec

_FORK_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def fork_rank(spec: RankSpec, leave_launcher: Callable[[], None], keep: frozenset[int]) -> int:
    """Fork a rank; its pid. ``leave_launcher`` closes the launcher's sockets in the child."""
    return _fork(lambda: run_rank(spec, keep), leave_launcher)


def fork_store(host: str, answer_fd: int, leave_launcher: Callable[[], None]) -> int:
    """Fork the process that serves a TCPStore; its pid."""
    parent = os.getpid()
    return _fork(lambda: store.serve(host, parent, answer_fd), leave_launcher)


def exec_rank(spec: RankSpec) -> int:
    """Start a rank as a fresh interpreter: seconds of imports, but safe beside threads."""
    descriptor = os.memfd_create("dtrain-rank-spec")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(codec.encode(spec))
        os.lseek(descriptor, 0, os.SEEK_SET)
        return _exec(
            "dtrain.agent.launch.rank_main", [str(descriptor)], (descriptor, spec.arena_fd), dict(spec.env)
        )
    finally:
        os.close(descriptor)


def exec_store(host: str, answer_fd: int) -> int:
    """Serve a TCPStore from a fresh interpreter; its pid."""
    arguments = [host, str(os.getpid()), str(answer_fd)]
    return _exec("dtrain.agent.launch.store", arguments, (answer_fd,), None)


def _fork(child: Callable[[], NoReturn], leave_launcher: Callable[[], None]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    # What exists now is never collected in the children: a collector that touches every object
    # would copy every page they share with the launcher.
    gc.freeze()
    # A signal for the child in its first moments must not run the launcher's handlers: it stays
    # pending until the child has put the defaults back.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORK_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                leave_launcher()
                child()
            finally:
                os._exit(70)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    own_group(pid)
    return pid


def _exec(
    module: str, arguments: Sequence[str], descriptors: tuple[int, ...], env: dict[str, str] | None
) -> int:
    process = subprocess.Popen(
        # -P: the working directory must not shadow what the module imports.
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        env=env,
        process_group=0,
    )
    # The event loop reaps every child by waitpid(-1); Popen must not believe it still has to.
    process.returncode = 0
    return process.pid


def own_group(pid: int) -> None:
    """Make the child a group leader from here too: it may be signalled before it has run at all."""
    try:
        os.setpgid(pid, pid)
    except (ProcessLookupError, PermissionError):
        return
