"""The agent's service over real gRPC."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dtrain.agent.core.decisions import Answer
from dtrain.agent.link import AgentServer, AgentServicer
from dtrain.agent.logs import RankLogs
from dtrain.protocol import wire
from dtrain.protocol.commands import Command
from dtrain.protocol.errors import ErrorCode, Refused, Unavailable
from dtrain.protocol.ids import Attempt, JobName, Rank, Term, Uid
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.protocol.snapshot import Stack, StackKind

from .core_builder import Table


class Bench:
    def __init__(self, root: Path) -> None:
        self.taken: list[Command] = []
        self.problem: Exception | None = None
        self.over = False
        self.stacks: list[tuple[Stack, str]] = []
        self.server = AgentServer("127.0.0.1:0")
        logs = RankLogs(root)
        logs.prepare(JobName("train"), Uid("u1"), Attempt(1), Rank(0))
        self.log = root / "train-u1" / "attempt_1" / "0" / "stdout.log"
        self.log.parent.mkdir()
        servicer = AgentServicer(
            self._execute, logs, lambda *_: self.over, lambda: Term(7), lambda *_: self.stacks
        )
        self.server.start(servicer)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = agent_pb2_grpc.AgentStub(self.channel)  # type: ignore[no-untyped-call]

    def _execute(self, command: Command) -> Answer:
        if self.problem:
            raise self.problem
        self.taken.append(command)
        return Answer(command.header.attempt == 1, "why")

    def read(self, **more: int | str) -> pb.LogChunk:
        request = pb.ReadLogRequest(**{"job": "train", "uid": "u1", "stream": "stdout", **more})  # type: ignore[arg-type]
        chunk: pb.LogChunk = self.stub.ReadLog(request, timeout=15)
        return chunk


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.channel.close()
    bench.server.stop()


def test_every_command_arrives_as_it_was_sent(bench: Bench) -> None:
    table = Table()
    commands = [
        table.prepare(),
        table.start(),
        table.begin(),
        table.abort(),
        table.confirm(final=True),
        table.stop(release=True),
    ]
    for command in commands:
        ack = bench.stub.Execute(wire.command_to_pb(command), timeout=5)
        assert (ack.accepted, ack.term) == (True, 7)
    assert bench.taken == commands


def test_a_refusal_is_an_answer_and_not_an_error(bench: Bench) -> None:
    ack = bench.stub.Execute(wire.command_to_pb(Table().prepare(2)), timeout=5)
    assert (ack.accepted, ack.message) == (False, "why")


def test_an_unknown_command_is_refused_with_a_reason(bench: Bench) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        bench.stub.Execute(pb.Command(header=pb.Header(cluster="test")), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_busy_agent_asks_to_come_back(bench: Bench) -> None:
    bench.problem = Unavailable(ErrorCode.AGENT_UNAVAILABLE, "busy")
    with pytest.raises(grpc.RpcError) as caught:
        bench.stub.Execute(wire.command_to_pb(Table().prepare()), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_log_is_read_to_its_end(bench: Bench) -> None:
    bench.log.write_text("one\ntwo\n")
    bench.over = True
    first = bench.read(bytes_max=4)
    assert (first.data, first.eof, first.attempt) == (b"one\n", False, 1)
    second = bench.read(offset=first.next_offset)
    assert (second.data, second.eof) == (b"two\n", True)
    assert bench.read(offset=-4).data == b"two\n"


def test_a_reader_waits_for_new_lines(bench: Bench) -> None:
    bench.log.write_text("one\n")

    def write() -> None:
        time.sleep(0.3)
        with bench.log.open("a") as file:
            file.write("two\n")

    writer = threading.Thread(target=write)
    writer.start()
    began = time.monotonic()
    chunk = bench.read(offset=4, wait_ms=10_000)
    writer.join()
    assert chunk.data == b"two\n"
    assert time.monotonic() - began < 5


def test_a_waiting_reader_hears_of_the_end(bench: Bench) -> None:
    bench.log.write_text("")
    timer = threading.Timer(0.2, lambda: setattr(bench, "over", True))
    timer.start()
    assert bench.read(wait_ms=10_000).eof


def test_waiting_readers_do_not_hold_up_commands(bench: Bench) -> None:
    bench.log.write_text("")
    calls = [
        bench.stub.ReadLog.future(
            pb.ReadLogRequest(job="train", uid="u1", stream="stdout", wait_ms=10_000), timeout=15
        )
        for _ in range(12)
    ]
    time.sleep(0.6)
    began = time.monotonic()
    assert bench.stub.Execute(wire.command_to_pb(Table().prepare()), timeout=5).accepted
    assert time.monotonic() - began < 2
    bench.over = True
    for call in calls:
        call.result()


def test_no_name_leads_out_of_the_log_folder(bench: Bench) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        bench.read(job="../../etc")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        bench.read(rank=9)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_port_in_use_is_refused_with_advice(bench: Bench) -> None:
    with pytest.raises(Refused) as caught:
        AgentServer(f"127.0.0.1:{bench.server.port}")
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert "--listen" in caught.value.fix


def test_stacks_are_given_in_short_and_in_full(bench: Bench) -> None:
    bench.stacks = [(Stack(Rank(0), StackKind.DATA, "read (data.py:7)", ""), "Thread 1\n")]
    (one,) = bench.stub.Stacks(pb.StacksRequest(job="train", uid="u1"), timeout=5).ranks
    assert (one.rank, one.kind, one.where, one.text) == (0, "data", "read (data.py:7)", "Thread 1\n")
