"""Which bytes of a log are copied, and an archiver that forgets nothing it was once able to copy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.agent import log_times, transfer_archive
from dtrain.agent.archiver import RETRY_S_FIRST, SETTLE_S, SMALL_MAX, Archiver, is_copied
from dtrain.agent.core.archiving import Range, increment, whole
from dtrain.agent.logs import RankLogs
from dtrain.agent.transferring import Archive, Archived
from dtrain.protocol import archive
from dtrain.protocol.archive import Mark, Part
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Rank, Uid
from dtrain.storage.blobs.memory import MemoryBlobs

JOB, UID = JobName("train"), Uid("u1")
PREFIX = archive.logs_prefix(ClusterName("c"), JOB, UID)


def test_of_a_long_log_beginning_and_end_are_kept() -> None:
    assert whole(1000, 1000) == (Range(0, 1000),)
    assert whole(5000, 1000) == (Range(0, 250), Range(4250, 5000))
    assert whole(0, 1000) == ()


@pytest.mark.parametrize("size", [1, 99, 100, 101, 5000])
def test_what_is_copied_at_once_is_bounded_and_ends_at_the_end(size: int) -> None:
    found = increment(0, size, 1000, 100)
    assert sum(one.end - one.start for one in found) <= 100
    assert found[-1].end == size
    assert found[0].start == 0
    assert increment(size, size, 1000, 100) == ()


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now


class Bench:
    """An archiver whose orders are carried out, or lost, on demand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.time = Time()
        self.store = MemoryBlobs("m")
        self.orders: list[Archive] = []
        self.over = False
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.archiver = self.new()

    def new(self, bytes_max: int = 4000) -> Archiver:
        return Archiver(
            RankLogs(self.root),
            ClusterName("c"),
            AgentName("a1"),
            send=self.orders.append,
            ended=lambda *_: self.over,
            clock=self.time,
            interval_s=10.0,
            bytes_max=bytes_max,
            log=lambda event, **fields: self.said.append((event, fields)),
        )

    def begin(self, *, store: str = "memory://m", ranks: int = 2) -> None:
        self.archiver.prepare(JOB, UID, Attempt(1), Rank(4), ranks=ranks, store=store)
        for local in range(ranks):
            (self.root / "train-u1" / "attempt_1" / str(local)).mkdir()

    def write(self, local: int, text: str, stream: str = "stdout") -> None:
        with (self.root / "train-u1" / "attempt_1" / str(local) / f"{stream}.log").open("a") as file:
            file.write(text)

    def turn(self, seconds: float = 0.0, *, answer: Callable[[Archive], None] | None = None) -> None:
        """Some time passes; orders are carried out."""
        self.time.now += seconds
        self.archiver.turn()
        while self.orders:
            order = self.orders.pop(0)
            (answer or self.carry_out)(order)
            self.archiver.turn()

    def carry_out(self, order: Archive) -> None:
        transfer_archive.run(order, lambda _: self.store)
        self.archiver.take(Archived(order.id))

    def bundles(self) -> list[str]:
        return [info.key for info in self.store.list("c/_archive/")]

    def stored(self, name: str) -> bytes:
        """The union of a log's parts; they must agree and leave no gap."""
        everything = (part for key in self.bundles() for part in archive.unpack(self.store.get(key)))
        parts = [part for part in everything if part.name == name]
        data = bytearray(max((part.end for part in parts), default=0))
        for part in sorted(parts, key=lambda part: part.offset):
            data[part.offset : part.end] = part.data
        return bytes(data)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_lines_are_in_the_store_an_interval_after_they_were_written(bench: Bench) -> None:
    bench.begin()
    bench.turn()
    bench.write(0, "one\n")
    bench.turn(9.9)
    assert not bench.bundles()
    bench.turn(0.2)
    assert bench.stored("4/stdout") == b"one\n"
    bench.write(1, "two\n", "stderr")
    bench.turn(10.0)
    assert bench.stored("5/stderr") == b"two\n"
    bench.turn(100.0)
    assert len(bench.bundles()) == 2, "what is in the store already is not copied again"


def test_when_an_attempt_ends_each_rank_is_copied_whole_and_small_bundles_go(bench: Bench) -> None:
    bench.begin()
    bench.turn()
    for step in range(3):
        bench.write(0, f"step {step}\n")
        bench.write(1, f"step {step}\n")
        bench.turn(10.1)
    assert len(bench.bundles()) == 3
    bench.over = True
    bench.write(0, "last words\n")
    bench.turn()
    bench.turn(SETTLE_S)
    names = [archive.parse_bundle_key(PREFIX, key) for key in bench.bundles()]
    assert [(name.first, name.last) for name in names if name] == [(4, 4), (5, 5)]
    assert bench.stored("4/stdout") == b"step 0\nstep 1\nstep 2\nlast words\n"
    assert json.loads((bench.root / "train-u1/attempt_1/archive.json").read_text())["done"]
    bench.turn(100.0)
    assert not bench.orders


def test_small_bundles_never_pile_up(bench: Bench) -> None:
    bench.begin(ranks=1)
    bench.turn()
    for step in range(3 * SMALL_MAX):
        bench.write(0, f"{step}\n")
        bench.turn(10.1)
        assert len(bench.bundles()) <= SMALL_MAX + 2
    assert bench.stored("4/stdout") == b"".join(b"%d\n" % step for step in range(3 * SMALL_MAX))


def test_a_store_that_is_away_loses_nothing_and_is_told_of_once(bench: Bench) -> None:
    bench.begin(ranks=1)
    bench.write(0, "one\n")

    def refuse(order: Archive) -> None:
        bench.archiver.take(Archived(order.id, "the store is away"))

    for _ in range(20):
        bench.turn(15.0, answer=refuse)
    assert len([event for event, _ in bench.said if event == "log copy failed"]) == 1
    bench.over = True
    bench.turn(100.0, answer=refuse)
    bench.turn(100.0)
    bench.turn(100.0)
    assert bench.stored("4/stdout") == b"one\n"


def test_orders_lost_with_the_transfer_process_are_given_again(bench: Bench) -> None:
    bench.begin(ranks=1)
    bench.turn()
    bench.write(0, "one\n")
    bench.turn(10.1, answer=lambda _order: bench.archiver.take(None))
    assert not bench.bundles()
    bench.turn(RETRY_S_FIRST + 10.0)
    assert bench.stored("4/stdout") == b"one\n"


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_restarted_agent_goes_on_and_leaves_no_bundle_behind(bench: Bench, carried_out: bool) -> None:
    """Killed with an order under way, whether it was carried out or not."""
    bench.begin(ranks=1)
    bench.turn()
    bench.write(0, "one\n")
    bench.turn(10.1)
    bench.write(0, "two\n")
    bench.time.now += 10.1
    bench.archiver.turn()
    (order,) = bench.orders
    if carried_out:
        transfer_archive.run(order, lambda _: bench.store)
    bench.orders.clear()
    bench.archiver = bench.new()
    bench.over = True
    bench.archiver.resume()
    bench.turn()
    bench.turn(SETTLE_S)
    assert bench.stored("4/stdout") == b"one\ntwo\n"
    assert len(bench.bundles()) == 1
    finished = bench.new()
    finished.resume()
    finished.turn()
    assert not bench.orders, "what is done is not begun again"


def test_without_a_store_only_times_are_noted(bench: Bench) -> None:
    bench.begin(store="", ranks=1)
    bench.write(0, "one\n")
    bench.turn()
    bench.over = True
    bench.turn(20.0)
    bench.turn(20.0)
    assert not bench.orders
    log = bench.root / "train-u1/attempt_1/0/stdout.log"
    assert log_times.read(log_times.of(log)) == (Mark(4, 1_700_001_000_000),)


def test_what_lies_in_kept_is_copied_too(bench: Bench) -> None:
    bench.begin(ranks=1)
    kept = bench.root / "train-u1/attempt_1/kept"
    kept.mkdir()
    (kept / "series.jsonl").write_text("{}\n")
    bench.turn()
    bench.over = True
    bench.turn()
    bench.turn(SETTLE_S)
    assert bench.stored("kept/series.jsonl") == b"{}\n"


def test_a_log_longer_than_its_bound_keeps_its_beginning_and_its_end(bench: Bench) -> None:
    bench.begin(ranks=1)
    lines = [f"line {n:05d}\n" for n in range(1000)]
    bench.write(0, "".join(lines))
    bench.over = True
    bench.turn()
    bench.turn(SETTLE_S)
    (key,) = bench.bundles()
    head, tail = archive.unpack(bench.store.get(key))
    assert head.offset == 0
    assert tail.end == 11_000
    assert len(head.data) + len(tail.data) == 4000


def test_a_line_has_the_time_of_the_first_look_that_saw_it(tmp_path: Path) -> None:
    log = tmp_path / "stdout.log"
    times = log_times.Times(log)
    times.note(1)
    for at_ms, text in ((1000, "a\nb\n"), (2000, ""), (3000, "c\n")):
        with log.open("a") as file:
            file.write(text)
        times.note(at_ms)
    marks = log_times.read(log_times.of(log))
    assert marks == (Mark(4, 1000), Mark(6, 3000))
    assert list(log_times.within(marks, 0, 2)) == [Mark(4, 1000)]
    assert list(log_times.within(marks, 4, 6)) == [Mark(6, 3000)]
    assert log_times.Times(log).note(9000) == 6
    assert log_times.read(log_times.of(log)) == marks, "a restarted agent notes nothing twice"


def test_times_of_an_endless_log_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_times, "MARKS_MAX", 64)
    log = tmp_path / "stdout.log"
    times = log_times.Times(log)
    for n in range(1000):
        with log.open("a") as file:
            file.write("x\n")
        times.note(n)
    marks = log_times.read(log_times.of(log))
    assert len(marks) <= 64
    assert marks[-1] == Mark(2000, 999)


def test_parts_of_a_file_that_is_gone_are_left_out(tmp_path: Path) -> None:
    from dtrain.agent.transferring import FilePart

    (tmp_path / "a").write_text("abc")
    store = MemoryBlobs("m")
    parts = (
        FilePart("1/stdout", str(tmp_path / "a"), 1, 100),
        FilePart("2/stdout", str(tmp_path / "b"), 0, 1),
    )
    transfer_archive.run(Archive("i", "memory://m", "c/_archive/x.gz", parts), lambda _: store)
    assert archive.unpack(store.get("c/_archive/x.gz")) == (Part("1/stdout", 1, b"bc"),)


def test_what_runs_or_is_still_to_be_copied_is_named_and_given_up_after_a_week(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin(ranks=1)
    folder = tmp_path / "train-u1" / "attempt_1"
    assert bench.archiver.folders() == {folder}
    bench.write(0, "a line\n")

    def away(order: Archive) -> None:
        bench.archiver.take(Archived(order.id, "the store is away"))

    bench.turn(20.0, answer=away)
    bench.over = True
    bench.turn(20.0, answer=away)
    bench.turn(6 * 86400.0, answer=away)
    assert bench.archiver.folders() == {folder}
    bench.turn(2 * 86400.0, answer=away)
    assert bench.archiver.folders() == set()
    assert not is_copied(folder)


def test_an_attempt_is_copied_when_all_of_it_is_in_the_store(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin(ranks=1)
    bench.write(0, "a line\n")
    bench.turn(20.0)
    folder = tmp_path / "train-u1" / "attempt_1"
    assert not is_copied(folder)
    bench.over = True
    bench.turn(1.0)
    bench.turn(2 * SETTLE_S)
    assert is_copied(folder)
    assert bench.archiver.folders() == set()
