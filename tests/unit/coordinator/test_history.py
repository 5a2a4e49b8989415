"""What a replica remembers of the last changes."""

import threading

from dtrain.coordinator.api import history
from dtrain.coordinator.api.history import History
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.port import Delete, KeyValue, Put, Txn

ROOT = "/dtrain/c/"


def put(key: str, revision: int, value: bytes = b"{}") -> Change:
    return Change(ROOT + key, None, KeyValue(ROOT + key, value, revision, revision, 1), revision)


def begun(at: int = 10, **bounds: int) -> History:
    made = History(ROOT, **bounds)
    made.add([], at)
    return made


def told(found: history.Recent) -> list[tuple[str, int]]:
    return [(change.key.removeprefix(ROOT), change.revision) for change in found.changes]


def test_each_change_is_told_once_and_in_order() -> None:
    made = begun()
    made.add([put("jobs/a/spec", 11), put("jobs/a/intent", 11)], 11)
    made.add([put("cordons/x", 12), put("jobs/b/spec", 13)], 13)
    found = made.since(["jobs/"], 10)
    assert told(found) == [("jobs/a/spec", 11), ("jobs/a/intent", 11), ("jobs/b/spec", 13)]
    assert (found.revision, found.lost) == (13, False)
    assert told(made.since(["jobs/"], found.revision)) == []
    assert told(made.since(["cordons/", "jobs/b/"], 11)) == [("cordons/x", 12), ("jobs/b/spec", 13)]


def test_who_asks_for_more_than_is_known_is_told_so() -> None:
    assert History(ROOT).since(["jobs/"], 5).lost
    made = begun(10)
    assert made.since(["jobs/"], 9).lost
    assert not made.since(["jobs/"], 10).lost
    # One that is behind what somebody has seen elsewhere has simply nothing to tell yet.
    assert made.since(["jobs/"], 99) == history.Recent((), 99)


def test_what_does_not_fit_is_forgotten_whole_revisions_at_a_time() -> None:
    made = begun(changes_max=3)
    made.add([put("jobs/a", 11), put("jobs/b", 11), put("jobs/c", 12), put("jobs/d", 13)], 13)
    assert made.since(["jobs/"], 10).lost
    assert told(made.since(["jobs/"], 11)) == [("jobs/c", 12), ("jobs/d", 13)]
    large = begun(bytes_max=250)
    for revision in (11, 12, 13):
        large.add([put("jobs/a", revision, b"x" * 100)], revision)
    assert large.since(["jobs/"], 10).lost
    assert told(large.since(["jobs/"], 11)) == [("jobs/a", 12), ("jobs/a", 13)]


def test_after_a_new_list_what_came_between_is_not_made_up() -> None:
    made = begun()
    made.add([put("jobs/a", 11)], 11)
    made.add([Change(ROOT + "jobs/a", None, None)], 20)
    assert made.since(["jobs/"], 11).lost
    assert told(made.since(["jobs/"], 20)) == []


def test_snapshots_of_machines_push_nothing_out() -> None:
    made = begun(changes_max=1)
    made.add([put("jobs/a", 11)], 11)
    made.add([put(f"agents/x/workers/{number}", 12 + number) for number in range(9)], 20)
    assert told(made.since(["jobs/"], 10)) == [("jobs/a", 11)]


def test_an_answer_ends_between_two_revisions(monkeypatch) -> None:
    monkeypatch.setattr(history, "ANSWER_MAX", 2)
    made = begun()
    made.add([put("jobs/a", 11), put("jobs/b", 12), put("jobs/c", 12), put("jobs/d", 13)], 13)
    first = made.since(["jobs/"], 10)
    assert told(first) == [("jobs/a", 11), ("jobs/b", 12), ("jobs/c", 12)]
    assert told(made.since(["jobs/"], first.revision)) == [("jobs/d", 13)]


def test_a_wait_ends_with_a_change_of_its_own() -> None:
    made = begun()
    found: list[history.Recent] = []
    waits = threading.Thread(target=lambda: found.append(made.wait(["jobs/"], 10, 20, lambda: True)))
    waits.start()
    made.add([put("cordons/x", 11)], 11)
    waits.join(0.2)
    assert waits.is_alive()
    made.add([put("jobs/a", 12)], 12)
    waits.join(5)
    assert told(found[0]) == [("jobs/a", 12)]


def test_the_mirror_tells_the_revision_of_every_change_deletions_too() -> None:
    etcd, made = MemoryEtcd(lambda: 0.0), History(ROOT)
    mirror = Mirror(etcd, ROOT, on_changes=made.add)
    mirror.start()
    try:
        assert mirror.wait_for(1, 5)
        begin = mirror.revision
        etcd.txn(Txn(success=(Put(f"{ROOT}jobs/a", b"1"),)))
        last = etcd.txn(Txn(success=(Delete(f"{ROOT}jobs/a"),))).revision
        assert mirror.wait_for(last, 5)
        found = made.wait(["jobs/"], last - 1, 5, lambda: True)
        assert [(change.after, change.revision) for change in found.changes] == [(None, last)]
        assert told(made.since(["jobs/"], begin)) == [("jobs/a", last - 1), ("jobs/a", last)]
    finally:
        mirror.close()
