"""The shared memory that holds a rank's frozen snapshot.

The launcher made the memfd and keeps it open, so a sealed snapshot outlives
this process. It only ever grows: a reader that has mapped it must not be killed
by SIGBUS. Pages are touched when space is reserved, before the first save,
because copying into cold pages runs at a fraction of the speed.
"""

import logging
import mmap
import os
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

log = logging.getLogger("dtrain.trainer")

_GRAIN_BYTES = 2 * 1024 * 1024


class Arena:
    """One slot of memory behind a descriptor that other processes can open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None
        self._pinned: Any = None
        self.path = _path_for_others(fd)

    @property
    def size_bytes(self) -> int:
        return len(self._map) if self._map is not None else 0

    @property
    def memory(self) -> mmap.mmap:
        assert self._map is not None, "reserve() comes first"
        return self._map

    def reserve(self, size_bytes: int) -> bool:
        """Have at least ``size_bytes`` of touched memory; True if the mapping is a new one.

        Views of the old mapping stay valid but must not be used for new snapshots.

        Raises:
            Refused: STATE_NOT_SAVABLE; there is not enough memory.
        """
        if size_bytes <= self.size_bytes:
            return False
        wanted = -(-size_bytes // _GRAIN_BYTES) * _GRAIN_BYTES
        try:
            # Allocates and zeroes in the kernel; shrinks nothing that is longer.
            os.posix_fallocate(self._fd, 0, wanted)
            wanted = max(wanted, os.fstat(self._fd).st_size)
            fresh = mmap.mmap(
                self._fd,
                wanted,
                flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except OSError as error:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE,
                f"no {wanted // 1024**2} MiB of memory for the snapshot of this rank: {error.strerror}",
                fix="give the machine or container memory for one more copy of the state",
            ) from error
        # Workers of a data loader are forked: they need neither the bytes nor the page tables.
        fresh.madvise(mmap.MADV_DONTFORK)
        self._unpin()
        self._map = fresh
        self._pin()
        return True

    def _pin(self) -> None:
        """Register the memory with CUDA where it is in use, so that copies run at full speed."""
        torch = _cuda_torch()
        if torch is None:
            return
        address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
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
