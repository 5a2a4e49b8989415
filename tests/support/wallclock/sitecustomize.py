"""Put into a process by PYTHONPATH: its wall clock is off by what a file says, and may jump at any moment.

Python's ``time.time`` alone is moved, in every Python process of a cluster under test. (libfaketime's
release in Debian breaks ``clock_nanosleep``, and with it each ``time.sleep`` of Python 3.11.)
"""

import os
import sys
import time

_FILE = os.environ.get("WALLCLOCK_OFFSET_FILE", "")
_real, _real_ns = time.time, time.time_ns


def _offset_s() -> float:
    try:
        descriptor = os.open(_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0.0
    try:
        return float(os.read(descriptor, 64) or 0)
    except (OSError, ValueError):
        return 0.0
    finally:
        os.close(descriptor)


def _is_grpc() -> bool:
    # It hands wall-clock deadlines to its C core, which reads the system's own clock: when that
    # really jumps, both see it. Only half of it can be fooled here.
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("grpc")


def _moved() -> float:
    return _real() if _is_grpc() else _real() + _offset_s()


def _moved_ns() -> int:
    return _real_ns() if _is_grpc() else _real_ns() + int(_offset_s() * 1e9)


if _FILE:
    time.time, time.time_ns = _moved, _moved_ns
