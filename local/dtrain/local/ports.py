"""Free loopback ports that stay free until the server that wants them binds.

Ports come from below the kernel's ephemeral range, so that no outgoing
connection takes one in between, and each is held by a lock file in the
system's temporary folder while its owner lives, so that clusters started at
the same moment do not meet.
"""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

FIRST, LAST = 11000, 22700
_held: dict[int, int] = {}


def reserve(count: int = 1, *, twin_offset: int = 0) -> list[int]:
    """Return ``count`` consecutive free ports, held until this process ends.

    ``twin_offset``: each port plus this offset must be free too (SeaweedFS
    serves gRPC at +10000).

    Raises:
        OSError: no run of free ports was found.
    """
    for _ in range(500):
        base = random.randrange(FIRST, LAST - count)  # noqa: S311 - not a secret
        wanted = list(range(base, base + count))
        if twin_offset:
            wanted += [port + twin_offset for port in wanted[:count]]
        if _hold(wanted):
            return wanted[:count]
    raise OSError("no free loopback ports between 11000 and 22700")


def take(wanted: list[int], *, twin_offset: int = 0) -> bool:
    """Hold exactly these ports, if all are free; what runs on them again keeps its address."""
    return bool(wanted) and _hold(wanted + [port + twin_offset for port in wanted if twin_offset])


def release(ports: list[int]) -> None:
    """Give ports back before this process ends."""
    for port in ports:
        fd = _held.pop(port, None)
        if fd is not None:
            os.close(fd)


def _hold(wanted: list[int]) -> bool:
    taken: list[int] = []
    for port in wanted:
        fd = _lock(port)
        if fd is None or not _is_free(port):
            if fd is not None:
                os.close(fd)
            release(taken)
            return False
        _held[port] = fd
        taken.append(port)
    return True


def _lock(port: int) -> int | None:
    folder = Path(tempfile.gettempdir()) / f"dtrain-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    fd = os.open(folder / str(port), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
