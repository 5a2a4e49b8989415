"""The port's promises, kept by the model and by real servers alike."""

import itertools

import pytest
from tests.contract.etcd.support import World, collect

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Get,
    Operation,
    Put,
    Relation,
    Target,
    Txn,
    flatten,
    prefix_end,
    put_if_absent,
)


def holds(world: World, *compares: Compare) -> bool:
    return world.etcd.txn(Txn(compares)).succeeded


# Transactions


@pytest.mark.parametrize("target", [Target.CREATE, Target.MOD, Target.VERSION, Target.LEASE])
def test_numbers_compare_in_every_relation(world: World, target: Target) -> None:
    lease = new_lease_id()
    world.etcd.grant(60, lease)
    world.put("k", b"a")
    world.put("k", b"b", lease)
    kv = world.etcd.range(world.key("k")).items[0]
    stored = {
        Target.CREATE: kv.create_revision,
        Target.MOD: kv.mod_revision,
        Target.VERSION: kv.version,
        Target.LEASE: kv.lease,
    }[target]
    assert kv.version == 2
    assert kv.lease == lease
    assert kv.create_revision < kv.mod_revision
    expected = {
        (Relation.EQUAL, 0): True,
        (Relation.EQUAL, 1): False,
        (Relation.NOT_EQUAL, 0): False,
        (Relation.NOT_EQUAL, -1): True,
        (Relation.GREATER, -1): True,
        (Relation.GREATER, 0): False,
        (Relation.LESS, 1): True,
        (Relation.LESS, 0): False,
    }
    for (relation, offset), outcome in expected.items():
        compare = Compare(world.key("k"), target, stored + offset, relation)
        assert holds(world, compare) is outcome, (target, relation, offset)
    world.etcd.revoke(lease)


def test_values_compare_bytewise(world: World) -> None:
    world.put("k", b"b\xff\x00")
    for operand, relation, outcome in [
        (b"b\xff\x00", Relation.EQUAL, True),
        (b"b", Relation.EQUAL, False),
        (b"b", Relation.NOT_EQUAL, True),
        (b"a", Relation.GREATER, True),
        (b"c", Relation.LESS, True),
        (b"c", Relation.GREATER, False),
    ]:
        assert holds(world, Compare(world.key("k"), Target.VALUE, operand, relation)) is outcome


@pytest.mark.parametrize("target", [Target.CREATE, Target.MOD, Target.VERSION, Target.LEASE])
def test_an_absent_key_compares_as_zero(world: World, target: Target) -> None:
    assert holds(world, Compare(world.key("absent"), target, 0))
    assert not holds(world, Compare(world.key("absent"), target, 0, Relation.NOT_EQUAL))
    assert holds(world, Compare(world.key("absent"), target, 1, Relation.LESS))
    assert not holds(world, Compare(world.key("absent"), target, 0, Relation.GREATER))


def test_a_value_compare_on_an_absent_key_is_false(world: World) -> None:
    for relation in Relation:
        assert not holds(world, Compare(world.key("absent"), Target.VALUE, b"", relation)), relation


def test_a_range_compare_holds_for_every_key_and_an_empty_range_compares_as_zero(world: World) -> None:
    start, end = world.key("r/"), prefix_end(world.key("r/"))
    nobody = Compare(start, Target.CREATE, 0, range_end=end)
    somebody = Compare(start, Target.CREATE, 0, Relation.GREATER, range_end=end)
    assert holds(world, nobody)
    assert not holds(world, somebody)
    first = world.put("r/a")
    world.put("r/b")
    assert not holds(world, nobody)
    assert holds(world, somebody)
    older = Compare(start, Target.MOD, first + 1, Relation.LESS, range_end=end)
    assert not holds(world, older)


def test_put_if_absent_creates_once_and_then_shows_what_is_there(world: World) -> None:
    first = world.etcd.txn(put_if_absent(world.key("k"), b"one"))
    second = world.etcd.txn(put_if_absent(world.key("k"), b"two"))
    assert first.succeeded
    assert not second.succeeded
    found = flatten(second.responses)[world.key("k")]
    assert (found.value, found.create_revision, found.version) == (b"one", first.revision, 1)
    assert second.revision == first.revision


def test_a_mod_guard_lets_one_of_two_writers_win(world: World) -> None:
    read = world.put("k", b"0")
    guard = Compare(world.key("k"), Target.MOD, read)
    assert world.etcd.txn(Txn((guard,), (Put(world.key("k"), b"1"),))).succeeded
    assert not world.etcd.txn(Txn((guard,), (Put(world.key("k"), b"2"),))).succeeded
    assert world.etcd.range(world.key("k")).items[0].value == b"1"


def test_a_transaction_is_one_revision_and_answers_in_order(world: World) -> None:
    world.put("a", b"old")
    before = world.put("b", b"old")
    result = world.etcd.txn(
        Txn(
            (),
            (Get(world.key("a")), Put(world.key("a"), b"new"), Delete(world.key("b")), Get(world.key("a"))),
        )
    )
    assert result.revision == before + 1
    old, put, deleted, new = result.responses
    assert [kv.value for kv in old] == [b"old"]
    assert put == deleted == ()
    assert [(kv.value, kv.mod_revision) for kv in new] == [(b"new", before + 1)]


def test_a_transaction_that_changes_nothing_has_no_revision_of_its_own(world: World) -> None:
    before = world.put("a")
    result = world.etcd.txn(Txn((), (Delete(world.key("none")), Get(world.key("a")))))
    assert result.revision == before
    assert result.responses[0] == ()


def test_binary_and_empty_values_survive(world: World) -> None:
    everything = bytes(range(256))
    world.put("all", everything)
    world.put("none", b"")
    items = world.etcd.range(world.prefix, prefix_end(world.prefix)).items
    assert {kv.key: kv.value for kv in items} == {world.key("all"): everything, world.key("none"): b""}


def test_a_deleted_key_begins_a_new_life(world: World) -> None:
    first = world.put("k")
    world.etcd.txn(Txn((), (Delete(world.prefix, prefix_end(world.prefix)),)))
    assert world.etcd.range(world.key("k")).items == ()
    second = world.put("k")
    kv = world.etcd.range(world.key("k")).items[0]
    assert kv.create_revision == second > first
    assert kv.version == 1


@pytest.mark.parametrize(
    "operations",
    [
        (Put("k", b"1"), Put("k", b"2")),
        (Put("k", b"1"), Delete("k")),
        (Delete("j", "l"), Put("k", b"1")),
    ],
)
def test_a_key_written_twice_is_refused(world: World, operations: tuple[Operation, ...]) -> None:
    with pytest.raises(Refused) as caught:
        world.etcd.txn(Txn((), operations))
    assert caught.value.code is ErrorCode.ETCD_REFUSED
    assert world.etcd.range("k").items == ()


def test_both_branches_may_write_the_same_key(world: World) -> None:
    result = world.etcd.txn(Txn((), (Put(world.key("k"), b"1"),), (Put(world.key("k"), b"2"),)))
    assert result.succeeded


def test_too_many_operations_are_refused_and_128_are_not(world: World) -> None:
    puts = tuple(Put(world.key(f"k{i}"), b"") for i in range(129))
    assert world.etcd.txn(Txn((), puts[:128])).succeeded
    too_many = [
        Txn((), puts),
        Txn((), (), puts),
        Txn(tuple(Compare(put.key, Target.CREATE, 0) for put in puts)),
    ]
    for txn in too_many:
        with pytest.raises(Refused) as caught:
            world.etcd.txn(txn)
        assert caught.value.code is ErrorCode.ETCD_REFUSED


def test_too_large_a_request_is_refused(world: World) -> None:
    with pytest.raises(Refused) as caught:
        world.put("k", bytes(1600 * 1024))
    assert caught.value.code is ErrorCode.ETCD_REFUSED
    assert world.put("k", bytes(1400 * 1024))


# Reading


def test_pages_pinned_to_a_revision_do_not_see_later_writes(world: World) -> None:
    for name in "abcde":
        world.put(name, b"old")
    end = prefix_end(world.prefix)
    page = world.etcd.range(world.prefix, end, limit=2)
    pinned = page.revision
    world.put("c", b"new")
    world.put("f")
    world.etcd.txn(Txn((), (Delete(world.key("d")),)))
    seen = list(page.items)
    while page.more:
        page = world.etcd.range(seen[-1].key + "\0", end, revision=pinned, limit=2)
        assert page.revision == pinned
        seen += page.items
    assert [(kv.key, kv.value) for kv in seen] == [(world.key(name), b"old") for name in "abcde"]


def test_a_compacted_revision_is_refused_as_compacted(world: World) -> None:
    old = world.put("k", b"1")
    new = world.put("k", b"2")
    world.compact(new)
    with pytest.raises(Refused) as caught:
        world.etcd.range(world.key("k"), revision=old)
    assert caught.value.code is ErrorCode.ETCD_COMPACTED
    assert world.etcd.range(world.key("k"), revision=new).items[0].value == b"2"


def test_a_future_revision_is_refused_but_not_as_compacted(world: World) -> None:
    now = world.put("k")
    with pytest.raises(Refused) as caught:
        world.etcd.range(world.key("k"), revision=now + 1000)
    assert caught.value.code is ErrorCode.ETCD_REFUSED


def test_status_tells_identity_and_revision(world: World) -> None:
    revision = world.put("k")
    status = world.etcd.status()
    assert status.revision >= revision
    assert status.cluster_id > 0
    assert status.member_id > 0
    assert status.raft_term > 0
    assert status.version.startswith("3.")
    assert status.alarms == ()


# Leases


def test_keys_of_a_lease_vanish_together_when_it_expires(world: World) -> None:
    lease = new_lease_id()
    assert world.etcd.grant(2, lease) == 2.0
    world.put("a", lease=lease)
    start = world.put("b", lease=lease)
    world.put("keeps")
    stream = world.etcd.watch(world.prefix, prefix_end(world.prefix), start + 2)
    world.advance(2.2)
    gone = collect(stream, 2)
    stream.close()
    events = [event for batch in gone for event in batch.events]
    assert {(event.kind, event.kv.key) for event in events} == {
        ("delete", world.key("a")),
        ("delete", world.key("b")),
    }
    assert len({event.kv.mod_revision for event in events}) == 1
    with pytest.raises(NotFound) as caught:
        world.etcd.keepalive(lease)
    assert caught.value.code is ErrorCode.LEASE_NOT_FOUND
    assert [kv.key for kv in world.etcd.range(world.prefix, prefix_end(world.prefix)).items] == [
        world.key("keeps")
    ]


def test_renewals_keep_a_lease_beyond_its_ttl(world: World) -> None:
    lease = new_lease_id()
    world.etcd.grant(2, lease)
    world.put("k", lease=lease)
    for _ in range(3):
        world.advance(1.0)
        assert world.etcd.keepalive(lease) == 2.0
    assert world.etcd.range(world.key("k")).items
    world.etcd.revoke(lease)


def test_granting_twice_is_granting_once(world: World) -> None:
    lease = new_lease_id()
    assert world.etcd.grant(30, lease) == 30.0
    world.put("k", lease=lease)
    assert world.etcd.grant(60, lease) == 30.0
    assert world.etcd.range(world.key("k")).items[0].lease == lease
    world.etcd.revoke(lease)


def test_revoke_deletes_its_keys_in_one_revision_and_may_be_repeated(world: World) -> None:
    lease = new_lease_id()
    world.etcd.grant(30, lease)
    world.put("a", lease=lease)
    before = world.put("b", lease=lease)
    world.etcd.revoke(lease)
    world.etcd.revoke(lease)
    after = world.etcd.range(world.prefix, prefix_end(world.prefix))
    assert after.items == ()
    assert after.revision == before + 1


def test_a_key_put_without_its_lease_outlives_it(world: World) -> None:
    lease, other = new_lease_id(), new_lease_id()
    world.etcd.grant(30, lease)
    world.etcd.grant(30, other)
    world.put("free", lease=lease)
    world.put("moved", lease=lease)
    world.put("free")
    world.put("moved", lease=other)
    world.etcd.revoke(lease)
    names = [kv.key for kv in world.etcd.range(world.prefix, prefix_end(world.prefix)).items]
    assert names == [world.key("free"), world.key("moved")]
    world.etcd.revoke(other)


def test_a_put_under_an_unknown_lease_is_refused_as_lost_lease(world: World) -> None:
    with pytest.raises(NotFound) as caught:
        world.put("k", lease=new_lease_id())
    assert caught.value.code is ErrorCode.LEASE_NOT_FOUND
    assert world.etcd.range(world.key("k")).items == ()


# Watching


def test_a_watch_delivers_each_revision_whole_and_in_order(world: World) -> None:
    start = world.put("first")
    stream = world.etcd.watch(world.prefix, prefix_end(world.prefix), start + 1)
    written = [world.put("a", b"1")]
    written.append(
        world.etcd.txn(
            Txn((), (Put(world.key("b"), b"2"), Delete(world.key("a")), Put(world.key("c"), b"3")))
        ).revision
    )
    written.append(world.put("a", b"4"))
    batches = collect(stream, 5)
    stream.close()
    events = [event for batch in batches for event in batch.events]
    assert [event.kv.mod_revision for event in events] == [written[0], *[written[1]] * 3, written[2]]
    assert {(event.kind, event.kv.key) for event in events[1:4]} == {
        ("put", world.key("b")),
        ("delete", world.key("a")),
        ("put", world.key("c")),
    }
    assert events[4].kv.value == b"4"
    assert events[4].kv.version == 1
    for batch, following in itertools.pairwise(batches):
        assert batch.revision < following.events[0].kv.mod_revision


def test_a_watch_resumes_from_a_revision_without_loss_or_repetition(world: World) -> None:
    revisions = [world.put("k", str(number).encode()) for number in range(10)]
    stream = world.etcd.watch(world.key("k"), None, revisions[4])
    events = [event for batch in collect(stream, 6) for event in batch.events]
    stream.close()
    assert [event.kv.mod_revision for event in events] == revisions[4:]
    assert [event.kv.value for event in events] == [b"4", b"5", b"6", b"7", b"8", b"9"]


def test_a_watch_does_not_see_its_neighbours(world: World) -> None:
    start = world.put("a/x")
    stream = world.etcd.watch(world.key("a/"), prefix_end(world.key("a/")), start + 1)
    world.put("a")
    world.put("b/x")
    world.put("a0")
    world.put("a/y")
    events = [event for batch in collect(stream, 1) for event in batch.events]
    stream.close()
    assert [event.kv.key for event in events] == [world.key("a/y")]


def test_a_watch_from_before_the_compaction_is_refused_as_compacted(world: World) -> None:
    old = world.put("k", b"1")
    world.put("k", b"2")
    new = world.put("k", b"3")
    world.compact(new)
    with pytest.raises(Refused) as caught:
        collect(world.etcd.watch(world.prefix, prefix_end(world.prefix), old), 1)
    assert caught.value.code is ErrorCode.ETCD_COMPACTED


def test_an_open_watch_survives_a_compaction(world: World) -> None:
    start = world.put("k", b"1")
    stream = world.etcd.watch(world.key("k"), None, start)
    collect(stream, 1)
    world.compact(world.put("k", b"2"))
    world.put("k", b"3")
    events = [event for batch in collect(stream, 2) for event in batch.events]
    stream.close()
    assert [event.kv.value for event in events] == [b"2", b"3"]


def test_a_silent_watch_returns_none_and_a_closed_one_is_unavailable(world: World) -> None:
    start = world.put("k")
    stream = world.etcd.watch(world.key("k"), None, start + 1)
    batch = stream.next(0.05)
    assert batch is None or not batch.events
    stream.close()
    with pytest.raises(Unavailable):
        collect(stream, 1)


def test_a_closed_client_is_unavailable(world: World) -> None:
    world.put("k")
    world.etcd.close()
    with pytest.raises(DtrainError) as caught:
        world.etcd.range(world.key("k"))
    assert isinstance(caught.value, Unavailable)
