"""The bytes of blobs between memory and socket, past what boto3 would do with them.

boto3 builds, signs and parses; its ``before-send`` event lets this module send
the requests that carry a blob's bytes, and those around them. What that saves is the
copy of the body, its reading in small pieces and the copies of an answer: most of
the client's CPU. What it adds is a pace, and an end that needs no timeout.

Only the standard library is used. A request that a proxy must carry is left to
boto3's own connections.
"""

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from dtrain.storage.blobs.flow import PIECE_BYTES, Flow

IDLE_MAX = 32
"""Connections to one server that are kept for the next request."""

ERROR_BYTES_MAX = 1024 * 1024


class Prepared(Protocol):
    """What is used of botocore's ``AWSPreparedRequest``."""

    method: str
    url: str
    headers: Mapping[str, str | bytes]
    body: Any


class Body:
    """A request's body for boto3: its length, and, should boto3 have to send it after all, its bytes."""

    def __init__(self, view: memoryview, flow: Flow, *, paced: bool = True) -> None:
        self.view = view
        self.flow = flow
        self.paced = paced
        self._at = 0

    def __len__(self) -> int:
        return len(self.view)

    def read(self, size: int = -1) -> bytes:
        end = len(self.view) if size < 0 else min(len(self.view), self._at + size)
        self.flow.admit(end - self._at)
        data = bytes(self.view[self._at : end])
        self._at = end
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self.view)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


class Plain:
    """A request that belongs to a write without carrying its bytes: it ends when the write does."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow


class Target:
    """Where an answer's body goes. ``received`` None: boto3 has it, read it from there."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.received: int | None = None


class Raw(io.BytesIO):
    """The rest of an answer, as botocore's ``AWSResponse`` reads it."""

    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        yield self.read()


class CutShort(OSError):
    """The connection ended within the answer."""


class Wire:
    """Connections of one client; safe for several threads, not for use across a fork.

    Args:
        answer: builds botocore's response from url, status, headers and the rest.
        proxied: says whether a URL is reached through a proxy.
        tls: for https; None: the first https request is left to boto3.
    """

    def __init__(
        self,
        answer: Callable[[str, int, dict[str, str], Raw], Any],
        *,
        proxied: Callable[[str], bool],
        tls: Callable[[], ssl.SSLContext],
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._answer = answer
        self._proxied = proxied
        self._make_tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._through_proxy: dict[tuple[str, str], bool] = {}
        self._local = threading.local()

    @contextlib.contextmanager
    def carrying(self, load: Body | Plain | Target | None) -> Iterator[None]:
        """Let the request that this thread makes in the block send or fill ``load``; None: leave it alone."""
        before = getattr(self._local, "load", None)
        self._local.load = load
        try:
            yield
        finally:
            self._local.load = before

    def before_send(self, request: Prepared, **_: object) -> Any:
        """Carry the request out, if it is one of ours; None leaves it to boto3."""
        load: Body | Plain | Target | None = getattr(self._local, "load", None)
        if load is None:
            return None
        if isinstance(load, Plain):
            load = Body(memoryview(request.body or b""), load.flow, paced=False)
        url = urlsplit(request.url)
        place = (url.scheme, url.netloc)
        with self._lock:
            if place not in self._through_proxy:
                self._through_proxy[place] = self._proxied(request.url)
            if self._through_proxy[place]:
                return None
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection = self._connection(place)
        keep = False
        try:
            if isinstance(load, Body):
                with load.flow.breaking(lambda: _break(connection)):
                    response = self._send(connection, request, path, load)
                    rest = response.read(ERROR_BYTES_MAX)
            else:
                response = self._send(connection, request, path, None)
                rest = _receive(response, load)
            keep = response.isclosed() and not response.will_close
        finally:
            if keep:
                self._give_back(place, connection)
            else:
                connection.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return self._answer(request.url, response.status, headers, Raw(rest))

    def close(self) -> None:
        """Close the connections that are idle."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, request: Prepared, path: str, body: Body | None
    ) -> http.client.HTTPResponse:
        connection.putrequest(request.method, path, skip_accept_encoding=True)
        for name, value in request.headers.items():
            # Without "Expect": one round trip less, and an early refusal is read all the same.
            if name.lower() not in ("expect", "host"):
                connection.putheader(name, value)
        connection.endheaders()
        if body is not None:
            try:
                for start in range(0, len(body.view), PIECE_BYTES):
                    piece = body.view[start : start + PIECE_BYTES]
                    if body.paced:
                        body.flow.admit(len(piece))
                    connection.sock.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                # A server that refuses does not wait for the body, and its reason may have arrived.
                with contextlib.suppress(http.client.HTTPException, OSError):
                    response = connection.getresponse()
                    response.will_close = True
                    return response
                raise
        return connection.getresponse()

    def _connection(self, place: tuple[str, str]) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                idle = self._idle.get(place)
                if not idle:
                    break
                connection = idle.pop()
            # A connection that has something to say while nothing was asked says goodbye.
            if connection.sock is not None and not _speaks(connection.sock):
                return connection
            connection.close()
        scheme, netloc = place
        if scheme == "https":
            with self._lock:
                if self._tls is None:
                    self._tls = self._make_tls()
            connection = http.client.HTTPSConnection(
                netloc, timeout=self._connect_timeout_s, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(netloc, timeout=self._connect_timeout_s)
        try:
            connection.connect()
            connection.sock.settimeout(self._timeout_s)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except BaseException as error:
            connection.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise
            if isinstance(error, OSError):
                raise NotConnected(f"{netloc}: {error}") from error
            raise
        return connection

    def _give_back(self, place: tuple[str, str], connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(place, [])
            if len(idle) < IDLE_MAX:
                idle.append(connection)
                return
        connection.close()


class NotConnected(OSError):
    """No connection was made: nothing was sent."""


def _receive(response: http.client.HTTPResponse, target: Target) -> bytes:
    """Fill the target from an answer that has the bytes; return the body of any other."""
    if response.status != http.client.PARTIAL_CONTENT:
        # 200 would be the whole blob, whatever its size: the caller refuses it unread.
        return b"" if response.status == http.client.OK else response.read(ERROR_BYTES_MAX)
    length = response.length
    wanted = len(target.view) if length is None else min(length, len(target.view))
    received = 0
    while received < wanted:
        count = response.readinto(target.view[received:wanted])
        if not count:
            if length is None:
                break
            raise CutShort(f"the answer ended after {received} of {length} bytes")
        received += count
    target.received = received
    return b""


def _speaks(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _break(connection: http.client.HTTPConnection) -> None:
    # Not closed here: its thread may be about to use the descriptor, which could be another's by then.
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)
