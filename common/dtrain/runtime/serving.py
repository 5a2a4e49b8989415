"""The port for probes and metrics: a few read-only pages over plain HTTP. Standard library only.

One thread serves all connections and blocks on none of them, so slow or rude
clients cost neither threads nor other clients' answers: there is a bound on
connections (the oldest gives way), on the request, and on the time from accept
to close. Pages run on that thread: they show values that others have published
and wait for nothing. Nobody is asked who they are, so nothing that needs
protection may be on a page.
"""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

FD_VARIABLE = "DTRAIN_HEALTH_FD"
"""Names the descriptor of a socket that listens already, to a child process."""

CONNECTIONS_MAX = 32
REQUEST_BYTES_MAX = 8 * 1024
DEADLINE_S = 3.0
"""From accept to close: more than any probe waits."""

ACCEPT_PAUSE_S = 0.2
"""When no descriptor is left; the port stays readable all the time."""

_LOOK_S = 60.0


@dataclass(frozen=True, slots=True)
class Page:
    """An answer: status and body."""

    status: int
    body: bytes
    content_type: str = "application/json"


Pages = Mapping[str, Callable[[], Page]]


def verdict(name: str, good: bool, reasons: list[str], **facts: Any) -> Page:
    """Return the page of a probe: 200 or 503, and a JSON object with ``name`` and the reasons."""
    body = json.dumps({name: good, "reasons": reasons, **facts}) + "\n"
    return Page(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, body.encode())


LOOP_S_MAX = 30.0
"""Far more than any turn takes: the guardian has killed a process that stands still long before."""


def live(loop_age_s: float) -> Page:
    """Return the page that says whether a daemon's loop comes round."""
    good = loop_age_s < LOOP_S_MAX
    return verdict("live", good, [] if good else [f"the loop has stood still for {loop_age_s:.0f} s"])


def check_listen(listen: str) -> None:
    """Refuse what is no host:port; "" is none at all.

    Raises:
        Refused: BAD_SETTING.
    """
    host, _, port = listen.rpartition(":")
    if listen and not (host and port.isdecimal() and int(port) < 65536):
        raise Refused(
            ErrorCode.BAD_SETTING, f"--health-listen cannot be {listen!r}", fix="use host:port, or nothing"
        )


def bind(listen: str) -> socket.socket:
    """Return a socket that listens at host:port and never blocks.

    Raises:
        Refused: PORT_IN_USE.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        if host == "::":
            listener = socket.create_server(
                ("::", int(port)), family=socket.AF_INET6, backlog=CONNECTIONS_MAX, dualstack_ipv6=True
            )
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, int(port)), family=family, backlog=CONNECTIONS_MAX)
    except (OSError, ValueError) as error:
        raise Refused(
            ErrorCode.PORT_IN_USE,
            f"{listen} cannot be listened on",
            cause=str(error),
            fix="choose another address with --health-listen, or stop what listens there",
        ) from error
    listener.setblocking(False)
    return listener


def inherited(environ: MutableMapping[str, str]) -> socket.socket | None:
    """Return the listening socket that the parent passed on, and forget that it did; None: it passed none."""
    fd = environ.pop(FD_VARIABLE, "")
    if not fd.isdecimal():
        return None
    os.set_inheritable(int(fd), False)
    listener = socket.socket(fileno=int(fd))
    listener.setblocking(False)
    return listener


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    until: float
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None
    answered: bool = False
    """All is sent; what the client still says is read and thrown away, or it might never read the answer."""


class StatusServer:
    """Serves ``pages`` by path on ``listener``, which it closes in the end. ``run`` is a thread's body.

    ``report`` gets an event and its fields: a page that failed. ``gives_way`` is asked before each
    connection is accepted: True leaves it to a process that has the same socket. Once it is
    False again, say so by ``look``.
    """

    def __init__(
        self,
        listener: socket.socket,
        pages: Pages,
        *,
        report: Callable[..., Any],
        monotonic: Callable[[], float] = time.monotonic,
        gives_way: Callable[[], bool] = lambda: False,
    ) -> None:
        self._listener = listener
        self._gives_way = gives_way
        self._pages = pages
        self._report = report
        self._monotonic = monotonic
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        """By descriptor, the oldest first."""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = False
        self._accept_at: float | None = None
        self._failed: set[str] = set()

    @property
    def address(self) -> str:
        """The host:port that was bound."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def look(self) -> None:
        """Ask ``gives_way`` again now. Any thread."""
        self._wake()

    def close(self) -> None:
        """Have ``run`` return, soon. Any thread."""
        self._closing = True
        self._wake()

    def run(self) -> None:
        """Serve until ``close``."""
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        try:
            while not self._closing:
                self._watch_listener()
                for key, _ in self._selector.select(self._wait_s()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._wake_read:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_read.recv(4096)
                    elif key.fd in self._connections:
                        self._serve(self._connections[key.fd])
                self._drop_late()
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._selector.close()
            self._listener.close()
            self._wake_read.close()
            self._wake_write.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def _watch_listener(self) -> None:
        if self._accept_at is not None and self._monotonic() >= self._accept_at:
            self._accept_at = None
        wanted = self._accept_at is None and not self._gives_way()
        registered = self._listener.fileno() in self._selector.get_map()
        if wanted and not registered:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif registered and not wanted:
            self._selector.unregister(self._listener)

    def _wait_s(self) -> float:
        instants = [connection.until for connection in self._connections.values()]
        if self._accept_at is not None:
            instants.append(self._accept_at)
        return min(_LOOK_S, max(0.0, min(instants) - self._monotonic())) if instants else _LOOK_S

    def _accept(self) -> None:
        if self._gives_way():
            return
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            # Another process took it, or the client has gone again.
            return
        except OSError:
            self._accept_at = self._monotonic() + ACCEPT_PAUSE_S
            return
        while len(self._connections) >= CONNECTIONS_MAX:
            self._drop(next(iter(self._connections.values())))
        accepted.setblocking(False)
        self._connections[accepted.fileno()] = _Connection(accepted, self._monotonic() + DEADLINE_S)
        self._selector.register(accepted, selectors.EVENT_READ)

    def _serve(self, connection: _Connection) -> None:
        try:
            if connection.answer is not None:
                self._send(connection)
                return
            received = connection.socket.recv(REQUEST_BYTES_MAX)
            if not received:
                self._drop(connection)
                return
            if connection.answered:
                return
            connection.request += received
            if b"\r\n\r\n" in connection.request or b"\n\n" in connection.request:
                connection.answer = memoryview(self._answer(bytes(connection.request)))
            elif len(connection.request) > REQUEST_BYTES_MAX:
                too_much = _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request is too long")
                connection.answer = memoryview(_response(too_much, with_body=True))
            else:
                return
            self._send(connection)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(connection)

    def _send(self, connection: _Connection) -> None:
        assert connection.answer is not None
        try:
            sent = connection.socket.send(connection.answer)
        except (BlockingIOError, InterruptedError):
            sent = 0
        connection.answer = connection.answer[sent:]
        if connection.answer:
            self._selector.modify(connection.socket, selectors.EVENT_WRITE)
            return
        connection.answer, connection.answered = None, True
        connection.socket.shutdown(socket.SHUT_WR)
        self._selector.modify(connection.socket, selectors.EVENT_READ)

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b"\n", 1)[0].decode("latin-1").split()
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(_plain(HTTPStatus.BAD_REQUEST, "this is no HTTP/1 request"), with_body=True)
        method, path = words[0], words[1].split("?", 1)[0]
        if method not in ("GET", "HEAD"):
            return _response(_plain(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD"), with_body=True)
        page = self._pages.get(path)
        if page is None:
            known = _plain(HTTPStatus.NOT_FOUND, "there is " + ", ".join(self._pages))
            return _response(known, with_body=method == "GET")
        try:
            found = page()
        except Exception as error:  # noqa: BLE001 - a page that fails is one failed probe, not the end of all
            found = _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "this page failed; the log says why")
            if path not in self._failed:
                self._report("status page failed", path=path, error=f"{type(error).__name__}: {error}")
            self._failed.add(path)
        return _response(found, with_body=method == "GET")

    def _drop_late(self) -> None:
        now = self._monotonic()
        for connection in [one for one in self._connections.values() if one.until <= now]:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        self._selector.unregister(connection.socket)
        connection.socket.close()


def _plain(status: HTTPStatus, text: str) -> Page:
    return Page(status, text.encode() + b"\n", "text/plain; charset=utf-8")


def _response(page: Page, *, with_body: bool) -> bytes:
    status = HTTPStatus(page.status)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (page.body if with_body else b"")
