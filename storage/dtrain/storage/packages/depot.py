"""Packages in a store: found again by their content, written once, brought back verified."""

import contextlib
import hashlib
import secrets
from collections.abc import Callable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TypeVar

from dtrain.protocol.errors import NotFound
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.package import Package, package_folder, package_key, parse_package_key
from dtrain.runtime import retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.port import PART_BYTES, BlobInfo, BlobStore
from dtrain.storage.packages.packing import Archive
from dtrain.storage.packages.unpacking import unsafe

T = TypeVar("T")

READ_BACK_BYTES_MAX = 64 * 1024 * 1024
"""A copy without a checksum of the store's own is read to be recognised; a larger one is stored again."""

OnProgress = Callable[[int, int], None]


def nothing_told(_done: int, _total: int) -> None:
    """For callers that show no progress."""


def find(store: BlobStore, cluster: ClusterName, archive: Archive) -> str | None:
    """Return the nonce of a sound copy of ``archive`` in the store; None: it has none.

    A copy that is not what it should be is passed over, so that submitting a job again mends
    what somebody damaged.

    Raises:
        Unavailable, Refused: of the store.
    """
    folder = package_folder(cluster, archive.digest)
    for info in _ask(lambda: list(store.list(folder))):
        named = parse_package_key(info.key)
        if named is None or info.size_bytes != archive.size_bytes:
            continue
        with contextlib.suppress(NotFound):  # it was deleted meanwhile
            if _is_sound(store, info, archive):
                return named[1]
    return None


def put(
    store: BlobStore, cluster: ClusterName, archive: Archive, on_progress: OnProgress = nothing_told
) -> str:
    """Store ``archive`` under a name of its own; return its nonce.

    Raises:
        Unavailable, OutcomeUnknown, Refused: of the store.
    """
    nonce = secrets.token_hex(8)
    key = package_key(cluster, archive.digest, nonce)
    with archive.path.open("rb") as file:
        view = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
    parts = [view[start : start + PART_BYTES] for start in range(0, len(view), PART_BYTES)]
    crcs = digest.ChunkCrcs(parts)
    # The same bytes under the same key: repeated after a lost answer it does no harm.
    _ask(lambda: store.put(key, parts, chunk_crcs=crcs, flow=_flow(len(view), on_progress)), idempotent=True)
    return nonce


def fetch(
    store: BlobStore, cluster: ClusterName, package: Package, to: Path, on_progress: OnProgress = nothing_told
) -> None:
    """Write the archive of ``package`` to the new file ``to``, verified.

    Raises:
        Refused: PACKAGE_DAMAGED; the store does not hold what was packed, or nothing at all.
        Unavailable: the store does not answer.
        OSError: of the disk.
    """
    key = package_key(cluster, package.digest, package.nonce)
    found = hashlib.sha256()
    try:
        size = _ask(lambda: store.head(key)).size_bytes
        if size != package.size_bytes:
            raise unsafe(f"in {store.uri} ({key}) has {size} bytes instead of {package.size_bytes}")
        with to.open("xb") as file:
            for offset in range(0, size, PART_BYTES):
                data = _range(store, key, offset, min(PART_BYTES, size - offset))
                found.update(data)
                file.write(data)
                on_progress(offset + len(data), size)
    except NotFound as error:
        raise unsafe(f"is not in {store.uri} any more ({key})") from error
    if found.hexdigest() != package.digest:
        raise unsafe(f"in {store.uri} ({key}) is damaged: its SHA-256 is {found.hexdigest()}")


def _is_sound(store: BlobStore, info: BlobInfo, archive: Archive) -> bool:
    crc = info.crc32c or _ask(lambda: store.head(info.key)).crc32c
    if crc:
        return crc.lower() == _crc(archive)
    if info.size_bytes > READ_BACK_BYTES_MAX:
        return False
    found = hashlib.sha256()
    for offset in range(0, info.size_bytes, PART_BYTES):
        found.update(_range(store, info.key, offset, min(PART_BYTES, info.size_bytes - offset)))
    return found.hexdigest() == archive.digest


def _crc(archive: Archive) -> str:
    value = 0
    with archive.path.open("rb") as file:
        while data := file.read(PART_BYTES):
            value = digest.crc32c(data, value)
    return digest.to_hex(value)


def _flow(total: int, on_progress: OnProgress) -> Flow:
    sent = 0

    def pace(size: int) -> float:
        nonlocal sent
        sent = min(total, sent + size)
        on_progress(sent, total)
        return 0.0

    return Flow(pace)


def _range(store: BlobStore, key: str, offset: int, length: int) -> bytes:
    return _ask(lambda: store.get(key, offset=offset, length=length))


def _ask(operation: Callable[[], T], *, idempotent: bool = False) -> T:
    return retry.call(operation, attempts=8, wait_s_first=0.2, deadline_s=60.0, idempotent=idempotent)
