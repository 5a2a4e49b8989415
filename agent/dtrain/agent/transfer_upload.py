"""Makes sealed snapshots durable: the arena's bytes to a blob, then the rank's manifest.

Each chunk is hashed once, from the arena; the store confirms that hash, and the
manifest carries it to every later reader.
"""

import gzip
import hashlib
import mmap
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transferring import CancelUpload, KeptBlob, TransferReport, Upload, Uploaded
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CHUNK_BYTES,
    MANIFEST_BYTES_MAX,
    BlobEntry,
    ObjectEntry,
    RankManifest,
    TensorEntry,
    blob_key,
    blob_prefix,
    job_root,
    rank_manifest_key,
)
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import Seq, Uid
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime import log, retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobStore

UPLOAD_DEADLINE_S = 60.0
"""How long one write to the store is retried: the leader's own deadline ends it anyway."""

INDEX_BYTES_MAX = 128 * 1024 * 1024
_CANCELLED_MAX = 1024
_ATTEMPTS_MAX = 1000  # the deadline is the bound

_log = log.get("transfer.upload")


@dataclass(frozen=True, slots=True)
class Index:
    """The JSON behind a sealed blob, as ``ranklink.Sealed`` describes it."""

    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    layout: str = ""
    paths: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Job:
    """One upload in progress and the keys it has tried to write."""

    store: BlobStore
    keys: list[str] = field(default_factory=list)


class Cancelled(Exception):
    """The checkpoint was aborted while this upload ran."""


class Uploader:
    """Runs uploads, each on the thread that calls ``run``."""

    def __init__(
        self,
        stores: Callable[[str], BlobStore],
        emit: Callable[[TransferReport], None],
        *,
        cache: Cache | None = None,
        deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> None:
        self._cache = cache or Cache()
        self._stores = stores
        self._emit = emit
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._cancelled: OrderedDict[tuple[Uid, Seq], None] = OrderedDict()

    def run(self, order: Upload) -> None:
        """Upload and report ``Uploaded``.

        Raises:
            DtrainError: it did not become durable; what was written is deleted,
                as far as the store lets it.
        """
        job = _Job(self._stores(order.store))
        try:
            part, kept = self._write(order, job)
            with self._lock:
                self._check(order)
                # From here on the leader may commit it: only the collector deletes it now.
                self._emit(Uploaded(order.job, part, kept))
        except Cancelled:
            self._discard(job)
            raise Refused(
                ErrorCode.CONFLICT, f"checkpoint {order.sealed.seq} was aborted during the upload"
            ) from None
        except Exception:
            self._discard(job)
            raise

    def cancel(self, order: CancelUpload) -> None:
        """Make uploads of this checkpoint stop, running or still to come.

        Parts already reported as durable stay: they may be committed by now, and
        whether they are not is for the collector to find out.
        """
        with self._lock:
            self._cancelled[order.uid, order.seq] = None
            while len(self._cancelled) > _CANCELLED_MAX:
                self._cancelled.popitem(last=False)

    def _check(self, order: Upload) -> None:
        if (order.uid, order.sealed.seq) in self._cancelled:
            raise Cancelled

    def _write(self, order: Upload, job: _Job) -> tuple[DurablePart, tuple[KeptBlob, ...]]:
        sealed = order.sealed
        prefix = blob_prefix(
            job_root(order.cluster, order.job, order.uid), sealed.seq, order.attempt, sealed.nonce
        )
        nonce = secrets.token_hex(8)
        with _Arena(order) as arena:
            index = _read_index(arena.slice(sealed.index_offset, sealed.index_bytes))
            blob = arena.slice(sealed.offset, sealed.size_bytes)
            parts = [blob[at : at + CHUNK_BYTES] for at in range(0, len(blob), CHUNK_BYTES)]
            try:
                crcs = []
                for part in parts:
                    self._check(order)
                    crcs.append(digest.crc32c(part))
                entry = BlobEntry(
                    key=blob_key(prefix, order.rank, 0, nonce),
                    rank=order.rank,
                    bytes=sealed.size_bytes,
                    crc=digest.to_hex(digest.full_crc(crcs, sealed.size_bytes, CHUNK_BYTES)),
                    chunks=tuple(digest.to_hex(crc) for crc in crcs),
                )
                self._put(order, job, entry.key, parts, crcs)
                self._cache.keep(entry.key, parts, entry.bytes)
            finally:
                for view in (*parts, blob):
                    view.release()
        manifest = RankManifest(
            v=codec.VERSION,
            cluster=order.cluster,
            job=order.job,
            uid=order.uid,
            seq=sealed.seq,
            attempt=order.attempt,
            nonce=sealed.nonce,
            step=sealed.step,
            rank=order.rank,
            world=order.world,
            blobs=(entry,),
            tensors=index.tensors,
            objects=index.objects,
            layout=index.layout,
            paths=index.paths,
        )
        # Without a time in it: the same manifest is always the same bytes.
        data = gzip.compress(codec.canonical(codec.to_json(manifest)), mtime=0)
        if len(data) > MANIFEST_BYTES_MAX:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE,
                f"the manifest of rank {order.rank} has {len(data)} bytes, more than {MANIFEST_BYTES_MAX}",
                fix="track fewer or larger tensors, and no large JSON values",
            )
        key = rank_manifest_key(prefix, order.rank, nonce)
        self._put(order, job, key, [data], [digest.crc32c(data)])
        kept = KeptBlob(entry.key, sealed.path, sealed.offset, sealed.size_bytes)
        durable = DurablePart(
            seq=sealed.seq,
            attempt=order.attempt,
            step=sealed.step,
            rank=order.rank,
            nonce=sealed.nonce,
            manifest=key,
            digest=hashlib.sha256(data).hexdigest(),
            size_bytes=sealed.size_bytes,
        )
        return durable, (kept,)

    def _put(
        self, order: Upload, job: _Job, key: str, parts: list[bytes] | list[memoryview], crcs: list[int]
    ) -> None:
        def attempt() -> None:
            self._check(order)
            job.store.put(key, parts, chunk_crcs=crcs)

        job.keys.append(key)
        # The same bytes under the same key: a repetition after a lost answer is harmless.
        retry.call(attempt, attempts=_ATTEMPTS_MAX, deadline_s=self._deadline_s, idempotent=True)

    def _discard(self, job: _Job) -> None:
        """Best effort: the collector takes what stays."""
        for key in job.keys:
            try:
                job.store.delete(key)
            except DtrainError as error:
                _log.info("upload_left_behind", key=key, error=str(error))


class _Arena:
    """A mapping of the memory a snapshot lies in."""

    def __init__(self, order: Upload) -> None:
        self._path = order.sealed.path
        self._rank = order.rank
        self._map: mmap.mmap | None = None

    def __enter__(self) -> "_Arena":
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Mapped: the bytes go to hash and socket without another copy. The
                # arena never shrinks, so reading it cannot fault.
                self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE, f"the snapshot of rank {self._rank} is gone: {error}"
            ) from error
        return self

    def slice(self, offset: int, length: int) -> memoryview:
        assert self._map is not None
        if offset < 0 or length < 0 or offset + length > len(self._map):
            raise Refused(
                ErrorCode.BAD_RECORD, f"the snapshot of rank {self._rank} reaches beyond its memory"
            )
        return memoryview(self._map)[offset : offset + length]

    def __exit__(self, *exc: object) -> None:
        # A view that an exception's traceback still holds only delays this.
        self._map = None


def _read_index(view: memoryview) -> Index:
    with view:
        return codec.from_json(Index, codec.loads(bytes(view), bytes_max=INDEX_BYTES_MAX))
