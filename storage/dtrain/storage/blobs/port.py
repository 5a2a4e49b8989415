"""What dtrain needs of an object store: the specification of every backend.

Blobs are immutable. A key is written once, under a name that is never used
again; nothing is overwritten or renamed, so a late writer of an abandoned
attempt cannot change what a reader sees. Listings and presence decide nothing:
the commit record in etcd does.

Keys are relative, ``/``-separated, ASCII, without parts that are empty or begin
with a dot. Implementations are safe to call from several threads, are not shared
across ``fork``, and do not retry: callers retry through ``dtrain.runtime.retry``.
The one exception is a part of a multipart upload, which costs less to send again
than the whole blob.

Outcomes: ``Unavailable`` (try again), ``OutcomeUnknown`` (a write may be there),
``Refused`` (permission, bad key, checksum refused), ``NotFound``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Protocol

from dtrain.storage.blobs.flow import Flow

PART_BYTES = 16 * 1024 * 1024
"""Size of a chunk: of an upload part, of a digest and of a ranged read alike."""


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """``crc32c`` is the store's own full-object value in hex, or "" if it has none."""

    key: str
    size_bytes: int
    crc32c: str = ""


class BlobStore(Protocol):
    """One place for blobs: a bucket with a prefix, or a directory."""

    @property
    def uri(self) -> str:
        """The URI that opens this store again."""
        ...

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        """Write a blob and return once it is durable and its checksum confirmed.

        ``parts`` are consecutive chunks of PART_BYTES (the last may be
        shorter); ``chunk_crcs`` holds the CRC32C of each, or computes it when it
        is first looked at (``digest.ChunkCrcs``), and is complete when this
        returns. Writing the same bytes to the same key again succeeds (a lost
        answer was repeated). ``flow`` paces the write, hears of its progress and
        may end it. No more memory is used than ``parts`` have.

        Raises:
            Stopped: the flow was; what is left behind is an unfinished upload at most.
            Refused: ``BLOB_EXISTS``, the key holds other bytes;
                ``BLOB_CORRUPT``, a part is not what its CRC says, and nothing
                is visible; ``STORE_REFUSED``, see its ``fix``.
            ValueError: the parts are not chunked as above: a bug.
        """
        ...

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read a range, to the end if ``length`` is None.

        A blob that ends early raises Refused(BLOB_CORRUPT). What was read is not
        verified: digests are with the caller, in the manifest.

        Raises:
            NotFound: ``BLOB_NOT_FOUND``.
        """
        ...

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on, without a copy in between where possible.

        For ranges that have a place already: the destination of a restore. What
        was written to the buffer when this raises is undefined. Errors are those
        of ``get``; a blob that ends before the buffer is full is Refused(BLOB_CORRUPT).
        """
        ...

    def head(self, key: str) -> BlobInfo: ...

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        """Yield blobs under ``prefix`` in key order, abandoned uploads not included."""
        ...

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        """Yield tokens of uploads under ``prefix`` that were never completed, dead writers' and living ones'.

        Also of what else somebody who died left and ``list`` does not show: folders without a blob.
        """
        ...

    def discard_unfinished(self, token: str) -> None:
        """Abandon an upload; gone already is fine. A folder that is in use by now stays."""
        ...

    def delete(self, key: str) -> None:
        """Delete; gone already is fine."""
        ...

    def close(self) -> None: ...


def check_key(key: str) -> str:
    """Return ``key`` if it is a valid blob key.

    Raises:
        ValueError: it is not; keys are built by code, so this is a bug.
    """
    if not key.isascii() or not key.isprintable() or any(p[:1] in ("", ".") for p in key.split("/")):
        raise ValueError(f"bad blob key {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if keys can begin with it: any start of a key, "" included.

    Raises:
        ValueError: no key can; a bug, as for ``check_key``.
    """
    check_key(prefix + "x")
    return prefix
