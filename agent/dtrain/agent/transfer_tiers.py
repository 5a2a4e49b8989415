"""Where a blob's bytes may lie on this machine already: an arena, the cache, a store that is a local folder.

None of these is trusted. Bytes found here count only where they fit the digests
of a committed manifest; whatever does not falls to the next tier.
"""

import contextlib
import mmap
import os
import stat
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from dtrain.agent.transferring import KeptBlob
from dtrain.protocol.checkpoint import BlobEntry
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.metered import MeteredBlobs
from dtrain.storage.blobs.mounts import MOUNTS, file_system
from dtrain.storage.blobs.port import BlobStore

LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
"""Whose mapped pages are there once they have been read. Over a network they may have to come again,
and a page that cannot come kills whoever looks at it."""

_ARENA = "/memfd:dtrain-arena-"


class Tier(StrEnum):
    """Sources of a restore, the nearest first."""

    ARENA = "arena"
    CACHE = "cache"
    STORE = "store"


class Standing:
    """A whole blob in a file or memfd, mapped for reading.

    The descriptor stays open, and ``path`` opens the same file for other processes
    even if its name is given to another one meanwhile.
    """

    def __init__(self, tier: Tier, fd: int, offset: int, size_bytes: int) -> None:
        self.tier = tier
        self.offset = offset
        self._fd = fd
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(fd, offset - start + size_bytes, offset=start, access=mmap.ACCESS_READ)
        self.view = memoryview(mapping)[offset - start :]
        self.path = f"/proc/{os.getpid()}/fd/{fd}"

    def bytes_at(self, at: int, length: int) -> memoryview:
        """A part of the blob."""
        self.expect(at, length)
        return self.view[at : at + length]

    def copy_at(self, at: int, length: int) -> bytes:
        """A copy of a part; shorter than asked for if the file ends before or cannot be read."""
        found = bytearray()
        try:
            while len(found) < length:
                part = os.pread(self._fd, length - len(found), self.offset + at + len(found))
                if not part:
                    break
                found += part
        except OSError:
            pass
        return bytes(found)

    def expect(self, at: int, length: int) -> None:
        """Have the kernel read a part at once, if it is not in memory."""
        if self.tier is not Tier.ARENA:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, self.offset + at, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Give the descriptor back; views stay valid."""
        os.close(self._fd)


def find(blob: BlobEntry, kept: Sequence[KeptBlob], cached: Path | None, store: BlobStore) -> list[Standing]:
    """Return where the whole blob seems to lie, the best place first. The caller closes them."""
    found = [
        _open(Tier.ARENA, Path(one.path), one.offset, blob.bytes)
        for one in kept
        if one.key == blob.key and one.size_bytes == blob.bytes
    ]
    if cached is not None:
        found.append(_open(Tier.CACHE, cached, 0, blob.bytes))
    store = store.inner if isinstance(store, MeteredBlobs) else store
    if isinstance(store, LocalBlobs):
        found.append(_open(Tier.STORE, store.file_of(blob.key), 0, blob.bytes))
    return [one for one in found if one is not None]


def _open(tier: Tier, path: Path, offset: int, size_bytes: int) -> Standing | None:
    """Open one place; None if it cannot hold the blob."""
    if size_bytes == 0 or offset < 0:
        return None
    try:
        # A descriptor number of a launcher that is gone may be anything by now, a pipe for example.
        if tier is Tier.ARENA and not os.readlink(path).startswith(_ARENA):  # noqa: PTH115 - not a real path
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        long_enough = stat.S_ISREG(found.st_mode) and found.st_size >= offset + size_bytes
        exact = tier is Tier.ARENA or found.st_size == size_bytes
        if long_enough and exact and (tier is Tier.ARENA or lies_here(found.st_dev)):
            return Standing(tier, fd, offset, size_bytes)
    except (OSError, ValueError):
        pass
    os.close(fd)
    return None


def lies_here(device: int, mounts: Path = MOUNTS) -> bool:
    """Whether a device number is of a file system of this machine. Unknown ones are not."""
    return file_system(device, mounts) in LOCAL_FILE_SYSTEMS
