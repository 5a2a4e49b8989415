"""What a coordinator counts while it works."""

from typing import Any

import pytest
from tests.support.builders import KEYS, Stage, make_spec

from dtrain.coordinator import metrics
from dtrain.coordinator.core.decisions import Decision
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.views import Moment
from dtrain.coordinator.measures import Measures
from dtrain.coordinator.persistence import Committed, Conflict
from dtrain.protocol.errors import DtrainError, ErrorCode, Unavailable
from dtrain.runtime.metrics import Distribution, Metric
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS
from dtrain.storage.etcd import lease_metrics, metered
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import KeyValue, Put, Txn
from dtrain.storage.etcd.session import FixedSession
from dtrain.storage.etcd.session_memory import GuardianCounts, SessionMemory


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def measures(clock: Clock) -> Measures:
    return Measures(clock)


def of(measures: Measures, metric: Metric) -> dict[tuple[str, ...], Any]:
    return dict(measures.samples()[metric])


def leader(revision: int) -> KeyValue:
    return KeyValue(KEYS.leader, b"{}", revision, revision, 1)


def count(found: Any) -> int:
    assert isinstance(found, Distribution)
    return sum(found.counts)


def test_a_takeover_lasts_from_the_fall_that_was_seen_to_the_first_decision(
    measures: Measures, clock: Clock
) -> None:
    measures.leader_seen(leader(5))
    measures.leader_seen(None)
    clock.now += 0.5
    measures.leader_seen(leader(9))
    measures.office(False)
    clock.now += 0.25
    measures.office(True)
    measures.office(True)
    found = of(measures, metrics.TAKEOVER_SECONDS)[()]
    assert (count(found), found.total) == (1, 0.75)
    assert of(measures, metrics.TRANSITIONS) == {(): 1.0}


def test_a_takeover_whose_beginning_was_missed_is_not_timed_from_an_earlier_one(
    measures: Measures, clock: Clock
) -> None:
    measures.leader_seen(leader(5))
    measures.leader_seen(None)
    measures.leader_seen(leader(9))
    clock.now += 3600.0
    # The copy was read anew: the former leader's key went unseen.
    measures.leader_seen(leader(20))
    measures.office(True)
    assert count(of(measures, metrics.TAKEOVER_SECONDS)[()]) == 0
    assert of(measures, metrics.TRANSITIONS) == {(): 2.0}


def test_the_first_leader_and_a_rewritten_record_are_no_change(measures: Measures) -> None:
    measures.leader_seen(leader(5))
    measures.leader_seen(KeyValue(KEYS.leader, b"{}", 5, 8, 2))
    measures.office(True)
    assert of(measures, metrics.TRANSITIONS) == {(): 0.0}
    assert count(of(measures, metrics.TAKEOVER_SECONDS)[()]) == 0


def test_a_decision_that_crashes_is_counted_and_still_crashes(measures: Measures) -> None:
    def broken(*_: object) -> Decision:
        raise RuntimeError("bug")

    stage = Stage()
    with pytest.raises(RuntimeError):
        measures.planning(broken)(stage.view(), stage.fleet(), Moment(1.0, 1.0, "n"))
    assert of(measures, metrics.PLAN_FAILURES) == {(): 1.0}
    assert count(of(measures, metrics.PLAN_SECONDS)[()]) == 1
    assert measures.planning(plan)(stage.view(), stage.fleet(), Moment(1.0, 1.0, "n")).writes


def test_commands_are_counted_by_kind_and_by_how_they_failed(measures: Measures) -> None:
    measures.command("Prepare", 0.1, "")
    measures.command("Start", 5.0, "timed-out")
    assert count(of(measures, metrics.COMMAND_SECONDS)["Prepare",]) == 1
    assert of(measures, metrics.COMMAND_FAILURES) == {("Start", "timed-out"): 1.0}


def test_only_a_committed_checkpoint_is_a_commit(measures: Measures) -> None:
    stage = Stage(make_spec(store="s3://b", every_steps=10)).join("a", "b").run()
    measures.committed(stage.last, Committed(1), 1.0)
    stage.step(8)
    stage.decide()
    stage.accept()
    stage.durable()
    stage.verify()
    decision = stage.decide()
    assert stage.commits
    measures.committed(decision, Conflict(1), 1.0)
    measures.committed(decision, Committed(1), 2.0)
    found = of(measures, STAGE_SECONDS)["commit",]
    assert (count(found), found.total) == (1, 2.0)


def test_calls_to_etcd_are_measured_and_their_errors_named(measures: Measures, clock: Clock) -> None:
    inner = MemoryEtcd(clock.monotonic)
    etcd = metered.MeteredEtcd(inner, measures.etcd, clock)
    etcd.txn(Txn((), (Put("/dtrain/default/x", b"1"),)))
    assert [kv.value for kv in etcd.range("/dtrain/default/x").items] == [b"1"]
    with pytest.raises(DtrainError):
        etcd.keepalive(4711)
    seconds = of(measures, metered.REQUEST_SECONDS)
    assert {op: count(value) for (op,), value in seconds.items() if count(value)} == {
        "txn": 1,
        "range": 1,
        "keepalive": 1,
    }
    assert of(measures, metered.ERRORS) == {("keepalive", ErrorCode.LEASE_NOT_FOUND.value): 1.0}


def test_a_call_that_fails_slowly_is_as_slow_as_it_was(measures: Measures, clock: Clock) -> None:
    class Away(MemoryEtcd):
        def txn(self, *_: object, **__: object) -> Any:
            clock.now += 5.0
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "nobody is there")

    etcd = metered.MeteredEtcd(Away(clock.monotonic), measures.etcd, clock)
    with pytest.raises(Unavailable):
        etcd.txn(Txn())
    assert of(measures, metered.REQUEST_SECONDS)["txn",].total == 5.0


def test_what_a_guardian_has_counted_reaches_its_child_and_back() -> None:
    guardian = SessionMemory.create()
    child = SessionMemory.open(guardian.fd)
    counts = GuardianCounts((1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4), 5_000_000, (1, 0, 2), 3)
    guardian.publish_counts(counts)
    assert child.counts() == counts
    child.count_fenced()
    assert guardian.fenced() == 1


def test_a_lease_is_shown_with_what_is_left_of_it() -> None:
    session = FixedSession(7, ttl_s=10.0, deadline=107.0)
    session.count_fenced()
    found = lease_metrics.samples(session, 100.0)
    # Acting ends at 0.70 of the TTL: three seconds before the lease does.
    assert found[lease_metrics.REMAINING] == {(): pytest.approx(10.0)}
    assert found[lease_metrics.TTL] == {(): 10.0}
    assert session.counts().fenced == 1
    session.replace(0)
    assert lease_metrics.samples(session, 100.0)[lease_metrics.REMAINING] == {(): 0.0}
