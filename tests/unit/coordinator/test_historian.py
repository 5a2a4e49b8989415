"""What etcd forgets is in the store: records of jobs that end, and events before they are dropped."""

from typing import Any, cast

import pytest

from dtrain.coordinator.api.past import PastJobs
from dtrain.coordinator.historian import BATCH, PRUNE_S, RETRY_S_FIRST, Historian
from dtrain.protocol import archive, codec
from dtrain.protocol.errors import ErrorCode, NotFound, Unavailable
from dtrain.protocol.events import EVENTS_KEPT, EventReason, EventRecord, EventType
from dtrain.protocol.ids import ClusterName, JobName, Term, Uid
from dtrain.protocol.job import Entry, EntryKind, JobPhase, JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.etcd.mirror import Mirror, MirrorState
from dtrain.storage.etcd.port import Event, KeyValue, WatchBatch

CLUSTER, JOB = ClusterName("c"), JobName("train")
KEYS = Keys(CLUSTER)
DAY_S = 86_400.0
STORE = "memory://m"


class Time:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class Away(MemoryBlobs):
    """A store that can be away."""

    away = False

    def list(self, prefix: str) -> Any:
        if self.away:
            raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "the store is away")
        return super().list(prefix)


class Bench:
    """One cluster's records, and replicas' historians that read them."""

    def __init__(self) -> None:
        self.state = MirrorState()
        self.store = Away("m")
        self.time = Time()
        self.term: Term | None = Term(5)
        self.revision = 0
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.historian = self.new()
        self.history = PastJobs(CLUSTER, cast("Mirror", self.state), lambda _: self.store, STORE)

    def new(self) -> Historian:
        return Historian(
            CLUSTER,
            cast("Mirror", self.state),
            lambda _: self.store,
            term=lambda: self.term,
            clock=self.time,
            keep_s=90 * DAY_S,
            log=lambda event, **fields: self.said.append((event, fields)),
        )

    def put(self, key: str, value: Any) -> None:
        self.revision += 1
        kv = KeyValue(key, codec.encode(value), self.revision, self.revision, 1)
        self.historian.see(self.state.apply(WatchBatch(self.revision, (Event("put", kv),))))

    def delete(self, key: str) -> None:
        self.revision += 1
        kv = KeyValue(key, b"", 0, self.revision, 0)
        self.state.apply(WatchBatch(self.revision, (Event("delete", kv),)))

    def job(self, phase: JobPhase, uid: str = "u1", *, events: int = 0, **more: Any) -> None:
        env = {"HF_TOKEN": "hunter2", "LEVEL": "3"}
        self.put(KEYS.spec(JOB), JobSpec(JOB, Uid(uid), Entry(EntryKind.SCRIPT, "t.py"), env=env))
        finished = "2027-01-15T08:00:00.123Z" if phase is JobPhase.SUCCEEDED else ""
        status = JobStatus(
            Term(5), Uid(uid), phase, store=STORE, event_last=events, finished_at=finished, **more
        )
        self.put(KEYS.status(JOB), status)

    def event(self, seq: int) -> None:
        record = EventRecord(
            Term(5), seq, EventType.NORMAL, EventReason.CHECKPOINT_COMMITTED, f"number {seq}"
        )
        self.put(KEYS.event(JOB, seq), record)
        self.delete(KEYS.event(JOB, seq - EVENTS_KEPT))

    def keys(self) -> list[str]:
        return [info.key for info in self.store.list("")]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_record_of_a_job_that_ends_is_archived_once_and_can_be_read(bench: Bench) -> None:
    bench.historian.turn()
    bench.job(JobPhase.RUNNING)
    bench.historian.turn()
    assert not bench.keys()
    bench.event(1)
    bench.job(JobPhase.SUCCEEDED, events=1)
    bench.historian.turn()
    bench.job(JobPhase.SUCCEEDED, events=1)
    bench.historian.turn()
    assert len(bench.keys()) == 1
    past = bench.history.find(JOB)
    assert (past.uid, past.status.phase, past.finished) == ("u1", JobPhase.SUCCEEDED, "20270115T080000Z")
    assert past.documents[f"jobs/{JOB}/events/{1:020d}"]["message"] == "number 1"


def test_no_secret_of_the_environment_is_archived(bench: Bench) -> None:
    bench.job(JobPhase.SUCCEEDED)
    bench.historian.turn()
    assert bench.history.find(JOB).documents[f"jobs/{JOB}/spec"]["env"] == {"HF_TOKEN": "***", "LEVEL": "3"}


def test_events_are_archived_before_etcd_drops_them(bench: Bench) -> None:
    bench.historian.turn()
    for seq in range(1, 2 * EVENTS_KEPT):
        bench.event(seq)
        bench.job(JobPhase.RUNNING, events=seq)
        bench.historian.turn()
    live = min(kv.key for kv in bench.state.prefix(KEYS.job(JOB) + "events/"))
    first = int(live.rpartition("/")[2])
    earlier = bench.history.earlier_events(JOB, Uid("u1"), STORE, first)
    assert [event["seq"] for event in earlier][: first - 1] == list(range(1, first))
    assert len(bench.keys()) <= 2 * EVENTS_KEPT / BATCH
    bench.job(JobPhase.SUCCEEDED, events=2 * EVENTS_KEPT)
    bench.historian.turn()
    past = bench.history.find(JOB)
    assert len([key for key in past.documents if "/events/" in key]) == 2 * EVENTS_KEPT - 1


def test_a_store_that_is_away_is_asked_again_and_told_of_once(bench: Bench) -> None:
    bench.store.away = True
    bench.job(JobPhase.SUCCEEDED)
    for _ in range(10):
        bench.historian.turn()
        bench.time.now += 400
    bench.store.away = False
    bench.time.now += RETRY_S_FIRST
    bench.historian.turn()
    assert len(bench.keys()) == 1
    assert [event for event, _ in bench.said] == ["history not archived", "job archived"]


def test_only_the_leader_archives_and_its_successor_goes_on_where_it_was(bench: Bench) -> None:
    bench.term = None
    bench.job(JobPhase.SUCCEEDED)
    bench.historian.turn()
    assert not bench.keys()
    bench.term = Term(6)
    bench.historian.turn()
    assert len(bench.keys()) == 1
    successor = bench.new()
    bench.term = Term(7)
    successor.turn()
    assert len(bench.keys()) == 1


def test_a_name_used_again_leaves_the_earlier_submission_readable(bench: Bench) -> None:
    bench.job(JobPhase.SUCCEEDED, "u1")
    bench.historian.turn()
    bench.job(JobPhase.SUCCEEDED, "u2")
    bench.historian.turn()
    names, problem = bench.history.submissions(JOB)
    assert ({name.uid for _, name in names}, problem) == ({"u1", "u2"}, "")
    assert bench.history.find(JOB, "u1").status.uid == "u1"
    with pytest.raises(NotFound, match="u3"):
        bench.history.find(JOB, "u3")


def test_a_job_without_a_store_is_left_alone(bench: Bench) -> None:
    bench.put(KEYS.status(JOB), JobStatus(Term(5), Uid("u1"), JobPhase.FAILED))
    bench.historian.turn()
    assert not bench.keys()
    assert not bench.said


def test_what_is_older_than_it_is_kept_goes_with_its_logs_and_nothing_else_does(bench: Bench) -> None:
    def put(key: str) -> str:
        bench.store.put(key, [b"x"], chunk_crcs=[digest.crc32c(b"x")])
        return key

    def record(uid: str, finished: str) -> str:
        return put(archive.record_key(CLUSTER, JOB, Uid(uid), finished_at=finished, event_last=1, nonce="a"))

    def log_of(uid: str) -> str:
        return put(f"{archive.logs_prefix(CLUSTER, JOB, Uid(uid))}x")

    stays = [record("new", "2027-01-01T00:00:00Z"), log_of("new"), log_of("live")]
    stays.append(put(f"{CLUSTER}/{JOB}/old/manifests/1"))
    goes = [record("old", "2026-01-01T00:00:00Z"), log_of("old")]
    goes.append(put(archive.events_key(CLUSTER, JOB, Uid("old"), first=1, last=9, nonce="a")))
    bench.job(JobPhase.SUCCEEDED, "u9")
    bench.time.now += PRUNE_S
    bench.historian.turn()
    left = set(bench.keys())
    assert not left & set(goes)
    assert set(stays) <= left
