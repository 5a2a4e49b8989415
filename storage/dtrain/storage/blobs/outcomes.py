"""What all backends check and say alike: the shape of a put, and the common refusals."""

from collections.abc import Sequence
from mmap import mmap

from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import PART_BYTES


def views(parts: Sequence[bytes | memoryview], chunk_crcs: Sequence[int]) -> list[memoryview]:
    """Return the parts as flat views of bytes.

    Raises:
        ValueError: the parts are not chunks of PART_BYTES, or not one CRC each.
    """
    flat = [memoryview(part).cast("B") for part in parts]
    if len(flat) != len(chunk_crcs):
        raise ValueError(f"{len(flat)} parts came with {len(chunk_crcs)} CRCs")
    if any(len(part) != PART_BYTES for part in flat[:-1]) or (flat and len(flat[-1]) > PART_BYTES):
        raise ValueError(f"parts have {PART_BYTES} bytes each, only the last may be shorter")
    if len(flat) > 1 and not flat[-1]:
        raise ValueError("only a blob without bytes may have an empty part")
    return flat


def check_chunk(key: str, index: int, chunk: bytes | memoryview, expected: int) -> None:
    """Raise Refused(BLOB_CORRUPT) if a chunk is not what its CRC says."""
    found = digest.crc32c(chunk)
    if found != expected:
        raise chunk_corrupt(key, index, expected, digest.to_hex(found))


def check_or_hash(key: str, index: int, chunk: bytes | memoryview, crcs: Sequence[int]) -> None:
    """Check a chunk against its CRC, or compute that now if nobody has: then it cannot differ."""
    if isinstance(crcs, digest.ChunkCrcs) and not crcs.is_known(index):
        _ = crcs[index]
    else:
        check_chunk(key, index, chunk, crcs[index])


def chunk_corrupt(key: str, index: int, expected: int, found: str = "") -> Refused:
    """Return the refusal of a chunk, numbered from 0, whose bytes do not fit its CRC."""
    return Refused(
        ErrorCode.BLOB_CORRUPT,
        f"chunk {index} of {key} does not have the CRC32C {digest.to_hex(expected)} it was sent with"
        + (f" but {found}" if found else ""),
        fix="the bytes changed between hashing and writing: if it happens again, check this machine's memory",
    )


def exists(key: str, where: str) -> Refused:
    """Return the refusal to write other bytes to a key that is taken."""
    return Refused(
        ErrorCode.BLOB_EXISTS,
        f"{key} in {where} already holds other bytes, and blobs are never overwritten",
        fix="look for a second cluster that writes to this store under the same cluster and job names",
    )


def missing(key: str, where: str) -> NotFound:
    """Return the answer to reading a key that is not there."""
    return NotFound(ErrorCode.BLOB_NOT_FOUND, f"{where} has no blob {key}")


def short(key: str, *, offset: int, wanted: int | None, found: int) -> Refused:
    """Return the refusal to hand out less than was asked for."""
    what = f"{found} of {wanted} bytes" if wanted is not None else "nothing"
    return Refused(
        ErrorCode.BLOB_CORRUPT,
        f"{key} ends early: it has {what} at offset {offset}",
        fix="the stored blob was cut short: this checkpoint cannot be read, an older one can",
    )


def abandoned(key: str) -> Refused:
    """Return the answer to a writer whose upload was discarded under it."""
    return Refused(
        ErrorCode.STORE_REFUSED,
        f"the upload of {key} was discarded while it ran, as its checkpoint can no longer be committed",
    )


def target(buffer: bytearray | memoryview | mmap) -> memoryview:
    """Return the buffer of a ``get_into`` as a flat, writable view of bytes.

    Raises:
        ValueError: it is read-only, or not contiguous: a bug.
    """
    view = memoryview(buffer)
    if view.readonly or not view.c_contiguous:
        raise ValueError("bytes can be read only into a writable, contiguous buffer")
    return view.cast("B")


def check_range(offset: int, length: int | None) -> None:
    """Raise ValueError for a range that no blob can have."""
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"bad range: offset {offset}, length {length}")
