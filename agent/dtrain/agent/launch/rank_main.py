"""A rank from its first instruction to its exit code.

Runs in a child forked from the launcher (``run_rank``), or, where forking is
not safe, as a program of its own that is handed the same ``RankSpec``. It makes
the process look as if ``python script.py`` had been typed under torchrun: its
own process group, default signals, its environment, its streams, its own random
numbers, a fresh ``__main__``.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import importlib.machinery
import io
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
import types
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dtrain.agent.launch import kernel, processes
from dtrain.agent.launch.preload import provide_checksum
from dtrain.protocol import codec
from dtrain.protocol.ids import Rank
from dtrain.protocol.job import Entry, EntryKind
from dtrain.protocol.ranklink import ENV_STACKS, STACKS_SIGNAL

EXIT_NOT_STARTED = 2
"""The program could not be started at all; error.json says why."""

_SPEC_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RankSpec:
    """All that a rank must know; ``env`` is complete."""

    entry: Entry
    rank: Rank
    working_dir: str
    log_dir: str
    error_file: str
    env: Mapping[str, str]
    arena_fd: int
    parent_pid: int


class _NotStartedError(Exception):
    """The program is not there; the message is for the user."""


def run_rank(spec: RankSpec, keep: Iterable[int] = ()) -> NoReturn:
    """Become the rank. ``keep``: descriptors that belong to preloaded libraries."""
    code = 70
    try:
        _become_own_process(spec, keep)
        code = _run_guarded(spec)
    except BaseException:  # noqa: BLE001  nothing may unwind into the launcher's stack
        _say_crashed()
    finally:
        os._exit(code)


# The process ------------------------------------------------------------------


def _become_own_process(spec: RankSpec, keep: Iterable[int]) -> None:
    kernel.die_with_parent(spec.parent_pid)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    _restore_signals()
    processes.close_descriptors((*keep, spec.arena_fd))
    # Programs that the rank execs may use the arena too.
    os.set_inheritable(spec.arena_fd, True)
    _redirect_streams(Path(spec.log_dir))
    kernel.name_process(f"dtrain-rank{spec.rank}")
    os.environ.clear()
    os.environ.update(spec.env)


def _restore_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Blocked around the fork, so that a signal meant for the rank never ran the launcher's handler.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _redirect_streams(log_dir: Path) -> None:
    log_dir.mkdir(parents=True, exist_ok=True)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for descriptor, name in ((1, "stdout.log"), (2, "stderr.log")):
        target = os.open(log_dir / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    for stream in (sys.stdout, sys.stderr):
        # Lines must reach the log when they are printed, not when a buffer is full.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


# What was inherited from the launcher and must differ -------------------------


def _settle_libraries(env: Mapping[str, str]) -> None:
    torch: Any = sys.modules.get("torch")
    numpy: Any = sys.modules.get("numpy")
    threads = _number(env.get("OMP_NUM_THREADS")) or _physical_cores()
    if torch is not None:
        torch.set_num_threads(threads)
        if torch.distributed.is_available():
            torch.distributed.set_debug_level_from_env()
    if numpy is not None:
        _set_openblas_threads(_number(env.get("OPENBLAS_NUM_THREADS")) or threads)
    # Ranks forked from one parent share its generators: unseeded scripts must differ per rank.
    random.seed()
    if numpy is not None:
        numpy.random.seed()
    if torch is not None:
        torch.default_generator.seed()


def _number(text: str | None) -> int | None:
    # OMP_NUM_THREADS may be a list, one number per nesting level.
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def _physical_cores() -> int:
    """What torch takes by default: a hyper-thread's twin adds nothing to numeric code."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            siblings.add(path.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def _set_openblas_threads(threads: int) -> None:
    """OpenBLAS read its number when it was loaded, in the launcher, where it had to be one."""
    with Path("/proc/self/maps").open() as maps:
        libraries = {line.split()[-1] for line in maps if "openblas" in line and line.split()[-1][0] == "/"}
    for path in libraries:
        library = ctypes.CDLL(path)
        for prefix in ("", "scipy_"):
            for suffix in ("", "64_"):
                setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                if setter is not None:
                    setter(ctypes.c_int(threads))


# The program ------------------------------------------------------------------


def _run_guarded(spec: RankSpec) -> int:
    """Run the program and everything an interpreter does on its way out."""
    interrupted = False
    try:
        _start_program(spec)
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except _NotStartedError as error:
        print(error, file=sys.stderr)  # noqa: T201  the rank's own stderr.log
        _write_error(spec, f"{error}", "")
        code = EXIT_NOT_STARTED
    except BaseException as error:  # noqa: BLE001
        interrupted = isinstance(error, KeyboardInterrupt)
        code = 1
        _show(spec, error)
    code = _wind_down(code)
    if interrupted:
        # As the interpreter does: the parent shall see the signal, not a code.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def _start_program(spec: RankSpec) -> None:
    host = socket.gethostname()
    try:
        os.chdir(spec.working_dir)
    except OSError as error:
        raise _NotStartedError(
            f"working directory {spec.working_dir} cannot be entered on {host}: {error.strerror}"
        ) from error
    entry = spec.entry
    if entry.kind is EntryKind.COMMAND:
        _exec_command(entry, spec.env, host)
    script = Path(entry.target)
    if entry.kind is EntryKind.SCRIPT and not script.exists():
        raise _NotStartedError(f"script {entry.target} (in {spec.working_dir}) not found on {host}")
    _settle_libraries(spec.env)
    faulthandler.enable()
    # For whoever looks into a hang: SIGQUIT writes the stacks of all threads to stderr.log.
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    _write_stacks_on_signal(spec.env)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    is_script = entry.kind is EntryKind.SCRIPT
    first = str(script.resolve().parent) if is_script else os.getcwd()  # noqa: PTH109
    sys.path[:] = [first, *(item for item in _python_path(spec.env) if item not in sys.path), *sys.path]
    sys.argv = [entry.target, *entry.args]
    if not is_script:
        runpy.run_module(entry.target, run_name="__main__", alter_sys=True)
    elif script.is_dir() or zipfile.is_zipfile(script):
        del sys.path[0]
        runpy.run_path(entry.target, run_name="__main__")
    else:
        _run_script(main, entry.target)


def _write_stacks_on_signal(env: Mapping[str, str]) -> None:
    """The agent's own way to ask: before any of the user's code runs, which may hang in an import."""
    path = env.get(ENV_STACKS)
    if path:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            faulthandler.register(STACKS_SIGNAL, file, all_threads=True)


def _python_path(env: Mapping[str, str]) -> list[str]:
    return [item for item in env.get("PYTHONPATH", "").split(os.pathsep) if item]


def _run_script(main: types.ModuleType, path: str) -> None:
    # Not runpy.run_path: it takes the module out of sys.modules again, and exit handlers, pickling
    # and dataloader workers want to find a real __main__.
    loader = _ScriptLoader("__main__", path)
    main.__file__ = path
    main.__loader__ = loader
    vars(main)["__cached__"] = None
    loader.exec_module(main)


class _ScriptLoader(importlib.machinery.SourceFileLoader):
    """Runs a script without byte code: the interpreter keeps none of programs either."""

    def path_stats(self, path: Any) -> NoReturn:
        # Without a time stamp the import system neither looks for a .pyc file nor writes one.
        raise OSError(f"{path} is a program")


def _exec_command(entry: Entry, env: Mapping[str, str], host: str) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # ignored by Python, and an exec would inherit that
    try:
        os.execvpe(entry.target, [entry.target, *entry.args], dict(env))  # noqa: S606
    except OSError as error:
        raise _NotStartedError(
            f"command {entry.target} cannot be started on {host}: {error.strerror}"
        ) from error


# The end ----------------------------------------------------------------------


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF
    print(leaving.code, file=sys.stderr)  # noqa: T201  as the interpreter does
    return 1


def _show(spec: RankSpec, error: BaseException) -> None:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    error = error.with_traceback(trace)
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, KeyboardInterrupt):
        _write_error(spec, f"{type(error).__name__}: {error}", text)
    try:
        sys.excepthook(type(error), error, trace)
    except BaseException:  # noqa: BLE001  a broken hook must not hide the error
        sys.stderr.write(text)


_OWN_FILES = frozenset(
    {__file__, "<frozen runpy>", "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"}
)


def _write_error(spec: RankSpec, message: str, callstack: str) -> None:
    """error.json as ``@record`` writes it, unless the program has already done so."""
    path = Path(spec.error_file)
    try:
        if path.exists() and path.stat().st_size > 0:
            return
        detail = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": detail}}))
    except OSError as error:
        sys.stderr.write(f"cannot write {path}: {error}\n")


def _wind_down(code: int) -> int:
    """Join threads, run exit handlers, flush: in the interpreter's order."""
    for step in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            code = code or 120  # the interpreter's code for output that could not be written
    return code


def _say_crashed() -> None:
    try:
        os.write(2, traceback.format_exc().encode())
    except OSError:
        return


def main() -> NoReturn:
    """The exec'd form: the spec lies in the file descriptor named on the command line."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        spec = codec.decode(RankSpec, file.read(), bytes_max=_SPEC_BYTES_MAX)
    provide_checksum()
    run_rank(spec)


if __name__ == "__main__":
    main()
