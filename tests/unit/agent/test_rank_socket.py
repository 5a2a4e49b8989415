"""The rank server over a real Unix socket."""

import dataclasses
import queue
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.agent.core.events import Event, RankConnected, RankDisconnected, RankReported
from dtrain.agent.rank_socket import OUTBOX_BYTES_MAX, RankServer, short_run_dir
from dtrain.protocol.ids import Attempt, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import (
    LINE_BYTES_MAX,
    Hello,
    Outcome,
    Report,
    Welcome,
    decode_line,
    encode_line,
)
from dtrain.protocol.snapshot import WorkerPhase

HELLO = Hello(1, JobName("train"), Uid("u1"), Attempt(1), Rank(0), 0, 4711)
REPORT = Report(WorkerPhase.TRAINING, Step(3))


class Bench:
    def __init__(self, path: Path) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.refusals: list[str] = []
        self.server = RankServer(path, self.events.put, on_refusal=self.refusals.append)
        self.server.start()
        self.clients: list[socket.socket] = []

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect(str(self.server.path))
        self.clients.append(client)
        return client

    def next(self) -> Event:
        return self.events.get(timeout=5)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(short_run_dir(tmp_path) / "ranks.sock")
    yield bench
    for client in bench.clients:
        client.close()
    bench.server.close()


def test_hello_reports_and_end_arrive_in_order(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(encode_line(HELLO) + encode_line(REPORT))
    assert bench.next() == RankConnected(1, HELLO)
    assert bench.next() == RankReported(1, REPORT)
    client.close()
    assert bench.next() == RankDisconnected(1)


def test_a_line_in_pieces_is_one_line(bench: Bench) -> None:
    client = bench.connect()
    for byte in encode_line(HELLO):
        client.send(bytes([byte]))
    assert bench.next() == RankConnected(1, HELLO)


def test_messages_reach_the_right_rank(bench: Bench) -> None:
    first, second = bench.connect(), bench.connect()
    first.sendall(encode_line(HELLO))
    number = bench.next()
    assert isinstance(number, RankConnected)
    second.sendall(encode_line(HELLO))
    bench.next()
    bench.server.send(number.connection, Welcome(True, True))
    assert decode_line(first.makefile("rb").readline()) == Welcome(True, True)


def test_a_zombie_hears_why_before_its_connection_closes(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(encode_line(HELLO))
    bench.next()
    bench.server.send(1, Welcome(False, False, "attempt 1 is over"))
    bench.server.drop(1)
    file = client.makefile("rb")
    assert decode_line(file.readline()) == Welcome(False, False, "attempt 1 is over")
    assert file.readline() == b""
    assert bench.next() == RankDisconnected(1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x80\x04\x95\x00\n",
        b'{"type": "Hello"}\n',
        encode_line(Outcome(Seq(1), True, False)),
        encode_line(REPORT),
        b"x" * (LINE_BYTES_MAX + 2),
    ],
)
def test_garbage_closes_the_connection_and_nothing_else(bench: Bench, garbage: bytes) -> None:
    good, bad = bench.connect(), bench.connect()
    try:
        bad.sendall(garbage)
        assert bad.recv(10) == b""
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert len(bench.refusals) == 1
    good.sendall(encode_line(HELLO))
    event = bench.next()
    assert isinstance(event, RankConnected)


def test_a_script_of_another_major_version_is_refused_in_clear_words(bench: Bench) -> None:
    good, newer = bench.connect(), bench.connect()
    newer.sendall(encode_line(dataclasses.replace(HELLO, v=2)))
    assert newer.recv(10) == b""
    assert bench.refusals == [
        "rank 0 of train speaks version 2 of the rank link; this agent speaks version 1"
    ]
    good.sendall(encode_line(HELLO))
    assert isinstance(bench.next(), RankConnected)


def test_a_second_hello_closes_the_connection(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(encode_line(HELLO) * 2)
    assert isinstance(bench.next(), RankConnected)
    assert bench.next() == RankDisconnected(1)


def test_a_rank_that_does_not_read_is_let_go(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(encode_line(HELLO))
    bench.next()
    message = Welcome(True, True, "x" * 500_000)
    for _ in range(2 + OUTBOX_BYTES_MAX // 500_000):
        bench.server.send(1, message)
    assert bench.next() == RankDisconnected(1)


def test_only_this_user_may_connect(bench: Bench) -> None:
    assert bench.server.path.stat().st_mode & 0o777 == 0o600
    assert bench.server.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_long_data_dir_gets_a_short_and_stable_socket_folder(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 60) / ("e" * 60)
    folder = short_run_dir(long)
    try:
        assert len(str(folder / "ranks.sock")) <= 107
        assert short_run_dir(long) == folder
        assert short_run_dir(long / "other") != folder
    finally:
        folder.rmdir()
        short_run_dir(long / "other").rmdir()
