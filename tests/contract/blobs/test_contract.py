"""What ``storage/blobs/port.py`` promises, of every backend."""

import mmap
import threading

import pytest
from tests.contract.blobs.conftest import Backend, put

from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import PART_BYTES, BlobStore
from dtrain.storage.blobs.probe import probe

DATA = b"0123456789" * 100
CRC = digest.to_hex(digest.crc32c(DATA))


def test_what_was_put_comes_back(store: BlobStore) -> None:
    info = put(store, "a/b.st", DATA)
    assert (info.key, info.size_bytes, info.crc32c) == ("a/b.st", len(DATA), CRC)
    assert store.get("a/b.st") == DATA


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    store.put("empty", [], chunk_crcs=[])
    assert store.put("empty", [b""], chunk_crcs=[0]).size_bytes == 0
    assert store.get("empty") == store.get("empty", offset=0, length=0) == b""
    assert store.head("empty").size_bytes == 0


def test_the_same_bytes_again_succeed(store: BlobStore) -> None:
    assert put(store, "a", DATA) == put(store, "a", DATA)


@pytest.mark.parametrize("other", [DATA[:-1], DATA[:-1] + b"X", b""])
def test_other_bytes_never_replace_a_blob(store: BlobStore, other: bytes) -> None:
    put(store, "a", DATA)
    with pytest.raises(Refused) as refusal:
        put(store, "a", other)
    assert refusal.value.code == ErrorCode.BLOB_EXISTS
    assert refusal.value.fix
    assert store.get("a") == DATA


def test_of_racing_writers_one_wins_and_all_but_its_twins_are_refused(store: BlobStore) -> None:
    outcomes: list[bytes | ErrorCode] = []
    barrier = threading.Barrier(6)

    def write(data: bytes) -> None:
        barrier.wait()
        try:
            put(store, "contended/a", data)
            outcomes.append(data)
        except Refused as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=write, args=(bytes([n // 2]) * 1000,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = store.get("contended/a")
    assert sorted(map(str, outcomes)) == sorted(map(str, [kept, kept] + [ErrorCode.BLOB_EXISTS] * 4))


def test_a_wrong_crc_is_refused_and_nothing_is_visible(store: BlobStore) -> None:
    with pytest.raises(Refused) as refusal:
        store.put("a/b", [DATA], chunk_crcs=[digest.crc32c(DATA) ^ 1])
    assert refusal.value.code == ErrorCode.BLOB_CORRUPT
    assert "chunk 0 of a/b" in refusal.value.message
    assert_nothing_at(store, "a/b")


def test_a_wrong_crc_of_one_part_refuses_the_whole_blob(store: BlobStore, big: bytes) -> None:
    parts = split(big)
    crcs = [digest.crc32c(part) for part in parts]
    crcs[1] ^= 0x80000000
    with pytest.raises(Refused) as refusal:
        store.put("a/b", parts, chunk_crcs=crcs)
    assert refusal.value.code == ErrorCode.BLOB_CORRUPT
    assert "chunk 1 of a/b" in refusal.value.message
    assert_nothing_at(store, "a/b")


def test_a_blob_of_several_parts_round_trips(store: BlobStore, big: bytes) -> None:
    info = put(store, "big", big)
    assert (info.size_bytes, info.crc32c) == (len(big), digest.to_hex(digest.crc32c(big)))
    assert put(store, "big", big) == info
    for index, part in enumerate(split(big)):
        assert store.get("big", offset=index * PART_BYTES, length=len(part)) == part
    assert store.head("big").crc32c in ("", info.crc32c)
    assert list(store.list_unfinished("")) == []
    with pytest.raises(Refused) as refusal:
        put(store, "big", big[:-1])
    assert refusal.value.code == ErrorCode.BLOB_EXISTS


def test_ranges_read_what_lies_there(store: BlobStore, big: bytes) -> None:
    put(store, "a", DATA)
    assert store.get("a", offset=995) == DATA[995:]
    assert store.get("a", offset=3, length=1) == b"3"
    assert store.get("a", offset=0, length=1000) == DATA
    assert store.get("a", offset=1000) == b""
    assert store.get("a", offset=1000, length=0) == b""


def test_ranges_are_read_straight_into_a_buffer(store: BlobStore, big: bytes) -> None:
    put(store, "big", big)
    target = bytearray(len(big))
    for index, part in enumerate(split(big)):
        start = index * PART_BYTES
        store.get_into("big", start, memoryview(target)[start : start + len(part)])
    assert target == big
    with mmap.mmap(-1, 8192) as memory:
        store.get_into("big", 5, memory)
        assert memory[:] == big[5 : 5 + 8192]
    store.get_into("big", len(big), bytearray())


@pytest.mark.parametrize(("offset", "size"), [(995, 6), (1000, 1), (2000, 10)])
def test_a_buffer_that_cannot_be_filled_is_damage(store: BlobStore, offset: int, size: int) -> None:
    put(store, "a", DATA)
    with pytest.raises(Refused) as refusal:
        store.get_into("a", offset, bytearray(size))
    assert refusal.value.code == ErrorCode.BLOB_CORRUPT
    with pytest.raises(NotFound):
        store.get_into("b", 0, bytearray(size))
    with pytest.raises(ValueError, match="writable"):
        store.get_into("a", 0, memoryview(b"fixed"))


@pytest.mark.parametrize(("offset", "length"), [(995, 6), (0, 1001), (1000, 1), (1001, None), (1001, 0)])
def test_a_blob_that_ends_early_is_damage(store: BlobStore, offset: int, length: int | None) -> None:
    put(store, "a", DATA)
    with pytest.raises(Refused) as refusal:
        store.get("a", offset=offset, length=length)
    assert refusal.value.code == ErrorCode.BLOB_CORRUPT


def test_head_knows_size_and_checksum(store: BlobStore) -> None:
    put(store, "a", DATA)
    head = store.head("a")
    assert (head.key, head.size_bytes) == ("a", len(DATA))
    # A folder keeps no checksum of its own; the others must not lose theirs.
    assert head.crc32c == ("" if store.uri.startswith("file:") else CRC)


def test_listing_is_in_key_order_and_by_prefix(store: BlobStore) -> None:
    keys = ["a-b", "a.b", "a/b", "a/b0/c", "a0", "ab/c/d", "b"]
    for key in reversed(keys):
        put(store, key, key.encode())
    assert [info.key for info in store.list("")] == sorted(keys)
    assert [info.key for info in store.list("a/")] == ["a/b", "a/b0/c"]
    assert [info.key for info in store.list("a/b0")] == ["a/b0/c"]
    assert [info.key for info in store.list("ab/c")] == ["ab/c/d"]
    assert [info.key for info in store.list("a")] == sorted(keys)[:-1]
    assert [info.size_bytes for info in store.list("ab")] == [6]
    assert list(store.list("nothing/here")) == []


def test_unfinished_uploads_are_seen_only_as_such_and_can_be_discarded(backend: Backend) -> None:
    store = backend.store
    for key in ("a/one", "a/two", "b/three"):
        backend.leave_unfinished(key)
    assert_nothing_at(store, "a/one", unfinished=True)
    assert len(list(store.list_unfinished(""))) == 3
    (token,) = store.list_unfinished("a/on")
    assert "a/one" in token
    store.discard_unfinished(token)
    store.discard_unfinished(token)
    assert list(store.list_unfinished("a/one")) == []
    assert len(list(store.list_unfinished("a/"))) == 1
    put(store, "a/two", DATA)
    assert store.get("a/two") == DATA


def test_a_token_that_no_store_gave_out_is_a_bug(store: BlobStore) -> None:
    if store.uri.startswith("memory:"):
        store.discard_unfinished("nonsense")
        return
    with pytest.raises(ValueError, match="token"):
        store.discard_unfinished("nonsense")


def test_deleting_is_idempotent(store: BlobStore) -> None:
    put(store, "a/b/c", DATA)
    put(store, "a/d", DATA)
    store.delete("a/b/c")
    store.delete("a/b/c")
    store.delete("never/was")
    assert_nothing_at(store, "a/b/c")
    assert [info.key for info in store.list("a")] == ["a/d"]
    put(store, "a/b/c", DATA)
    assert store.get("a/b/c") == DATA


def test_what_is_missing_is_not_found(store: BlobStore) -> None:
    put(store, "a/b", DATA)
    assert_nothing_at(store, "a")
    assert_nothing_at(store, "a/b/c")
    assert_nothing_at(store, "x/y")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/../b", "./a", ".incoming/x", "a\nb", "ä"])
def test_a_bad_key_is_a_bug(store: BlobStore, key: str) -> None:
    for call in (
        lambda: put(store, key, DATA),
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.delete(key),
    ):
        with pytest.raises(ValueError, match="bad blob key"):
            call()


def test_parts_of_another_shape_are_a_bug(store: BlobStore) -> None:
    for parts, crcs in ([[b"a", b"b"], [1, 2]], [[b"a"], []], [[bytes(PART_BYTES + 1)], [0]]):
        with pytest.raises(ValueError, match=r"parts|CRCs"):
            store.put("a", parts, chunk_crcs=crcs)
    for offset, length in ((-1, None), (0, -1)):
        with pytest.raises(ValueError, match="bad range"):
            store.get("a", offset=offset, length=length)


def test_a_good_store_passes_the_probe_and_keeps_nothing_of_it(store: BlobStore) -> None:
    probe(store)
    assert list(store.list("")) == []


def assert_nothing_at(store: BlobStore, key: str, *, unfinished: bool = False) -> None:
    for call in (lambda: store.get(key), lambda: store.head(key), lambda: store.get(key, length=0)):
        with pytest.raises(NotFound) as refusal:
            call()
        assert refusal.value.code == ErrorCode.BLOB_NOT_FOUND
    assert key not in [info.key for info in store.list("")]
    if not unfinished:
        assert list(store.list_unfinished(key)) == []


def split(data: bytes) -> list[bytes]:
    return [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
