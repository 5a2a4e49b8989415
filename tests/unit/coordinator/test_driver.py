"""The loop: order, fencing, conflicts, pacing. One thread, a model etcd, a stub plan."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from dtrain.coordinator.core.decisions import (
    Decision,
    DeleteRecord,
    Directed,
    ProbeStore,
    PutRecord,
    Reason,
    SweepOrphans,
    VerifyCheckpoint,
    Work,
)
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.views import FleetView, JobView, Moment, Verdict
from dtrain.coordinator.driver import CRASHES_MAX, QUARANTINE_S, RESYNC_S, Driver
from dtrain.coordinator.persistence import Committer, Conflict, NotWritten, Outcome, Unknown
from dtrain.coordinator.results import Probed, Swept, Verified
from dtrain.coordinator.world import World
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import OpenRecord
from dtrain.protocol.commands import Header, Prepare, Start, Stop
from dtrain.protocol.errors import ErrorCode, OutcomeUnknown
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
from dtrain.protocol.job import Entry, EntryKind, Intent, JobPhase, JobSpec, JobStatus, Member, Wanted
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import CommandOutcome, NodeRecord, WorkerPhase, WorkerSnapshot
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import MirrorState
from dtrain.storage.etcd.port import Compare, Delete, Put, Target, Txn, TxnResult, prefix_end

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
JOB = JobName("job")
AGENT = AgentName("a1")


class RecordingEtcd(MemoryEtcd):
    """Remembers every transaction, and can lose an answer after applying it, or before."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now)
        self.seen: list[Txn] = []
        self.lose: list[str] = []

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        self.seen.append(txn)
        how = self.lose.pop(0) if self.lose and txn.compares else ""
        if how == "before":
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "lost")
        result = super().txn(txn, deadline_s=deadline_s)
        if how == "after":
            raise OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "lost")
        return result


@dataclass
class Harness:
    """A driver with its mirror and its ports, moved by hand."""

    plan: Callable[[JobView, FleetView, Moment], Decision]
    now: float = 100.0
    acting: bool = True
    sent: list[tuple[float, Directed]] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    lines: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    commits: list[tuple[JobName, Term, Decision]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.etcd = RecordingEtcd(lambda: self.now)
        self.state = MirrorState()
        self.watch = self.etcd.watch(KEYS.root, prefix_end(KEYS.root), 1)
        self.world = World(CLUSTER, ReplicaId("r1"))
        self.driver = Driver(self.world, self.plan, self)
        self.committer = Committer(self.etcd, CLUSTER, may_act=lambda: self.acting)

    # Ports.

    def commit(self, job: JobName, term: Term, decision: Decision) -> None:
        self.commits.append((job, term, decision))

    def send(self, directed: Directed) -> None:
        self.sent.append((self.now, directed))

    def start_work(self, job: JobName, work: Work) -> None:
        self.works.append(work)

    def log(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def moment(self, now: float) -> Moment:
        return Moment(now, 1_700_000_000.0 + now, f"{len(self.commits):016x}")

    # Moves.

    def put(self, key: str, value: Any) -> int:
        return self.etcd.txn(Txn(success=(Put(key, codec.encode(value)),))).revision

    def take_office(self, by: str = "r1") -> Term:
        # Deleted first: a term is the create revision.
        self.etcd.txn(Txn(success=(Delete(KEYS.leader),)))
        term = Term(self.etcd.txn(Txn(success=(Put(KEYS.leader, by.encode()),))).revision)
        self.etcd.seen.clear()
        return term

    def sync(self) -> None:
        """Let the mirror catch up."""
        while (batch := self.watch.poll()) is not None:
            changes = self.state.apply(batch)
            self.driver.on_changes(changes, self.state.revision, self.now)

    def settle(self) -> None:
        """Perform commits, in order, and let the mirror see them, until nothing is left."""
        for _ in range(50):
            self.sync()
            if not self.commits:
                return
            self.perform()
        raise AssertionError("the driver does not come to rest")

    def perform(self) -> Outcome:
        job, term, decision = self.commits.pop(0)
        outcome = self.committer.commit(term, decision)
        self.outcomes.append(outcome)
        self.driver.on_txn(job, outcome, self.now)
        return outcome

    def pass_time(self, seconds: float) -> None:
        """Tick whenever the driver asks for it."""
        end = self.now + seconds
        for _ in range(1000):
            wake_at = self.driver.wake_at
            if wake_at is None or wake_at > end:
                break
            self.now = max(self.now, wake_at)
            self.driver.on_heard(self.now, self.now)
            self.driver.on_tick(self.now)
        else:
            raise AssertionError("the driver spins")
        self.now = end

    def status(self) -> JobStatus | None:
        items = self.etcd.range(KEYS.status(JOB)).items
        return codec.decode(JobStatus, items[0].value) if items else None

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.lines if name == event]


def spec(name: str = JOB, uid: str = "u1") -> JobSpec:
    return JobSpec(JobName(name), Uid(uid), Entry(EntryKind.SCRIPT, "train.py"))


def status(term: int, phase: JobPhase = JobPhase.QUEUED, **fields: Any) -> JobStatus:
    return JobStatus(Term(term), Uid("u1"), phase, **fields)


def stop(term: int = 0, ident: str = "s1") -> Directed:
    head = Header(CLUSTER, Term(term), JOB, Uid("u1"), Attempt(1), ident)
    return Directed(AGENT, "127.0.0.1:1", Stop(head, 1.0, False, "test"))


def queue_once(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
    """Write QUEUED, then nothing."""
    if job.status is not None or job.spec is None:
        return Decision(reasons=(Reason("nothing to do"),))
    value = status(fleet.term, reason=moment.nonce)
    return Decision(writes=(PutRecord(KEYS.status(JOB), value, 0),), commands=(stop(fleet.term),))


def test_nothing_is_decided_before_the_mirror_has_reached_the_term() -> None:
    harness = Harness(queue_once)
    harness.put(KEYS.spec(JOB), spec())
    harness.sync()
    term = harness.take_office()
    harness.driver.on_term(term, harness.now)
    assert not harness.commits
    assert not harness.driver.leads
    harness.sync()
    assert harness.driver.leads
    assert [job for job, _, _ in harness.commits] == [JOB]


def test_a_standby_decides_nothing() -> None:
    harness = Harness(queue_once)
    harness.put(KEYS.spec(JOB), spec())
    harness.sync()
    harness.driver.on_tick(harness.now + RESYNC_S)
    assert not harness.commits
    assert harness.driver.wake_at is None


def test_commands_leave_only_after_their_decision_is_durable() -> None:
    harness = led(queue_once)
    assert not harness.sent
    harness.perform()
    assert [directed for _, directed in harness.sent] == [stop(harness.driver.term or 0)]


def test_commands_of_a_refused_decision_are_dropped() -> None:
    harness = led(queue_once)
    harness.put(KEYS.status(JOB), status(1))
    assert isinstance(harness.perform(), Conflict)
    harness.settle()
    assert not harness.sent


def test_a_job_is_not_looked_at_again_while_its_commit_is_in_flight_or_unseen() -> None:
    looks: list[int] = []

    def counting(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        looks.append(0 if job.status is None else job.status.mod_revision)
        return queue_once(job, fleet, moment)

    harness = led(counting)
    assert len(looks) == 1
    harness.put(KEYS.intent(JOB), spec())
    harness.sync()
    assert len(looks) == 1
    harness.perform()
    assert len(looks) == 1, "its own write was not seen yet"
    harness.sync()
    assert len(looks) == 2
    assert looks[-1] > 0


def test_a_conflict_is_decided_anew_from_what_is_there() -> None:
    def raising(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        if job.spec is None or (job.status is not None and job.status.value.step >= 7):
            return Decision()
        before = job.status.mod_revision if job.status is not None else 0
        return Decision(writes=(PutRecord(KEYS.status(JOB), status(fleet.term, step=7), before),))

    harness = led(raising)
    harness.put(KEYS.status(JOB), status(1, step=3))
    harness.settle()
    assert [type(outcome).__name__ for outcome in harness.outcomes] == ["Conflict", "Committed"]
    assert harness.status() == status(harness.driver.term or 0, step=7)


@pytest.mark.parametrize("lost", ["before", "after"])
def test_an_unknown_outcome_is_read_back_and_happens_once(lost: str) -> None:
    harness = led(queue_once)
    harness.etcd.lose = [lost]
    harness.settle()
    items = harness.etcd.range(KEYS.status(JOB)).items
    assert [kv.version for kv in items] == [1]
    first = "Unknown" if lost == "before" else "Committed"
    assert type(harness.outcomes[0]).__name__ == first
    assert len(harness.sent) == 1


def test_a_stale_leader_cannot_commit_and_stands_down() -> None:
    harness = led(queue_once)
    harness.take_office(by="other")
    harness.perform()
    assert harness.status() is None
    assert not harness.driver.leads
    assert not harness.sent


def test_every_transaction_of_a_leader_carries_its_fence() -> None:
    harness = led(queue_once)
    term = harness.driver.term
    harness.settle()
    writing = [txn for txn in harness.etcd.seen if any(isinstance(op, Put | Delete) for op in txn.success)]
    assert writing
    for txn in writing:
        assert Compare(KEYS.leader, Target.CREATE, term or 0) in txn.compares


def test_a_command_is_repeated_each_retry_and_sooner_after_a_failure() -> None:
    def insisting(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        return Decision(commands=(stop(fleet.term),)) if job.spec is not None else Decision()

    harness = led(insisting)
    began = harness.now
    harness.pass_time(3.5)
    assert [at - began for at, _ in harness.sent] == pytest.approx([0, 1, 2, 3])
    harness.sent.clear()
    harness.pass_time(0.5)
    assert [at - began for at, _ in harness.sent] == pytest.approx([4])
    harness.driver.on_command(stop(harness.driver.term or 0), False, "refused", harness.now)
    failed_at = harness.now
    assert harness.world.fleet_view(JOB, failed_at, term=Term(1), took_office_at=0).unreachable == {
        AGENT: failed_at
    }
    harness.sent.clear()
    harness.pass_time(0.3)
    assert [at - failed_at for at, _ in harness.sent] == pytest.approx([0.25])


def test_a_new_command_does_not_wait_for_the_old_ones_retry() -> None:
    wanted = ["s1"]

    def asking(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        return Decision(commands=(stop(fleet.term, wanted[0]),)) if job.spec is not None else Decision()

    harness = led(asking)
    wanted[0] = "s2"
    harness.put(KEYS.intent(JOB), spec())
    harness.sync()
    assert [directed.command.header.id for _, directed in harness.sent] == ["s1", "s2"]


def test_the_same_work_runs_once_at_a_time_and_not_again_at_once() -> None:
    probe = ProbeStore(JOB, "file:///s")

    def probing(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        return Decision(work=(probe,)) if job.spec is not None and not job.store_ok else Decision()

    harness = led(probing)
    harness.put(KEYS.intent(JOB), spec())
    harness.sync()
    assert harness.works == [probe]
    harness.driver.on_work(JOB, Probed(probe, "it is down"), harness.now)
    assert harness.works == [probe]
    view = harness.world.job_view(JOB)
    assert (view.store_ok, view.store_problem) == (False, "it is down")
    harness.pass_time(1.1)
    assert harness.works == [probe, probe]
    harness.driver.on_work(JOB, Probed(probe), harness.now)
    harness.pass_time(5)
    assert harness.works == [probe, probe]


def test_no_sweep_begins_while_a_manifest_may_still_be_written() -> None:
    record = OpenRecord(Term(1), Uid("u1"), Seq(7), Attempt(1), Step(9), "aa", 1, 60.0)
    verify = VerifyCheckpoint(CLUSTER, JOB, Uid("u1"), "file:///s", record, (), None)
    sweep = SweepOrphans(CLUSTER, JOB, Uid("u1"), "file:///s")
    wanted: list[Work] = [verify]

    def working(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        return Decision(work=tuple(wanted)) if job.spec is not None else Decision()

    harness = led(working)
    harness.put(KEYS.intent(JOB), spec())
    harness.sync()
    wanted[:] = [sweep]
    harness.pass_time(RESYNC_S + 1)
    assert harness.works == [verify]
    harness.driver.on_work(JOB, Verified(verify, Verdict(Seq(7), "aa", ok=False)), harness.now)
    assert harness.works == [verify, sweep]


def test_a_sweep_counts_from_when_it_began() -> None:
    sweep = SweepOrphans(CLUSTER, JOB, Uid("u1"), "file:///s")
    harness = led(lambda job, fleet, moment: Decision(work=(sweep,) if job.spec is not None else ()))
    harness.put(KEYS.intent(JOB), spec())
    harness.sync()
    began = harness.now
    harness.pass_time(30)
    harness.driver.on_work(JOB, Swept(sweep), harness.now)
    assert harness.world.job_view(JOB).swept_at == began


def test_a_job_that_crashes_its_plan_is_quarantined_and_the_others_go_on() -> None:
    crashes: list[float] = []

    def poisoned(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        if job.name == "bad":
            crashes.append(moment.now)
            raise ZeroDivisionError("poison")
        return queue_once(job, fleet, moment)

    harness = led(poisoned, "bad", JOB)
    harness.settle()
    assert harness.status() is not None
    began = harness.now
    harness.pass_time(10)
    assert len(crashes) == CRASHES_MAX
    assert harness.logged("plan failed")[-1]["quarantined"]
    harness.pass_time(QUARANTINE_S)
    assert len(crashes) == CRASHES_MAX + 1
    assert crashes[-1] - began > QUARANTINE_S


def test_a_record_that_cannot_be_read_quarantines_its_job_alone() -> None:
    harness = led(queue_once, "bad", JOB)
    harness.etcd.txn(Txn(success=(Put(KEYS.status(JobName("bad")), b"{not json"),)))
    harness.settle()
    assert harness.status() is not None
    assert harness.world.quarantine(JobName("bad")).startswith(KEYS.status(JobName("bad")))
    harness.put(KEYS.status(JobName("bad")), status(1))
    harness.sync()
    assert harness.world.quarantine(JobName("bad")) == ""


def test_what_etcd_refuses_is_not_tried_in_a_circle() -> None:
    harness = led(queue_once)
    for _ in range(CRASHES_MAX):
        job, _, _ = harness.commits.pop()
        harness.driver.on_txn(job, NotWritten("too large", retry=False), harness.now)
        harness.pass_time(2)
    assert not harness.commits
    assert harness.logged("plan failed")[-1]["quarantined"]


def test_conflicts_that_do_not_end_are_paced() -> None:
    harness = led(queue_once)
    times = []
    end = harness.now + 10
    while harness.now < end and len(times) < 200:
        if harness.commits:
            job, _, _ = harness.commits.pop()
            times.append(harness.now)
            harness.driver.on_txn(job, Unknown(1), harness.now)
        else:
            harness.pass_time(0.05)
    assert 5 < len(times) < 20


def test_two_jobs_decided_in_one_moment_do_not_take_the_same_slots() -> None:
    seen: dict[str, dict[AgentName, int]] = {}

    def placing(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        if job.spec is None or job.status is not None:
            return Decision()
        seen[job.name] = dict(fleet.used)
        members = (Member(AGENT, 0, Rank(0), 4),)
        value = status(fleet.term, JobPhase.STARTING, members=members, attempt=Attempt(1))
        return Decision(writes=(PutRecord(KEYS.status(job.name), value, 0),))

    harness = led(placing, "j1", "j2")
    assert seen == {"j1": {}, "j2": {AGENT: 4}}
    # A refused decision gives its slots back.
    harness.driver.on_txn(JobName("j1"), Conflict(1), harness.now)
    assert seen["j1"] == {AGENT: 4}


def test_every_job_is_looked_at_now_and_then() -> None:
    looks: list[float] = []

    def looking(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        looks.append(moment.now)
        return Decision()

    harness = led(looking)
    looks.clear()
    harness.pass_time(2 * RESYNC_S + 1)
    assert len(looks) == 2


def test_a_deadline_asked_for_wakes_the_job_then() -> None:
    looks: list[float] = []

    def waiting(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        looks.append(moment.now)
        return Decision(wake_at=100 + 12.5)

    harness = led(waiting)
    harness.pass_time(12)
    assert len(looks) == 1
    harness.pass_time(1)
    assert looks[1] == pytest.approx(112.5)


def test_a_silent_mirror_puts_the_brake_on_and_off_again() -> None:
    brakes: list[str] = []

    def watching(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        brakes.append(fleet.brake)
        return Decision()

    harness = led(watching)
    assert brakes[-1] == ""
    harness.now += 16
    harness.driver.on_tick(harness.now)
    assert "etcd has not been heard of" in brakes[-1]
    harness.driver.on_heard(harness.now, harness.now)
    assert brakes[-1] == ""


def test_a_deleted_record_is_guarded_only_where_the_decision_asks() -> None:
    def deleting(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
        if not job.events:
            return Decision()
        return Decision(writes=(DeleteRecord(KEYS.event(JOB, 1), None),))

    harness = led(deleting)
    harness.put(KEYS.event(JOB, 1), status(1))
    harness.put(KEYS.intent(JOB), spec())
    harness.settle()
    assert not harness.etcd.range(KEYS.event(JOB, 1)).items


def test_after_the_term_is_lost_late_answers_change_nothing() -> None:
    harness = led(queue_once)
    harness.driver.on_term_lost()
    job, _, _ = harness.commits.pop()
    harness.driver.on_txn(job, Conflict(1), harness.now)
    harness.driver.on_tick(harness.now + RESYNC_S)
    assert not harness.commits
    assert not harness.sent


def led(decide: Callable[[JobView, FleetView, Moment], Decision], *jobs: str) -> Harness:
    """Return a harness whose driver has just taken office over ``jobs``."""
    harness = Harness(decide)
    for name in jobs or (JOB,):
        harness.put(KEYS.spec(JobName(name)), replace(spec(name)))
    term = harness.take_office()
    harness.driver.on_term(term, harness.now)
    harness.sync()
    return harness


def test_the_real_plan_starts_a_job_and_a_successor_goes_on_where_it_stopped() -> None:
    harness = Harness(plan)
    harness.put(KEYS.spec(JOB), spec())
    harness.put(KEYS.intent(JOB), Intent(Uid("u1")))
    harness.put(KEYS.node(AGENT), NodeRecord(AGENT, Incarnation("i1"), "127.0.0.1:1", "127.0.0.1", 2))
    harness.driver.on_term(harness.take_office(), harness.now)
    harness.settle()
    first = harness.status()
    assert first is not None
    assert (first.phase, first.attempt) == (JobPhase.STARTING, 1)
    (prepare,) = [directed.command for _, directed in harness.sent]
    assert isinstance(prepare, Prepare)
    assert prepare.header.attempt == 1

    # Another replica with the same records: it takes the attempt over, and starts no other.
    successor = Harness(plan, now=harness.now)
    successor.etcd = harness.etcd
    successor.committer = Committer(harness.etcd, CLUSTER, may_act=lambda: True)
    successor.watch = harness.etcd.watch(KEYS.root, prefix_end(KEYS.root), 1)
    successor.sync()
    term = successor.take_office("r2")
    successor.driver.on_term(term, successor.now)
    ready = WorkerSnapshot(
        AGENT,
        Uid("u1"),
        Incarnation("i1"),
        Attempt(1),
        WorkerPhase.READY,
        command=CommandOutcome(prepare.header.id, "prepare", True),
        rendezvous="127.0.0.1:2",
    )
    successor.put(KEYS.worker(AGENT, JOB), ready)
    successor.settle()
    then = successor.status()
    assert then is not None
    assert (then.attempt, then.term) == (1, term)
    assert any(isinstance(directed.command, Start) for _, directed in successor.sent)
    assert {directed.command.header.term for _, directed in successor.sent} == {term}

    # The deposed one still believes: whatever it decides now is refused.
    harness.put(KEYS.intent(JOB), Intent(Uid("u1"), Wanted.CANCEL))
    harness.etcd.seen.clear()
    while (batch := harness.watch.poll()) is not None:
        kept = [event for event in batch.events if event.kv.key == KEYS.intent(JOB)]
        changes = harness.state.apply(replace(batch, events=tuple(kept)))
        harness.driver.on_changes(changes, harness.state.revision, harness.now)
    assert harness.commits, "it decides from what it knows"
    harness.perform()
    assert harness.status() == then
    assert not harness.driver.leads
