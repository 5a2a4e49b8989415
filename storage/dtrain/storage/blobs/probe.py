"""Whether a store can be used at all, asked before a job depends on it."""

import contextlib
import secrets

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobStore

PREFIX = "dtrain-probe/"


def probe(store: BlobStore) -> None:
    """List, write, read and delete one small blob under ``dtrain-probe/``.

    Not retried: the caller wants the reason at once.

    Raises:
        Refused, Unavailable, OutcomeUnknown: what the store said, with a ``fix``.
    """
    key = PREFIX + secrets.token_hex(8)
    data = f"written by dtrain to see whether it can: {key}".encode()
    # Listing first: some stores create a misspelt bucket when it is written to.
    list(store.list(key))
    try:
        store.put(key, [data], chunk_crcs=[digest.crc32c(data)])
        if store.get(key) != data or store.get(key, offset=3, length=4) != data[3:7]:
            raise _unfit(store, "returns other bytes than were written")
        if store.head(key).size_bytes != len(data):
            raise _unfit(store, "reports another size than was written")
        if [info.key for info in store.list(PREFIX) if info.key == key] != [key]:
            raise _unfit(store, "does not list what was written")
    except BaseException:
        with contextlib.suppress(DtrainError):
            store.delete(key)
        raise
    store.delete(key)


def _unfit(store: BlobStore, why: str) -> Refused:
    return Refused(
        ErrorCode.STORE_REFUSED, f"{store.uri} {why}", fix="use a store with strongly consistent reads"
    )
