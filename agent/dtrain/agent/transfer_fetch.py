"""Brings committed checkpoints to the ranks of this machine, every byte verified before anyone uses it.

The digest in the order vouches for the manifest, the manifest for each chunk.
Ranks say what they need of it; ``transfer_chunks`` has the rules by which it comes.
"""

import dataclasses
import hashlib
import mmap
import os
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from dtrain.agent import transfer_tiers
from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transfer_chunks import Chunks, laid_out, write_all
from dtrain.agent.transfer_tiers import Standing
from dtrain.agent.transferring import (
    Demand,
    Fetch,
    Fetched,
    FetchFailed,
    FetchMoved,
    KeepManifest,
    Supplied,
    TransferReport,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CHUNK_BYTES, MANIFEST_BYTES_MAX, BlobEntry, Manifest
from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.protocol.ids import Rank
from dtrain.protocol.ranklink import Have, Held, Need, RestorePlan
from dtrain.protocol.snapshot import BadBlob
from dtrain.runtime import retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobStore

FETCH_DEADLINE_S = 30.0
"""How long one read is retried before the store counts as unreachable."""

PREFETCH_BYTES_MAX = 1024**3
"""A checkpoint of up to so much is brought whole before anyone asks: most ranks need most of it."""

WHOLE = Need("", 0, whole=True)
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


class _Held:
    """A fetch that ranks may ask things of."""

    chunks: Chunks

    def __init__(
        self, order: Fetch, store: BlobStore, fd: int, manifest: Manifest, plan: RestorePlan
    ) -> None:
        self.order = order
        self.store = store
        self.fd = fd
        self.manifest = manifest
        self.plan = plan
        self.released = False
        self.given: dict[Rank, dict[int, Held]] = {}
        """What each rank was told last, by blob."""

    def close(self) -> None:
        self.released = True
        self.chunks.close()
        os.close(self.fd)


class Fetcher:
    """Runs fetches and demands, each on the thread that calls."""

    def __init__(
        self,
        stores: Callable[[str], BlobStore],
        emit: Callable[[TransferReport], None],
        *,
        cache: Cache | None = None,
        deadline_s: float = FETCH_DEADLINE_S,
    ) -> None:
        self._stores = stores
        self._emit = emit
        self._cache = cache or Cache()
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._released: OrderedDict[str, None] = OrderedDict()

    def run(self, order: Fetch) -> None:
        """Fetch, then report ``Fetched``, or ``FetchFailed`` with what is damaged.

        With an order ``on_demand``, what its ranks will surely need is begun and not waited for.

        Raises:
            DtrainError: the store did not answer or refuses.
        """
        fd = os.memfd_create(f"dtrain-fetch-{order.seq}", os.MFD_CLOEXEC)
        held: _Held | None = None
        try:
            held = self._open(order, fd)
            plan = held.plan if order.on_demand else _complete(held.plan, held.chunks.supply(WHOLE))
            with self._lock:
                self._check(order)
                self._held[order.id] = held
        except BaseException as error:
            if held is None:
                os.close(fd)
            else:
                held.close()
            if not self._tell(order.id, error):
                raise
        else:
            self._emit(Fetched(order.id, plan, held.chunks.tiers))
            if order.on_demand:
                held.chunks.bring(_surely_needed(order, held.manifest))

    def demand(self, order: Demand) -> None:
        """Have what a rank needs, then report ``Supplied``, or ``FetchFailed`` with what is damaged.

        Raises:
            DtrainError: the store did not answer or refuses.
        """
        with self._lock:
            held = self._held.get(order.id)
        if held is None or order.need.plan != held.plan.token:
            return  # released, or meant for a former life of this process
        need = order.need
        try:
            if need.again:
                with self._lock:
                    given = list(held.given.get(order.rank, {}).values())
                good = bool(given) and held.chunks.check_again(need, given)
                have = Have(need.plan, need.number, good=good)
            else:
                blobs = held.chunks.supply(need, private=order.private)
                with self._lock:
                    told = {one.blob: one for one in blobs}
                    # Who verifies for itself asks for the rest alone, and may doubt any of it.
                    held.given[order.rank] = {**held.given.get(order.rank, {}), **told}
                have = Have(need.plan, need.number, blobs)
        except Exception as error:
            if not self._tell(order.id, error):
                raise
        else:
            self._emit(Supplied(order.id, order.rank, have, held.chunks.tiers))

    def progress(self) -> tuple[FetchMoved, ...]:
        """Say how far each fetch is that ranks may ask things of."""
        with self._lock:
            held = list(self._held.items())
        found = (FetchMoved(name, *one.chunks.progress) for name, one in held)
        return tuple(one for one in found if one.total_bytes)

    def keep_manifest(self, order: KeepManifest) -> None:
        """Have a committed manifest in the cache; what comes in the way is left to the restore to find."""
        if self._cache.manifest(order.digest) is None:
            data = self._stores(order.store).get(order.manifest)
            if hashlib.sha256(data).hexdigest() == order.digest:
                self._cache.keep_manifest(order.digest, data)

    def release(self, fetch_id: str) -> Callable[[], None]:
        """Stop a fetch; call what is returned, which may take a while, to let go of its memory.

        Mappings that ranks have stay valid.
        """
        with self._lock:
            held = self._held.pop(fetch_id, None)
            if held is None:
                self._released[fetch_id] = None
                while len(self._released) > _RELEASED_MAX:
                    self._released.popitem(last=False)
                return lambda: None
            held.released = True
        return lambda: self._let_go(held)

    def _let_go(self, held: "_Held") -> None:
        if self._cache.keeps_blobs:
            for blob, target in held.chunks.copies():
                with (
                    mmap.mmap(held.fd, blob.bytes, offset=target, access=mmap.ACCESS_READ) as mapping,
                    memoryview(mapping) as view,
                ):
                    self._cache.keep(blob.key, [view], blob.bytes)
        held.close()

    def _tell(self, fetch_id: str, error: BaseException) -> bool:
        """Report a failure that is no error of the store's; False: it is not one."""
        if isinstance(error, Damaged):
            self._emit(FetchFailed(fetch_id, str(error), bad=error.bad))
        elif isinstance(error, (Abandoned, CancelledError)):
            self._emit(FetchFailed(fetch_id, "nobody waits for it any more"))
        else:
            return False
        return True

    def _check(self, order: Fetch) -> None:
        if order.id in self._released:
            raise Abandoned

    def _open(self, order: Fetch, fd: int) -> "_Held":
        store = self._stores(order.store)
        text, manifest = self._manifest(order, store)
        _check_fits(order, manifest)
        targets, end = laid_out(manifest, len(text))
        # Sparse: it takes the memory of what is written to it.
        os.ftruncate(fd, max(end, len(text)))
        write_all(fd, text, 0)
        plan = RestorePlan(
            seq=order.seq,
            step=order.step,
            manifest_path=f"/proc/{os.getpid()}/fd/{fd}",
            manifest_bytes=len(text),
            on_demand=order.on_demand,
            token=secrets.token_hex(8) if order.on_demand else "",
        )
        kept = {one.key: one for one in order.kept}
        cached = self._cache.find

        def look(blob: BlobEntry) -> list[Standing]:
            known = [kept[blob.key]] if blob.key in kept else []
            return transfer_tiers.find(blob, known, cached(blob.key), store)

        held = _Held(order, store, fd, manifest, plan)
        held.chunks = Chunks(
            manifest,
            fd,
            targets,
            look=look,
            read=lambda blob, number, buffer: self._chunk(held, blob, number, buffer),
            in_place=order.on_demand,
        )
        return held

    def _manifest(self, order: Fetch, store: BlobStore) -> tuple[bytes, Manifest]:
        data = self._cache.manifest(order.digest)
        if data is None:
            data = self._stored_manifest(order, store)
            self._cache.keep_manifest(order.digest, data)
        try:
            inflate = zlib.decompressobj(wbits=31)
            text = inflate.decompress(data, MANIFEST_PLAIN_BYTES_MAX)
            if not inflate.eof:
                raise ValueError("it is cut short or too large")
            return text, codec.decode(Manifest, text, bytes_max=MANIFEST_PLAIN_BYTES_MAX)
        except (zlib.error, ValueError, Refused) as error:
            raise Damaged(_bad_manifest(order, order.digest, f"cannot be read: {error}")) from error

    def _stored_manifest(self, order: Fetch, store: BlobStore) -> bytes:
        found = ""
        for _ in range(2):  # the bytes may have changed on the way and not in the store
            try:
                size = self._size(order, store)
                if size > MANIFEST_BYTES_MAX:
                    raise Damaged(_bad_manifest(order, f"{size} bytes", "is not the one that was committed"))
                data = self._read(order, store, order.manifest, 0, size)
            except NotFound:
                raise Damaged(_bad_manifest(order, "missing", "is missing")) from None
            found = hashlib.sha256(data).hexdigest()
            if found == order.digest:
                return data
        raise Damaged(_bad_manifest(order, found, "is not the one that was committed"))

    def _size(self, order: Fetch, store: BlobStore) -> int:
        def attempt() -> int:
            self._check(order)
            return store.head(order.manifest).size_bytes

        return retry.call(attempt, attempts=_ATTEMPTS_MAX, deadline_s=self._deadline_s, idempotent=True)

    def _chunk(self, held: "_Held", blob: BlobEntry, number: int, buffer: memoryview) -> None:
        """Read a chunk from the store into ``buffer``, verified there."""
        expected, found = blob.chunks[number], ""

        def attempt() -> None:
            self._check(held.order)
            if held.released:
                raise Abandoned
            held.store.get_into(blob.key, number * CHUNK_BYTES, buffer)

        for _ in range(2):  # twice, as for the manifest
            try:
                retry.call(attempt, attempts=_ATTEMPTS_MAX, deadline_s=self._deadline_s, idempotent=True)
            except NotFound:
                found = "missing"
                break
            except Refused as error:
                if error.code is not ErrorCode.BLOB_CORRUPT:
                    raise
                found = "short"
                break
            found = digest.to_hex(digest.crc32c(buffer))
            if found == expected:
                return
        raise Damaged(
            BadBlob(
                seq=held.order.seq,
                blob=blob.key,
                chunk=number,
                expected=expected,
                found=found,
                rank=blob.rank,
                message=f"chunk {number} of {blob.key} is {found}, {expected} was committed",
            )
        )

    def _read(self, order: Fetch, store: BlobStore, key: str, offset: int, length: int | None) -> bytes:
        def attempt() -> bytes:
            self._check(order)
            return store.get(key, offset=offset, length=length)

        return retry.call(attempt, attempts=_ATTEMPTS_MAX, deadline_s=self._deadline_s, idempotent=True)


def _complete(plan: RestorePlan, blobs: Sequence[Held]) -> RestorePlan:
    return dataclasses.replace(plan, blobs=tuple(held.place for held in blobs))


def _surely_needed(order: Fetch, manifest: Manifest) -> list[int]:
    """Blobs to begin with while the ranks still start.

    Of a large checkpoint each rank may need a shard only: all that can be foreseen is that
    ranks of the same numbers want again what they have written.
    """
    if manifest.bytes <= PREFETCH_BYTES_MAX:
        return list(range(len(manifest.blobs)))
    if manifest.world != order.world:
        return []
    return [index for index, blob in enumerate(manifest.blobs) if blob.rank in order.ranks]


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
