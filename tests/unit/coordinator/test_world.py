"""What a replica knows, built from changes of the mirror alone."""

from dataclasses import fields, replace
from typing import Any

import pytest

from dtrain.coordinator.core.decisions import InspectCheckpoint
from dtrain.coordinator.core.queue import Queue
from dtrain.coordinator.core.views import FleetView, Inspection, Verdict
from dtrain.coordinator.losses import BRAKE_WINDOW_S, LOST_KEPT_S, MIRROR_AGE_S_MAX
from dtrain.coordinator.world import World
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, OpenRecord, Order, OrderKind, Verification
from dtrain.protocol.cluster import Blame, Cordon, ReplicaRecord, Suspicion
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import (
    CheckpointPolicy,
    Entry,
    EntryKind,
    Intent,
    JobPhase,
    JobSpec,
    JobStatus,
    Member,
    Wanted,
)
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import (
    Draining,
    FailureKind,
    NodeRecord,
    RankState,
    Transfer,
    TransferKind,
    WorkerPhase,
    WorkerSnapshot,
)
from dtrain.storage.etcd.mirror import Change
from dtrain.storage.etcd.port import KeyValue

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
JOB = JobName("job")
A1 = AgentName("a1")


class Etcd:
    """Numbers puts and deletes as etcd does, and feeds them to a world."""

    def __init__(self) -> None:
        self.world = World(CLUSTER, ReplicaId("r1"))
        self.items: dict[str, KeyValue] = {}
        self.revision = 1

    def put(self, key: str, value: Any, now: float = 0.0) -> None:
        self.revision += 1
        before = self.items.get(key)
        data = value if isinstance(value, bytes) else codec.encode(value)
        created = before.create_revision if before else self.revision
        after = KeyValue(key, data, created, self.revision, 1)
        self.items[key] = after
        self.world.apply([Change(key, before, after)], now)

    def delete(self, key: str, now: float = 0.0) -> None:
        self.revision += 1
        self.world.apply([Change(key, self.items.pop(key), None)], now)

    def fleet(self, now: float = 0.0, job: JobName = JOB) -> FleetView:
        return self.world.fleet_view(job, now, term=Term(1), took_office_at=0.0)


def spec(name: JobName = JOB, uid: str = "u1") -> JobSpec:
    return JobSpec(name, Uid(uid), Entry(EntryKind.SCRIPT, "train.py"))


def status(attempt: int = 1, phase: JobPhase = JobPhase.RUNNING, **fields: Any) -> JobStatus:
    return JobStatus(Term(1), Uid("u1"), phase, attempt=Attempt(attempt), **fields)


def node(name: AgentName = A1, life: str = "i1") -> NodeRecord:
    return NodeRecord(name, Incarnation(life), "h:1", "h", 4)


def snapshot(attempt: int = 1, step: int = 0, agent: AgentName = A1) -> WorkerSnapshot:
    ranks = (RankState(Rank(0), 1, WorkerPhase.TRAINING, Step(step)),)
    return WorkerSnapshot(agent, Uid("u1"), Incarnation("i1"), Attempt(attempt), WorkerPhase.TRAINING, ranks)


def opened(seq: int, term: int = 1) -> OpenRecord:
    return OpenRecord(Term(term), Uid("u1"), Seq(seq), Attempt(1), Step(9), "aa", 1, 60.0)


def test_an_open_record_rewritten_keeps_the_instant_it_was_first_seen() -> None:
    etcd = Etcd()
    etcd.put(KEYS.open(JOB, Seq(3)), opened(3), now=10)
    etcd.put(KEYS.open(JOB, Seq(3)), opened(3, term=2), now=20)
    (stored,) = etcd.world.job_view(JOB).open
    assert (stored.seen_at, stored.value.term) == (10, 2)
    etcd.delete(KEYS.open(JOB, Seq(3)), now=25)
    etcd.put(KEYS.open(JOB, Seq(3)), opened(3), now=30)
    assert etcd.world.job_view(JOB).open[0].seen_at == 30


def test_a_status_is_seen_anew_at_each_revision() -> None:
    etcd = Etcd()
    etcd.put(KEYS.status(JOB), status(), now=10)
    etcd.put(KEYS.status(JOB), status(2), now=20)
    stored = etcd.world.job_view(JOB).status
    assert stored is not None
    assert (stored.seen_at, stored.mod_revision) == (20, etcd.revision)


def test_the_last_snapshot_of_a_vanished_agent_stays_for_its_attempt_only() -> None:
    etcd = Etcd()
    etcd.put(KEYS.status(JOB), status(1))
    etcd.put(KEYS.worker(A1, JOB), snapshot(1, step=7))
    etcd.delete(KEYS.worker(A1, JOB))
    assert etcd.world.job_view(JOB).departed == {A1: snapshot(1, step=7)}
    etcd.put(KEYS.status(JOB), status(2))
    assert not etcd.world.job_view(JOB).departed
    etcd.put(KEYS.worker(A1, JOB), snapshot(1))
    etcd.delete(KEYS.worker(A1, JOB))
    assert not etcd.world.job_view(JOB).departed, "it was of an older attempt"


def test_a_lost_agent_is_remembered_until_it_comes_back() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node(), now=1)
    etcd.delete(KEYS.node(A1), now=5)
    assert etcd.fleet(5).lost_at == {A1: 5}
    assert not etcd.fleet(5).agents
    etcd.put(KEYS.node(A1), node(life="i2"), now=9)
    assert not etcd.fleet(9).lost_at
    assert etcd.fleet(9).agents[A1].seen_at == 9


def test_the_lost_are_those_that_went_without_a_word_and_are_not_back() -> None:
    etcd = Etcd()
    for name in ("a1", "a2", "a3"):
        etcd.put(KEYS.node(AgentName(name)), node(AgentName(name)))
    leaving = replace(node(AgentName("a3")), draining=Draining("SIGTERM"))
    etcd.put(KEYS.node(AgentName("a3")), leaving)
    assert etcd.world.lost_count() == 0
    for name in ("a1", "a2", "a3"):
        etcd.delete(KEYS.node(AgentName(name)), now=1.0)
    assert etcd.world.lost_count() == 2
    etcd.put(KEYS.node(A1), node(), now=2.0)
    assert etcd.world.lost_count() == 1
    etcd.world.tidy(LOST_KEPT_S + 10.0)
    assert etcd.world.lost_count() == 0


def test_of_a_lost_agent_it_is_remembered_whether_it_drained() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), replace(node(), draining=Draining("SIGTERM", grace_s=5.0)), now=1)
    etcd.delete(KEYS.node(A1), now=5)
    assert etcd.fleet(5).left == {A1}
    etcd.put(KEYS.node(A1), node(life="i2"), now=9)
    assert not etcd.fleet(9).left
    etcd.delete(KEYS.node(A1), now=10)
    assert etcd.fleet(10).lost_at == {A1: 10}
    assert not etcd.fleet(10).left


def test_a_rewritten_node_of_one_life_is_not_a_new_agent() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node(), now=1)
    etcd.world.record_reached(A1, False, 2)
    etcd.put(KEYS.node(A1), replace(node(), slots=8), now=3)
    assert etcd.fleet().agents[A1].seen_at == 1
    assert etcd.fleet().unreachable == {A1: 2}
    etcd.put(KEYS.node(A1), node(life="i2"), now=4)
    assert not etcd.fleet().unreachable


def test_every_failed_command_dates_an_agent_s_silence_anew() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node(), now=1)
    etcd.world.record_reached(A1, False, 2)
    etcd.world.take_touched()
    # An attempt that began in between must see that its own PREPARE failed.
    etcd.world.record_reached(A1, False, 5)
    assert etcd.fleet().unreachable == {A1: 5}
    etcd.world.record_reached(A1, True, 6)
    assert not etcd.fleet().unreachable


def test_a_view_given_away_does_not_change() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    before = etcd.fleet()
    etcd.delete(KEYS.node(A1))
    assert A1 in before.agents
    assert A1 not in etcd.fleet().agents


@pytest.mark.parametrize(("alive", "lost", "on"), [(10, 3, False), (9, 3, True), (3, 2, False), (8, 4, True)])
def test_the_brake_comes_on_when_a_third_of_the_fleet_vanishes(alive: int, lost: int, on: bool) -> None:
    etcd = Etcd()
    for index in range(alive):
        etcd.put(KEYS.node(AgentName(f"a{index}")), node(AgentName(f"a{index}")))
    for index in range(lost):
        etcd.delete(KEYS.node(AgentName(f"a{index}")), now=10 + index)
    assert bool(etcd.world.brake(12)) is on
    etcd.world.heard(12 + BRAKE_WINDOW_S)
    assert not etcd.world.brake(10 + lost + BRAKE_WINDOW_S)


def test_one_lost_agent_is_acted_on_after_a_moment_and_several_in_a_row_are_waited_out() -> None:
    etcd = Etcd()
    for index in range(9):
        etcd.put(KEYS.node(AgentName(f"a{index}")), node(AgentName(f"a{index}")))
    etcd.delete(KEYS.node(AgentName("a0")), now=100.0)
    # The second of two leases that etcd revokes is gone some milliseconds after the first.
    assert etcd.fleet(now=100.0).losses_settle_at == 100.25
    etcd.delete(KEYS.node(AgentName("a1")), now=101.0)
    # A third of the TTL of 10 s, over which leases that were lost together end, and a second more.
    assert etcd.fleet(now=101.0).losses_settle_at == pytest.approx(101.0 + 10 / 3 + 1)
    assert etcd.fleet(now=106.0).losses_settle_at == 0.0


def test_one_that_comes_back_shows_that_others_who_vanished_with_it_may_live() -> None:
    etcd = Etcd()
    for name in ("a0", "a1", "a2"):
        etcd.put(KEYS.node(AgentName(name)), node(AgentName(name)))
    etcd.delete(KEYS.node(AgentName("a0")), now=100.0)
    etcd.put(KEYS.node(AgentName("a0")), node(AgentName("a0")), now=100.5)
    assert etcd.fleet(now=100.5).losses_settle_at == 0.0, "nobody is gone"
    etcd.delete(KEYS.node(AgentName("a1")), now=101.0)
    assert etcd.fleet(now=101.0).losses_settle_at == pytest.approx(101.0 + 10 / 3 + 1)
    etcd.delete(KEYS.node(AgentName("a2")), now=110.0)
    assert etcd.fleet(now=110.0).losses_settle_at == 110.25, "long after: that is another story"


def test_the_brake_outlasts_the_return_of_the_first_by_one_ttl() -> None:
    etcd = Etcd()
    for index in range(7):
        etcd.put(KEYS.node(AgentName(f"a{index}")), node(AgentName(f"a{index}")))
    for index in range(3):
        etcd.delete(KEYS.node(AgentName(f"a{index}")), now=100.0 + index)
    assert etcd.world.brake(110.0)
    etcd.put(KEYS.node(AgentName("a0")), node(AgentName("a0")), now=111.0)
    # Two of seven are no crowd, but they are on their way back as the first one was.
    assert etcd.world.brake(111.0) == "3 of 7 agents vanished within 60 s"
    assert etcd.world.brake(121.0)
    assert etcd.world.brake_changes_at(111.0) == pytest.approx(121.0, abs=0.01)
    assert not etcd.world.brake(121.1)


def test_agents_that_vanish_slowly_do_not_brake() -> None:
    etcd = Etcd()
    for index in range(9):
        etcd.put(KEYS.node(AgentName(f"a{index}")), node(AgentName(f"a{index}")))
    for index in range(3):
        etcd.delete(KEYS.node(AgentName(f"a{index}")), now=index * 40.0)
    assert not etcd.world.brake(81)


def test_a_stale_mirror_brakes_and_says_when_it_will() -> None:
    etcd = Etcd()
    assert etcd.world.brake(0)
    etcd.put(KEYS.node(A1), node(), now=0)
    assert not etcd.world.brake(MIRROR_AGE_S_MAX)
    at = etcd.world.brake_changes_at(0)
    assert at is not None
    assert etcd.world.brake(at)


def test_slots_are_those_of_other_jobs_that_are_placed() -> None:
    etcd = Etcd()
    other = JobName("other")
    members = (Member(A1, 0, Rank(0), 2),)
    etcd.put(KEYS.status(other), status(members=members))
    etcd.put(KEYS.status(JOB), status(members=(Member(A1, 0, Rank(0), 1),)))
    assert etcd.fleet(job=JOB).used == {A1: 2}
    assert etcd.fleet(job=other).used == {A1: 1}
    etcd.put(KEYS.status(other), status(phase=JobPhase.RECOVERING, members=members))
    assert etcd.fleet(job=JOB).used == {}


def test_freed_slots_wake_the_jobs_that_wait() -> None:
    etcd = Etcd()
    other = JobName("other")
    etcd.put(KEYS.status(other), status(members=(Member(A1, 0, Rank(0), 2),)))
    etcd.put(KEYS.spec(JOB), spec())
    etcd.world.take_touched()
    etcd.put(KEYS.status(other), status(phase=JobPhase.SUCCEEDED))
    assert etcd.world.take_touched() == [JOB, other]


def test_a_change_of_an_agent_touches_its_jobs_and_those_that_wait() -> None:
    etcd = Etcd()
    etcd.put(KEYS.status(JOB), status(members=(Member(A1, 0, Rank(0), 2),)))
    etcd.put(KEYS.status(JobName("far")), status(members=(Member(AgentName("a2"), 0, Rank(0), 2),)))
    etcd.put(KEYS.spec(JobName("waits")), spec(JobName("waits")))
    etcd.put(KEYS.node(A1), node())
    etcd.world.take_touched()
    etcd.delete(KEYS.node(A1))
    assert etcd.world.take_touched() == [JOB, "waits"]


def test_a_running_job_that_may_grow_waits_for_machines_too() -> None:
    etcd = Etcd()
    member = (Member(A1, 0, Rank(0), 2),)
    for name, most in (("fixed", 1), ("grows", 2), ("scaled", 1)):
        etcd.put(KEYS.spec(JobName(name)), replace(spec(JobName(name)), nnodes_max=most))
        etcd.put(KEYS.status(JobName(name)), status(members=member))
    etcd.put(KEYS.intent(JobName("scaled")), Intent(Uid("u1"), nnodes_min=1, nnodes_max=3))
    etcd.world.take_touched()
    etcd.put(KEYS.node(AgentName("a9")), replace(node(), agent=AgentName("a9")))
    assert etcd.world.take_touched() == ["grows", "scaled"]


def test_events_of_a_job_are_numbers_and_touch_nothing() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    etcd.world.take_touched()
    for seq in (2, 10, 1):
        etcd.put(KEYS.event(JOB, seq), b"{}")
    assert etcd.world.take_touched() == []
    assert etcd.world.job_view(JOB).events == (1, 2, 10)


def test_bytes_on_their_way_touch_nothing_and_whatever_comes_with_them_does() -> None:
    # What is told by the text must be its end.
    assert fields(WorkerSnapshot)[-1].name == "transfers"
    etcd = Etcd()
    etcd.put(KEYS.status(JOB), status())
    key, told = KEYS.worker(A1, JOB), snapshot(step=3)
    etcd.put(key, replace(told, at=1.0))
    etcd.world.take_touched()
    for at, done in enumerate((0, 5, 9), 2):
        moved = Transfer(TransferKind.SAVE, Seq(1), Step(3), done, 9)
        etcd.put(key, replace(told, at=float(at), transfers=(moved,)))
        assert etcd.world.take_touched() == []
    etcd.put(key, replace(told, at=5.0))
    assert etcd.world.take_touched() == []
    etcd.put(key, replace(told, at=6.0))
    assert etcd.world.take_touched() == [JOB]
    etcd.put(key, replace(snapshot(step=4), at=7.0, transfers=(moved,)))
    assert etcd.world.take_touched() == [JOB]
    view = etcd.world.job_view(JOB)
    assert view.workers[A1].value.transfers == (moved,)


def test_pins_hold_until_the_last_reader_leaves() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    etcd.put(KEYS.pins(JOB, Seq(4)) + "r1", b"{}")
    etcd.put(KEYS.pins(JOB, Seq(4)) + "r2", b"{}")
    etcd.delete(KEYS.pins(JOB, Seq(4)) + "r1")
    assert etcd.world.job_view(JOB).pinned == {4}
    etcd.delete(KEYS.pins(JOB, Seq(4)) + "r2")
    assert etcd.world.job_view(JOB).pinned == frozenset()


@pytest.mark.parametrize("bad", [b"", b"[]", b'{"v":2}', b'{"v":1,"term":"x"}', b"\xff"])
def test_a_bad_record_is_a_sentence_about_its_job_never_a_crash(bad: bytes) -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    for key in (KEYS.status(JOB), KEYS.open(JOB, Seq(1)), KEYS.worker(A1, JOB), KEYS.latest(JOB)):
        etcd.put(key, bad)
        assert key in etcd.world.job_view(JOB).quarantined or etcd.world.quarantine(JOB)
        etcd.delete(key)
        assert etcd.world.quarantine(JOB) == ""
    etcd.put(KEYS.node(A1), bad)
    assert etcd.world.problems
    assert not etcd.fleet().agents


def test_a_name_that_no_job_can_have_is_left_alone() -> None:
    etcd = Etcd()
    etcd.put(KEYS.root + "jobs/..x/spec", b"{}")
    assert etcd.world.jobs() == []
    assert etcd.world.problems


def test_a_cordon_holds_even_if_it_cannot_be_read() -> None:
    etcd = Etcd()
    etcd.put(KEYS.cordon(A1), Cordon(A1, "disk"))
    etcd.put(KEYS.cordon(A1), b"garbage")
    assert etcd.fleet().cordoned == {A1}
    etcd.delete(KEYS.cordon(A1))
    assert etcd.fleet().cordoned == frozenset()


def test_a_machine_that_is_to_be_empty_counts_as_leaving_from_then_on() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    assert etcd.fleet().agents[A1].draining_at is None
    etcd.put(KEYS.cordon(A1), Cordon(A1, "disk", drain=True))
    view = etcd.fleet().agents[A1]
    assert view.draining_at is not None
    assert view.vacating == Cordon(A1, "disk", drain=True)
    etcd.put(KEYS.node(A1), node(life="i2"))
    assert etcd.fleet().agents[A1].draining_at == view.draining_at
    etcd.delete(KEYS.node(A1))
    assert etcd.fleet().left == frozenset()  # an agent that vanishes is lost: it was not about to end
    etcd.put(KEYS.node(A1), node(life="i3"))
    assert etcd.fleet().agents[A1].draining_at is not None
    etcd.delete(KEYS.cordon(A1))
    assert etcd.fleet().agents[A1].draining_at is None
    etcd.put(KEYS.cordon(A1), Cordon(A1, "disk"))
    assert etcd.fleet().agents[A1].draining_at is None


def test_suspicions_are_known_by_machine_and_a_bad_one_is_written_anew() -> None:
    etcd = Etcd()
    etcd.put(
        KEYS.suspicion(A1),
        Suspicion(Term(1), A1, (Blame(JOB, Uid("u1"), Attempt(1), FailureKind.SIGNAL, 1.0),)),
    )
    assert len(etcd.fleet().suspicions[A1].value.blames) == 1
    etcd.put(KEYS.suspicion(A1), b"garbage")
    found = etcd.fleet().suspicions[A1]
    assert found.value.blames == ()
    assert found.mod_revision > 0
    assert etcd.world.problems
    etcd.delete(KEYS.suspicion(A1))
    assert etcd.fleet().suspicions == {}


def test_verdicts_end_with_their_open_record_and_all_facts_with_the_submission() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    etcd.put(KEYS.open(JOB, Seq(1)), opened(1))
    etcd.world.record_verdict(JOB, Verdict(Seq(1), "aa", True))
    etcd.world.record_verdict(JOB, Verdict(Seq(2), "bb", True))
    assert set(etcd.world.job_view(JOB).verdicts) == {(1, "aa")}
    etcd.delete(KEYS.open(JOB, Seq(1)))
    assert not etcd.world.job_view(JOB).verdicts
    etcd.world.record_probe(JOB, "down", 3.0)
    etcd.world.record_swept(JOB, Uid("u1"), 4.0)
    etcd.put(KEYS.spec(JOB), spec(uid="u2"))
    view = etcd.world.job_view(JOB)
    assert (view.store_ok, view.store_problem, view.swept_at) == (None, "", None)


def test_the_step_rate_comes_from_progress_and_starts_over_with_an_attempt() -> None:
    etcd = Etcd()
    etcd.put(KEYS.status(JOB), status(1))
    for index in range(5):
        etcd.put(KEYS.worker(A1, JOB), snapshot(1, step=10 + 4 * index), now=float(2 * index))
        rate = etcd.world.job_view(JOB).step_rate
    assert rate == pytest.approx(2.0)
    etcd.put(KEYS.status(JOB), status(2))
    assert etcd.world.job_view(JOB).step_rate == 0.0


def test_a_job_without_records_is_forgotten() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    etcd.put(KEYS.event(JOB, 1), b"{}")
    etcd.delete(KEYS.spec(JOB))
    etcd.delete(KEYS.event(JOB, 1))
    assert etcd.world.jobs() == []
    assert etcd.world.job_view(JOB).spec is None


def test_the_agents_ttl_stretches_with_the_fleet() -> None:
    etcd = Etcd()
    assert etcd.world.agent_ttl_s == 10.0
    for index in range(3500):
        name = AgentName(f"a{index}")
        etcd.put(KEYS.node(name), node(name))
    assert etcd.world.agent_ttl_s == pytest.approx(15.0)


def test_numbers_that_only_the_store_knows_are_remembered_until_the_name_is_used_again() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    etcd.world.record_unknown(JOB, None)
    assert etcd.world.job_view(JOB).unknown is None
    etcd.world.record_unknown(JOB, (Seq(7), Seq(9)))
    etcd.world.record_unknown(JOB, (Seq(6), Seq(8)))
    assert etcd.world.job_view(JOB).unknown == (6, 9)
    assert JOB in etcd.world.take_touched()
    etcd.put(KEYS.spec(JOB), spec(uid="u2"))
    assert etcd.world.job_view(JOB).unknown is None


def test_a_request_that_cannot_be_read_is_no_reason_to_leave_the_job_alone() -> None:
    etcd = Etcd()
    order = Order(Uid("u1"), OrderKind.COLLECT)
    etcd.put(KEYS.order(JOB, "good"), order)
    etcd.put(KEYS.order(JOB, "newer"), b'{"v":1,"uid":"u1","kind":"novel"}', now=3.0)
    view = etcd.world.job_view(JOB)
    assert {name: stored.value for name, stored in view.orders.items()} == {"good": order}
    assert not view.quarantined
    assert "novel" in etcd.world.problems[0]
    etcd.delete(KEYS.order(JOB, "good"))
    assert not etcd.world.job_view(JOB).orders


def test_what_was_found_about_a_checkpoint_goes_with_it() -> None:
    etcd = Etcd()
    record = CommitRecord(Term(1), Uid("u1"), Seq(1), Step(1), Attempt(1), "n", 1, 1, "m", 1, "d")
    work = InspectCheckpoint(JOB, "s3://b", Seq(1), "m", "d", "all")
    etcd.world.record_inspection(JOB, work, Inspection(1.0))
    assert not etcd.world.job_view(JOB).inspections
    etcd.put(KEYS.checkpoint(JOB, Seq(1)), record)
    etcd.put(KEYS.verified(JOB, Seq(1)), Verification(Term(1), Seq(1), "x"), now=1.0)
    etcd.put(KEYS.verified(JOB, Seq(1)), Verification(Term(1), Seq(1), "y"), now=9.0)
    etcd.world.record_inspection(JOB, work, Inspection(1.0))
    view = etcd.world.job_view(JOB)
    assert view.inspections == {(1, "all", "", 0): Inspection(1.0)}
    assert (view.verified[Seq(1)].value.at, view.verified[Seq(1)].seen_at) == ("y", 9.0)
    etcd.delete(KEYS.checkpoint(JOB, Seq(1)))
    assert not etcd.world.job_view(JOB).inspections


# The queue.


def named(name: str, **fields: Any) -> JobSpec:
    return replace(spec(JobName(name), f"u-{name}"), **fields)


def line(etcd: Etcd, now: float = 0.0, job: str = "job") -> Queue:
    return etcd.fleet(now, JobName(job)).queue


def wait(etcd: Etcd, name: str, *, now: float = 0.0, **fields: Any) -> None:
    """A job is submitted; it has no store, so nothing but machines is missing."""
    found = named(name, **{"submitted_at": f"2026-01-01T00:00:{now:06.3f}Z", **fields})
    etcd.put(KEYS.spec(found.name), found, now)
    etcd.put(KEYS.intent(found.name), Intent(found.uid), now)


def place(etcd: Etcd, name: str, phase: JobPhase, *agents: AgentName, nproc: int = 4, **fields: Any) -> None:
    members = tuple(Member(agent, n, Rank(n * nproc), nproc) for n, agent in enumerate(agents))
    found = JobStatus(Term(1), Uid(f"u-{name}"), phase, attempt=Attempt(1), members=members, **fields)
    etcd.put(KEYS.status(JobName(name)), found, 1.0)


def test_jobs_that_wait_stand_in_the_queue_until_they_have_machines() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    wait(etcd, "one", nproc_per_node=4)
    wait(etcd, "two", now=1.0, nproc_per_node=4)
    queue = line(etcd)
    assert list(queue.waiting) == ["one", "two"]
    assert queue.claims == {"one": {A1: 4}}
    place(etcd, "one", JobPhase.STARTING, A1)
    queue = line(etcd)
    assert list(queue.waiting) == ["two"]
    assert not queue.places[JobName("two")].fits
    assert "two" in etcd.world.take_touched()
    place(etcd, "one", JobPhase.SUCCEEDED)
    assert line(etcd).places[JobName("two")].fits


def test_slots_that_are_about_to_be_taken_are_not_claimed_again() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    wait(etcd, "one", nproc_per_node=2)
    wait(etcd, "two", now=1.0, nproc_per_node=2)
    members = (Member(A1, 0, Rank(0), 2),)
    etcd.world.reserve(
        JobName("one"),
        JobStatus(Term(1), Uid("u-one"), JobPhase.STARTING, attempt=Attempt(1), members=members),
    )
    queue = line(etcd)
    assert (list(queue.waiting), queue.claims) == (["two"], {"two": {A1: 2}})


def test_who_has_to_make_room_is_looked_at() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    wait(etcd, "small", nproc_per_node=4)
    place(etcd, "small", JobPhase.RUNNING, A1)
    line(etcd)
    etcd.world.take_touched()
    wait(etcd, "big", now=2.0, nproc_per_node=4, priority=10)
    assert line(etcd, 2.0, "big").victims == {"small": "big"}
    assert "small" in etcd.world.take_touched()
    place(etcd, "small", JobPhase.SUSPENDING, A1, preempted_by="big")
    assert line(etcd, 3.0, "big").victims == {}
    assert line(etcd, 3.0, "big").why(JobName("big")) == "waits until small has made room"
    place(etcd, "small", JobPhase.QUEUED, preempted_by="big", since="2026-01-01T00:00:04.000Z")
    queue = line(etcd, 4.0, "big")
    assert queue.claims == {"big": {A1: 4}}
    assert list(queue.waiting) == ["big", "small"]


def test_who_does_not_wait_for_machines_alone_is_not_waited_for() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    wait(etcd, "asleep")
    etcd.put(KEYS.intent(JobName("asleep")), Intent(Uid("u-asleep"), Wanted.SUSPEND))
    wait(etcd, "importing", checkpoint=CheckpointPolicy(await_import=True))
    wait(etcd, "stored", checkpoint=CheckpointPolicy("s3://b"), priority=9)
    assert list(line(etcd).waiting) == ["stored"]
    assert not line(etcd).waiting[JobName("stored")].ready
    etcd.world.record_probe(JobName("stored"), "", 1.0)
    assert line(etcd).waiting[JobName("stored")].ready
    etcd.world.record_probe(JobName("stored"), "access denied", 2.0)
    assert line(etcd).waiting == {}


def test_only_machines_that_may_be_used_count() -> None:
    etcd = Etcd()
    names = [AgentName(f"a{n}") for n in range(1, 5)]
    for name in names:
        etcd.put(KEYS.node(name), node(name))
    etcd.put(KEYS.node(names[0]), replace(node(names[0]), draining=Draining("SIGTERM", grace_s=9.0)))
    etcd.put(KEYS.cordon(names[1]), Cordon(names[1], "bad memory"))
    etcd.world.record_reached(names[2], False, 0.0)
    wait(etcd, "one", nnodes_max=4)
    queue = line(etcd)
    assert queue.claims == {"one": {names[3]: 1}}
    # One that did not answer is tried again after a while.
    assert queue.changes_at == 15.0
    assert line(etcd, 15.0).claims == {"one": {names[2]: 1, names[3]: 1}}


def test_a_change_of_the_queue_by_time_alone_is_seen() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    wait(etcd, "busy", nproc_per_node=2)
    place(etcd, "busy", JobPhase.RUNNING, A1, nproc=2)
    wait(etcd, "wide", now=1.0, nproc_per_node=4)
    assert line(etcd, 2.0).claims == {}
    changes_at = line(etcd, 2.0).changes_at
    assert changes_at is not None
    assert line(etcd, changes_at).claims == {"wide": {A1: 4}}


def test_who_may_grow_is_looked_at_when_nobody_claims_the_machine_any_more() -> None:
    etcd = Etcd()
    etcd.put(KEYS.node(A1), node())
    etcd.put(KEYS.node(AgentName("a2")), node(AgentName("a2")))
    wait(etcd, "grows", nproc_per_node=4, nnodes_max=2)
    place(etcd, "grows", JobPhase.RUNNING, A1)
    wait(etcd, "other", now=1.0, nproc_per_node=4)
    assert line(etcd, 2.0, "grows").claimed() == {"a2": 4}
    etcd.world.take_touched()
    etcd.put(KEYS.intent(JobName("other")), Intent(Uid("u-other"), Wanted.CANCEL), 3.0)
    assert etcd.world.take_touched() == ["other"]
    assert line(etcd, 3.0, "other").claimed() == {}
    assert etcd.world.take_touched() == ["grows"]


def test_jobs_are_looked_at_again_when_the_last_old_coordinator_has_gone() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    old = ReplicaId("c9")
    etcd.put(KEYS.coordinator(old), ReplicaRecord(old, "c9:1", version="0.1.0"))
    assert etcd.fleet().withheld == "coordinator c9 runs dtrain 0.1.0"
    etcd.world.take_touched()
    etcd.put(KEYS.coordinator(old), ReplicaRecord(old, "c9:1", version="0.2.0"))
    assert etcd.fleet().withheld == ""
    assert JOB in etcd.world.take_touched()
