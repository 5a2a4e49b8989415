"""Whether a store can be used at all, asked before a job depends on it."""

import contextlib
import queue
import secrets
import threading

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobStore

PREFIX = "dtrain-probe/"

SOON_S = 5.0


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


def probe_soon(store: BlobStore, *, limit_s: float = SOON_S) -> str:
    """Probe, but not for longer than somebody waits: return what kept the store from answering, or "".

    Raises:
        Refused: the store did answer, and will answer the same again.
    """
    done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            probe(store)
        except Exception as error:  # noqa: BLE001 - told to who waits
            done.put(error)
        else:
            done.put(None)

    # Left alone if it hangs: it ends with the store's own timeouts.
    threading.Thread(target=run, name="probe", daemon=True).start()
    try:
        error = done.get(timeout=limit_s)
    except queue.Empty:
        return f"{store.uri} does not answer within {limit_s:g} s"
    if isinstance(error, Unavailable | OutcomeUnknown):
        return error.message
    if error is not None:
        raise error
    return ""


def _unfit(store: BlobStore, why: str) -> Refused:
    return Refused(
        ErrorCode.STORE_REFUSED, f"{store.uri} {why}", fix="use a store with strongly consistent reads"
    )
