"""Decisions as fenced transactions, against the model of etcd."""

import dataclasses
from collections.abc import Callable

import pytest

from dtrain.coordinator.core.decisions import Decision, DeleteRecord, Guard, NoKeysUnder, PutRecord
from dtrain.coordinator.persistence import (
    Committed,
    Committer,
    Conflict,
    Deposed,
    NotWritten,
    Unknown,
    fenced,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.protocol.ids import AgentName, ClusterName, JobName, Seq, Step, Term, Uid
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import OPERATIONS_PER_TXN_MAX, KeyValue, Put, Txn, TxnResult

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
JOB = JobName("job")
KEY = KEYS.latest(JOB)


class Faulty(MemoryEtcd):
    """Raises what is queued for writing transactions, before or after applying them."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.faults: list[tuple[str, DtrainError]] = []
        self.on_read: Callable[[], None] = lambda: None

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        if not txn.compares and not any(isinstance(op, Put) for op in txn.success):
            self.on_read()
        if self.faults:
            when, error = self.faults.pop(0)
            if when == "after":
                super().txn(txn, deadline_s=deadline_s)
            raise error
        return super().txn(txn, deadline_s=deadline_s)


LOST = OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "lost")
DOWN = Unavailable(ErrorCode.ETCD_UNAVAILABLE, "down")


@pytest.fixture
def etcd() -> Faulty:
    return Faulty()


def lead(etcd: MemoryEtcd) -> Term:
    return Term(etcd.txn(Txn(success=(Put(KEYS.leader, b"{}"),))).revision)


def committer(etcd: MemoryEtcd, may_act: Callable[[], bool] = lambda: True) -> Committer:
    return Committer(etcd, CLUSTER, may_act=may_act, pause=lambda _seconds: None)


def put(term: Term, expect: int = 0, step: int = 1) -> Decision:
    return Decision(writes=(PutRecord(KEY, Latest(term, Seq(1), Step(step)), expect),))


def test_a_decision_of_the_current_term_is_applied_at_one_revision(etcd: Faulty) -> None:
    term = lead(etcd)
    outcome = committer(etcd).commit(term, put(term))
    (kv,) = etcd.range(KEY).items
    assert outcome == Committed(kv.mod_revision)


def test_a_record_with_an_end_goes_by_itself() -> None:
    now = 0.0
    etcd = MemoryEtcd(lambda: now)
    term = lead(etcd)
    agent = AgentName("a1")
    cordon = PutRecord(KEYS.cordon(agent), Cordon(agent, "bad", auto=True), 0, lease_ttl_s=59.5)
    decision = Decision(writes=(*put(term).writes, cordon))
    assert isinstance(committer(etcd).commit(term, decision), Committed)
    now = 58.0
    etcd.tick()
    assert etcd.range(KEYS.cordon(agent)).items
    now = 61.0
    etcd.tick()
    assert not etcd.range(KEYS.cordon(agent)).items
    assert etcd.range(KEY).items


def test_a_lease_that_is_not_granted_writes_nothing(etcd: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    term = lead(etcd)

    def lost(ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        raise LOST

    monkeypatch.setattr(etcd, "grant", lost)
    agent = AgentName("a1")
    cordon = PutRecord(KEYS.cordon(agent), Cordon(agent, "bad", auto=True), 0, lease_ttl_s=60.0)
    outcome = committer(etcd).commit(term, Decision(writes=(cordon,)))
    assert isinstance(outcome, NotWritten)
    assert outcome.retry
    assert not etcd.range(KEYS.cordon(agent)).items


def test_no_lease_is_left_without_its_record() -> None:
    etcd = MemoryEtcd(lambda: 0.0)
    term, agent = lead(etcd), AgentName("a1")
    key = KEYS.cordon(agent)

    def stored(key: str) -> KeyValue | None:
        return next(iter(etcd.range(key).items), None)

    def cordon(expect_mod: int) -> Decision:
        record = Cordon(agent, "bad", auto=True)
        return Decision(writes=(PutRecord(key, record, expect_mod, lease_ttl_s=60.0),))

    def held() -> list[tuple[str, ...]]:
        return [keys for keys in etcd.leases().values() if KEYS.leader not in keys]

    commits = Committer(etcd, CLUSTER, may_act=lambda: True, stored=stored)
    first = commits.commit(term, cordon(0))
    assert isinstance(first, Committed)
    assert isinstance(commits.commit(term, cordon(0)), Conflict)
    assert held() == [(key,)]
    assert isinstance(commits.commit(term, cordon(first.revision)), Committed)
    assert held() == [(key,)]
    assert isinstance(commits.commit(Term(term - 1), cordon(first.revision)), Deposed)
    assert held() == [(key,)]


def test_a_stale_leader_cannot_commit(etcd: Faulty) -> None:
    term = lead(etcd)
    assert committer(etcd).commit(Term(term - 1), put(Term(term - 1))) == Deposed()
    assert not etcd.range(KEY).items


def test_without_a_leader_key_nobody_commits(etcd: Faulty) -> None:
    assert committer(etcd).commit(Term(7), put(Term(7))) == Deposed()


def test_a_replica_that_may_not_act_does_not_even_try(etcd: Faulty) -> None:
    term = lead(etcd)
    assert committer(etcd, lambda: False).commit(term, put(term)) == Deposed()
    assert not etcd.range(KEY).items


def test_a_changed_record_is_a_conflict_at_its_revision(etcd: Faulty) -> None:
    term = lead(etcd)
    changed = etcd.txn(Txn(success=(Put(KEY, b"{}"),))).revision
    etcd.txn(Txn(success=(Put("/another/application", b""),)))
    assert committer(etcd).commit(term, put(term)) == Conflict(changed)


def test_a_guard_on_a_record_that_is_not_written_counts(etcd: Faulty) -> None:
    term = lead(etcd)
    decision = put(term)
    refused = Decision(guards=(Guard(KEYS.status(JOB), 5),), writes=decision.writes)
    assert isinstance(committer(etcd).commit(term, refused), Conflict)
    held = Decision(guards=(Guard(KEYS.status(JOB), 0),), writes=decision.writes)
    assert isinstance(committer(etcd).commit(term, held), Committed)


def test_a_pin_that_came_meanwhile_stops_a_retirement(etcd: Faulty) -> None:
    term = lead(etcd)
    retire = Decision(absent=(NoKeysUnder(KEYS.pins(JOB, Seq(1))),), writes=put(term).writes)
    etcd.txn(Txn(success=(Put(KEYS.pins(JOB, Seq(1)) + "reader", b"{}"),)))
    assert isinstance(committer(etcd).commit(term, retire), Conflict)
    assert not etcd.range(KEY).items


def test_a_lost_answer_of_an_applied_write_is_found_by_reading(etcd: Faulty) -> None:
    term = lead(etcd)
    etcd.faults = [("after", LOST)]
    outcome = committer(etcd).commit(term, put(term))
    assert outcome == Committed(etcd.range(KEY).items[0].mod_revision)


def test_a_write_that_may_still_come_is_unknown_and_harmless_when_it_comes(etcd: Faulty) -> None:
    term = lead(etcd)
    etcd.faults = [("before", LOST)]
    first = put(term, step=1)
    assert committer(etcd).commit(term, first) == Unknown(term)
    assert isinstance(committer(etcd).commit(term, put(term, step=2)), Committed)
    # The first one arrives at last: its guard is false by now.
    assert not etcd.txn(fenced(KEYS, term, first)).succeeded
    assert b'"step":2' in etcd.range(KEY).items[0].value


def test_looking_goes_on_until_etcd_answers(etcd: Faulty) -> None:
    term = lead(etcd)
    etcd.faults = [("after", LOST), ("before", DOWN), ("before", DOWN)]
    assert isinstance(committer(etcd).commit(term, put(term)), Committed)


def test_looking_ends_with_the_lease(etcd: Faulty) -> None:
    term = lead(etcd)
    may_act = [True, True]
    etcd.faults = [("before", LOST), *[("before", DOWN)] * 10]
    assert committer(etcd, lambda: bool(may_act and may_act.pop())).commit(term, put(term)) == Deposed()


def test_looking_finds_another_leader(etcd: Faulty) -> None:
    term = lead(etcd)
    etcd.faults = [("before", LOST)]

    def depose() -> None:
        etcd.on_read = lambda: None
        MemoryEtcd.txn(etcd, Txn(success=(Put(KEYS.leader + "x", b""),)))
        etcd._live.pop(KEYS.leader)

    etcd.on_read = depose
    assert committer(etcd).commit(term, put(term)) == Deposed()


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (DOWN, True),
        (Refused(ErrorCode.ETCD_AUTH, "permission denied"), True),
        (Refused(ErrorCode.ETCD_NO_SPACE, "database space exceeded"), True),
        (Refused(ErrorCode.ETCD_REFUSED, "too large"), False),
    ],
)
def test_what_was_not_written_says_whether_to_try_again(
    etcd: Faulty, error: DtrainError, retry: bool
) -> None:
    term = lead(etcd)
    etcd.faults = [("before", error)]
    outcome = committer(etcd).commit(term, put(term))
    assert isinstance(outcome, NotWritten)
    assert outcome.retry is retry


@pytest.mark.parametrize("code", [ErrorCode.ETCD_AUTH, ErrorCode.ETCD_NO_SPACE])
def test_a_refused_look_says_nothing_about_the_writes(etcd: Faulty, code: ErrorCode) -> None:
    term = lead(etcd)
    etcd.faults = [("after", LOST), *[("before", Refused(code, "not now"))] * 2]
    outcome = committer(etcd).commit(term, put(term))
    assert outcome == Committed(etcd.range(KEY).items[0].mod_revision)


def test_a_decision_that_contradicts_itself_is_a_bug() -> None:
    decision = Decision(guards=(Guard(KEY, 3),), writes=(DeleteRecord(KEY, 4),))
    with pytest.raises(AssertionError, match="two revisions"):
        fenced(KEYS, Term(1), decision)


def test_a_decision_larger_than_a_transaction_is_a_bug() -> None:
    writes = tuple(DeleteRecord(KEYS.event(JOB, seq), 1) for seq in range(OPERATIONS_PER_TXN_MAX))
    with pytest.raises(AssertionError, match="larger"):
        fenced(KEYS, Term(1), Decision(writes=writes))


def test_what_a_newer_release_wrote_in_a_record_outlives_a_rewrite(etcd: Faulty) -> None:
    term, key = lead(etcd), KEYS.status(JOB)
    status = JobStatus(term, Uid("u1"), JobPhase.QUEUED)
    revision = etcd.txn(Txn(success=(Put(key, codec.encode(status)[:-1] + b',"later":[1]}'),))).revision

    def stored(name: str) -> KeyValue | None:
        return next(iter(etcd.range(name).items), None)

    keeping = Committer(etcd, CLUSTER, may_act=lambda: True, stored=stored)
    running = dataclasses.replace(status, phase=JobPhase.RUNNING)
    assert isinstance(keeping.commit(term, Decision(writes=(PutRecord(key, running, revision),))), Committed)
    found = etcd.range(key).items[0]
    assert codec.decode(JobStatus, found.value) == running
    assert codec.loads(found.value)["later"] == [1]
    # Another submission's record begins afresh.
    other = dataclasses.replace(running, uid=Uid("u2"))
    decision = Decision(writes=(PutRecord(key, other, found.mod_revision),))
    assert isinstance(keeping.commit(term, decision), Committed)
    assert "later" not in codec.loads(etcd.range(key).items[0].value)
