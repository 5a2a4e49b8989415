"""A rank asks for what it needs, follows a plan that is replaced, and never trusts a shared place."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry, Manifest
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import (
    LINE_BYTES_MAX,
    BlobPlace,
    ChunkSpan,
    Have,
    Held,
    Need,
    Report,
    RestorePlan,
    StopRank,
    encode_line,
)
from dtrain.protocol.snapshot import WorkerPhase
from dtrain.trainer.checkpoint import source as sources
from dtrain.trainer.checkpoint.source import DemandSource, PlanSource, Range, spans_of
from dtrain.trainer.session import Session

SIZES = (CHUNK_BYTES * 2 + 10, 100, 0)


def manifest() -> Manifest:
    blobs = tuple(
        BlobEntry(f"b{number}", Rank(number), size, "", ("00000000",) * -(-size // CHUNK_BYTES))
        for number, size in enumerate(SIZES)
    )
    return Manifest(
        1, ClusterName("c"), JobName("j"), Uid("u"), Seq(7), Attempt(1), "n", Step(70), 3, CHUNK_BYTES,
        "crc32c", sum(SIZES), "", blobs, {}, {},
    )  # fmt: skip


class Agent:
    """Answers from a file that holds the manifest and the blobs one behind the other."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bytes"
        text = codec.encode(manifest())
        # Three pages for it: blobs begin on pages.
        self.first = 3 * os.sysconf("SC_PAGE_SIZE")
        assert len(text) < self.first
        page = os.sysconf("SC_PAGE_SIZE")
        self.offsets = [self.first, self.first + -(-SIZES[0] // page) * page, self.first]
        with self.path.open("wb") as file:
            file.write(text)
            for size, offset, letter in zip(SIZES, self.offsets, b"abc", strict=True):
                file.seek(offset)
                file.write(bytes([letter]) * size)
        self.text_bytes = len(text)
        self.asked: list[tuple[str, tuple[ChunkSpan, ...], bool, bool]] = []
        self.answers: list[Callable[[Need], Have | None]] = []
        self.shared = False
        self.other: RestorePlan | None = None

    def plan(self, token: str = "t1", *, path: str = "") -> RestorePlan:
        return RestorePlan(
            Seq(7), Step(70), path or str(self.path), 0, self.text_bytes, on_demand=True, token=token
        )

    def have(self, need: Need, *, path: str = "", good: bool = True) -> Have:
        held = tuple(
            Held(blob, BlobPlace(path or str(self.path), self.offsets[blob], SIZES[blob]), self.shared)
            for blob in sorted({span.blob for span in need.chunks} or range(3))
        )
        return Have(need.plan, need.number, () if need.again else held, good)

    def ask(
        self, token: str, chunks: Sequence[ChunkSpan], *, whole: bool = False, again: bool = False
    ) -> Have | None:
        self.asked.append((token, tuple(chunks), whole, again))
        answer = self.answers.pop(0) if self.answers else self.have
        return answer(Need(token, len(self.asked), tuple(chunks), whole, again))

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None:
        del at_most_s
        return self.other if self.other is not None and self.other.token != token else None


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def test_neighbouring_chunks_are_asked_for_in_one_word() -> None:
    assert spans_of([(1, 0), (0, 2), (0, 0), (0, 1), (1, 2)]) == [
        ChunkSpan(0, 0, 3),
        ChunkSpan(1, 0, 1),
        ChunkSpan(1, 2, 1),
    ]


def test_only_the_chunks_of_the_wanted_ranges_are_asked_for(agent: Agent) -> None:
    source = DemandSource(agent.plan(), agent)
    source.want([Range(0, CHUNK_BYTES - 1, 2), Range(1, 0, 0), Range(2, 0, 0)])
    assert agent.asked == [("t1", (ChunkSpan(0, 0, 2),), False, False)]
    assert bytes(source.view(0, CHUNK_BYTES - 1, 2)) == b"aa"
    assert bytes(source.view(2, 0, 0)) == b""
    with pytest.raises(Refused, match="were not asked for"):
        source.view(0, 2 * CHUNK_BYTES, 1)
    with pytest.raises(Refused, match="were not asked for"):
        source.view(1, 0, 1)


def test_wanting_more_says_the_whole_need_again(agent: Agent) -> None:
    source = DemandSource(agent.plan(), agent)
    source.want([Range(0, 0, 1)])
    view = source.view(0, 0, 1)
    source.want([Range(1, 99, 1)])
    assert agent.asked[-1][1] == (ChunkSpan(0, 0, 1), ChunkSpan(1, 0, 1))
    assert (bytes(view), bytes(source.view(1, 0, 100))) == (b"a", b"b" * 100)


@pytest.mark.parametrize(
    "wanted", [Range(0, 0, SIZES[0] + 1), Range(3, 0, 0), Range(1, -1, 5), Range(1, 0, -1)]
)
def test_ranges_beyond_their_blob_are_refused(agent: Agent, wanted: Range) -> None:
    places = tuple(BlobPlace(str(agent.path), agent.offsets[blob], SIZES[blob]) for blob in range(3))
    whole = RestorePlan(Seq(7), Step(70), str(agent.path), 0, agent.text_bytes, places)
    for source in (DemandSource(agent.plan(), agent), PlanSource(whole)):
        with pytest.raises(Refused) as refused:
            source.want([wanted])
        assert refused.value.code is ErrorCode.RESTORE_FAILED
    assert agent.asked == []


def test_nothing_is_written_through_a_view(agent: Agent) -> None:
    source = DemandSource(agent.plan(), agent)
    source.want([Range(1, 0, 100)])
    assert source.view(1, 0, 100).readonly


def test_private_places_need_no_second_look(agent: Agent) -> None:
    source = DemandSource(agent.plan(), agent)
    source.want([Range(0, 0, 1)])
    assert source.is_still_good()
    assert len(agent.asked) == 1


def test_shared_places_are_looked_at_again_and_loaded_anew_if_they_changed(agent: Agent) -> None:
    agent.shared = True
    source = DemandSource(agent.plan(), agent)
    source.want([Range(0, 0, 1)])
    agent.answers = [lambda need: agent.have(need, good=False)]
    assert not source.is_still_good()
    assert agent.asked[-1] == ("t1", (ChunkSpan(0, 0, 1),), False, True)
    source.want([Range(0, 0, 1)])
    assert bytes(source.view(0, 0, 1)) == b"a"
    assert source.is_still_good()


def test_a_shared_place_that_was_left_in_between_is_not_good(agent: Agent) -> None:
    """What was viewed before a second want lies where nobody looks any more."""
    agent.shared = True
    source = DemandSource(agent.plan(), agent)
    source.want([Range(0, 0, 1)])
    agent.shared = False
    source.want([Range(1, 0, 1)])
    assert not source.is_still_good()
    source.want([Range(0, 0, 1)])
    assert source.is_still_good()


def test_a_plan_that_is_replaced_is_followed(agent: Agent) -> None:
    source = DemandSource(agent.plan(path="/proc/1/nothing"), agent)
    agent.other = agent.plan("t2")
    agent.answers = [lambda need: None, lambda need: agent.have(need, path="/proc/1/nothing")]
    assert source.manifest.seq == 7
    agent.other = agent.plan("t3")
    follow = agent.await_other_plan

    def later(token: str, at_most_s: float) -> RestorePlan | None:
        found = follow(token, at_most_s)
        agent.other = agent.plan("t4")
        return found

    agent.await_other_plan = later  # type: ignore[method-assign]
    source.want([Range(1, 0, 100)])
    assert [token for token, *_ in agent.asked] == ["t2", "t3", "t4"]
    assert bytes(source.view(1, 0, 100)) == b"b" * 100


def test_without_another_plan_the_restore_fails(agent: Agent) -> None:
    source = DemandSource(agent.plan(), agent)
    agent.answers = [lambda need: None]
    with pytest.raises(Refused) as refused:
        source.want([Range(1, 0, 1)])
    assert refused.value.code is ErrorCode.RESTORE_FAILED
    with pytest.raises(Refused, match="cannot open"):
        _ = DemandSource(agent.plan(path="/proc/1/nothing"), agent).manifest


def test_a_need_of_too_many_words_is_for_everything(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPANS_MAX", 1)
    source = DemandSource(agent.plan(), agent)
    source.want([Range(0, 0, 1), Range(1, 0, 1)])
    assert agent.asked == [("t1", (), True, False)]
    assert bytes(source.view(1, 0, 1)) == b"b"


def test_the_longest_need_fits_a_line() -> None:
    spans = tuple(ChunkSpan(10**6 + number, 10**6, 10**6) for number in range(sources.SPANS_MAX))
    report = Report(WorkerPhase.RESTORING, Step(0), need=Need("t" * 16, 10**6, spans))
    assert len(encode_line(report)) < LINE_BYTES_MAX


# The session's side ------------------------------------------------------------------


class Asking:
    """A session, and a thread that asks it for something."""

    def __init__(self) -> None:
        self.session = Session(0, lambda: None)
        self.session.handle(plan("t1"))
        self.answers: list[Have | None] = []
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()
        while self.session.report().need is None:
            self.thread.join(0.001)

    def _ask(self) -> None:
        self.answers.append(self.session.ask("t1", [ChunkSpan(0, 0, 1)]))

    def over(self) -> Have | None:
        self.thread.join(10.0)
        (answer,) = self.answers
        return answer


def plan(token: str) -> RestorePlan:
    return RestorePlan(Seq(7), Step(70), on_demand=bool(token), token=token)


@pytest.fixture
def asking() -> Iterator[Asking]:
    found = Asking()
    yield found
    found.session.handle(StopRank("the test is over"))
    found.thread.join(10.0)
    assert not found.thread.is_alive()


def test_a_need_is_in_every_report_until_the_state_is_loaded(asking: Asking) -> None:
    need = Need("t1", 1, (ChunkSpan(0, 0, 1),))
    assert asking.session.report().need == need
    asking.session.handle(Have("t0", 1))
    asking.session.handle(Have("t1", 9))
    asking.session.handle(plan("t1"))  # said again to a rank that reconnected
    assert not asking.answers
    asking.session.handle(Have("t1", 1))
    assert asking.over() == Have("t1", 1)
    assert asking.session.report().need == need
    asking.session.restored(70)
    assert asking.session.report().need is None


@pytest.mark.parametrize("end", [plan("t2"), plan(""), StopRank("over")])
def test_asking_ends_with_the_plan_and_with_the_attempt(asking: Asking, end: RestorePlan | StopRank) -> None:
    asking.session.handle(end)
    assert asking.over() is None


def test_a_plan_without_demand_is_not_replaced_by_another_of_its_kind() -> None:
    session = Session(0, lambda: None)
    first = RestorePlan(Seq(7), Step(70), "/one")
    session.handle(first)
    session.handle(RestorePlan(Seq(7), Step(70), "/two"))
    assert session.await_plan() == first
