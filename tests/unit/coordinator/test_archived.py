"""Reading logs from the store: the union of many parts, with what is missing said where it is."""

import pytest

from dtrain.coordinator.api.archived import LIST_S, Archived, ArchivedLogs
from dtrain.protocol import archive
from dtrain.protocol.archive import Mark, Part
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Rank, Uid
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.memory import MemoryBlobs

JOB, UID = JobName("j"), Uid("u")
TEXT = b"".join(b"line %03d\n" % n for n in range(100))


class Bench:
    def __init__(self) -> None:
        self.store = MemoryBlobs("m")
        self.now = 0.0
        self.reads: list[str] = []
        self.logs = ArchivedLogs(ClusterName("c"), self.open, monotonic=lambda: self.now)

    def open(self, uri: str) -> MemoryBlobs:
        self.reads.append(uri)
        return self.store

    def put(self, number: int, *parts: Part, agent: str = "a1", first: int = 0, last: int = 1) -> str:
        prefix = archive.logs_prefix(ClusterName("c"), JOB, UID)
        key = archive.bundle_key(
            prefix, Attempt(1), AgentName(agent), first=Rank(first), last=Rank(last), number=number, nonce="a"
        )
        data = archive.pack(parts)
        self.store.put(key, [data], chunk_crcs=[digest.crc32c(data)])
        return key

    def read(self, offset: int = 0, *, name: str = "0/stdout", bytes_max: int = 10**6) -> Archived | None:
        self.now += LIST_S
        return self.logs.read(
            "memory://m", JOB, UID, attempt=1, name=name, offset=offset, bytes_max=bytes_max
        )

    def whole(self, bytes_max: int) -> bytes:
        data, offset = b"", 0
        while True:
            found = self.read(offset, bytes_max=bytes_max)
            assert found is not None
            data, offset = data + found.data, found.next_offset
            if not found.data:
                assert found.at_end
                return data


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("bytes_max", [7, 100, 10_000])
def test_parts_that_overlap_are_read_once(bench: Bench, bytes_max: int) -> None:
    bench.put(1, Part("0/stdout", 0, TEXT[:300]), Part("1/stdout", 0, b"other"))
    bench.put(2, Part("0/stdout", 300, TEXT[300:500]))
    bench.put(3, Part("0/stdout", 0, TEXT), last=0)
    assert bench.whole(bytes_max) == TEXT


def test_a_gap_is_said_where_it_is_and_lines_after_it_are_whole(bench: Bench) -> None:
    bench.put(1, Part("0/stdout", 0, TEXT[:90]), Part("0/stdout", 503, TEXT[503:]))
    lines = bench.whole(10_000).splitlines()
    assert lines[:10] == TEXT.splitlines()[:10]
    assert lines[10:12] == [b"", b"[dtrain: 414 bytes of this log were not kept]"]
    assert lines[12:] == TEXT.splitlines()[56:]


def test_a_negative_offset_counts_from_the_end(bench: Bench) -> None:
    bench.put(1, Part("0/stdout", 0, TEXT))
    found = bench.read(-9)
    assert found is not None
    assert (found.data, found.offset, found.at_end) == (b"line 099\n", len(TEXT) - 9, True)


def test_marks_tell_the_times_of_what_was_read(bench: Bench) -> None:
    bench.put(1, Part("0/stdout", 0, TEXT, (Mark(90, 10), Mark(180, 20), Mark(900, 30))))
    found = bench.read(90, bytes_max=9)
    assert found is not None
    assert (found.marks, found.until_ms) == ((Mark(180, 20),), 30)


def test_a_rank_without_a_copy_is_told_from_one_that_wrote_nothing(bench: Bench) -> None:
    bench.put(1, Part("0/stdout", 0, TEXT), last=0)
    assert bench.read(name="1/stdout") is None
    at_end = bench.read(len(TEXT))
    assert at_end is not None
    assert (at_end.data, at_end.at_end) == (b"", True)


def test_a_bundle_replaced_since_it_was_listed_is_passed_over(bench: Bench) -> None:
    first = bench.put(1, Part("0/stdout", 0, TEXT[:300]))
    assert bench.logs.bundles("memory://m", JOB, UID)
    bench.store.delete(first)
    assert bench.logs.read("memory://m", JOB, UID, attempt=1, name="0/stdout", offset=0, bytes_max=9) is None
    bench.put(2, Part("0/stdout", 0, TEXT))
    assert bench.whole(10_000) == TEXT


def test_a_damaged_bundle_is_refused_not_shown(bench: Bench) -> None:
    prefix = archive.logs_prefix(ClusterName("c"), JOB, UID)
    key = archive.bundle_key(
        prefix, Attempt(1), AgentName("a1"), first=Rank(0), last=Rank(0), number=1, nonce="a"
    )
    bench.store.put(key, [b"junk"], chunk_crcs=[digest.crc32c(b"junk")])
    with pytest.raises(Refused):
        bench.read()


def test_strange_keys_are_passed_over(bench: Bench) -> None:
    key = archive.logs_prefix(ClusterName("c"), JOB, UID) + "000001/a1/readme"
    bench.store.put(key, [b"x"], chunk_crcs=[digest.crc32c(b"x")])
    assert bench.logs.bundles("memory://m", JOB, UID) == ()
