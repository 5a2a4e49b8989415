"""An S3 server that fails on cue: a proxy before a real one that knows requests by their names.

``fail("UploadPart", answer(503, "SlowDown"), times=2)`` makes the next two such
requests fail; everything else goes to the real server and back, byte by byte. What
came in is kept in ``seen``, for tests to look at.
"""

import contextlib
import http.client
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked."""

    operation: str
    at: float
    headers: Mapping[str, str]
    body_bytes: int
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def access_key(self) -> str:
        """Whose signature it carries."""
        return self.headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]


Fault = Callable[["Handler"], None]


class FaultyS3:
    """The proxy; ``tls`` makes it speak https. ``close`` it."""

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self.target = urlsplit(target).netloc
        self.seen: list[Request] = []
        self.released = threading.Event()
        """Ends every ``stall``."""
        self.tokens: dict[str, str] = {}
        """What the security token service hands out: access key and secret."""
        self.lock = threading.Lock()
        self._faults: list[tuple[str, Fault]] = []
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.faulty = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def fail(self, operation: str, fault: Fault, *, times: int = 1) -> None:
        """Have the next requests of this name fail."""
        with self.lock:
            self._faults += [(operation, fault)] * times

    def take(self, operation: str) -> Fault | None:
        """Return the fault that is due for a request, once."""
        with self.lock:
            for index, (name, fault) in enumerate(self._faults):
                if name == operation:
                    del self._faults[index]
                    return fault
        return None

    def count(self, operation: str) -> int:
        """Return how many such requests came."""
        return sum(one.operation == operation for one in self.seen)

    def await_request(self, operation: str, count: int = 1) -> None:
        """Return once so many such requests have come."""
        deadline = time.monotonic() + 30.0
        while self.count(operation) < count:
            assert time.monotonic() < deadline, f"no {operation} came"
            time.sleep(0.01)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# Faults -----------------------------------------------------------------------------


def answer(
    status: int, code: str = "", message: str = "said so", headers: Mapping[str, str] | None = None
) -> Fault:
    """Answer like this, without asking the real server; ``code`` "": without a body."""

    def fault(handler: "Handler") -> None:
        handler.read_body()
        handler.reply(status, _error(code, message) if code else b"", headers or {})

    return fault


def early(status: int, code: str) -> Fault:
    """Answer and hang up before the body has come."""

    def fault(handler: "Handler") -> None:
        handler.reply(status, _error(code, "said so"), {"Connection": "close"})
        handler.close_connection = True

    return fault


def reset_midway(handler: "Handler") -> None:
    """Take a part of the body and reset the connection."""
    handler.rfile.read(100_000)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.hang_up()


def lose_answer(handler: "Handler") -> None:
    """Do it, and hang up instead of saying so."""
    handler.forward()
    handler.hang_up()


def deny_what_was_done(code: str) -> Fault:
    """Do it, and answer 200 with an error in the body, as S3 may when it completes an upload."""

    def fault(handler: "Handler") -> None:
        handler.forward()
        handler.reply(200, _error(code, "said so"), {})

    return fault


def truncate(size: int) -> Fault:
    """Announce the whole body, send so many bytes of it, and hang up."""

    def fault(handler: "Handler") -> None:
        status, headers, body = handler.forward()
        handler.reply(status, body, headers, only=size)
        handler.hang_up()

    return fault


def stall(handler: "Handler") -> None:
    """Take nothing and say nothing until ``released``."""
    assert isinstance(handler.server, _Server)
    handler.server.faulty.released.wait(60)
    handler.hang_up()


# The server -------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    faulty: FaultyS3

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that hang up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    body: bytes | None = None

    def handle_one_request(self) -> None:
        self.body = None
        super().handle_one_request()

    def do_any(self) -> None:
        """Fail as asked, or pass it on."""
        faulty = self.server.faulty
        operation = _operation(self.command, self.path)
        form: dict[str, str] = {}
        if operation == "Form":
            form = dict(parse_qsl(self.read_body().decode()))
            operation = form.get("Action", "")
        headers = {name.lower(): value for name, value in self.headers.items()}
        size = int(headers.get("content-length", "0"))
        with faulty.lock:
            faulty.seen.append(Request(operation, time.monotonic(), headers, size, form))
        fault = faulty.take(operation)
        if fault is not None:
            fault(self)
        elif operation.startswith("AssumeRole"):
            self.reply(200, _credentials(operation, faulty.tokens), {"Content-Type": "text/xml"})
        else:
            status, answered, body = self.forward()
            self.reply(status, body, answered)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815 - the names that http.server calls

    def read_body(self) -> bytes:
        """Return the request's body, read once."""
        if self.body is None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        return self.body

    def forward(self) -> tuple[int, dict[str, str], bytes]:
        """Ask the real server; return status, headers and body."""
        body = self.read_body()
        with contextlib.closing(http.client.HTTPConnection(self.server.faulty.target, timeout=60)) as real:
            real.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                real.putheader(name, value)
            real.endheaders(body)
            response = real.getresponse()
            headers = dict(response.getheaders())
            return response.status, headers, response.read()

    def reply(self, status: int, body: bytes, headers: Mapping[str, str], *, only: int | None = None) -> None:
        """Answer; ``only``: send so many bytes of the body."""
        own = {name.lower() for name in headers}
        self.send_response_only(status)
        if "date" not in own:
            self.send_header("Date", self.date_time_string())
        for name, value in headers.items():
            if name.lower() not in _HOP or name.lower() == "connection":
                self.send_header(name, value)
        length = len(body)
        if self.command == "HEAD":
            length = int(next((v for n, v in headers.items() if n.lower() == "content-length"), "0"))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[:only])

    def hang_up(self) -> None:
        """Close the connection now."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def _operation(method: str, target: str) -> str:
    path, _, query = target.partition("?")
    names = {name for name, _ in parse_qsl(query, keep_blank_values=True)}
    if method == "POST" and path == "/":
        return "Form"
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in names else "CompleteMultipartUpload"
    if method == "PUT":
        return "UploadPart" if "partNumber" in names else "PutObject"
    if method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in names else "DeleteObject"
    if method == "HEAD":
        return "HeadObject" if path.count("/") > 1 else "HeadBucket"
    if "list-type" in names:
        return "ListObjectsV2"
    return "ListMultipartUploads" if "uploads" in names else "GetObject"


def _error(code: str, message: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


def _credentials(action: str, tokens: Mapping[str, str]) -> bytes:
    # Expires soon, so that a client renews it with its next request.
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
    ((key, secret),) = tokens.items()
    return (
        f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><Credentials>'
        f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>"
        f"<SessionToken></SessionToken><Expiration>{until}</Expiration></Credentials>"
        f"<AssumedRoleUser><Arn>arn:aws:sts::1:assumed-role/r/s</Arn><AssumedRoleId>a:s</AssumedRoleId>"
        f"</AssumedRoleUser></{action}Result><ResponseMetadata><RequestId>{json.dumps(1)}</RequestId>"
        f"</ResponseMetadata></{action}Response>"
    ).encode()
