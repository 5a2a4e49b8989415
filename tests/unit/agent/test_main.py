"""One agent as it is wired, over the model of etcd."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dtrain.agent import config
from dtrain.agent.main import Agent
from dtrain.protocol import wire
from dtrain.protocol.commands import Header, Stop
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Term, Uid
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import put_if_absent
from dtrain.storage.etcd.session import FixedSession

CLUSTER = ClusterName("default")
LEASE = 7


class Machine:
    """A running agent and a caller of it."""

    def __init__(self, folder: Path) -> None:
        self.etcd = MemoryEtcd(time.monotonic)
        self.etcd.grant(600, LEASE)
        arguments = ["--name", "a1", "--host", "127.0.0.1", "--slots", "1", "--data-dir", str(folder)]
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
