"""The campaign, step by step, and the thread around it."""

import threading
import time
from collections.abc import Callable

import pytest

from dtrain.coordinator.leadership import lease as lease_module
from dtrain.coordinator.leadership.elector import (
    JITTER_S_MAX,
    Claim,
    Elector,
    Holder,
    Lead,
    Look,
    StepDown,
    Wait,
)
from dtrain.coordinator.leadership.lease import Leadership
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.ids import ClusterName, ReplicaId, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Put, Txn, put_if_absent
from dtrain.storage.etcd.session import FixedSession

KEY = "/dtrain/c1/leader"
RETRY_S = 2.5


@pytest.fixture
def etcd() -> MemoryEtcd:
    model = MemoryEtcd(lambda: 0.0)
    for lease in (1, 2):
        model.grant(10, lease)
    return model


class Campaign:
    """An elector whose claims and looks go to the model."""

    def __init__(self, lease: int = 1, nonce: str = "mine") -> None:
        self.lease = lease
        self.nonce = nonce
        self.elector = Elector(lease, nonce, retry_s=RETRY_S)

    def holder(self, etcd: MemoryEtcd) -> Holder | None:
        items = etcd.range(KEY).items
        return (
            Holder(Term(items[0].create_revision), items[0].lease, items[0].value.decode()) if items else None
        )

    def claim(self, etcd: MemoryEtcd) -> Term | None:
        result = etcd.txn(put_if_absent(KEY, self.nonce.encode(), self.lease))
        return Term(result.revision) if result.succeeded else None

    def go(self, etcd: MemoryEtcd, now: float) -> None:
        match self.elector.next(now, self.lease):
            case Claim():
                self.elector.on_claimed(self.claim(etcd), self.holder(etcd), now)
            case Look():
                self.elector.on_looked(self.holder(etcd), now)
            case other:
                raise AssertionError(other)


def test_the_first_to_create_the_key_leads_under_its_create_revision(etcd: MemoryEtcd) -> None:
    first, second = Campaign(), Campaign(2, "other")
    first.go(etcd, 0)
    second.go(etcd, 0)
    (kv,) = etcd.range(KEY).items
    assert first.elector.next(0, 1) == Lead(Term(kv.create_revision), RETRY_S)
    assert kv.lease == 1
    assert second.elector.next(0, 2) == Wait(RETRY_S)


def test_a_create_whose_answer_was_lost_is_recognised_by_its_nonce(etcd: MemoryEtcd) -> None:
    who = Campaign()
    assert who.elector.next(0, 1) == Claim()
    who.claim(etcd)
    who.elector.on_failure(0)
    assert isinstance(who.elector.next(0.1, 1), Wait)
    who.go(etcd, 0.3)
    assert who.elector.term == etcd.range(KEY).items[0].create_revision


def test_the_key_of_a_former_life_of_this_replica_is_not_ours(etcd: MemoryEtcd) -> None:
    Campaign(1, "former").go(etcd, 0)
    who = Campaign(1, "mine")
    who.go(etcd, 0)
    assert who.elector.term is None


def test_a_deletion_makes_a_standby_try_within_the_jitter(etcd: MemoryEtcd) -> None:
    Campaign(2, "other").go(etcd, 0)
    who = Campaign()
    who.go(etcd, 0)
    etcd.revoke(2)
    who.elector.on_key(None, 1.0, 0.5)
    assert who.elector.next(1.0, 1) == Wait(1.0 + 0.5 * JITTER_S_MAX)
    who.go(etcd, 1.0 + JITTER_S_MAX)
    assert who.elector.term is not None


def test_a_standby_that_is_told_nothing_tries_at_every_renewal(etcd: MemoryEtcd) -> None:
    Campaign(2, "other").go(etcd, 0)
    who = Campaign()
    who.go(etcd, 0)
    etcd.revoke(2)
    who.go(etcd, RETRY_S)
    assert who.elector.term is not None


def test_a_leader_whose_key_is_gone_steps_down(etcd: MemoryEtcd) -> None:
    who = Campaign()
    who.go(etcd, 0)
    etcd.revoke(1)
    who.elector.on_key(None, 1.0, 0.0)
    who.go(etcd, 1.0)
    assert who.elector.next(1.0, 1) == StepDown("the leader key is gone")


def test_a_leader_is_not_deposed_by_a_mirror_that_is_late(etcd: MemoryEtcd) -> None:
    who = Campaign()
    who.go(etcd, 0)
    # The predecessor's deletion arrives after the win: the key is read, and it is there.
    who.elector.on_key(None, 1.0, 0.0)
    who.go(etcd, 1.0)
    assert isinstance(who.elector.next(1.0, 1), Lead)
    who.elector.on_key(Holder(Term(1), 9, "old"), 1.0, 0.0)
    assert isinstance(who.elector.next(1.0, 1), Lead)


def test_a_newer_leader_in_the_mirror_ends_leadership(etcd: MemoryEtcd) -> None:
    who = Campaign()
    who.go(etcd, 0)
    who.elector.on_key(Holder(Term(99), 9, "new"), 1.0, 0.0)
    assert who.elector.next(1.0, 1) == StepDown("another replica leads")


@pytest.mark.parametrize("leading", [True, False])
def test_another_lease_ends_the_campaign(etcd: MemoryEtcd, leading: bool) -> None:
    who = Campaign()
    if leading:
        who.go(etcd, 0)
    assert isinstance(who.elector.next(1.0, 2), StepDown)
    assert isinstance(who.elector.next(1.0, 1), StepDown)


class Running:
    """A leadership thread over the model."""

    def __init__(
        self, etcd: MemoryEtcd, lease: int, name: str, *, answers: Callable[[str], bool] = lambda _: True
    ) -> None:
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
            answers=answers,
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


def test_a_second_replica_of_the_same_id_refuses_to_run(
    etcd: MemoryEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "TAKEN_TTLS", 0.0)
    monkeypatch.setattr(lease_module, "TAKEN_S", 0.5)
    first = Running(etcd, 1, "r1")
    assert first.won.wait(5)
    second = Running(etcd, 2, "r1")
    try:
        assert second.over.wait(5)
        assert not second.won.is_set()
        key = Keys(ClusterName("c1")).coordinator(ReplicaId("r1"))
        assert etcd.range(key).items[0].lease == 1
        assert not first.over.is_set()
    finally:
        first.stop()
        second.stop()


def test_an_id_whose_owner_is_silent_is_waited_for_however_long_its_lease_lives(
    etcd: MemoryEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elections of etcd's extend the leases of the dead, again and again."""
    monkeypatch.setattr(lease_module, "TAKEN_TTLS", 0.0)
    monkeypatch.setattr(lease_module, "TAKEN_S", 0.0)
    first = Running(etcd, 1, "r1")
    assert first.won.wait(5)
    first.stop()
    asked: list[str] = []
    second = Running(etcd, 2, "r1", answers=lambda address: bool(asked.append(address)))
    try:
        assert not second.won.wait(1.0)
        assert len(asked) > 1
        assert set(asked) == {"h:1"}
        assert not second.over.is_set()
        etcd.revoke(1)
        assert second.won.wait(5)
    finally:
        second.stop()


def test_a_replica_whose_id_is_another_s_does_not_campaign(etcd: MemoryEtcd) -> None:
    record = codec.encode(ReplicaRecord(ReplicaId("r1"), "h:2"))
    etcd.txn(Txn(success=(Put(Keys(ClusterName("c1")).coordinator(ReplicaId("r1")), record, 1),)))
    second = Running(etcd, 2, "r1")
    try:
        assert not second.won.wait(0.5), "nobody leads, but this replica is not known under its id"
        etcd.revoke(1)
        assert second.won.wait(5)
    finally:
        second.stop()


def test_an_id_left_behind_by_a_lost_host_is_taken_over_with_its_lease(etcd: MemoryEtcd) -> None:
    first = Running(etcd, 1, "r1")
    assert first.won.wait(5)
    first.stop()
    second = Running(etcd, 2, "r1")
    try:
        assert not second.won.wait(0.3)
        assert not second.over.is_set()
        etcd.revoke(1)
        assert second.won.wait(5)
    finally:
        second.stop()


class SleepyClock(SystemClock):
    """A machine whose clocks go on while it sleeps."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.slept_s


def test_a_leader_that_wakes_up_after_its_lease_stands_down_before_it_acts(etcd: MemoryEtcd) -> None:
    clock = SleepyClock()
    session = FixedSession(1, ttl_s=10.0, deadline=clock.monotonic() + 7.0)
    over: list[str] = []
    leadership = Leadership(
        etcd,
        session,
        ClusterName("c1"),
        ReplicaRecord(ReplicaId("r1"), "h:1"),
        clock=clock,
        on_term=lambda _term: None,
        on_over=over.append,
        answers=lambda _: False,
    )
    thread = threading.Thread(target=leadership.run)
    thread.start()
    end = time.monotonic() + 5
    while not leadership.may_act():
        assert time.monotonic() < end
        time.sleep(0.005)
    clock.slept_s = 60.0
    # At once, without anybody being asked: what was about to be sent is not.
    assert not leadership.may_act()
    thread.join(5)
    assert over == ["the lease was not renewed in time"]
