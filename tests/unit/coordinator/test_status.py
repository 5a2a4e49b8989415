"""What a replica's status port says of it, from a real mirror of the model of etcd."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.builders import EPOCH, make_node, make_spec

from dtrain.coordinator import metrics
from dtrain.coordinator.job_series import AGENT_STATES
from dtrain.coordinator.measures import Measures
from dtrain.coordinator.status import Status
from dtrain.protocol import codec
from dtrain.protocol.cluster import Cordon, LeaderRecord
from dtrain.protocol.ids import AgentName, ClusterName, JobName, ReplicaId
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import Draining
from dtrain.runtime.serving import LOOP_S_MAX
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Put, Txn
from dtrain.storage.etcd.session import FixedSession

KEYS = Keys(ClusterName("default"))


class Replica:
    """A status over a mirror, with a clock of its own."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd(time.monotonic)
        self.mirror = Mirror(self.etcd, KEYS.root)
        self.now = 1000.0
        self.serves = True
        self.leads = False
        self.lost = 0
        self.status = Status(
            ReplicaId("c1"),
            KEYS,
            self.mirror,
            leads=lambda: self.leads,
            serves=lambda: self.serves,
            loop_at=lambda: 1000.0,
            problems=lambda: ["one"],
            brake_on=lambda: False,
            db_bytes=lambda: (4096, 0),
            lost=lambda: self.lost,
            measures=Measures(self),
            session=FixedSession(7),
            clock=self,
        )

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return EPOCH + self.now

    def put(self, key: str, value: object) -> None:
        revision = self.etcd.txn(Txn((), (Put(key, codec.encode(value)),))).revision
        assert self.mirror.wait_for(revision, 20.0)

    def count(self) -> dict[tuple[str, ...], float]:
        self.now += 10.0
        found = self.status.samples()
        return {**found[metrics.JOBS], **found[metrics.AGENTS]}


@pytest.fixture
def unread() -> Iterator[Replica]:
    made = Replica()
    yield made
    made.mirror.close()


@pytest.fixture
def replica(unread: Replica) -> Replica:
    unread.mirror.start()
    end = time.monotonic() + 20.0
    while unread.mirror.age_s() == float("inf"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return unread


def reasons(page: Callable[[], object]) -> tuple[int, list[str]]:
    found = page()
    return found.status, json.loads(found.body)["reasons"]  # type: ignore[attr-defined]


def test_a_replica_that_has_read_nothing_is_live_and_not_ready(unread: Replica) -> None:
    assert reasons(unread.status.ready) == (503, ["etcd has not been read yet"])
    assert reasons(unread.status.live) == (200, [])
    assert metrics.MIRROR_AGE not in unread.status.samples()


def test_a_replica_is_ready_when_it_has_read_etcd_and_serves(replica: Replica) -> None:
    assert reasons(replica.status.ready) == (200, [])
    replica.serves = False
    assert reasons(replica.status.ready) == (503, ["the API is not open"])


def test_a_copy_that_is_old_is_not_ready_and_still_live(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica.mirror, "age_s", lambda: 15.0)
    assert reasons(replica.status.ready) == (503, ["etcd was last heard of 15 s ago"])
    assert reasons(replica.status.live) == (200, [])


def test_a_loop_that_stands_still_is_not_live(replica: Replica) -> None:
    replica.now += LOOP_S_MAX
    assert reasons(replica.status.live) == (503, ["the loop has stood still for 30 s"])


def test_a_standby_names_the_leader_and_its_term(replica: Replica) -> None:
    replica.put(KEYS.leader, LeaderRecord(ReplicaId("c2"), "c2:7070", "n"))
    page = json.loads(replica.status.ready().body)
    assert (page["leader"], page["leads"]) == ("c2", False)
    assert "c2:7070" not in str(page)
    assert replica.status.samples()[metrics.TERM] == {(): float(page["term"])}


def test_jobs_are_counted_by_phase_as_they_change(replica: Replica) -> None:
    spec = make_spec()
    job = spec.name
    replica.put(KEYS.spec(job), spec)
    assert replica.count()["QUEUED",] == 1.0
    status = JobStatus(term=1, uid=spec.uid, phase=JobPhase.RUNNING)  # type: ignore[arg-type]
    replica.put(KEYS.status(job), status)
    found = replica.count()
    assert (found["QUEUED",], found["RUNNING",]) == (0.0, 1.0)
    replica.put(KEYS.status(job), dataclasses.replace(status, phase=JobPhase.FAILED))
    found = replica.count()
    assert (found["RUNNING",], found["FAILED",]) == (0.0, 1.0)
    assert sum(found[phase.value,] for phase in JobPhase) == 1.0


def test_agents_are_counted_by_what_can_be_done_with_them(replica: Replica) -> None:
    for name in ("a1", "a2", "a3", "a4"):
        replica.put(KEYS.node(AgentName(name)), make_node(name))
    replica.put(KEYS.node(AgentName("a4")), dataclasses.replace(make_node("a4"), draining=Draining("reboot")))
    replica.put(KEYS.node(AgentName("a3")), dataclasses.replace(make_node("a3"), problem="a rank is stuck"))
    replica.put(KEYS.cordon(AgentName("a2")), Cordon(AgentName("a2"), "maintenance"))
    replica.put(KEYS.worker(AgentName("a1"), JobName("job")), make_node("a1"))
    replica.lost = 2
    found = {state: count for state, count in replica.count().items() if state[0] in AGENT_STATES}
    assert found == {
        ("ready",): 1.0,
        ("cordoned",): 1.0,
        ("draining",): 1.0,
        ("blocked",): 1.0,
        ("lost",): 2.0,
    }


def test_records_are_not_counted_more_often_than_every_few_seconds(replica: Replica) -> None:
    replica.count()
    replica.put(KEYS.node(AgentName("a1")), make_node("a1"))
    assert replica.status.samples()[metrics.AGENTS]["ready",] == 0.0
    assert replica.count()["ready",] == 1.0
