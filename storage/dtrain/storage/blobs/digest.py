"""CRC32C: of bytes, of chunks put together, and as stores and manifests write it.

A checkpoint's bytes are hashed once, chunk by chunk and on several threads.
``full_crc`` derives the value of the whole blob from those chunks without
touching the bytes again, which is what lets a store confirm a multipart upload.
"""

import base64
import functools
import threading
from collections.abc import Sequence
from typing import overload

import crc32c as _crc32c

SLICE_BYTES = 16 * 1024 * 1024
_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reflected
_ONE = 1 << 31  # the polynomial 1 in reflected order
_X = 1 << 30


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """Return the CRC32C of ``data``, continuing from ``value``."""
    view = memoryview(data).cast("B")
    # A slice bounds how long one call keeps a core from looking at signals and other threads.
    for start in range(0, len(view), SLICE_BYTES):
        value = _crc32c.crc32c(view[start : start + SLICE_BYTES], value)
    return value


class ChunkCrcs(Sequence[int]):
    """The CRC32C of each chunk, computed when it is first asked for and never again.

    For a store's lanes: each hashes the chunk it is about to send, while others
    are on the wire. Safe for several threads.
    """

    def __init__(self, chunks: Sequence[bytes | memoryview]) -> None:
        self._chunks = chunks
        self._values: list[int | None] = [None] * len(chunks)
        self._locks = [threading.Lock() for _ in chunks]

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self._locks[index]:
            value = self._values[index]
            if value is None:
                value = self._values[index] = crc32c(self._chunks[index])
            return value

    def is_known(self, index: int) -> bool:
        """Return whether the value was computed before."""
        return self._values[index] is not None


def combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """Return the CRC32C of A followed by B, where B has ``length_b`` bytes."""
    return _multiply(_shift(length_b), crc_a) ^ crc_b


def full_crc(chunk_crcs: Sequence[int], total_length: int, chunk_bytes: int) -> int:
    """Return the CRC32C of a blob from the CRCs of its chunks; only the last may be short.

    Raises:
        ValueError: the number of chunks does not fit the length.
    """
    if len(chunk_crcs) != max(1, -(-total_length // chunk_bytes)) and (chunk_crcs or total_length):
        raise ValueError(f"{len(chunk_crcs)} chunks of {chunk_bytes} bytes cannot hold {total_length} bytes")
    value = 0
    for index, crc in enumerate(chunk_crcs):
        value = combine(value, crc, min(chunk_bytes, total_length - index * chunk_bytes))
    return value


def to_hex(crc: int) -> str:
    """Return the form used in manifests: eight lower-case hex digits."""
    return f"{crc:08x}"


def from_hex(text: str) -> int:
    """Invert ``to_hex``; anything but eight hex digits is a ValueError."""
    if len(text) != 8:
        raise ValueError(f"a CRC32C has eight hex digits, not {text!r}")
    return int.from_bytes(bytes.fromhex(text), "big")


def to_base64(crc: int) -> str:
    """Return the form used in S3 headers: base64 of four big-endian bytes."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode("ascii")


def from_base64(text: str) -> int:
    """Invert ``to_base64``; anything else is a ValueError."""
    raw = base64.b64decode(text, validate=True)
    if len(raw) != 4:
        raise ValueError(f"a CRC32C has four bytes, not {text!r}")
    return int.from_bytes(raw, "big")


# Appending n zero bytes multiplies a CRC by x^(8n) modulo the polynomial over
# GF(2); that factor is found by squaring. Chunks of one blob share a length, so
# the factor is cached and one combination costs a single multiplication.


@functools.lru_cache(maxsize=64)
def _shift(length: int) -> int:
    factor, square, bits = _ONE, _X, 8 * length
    while bits:
        if bits & 1:
            factor = _multiply(square, factor)
        square = _multiply(square, square)
        bits >>= 1
    return factor


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product
