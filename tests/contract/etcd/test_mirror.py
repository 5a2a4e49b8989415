"""A mirror is etcd at its revision, whatever happens to members, streams and history."""

import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.contract.etcd.support import World, compact, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Unavailable
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.port import Delete, Put, Status, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd


class Recorded:
    """A running mirror that remembers what it told."""

    def __init__(self, world: World, **options: object) -> None:
        self.changes: list[Change] = []
        self.relists: list[int] = []
        self.alarms: list[DtrainError] = []
        self.failures: list[Exception] = []
        self.mirror = Mirror(
            world.etcd,
            world.prefix,
            on_changes=lambda changes, _revision: self.changes.extend(changes),
            on_relist=self.relists.append,
            on_alarm=self.alarms.append,
            on_failure=self.failures.append,
            **options,  # type: ignore[arg-type]
        )
        self.mirror.start()
        assert self.mirror.wait_for(1, 10)

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None:
        self.mirror.close()
        assert not self.failures

    def values(self) -> dict[str, bytes]:
        return {kv.key: kv.value for kv in self.mirror.prefix("/")}


@pytest.fixture
def gateway_world(three_members: EtcdCluster) -> Iterator[World]:
    etcd = GatewayEtcd(three_members.endpoints)
    yield World(
        etcd, f"/mirror/{secrets.token_hex(4)}/", time.sleep, lambda r: compact(three_members.endpoints[0], r)
    )
    etcd.close()


def test_a_mirror_holds_what_was_there_and_follows_what_comes(world: World) -> None:
    # More than one page, so that the list is paged and pinned.
    for at in range(0, 1100, 100):
        world.etcd.txn(Txn((), tuple(Put(world.key(f"k{i:04}"), b"%d" % i) for i in range(at, at + 100))))
    with Recorded(world) as recorded:
        assert len(recorded.mirror.prefix(world.prefix)) == 1100
        world.put("k0500", b"changed")
        revision = world.etcd.txn(Txn((), (Delete(world.key("k0000")), Put(world.key("new"), b"n")))).revision
        assert recorded.mirror.wait_for(revision, 5)
        items = world.etcd.range(world.prefix, prefix_end(world.prefix)).items
        assert tuple(recorded.mirror.prefix(world.prefix)) == items
        assert recorded.mirror.get(world.key("k0000")) is None
        assert [kv.key for kv in recorded.mirror.prefix(world.key("k050"))] == [
            world.key(f"k050{i}") for i in range(10)
        ]
        assert recorded.mirror.age_s() < 5
        [_, deletion, creation] = recorded.changes[1100:]
        assert deletion.after is None
        assert deletion.before is not None
        assert creation.before is None
        assert len(recorded.relists) == 1


def test_compaction_past_the_resume_point_lists_again_and_finds_missed_deletions() -> None:
    model = MemoryEtcd(time.monotonic)
    world = World(model, "/m/", lambda _s: None, model.compact)
    for name in ("stays", "goes", "changes"):
        world.put(name, b"1")
    entered, go = threading.Event(), threading.Event()
    watch = model.watch

    def gated_watch(key: str, range_end: str | None, start_revision: int) -> object:
        entered.set()
        assert go.wait(5)
        return watch(key, range_end, start_revision)

    go.set()
    model.watch = gated_watch  # type: ignore[assignment,method-assign]
    with Recorded(world) as recorded:
        eventually(entered.is_set)
        entered.clear()
        go.clear()
        model.cut_watches()
        # The mirror waits in front of its next watch, while its history vanishes.
        eventually(entered.is_set)
        world.put("changes", b"2")
        world.put("comes", b"1")
        revision = model.txn(Txn((), (Delete("/m/goes"),))).revision
        model.compact(revision)
        go.set()
        assert recorded.mirror.wait_for(revision, 5)
        assert recorded.values() == {"/m/stays": b"1", "/m/changes": b"2", "/m/comes": b"1"}
        seen = {change.key: (change.before, change.after) for change in recorded.changes[3:]}
        assert set(seen) == {"/m/changes", "/m/comes", "/m/goes"}
        assert seen["/m/goes"][1] is None
        assert len(recorded.relists) == 2
        assert recorded.alarms == []


def test_a_real_compaction_past_the_resume_point_lists_again(three_members: EtcdCluster) -> None:
    reader = GatewayEtcd(three_members.endpoints[:1])
    writer = GatewayEtcd(three_members.endpoints[1:])
    # Serve the writer's two members as a quorum while the mirror's only member is away.
    writer.txn(Txn((), (Put("/c/goes", b"1"), Put("/c/stays", b"1"))))
    world = World(reader, "/c/", time.sleep, lambda _r: None)
    with Recorded(world) as recorded:
        assert len(recorded.values()) == 2
        three_members.kill(0)
        revision = 0
        for number in range(20):
            revision = settle(writer, Txn((), (Put("/c/stays", b"%d" % number),)))
        revision = settle(writer, Txn((), (Delete("/c/goes"),)))
        compact(three_members.endpoints[1], revision)
        three_members.start_member(0)
        assert recorded.mirror.wait_for(revision, 20)
        assert recorded.values() == {"/c/stays": b"19"}
        assert recorded.changes[-1].after is None or recorded.changes[-2].after is None
        assert len(recorded.relists) == 2
    reader.close()
    writer.close()


def settle(etcd: GatewayEtcd, txn: Txn) -> int:
    """Apply an idempotent transaction through faults."""
    while True:
        try:
            return etcd.txn(txn).revision
        except (Unavailable, OutcomeUnknown):
            time.sleep(0.05)


def test_killing_the_watched_member_under_writes_loses_and_repeats_nothing(
    three_members: EtcdCluster, gateway_world: World
) -> None:
    world = gateway_world
    writer = GatewayEtcd(three_members.endpoints)
    with Recorded(world) as recorded:
        stop = threading.Event()
        written: list[int] = []

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                settle(writer, Txn((), (Put(world.key("counter"), b"%d" % number),)))
                written.append(number)

        thread = threading.Thread(target=write)
        thread.start()
        eventually(lambda: len(recorded.changes) > 50)
        watched = three_members.endpoints.index(str(world.etcd._endpoints.in_order()[0]))  # type: ignore[attr-defined]
        three_members.kill(watched)
        at_kill = len(written)
        eventually(lambda: len(written) > at_kill + 50, 20)
        stop.set()
        thread.join()
        end = world.etcd.range(world.prefix, prefix_end(world.prefix))
        assert recorded.mirror.wait_for(end.items[0].mod_revision, 10)
        # Each version once, in order: nothing lost, nothing twice, no list in between.
        versions = [change.after.version for change in recorded.changes if change.after]
        assert versions == list(range(1, end.items[0].version + 1))
        assert len(recorded.relists) == 1
    writer.close()


def test_freezing_the_watched_member_is_noticed_by_its_silence(
    three_members: EtcdCluster, gateway_world: World
) -> None:
    world = gateway_world
    with Recorded(world, progress_interval_s=1.0) as recorded:
        world.put("k", b"1")
        watched = three_members.endpoints.index(str(world.etcd._endpoints.in_order()[0]))  # type: ignore[attr-defined]
        three_members.freeze(watched)
        writer = GatewayEtcd([e for i, e in enumerate(three_members.endpoints) if i != watched])
        revision = settle(writer, Txn((), (Put(world.key("k"), b"2"),)))
        writer.close()
        assert recorded.mirror.wait_for(revision, 9)
        three_members.thaw(watched)


def test_an_idle_mirror_stays_fresh_without_progress_from_the_server(tmp_path: object) -> None:
    model = MemoryEtcd(time.monotonic)
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k")
    with Recorded(world, progress_interval_s=0.1) as recorded:
        # The model tells no progress by itself: only the probe can prove freshness.
        for _ in range(20):
            time.sleep(0.05)
            assert recorded.mirror.age_s() < 0.6
        assert len(recorded.relists) == 1


def test_a_stream_that_swallows_events_is_given_up() -> None:
    model = MemoryEtcd(time.monotonic)
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k")
    watch = model.watch
    opened: list[int] = []

    def deaf_watch(key: str, range_end: str | None, start_revision: int) -> object:
        opened.append(start_revision)
        return watch("/elsewhere", None, start_revision)

    model.watch = deaf_watch  # type: ignore[assignment,method-assign]
    with Recorded(world, progress_interval_s=0.05) as recorded:
        revision = world.put("k", b"2")
        assert recorded.mirror.wait_for(revision, 10)
        assert recorded.values() == {"/m/k": b"2"}
        assert len(opened) >= 2


def test_an_etcd_that_went_back_raises_the_alarm_and_is_shown_as_it_is() -> None:
    model = MemoryEtcd(time.monotonic)
    world = World(model, "/m/", lambda _s: None, model.compact)
    for number in range(10):
        world.put("k", b"%d" % number)
    with Recorded(world) as recorded:
        older = MemoryEtcd(time.monotonic)
        older.txn(Txn((), (Put("/m/k", b"old"),)))
        model.__dict__.update(
            {name: value for name, value in older.__dict__.items() if name not in ("_watches", "changed")}
        )
        model.cut_watches()
        eventually(lambda: recorded.values() == {"/m/k": b"old"}, 5)
        assert recorded.alarms[0].code is ErrorCode.ETCD_WENT_BACK
        assert recorded.mirror.alarm is recorded.alarms[0]


def test_an_etcd_restored_with_raised_revisions_is_listed_again_without_an_alarm() -> None:
    model = MemoryEtcd(time.monotonic)
    model.raft_term = 9
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k", b"1")
    world.put("forgotten", b"1")
    with Recorded(world) as recorded:
        older = MemoryEtcd(time.monotonic)
        older.txn(Txn((), (Put("/m/k", b"1"),)))
        older._revision += 1_000_000_000
        older._compacted = older._revision
        model.__dict__.update(
            {name: value for name, value in older.__dict__.items() if name not in ("_watches", "changed")}
        )
        assert model.raft_term < 9
        model.cut_watches()
        eventually(lambda: recorded.values() == {"/m/k": b"1"}, 10)
        revision = world.put("k", b"2")
        assert recorded.mirror.wait_for(revision, 10)
        assert recorded.mirror.alarm is None
        assert not recorded.alarms


def test_a_member_that_lags_is_not_taken_for_an_older_etcd_however_often_it_answers() -> None:
    model = MemoryEtcd(time.monotonic)
    model.raft_term = 9
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k", b"1")
    status, asked = model.status, threading.Semaphore(0)

    def lagging(*, deadline_s: float = 5.0) -> Status:
        asked.release()
        return replace(status(deadline_s=deadline_s), raft_term=8, revision=1)

    with Recorded(world) as recorded:
        model.status = lagging  # type: ignore[method-assign]
        for number in range(8):
            model.cut_watches()
            assert asked.acquire(timeout=10)
            revision = world.put("k", b"new %d" % number)
            assert recorded.mirror.wait_for(revision, 10)
        assert not recorded.alarms
        assert len(recorded.relists) == 1


def test_a_status_from_before_a_restoration_with_raised_revisions_raises_no_alarm_after_it() -> None:
    model = MemoryEtcd(time.monotonic)
    model.raft_term = 9
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k", b"1")
    with Recorded(world) as recorded:
        status, before = model.status, model.status()
        model.status = lambda **_how: before  # type: ignore[method-assign]
        model._revision += 1_000_000_000
        model._compacted = model._revision
        model.raft_term = 2
        model.cut_watches()
        assert recorded.mirror.wait_for(world.put("k", b"2"), 10)
        model.status = status  # type: ignore[method-assign]
        model.cut_watches()
        assert recorded.mirror.wait_for(world.put("k", b"3"), 10)
        assert not recorded.alarms


def test_a_quorum_of_an_older_raft_term_is_refused_with_an_alarm() -> None:
    model = MemoryEtcd(time.monotonic)
    model.raft_term = 9
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k", b"1")
    with Recorded(world) as recorded:
        # As far as before, or further: only the term tells that this is another history.
        model.raft_term = 8
        model.cut_watches()
        world.put("k", b"2")
        eventually(lambda: bool(recorded.alarms), 10)
        assert recorded.alarms[0].code is ErrorCode.ETCD_WENT_BACK


def test_another_cluster_is_refused_with_an_alarm() -> None:
    model = MemoryEtcd(time.monotonic)
    world = World(model, "/m/", lambda _s: None, model.compact)
    world.put("k", b"1")
    with Recorded(world) as recorded:
        model.cluster_id += 1
        model.cut_watches()
        world.put("k", b"2")
        eventually(lambda: bool(recorded.alarms), 5)
        assert recorded.alarms[0].code is ErrorCode.ETCD_WENT_BACK
        assert recorded.values() == {"/m/k": b"1"}


def test_a_callback_s_bug_ends_the_mirror_loudly() -> None:
    model = MemoryEtcd(time.monotonic)
    failures: list[Exception] = []

    def broken(_changes: tuple[Change, ...], _revision: int) -> None:
        raise KeyError("bug")

    mirror = Mirror(model, "/m/", on_changes=broken, on_failure=failures.append)
    mirror.start()
    eventually(lambda: bool(failures), 5)
    assert isinstance(failures[0], KeyError)
    mirror.close()
