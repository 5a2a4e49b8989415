"""Series of jobs, from a real mirror of the model of etcd."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.support.builders import EPOCH, make_rank, make_spec

from dtrain.coordinator import job_series, metrics
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.job_series import COUNT_AGAIN_S, JobSeries
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Latest
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import JobPhase, JobStatus, Member, Tally
from dtrain.protocol.keys import Keys
from dtrain.protocol.ledger import PRODUCTIVE, QUEUED, Ledger
from dtrain.protocol.snapshot import Timing, WorkerPhase, WorkerSnapshot
from dtrain.runtime.metrics import Metric
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Delete, Put, Txn

KEYS = Keys(ClusterName("default"))
UID = Uid("u1")
MEMBERS = (Member(AgentName("a"), 0, Rank(0), 1), Member(AgentName("b"), 1, Rank(1), 1))


def status(phase: JobPhase = JobPhase.RUNNING, **more: Any) -> JobStatus:
    values: dict[str, Any] = {"attempt": Attempt(1), "members": MEMBERS, "since": iso(EPOCH)}
    return JobStatus(Term(5), UID, phase, **{**values, **more})


def snapshot(
    agent: str, rank: int, *, step: int, timing: Timing | None = None, attempt: int = 1
) -> WorkerSnapshot:
    state = replace(make_rank(rank, step=step), timing=timing)
    return WorkerSnapshot(
        AgentName(agent), UID, Incarnation("i"), Attempt(attempt), WorkerPhase.TRAINING, (state,)
    )


class Shown:
    """What a replica shows, with a clock of its own."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd(time.monotonic)
        self.mirror = Mirror(self.etcd, KEYS.root)
        self.now = 1000.0
        self.series = self.another()

    def another(self) -> JobSeries:
        """Another replica's series of the same records."""
        return JobSeries(
            KEYS, self.mirror, lost=lambda: 0, monotonic=lambda: self.now, wall=lambda: EPOCH + self.now
        )

    def put(self, **records: Any) -> None:
        """Put records of the job ``job`` by their kind; agents' snapshots by ``worker_<agent>``."""
        job = JobName("job")
        for kind, value in records.items():
            key = (
                KEYS.worker(AgentName(kind.removeprefix("worker_")), job)
                if kind.startswith("worker_")
                else {
                    "spec": KEYS.spec(job),
                    "status": KEYS.status(job),
                    "latest": KEYS.latest(job),
                    "commit": KEYS.checkpoint(job, Seq(3)),
                }[kind]
            )
            self.reach(self.etcd.txn(Txn((), (Put(key, codec.encode(value)),))).revision)

    def reach(self, revision: int) -> None:
        assert self.mirror.wait_for(revision, 20.0)

    def of(
        self, metric: Metric, *, leads: bool = True, series: JobSeries | None = None
    ) -> dict[tuple[str, ...], Any]:
        self.now += COUNT_AGAIN_S
        return dict((series or self.series).samples(leads=leads).get(metric, {}))


@pytest.fixture
def shown() -> Iterator[Shown]:
    made = Shown()
    made.mirror.start()
    made.reach(1)
    yield made
    made.mirror.close()


def test_only_a_leader_shows_single_jobs(shown: Shown) -> None:
    shown.put(status=status(tally=Tally({"first": 1, "signal": 2}, 4, 4096, {"late": 1})))
    assert shown.of(metrics.ATTEMPTS) == {("job", "first"): 1.0, ("job", "signal"): 2.0}
    assert shown.of(metrics.COMMITS) == {("job",): 4.0}
    assert shown.of(metrics.COMMITTED_BYTES) == {("job",): 4096.0}
    assert shown.of(metrics.CHECKPOINT_FAILURES) == {("job", "late"): 1.0}
    found = shown.series.samples(leads=False)
    assert set(found) == {metrics.JOBS, metrics.AGENTS}
    assert found[metrics.JOBS]["RUNNING",] == 1.0


def test_a_step_is_what_every_rank_has_completed_in_this_attempt(shown: Shown) -> None:
    shown.put(
        status=status(step=Step(40)),
        worker_a=snapshot("a", 0, step=52),
        worker_b=snapshot("b", 1, step=51),
    )
    assert shown.of(metrics.STEP) == {("job",): 51.0}
    shown.put(worker_b=snapshot("b", 1, step=900, attempt=0))
    assert shown.of(metrics.STEP) == {("job",): 52.0}
    shown.put(status=status(JobPhase.SUCCEEDED, step=Step(60)))
    assert shown.of(metrics.STEP) == {("job",): 60.0}


def test_progress_is_when_the_step_last_moved_while_it_should(shown: Shown) -> None:
    shown.put(status=status(), worker_a=snapshot("a", 0, step=1), worker_b=snapshot("b", 1, step=1))
    first = shown.of(metrics.PROGRESS_AT)["job",]
    assert shown.of(metrics.PROGRESS_AT)["job",] == first
    shown.put(worker_a=snapshot("a", 0, step=2), worker_b=snapshot("b", 1, step=2))
    assert shown.of(metrics.PROGRESS_AT)["job",] > first
    shown.put(status=status(held=Seq(3)))
    assert not shown.of(metrics.PROGRESS_AT)
    shown.put(status=status(JobPhase.SUSPENDED, members=()))
    assert not shown.of(metrics.PROGRESS_AT)


def test_a_commit_and_when_the_next_one_is_due(shown: Shown) -> None:
    commit = CommitRecord(
        Term(5), UID, Seq(3), Step(30), Attempt(1), "n", 2, 64, "m", 1, "d", committed_at=iso(EPOCH + 7)
    )
    timing = Timing(2.0, 0.0, 1.0)
    shown.put(
        spec=make_spec(store="s3://b", every_steps=10),
        status=status(),
        latest=Latest(Term(5), Seq(3), Step(30)),
        commit=commit,
        worker_a=snapshot("a", 0, step=31, timing=timing),
    )
    assert shown.of(metrics.COMMITTED_STEP) == {("job",): 30.0}
    assert shown.of(metrics.COMMITTED_AT)["job",] == pytest.approx(EPOCH + 7)
    assert shown.of(metrics.INTERVAL) == {("job",): 20.0}
    # A name used again: that checkpoint is not of this submission.
    shown.put(status=replace(status(), uid=Uid("u2")))
    assert not shown.of(metrics.COMMITTED_STEP)


def test_a_straggler_is_shown_by_its_machine_while_it_is_named(shown: Shown) -> None:
    shown.put(
        status=status(stragglers=(Rank(1),)),
        worker_a=snapshot("a", 0, step=1, timing=Timing(3.0, 0.0, 1.0)),
        worker_b=snapshot("b", 1, step=1, timing=Timing(3.0, 0.0, 3.0)),
    )
    assert shown.of(metrics.STRAGGLER) == {("job", "b"): 3.0}
    shown.put(status=status())
    assert not shown.of(metrics.STRAGGLER)


def test_time_spent_does_not_fall_when_a_checkpoint_is_given_up(shown: Shown) -> None:
    def ledger(saved_ms: int) -> Ledger:
        spent = {QUEUED: 1000, PRODUCTIVE: 9000}
        return Ledger(0, 10_000, PRODUCTIVE, spent, saved_ms)

    shown.put(status=status(ledger=ledger(8000)))
    assert shown.of(metrics.TIME)["job", "productive"] == 8.0
    shown.put(status=status(ledger=ledger(5000)))
    assert shown.of(metrics.TIME)["job", "productive"] == 8.0
    assert shown.of(metrics.TIME)["job", "idle.queued"] == 1.0
    assert 0.0 < shown.of(metrics.GOODPUT)["job",] <= 1.0


def test_a_new_leader_shows_the_counts_of_the_former_one(shown: Shown) -> None:
    shown.put(status=status(tally=Tally({"first": 1}, 4)))
    before = shown.of(metrics.COMMITS)
    assert shown.of(metrics.COMMITS, series=shown.another()) == before == {("job",): 4.0}


def test_series_end_with_the_record(shown: Shown) -> None:
    shown.put(status=status(tally=Tally({"first": 1})), worker_a=snapshot("a", 0, step=1))
    assert shown.of(metrics.ATTEMPTS)
    shown.reach(shown.etcd.txn(Txn((), (Delete(KEYS.status(JobName("job"))),))).revision)
    assert not shown.of(metrics.ATTEMPTS)
    assert not shown.of(metrics.STEP)


def test_the_jobs_that_matter_most_have_series(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_series, "JOBS_MAX", 2)
    ended = {"old": EPOCH, "new": EPOCH + 5}
    for name, at in ended.items():
        value = replace(status(JobPhase.SUCCEEDED), finished_at=iso(at))
        put = Put(KEYS.status(JobName(name)), codec.encode(value))
        shown.reach(shown.etcd.txn(Txn((), (put,))).revision)
    shown.put(status=status())
    assert set(shown.of(metrics.STEP)) == {("job",), ("new",)}
    assert shown.of(metrics.JOBS_UNSHOWN) == {(): 1.0}
    assert shown.of(metrics.JOBS)["SUCCEEDED",] == 2.0


def test_a_status_that_cannot_be_read_takes_nothing_else_along(shown: Shown) -> None:
    put = Put(KEYS.status(JobName("odd")), b"{}")
    shown.reach(shown.etcd.txn(Txn((), (put,))).revision)
    shown.put(status=status())
    assert set(shown.of(metrics.STEP)) == {("job",)}


def test_reading_takes_no_more_than_its_share_of_the_time(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown.put(status=status(tally=Tally(commits=1)))
    counted = shown.series._jobs

    def slow(*args: Any, **named: Any) -> None:
        shown.now += 3.0
        counted(*args, **named)

    monkeypatch.setattr(shown.series, "_jobs", slow)
    assert shown.of(metrics.COMMITS) == {("job",): 1.0}
    shown.put(status=status(tally=Tally(commits=2)))
    for _ in range(10):
        assert shown.of(metrics.COMMITS) == {("job",): 1.0}
    shown.now += 20.0
    assert shown.of(metrics.COMMITS) == {("job",): 2.0}


def test_snapshots_are_read_within_a_budget_and_those_of_stragglers_beyond_it(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_series, "SNAPSHOTS_MAX", 1)
    slow = Timing(3.0, 0.0, 3.0)
    shown.put(
        status=status(),
        worker_a=snapshot("a", 0, step=9, timing=Timing(3.0, 0.0, 1.0)),
        worker_b=snapshot("b", 1, step=4, timing=slow),
    )
    assert shown.of(metrics.STEP) == {("job",): 9.0}
    shown.put(status=status(stragglers=(Rank(1),)))
    assert shown.of(metrics.STEP) == {("job",): 4.0}
    assert shown.of(metrics.STRAGGLER) == {("job", "b"): 3.0}
