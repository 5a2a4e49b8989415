"""Registration and fenced snapshots, against the model of etcd."""

import random

import pytest

from dtrain.agent.reporter import Reporter, Settings, fit
from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Unavailable
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, Incarnation, JobName, Rank, Step, Uid
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import (
    SNAPSHOT_BYTES_MAX,
    Failure,
    FailureKind,
    NodeRecord,
    RankState,
    WorkerPhase,
    WorkerSnapshot,
)
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Delete, Put, Txn, TxnResult
from dtrain.storage.etcd.session import FixedSession

KEYS = Keys(ClusterName("test"))
NAME = AgentName("node-a")
JOB = JobName("train")


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now


class Faulty(MemoryEtcd):
    """Loses answers, or requests, of the next transactions."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock.monotonic)
        self.faults: list[str] = []

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "refused":
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "connection refused")
        result = super().txn(txn, deadline_s=deadline_s)
        if fault == "lost":
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "no answer")
        return result


class Bench:
    def __init__(
        self,
        *,
        etcd: Faulty | None = None,
        clock: FakeClock | None = None,
        lease: int = 11,
        lives: int = 0,
    ) -> None:
        self.clock = clock or FakeClock()
        self.etcd = etcd or Faulty(self.clock)
        self.etcd.grant(3600, lease)
        self.session = FixedSession(lease)
        self.registered: list[tuple[int, Incarnation]] = []
        self.taken: list[float] = []
        numbers = iter(range(lives, 1000))
        node = NodeRecord(NAME, Incarnation(""), "10.0.0.1:7071", "10.0.0.1", 2, pid=4711)
        self.reporter = Reporter(
            self.etcd,
            KEYS,
            self.session,
            node,
            self.clock,
            new_incarnation=lambda: Incarnation(f"{lease}-{next(numbers)}"),
            on_registered=lambda generation, mine: self.registered.append((generation, mine)),
            on_taken=lambda _other, waited_s: self.taken.append(waited_s),
            settings=Settings(progress_s=2.0, refresh_s=60.0),
            rng=random.Random(1),
        )

    def work(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        self.reporter.work()

    def node(self) -> NodeRecord | None:
        items = self.etcd.range(KEYS.node(NAME)).items
        return codec.decode(NodeRecord, items[0].value) if items else None

    def stored(self) -> WorkerSnapshot | None:
        items = self.etcd.range(KEYS.worker(NAME, JOB)).items
        return codec.decode(WorkerSnapshot, items[0].value) if items else None

    def submit(self, step: int, *, urgent: bool = False) -> None:
        self.reporter.submit(JOB, snapshot(step), urgent=urgent)


def snapshot(step: int, **more: object) -> WorkerSnapshot:
    rank = RankState(Rank(0), 1, WorkerPhase.TRAINING, Step(step), metrics={"loss": 1.0})
    base = WorkerSnapshot(NAME, Uid("u1"), Incarnation("i"), Attempt(1), WorkerPhase.TRAINING, ranks=(rank,))
    import dataclasses

    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def step_of(found: WorkerSnapshot | None) -> int:
    assert found is not None
    return found.ranks[0].step


def test_registration_is_under_the_lease() -> None:
    bench = Bench()
    bench.work()
    assert bench.registered == [(1, "11-0")]
    assert bench.etcd.range(KEYS.node(NAME)).items[0].lease == 11


def test_a_snapshot_made_before_a_registration_is_written_under_its_name() -> None:
    bench = Bench()
    bench.work()
    # The driver has not heard of the registration yet: what it submits says who we were.
    bench.submit(1, urgent=True)
    bench.work()
    found, node = bench.stored(), bench.node()
    assert found is not None
    assert node is not None
    assert found.incarnation == node.incarnation


def test_an_urgent_snapshot_is_written_at_once_and_progress_waits() -> None:
    bench = Bench()
    bench.submit(1, urgent=True)
    bench.work()
    # Registered first; the driver tells everything anew then.
    bench.submit(1, urgent=True)
    bench.work()
    assert step_of(bench.stored()) == 1
    bench.submit(2)
    bench.work(0.5)
    assert step_of(bench.stored()) == 1
    bench.submit(3)
    bench.work(1.6)
    assert step_of(bench.stored()) == 3
    bench.submit(4, urgent=True)
    bench.work()
    assert step_of(bench.stored()) == 4


def test_urgency_is_not_lost_to_later_progress() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    bench.submit(2, urgent=True)
    bench.submit(3)
    bench.work()
    assert step_of(bench.stored()) == 3


def test_a_quiet_snapshot_is_refreshed() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    before = bench.etcd.revision
    bench.work(40)
    assert bench.etcd.revision == before
    bench.work(33)
    assert bench.etcd.revision == before + 1


def test_a_snapshot_is_deleted_when_the_job_leaves() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    bench.reporter.delete(JOB)
    assert not bench.reporter.idle
    bench.work()
    assert bench.stored() is None
    assert bench.reporter.idle


def test_what_a_former_life_left_is_deleted() -> None:
    bench = Bench()
    bench.etcd.txn(Txn(success=(Put(KEYS.worker(NAME, JobName("old")), b"{}", 11),)))
    bench.work()
    assert not bench.etcd.range(KEYS.worker(NAME, JobName("old"))).items


def test_a_restarted_agent_takes_over_under_the_same_lease_and_fences_its_former_self() -> None:
    old = Bench()
    old.work()
    old.submit(1, urgent=True)
    old.work()
    new = Bench(etcd=old.etcd, clock=old.clock, lives=1)
    new.work()
    new.submit(5, urgent=True)
    new.work()
    assert step_of(new.stored()) == 5
    old.submit(2, urgent=True)
    old.work()
    assert step_of(new.stored()) == 5


def test_another_lease_keeps_the_name_until_it_expires() -> None:
    holder = Bench(lease=11)
    holder.work()
    late = Bench(etcd=holder.etcd, clock=holder.clock, lease=22)
    late.work()
    late.work(5)
    assert late.taken == [0.0, 5.0]
    assert not late.reporter.registered
    holder.etcd.revoke(11)
    late.work(1)
    assert late.reporter.registered


def test_a_problem_of_the_machine_is_in_its_record_before_any_snapshot_that_tells_of_it() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    bench.reporter.set_problem("rank 1 cannot be killed")
    bench.submit(2, urgent=True)
    bench.work()
    node = bench.node()
    assert node is not None
    assert node.problem == "rank 1 cannot be killed"
    assert step_of(bench.stored()) == 2
    key, job = KEYS.node(NAME), KEYS.worker(NAME, JOB)
    revisions = {
        kv.key: kv.mod_revision for kv in (bench.etcd.range(key).items + bench.etcd.range(job).items)
    }
    assert revisions[key] < revisions[job]
    assert bench.registered == [(1, node.incarnation)], "it is the same life"
    bench.reporter.set_problem("")
    bench.work()
    assert bench.node() is not None
    assert bench.node().problem == ""  # type: ignore[union-attr]


def test_a_problem_survives_a_new_registration() -> None:
    bench = Bench()
    bench.work()
    bench.reporter.set_problem("rank 1 cannot be killed")
    bench.work()
    bench.etcd.revoke(11)
    bench.etcd.grant(3600, 12)
    bench.session.replace(12)
    bench.work(1)
    bench.work(1)
    node = bench.node()
    assert node is not None
    assert (node.incarnation, node.problem) == (bench.registered[-1][1], "rank 1 cannot be killed")


def test_a_lost_lease_is_followed_by_a_new_registration_that_republishes() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    bench.etcd.revoke(11)
    bench.submit(2, urgent=True)
    bench.work()
    assert bench.stored() is None
    assert bench.session.doubts == 0, "its record is gone: that is all it knows"
    bench.work()
    assert bench.session.doubts == 1, "etcd knows no such lease: its guardian must get another one"
    bench.etcd.grant(3600, 12)
    bench.session.replace(12)
    bench.work(1)
    assert [generation for generation, _ in bench.registered] == [1, 2]
    bench.submit(2, urgent=True)
    bench.work()
    assert step_of(bench.stored()) == 2
    assert bench.etcd.range(KEYS.worker(NAME, JOB)).items[0].lease == 12


def test_a_name_taken_meanwhile_fences_every_snapshot() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    key = KEYS.node(NAME)
    bench.etcd.grant(3600, 99)
    bench.etcd.txn(Txn(success=(Delete(key),)))
    bench.etcd.txn(
        Txn(
            success=(
                Put(
                    key, codec.encode(bench.node() or NodeRecord(NAME, Incarnation("x"), "", "other", 1)), 99
                ),
            )
        )
    )
    bench.submit(2, urgent=True)
    bench.work()
    assert step_of(bench.stored()) == 1
    assert not bench.reporter.registered
    bench.work(1)
    assert bench.taken


@pytest.mark.parametrize("fault", ["refused", "lost"])
def test_the_newest_snapshot_is_written_whatever_happened_to_the_one_before(fault: str) -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    bench.etcd.faults = [fault]
    bench.submit(2, urgent=True)
    bench.work()
    bench.submit(3, urgent=True)
    bench.work(3)
    bench.work(3)
    assert step_of(bench.stored()) == 3
    assert bench.reporter.idle


def test_a_lost_registration_answer_is_resolved() -> None:
    bench = Bench()
    bench.etcd.faults = ["lost"]
    bench.work()
    assert not bench.registered
    bench.work(3)
    assert len(bench.registered) == 1
    bench.submit(1, urgent=True)
    bench.work()
    assert step_of(bench.stored()) == 1


def test_a_snapshot_is_cut_to_what_etcd_should_hold() -> None:
    ranks = tuple(
        RankState(
            Rank(n), n, WorkerPhase.TRAINING, Step(1), metrics={f"metric-{k}": 0.123456 for k in range(30)}
        )
        for n in range(24)
    )
    failure = Failure(FailureKind.EXIT, "it ended", log_tail="x" * 2000)
    big = snapshot(1, ranks=ranks, failure=failure)
    assert len(codec.encode(big)) > SNAPSHOT_BYTES_MAX
    value = fit(big)
    assert len(value) <= SNAPSHOT_BYTES_MAX
    cut = codec.decode(WorkerSnapshot, value)
    assert cut.failure is not None
    assert cut.failure.message == "it ended"
    assert len(cut.ranks) == 24


def test_a_late_creation_does_not_bring_a_released_snapshot_back() -> None:
    bench = Bench()
    bench.work()
    late: list[Txn] = []
    txn = bench.etcd.txn

    def slow(one: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        if not late and any(isinstance(op, Put) and op.key == KEYS.worker(NAME, JOB) for op in one.success):
            late.append(one)
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "no answer")
        return txn(one, deadline_s=deadline_s)

    bench.etcd.txn = slow  # type: ignore[method-assign]
    bench.submit(1, urgent=True)
    bench.work()
    bench.work(3.0)
    assert bench.etcd.range(KEYS.worker(NAME, JOB)).items
    incarnations = len(bench.registered)
    bench.reporter.delete(JOB)
    bench.etcd.faults = ["lost"]
    bench.work()
    bench.work(3.0)
    assert bench.reporter.idle
    assert not txn(late[0]).succeeded
    assert not bench.etcd.range(KEYS.worker(NAME, JOB)).items
    assert len(bench.registered) == incarnations


def test_a_late_deletion_does_not_take_away_what_was_written_since() -> None:
    bench = Bench()
    bench.work()
    bench.submit(1, urgent=True)
    bench.work()
    late: list[Txn] = []
    txn = bench.etcd.txn

    def slow(one: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        if not late and any(isinstance(op, Delete) for op in one.success):
            late.append(one)
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "no answer")
        return txn(one, deadline_s=deadline_s)

    bench.etcd.txn = slow  # type: ignore[method-assign]
    bench.reporter.delete(JOB)
    bench.work()
    bench.submit(7, urgent=True)
    bench.work(3.0)
    assert not txn(late[0]).succeeded
    assert step_of(bench.stored()) == 7
