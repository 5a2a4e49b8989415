"""Blobs in memory, for tests, the simulation and single-process runs.

Deterministic: no clock, no randomness. ``fault`` is called at the points where
a real store can fail, and may raise what the real store would:

    ``put``         before anything happened
    ``put.begun``   an upload has begun; it stays unfinished
    ``put.stored``  the blob is there, the answer is lost
    ``get``, ``head``, ``list``, ``list_unfinished``, ``discard_unfinished``, ``delete``
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from mmap import mmap

from dtrain.storage.blobs import digest, outcomes
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.port import PART_BYTES, BlobInfo, check_key, check_prefix

Fault = Callable[[str, str], None]
"""Called with the operation and the key (or prefix, or token)."""


class MemoryBlobs:
    """Implements ``BlobStore`` for the life of the object; ``close`` keeps the blobs."""

    def __init__(self, name: str = "blobs", *, fault: Fault | None = None) -> None:
        self.fault: Fault = fault or (lambda _op, _key: None)
        self._name = name
        self._blobs: dict[str, tuple[bytes, int]] = {}
        self._unfinished: dict[str, str] = {}
        self._uploads = 0
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"memory://{self._name}"

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        check_key(key)
        flow = flow or Flow()
        chunks = outcomes.views(parts, chunk_crcs)
        self.fault("put", key)
        for index, chunk in enumerate(chunks):
            outcomes.check_or_hash(key, index, chunk, chunk_crcs)
            flow.admit(len(chunk))
        data = b"".join(chunks)
        full = digest.full_crc(chunk_crcs, len(data), PART_BYTES)
        with self._lock:
            self._uploads += 1
            token = f"{key}?upload={self._uploads}"
            self._unfinished[token] = key
        self.fault("put.begun", key)
        with self._lock:
            if self._unfinished.pop(token, None) is None:
                raise outcomes.abandoned(key)
            held, _ = self._blobs.setdefault(key, (data, full))
        if held != data:
            raise outcomes.exists(key, self.uri)
        flow.confirmed(len(data))
        self.fault("put.stored", key)
        return BlobInfo(key, len(data), digest.to_hex(full))

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        outcomes.check_range(offset, length)
        self.fault("get", key)
        data, _ = self._find(key)
        found = data[offset:] if length is None else data[offset : offset + length]
        if offset > len(data) or (length is not None and len(found) < length):
            raise outcomes.short(key, offset=offset, wanted=length, found=len(found))
        return found

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        view = outcomes.target(buffer)
        view[:] = self.get(key, offset=offset, length=len(view))

    def head(self, key: str) -> BlobInfo:
        self.fault("head", key)
        data, crc = self._find(key)
        return BlobInfo(key, len(data), digest.to_hex(crc))

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        check_prefix(prefix)
        self.fault("list", prefix)
        with self._lock:
            found = sorted((key, blob) for key, blob in self._blobs.items() if key.startswith(prefix))
        return iter([BlobInfo(key, len(data), digest.to_hex(crc)) for key, (data, crc) in found])

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        self.fault("list_unfinished", prefix)
        with self._lock:
            return iter(sorted(token for token, key in self._unfinished.items() if key.startswith(prefix)))

    def discard_unfinished(self, token: str) -> None:
        self.fault("discard_unfinished", token)
        with self._lock:
            self._unfinished.pop(token, None)

    def delete(self, key: str) -> None:
        check_key(key)
        self.fault("delete", key)
        with self._lock:
            self._blobs.pop(key, None)

    def close(self) -> None:
        """Do nothing: whoever opens the same name again finds the blobs."""

    def _find(self, key: str) -> tuple[bytes, int]:
        check_key(key)
        with self._lock:
            blob = self._blobs.get(key)
        if blob is None:
            raise outcomes.missing(key, self.uri)
        return blob
