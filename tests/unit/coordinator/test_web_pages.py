"""What pages show of the records, and how much of it."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from dtrain.coordinator.web import pages
from dtrain.coordinator.web.pages import Query
from dtrain.coordinator.web.records import Cluster, Decoder, group
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Latest
from dtrain.protocol.cluster import Cordon, LeaderRecord, ReplicaRecord
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
from dtrain.protocol.job import Entry, EntryKind, JobPhase, JobSpec, JobStatus, Member
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import (
    NodeRecord,
    RankState,
    Transfer,
    TransferKind,
    WorkerPhase,
    WorkerSnapshot,
)
from dtrain.storage.etcd.port import KeyValue

KEYS = Keys(ClusterName("test"))
UID = Uid("u1")


def kv(key: str, record: Any, revision: int = 5) -> KeyValue:
    return KeyValue(key, codec.encode(record), revision, revision, 1, 0)


def spec(name: str, **changes: Any) -> JobSpec:
    entry = Entry(EntryKind.SCRIPT, "train.py")
    return JobSpec(
        JobName(name), UID, entry, submitted_at=changes.pop("at", "2026-01-01T00:00:00Z"), **changes
    )


def status(
    phase: JobPhase = JobPhase.RUNNING, *, attempt: int = 1, ranks: int = 2, **changes: Any
) -> JobStatus:
    members = (Member(AgentName("a1"), 0, Rank(0), ranks),)
    return JobStatus(Term(3), UID, phase, "training", Attempt(attempt), members, **changes)


def snapshot(steps: Iterable[int], *, attempt: int = 1) -> WorkerSnapshot:
    ranks = tuple(
        RankState(Rank(rank), 100 + rank, WorkerPhase.TRAINING, Step(step)) for rank, step in enumerate(steps)
    )
    return WorkerSnapshot(
        AgentName("a1"), UID, Incarnation("i"), Attempt(attempt), WorkerPhase.TRAINING, ranks=ranks
    )


def cluster_of(*items: KeyValue) -> Cluster:
    return group(items, 9, Decoder(KEYS))


def job_items(name: str, steps: Iterable[int] = (7, 5), **changes: Any) -> list[KeyValue]:
    job = JobName(name)
    return [
        kv(KEYS.spec(job), spec(name, **changes)),
        kv(KEYS.status(job), status()),
        kv(KEYS.worker(AgentName("a1"), job), snapshot(steps)),
    ]


def test_the_step_is_what_all_ranks_have_done_and_never_behind_what_is_stored() -> None:
    found = pages.parts(cluster_of(*job_items("x", (7, 5))), Query("jobs"))
    assert found["row:x"]["step"] == 5
    job = JobName("x")
    behind = [kv(KEYS.spec(job), spec("x")), kv(KEYS.status(job), status(step=Step(6)))]
    found = pages.parts(
        cluster_of(*behind, kv(KEYS.worker(AgentName("a1"), job), snapshot((2, 3)))), Query("jobs")
    )
    assert found["row:x"]["step"] == 6


def test_what_moves_is_summed_on_the_jobs_page() -> None:
    told = Transfer(TransferKind.SAVE, Seq(3), Step(7), 30, 40, 5.0)
    job = JobName("x")
    items = [
        *job_items("x")[:2],
        kv(KEYS.worker(AgentName("a1"), job), replace(snapshot((7,)), transfers=(told,))),
    ]
    (shown,) = pages.parts(cluster_of(*items), Query("job", "x"))["head"]["moving"]
    assert (shown["kind"], shown["seq"], shown["done_bytes"], shown["total_bytes"]) == ("save", 3, 30, 40)
    assert shown["left_s"] == 2.0
    assert pages.parts(cluster_of(*job_items("x")), Query("job", "x"))["head"]["moving"] == []


def test_what_an_older_attempt_has_left_behind_is_not_shown() -> None:
    job = JobName("x")
    items = [kv(KEYS.spec(job), spec("x")), kv(KEYS.status(job), status(attempt=2))]
    found = pages.parts(
        cluster_of(*items, kv(KEYS.worker(AgentName("a1"), job), snapshot((90, 91), attempt=1))),
        Query("job", "x"),
    )
    assert found["head"]["step"] == 0
    assert found["head"]["live"] == 0
    assert found["rank:0"]["phase"] == ""


def test_ranks_that_are_behind_come_first_and_only_a_page_of_them_comes() -> None:
    job = JobName("big")
    steps = [100] * 999 + [3]
    items = [
        kv(KEYS.spec(job), spec("big")),
        kv(KEYS.status(job), status(ranks=1000)),
        kv(KEYS.worker(AgentName("a1"), job), snapshot(steps)),
    ]
    found = pages.parts(cluster_of(*items), Query("job", "big"))
    assert found["ranks"]["total"] == 1000
    assert found["ranks"]["order"][0] == 999
    assert sum(name.startswith("rank:") for name in found) == pages.ROWS_MAX


def test_a_first_page_of_a_large_cluster_stays_small() -> None:
    items = [item for n in range(300) for item in job_items(f"job-{n:03}", range(100))]
    agents = [
        kv(
            KEYS.node(AgentName(f"a{n:04}")),
            NodeRecord(AgentName(f"a{n:04}"), Incarnation("i"), "h:1", "h", 8),
        )
        for n in range(1000)
    ]
    cluster = cluster_of(*items, *agents)
    for page in ("jobs", "agents", "checkpoints"):
        found = pages.parts(cluster, Query(page))
        assert len(json.dumps(found)) < 100_000
        assert len(found["list"]["order"]) <= pages.ROWS_MAX
    assert pages.parts(cluster, Query("jobs"))["list"]["total"] == 300
    assert pages.parts(cluster, Query("agents", offset=900))["list"]["order"][-1] == "a0999"


def test_jobs_are_listed_newest_first_and_by_what_is_asked_for() -> None:
    items = [
        *job_items("old", at="2026-01-01T00:00:00Z"),
        *job_items("new", at="2026-02-01T00:00:00Z"),
        kv(KEYS.spec(JobName("gone")), spec("gone", at="2026-03-01T00:00:00Z")),
        kv(KEYS.status(JobName("gone")), status(JobPhase.FAILED)),
    ]
    cluster = cluster_of(*items)

    def order(**asked: Any) -> list[str]:
        found: list[str] = pages.parts(cluster, Query("jobs", **asked))["list"]["order"]
        return found

    assert order() == ["gone", "new", "old"]
    assert order(phase="active") == ["new", "old"]
    assert order(phase="failed") == ["gone"]
    assert order(phase="RUNNING", sort="name") == ["new", "old"]
    assert order(text="ol") == ["old"]


def test_no_value_of_a_jobs_environment_is_shown() -> None:
    found = pages.parts(
        cluster_of(*job_items("x", env={"HOME": "/secret-place", "HF_TOKEN": "hf_abc"})), Query("job", "x")
    )
    text = json.dumps(found)
    assert "secret-place" not in text
    assert "hf_abc" not in text
    assert set(found["spec"]["env"]) == {"HOME", "HF_TOKEN"}


def test_a_record_of_a_newer_version_hides_nothing_else() -> None:
    job = JobName("x")
    odd = KeyValue(KEYS.status(job), b'{"v":99}', 5, 5, 1, 0)
    found = pages.parts(cluster_of(kv(KEYS.spec(job), spec("x")), odd), Query("jobs"))
    assert found["row:x"]["phase"] == "QUEUED"
    assert "waiting for a leader" in found["row:x"]["reason"]


def test_a_checkpoint_is_shown_with_what_is_known_of_it() -> None:
    job = JobName("x")
    commit = CommitRecord(
        Term(3),
        UID,
        Seq(4),
        Step(40),
        Attempt(1),
        "n",
        2,
        1000,
        "m",
        10,
        "d",
        committed_at="2026-01-01T01:00:00Z",
    )
    items = [
        *job_items("x"),
        kv(KEYS.checkpoint(job, Seq(4)), commit),
        kv(KEYS.latest(job), Latest(Term(3), Seq(4), Step(40))),
    ]
    row = pages.parts(cluster_of(*items), Query("checkpoints"))["row:x/4"]
    assert (row["state"], row["step"], row["latest"], row["bytes"]) == ("Committed", 40, True, 1000)


def test_machines_say_why_they_are_not_ready_and_replicas_who_leads() -> None:
    a1, a2 = AgentName("a1"), AgentName("a2")
    items = [
        kv(KEYS.leader, LeaderRecord(ReplicaId("c2"), "h:7070", "n"), 44),
        kv(
            KEYS.coordinator(ReplicaId("c1")),
            ReplicaRecord(ReplicaId("c1"), "h:1", dashboard="http://h:7090"),
        ),
        kv(KEYS.coordinator(ReplicaId("c2")), ReplicaRecord(ReplicaId("c2"), "h:2")),
        kv(KEYS.node(a1), NodeRecord(a1, Incarnation("i"), "h:1", "h", 8)),
        kv(KEYS.cordon(a1), Cordon(a1, "new cables", by="ops")),
        kv(KEYS.cordon(a2), Cordon(a2, "gone for good")),
    ]
    cluster = cluster_of(*items)
    agents = pages.parts(cluster, Query("agents"))
    assert (agents["row:a1"]["status"], agents["row:a1"]["reason"]) == ("Cordoned", "new cables")
    assert agents["row:a2"]["status"] == "Lost"
    replicas = pages.parts(cluster, Query("replicas"))
    assert [replicas[f"row:{name}"]["role"] for name in ("c1", "c2")] == ["standby", "leader"]
    assert replicas["cluster"]["term"] == 44
    assert replicas["cluster"]["replicas"] == {"c1": "http://h:7090", "c2": ""}


def test_a_job_that_is_gone_is_told_apart_from_an_empty_page() -> None:
    assert pages.parts(cluster_of(), Query("job", "x"))["head"] is None


@pytest.mark.parametrize(
    "asked", [{"page": "nothing"}, {"page": "jobs", "offset": -1}, {"page": "jobs", "limit": 1000}]
)
def test_what_cannot_be_asked_for_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Query(**asked)


def test_only_what_changed_is_sent_again() -> None:
    assert pages.differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == (
        {"b": "3", "c": "4"},
        [],
    )
    assert pages.differences({"a": "1", "b": "2"}, {"a": "1"}) == ({}, ["b"])
