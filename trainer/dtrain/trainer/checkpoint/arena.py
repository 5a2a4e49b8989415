"""The shared memory that holds a rank's frozen snapshot.

The launcher made the memfd and keeps it open, so a sealed snapshot outlives
this process. It only ever grows: a reader that has mapped it must not be killed
by SIGBUS. Pages are touched before the first save, because copying into cold
ones runs at a fraction of the speed, and on a thread beside training, because
having the kernel clear them takes as long as several saves.

Huge pages are not asked for: on the machine where it was measured, copies into
them took as long as into small ones.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

log = logging.getLogger("dtrain.trainer")

_GRAIN_BYTES = 2 * 1024 * 1024
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; unknown to the mmap module of Python 3.11."""


class Arena:
    """One slot of memory behind a descriptor that other processes can open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None
        self._pinned: Any = None
        self._touching: _Touching | None = None
        self.path = _path_for_others(fd)

    @property
    def size_bytes(self) -> int:
        return len(self._map) if self._map is not None else 0

    @property
    def memory(self) -> mmap.mmap:
        assert self._map is not None, "reserve() comes first"
        return self._map

    def reserve_soon(self, size_bytes: int) -> None:
        """Begin to touch the memory that ``reserve`` will be asked for, and return at once."""
        if size_bytes > self.size_bytes and self._touching is None:
            self._touching = _Touching(self._fd, _rounded(size_bytes))

    def reserve(self, size_bytes: int) -> bool:
        """Have at least ``size_bytes`` of touched memory; True if the mapping is a new one.

        Views of the old mapping stay valid but must not be used for new snapshots.

        Raises:
            Refused: STATE_NOT_SAVABLE; there is not enough memory.
        """
        if size_bytes <= self.size_bytes:
            return False
        fresh: mmap.mmap | None = None
        if self._touching is not None:
            fresh = self._touching.result()
            self._touching = None
        if fresh is None or len(fresh) < size_bytes:
            fresh = self._take(_rounded(size_bytes))
        self._unpin()
        self._map = fresh
        self._pin()
        return True

    def _take(self, wanted: int) -> mmap.mmap:
        try:
            return _mapped(self._fd, wanted)
        except OSError as error:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE,
                f"no {wanted // 1024**2} MiB of memory for the snapshot of this rank: {error.strerror}",
                fix="give the machine or container memory for one more copy of the state",
            ) from error

    def _pin(self) -> None:
        """Register the memory with CUDA where it is in use, so that copies run at full speed."""
        torch = _cuda_torch()
        if torch is None:
            return
        address = _address(self.memory)
        code = int(torch.cuda.cudart().cudaHostRegister(address, self.size_bytes, 0))
        if code == 0:
            self._pinned = address
        else:
            log.warning("snapshot memory is not pinned (CUDA error %s): copies are slower", code)

    def _unpin(self) -> None:
        if self._pinned is not None:
            torch = _cuda_torch()
            if torch is not None:
                torch.cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = None


class _Touching:
    """A thread that has the kernel allocate and clear pages; it holds the GIL for microseconds."""

    def __init__(self, fd: int, wanted: int) -> None:
        self._fd = fd
        self._wanted = wanted
        self._map: mmap.mmap | None = None
        self._thread = threading.Thread(target=self._run, name="dtrain-arena", daemon=True)
        self._thread.start()

    def result(self) -> mmap.mmap | None:
        """Wait for it. None: there was no memory; whoever needs it asks again and hears why."""
        self._thread.join()
        return self._map

    def _run(self) -> None:
        try:
            self._map = _mapped(self._fd, self._wanted)
        except OSError as error:
            log.warning("no memory yet for the snapshots of this rank: %s", error.strerror)


def _mapped(fd: int, wanted: int) -> mmap.mmap:
    """Map ``wanted`` bytes or all there are, whichever is more, touched.

    Raises:
        OSError: there is not enough memory.
    """
    # Allocates and clears in the kernel; shrinks nothing that is longer.
    os.posix_fallocate(fd, 0, wanted)
    size = max(wanted, os.fstat(fd).st_size)
    fresh = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    # Workers of a data loader are forked: they need neither the bytes nor the page tables.
    fresh.madvise(mmap.MADV_DONTFORK)
    # Not MAP_POPULATE: mmap() holds the GIL while it fills the page tables, ctypes does not.
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(_address(fresh))
    if libc.madvise(address, ctypes.c_size_t(size), ctypes.c_int(_MADV_POPULATE_WRITE)):
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # an older kernel: the pages are there, and mapped as they are copied to
            raise OSError(code, os.strerror(code))
    return fresh


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _GRAIN_BYTES) * _GRAIN_BYTES


def _cuda_torch() -> Any:
    import torch

    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch if in_use else None


def _path_for_others(fd: int) -> str:
    """A path that opens the memfd: through the launcher, which outlives this process, if it is the parent."""
    own = Path(f"/proc/{os.getpid()}/fd/{fd}")
    kept = Path(f"/proc/{os.getppid()}/fd/{fd}")
    try:
        if kept.exists() and os.path.samestat(kept.stat(), os.fstat(fd)):
            return str(kept)
    except OSError:
        pass
    return str(own)
