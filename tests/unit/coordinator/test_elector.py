"""The campaign, step by step, and the thread around it."""

import threading

import pytest

from dtrain.coordinator.leadership.elector import JITTER_S_MAX, Elector, Lead, StepDown, Try, Wait
from dtrain.coordinator.leadership.lease import Leadership
from dtrain.protocol.cluster import LeaderRecord, ReplicaRecord
from dtrain.protocol.ids import ClusterName, ReplicaId, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Compare, KeyValue, Put, Target, TxnResult
from dtrain.storage.etcd.session import FixedSession

KEY = "/dtrain/c1/leader"
RETRY_S = 2.5


@pytest.fixture
def etcd() -> MemoryEtcd:
    model = MemoryEtcd(lambda: 0.0)
    for lease in (1, 2):
        model.grant(10, lease)
    return model


def elector(lease: int = 1, nonce: str = "mine") -> Elector:
    return Elector(KEY, LeaderRecord(ReplicaId("r1"), "h:1", nonce), lease, retry_s=RETRY_S)


def take(etcd: MemoryEtcd, who: Elector, now: float, lease: int = 1) -> TxnResult:
    action = who.next(now, lease)
    assert isinstance(action, Try)
    result = etcd.txn(action.txn)
    who.on_result(result, now)
    return result


def test_the_first_to_create_the_key_leads_under_its_create_revision(etcd: MemoryEtcd) -> None:
    first, second = elector(), elector(2, "other")
    take(etcd, first, 0)
    take(etcd, second, 0, lease=2)
    (kv,) = etcd.range(KEY).items
    assert first.next(0, 1) == Lead(Term(kv.create_revision), RETRY_S)
    assert kv.lease == 1
    assert second.next(0, 2) == Wait(RETRY_S)


def test_the_key_is_created_only_if_absent_and_under_the_lease() -> None:
    action = elector().next(0, 1)
    assert isinstance(action, Try)
    assert action.txn.compares == (Compare(KEY, Target.CREATE, 0),)
    assert [op.lease for op in action.txn.success if isinstance(op, Put)] == [1]


def test_a_create_whose_answer_was_lost_is_recognised_by_its_nonce(etcd: MemoryEtcd) -> None:
    who = elector()
    action = who.next(0, 1)
    assert isinstance(action, Try)
    etcd.txn(action.txn)
    who.on_failure(0)
    assert isinstance(who.next(0.1, 1), Wait)
    take(etcd, who, 0.3)
    assert who.term == etcd.range(KEY).items[0].create_revision


def test_the_key_of_a_former_life_of_this_replica_is_not_ours(etcd: MemoryEtcd) -> None:
    take(etcd, elector(1, "former"), 0)
    who = elector(1, "mine")
    take(etcd, who, 0)
    assert who.term is None


def test_a_deletion_makes_a_standby_try_within_the_jitter(etcd: MemoryEtcd) -> None:
    take(etcd, elector(2, "other"), 0, lease=2)
    who = elector()
    take(etcd, who, 0)
    etcd.revoke(2)
    who.on_key(None, 1.0, 0.5)
    assert who.next(1.0, 1) == Wait(1.0 + 0.5 * JITTER_S_MAX)
    take(etcd, who, 1.0 + JITTER_S_MAX)
    assert who.term is not None


def test_a_standby_that_is_told_nothing_tries_at_every_renewal(etcd: MemoryEtcd) -> None:
    take(etcd, elector(2, "other"), 0, lease=2)
    who = elector()
    take(etcd, who, 0)
    etcd.revoke(2)
    take(etcd, who, RETRY_S)
    assert who.term is not None


def test_a_leader_whose_key_is_gone_steps_down(etcd: MemoryEtcd) -> None:
    who = elector()
    take(etcd, who, 0)
    etcd.revoke(1)
    who.on_key(None, 1.0, 0.0)
    take(etcd, who, 1.0)
    assert who.next(1.0, 1) == StepDown("the leader key is gone")


def test_a_leader_is_not_deposed_by_a_mirror_that_is_late(etcd: MemoryEtcd) -> None:
    who = elector()
    take(etcd, who, 0)
    # The predecessor's deletion arrives after the win: the key is read, and it is there.
    who.on_key(None, 1.0, 0.0)
    take(etcd, who, 1.0)
    assert isinstance(who.next(1.0, 1), Lead)
    who.on_key(KeyValue(KEY, b"{}", 1, 1, 1), 1.0, 0.0)
    assert isinstance(who.next(1.0, 1), Lead)


def test_a_newer_leader_in_the_mirror_ends_leadership(etcd: MemoryEtcd) -> None:
    who = elector()
    take(etcd, who, 0)
    who.on_key(KeyValue(KEY, b"{}", 99, 99, 1), 1.0, 0.0)
    assert who.next(1.0, 1) == StepDown("another replica leads")


@pytest.mark.parametrize("leading", [True, False])
def test_another_lease_ends_the_campaign(etcd: MemoryEtcd, leading: bool) -> None:
    who = elector()
    if leading:
        take(etcd, who, 0)
    assert isinstance(who.next(1.0, 2), StepDown)
    assert isinstance(who.next(1.0, 1), StepDown)


class Running:
    """A leadership thread over the model."""

    def __init__(self, etcd: MemoryEtcd, lease: int, name: str) -> None:
        self.session = FixedSession(lease, ttl_s=4.0)
        self.won = threading.Event()
        self.over = threading.Event()
        self.acting_when_won = 0
        self.leadership = Leadership(
            etcd,
            self.session,
            ClusterName("c1"),
            ReplicaRecord(ReplicaId(name), "h:1"),
            clock=SystemClock(),
            on_term=self._on_term,
            on_over=lambda _why: self.over.set(),
        )
        self.thread = threading.Thread(target=self.leadership.run)
        self.thread.start()

    def _on_term(self, _term: Term) -> None:
        self.acting_when_won = self.session.acting
        self.won.set()

    def stop(self) -> None:
        self.leadership.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()


def test_the_thread_wins_registers_and_hands_over(etcd: MemoryEtcd) -> None:
    first = Running(etcd, 1, "r1")
    assert first.won.wait(5)
    assert first.acting_when_won == 1, "the guardian must know before anything acts"
    second = Running(etcd, 2, "r2")
    try:
        while not etcd.range(Keys(ClusterName("c1")).coordinator(ReplicaId("r2"))).items:
            assert not second.won.wait(0.01)
        first.stop()
        assert not first.leadership.may_act()
        etcd.revoke(1)
        second.leadership.nudge(None)
        assert second.won.wait(1)
        assert second.leadership.may_act()
    finally:
        first.stop()
        second.stop()


def test_a_leader_past_its_deadline_is_over(etcd: MemoryEtcd) -> None:
    first = Running(etcd, 1, "r1")
    try:
        assert first.won.wait(5)
        first.session.deadline = 0.0
        assert not first.leadership.may_act()
        assert first.over.wait(2)
    finally:
        first.stop()


def test_a_standby_goes_on_with_its_next_lease(etcd: MemoryEtcd) -> None:
    running = Running(etcd, 0, "r1")
    try:
        assert not running.won.wait(0.2)
        running.session.replace(2)
        assert running.won.wait(2)
        assert etcd.range(KEY).items[0].lease == 2
    finally:
        running.stop()
