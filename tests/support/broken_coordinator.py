"""A real coordinator that breaks on demand, from within: ``python -m tests.support.broken_coordinator``.

Guardian and coordinator are the product's own; only the child's command line names this
module, so that a thread of ours runs beside its threads. A file that appears in the folder
``BREAK_FOLDER`` says what to do: its name is ``<replica>.<what>``.

``stall-<seconds>``  hold the interpreter's lock for so long, as a C extension might;
``raise-<thread>``   raise MemoryError in the thread of that name, wherever it is;
``exit``             end at once, without a word;
``fds``              leave no file descriptor to be had;
``threads``          leave no thread to be had.
"""

import ctypes
import os
import resource
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from dtrain.storage.etcd import guardian
from dtrain.storage.etcd.session_memory import FD_VARIABLE

FOLDER_VARIABLE = "BREAK_FOLDER"


def main() -> int:
    """Be what ``python -m dtrain.coordinator`` is."""
    from dtrain.coordinator import __main__ as product

    if FD_VARIABLE in os.environ:
        replica = sys.argv[sys.argv.index("--id") + 1]
        folder = Path(os.environ[FOLDER_VARIABLE])
        threading.Thread(target=_watch, args=(folder, replica), name="breaker", daemon=True).start()
        return product.main()
    supervise = guardian.run
    argv = (sys.executable, "-m", "tests.support.broken_coordinator", *sys.argv[1:])
    guardian.run = lambda config, health=None: supervise(replace(config, argv=argv), health)
    return product.main()


def _watch(folder: Path, replica: str) -> None:
    while True:
        for path in folder.glob(f"{replica}.*"):
            what = path.name.partition(".")[2]
            path.unlink()
            _break(what)
        time.sleep(0.02)


def _break(what: str) -> None:
    kind, _, detail = what.partition("-")
    match kind:
        case "stall":
            # PyDLL keeps the lock during the call: no other Python thread gets a turn.
            ctypes.PyDLL(None).usleep(int(float(detail) * 1e6))
        case "raise":
            _raise_in(detail)
        case "exit":
            os._exit(9)
        case "fds":
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        case "threads":
            # Root is not bound by RLIMIT_NPROC: what Python says then is said here.
            setattr(threading.Thread, "start", _no_thread)  # noqa: B010 - mypy minds the plain form


def _raise_in(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name or (name == "main" and thread is threading.main_thread()):
            ident = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(MemoryError))
            return
    raise AssertionError(f"no thread {name}: {[thread.name for thread in threading.enumerate()]}")


def _no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


if __name__ == "__main__":
    sys.exit(main())
