"""What a job under test says of itself, and how its waits end, over an etcd in memory."""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord, ReplicaRecord
from dtrain.protocol.errors import Refused, Unavailable
from dtrain.protocol.events import EventReason, EventRecord, EventType
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    Incarnation,
    JobName,
    Rank,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import JobPhase, JobStatus, Member, RestorePoint
from dtrain.protocol.snapshot import Failure, FailureKind, RankState, WorkerPhase, WorkerSnapshot
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Put, Txn
from dtrain.testing import Job, ProcessCluster
from dtrain.testing.patience import limited, patiently

NAME = JobName("digits")


class Fake(ProcessCluster):
    """A cluster that is nothing but its records."""

    store_env: Mapping[str, str] = {}  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.memory: Any = MemoryEtcd(lambda: 0.0)
        self.away = False

    @property
    def etcd(self) -> Any:
        if self.away:
            raise Unavailable("DT-3001", "etcd does not answer")  # type: ignore[arg-type]
        return self.memory

    def logs(self, node: str) -> str:
        return f"{node} was here\n"

    def put(self, key: str, value: Any) -> None:
        self.memory.txn(Txn((), (Put(key, codec.encode(value)),)))

    def says(self, **fields: Any) -> JobStatus:
        member = Member(AgentName("a1"), 0, Rank(0), 2)
        base = JobStatus(Term(1), Uid("u"), JobPhase.RUNNING, attempt=Attempt(1), members=(member,))
        status = dataclasses.replace(base, **fields)
        self.put(self.keys.status(NAME), status)
        return status

    def reports(self, attempt: int, *steps: int, uid: str = "u") -> None:
        ranks = tuple(
            RankState(Rank(rank), 100 + rank, WorkerPhase.TRAINING, Step(step))
            for rank, step in enumerate(steps)
        )
        snapshot = WorkerSnapshot(
            AgentName("a1"), Uid(uid), Incarnation("i"), Attempt(attempt), WorkerPhase.TRAINING, ranks
        )
        self.put(self.keys.worker(AgentName("a1"), NAME), snapshot)


@pytest.fixture
def cluster() -> Fake:
    return Fake()


@pytest.fixture
def job(cluster: Fake) -> Job:
    return cluster.job(NAME)


def test_a_job_that_no_leader_has_seen_is_queued(job):
    assert (job.phase, job.attempt, job.step, job.agents) == (JobPhase.QUEUED, 0, 0, ())


def test_its_step_is_one_that_every_rank_has_completed(cluster, job):
    cluster.says()
    cluster.reports(1, 40, 37)
    assert job.step == 37
    assert job.pids() == {0: 100, 1: 101}


def test_a_rank_that_has_not_reported_holds_the_step_at_the_checkpoint(cluster, job):
    cluster.says(restore=RestorePoint(Seq(1), Step(20), "m", "d"))
    cluster.reports(1, 40)
    assert job.step == 20


def test_what_an_older_attempt_or_an_older_job_reports_is_no_progress(cluster, job):
    cluster.says(attempt=Attempt(2))
    cluster.reports(1, 40, 40)
    assert job.step == 0
    cluster.reports(2, 40, 40, uid="former")
    assert job.step == 0


def test_a_wait_ends_early_when_the_job_does_and_tells_its_story(cluster, job):
    failure = Failure(FailureKind.EXCEPTION, "ValueError: no", AgentName("a1"), rank=Rank(1), log_tail="boom")
    cluster.says(phase=JobPhase.FAILED, reason="the budget is spent", failure=failure)
    event = EventRecord(Term(1), 1, EventType.WARNING, EventReason.RANK_EXITED, "rank 1 ended")
    cluster.put(cluster.keys.event(NAME, 1), event)
    with pytest.raises(AssertionError) as caught:
        job.wait_for_step(50, timeout_s=60)
    told = str(caught.value)
    for part in (
        "before it reaches step 50",
        "FAILED",
        "budget is spent",
        "ValueError: no",
        "boom",
        "RankExited",
    ):
        assert part in told
    assert "a1 was here" in told


def test_waiting_for_success_fails_for_another_end(cluster, job):
    cluster.says(phase=JobPhase.CANCELLED)
    with pytest.raises(AssertionError, match="ended CANCELLED, not SUCCEEDED"):
        job.wait(5)
    assert job.wait(5, phase="CANCELLED").phase is JobPhase.CANCELLED


def test_a_wait_that_takes_too_long_says_what_for(cluster, job):
    cluster.says()
    with pytest.raises(AssertionError, match=r"not in 0.1 s: attempt 2 trains"):
        job.wait_for_attempt(2, timeout_s=0.1)


def test_an_etcd_that_is_away_for_a_while_is_no_failure(cluster, job):
    cluster.says(phase=JobPhase.SUCCEEDED)
    cluster.away = True
    back = threading.Timer(0.3, lambda: setattr(cluster, "away", False))
    back.start()
    assert job.wait(30).phase is JobPhase.SUCCEEDED
    back.join()


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda cluster, job: job.status, id="status"),
        pytest.param(lambda cluster, job: job.commits(), id="commits"),
        pytest.param(lambda cluster, job: job.events(), id="events"),
        pytest.param(lambda cluster, job: job.step, id="step"),
        pytest.param(lambda cluster, job: cluster.read("jobs/"), id="read"),
        pytest.param(lambda cluster, job: cluster.registered(), id="registered"),
    ],
)
def test_a_read_waits_for_the_election_that_a_test_has_caused(cluster, job, read):
    cluster.says()
    expected = read(cluster, job)
    cluster.away = True
    back = threading.Timer(0.3, lambda: setattr(cluster, "away", False))
    back.start()
    assert read(cluster, job) == expected
    back.join()


def test_a_read_gives_up_in_the_end_and_at_once_where_a_wait_has_a_limit_of_its_own(cluster):
    cluster.away = True
    asked = []

    def read():
        asked.append(1)
        return cluster.etcd

    with pytest.raises(Unavailable, match="etcd does not answer"):
        patiently(read, 0.2)
    assert len(asked) > 1
    asked.clear()
    with pytest.raises(Unavailable), limited():
        patiently(read)
    assert len(asked) == 1


def test_an_etcd_that_stays_away_is_told(cluster, job):
    cluster.away = True
    with pytest.raises(AssertionError, match="etcd does not answer"):
        job.wait(0.1)


def test_every_wrong_field_of_a_job_is_named(cluster, tmp_path):
    (tmp_path / "train.py").write_text("")
    with pytest.raises(Refused) as caught:
        cluster.submit("train.py", working_dir=tmp_path, nnodes="4:2", nodess=3)
    assert "nnodes" in str(caught.value)
    assert "nodess" in str(caught.value)


def test_a_script_that_is_not_there_is_refused_before_anything_is_sent(cluster, tmp_path):
    with pytest.raises(Refused, match="there is no script"):
        cluster.submit("nothing.py", working_dir=tmp_path)


def test_jobs_of_one_script_get_names_of_their_own(cluster):
    assert cluster._free_name("My_Train") == "my-train"
    cluster._names |= {"my-train", "my-train-2"}
    assert cluster._free_name("My_Train") == "my-train-3"


def test_what_is_registered_from_a_former_life_is_not_ready(cluster):
    record = LeaderRecord(ReplicaId("c1"), "127.0.0.1:1", "n")
    replica = ReplicaRecord(ReplicaId("c1"), "127.0.0.1:1")
    cluster.put(cluster.keys.leader, record)
    cluster.put(cluster.keys.coordinator(ReplicaId("c1")), replica)
    cluster.wait_ready("c1", timeout_s=1)
    cluster._starts("c1")
    with pytest.raises(AssertionError, match="c1 are registered"):
        cluster.wait_ready("c1", timeout_s=0.1)
    cluster.put(cluster.keys.coordinator(ReplicaId("c1")), replica)
    cluster.wait_ready("c1", timeout_s=1)
