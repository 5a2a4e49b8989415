"""Whom a machine without etcd asks, when, and what it makes of the answers."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from dtrain.agent.consult import ASKED_AT_ONCE, READ_EVERY_S, READ_RETRY_S, READS_AT_FIRST, Consultant
from dtrain.agent.core.events import Consulted, CoordinatorsRead, SessionSeen
from dtrain.agent.core.state import LinkState
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.protocol.ids import AgentName, Attempt, ReplicaId
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Delete, Put, Txn

from .core_builder import JOB, Table, machine
from .test_reporter import FakeClock

KEYS = Keys(machine().cluster)


class Desk:
    """A consultant over the model of etcd; replicas answer what ``replies`` says."""

    def __init__(self) -> None:
        self.table = Table().training()
        self.clock = FakeClock()
        self.etcd = MemoryEtcd(self.clock.monotonic)
        self.reads = 0
        self.away = False
        self.asked: list[list[str]] = []
        self.questions: list[pb.ConsultRequest] = []
        self.replies: list[pb.ConsultReply] = []
        self.posted: list[Any] = []
        self.consultant = Consultant(
            self,  # type: ignore[arg-type]
            KEYS,
            AgentName("node-a"),
            self.clock,
            state=lambda: self.table.state,
            post=self._post,
            ask=self._ask,
            rng=random.Random(1),
        )

    def range(self, *where: Any, **how: Any) -> Any:
        self.reads += 1
        if self.away:
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "no answer")
        return self.etcd.range(*where, **how)

    def _post(self, event: Any) -> None:
        self.posted.append(event)
        self.table.feed(event)

    def _ask(self, addresses: Sequence[str], request: pb.ConsultRequest) -> list[pb.ConsultReply]:
        self.asked.append(list(addresses))
        self.questions.append(request)
        return self.replies

    def replica(self, name: str) -> None:
        record = ReplicaRecord(ReplicaId(name), f"{name}:7070")
        self.etcd.txn(Txn(success=(Put(KEYS.coordinator(ReplicaId(name)), codec.encode(record)),)))

    def registered(self, generation: int = 1) -> None:
        from dtrain.agent.core.events import SessionRenewed
        from dtrain.protocol.ids import Incarnation

        self.table.feed(SessionRenewed(generation, Incarnation(f"life-{generation}")))

    def cut_off(self) -> None:
        """Isolated from now on."""
        self.away = True
        for _ in range(2):
            self.table.feed(SessionSeen(1, 10.0, 0.0))
            self.table.now += 2.0
        self.table.feed(SessionSeen(1, 10.0, 0.0))
        assert self.table.state.link.state is LinkState.ISOLATED
        self.clock.now = self.table.now + 10.0

    def work(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        self.consultant.work()


@pytest.fixture
def desk() -> Desk:
    made = Desk()
    for name in ("c1", "c2", "c3"):
        made.replica(name)
    made.registered()
    made.work()
    return made


def test_addresses_are_read_when_a_session_begins(desk: Desk) -> None:
    assert desk.table.state.coordinators == ("c1:7070", "c2:7070", "c3:7070")
    desk.replica("c4")
    desk.work(1.0)
    assert desk.reads == 1
    desk.registered(2)
    desk.work(1.0)
    assert "c4:7070" in desk.table.state.coordinators


def test_addresses_are_read_again_now_and_then(desk: Desk) -> None:
    settled(desk)
    desk.replica("c4")
    desk.work(READ_EVERY_S / 2)
    assert "c4:7070" not in desk.table.state.coordinators
    desk.work(READ_EVERY_S)
    assert "c4:7070" in desk.table.state.coordinators
    assert [type(event) for event in desk.posted] == [CoordinatorsRead, CoordinatorsRead]
    desk.work(1.3 * READ_EVERY_S)
    assert len(desk.posted) == 2, "what has not changed is not written to the journal again"


def settled(desk: Desk) -> None:
    """Past the reads at the beginning of a session."""
    for _ in range(READS_AT_FIRST - 1):
        desk.work(1.3 * READ_RETRY_S)
    assert desk.reads == READS_AT_FIRST


def test_replicas_that_start_with_the_agent_are_known_soon(desk: Desk) -> None:
    desk.replica("c4")
    desk.work(1.3 * READ_RETRY_S)
    assert "c4:7070" in desk.table.state.coordinators


def test_an_agent_that_began_before_the_replicas_knows_them_as_soon_as_ranks_run() -> None:
    desk = Desk()
    desk.table = Table()
    desk.registered()
    desk.work()
    assert desk.reads == 1
    assert not desk.table.state.coordinators
    desk.replica("c1")
    desk.table.training()
    desk.work(0.25)
    assert desk.table.state.coordinators == ("c1:7070",)
    desk.work(0.25)
    assert desk.reads == 2, "once for each attempt, not with each look"


def test_the_former_addresses_are_kept_while_no_replica_is_there(desk: Desk) -> None:
    for name in ("c1", "c2", "c3"):
        desk.etcd.txn(Txn(success=(Delete(KEYS.coordinator(ReplicaId(name))),)))
    desk.work(1.3 * READ_EVERY_S)
    assert len(desk.table.state.coordinators) == 3


def test_nobody_is_asked_while_etcd_answers(desk: Desk) -> None:
    for _ in range(100):
        desk.work(1.0)
    assert not desk.asked


def test_a_machine_that_is_cut_off_asks_at_once_and_again(desk: Desk) -> None:
    desk.cut_off()
    desk.replies = [
        pb.ConsultReply(etcd_age_s=1.0, jobs=[pb.JobStanding(job=JOB, current=True, attempt=1, member=True)])
    ]
    desk.work()
    assert len(desk.asked) == 1
    (part,) = desk.questions[0].jobs
    assert (desk.questions[0].agent, part.job, part.uid, part.attempt) == ("node-a", JOB, "u1", 1)
    desk.work(1.0)
    assert len(desk.asked) == 1
    desk.work(4.0)
    assert len(desk.asked) == 2
    assert desk.reads == 1, "etcd is left alone"


def test_when_etcd_is_down_for_all_they_are_asked_rarely(desk: Desk) -> None:
    desk.cut_off()
    desk.replies = [pb.ConsultReply(etcd_age_s=100.0)]
    for _ in range(60):
        desk.work(1.0)
    assert 3 <= len(desk.asked) <= 6


def test_only_a_few_of_many_are_asked(desk: Desk) -> None:
    desk._post(CoordinatorsRead(tuple(f"n{i}:1" for i in range(12))))
    desk.cut_off()
    desk.work()
    assert len(desk.asked[0]) == len(set(desk.asked[0])) == ASKED_AT_ONCE


def test_without_ranks_nobody_is_asked(desk: Desk) -> None:
    desk.table.ended(0, 0)
    desk.table.ended(1, 0)
    desk.cut_off()
    desk.work()
    assert not desk.asked


def test_an_answer_reaches_the_driver_with_what_was_asked(desk: Desk) -> None:
    desk.cut_off()
    standing = pb.JobStanding(job=JOB, current=True, attempt=2)
    desk.replies = [pb.ConsultReply(etcd_age_s=1.0, jobs=[standing, pb.JobStanding(job="unknown")])]
    desk.work()
    event = desk.posted[-1]
    assert isinstance(event, Consulted)
    (told,) = event.answers[0].standings
    assert (told.job, told.asked, told.attempt, told.member) == (JOB, Attempt(1), Attempt(2), False)
    assert desk.table.job.stopping is not None


def test_that_nobody_answers_is_told_too(desk: Desk) -> None:
    desk.cut_off()
    desk.work()
    assert desk.posted[-1] == Consulted(())
