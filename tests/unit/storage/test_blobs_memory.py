import threading

import pytest

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobInfo, check_prefix
from dtrain.storage.blobs.probe import probe, probe_soon

DATA = b"data"
CRCS = [digest.crc32c(DATA)]


def failing(at: str, error: DtrainError) -> MemoryBlobs:
    def fault(op: str, key: str) -> None:
        if op == at:
            raise error

    return MemoryBlobs(fault=fault)


def test_a_fault_before_a_put_leaves_nothing() -> None:
    store = failing("put", Unavailable(ErrorCode.STORE_UNAVAILABLE, "down"))
    with pytest.raises(Unavailable):
        store.put("a", [DATA], chunk_crcs=CRCS)
    assert list(store.list("")) == list(store.list_unfinished("")) == []


def test_a_fault_within_a_put_leaves_an_unfinished_upload() -> None:
    store = failing("put.begun", Unavailable(ErrorCode.STORE_UNAVAILABLE, "down"))
    with pytest.raises(Unavailable):
        store.put("a", [DATA], chunk_crcs=CRCS)
    assert list(store.list("")) == []
    assert len(list(store.list_unfinished(""))) == 1


def test_a_fault_after_a_put_leaves_the_blob() -> None:
    store = failing("put.stored", OutcomeUnknown(ErrorCode.STORE_UNAVAILABLE, "lost"))
    with pytest.raises(OutcomeUnknown):
        store.put("a", [DATA], chunk_crcs=CRCS)
    assert store.get("a") == DATA


def test_an_upload_discarded_meanwhile_is_not_stored() -> None:
    store = MemoryBlobs()
    store.fault = lambda op, key: (
        [store.discard_unfinished(token) for token in store.list_unfinished(key)].clear()
        if op == "put.begun"
        else None
    )
    with pytest.raises(Refused, match="discarded"):
        store.put("a", [DATA], chunk_crcs=CRCS)
    with pytest.raises(NotFound):
        store.get("a")


@pytest.mark.parametrize("op", ["put", "get", "head", "list", "delete"])
def test_the_probe_passes_on_what_the_store_said(op: str) -> None:
    with pytest.raises(Refused, match="said so"):
        probe(failing(op, Refused(ErrorCode.STORE_REFUSED, "said so")))


def test_the_probe_refuses_a_store_that_returns_other_bytes() -> None:
    class Liar(MemoryBlobs):
        def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
            return b"lies"

    class Forgetter(MemoryBlobs):
        def head(self, key: str) -> BlobInfo:
            return BlobInfo(key, 0)

    for store, words in ((Liar(), "other bytes"), (Forgetter(), "another size")):
        with pytest.raises(Refused, match=words) as refusal:
            probe(store)
        assert refusal.value.fix
        assert list(store.list("")) == []


def test_a_prefix_is_any_start_of_a_key() -> None:
    for prefix in ("", "a", "a/", "a/b."):
        assert check_prefix(prefix) == prefix
    for prefix in ("/", "a//", "../", ".", "ä"):
        with pytest.raises(ValueError):
            check_prefix(prefix)


def test_a_probe_that_hangs_is_not_waited_for() -> None:
    release = threading.Event()

    def hang(_op: str, _key: str) -> None:
        release.wait(20)

    try:
        assert "does not answer within 0.05 s" in probe_soon(MemoryBlobs(fault=hang), limit_s=0.05)
    finally:
        release.set()


def test_a_probe_tells_away_from_refused() -> None:
    assert probe_soon(MemoryBlobs()) == ""
    assert probe_soon(failing("put", Unavailable(ErrorCode.STORE_UNAVAILABLE, "down"))) == "down"
    with pytest.raises(Refused, match="said so"):
        probe_soon(failing("put", Refused(ErrorCode.STORE_NO_BUCKET, "said so")))
