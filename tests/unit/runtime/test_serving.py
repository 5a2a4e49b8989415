"""The status port against clients of all manners."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime import probe, serving
from dtrain.runtime.serving import CONNECTIONS_MAX, Page, StatusServer, bind, check_listen, verdict

BIG = b"x" * 3_000_000


class Port:
    """A running server and what it reported."""

    def __init__(self) -> None:
        self.reported: list[tuple[str, dict[str, Any]]] = []
        self.good = True
        self.other_serves = False
        self.server = StatusServer(
            bind("127.0.0.1:0"),
            {"/readyz": self.ready, "/broken": self.broken, "/big": lambda: Page(200, BIG, "text/plain")},
            report=lambda event, **fields: self.reported.append((event, fields)),
            gives_way=lambda: self.other_serves,
        )
        self.address = self.server.address
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def ready(self) -> Page:
        return verdict("ready", self.good, [] if self.good else ["etcd is away", "so is Ann"])

    def broken(self) -> Page:
        raise RuntimeError("a bug")

    def connect(self) -> socket.socket:
        host, port = self.address.split(":")
        return socket.create_connection((host, int(port)), timeout=20.0)

    def ask(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=20.0)
        connection.request(method, path)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def raw(self, request: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    made.server.close()
    made.thread.join(10.0)
    assert not made.thread.is_alive()


def test_a_verdict_is_a_status_and_its_reasons(port: Port) -> None:
    assert port.ask("/readyz") == (200, b'{"ready": true, "reasons": []}\n')
    port.good = False
    status, body = port.ask("/readyz?verbose=1")
    assert status == 503
    assert json.loads(body)["reasons"] == ["etcd is away", "so is Ann"]


def test_head_has_the_length_and_no_body(port: Port) -> None:
    assert port.ask("/readyz", "HEAD") == (200, b"")


def test_what_is_not_there_or_not_http_is_refused(port: Port) -> None:
    status, body = port.ask("/secrets")
    assert status == 404
    assert b"/readyz" in body
    assert port.ask("/readyz", "POST")[0] == 405
    assert port.raw(b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert port.raw(b"GET /readyz\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_request_without_end_is_refused(port: Port) -> None:
    assert port.raw(b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000).startswith(b"HTTP/1.1 431 ")


def test_a_page_that_fails_is_one_failed_probe_and_one_line(port: Port) -> None:
    for _ in range(3):
        status, body = port.ask("/broken")
        assert status == 500
        assert b"bug" not in body
    assert [event for event, _ in port.reported] == ["status page failed"]
    assert port.ask("/readyz")[0] == 200


def test_a_long_page_arrives_whole(port: Port) -> None:
    assert port.ask("/big") == (200, BIG)


def test_silent_clients_keep_nobody_from_an_answer_and_are_dropped(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "DEADLINE_S", 1.0)
    silent = [port.connect() for _ in range(3 * CONNECTIONS_MAX)]
    for connection in silent[::2]:
        connection.send(b"GET /readyz HTTP/1.1\r\n")
    assert port.ask("/readyz")[0] == 200
    for connection in silent:
        connection.settimeout(20.0)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()
    assert len(threading.enumerate()) < CONNECTIONS_MAX


def test_a_client_that_reads_nothing_is_dropped(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "DEADLINE_S", 0.5)
    with port.connect() as deaf:
        deaf.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        end = time.monotonic() + 20.0
        while port.server._connections or time.monotonic() < end - 19.5:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert port.ask("/readyz")[0] == 200


def test_a_request_in_pieces_is_understood(port: Port) -> None:
    with port.connect() as connection:
        for piece in (b"GET /rea", b"dyz HTTP/1.1\r", b"\nHost: x\r\n", b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.02)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_connections_are_left_to_another_process_while_it_answers(port: Port) -> None:
    port.other_serves = True
    other = port.server._listener.dup()
    with port.connect() as client:
        client.sendall(b"x")
        other.setblocking(True)
        other.settimeout(20.0)
        with port.connect() as second:
            accepted, _ = other.accept()
            accepted.close()
            second.close()
    other.close()
    port.server._listener.setblocking(False)
    port.other_serves = False
    port.server.look()
    assert port.ask("/readyz")[0] == 200


def test_the_first_connection_after_another_process_began_to_serve_is_already_left_to_it(port: Port) -> None:
    assert port.ask("/readyz")[0] == 200
    other = port.server._listener.dup()
    other.setblocking(True)
    other.settimeout(20.0)
    port.other_serves = True
    with port.connect() as client:
        client.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        accepted, _ = other.accept()
        accepted.sendall(b"from the other one")
        accepted.close()
        assert client.recv(65536) == b"from the other one"
    other.close()
    port.server._listener.setblocking(False)
    port.other_serves = False
    port.server.look()
    assert port.ask("/readyz")[0] == 200


def test_a_port_in_use_is_an_error_with_a_fix(port: Port) -> None:
    with pytest.raises(Refused) as caught:
        bind(port.address)
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert "--health-listen" in caught.value.fix


def test_a_socket_is_handed_to_a_child_once() -> None:
    listener = bind("127.0.0.1:0")
    environ = {serving.FD_VARIABLE: str(listener.fileno())}
    found = serving.inherited(environ)
    assert found is not None
    assert found.getsockname() == listener.getsockname()
    assert serving.inherited(environ) is None
    listener.detach()
    found.close()


@pytest.mark.parametrize("listen", ["7080", ":7080", "host:", "host:99999", "host:x"])
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(Refused):
        check_listen(listen)


def test_ipv6_is_served() -> None:
    listener = bind("[::1]:0")
    server = StatusServer(listener, {}, report=print)
    assert server.address.startswith("[::1]:")
    server.close()
    server.run()


def test_the_probe_program_tells_yes_from_no(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://{port.address}/readyz"
    assert probe.main([url]) == 0
    port.good = False
    assert probe.main([url, "--timeout", "20"]) == 1
    assert "503: etcd is away; so is Ann" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["a", "b"], ["http://h:1/x", "--timeout"], ["--help"]])
def test_the_probe_program_refuses_what_it_does_not_understand(words: list[str]) -> None:
    assert probe.main(words) == 1


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/x", "http://127.0.0.1/x", "127.0.0.1:1"])
def test_the_probe_program_asks_plain_http_at_a_port_only(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe.main([url]) == 1
    assert "is not http://HOST:PORT/PATH" in capsys.readouterr().err


def test_the_probe_program_waits_no_longer_than_it_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert probe.main([f"http://127.0.0.1:{silent.getsockname()[1]}/", "--timeout", "0.3"]) == 1
        assert time.monotonic() - began < 10.0


def test_the_probe_program_loads_little() -> None:
    code = (
        "import sys; before = set(sys.modules); import dtrain.runtime.probe;print(*set(sys.modules) - before)"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    heavy = {"http.client", "urllib.request", "ssl", "asyncio", "email", "prometheus_client", "structlog"}
    assert not loaded & heavy
    assert {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) == {"dtrain"}
