"""One committed checkpoint in a store: its manifest by digest, its tensors as verified bytes.

A chunk that is not what the manifest says is read once more, since the bytes may
have changed on their way; then it is damage, named with everything that lies in it.
"""

import hashlib
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CHUNK_BYTES,
    MANIFEST_BYTES_MAX,
    ChunkEntry,
    Manifest,
    TensorEntry,
)
from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.protocol.ids import Rank
from dtrain.protocol.wording import some
from dtrain.runtime import retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobStore

T = TypeVar("T")

MANIFEST_PLAIN_BYTES_MAX = 32 * MANIFEST_BYTES_MAX
"""Decompressed; a larger one is a bomb, not a manifest."""

LANES = 4
AHEAD = 6
"""Chunks that are read before they are asked for."""

CACHED = 16
"""Chunks kept for tensors that share them: 256 MiB."""

READ_DEADLINE_S = 60.0
_ATTEMPTS_MAX = 1000  # the deadline is the bound
_TENSORS_TOLD_MAX = 5

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "C128": 16,
}
"""Of the safetensors dtypes that blobs use."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk of a blob, or the manifest, that is not what was committed.

    ``found`` is the digest of what is there, or "missing" or "short".
    """

    blob: str
    chunk: int
    expected: str
    found: str
    rank: Rank | None = None
    tensors: tuple[str, ...] = ()
    """Names of the tensors that lie in the chunk."""

    @property
    def where(self) -> str:
        """Tensors, rank, blob and chunk in words."""
        if self.rank is None:
            return f"the manifest {self.blob}"
        return f"{told(self.tensors)} of rank {self.rank}: chunk {self.chunk} of {self.blob}"


class DamageFound(Refused):
    """The store holds something else than was committed."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(
            ErrorCode.BLOB_CORRUPT,
            f"{damage.where} is {damage.found}, {damage.expected} was committed",
            fix="use the checkpoint before it; 'dtrain checkpoints verify' has this one quarantined",
        )
        self.damage = damage


def told(tensors: Sequence[str]) -> str:
    """Names of tensors for a sentence; a few are enough."""
    if not tensors:
        return "no tensor"
    return f"tensor{'s' if len(tensors) > 1 else ''} {some(tensors, _TENSORS_TOLD_MAX)}"


def read_manifest(store: BlobStore, key: str, sha256: str) -> Manifest:
    """Return the manifest that a commit record names.

    Raises:
        DamageFound: it is missing, or another one.
        Refused: STORE_REFUSED, or BAD_RECORD: of a newer release, perhaps.
        Unavailable: the store does not answer.
    """
    found = "missing"
    for _ in range(2):
        try:
            size = _ask(lambda: store.head(key)).size_bytes
            if size > MANIFEST_BYTES_MAX:
                found = f"{size} bytes long"
                break
            data = _ask(partial(store.get, key, length=size))
        except NotFound:
            found = "missing"
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return _decoded(data, key)
    raise DamageFound(Damage(key, 0, sha256, found))


def _decoded(data: bytes, key: str) -> Manifest:
    inflate = zlib.decompressobj(wbits=31)
    try:
        text = inflate.decompress(data, MANIFEST_PLAIN_BYTES_MAX)
    except zlib.error as error:
        raise Refused(ErrorCode.BAD_RECORD, f"the manifest {key} is not gzip ({error})") from error
    if not inflate.eof:
        raise Refused(ErrorCode.BAD_RECORD, f"the manifest {key} is cut short or too large")
    manifest = codec.decode(Manifest, text, bytes_max=MANIFEST_PLAIN_BYTES_MAX)
    if manifest.chunk_bytes != CHUNK_BYTES or manifest.crc != "crc32c":
        raise Refused(
            ErrorCode.BAD_RECORD,
            f"the manifest {key} uses {manifest.crc} over {manifest.chunk_bytes} bytes",
            fix="use the release of dtrain that wrote it",
        )
    if any(len(blob.chunks) != -(-blob.bytes // CHUNK_BYTES) for blob in manifest.blobs):
        raise Refused(ErrorCode.BAD_RECORD, f"the manifest {key} has a blob of another size than its chunks")
    return manifest


def read_chunk(store: BlobStore, manifest: Manifest, blob: int, number: int) -> bytes:
    """Return one chunk of a blob as it was committed.

    Raises:
        DamageFound: it is not, and was not when it was read again.
        Unavailable, Refused: the store does not answer, or will not.
    """
    entry = manifest.blobs[blob]
    start = number * CHUNK_BYTES
    length = min(CHUNK_BYTES, entry.bytes - start)
    expected, found = entry.chunks[number], ""
    for _ in range(2):
        try:
            data = _ask(lambda: store.get(entry.key, offset=start, length=length))
        except NotFound:
            found = "missing"
            continue
        except Refused as error:
            if error.code is not ErrorCode.BLOB_CORRUPT:
                raise
            found = "short"
            continue
        found = digest.to_hex(digest.crc32c(data)) if len(data) == length else "short"
        if found == expected:
            return data
    tensors = tensors_in(manifest, blob, start, length)
    raise DamageFound(Damage(entry.key, number, expected, found, entry.rank, tensors))


def tensors_in(manifest: Manifest, blob: int, offset: int, length: int) -> tuple[str, ...]:
    """Names of the tensors with bytes in a range of a blob."""
    return tuple(
        name
        for name, entry in sorted(manifest.tensors.items())
        if any(c.b == blob and c.off < offset + length and offset < c.off + c.len for c in entry.chunks)
    )


def size_bytes(entry: TensorEntry) -> int:
    """Bytes of a whole tensor.

    Raises:
        Refused: BAD_RECORD; of a dtype that this release does not know.
    """
    try:
        return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
    except KeyError:
        raise Refused(
            ErrorCode.BAD_RECORD, f"this release does not know the stored type {entry.dtype!r}"
        ) from None


class TensorReader:
    """Tensors of one checkpoint, read ahead on a few threads. Used from one thread; a context manager.

    ``names`` is the order in which they will be asked for: chunks are read ahead
    along it. ``on_bytes`` is told of each chunk that has come, from any thread.
    """

    def __init__(
        self,
        store: BlobStore,
        manifest: Manifest,
        names: Sequence[str],
        *,
        on_bytes: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._on_bytes = on_bytes
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="read")
        self._queue = list(OrderedDict.fromkeys(chunk for name in names for chunk in self._chunks_of(name)))
        self._place = {chunk: index for index, chunk in enumerate(self._queue)}
        self._held: OrderedDict[tuple[int, int], Future[bytes]] = OrderedDict()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def stream(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield the whole tensor in row-major order, in pieces.

        Row blocks, by far the commonest, pass through as they are; otherwise the
        tensor is put together in memory first.

        Raises:
            DamageFound, Unavailable, Refused: as ``read_chunk``.
        """
        entry = self._manifest.tensors[name]
        solid = sorted((c for c in entry.chunks if math.prod(c.s)), key=lambda c: c.o)
        if all(_is_rows(chunk, entry.shape) for chunk in solid):
            for chunk in solid:
                yield from self._range(chunk.b, chunk.off, chunk.len)
            return
        whole = bytearray(size_bytes(entry))
        item = ITEM_BYTES[entry.dtype]
        for chunk in solid:
            _scatter(b"".join(self._range(chunk.b, chunk.off, chunk.len)), chunk, entry.shape, item, whole)
        yield memoryview(whole)

    def _range(self, blob: int, offset: int, length: int) -> Iterator[memoryview]:
        end = offset + length
        while offset < end:
            number = offset // CHUNK_BYTES
            data = self._get((blob, number))
            start = offset - number * CHUNK_BYTES
            piece = memoryview(data)[start : min(len(data), start + end - offset)]
            if not piece:
                raise Refused(ErrorCode.BAD_RECORD, f"a tensor reaches beyond blob {blob}")
            yield piece
            offset += len(piece)

    def _get(self, chunk: tuple[int, int]) -> bytes:
        at = self._place.get(chunk, len(self._queue))
        for wanted in (chunk, *self._queue[at + 1 : at + 1 + AHEAD]):
            if wanted not in self._held:
                self._held[wanted] = self._pool.submit(self._read, *wanted)
        self._held.move_to_end(chunk)
        while len(self._held) > CACHED:
            self._held.popitem(last=False)
        return self._held[chunk].result()

    def _read(self, blob: int, number: int) -> bytes:
        data = read_chunk(self._store, self._manifest, blob, number)
        self._on_bytes(len(data))
        return data

    def _chunks_of(self, name: str) -> Iterator[tuple[int, int]]:
        entry = self._manifest.tensors[name]
        for chunk in sorted((c for c in entry.chunks if c.len), key=lambda c: c.o):
            for number in range(chunk.off // CHUNK_BYTES, (chunk.off + chunk.len - 1) // CHUNK_BYTES + 1):
                yield chunk.b, number


def _is_rows(chunk: ChunkEntry, shape: Sequence[int]) -> bool:
    """Whether a chunk is one run of the tensor's bytes: whole along all dimensions but the first."""
    return tuple(chunk.s[1:]) == tuple(shape[1:])


def _scatter(data: bytes, chunk: ChunkEntry, shape: Sequence[int], item: int, whole: bytearray) -> None:
    """Copy a rectangle to its place, run by run along the last dimension."""
    run = chunk.s[-1] * item
    strides = [item] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    base = sum(o * stride for o, stride in zip(chunk.o, strides, strict=True))
    outer = chunk.s[:-1]
    index = [0] * len(outer)
    for source in range(0, len(data), run):
        target = base + sum(i * stride for i, stride in zip(index, strides, strict=False))
        whole[target : target + run] = data[source : source + run]
        for axis in range(len(outer) - 1, -1, -1):
            index[axis] += 1
            if index[axis] < outer[axis]:
                break
            index[axis] = 0


def _ask(operation: Callable[[], T]) -> T:
    return retry.call(operation, attempts=_ATTEMPTS_MAX, deadline_s=READ_DEADLINE_S, idempotent=True)
