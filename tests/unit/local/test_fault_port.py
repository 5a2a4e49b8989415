"""Faults over the Unix socket: what is asked is done, what is broken is healed when its connection ends."""

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.local.fault_port import FaultServer, RemoteBreaker
from dtrain.local.faults import Fault, Kind, Part
from dtrain.protocol.errors import ErrorCode, NotFound, Unavailable

CUT = Fault(Kind.CUT, Part.AGENT, "a1", way="to etcd")
SLOW = Fault(Kind.SLOW, Part.LEADER, "c1", delay_s=0.25)


class Book:
    def __init__(self) -> None:
        self.broken: list[Fault] = []
        self.closed = threading.Event()

    def cannot(self, kind: Kind, part: Part) -> str:
        return "no" if part is Part.MACHINE else ""

    def strike(self, fault: Fault) -> None:
        if fault.name == "a9":
            raise NotFound(ErrorCode.NOT_FOUND, "there is no a9", fix="look twice")
        self.broken.append(fault)

    def heal(self, fault: Fault) -> None:
        self.broken.remove(fault)

    def close(self) -> None:
        self.broken.clear()
        self.closed.set()


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def server(tmp_path: Path, book: Book) -> Iterator[FaultServer]:
    made = FaultServer(tmp_path, lambda: book)
    yield made
    made.close()


def test_a_fault_arrives_as_it_was_sent_and_is_healed(server: FaultServer, book: Book) -> None:
    remote = RemoteBreaker(str(server.path))
    remote.strike(CUT)
    remote.strike(SLOW)
    assert book.broken == [CUT, SLOW]
    remote.heal(CUT)
    assert book.broken == [SLOW]
    assert remote.cannot(Kind.KILL, Part.MACHINE) == "no"
    assert remote.cannot(Kind.KILL, Part.RANK) == ""
    remote.close()


def test_an_error_arrives_as_the_error_that_it_was(server: FaultServer) -> None:
    remote = RemoteBreaker(str(server.path))
    with pytest.raises(NotFound) as caught:
        remote.strike(Fault(Kind.KILL, Part.AGENT, "a9"))
    assert (caught.value.message, caught.value.fix) == ("there is no a9", "look twice")
    remote.close()


def test_what_is_broken_is_healed_when_the_connection_ends(server: FaultServer, book: Book) -> None:
    remote = RemoteBreaker(str(server.path))
    remote.strike(CUT)
    remote.close()
    assert book.closed.wait(10.0)
    assert book.broken == []


def test_closing_the_server_heals_before_it_returns(tmp_path: Path, book: Book) -> None:
    server = FaultServer(tmp_path, lambda: book)
    remote = RemoteBreaker(str(server.path))
    remote.strike(CUT)
    server.close()
    assert book.closed.is_set()
    assert not server.path.exists()
    with pytest.raises(Unavailable):
        remote.strike(SLOW)
    remote.close()
    with pytest.raises(Unavailable, match="does not answer"):
        RemoteBreaker(str(server.path))


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[]", b'{"do":"strike"}', b'{"do":"strike","fault":{"kind":"tickle","part":"rank"}}'],
)
def test_what_is_no_request_is_refused_and_the_next_one_served(server: FaultServer, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.path))
        client.sendall(line + b"\n")
        reader = client.makefile("rb")
        assert b'"ok":false' in reader.readline()
        client.sendall(b'{"id":7,"do":"cannot","kind":"kill","part":"rank"}\n')
        assert reader.readline() == b'{"v":1,"id":7,"ok":true,"why":""}\n'
        reader.close()


def test_the_socket_is_for_its_owner_alone_and_its_path_never_too_long(tmp_path: Path, book: Book) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    server = FaultServer(deep, lambda: book)
    try:
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
        assert len(os.fsencode(server.path)) < 108
    finally:
        server.close()
    assert not server.path.parent.exists()


def test_an_answer_to_an_interrupted_question_is_not_taken_for_the_next(server: FaultServer) -> None:
    remote = RemoteBreaker(str(server.path))
    # As a signal would: the question left, its answer was not read.
    remote._asked += 1
    remote._socket.sendall(b'{"id":1,"do":"strike","fault":{"kind":"kill","part":"agent","name":"a9"}}\n')
    assert remote.cannot(Kind.KILL, Part.RANK) == ""
    remote.close()
