"""Makes sealed snapshots durable: the arena's bytes to a blob, then the rank's manifest.

Each chunk is hashed once, from the arena, while others are on the wire; the store
confirms that hash, and the manifest carries it to every later reader. A store
that is away is waited for, as long as the checkpoint has time.
"""

import contextlib
import hashlib
import math
import mmap
import os
import secrets
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dtrain.agent import rank_manifest
from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transferring import CancelUpload, KeptBlob, PartMoved, TransferReport, Upload, Uploaded
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CHUNK_BYTES,
    MANIFEST_BYTES_MAX,
    BlobEntry,
    RankManifest,
    blob_key,
    blob_prefix,
    job_root,
    rank_manifest_key,
)
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.protocol.ids import Seq, Uid
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime import log, retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.flow import Flow, Stopped
from dtrain.storage.blobs.pace import TokenBucket
from dtrain.storage.blobs.port import BlobStore

TELL_S = 10.0
"""How often the log says that an upload still waits for the store."""

RETRY_WAIT_S_MAX = 5.0
"""A store that comes back is noticed after so long, at most."""

_CANCELLED_MAX = 1024
_CAPS_MAX = 256
_ATTEMPTS_MAX = 100_000  # the patience is the bound

_log = log.get("transfer.upload")


@dataclass(slots=True, eq=False)
class _Job:
    """One upload in progress and the keys it has tried to write."""

    order: Upload
    store: BlobStore
    flow: Flow
    trouble: "_Trouble"
    keys: list[str] = field(default_factory=list)
    taken_before: int = 0
    """What the store had taken in all when the present try began."""
    furthest: int = 0

    def done_bytes(self) -> int:
        """How much of the snapshot the store has taken; a try that begins anew does not make it less."""
        self.furthest = max(self.furthest, self.flow.taken_bytes - self.taken_before)
        return min(self.furthest, self.order.sealed.size_bytes)


class _Trouble:
    """What keeps an upload from going on: in the log now and then, and in the reason if it fails."""

    def __init__(self, order: Upload, now: Callable[[], float]) -> None:
        self.last = ""
        self._order = order
        self._now = now
        self._told_at = -math.inf

    def note(self, why: str) -> None:
        """Take note of one failure, on any thread."""
        self.last = why
        if self._now() - self._told_at >= TELL_S:
            self._told_at = self._now()
            sealed = self._order.sealed
            _log.warning("upload_waits", job=self._order.job, seq=sealed.seq, rank=self._order.rank, why=why)


class Bandwidth:
    """The cap of one job on this machine, shared by its uploads. Thread-safe."""

    def __init__(self, bytes_per_s: float, now: Callable[[], float]) -> None:
        self.bytes_per_s = bytes_per_s
        self._bucket = TokenBucket(bytes_per_s)
        self._now = now
        self._lock = threading.Lock()

    def take(self, size: int) -> float:
        """Take ``size`` bytes; return in how many seconds they may leave."""
        with self._lock:
            return self._bucket.take(size, self._now())


class Uploader:
    """Runs uploads, each on the thread that calls ``run``.

    Memory: none beside the snapshot itself. A store's lanes send from the mapped
    arena, each chunk hashed by its lane just before it leaves.

    Args:
        patience_s: overrides the orders' own.
        later: runs what an upload that was cancelled leaves to clean up; a store that hangs must
            not keep the next upload from its thread.
    """

    def __init__(
        self,
        stores: Callable[[str], BlobStore],
        emit: Callable[[TransferReport], None],
        *,
        cache: Cache | None = None,
        patience_s: float | None = None,
        now: Callable[[], float] = time.monotonic,
        later: Callable[[Callable[[], None]], object] = lambda work: work(),
    ) -> None:
        self._cache = cache or Cache()
        self._stores = stores
        self._emit = emit
        self._patience_s = patience_s
        self._now = now
        self._later = later
        self._lock = threading.Lock()
        self._cancelled: OrderedDict[tuple[Uid, Seq], None] = OrderedDict()
        self._running: dict[tuple[Uid, Seq], list[_Job]] = {}
        self._caps: OrderedDict[Uid, Bandwidth] = OrderedDict()

    def run(self, order: Upload) -> None:
        """Upload and report ``Uploaded``.

        Raises:
            DtrainError: it did not become durable; what was written is deleted,
                as far as the store lets it.
        """
        patience_s = order.patience_s if self._patience_s is None else self._patience_s
        trouble = _Trouble(order, self._now)
        flow = Flow(self._pace(order), patience_s=patience_s, on_trouble=trouble.note)
        job = _Job(order, self._stores(order.store), flow, trouble)
        began = self._now()
        # Also where a connection hangs: the reason must be with the leader before its deadline is.
        alarm = threading.Timer(patience_s, flow.stop)
        alarm.daemon = True
        alarm.start()
        try:
            with self._cancellable(job):
                part, kept = self._write(order, job)
            with self._lock:
                self._check(order)
                # From here on the leader may commit it: only the collector deletes it now.
                self._emit(Uploaded(order.job, part, kept))
        except Stopped:
            self._later(lambda: self._discard(job))
            raise self._stopped(order, job, patience_s) from None
        except Exception:
            self._discard(job)
            raise
        finally:
            alarm.cancel()
        _log.info(
            "uploaded",
            job=order.job,
            seq=order.sealed.seq,
            rank=order.rank,
            bytes=order.sealed.size_bytes,
            seconds=round(self._now() - began, 3),
        )

    def cancel(self, order: CancelUpload) -> None:
        """Make uploads of this checkpoint stop, running or still to come.

        Parts already reported as durable stay: they may be committed by now, and
        whether they are not is for the collector to find out.
        """
        with self._lock:
            self._cancelled[order.uid, order.seq] = None
            while len(self._cancelled) > _CANCELLED_MAX:
                self._cancelled.popitem(last=False)
            running = list(self._running.get((order.uid, order.seq), ()))
        for job in running:
            job.flow.stop()

    def progress(self) -> tuple[PartMoved, ...]:
        """Say how far each upload is that runs now."""
        with self._lock:
            running = [job for jobs in self._running.values() for job in jobs]
            return tuple(
                PartMoved(
                    job.order.job, job.order.uid, job.order.sealed.seq, job.order.rank, job.done_bytes()
                )
                for job in running
            )

    def _check(self, order: Upload) -> None:
        if (order.uid, order.sealed.seq) in self._cancelled:
            raise Stopped

    def _stopped(self, order: Upload, job: _Job, patience_s: float) -> DtrainError:
        so_far = f"{job.flow.durable_bytes} of {order.sealed.size_bytes} bytes were durable"
        with self._lock:
            cancelled = (order.uid, order.sealed.seq) in self._cancelled
        if cancelled:
            why = f"checkpoint {order.sealed.seq} was aborted during the upload, {so_far}"
            return Refused(ErrorCode.CONFLICT, why)
        cap = f", at {order.bandwidth_mb_s:g} MB/s at most" if order.bandwidth_mb_s else ""
        what = f"{so_far} after {patience_s:g} s{cap}"
        trouble = f": {job.trouble.last}" if job.trouble.last else ""
        return Unavailable(ErrorCode.STORE_UNAVAILABLE, what + trouble)

    @contextlib.contextmanager
    def _cancellable(self, job: _Job) -> Iterator[None]:
        key = (job.order.uid, job.order.sealed.seq)
        with self._lock:
            self._check(job.order)
            self._running.setdefault(key, []).append(job)
        try:
            yield
        finally:
            with self._lock:
                self._running[key].remove(job)
                if not self._running[key]:
                    del self._running[key]

    def _pace(self, order: Upload) -> Callable[[int], float]:
        rate = order.bandwidth_mb_s * 1e6
        if rate <= 0:
            return lambda _size: 0.0
        with self._lock:
            cap = self._caps.pop(order.uid, None)
            if cap is None or cap.bytes_per_s != rate:
                cap = Bandwidth(rate, self._now)
            self._caps[order.uid] = cap
            while len(self._caps) > _CAPS_MAX:
                self._caps.popitem(last=False)
        return cap.take

    def _write(self, order: Upload, job: _Job) -> tuple[DurablePart, tuple[KeptBlob, ...]]:
        sealed = order.sealed
        prefix = blob_prefix(
            job_root(order.cluster, order.job, order.uid), sealed.seq, order.attempt, sealed.nonce
        )
        nonce = secrets.token_hex(8)
        with _Arena(order) as arena:
            with arena.slice(sealed.index_offset, sealed.index_bytes) as view:
                index = bytes(view)
            if sealed.index_crc and f"{zlib.crc32(index):08x}" != sealed.index_crc:
                raise Refused(
                    ErrorCode.BAD_RECORD,
                    f"the index of the snapshot of rank {order.rank} has changed in memory",
                    fix="if it happens again, have the memory of this machine tested",
                )
            blob = arena.slice(sealed.offset, sealed.size_bytes)
            parts = [blob[at : at + CHUNK_BYTES] for at in range(0, len(blob), CHUNK_BYTES)]
            try:
                key = blob_key(prefix, order.rank, 0, nonce)
                # Computed by the lanes that send them, or, where nothing is sent, just below.
                crcs = digest.ChunkCrcs(parts)
                self._put(job, key, parts, crcs)
                entry = BlobEntry(
                    key=key,
                    rank=order.rank,
                    bytes=sealed.size_bytes,
                    crc=digest.to_hex(digest.full_crc(crcs, sealed.size_bytes, CHUNK_BYTES)),
                    chunks=tuple(digest.to_hex(crc) for crc in crcs),
                )
                self._cache.keep(entry.key, parts, entry.bytes)
            finally:
                for view in (*parts, blob):
                    view.release()
        head = RankManifest(
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
            tensors={},
            objects={},
        )
        data = rank_manifest.encode(head, index)
        if len(data) > MANIFEST_BYTES_MAX:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE,
                f"the manifest of rank {order.rank} has {len(data)} bytes, more than {MANIFEST_BYTES_MAX}",
                fix="track fewer or larger tensors, and no large JSON values",
            )
        key = rank_manifest_key(prefix, order.rank, nonce)
        self._put(job, key, [data], digest.ChunkCrcs([data]))
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

    def _put(self, job: _Job, key: str, parts: list[bytes] | list[memoryview], crcs: Sequence[int]) -> None:
        def attempt() -> None:
            job.flow.wait(0)
            with self._lock:
                job.done_bytes()
                job.taken_before = job.flow.taken_bytes
            try:
                job.store.put(key, parts, chunk_crcs=crcs, flow=job.flow)
            except (Unavailable, OutcomeUnknown) as error:
                job.trouble.note(error.message)
                raise

        job.keys.append(key)
        # The same bytes under the same key: a repetition after a lost answer is harmless.
        retry.call(
            attempt,
            attempts=_ATTEMPTS_MAX,
            wait_s_max=RETRY_WAIT_S_MAX,
            deadline_s=job.flow.patience_s,
            idempotent=True,
            sleep=job.flow.wait,
        )

    def _discard(self, job: _Job) -> None:
        """Best effort: the collector takes what stays."""
        for key in job.keys:
            try:
                for token in job.store.list_unfinished(key):
                    job.store.discard_unfinished(token)
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
