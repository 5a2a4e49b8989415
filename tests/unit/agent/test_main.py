"""One agent as it is wired, over the model of etcd."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dtrain.agent import config
from dtrain.agent.main import Agent
from dtrain.protocol import codec, wire
from dtrain.protocol.commands import Header, Prepare, Stop
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Rank, Term, Uid
from dtrain.protocol.job import Entry, EntryKind, JobSpec
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.snapshot import NodeRecord
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import put_if_absent
from dtrain.storage.etcd.session import FixedSession

CLUSTER = ClusterName("default")
LEASE = 7


class Machine:
    """A running agent and a caller of it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.etcd = MemoryEtcd(time.monotonic)
        self.etcd.grant(600, LEASE)
        arguments = ["--name", "a1", "--host", "127.0.0.1", "--slots", "1", "--data-dir", str(folder), *flags]
        self.agent = Agent(
            config.load(arguments, {}),
            self.etcd,
            FixedSession(LEASE),
            clock=SystemClock(),
            end_process=lambda code: pytest.fail(f"the agent ended with {code}"),
        )
        self.thread = threading.Thread(target=self.agent.run)
        self.thread.start()
        self.channel = grpc.insecure_channel(self.agent.address)

    def command(self, term: int) -> pb.Ack:
        header = Header(CLUSTER, Term(term), JobName("job"), Uid("u1"), Attempt(1), f"stop.{term}")
        stub = agent_pb2_grpc.AgentStub(self.channel)  # type: ignore[no-untyped-call]
        command = wire.command_to_pb(Stop(header, 0.0, release=True, why="test"))
        ack: pb.Ack = stub.Execute(command, timeout=10.0, wait_for_ready=True)
        return ack

    def prepare(self) -> pb.Ack:
        term = self.etcd.txn(put_if_absent(Keys(CLUSTER).leader, b"{}", LEASE)).revision
        header = Header(CLUSTER, Term(term), JobName("job"), Uid("u1"), Attempt(1), "prepare.1")
        spec = JobSpec(JobName("job"), Uid("u1"), Entry(EntryKind.SCRIPT, "train.py"))
        stub = agent_pb2_grpc.AgentStub(self.channel)  # type: ignore[no-untyped-call]
        command = wire.command_to_pb(Prepare(header, spec, "", 0, 1, Rank(0), 1, serve_store=True))
        ack: pb.Ack = stub.Execute(command, timeout=10.0, wait_for_ready=True)
        return ack

    def close(self) -> None:
        self.channel.close()
        self.agent.stop()
        self.thread.join(20)
        self.agent.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.close()


def test_a_term_counts_only_if_etcd_says_that_it_leads(machine: Machine) -> None:
    assert "could not be confirmed" in machine.command(10**6).message
    term = machine.etcd.txn(put_if_absent(Keys(CLUSTER).leader, b"{}", LEASE)).revision
    assert machine.command(term).accepted
    refused = machine.command(term + 1)
    assert not refused.accepted
    assert "could not be confirmed" in refused.message
    assert "is over" in machine.command(term - 1).message


@pytest.fixture
def preempted(tmp_path: Path) -> Iterator[tuple[Machine, Path]]:
    """An agent on a machine that is to go already when it starts, and the file that says so."""
    file = tmp_path / "preempted"
    file.write_text("spot market")
    made = Machine(tmp_path / "data", "--preemption-notice", str(file), "--preemption-interval", "0.1")
    yield made, file
    made.close()


def test_a_machine_that_is_to_go_says_so_before_anything_is_placed_there_and_stays_until_it_goes(
    preempted: tuple[Machine, Path],
) -> None:
    machine, file = preempted

    def await_node() -> NodeRecord:
        end = time.monotonic() + 20
        while not (found := machine.etcd.range(Keys(CLUSTER).node(AgentName("a1"))).items):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert found[0].version == 1, "it has never been there without the wish"
        return codec.decode(NodeRecord, found[0].value)

    draining = await_node().draining
    assert draining is not None
    assert draining.reason == "preemption notice: spot market"
    assert draining.grace_s == 60.0
    machine.thread.join(1.0)
    assert machine.thread.is_alive(), "it would be started again, for nothing"
    assert "draining" in machine.prepare().message
    file.unlink()
    machine.thread.join(20)
    assert not machine.thread.is_alive(), "whoever supervises it starts one that may have ranks again"


def test_a_preempted_agent_that_is_told_to_end_does_not_stay(preempted: tuple[Machine, Path]) -> None:
    machine, _ = preempted
    machine.agent.drain()
    machine.thread.join(20)
    assert not machine.thread.is_alive()
