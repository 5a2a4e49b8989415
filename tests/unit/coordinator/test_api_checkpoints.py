"""Pins and requests about checkpoints, written by any replica on the model of etcd."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dtrain.coordinator.api.checkpoints import ORDERS_MAX, PINS_MAX, CheckpointDesk
from dtrain.coordinator.work import Orphans
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, Order, OrderKind, Pin, Quarantine
from dtrain.protocol.errors import Conflict, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, JobPhase, JobSpec, JobStatus, RestorePoint
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Delete, Put, Txn, TxnResult

CLUSTER, JOB, UID = ClusterName("c1"), JobName("job"), Uid("u1")
KEYS = Keys(CLUSTER)
PIN = Pin(Seq(0), "reader", 60, "export", "me")


class Etcd(MemoryEtcd):
    """Time by hand; something may happen between a read and a write, and answers may be lost."""

    def __init__(self) -> None:
        self.at = 0.0
        super().__init__(lambda: self.at)
        self.before_write: list[Callable[[], Any]] = []
        self.lose = 0

    def put(self, key: str, value: Any) -> None:
        super().txn(Txn(success=(Put(key, codec.encode(value)),)))

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        writes = any(isinstance(operation, Put) for operation in txn.success)
        if writes and self.before_write:
            self.before_write.pop()()
        result = super().txn(txn, deadline_s=deadline_s)
        if writes and self.lose:
            self.lose -= 1
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "lost")
        return result

    def pins(self) -> dict[str, int]:
        found = self.range(f"{KEYS.job(JOB)}pins/", f"{KEYS.job(JOB)}pins0").items
        return {kv.key.rpartition("pins/")[2].lstrip("0"): kv.lease for kv in found}

    def orders(self) -> list[Order]:
        found = self.range(KEYS.orders(JOB), KEYS.orders(JOB)[:-1] + "0").items
        return [codec.decode(Order, kv.value) for kv in found]


@pytest.fixture
def etcd() -> Etcd:
    etcd = Etcd()
    policy = CheckpointPolicy(keep_last=2)
    etcd.put(KEYS.spec(JOB), JobSpec(JOB, UID, Entry(EntryKind.SCRIPT, "t.py"), checkpoint=policy))
    restore = RestorePoint(Seq(2), Step(20), "m2", "d")
    etcd.put(KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, store="s3://b", restore=restore))
    for seq in range(1, 6):
        record = CommitRecord(
            Term(1), UID, Seq(seq), Step(10 * seq), Attempt(1), "n", 2, 100, f"m{seq}", 9, "d"
        )
        etcd.put(KEYS.checkpoint(JOB, Seq(seq)), record)
    etcd.put(KEYS.latest(JOB), Latest(Term(1), Seq(5), Step(50)))
    return etcd


@pytest.fixture
def desk(etcd: Etcd) -> CheckpointDesk:
    return CheckpointDesk(etcd, CLUSTER, SystemClock(), lambda _work: Orphans({"c1/job/u1/x": 7}, ("up",)))


def test_a_readers_pin_hangs_on_a_lease_and_is_renewed_without_a_write(
    desk: CheckpointDesk, etcd: Etcd
) -> None:
    pinned = desk.pin(JOB, 0, PIN, 0)
    assert (pinned.record.seq, pinned.store, pinned.lease > 0) == (5, "s3://b", True)
    assert etcd.pins() == {"5/reader": pinned.lease}
    revision = etcd.revision
    etcd.at += 40
    assert desk.pin(JOB, 5, PIN, pinned.lease).lease == pinned.lease
    assert etcd.revision == revision
    etcd.at += 50
    etcd.tick()
    assert etcd.pins(), "it was renewed"
    etcd.at += 70
    etcd.tick()
    assert not etcd.pins(), "a killed reader pins nothing for long"
    again = desk.pin(JOB, 5, PIN, pinned.lease)
    assert again.lease != pinned.lease
    assert etcd.pins() == {"5/reader": again.lease}


def test_an_operators_pin_stays_until_it_is_taken_off(desk: CheckpointDesk, etcd: Etcd) -> None:
    desk.pin(JOB, 3, replace(PIN, holder="paper", ttl_s=0), 0)
    etcd.at += 1e6
    etcd.tick()
    assert etcd.pins() == {"3/paper": 0}
    assert desk.unpin(JOB, 3, "other", 0)[0] is False
    assert desk.unpin(JOB, 3, "paper", 0)[0] is True
    assert not etcd.pins()
    desk.pin(JOB, 3, PIN, 0)
    desk.pin(JOB, 3, replace(PIN, holder="paper", ttl_s=0), 0)
    assert desk.unpin(JOB, 3, "*", 0)[0] is True
    assert not etcd.pins()


def test_a_reader_that_is_done_takes_its_lease_with_it(desk: CheckpointDesk, etcd: Etcd) -> None:
    lease = desk.pin(JOB, 3, PIN, 0).lease
    assert desk.unpin(JOB, 3, "reader", lease)[0] is True
    assert not etcd.pins()
    assert not etcd.leases()


def test_a_checkpoint_that_is_retired_meanwhile_is_not_pinned(desk: CheckpointDesk, etcd: Etcd) -> None:
    etcd.before_write.append(
        lambda: MemoryEtcd.txn(etcd, Txn(success=(Delete(KEYS.checkpoint(JOB, Seq(1))),)))
    )
    with pytest.raises(NotFound):
        desk.pin(JOB, 1, PIN, 0)
    assert not etcd.pins()


def test_a_pin_whose_answer_was_lost_is_found_to_be_there(desk: CheckpointDesk, etcd: Etcd) -> None:
    etcd.lose = 1
    pinned = desk.pin(JOB, 1, PIN, 0)
    assert etcd.pins() == {"1/reader": pinned.lease}


def test_the_newest_that_is_not_damaged_is_meant_by_default(desk: CheckpointDesk, etcd: Etcd) -> None:
    etcd.put(KEYS.bad(JOB, Seq(5)), Quarantine(Term(1), Seq(5), "b", 0, "x", "y"))
    assert desk.pin(JOB, 0, PIN, 0).record.seq == 4


@pytest.mark.parametrize("bad", [{"holder": "a/b"}, {"holder": ""}, {"ttl_s": 1}, {"ttl_s": 10**6}])
def test_pins_that_cannot_be_are_refused(desk: CheckpointDesk, etcd: Etcd, bad: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        desk.pin(JOB, 1, replace(PIN, **bad), 0)
    assert not etcd.pins()
    with pytest.raises(NotFound):
        desk.pin(JOB, 9, PIN, 0)
    with pytest.raises(NotFound):
        desk.pin("nobody", 1, PIN, 0)


def test_pins_are_bounded(desk: CheckpointDesk) -> None:
    for number in range(PINS_MAX):
        desk.pin(JOB, 1, replace(PIN, holder=f"h{number}", ttl_s=0), 0)
    with pytest.raises(Refused, match="pins already"):
        desk.pin(JOB, 1, PIN, 0)
    assert desk.pin(JOB, 1, replace(PIN, holder="h1", ttl_s=0), 0).record.seq == 1


@pytest.mark.parametrize(("seq", "why"), [(5, "the newest"), (2, "started from"), (3, "pinned")])
def test_what_must_stay_is_refused_at_once_with_the_reason(
    desk: CheckpointDesk, etcd: Etcd, seq: int, why: str
) -> None:
    desk.pin(JOB, 3, PIN, 0)
    with pytest.raises(Conflict, match=why):
        desk.delete(JOB, seq, "r1", "me")
    assert not etcd.orders()


def test_a_request_that_is_repeated_is_one(desk: CheckpointDesk, etcd: Etcd) -> None:
    first = desk.delete(JOB, 1, "r1", "me")
    assert desk.delete(JOB, 1, "r1", "me") == first
    assert [(order.kind, order.seq, order.by) for order in etcd.orders()] == [(OrderKind.DELETE, 1, "me")]
    desk.report(JOB, 1, "c1/job/u1/blob", 3, request_id="r2", by="me")
    desk.collect(JOB, "r3", "me")
    kinds = {order.kind for order in etcd.orders()}
    assert kinds == set(OrderKind) - {OrderKind.IMPORT}
    assert {order.uid for order in etcd.orders()} == {UID}


def test_requests_that_wait_are_bounded(desk: CheckpointDesk) -> None:
    for number in range(ORDERS_MAX):
        desk.collect(JOB, f"r{number}", "me")
    with pytest.raises(Unavailable, match="wait for the leader"):
        desk.collect(JOB, "more", "me")
    with pytest.raises(Refused):
        desk.report(JOB, 1, "a\nb", 0, request_id="more", by="me")


def test_a_review_says_what_goes_and_why(desk: CheckpointDesk, etcd: Etcd) -> None:
    desk.pin(JOB, 1, PIN, 0)
    etcd.put(KEYS.garbage(JOB, Seq(6)), Garbage(Term(1), Seq(6), "m6", "d"))
    review = desk.review(JOB)
    shown = {item.seq: (item.deleted, item.why) for item in review.items if item.kind == "checkpoint"}
    assert shown == {
        1: (False, "pinned by reader"),
        2: (False, "what the current attempt started from"),
        3: (True, "no policy keeps it"),
        4: (False, "one of the last 2"),
        5: (False, "the newest"),
        6: (True, "it is retired: its blobs are being deleted"),
    }
    assert [(item.kind, item.what, item.bytes) for item in review.items[-2:]] == [
        ("orphan", "c1/job/u1/x", 7),
        ("upload", "up", 0),
    ]
    assert len(etcd.orders()) == 0


# Imports -----------------------------------------------------------------------------

IMPORT = Order(Uid(""), OrderKind.IMPORT, by="ann", step=Step(40), timeout_s=600.0)


@pytest.fixture
def queued(desk: CheckpointDesk, etcd: Etcd) -> CheckpointDesk:
    etcd.put(KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.QUEUED))
    return desk


def imports(etcd: Etcd) -> dict[str, int]:
    found = etcd.range(KEYS.orders(JOB), KEYS.orders(JOB)[:-1] + "0").items
    return {kv.key.rpartition("/")[2]: kv.lease for kv in found}


def test_a_request_to_import_lives_as_long_as_it_is_renewed(queued: CheckpointDesk, etcd: Etcd) -> None:
    begun = queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=0)
    assert imports(etcd) == {"i1": begun.lease}
    (order,) = etcd.orders()
    assert (order.uid, order.step, order.timeout_s, order.part) == (UID, 40, 600.0, None)
    for _ in range(3):
        etcd.at += 20
        etcd.tick()
        renewed = queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=begun.lease)
        assert (renewed.lease, renewed.answered) == (begun.lease, False)
    etcd.at += 40
    etcd.tick()
    assert not imports(etcd)
    # Renewed too late, it is not made anew: what was opened for it is aborted by now.
    assert queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=begun.lease).answered
    assert not imports(etcd)


def test_a_request_to_import_whose_answer_was_lost_is_one(queued: CheckpointDesk, etcd: Etcd) -> None:
    etcd.lose = 1
    with pytest.raises(OutcomeUnknown):
        queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=0)
    again = queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=0)
    assert imports(etcd) == {"i1": again.lease}


def test_a_part_is_reported_once_however_often_it_is_told(queued: CheckpointDesk, etcd: Etcd) -> None:
    lease = queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=0).lease
    part = DurablePart(Seq(6), Attempt(0), Step(40), Rank(0), "n", "key", "d" * 64, 9)
    etcd.lose = 1
    with pytest.raises(OutcomeUnknown):
        queued.import_(JOB, "i1", replace(IMPORT, part=part), ttl_s=30, lease=lease)
    revision = etcd.revision
    assert not queued.import_(JOB, "i1", replace(IMPORT, part=part), ttl_s=30, lease=lease).answered
    assert etcd.revision == revision
    (order,) = etcd.orders()
    assert order.part == part
    assert imports(etcd) == {"i1": lease}


def test_a_request_that_is_taken_back_is_gone_at_once(queued: CheckpointDesk, etcd: Etcd) -> None:
    queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=0)
    assert queued.withdraw_import(JOB, "i1").answered
    assert not imports(etcd)
    assert not etcd.leases()
    assert queued.withdraw_import(JOB, "i1").answered


def test_only_a_job_that_has_not_begun_is_imported_into_and_by_one_at_a_time(
    queued: CheckpointDesk, etcd: Etcd
) -> None:
    queued.import_(JOB, "i1", IMPORT, ttl_s=30, lease=0)
    with pytest.raises(Conflict, match="ann is importing"):
        queued.import_(JOB, "i2", IMPORT, ttl_s=30, lease=0)
    queued.withdraw_import(JOB, "i1")
    for phase in (JobPhase.STARTING, JobPhase.RUNNING, JobPhase.RECOVERING, JobPhase.FAILED):
        etcd.put(KEYS.status(JOB), JobStatus(Term(1), UID, phase))
        with pytest.raises(Conflict, match="before its first attempt only") as caught:
            queued.import_(JOB, "i3", IMPORT, ttl_s=30, lease=0)
        assert "await_import" in caught.value.fix
    etcd.put(KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.QUEUED, step=Step(7)))
    with pytest.raises(Conflict, match="is at step 7: "):  # it was suspended, and waits again
        queued.import_(JOB, "i3", IMPORT, ttl_s=30, lease=0)
    # Of an earlier submission of this name: this one has not begun.
    etcd.put(KEYS.status(JOB), JobStatus(Term(1), Uid("u0"), JobPhase.FAILED))
    assert not queued.import_(JOB, "i4", IMPORT, ttl_s=30, lease=0).answered


@pytest.mark.parametrize(
    "bad", [{"timeout_s": 0.0}, {"timeout_s": 1e9}, {"step": Step(-1)}, {"step": 10**13}]
)
def test_numbers_that_cannot_be_are_refused(queued: CheckpointDesk, etcd: Etcd, bad: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        queued.import_(JOB, "i1", replace(IMPORT, **bad), ttl_s=30, lease=0)
    with pytest.raises(Refused):
        queued.import_(JOB, "i1", IMPORT, ttl_s=1, lease=0)
    assert not etcd.leases()
