"""Copies what ranks wrote to the store, in the transfer process, as nobody waits for it."""

from collections.abc import Callable
from pathlib import Path

from dtrain.agent import log_times
from dtrain.agent.transferring import Archive, FilePart
from dtrain.protocol import archive
from dtrain.protocol.archive import Part
from dtrain.runtime import retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import PART_BYTES, BlobStore

DEADLINE_S = 30.0
"""How long one try goes on; the agent asks again, with growing pauses."""


def run(order: Archive, stores: Callable[[str], BlobStore]) -> None:
    """Carry out an order.

    Raises:
        DtrainError: the store did not take it; it may be asked for again.
        OSError: a file could not be read.
    """
    store = stores(order.store)
    if order.key:
        data = archive.pack(part for one in order.parts if (part := _read(one)) is not None)
        chunks = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
        _ask(lambda: store.put(order.key, chunks, chunk_crcs=[digest.crc32c(chunk) for chunk in chunks]))
    for key in order.replaces:
        _ask(lambda key=key: store.delete(key))  # type: ignore[misc]


def _read(one: FilePart) -> Part | None:
    try:
        with Path(one.path).open("rb") as file:
            file.seek(one.offset)
            data = file.read(one.size)
    except FileNotFoundError:
        return None
    if not data:
        return None
    end = one.offset + len(data)
    marks = log_times.read(Path(one.times)) if one.times else ()
    return Part(one.name, one.offset, data, tuple(log_times.within(marks, one.offset, end)))


def _ask(operation: Callable[[], object]) -> None:
    # A key is used for one content only, so that writing it again is harmless.
    retry.call(operation, attempts=3, deadline_s=DEADLINE_S, idempotent=True)
