"""A rank reads into the memory that the bytes are for, and believes only what it finds there."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.protocol import checksum, codec
from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry, Manifest
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import BlobPlace, ChunkSpan, Have, Held, Need, RestorePlan
from dtrain.storage.blobs import digest
from dtrain.trainer.checkpoint import reading
from dtrain.trainer.checkpoint import source as sources
from dtrain.trainer.checkpoint.reading import Chunk, Into, Place, Reader, by_chunk
from dtrain.trainer.checkpoint.source import DemandSource, Range

SMALL = 1000  # bytes of a chunk, where a test may choose


def manifest(blobs: Sequence[bytes], chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    entries = tuple(
        BlobEntry(
            f"b{number}", Rank(number), len(blob), "",
            tuple(
                digest.to_hex(digest.crc32c(blob[at : at + chunk_bytes]))
                for at in range(0, len(blob), chunk_bytes)
            ),
        )
        for number, blob in enumerate(blobs)
    )  # fmt: skip
    return Manifest(
        1, ClusterName("c"), JobName("j"), Uid("u"), Seq(7), Attempt(1), "n", Step(70), 1, chunk_bytes,
        "crc32c", sum(map(len, blobs)), "", entries, {}, {},
    )  # fmt: skip


def opened(data: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, data)
    return fd


def parts_of(blob: int, ranges: Sequence[tuple[int, int]]) -> tuple[list[Into], list[bytearray]]:
    held = [bytearray(length) for _, length in ranges]
    return [Into(blob, at, memoryview(h)) for (at, _), h in zip(ranges, held, strict=True)], held


def everywhere(about: Manifest, fd: int, offset: int = 0) -> dict[Chunk, Place]:
    """All chunks of the first blob in one file."""
    return {(0, number): Place(fd, offset) for number in range(len(about.blobs[0].chunks))}


# Reading ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_every_part_gets_its_bytes_whatever_lies_between(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(reading, "BLOCK_BYTES", rng.choice([1, 7, 256, 4096]))
    monkeypatch.setattr(reading, "_BUFFERS_MAX", rng.choice([1, 3, 512]))
    monkeypatch.setattr(reading, "LANES_FROM_BYTES", rng.choice([0, 1 << 40]))
    blob = rng.randbytes(rng.randrange(1, 5 * SMALL))
    cuts = sorted(rng.sample(range(len(blob) + 1), min(len(blob) + 1, 2 * rng.randrange(1, 9))))
    ranges = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    parts, held = parts_of(0, ranges)
    rng.shuffle(parts)
    about = manifest([blob], SMALL)
    fd = opened(b"before" + blob)
    try:
        assert Reader(about, digest.crc32c).read(by_chunk(about, parts), everywhere(about, fd, 6)) == []
    finally:
        os.close(fd)
    assert [bytes(one) for one in held] == [blob[at : at + length] for at, length in ranges]


@pytest.mark.parametrize("lanes_from", [0, 1 << 40])
def test_exactly_the_chunks_with_other_bytes_are_named(
    lanes_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LANES_FROM_BYTES", lanes_from)
    good = random.Random(1).randbytes(20 * SMALL)
    bad = bytearray(good)
    for at in (3 * SMALL, 9 * SMALL - 1, 15 * SMALL + 5):
        bad[at] ^= 1
    about = manifest([good], SMALL)
    # The last of them lies beside what is wanted of its chunk: the digest is for all of it.
    parts, _ = parts_of(0, [(2 * SMALL, 8 * SMALL), (15 * SMALL + 10, 5)])
    fd = opened(bytes(bad))
    try:
        found = Reader(about, digest.crc32c).read(by_chunk(about, parts), everywhere(about, fd))
    finally:
        os.close(fd)
    assert found == [(0, 3), (0, 8), (0, 15)]


def test_a_file_that_is_cut_short_is_not_what_was_committed() -> None:
    blob = random.Random(1).randbytes(3 * SMALL)
    about = manifest([blob], SMALL)
    parts, _ = parts_of(0, [(0, 3 * SMALL)])
    fd = opened(blob[: SMALL + 5])
    try:
        found = Reader(about, digest.crc32c).read(by_chunk(about, parts), everywhere(about, fd))
    finally:
        os.close(fd)
    assert found == [(0, 1), (0, 2)]


def test_what_cannot_be_read_is_not_what_was_committed() -> None:
    blob = bytes(SMALL)
    about = manifest([blob], SMALL)
    parts, _ = parts_of(0, [(0, SMALL)])
    reader, writer = os.pipe()  # no file: nothing can be read at an offset
    try:
        assert Reader(about, digest.crc32c).read(by_chunk(about, parts), everywhere(about, reader)) == [
            (0, 0)
        ]
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("ranges", [[(0, 10), (9, 5)], [(2 * SMALL - 1, 2)], [(-1, 5)]])
def test_parts_that_share_bytes_or_reach_beyond_the_blob_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(Refused) as refused:
        by_chunk(manifest([bytes(2 * SMALL)], SMALL), parts_of(0, ranges)[0])
    assert refused.value.code is ErrorCode.RESTORE_FAILED


def test_only_a_crc32c_can_be_provided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_provided", None)
    with pytest.raises(ValueError, match="not CRC32C"):
        checksum.provide(lambda data, value: value + len(data))
    assert checksum.provided() is None
    checksum.provide(digest.crc32c)
    assert checksum.provided() is not None


# With the agent ----------------------------------------------------------------------


class Agent:
    """Tells, each time it is asked, the next of some copies of the blob."""

    def __init__(self, folder: Path, *copies: bytes) -> None:
        self.blob = copies[-1]
        self.about = manifest([self.blob])
        text = codec.encode(self.about)
        self.plan_path = folder / "manifest"
        self.plan_path.write_bytes(text)
        self.text_bytes = len(text)
        self.paths = [folder / f"copy{number}" for number in range(len(copies))]
        for path, copy in zip(self.paths, copies, strict=True):
            path.write_bytes(copy)
        self.at = 0
        self.asked: list[tuple[str, tuple[ChunkSpan, ...], bool]] = []
        self.other: RestorePlan | None = None
        self.before: Callable[[], Have | None] | None = None

    def plan(self, token: str = "t1") -> RestorePlan:
        return RestorePlan(
            Seq(7), Step(70), str(self.plan_path), 0, self.text_bytes, on_demand=True, token=token
        )

    def source(self) -> DemandSource:
        return DemandSource(self.plan(), self)

    def ask(
        self,
        token: str,
        chunks: Sequence[ChunkSpan],
        *,
        whole: bool = False,
        again: bool = False,
        unverified: bool = False,
    ) -> Have | None:
        assert unverified
        assert not whole
        self.asked.append((token, tuple(chunks), again))
        if self.before is not None:
            before, self.before = self.before, None
            return before()
        if again:
            self.at = min(self.at + 1, len(self.paths) - 1)
            return Have(token, len(self.asked), good=False)
        place = BlobPlace(str(self.paths[self.at]), 0, len(self.blob))
        return Have(token, len(self.asked), (Held(0, place, shared=True),))

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None:
        return self.other


BLOB = random.Random(3).randbytes(2 * CHUNK_BYTES + 99)


def flipped(at: int) -> bytes:
    return BLOB[:at] + bytes([BLOB[at] ^ 1]) + BLOB[at + 1 :]


@pytest.fixture(autouse=True)
def _crc32c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_provided", digest.crc32c)


def test_only_the_chunks_of_the_parts_are_asked_for(tmp_path: Path) -> None:
    agent = Agent(tmp_path, BLOB)
    parts, held = parts_of(0, [(CHUNK_BYTES + 1, 5)])
    agent.source().fill(parts)
    assert bytes(held[0]) == BLOB[CHUNK_BYTES + 1 :][:5]
    assert agent.asked == [("t1", (ChunkSpan(0, 1, 1),), False)]


def test_only_what_was_bad_is_said_and_read_again(tmp_path: Path) -> None:
    agent = Agent(tmp_path, flipped(CHUNK_BYTES), flipped(CHUNK_BYTES + 1), BLOB)
    parts, held = parts_of(0, [(0, len(BLOB))])
    agent.source().fill(parts)
    assert bytes(held[0]) == BLOB
    one = (ChunkSpan(0, 1, 1),)
    assert agent.asked == [
        ("t1", (ChunkSpan(0, 0, 3),), False),
        *[("t1", one, again) for again in (True, False, True, False)],
    ]


def test_everything_that_is_expected_is_asked_for_at_once(tmp_path: Path) -> None:
    """However many times memory has to be lent for it: a store far away serves it all meanwhile."""
    agent = Agent(tmp_path, BLOB)
    source = agent.source()
    source.expect([Range(0, 0, 1), Range(0, 2 * CHUNK_BYTES, 1)])
    for begin in (0, 2 * CHUNK_BYTES):
        parts, held = parts_of(0, [(begin, 5)])
        source.fill(parts)
        assert bytes(held[0]) == BLOB[begin : begin + 5]
    assert agent.asked == [("t1", (ChunkSpan(0, 0, 1), ChunkSpan(0, 2, 1)), False)]


def test_bytes_that_stay_bad_end_the_restore_with_their_names(tmp_path: Path) -> None:
    """The agent finds them good, time and again: then it is this process that cannot be trusted."""
    agent = Agent(tmp_path, flipped(CHUNK_BYTES), BLOB)
    agent.paths.pop()
    parts, _ = parts_of(0, [(0, len(BLOB))])
    with pytest.raises(Refused, match=r"chunk 1 of b0, read from .*copy0") as refused:
        agent.source().fill(parts)
    assert refused.value.code is ErrorCode.RESTORE_FAILED
    assert len([asked for asked in agent.asked if not asked[2]]) == sources.READS_MAX


def test_a_plan_that_is_replaced_in_between_is_followed_with_what_is_left(tmp_path: Path) -> None:
    agent = Agent(tmp_path, flipped(5), BLOB)
    agent.other = agent.plan("t2")
    source = agent.source()
    agent.before = lambda: None
    parts, held = parts_of(0, [(0, len(BLOB))])
    source.fill(parts)
    assert [token for token, *_ in agent.asked] == ["t1", "t2", "t2", "t2"]
    assert bytes(held[0]) == BLOB


def test_a_place_that_is_gone_is_asked_for_under_the_next_plan(tmp_path: Path) -> None:
    agent = Agent(tmp_path, BLOB)
    agent.other = agent.plan("t2")
    gone = BlobPlace("/proc/1/nothing", 0, len(BLOB))
    agent.before = lambda: Have("t1", 1, (Held(0, gone, shared=True),))
    parts, held = parts_of(0, [(0, len(BLOB))])
    agent.source().fill(parts)
    assert bytes(held[0]) == BLOB
    agent.before = lambda: None
    agent.other = None
    with pytest.raises(Refused, match="no longer holds"):
        agent.source().fill(parts)


def test_without_a_crc32c_a_rank_fills_nothing_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "_provided", None)
    assert Agent(tmp_path, BLOB).source().filler is None


def test_an_answer_that_names_no_place_is_refused(tmp_path: Path) -> None:
    agent = Agent(tmp_path, BLOB)
    agent.before = lambda: Have("t1", 1)
    with pytest.raises(Refused, match="does not say where"):
        agent.source().fill(parts_of(0, [(0, 1)])[0])


def test_a_need_says_that_it_is_unverified_and_agents_that_know_nothing_of_it_can_read_it() -> None:
    need = Need("t", 1, (ChunkSpan(0, 0, 1),), unverified=True)
    said = codec.to_json(need)
    assert said["unverified"] is True
    assert codec.from_json(Need, {**said, "another": 1}) == need
    del said["unverified"]
    assert codec.from_json(Need, said) == replace(need, unverified=False)
