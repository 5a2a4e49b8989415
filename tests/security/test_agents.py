"""Agents and coordinators that lie: forged terms, replayed commands, words about others' ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.agent.core.decisions import Answer
from dtrain.agent.launching import ForkRanks
from dtrain.agent.link import AgentServer, AgentServicer
from dtrain.agent.logs import RankLogs
from dtrain.protocol import wire
from dtrain.protocol.commands import Command
from dtrain.protocol.ids import AgentName, Rank, Term
from dtrain.protocol.job import Member
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.runtime import grpc_tls
from tests.support.builders import make_part
from tests.support.certificates import Authority, authority
from tests.unit.agent.test_driver import World
from tests.unit.coordinator import test_plan_checkpoints as plans
from tests.unit.coordinator.test_world import A1, JOB, KEYS, Etcd, snapshot, spec, status


class Wire:
    """The real driver and journal behind the real service, and somebody who listens on the wire."""

    def __init__(self, folder: Path, ca: Authority) -> None:
        self.world = World(folder)
        self.server = AgentServer("127.0.0.1:0", grpc_tls.Credentials(ca.issue("agent", "node-a")))
        self.server.start(
            AgentServicer(
                self._execute,
                RankLogs(folder),
                lambda *_: True,
                lambda: self.world.driver.state.term,
                lambda _job, _uid: [],
            )
        )
        leader = grpc_tls.Credentials(ca.issue("coordinator", "r1"))
        self.channel = grpc_tls.to_agent("node-a", f"127.0.0.1:{self.server.port}", leader, ())
        self.heard: list[bytes] = []

    def _execute(self, command: Command) -> Answer:
        answer = self.world.driver.take(command, self.world.driver.confirm(command))
        self.world.settle()
        return answer

    def send(self, command: Command, *, term: int | None = None) -> pb.Ack:
        header = replace(command.header, term=Term(self.world.term if term is None else term))
        return self.replay(wire.command_to_pb(replace(command, header=header)).SerializeToString())

    def replay(self, data: bytes) -> pb.Ack:
        self.heard.append(data)
        call = self.channel.unary_unary("/dtrain.v1.Agent/Execute", response_deserializer=pb.Ack.FromString)
        ack: pb.Ack = call(data, timeout=30)
        return ack

    @property
    def forks(self) -> int:
        return sum(isinstance(order, ForkRanks) for order in self.world.launchers.orders)

    def close(self) -> None:
        self.channel.close()
        self.server.stop()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path, authority(tmp_path / "ca"))
    yield made
    made.close()


@pytest.mark.parametrize("lead", [1, 1000, 2**40])
def test_a_forged_high_term_is_asked_about_and_not_obeyed(lead: int, line: Wire) -> None:
    assert line.send(line.world.table.prepare()).accepted
    assert line.send(line.world.table.start()).accepted
    forged = line.send(line.world.table.stop(), term=line.world.term + lead)
    assert not forged.accepted
    assert forged.term == line.world.term
    assert line.world.driver.state.term == line.world.term
    assert line.send(line.world.table.stop()).accepted


def test_the_largest_number_of_the_wire_locks_no_agent_for_ever(line: Wire) -> None:
    assert not line.send(line.world.table.prepare(), term=2**63 - 1).accepted
    assert not line.send(line.world.table.prepare(), term=-1).accepted
    assert line.send(line.world.table.prepare()).accepted


def test_replayed_commands_have_no_second_effect_in_this_life_or_the_next(line: Wire) -> None:
    assert line.send(line.world.table.prepare()).accepted
    assert line.send(line.world.table.start()).accepted
    line.world.join()
    orders, state = len(line.world.launchers.orders), line.world.driver.state.jobs
    for data in list(line.heard):
        line.replay(data)
    assert len(line.world.launchers.orders) == orders
    assert line.world.driver.state.jobs == state
    forks = line.forks
    line.world.begin_life()
    for data in list(line.heard):
        line.replay(data)
    assert line.forks == forks


def test_commands_of_an_older_attempt_are_refused_when_replayed(line: Wire) -> None:
    assert line.send(line.world.table.prepare()).accepted
    assert line.send(line.world.table.start()).accepted
    old = list(line.heard)
    assert line.send(line.world.table.prepare(2)).accepted
    forks = line.forks
    for data in old:
        line.replay(data)
    assert line.forks == forks
    (job,) = line.world.driver.state.jobs.values()
    assert job.attempt == 2


def test_an_agent_reports_durable_parts_of_its_own_ranks_only() -> None:
    """A machine that speaks for another's rank could put weights of its own into a checkpoint."""
    stage = plans.with_open()
    stage.durable("a")
    record = stage.opened
    mine = stage.workers[AgentName("a")].value
    forged = make_part(record, 1, manifest="elsewhere")
    stage.put_snapshot(replace(mine, durable=(*mine.durable, forged)))
    stage.decide()
    assert "1 of 2 ranks durable" in stage.said
    stranger = replace(mine, agent=AgentName("mallory"), durable=(forged,))
    stage.put_snapshot(stranger)
    stage.decide()
    assert "1 of 2 ranks durable" in stage.said
    stage.durable("b")
    stage.decide()
    assert "1 of 2 ranks durable" not in stage.said


def test_a_strangers_unreadable_snapshot_holds_up_no_job() -> None:
    etcd = Etcd()
    etcd.put(KEYS.spec(JOB), spec())
    etcd.put(KEYS.status(JOB), status(members=(Member(A1, 0, Rank(0), 1),)))
    etcd.put(KEYS.worker(A1, JOB), snapshot())
    etcd.put(KEYS.worker(AgentName("mallory"), JOB), b"[" * 1000)
    view = etcd.world.job_view(JOB)
    assert view.quarantined == ""
    assert list(view.workers) == [A1]
    # A member's own is another matter: what it runs is not known.
    etcd.put(KEYS.worker(A1, JOB), b"{}")
    assert etcd.world.job_view(JOB).quarantined != ""
