"""Commands over real gRPC to agents that answer, refuse, freeze or are not there."""

import queue
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace

import grpc
import pytest

from dtrain.coordinator.core.decisions import Directed
from dtrain.coordinator.dispatch import REFUSED, TIMED_OUT, Channels, Dispatcher
from dtrain.protocol.commands import BeginCheckpoint, Command, Header, Start, Stop
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Seq, Step, Term, Uid
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.pb import agent_pb2_grpc

Answer = tuple[Directed, bool, str]


class FakeAgent(agent_pb2_grpc.AgentServicer):
    """Accepts commands, unless it is frozen or of another opinion."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.got: queue.SimpleQueue[pb.Command] = queue.SimpleQueue()
        self.thawed = threading.Event()
        self.thawed.set()
        self.opinion = ""
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        agent_pb2_grpc.add_AgentServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(address)}"
        self.server.start()

    def Execute(self, request: pb.Command, context: grpc.ServicerContext) -> pb.Ack:  # noqa: N802
        self.got.put(request)
        self.thawed.wait(10)
        return pb.Ack(accepted=not self.opinion, message=self.opinion)

    def close(self) -> None:
        self.thawed.set()
        self.server.stop(0).wait()


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    fake = FakeAgent()
    yield fake
    fake.close()


@pytest.fixture
def answers() -> "queue.Queue[Answer]":
    return queue.Queue()


@pytest.fixture
def dispatcher(answers: "queue.Queue[Answer]") -> Iterator[Dispatcher]:
    channels = Channels()
    made = Dispatcher(channels, lambda *answer: answers.put(answer), deadline_s=1.0)
    yield made
    made.close()
    channels.close()


def header(ident: str) -> Header:
    return Header(ClusterName("c1"), Term(5), JobName("job"), Uid("u1"), Attempt(1), ident)


def to(address: str, command: Command, name: str = "a1") -> Directed:
    return Directed(AgentName(name), address, command)


def start(ident: str = "start") -> Start:
    return Start(header(ident), "h:1", None)


def test_an_accepted_command_is_reported(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    directed = to(agent.address, start())
    dispatcher.send(directed)
    assert answers.get(timeout=5) == (directed, True, "")
    assert agent.got.get().header.term == 5


def test_a_refusal_is_told_apart_from_silence(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    agent.opinion = "a higher term is known"
    dispatcher.send(to(agent.address, start()))
    _, ok, problem = answers.get(timeout=5)
    assert (ok, problem) == (False, "rejected: a higher term is known")


def test_a_refused_connection_is_reported_at_once(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    agent.close()
    dispatcher.send(to(agent.address, start()))
    assert answers.get(timeout=1.5)[1:] == (False, REFUSED)


def test_an_agent_that_has_just_come_back_is_reached_at_once(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    """Its former life's channel pauses between tries to connect, and refuses everything meanwhile."""
    agent.close()
    old = replace(to(agent.address, start("old")), incarnation="i1")
    for _ in range(20):
        dispatcher.send(old)
        assert answers.get(timeout=1.5)[1:] == (False, REFUSED)
    back = FakeAgent(agent.address)
    try:
        directed = replace(to(agent.address, start("new")), incarnation="i2")
        dispatcher.send(directed)
        assert answers.get(timeout=5) == (directed, True, "")
    finally:
        back.close()


def test_a_frozen_agent_delays_no_other(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    frozen = FakeAgent()
    frozen.thawed.clear()
    try:
        dispatcher.send(to(frozen.address, start(), "frozen"))
        dispatcher.send(to(agent.address, start()))
        assert answers.get(timeout=1.5)[0].agent == "a1"
        directed, ok, problem = answers.get(timeout=5)
        assert (directed.agent, ok, problem) == ("frozen", False, TIMED_OUT)
    finally:
        frozen.close()


def test_a_frozen_agent_times_out_however_often_the_command_is_repeated(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    agent.thawed.clear()
    directed = to(agent.address, start())
    for _ in range(20):
        dispatcher.send(directed)
        try:
            answer = answers.get(timeout=0.1)
        except queue.Empty:
            continue
        assert answer == (directed, False, TIMED_OUT)
        return
    pytest.fail("repeating the command kept its call from timing out")


def test_a_newer_command_of_the_attempt_replaces_the_one_in_flight(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    agent.thawed.clear()
    dispatcher.send(to(agent.address, start()))
    agent.got.get(timeout=5)
    stop = to(agent.address, Stop(header("stop"), 1.0, False, ""))
    dispatcher.send(stop)
    agent.got.get(timeout=5)
    agent.thawed.set()
    assert answers.get(timeout=5) == (stop, True, "")
    assert answers.empty(), "the one that was replaced is not reported"


def test_a_checkpoint_does_not_cancel_the_attempts_command(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    agent.thawed.clear()
    dispatcher.send(to(agent.address, start()))
    dispatcher.send(to(agent.address, BeginCheckpoint(header("b1"), Seq(1), "n", Step(4))))
    dispatcher.send(to(agent.address, BeginCheckpoint(header("b2"), Seq(2), "n", Step(5))))
    for _ in range(3):
        agent.got.get(timeout=5)
    agent.thawed.set()
    assert {answers.get(timeout=5)[0].command.header.id for _ in range(3)} == {"start", "b1", "b2"}


def test_an_agent_that_moved_is_called_at_its_new_address(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    moved = FakeAgent()
    try:
        dispatcher.send(to(agent.address, start("one")))
        assert answers.get(timeout=5)[1]
        dispatcher.send(to(moved.address, start("two")))
        assert answers.get(timeout=5)[1]
        assert moved.got.get(timeout=1).header.id == "two"
    finally:
        moved.close()


def test_after_close_nothing_leaves(agent, dispatcher, answers) -> None:  # type: ignore[no-untyped-def]
    dispatcher.close()
    dispatcher.send(to(agent.address, start()))
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.2)
    assert agent.got.empty()
