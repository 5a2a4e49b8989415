"""Brings committed checkpoints into memory, every byte verified before anyone sees it.

All blobs of a checkpoint and its manifest go into one memfd, which the ranks of
this machine map. The digest in the order vouches for the manifest, the manifest
for each chunk.
"""

import hashlib
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dtrain.agent.transferring import Fetch, Fetched, FetchFailed, TransferReport
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CHUNK_BYTES, MANIFEST_BYTES_MAX, BlobEntry, Manifest
from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.protocol.ids import Rank
from dtrain.protocol.ranklink import BlobPlace, RestorePlan
from dtrain.protocol.snapshot import BadBlob
from dtrain.runtime import retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobStore

FETCH_DEADLINE_S = 30.0
"""How long one read is retried before the store counts as unreachable."""

LANES = 4
MANIFEST_PLAIN_BYTES_MAX = 32 * MANIFEST_BYTES_MAX
"""Decompressed; a larger one is a bomb, not a manifest."""

_ATTEMPTS_MAX = 1000  # the deadline is the bound
_RELEASED_MAX = 1024


class Damaged(Exception):
    """The store holds something else than was committed."""

    def __init__(self, bad: BadBlob) -> None:
        super().__init__(bad.message)
        self.bad = bad


class Abandoned(Exception):
    """The fetch was released while it ran."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    blob: BlobEntry
    number: int
    length: int
    target: int
    """Offset in the memfd."""


class Fetcher:
    """Runs fetches, each on the thread that calls ``run``."""

    def __init__(
        self,
        stores: Callable[[str], BlobStore],
        emit: Callable[[TransferReport], None],
        *,
        deadline_s: float = FETCH_DEADLINE_S,
    ) -> None:
        self._stores = stores
        self._emit = emit
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._released: OrderedDict[str, None] = OrderedDict()

    def run(self, order: Fetch) -> None:
        """Fetch, then report ``Fetched``, or ``FetchFailed`` with what is damaged.

        Raises:
            DtrainError: the store did not answer or refuses.
        """
        fd = os.memfd_create(f"dtrain-fetch-{order.seq}", os.MFD_CLOEXEC)
        try:
            plan = self._fetch(order, fd)
            with self._lock:
                self._check(order)
                self._held[order.id] = fd
        except Damaged as damaged:
            os.close(fd)
            self._emit(FetchFailed(order.id, str(damaged), bad=damaged.bad))
        except Abandoned:
            os.close(fd)
            self._emit(FetchFailed(order.id, "nobody waits for it any more"))
        except BaseException:
            os.close(fd)
            raise
        else:
            self._emit(Fetched(order.id, plan))

    def release(self, fetch_id: str) -> None:
        """Close the memory of a fetch, or stop it. Mappings that ranks have stay valid."""
        with self._lock:
            fd = self._held.pop(fetch_id, None)
            if fd is None:
                self._released[fetch_id] = None
                while len(self._released) > _RELEASED_MAX:
                    self._released.popitem(last=False)
            else:
                os.close(fd)

    def _check(self, order: Fetch) -> None:
        if order.id in self._released:
            raise Abandoned

    def _fetch(self, order: Fetch, fd: int) -> RestorePlan:
        store = self._stores(order.store)
        text, manifest = self._manifest(order, store)
        _check_fits(order, manifest)
        places: list[BlobPlace] = []
        chunks: list[_Chunk] = []
        path = f"/proc/{os.getpid()}/fd/{fd}"
        offset = 0
        for blob in manifest.blobs:
            places.append(BlobPlace(path, offset, blob.bytes))
            for number in range(-(-blob.bytes // CHUNK_BYTES)):
                at = number * CHUNK_BYTES
                chunks.append(_Chunk(blob, number, min(CHUNK_BYTES, blob.bytes - at), offset + at))
            # Blobs begin on pages, so that ranks can map each by itself.
            offset += -(-blob.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(fd, offset + len(text))
        _write_all(fd, text, offset)
        with ThreadPoolExecutor(LANES, thread_name_prefix="lane") as pool:
            running = [pool.submit(self._chunk, order, store, chunk, fd) for chunk in chunks]
            try:
                for done in running:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return RestorePlan(
            seq=order.seq,
            step=order.step,
            manifest_path=path,
            manifest_offset=offset,
            manifest_bytes=len(text),
            blobs=tuple(places),
        )

    def _manifest(self, order: Fetch, store: BlobStore) -> tuple[bytes, Manifest]:
        for last in (False, True):
            try:
                size = self._size(order, store)
                if size > MANIFEST_BYTES_MAX:
                    raise Damaged(_bad_manifest(order, f"{size} bytes", "is not the one that was committed"))
                data = self._read(order, store, order.manifest, 0, size)
            except NotFound:
                raise Damaged(_bad_manifest(order, "missing", "is missing")) from None
            found = hashlib.sha256(data).hexdigest()
            if found == order.digest:
                break
            # Once more: the bytes may have changed on the way and not in the store.
            if last:
                raise Damaged(_bad_manifest(order, found, "is not the one that was committed"))
        try:
            inflate = zlib.decompressobj(wbits=31)
            text = inflate.decompress(data, MANIFEST_PLAIN_BYTES_MAX)
            if not inflate.eof:
                raise ValueError("it is cut short or too large")
            return text, codec.decode(Manifest, text, bytes_max=MANIFEST_PLAIN_BYTES_MAX)
        except (zlib.error, ValueError, Refused) as error:
            raise Damaged(_bad_manifest(order, order.digest, f"cannot be read: {error}")) from error

    def _size(self, order: Fetch, store: BlobStore) -> int:
        def attempt() -> int:
            self._check(order)
            return store.head(order.manifest).size_bytes

        return retry.call(attempt, attempts=_ATTEMPTS_MAX, deadline_s=self._deadline_s, idempotent=True)

    def _chunk(self, order: Fetch, store: BlobStore, chunk: _Chunk, fd: int) -> None:
        expected = chunk.blob.chunks[chunk.number]
        found = ""
        for _ in range(2):  # twice, as for the manifest
            try:
                data = self._read(order, store, chunk.blob.key, chunk.number * CHUNK_BYTES, chunk.length)
            except NotFound:
                found = "missing"
                break
            except Refused as error:
                if error.code is not ErrorCode.BLOB_CORRUPT:
                    raise
                found = "short"
                break
            found = "short" if len(data) != chunk.length else digest.to_hex(digest.crc32c(data))
            if found == expected:
                _write_all(fd, data, chunk.target)
                return
        raise Damaged(
            BadBlob(
                seq=order.seq,
                blob=chunk.blob.key,
                chunk=chunk.number,
                expected=expected,
                found=found,
                rank=chunk.blob.rank,
                message=f"chunk {chunk.number} of {chunk.blob.key} is {found}, {expected} was committed",
            )
        )

    def _read(self, order: Fetch, store: BlobStore, key: str, offset: int, length: int | None) -> bytes:
        def attempt() -> bytes:
            self._check(order)
            return store.get(key, offset=offset, length=length)

        return retry.call(attempt, attempts=_ATTEMPTS_MAX, deadline_s=self._deadline_s, idempotent=True)


def _check_fits(order: Fetch, manifest: Manifest) -> None:
    """The digest vouches for the bytes; this catches a record that names another checkpoint's manifest."""
    wrong = ""
    if (manifest.seq, manifest.step, manifest.uid) != (order.seq, order.step, order.uid):
        wrong = f"belongs to checkpoint {manifest.seq} at step {manifest.step} of {manifest.uid}"
    elif manifest.chunk_bytes != CHUNK_BYTES or manifest.crc != "crc32c":
        wrong = f"uses {manifest.crc} over {manifest.chunk_bytes} bytes, unknown to this release"
    elif any(len(blob.chunks) != -(-blob.bytes // CHUNK_BYTES) for blob in manifest.blobs):
        wrong = "has a blob whose chunks do not make up its size"
    if wrong:
        raise Damaged(_bad_manifest(order, order.digest, wrong))


def _bad_manifest(order: Fetch, found: str, what: str) -> BadBlob:
    return BadBlob(
        seq=order.seq,
        blob=order.manifest,
        chunk=0,
        expected=order.digest,
        found=found,
        rank=Rank(0),
        message=f"manifest {order.manifest} {what}",
    )


def _write_all(fd: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)
