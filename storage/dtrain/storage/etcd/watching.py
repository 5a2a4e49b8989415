"""A watch over the gateway: one streaming POST, read line by line.

etcd3gw's own watcher takes an HTTP chunk for a message and hides the end of a
stream, compaction and refusals; after the loss of a member it waits for ever.
"""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.etcd import wire
from dtrain.storage.etcd.endpoints import Endpoint
from dtrain.storage.etcd.framing import FramingError, StreamParser
from dtrain.storage.etcd.outcomes import LoginNeeded, classify, parse_error
from dtrain.storage.etcd.port import WatchBatch
from dtrain.storage.etcd.wire import Json

_READ_BYTES = 256 * 1024


class GatewayWatch:
    """``port.WatchStream`` on one socket; made by ``open_stream``."""

    def __init__(
        self,
        sock: socket.socket,
        endpoint: Endpoint,
        accept: Callable[[Json], None],
        on_dead: Callable[[], None],
        why_end: Callable[[], str],
    ) -> None:
        self._sock = sock
        self._endpoint = endpoint
        self._accept = accept
        self._on_dead = on_dead
        self._why_end = why_end
        self._parser = StreamParser()
        self._ready: deque[WatchBatch] = deque()
        self._failure: DtrainError | None = None
        self._created = False
        self._closed = threading.Event()

    def next(self, timeout_s: float) -> WatchBatch | None:
        end = time.monotonic() + timeout_s
        while True:
            # What arrived before the end of the stream counts: hand it out first.
            if self._ready:
                return self._ready.popleft()
            if self._failure is not None:
                raise self._failure
            if why := self._why_end():
                self._end(why)
                continue
            left_s = end - time.monotonic()
            if left_s <= 0 and timeout_s > 0:
                return None
            if not self._read(max(0.0, left_s)) and timeout_s <= 0:
                return None

    def wait_created(self, timeout_s: float) -> None:
        """Return once the server has set up the watch, so that the caller knows it is live.

        Raises:
            Unavailable, Refused: it did not.
        """
        end = time.monotonic() + timeout_s
        while not (self._created or self._ready):
            if self._failure is not None:
                raise self._failure
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise Unavailable(
                    ErrorCode.ETCD_UNAVAILABLE, f"etcd at {self._endpoint} opened no watch in time"
                )
            self._read(left_s)

    def close(self) -> None:
        self._closed.set()
        # Wakes a thread that is blocked in recv; close alone would not.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._sock.close()

    def _read(self, timeout_s: float) -> bool:
        """Read once; False: nothing came."""
        try:
            self._sock.settimeout(max(0.0, timeout_s))
            data = self._sock.recv(_READ_BYTES)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return False
        except (OSError, ValueError) as error:
            self._fail(self._lost(str(error)))
            return True
        try:
            if not data:
                self._end_of_stream()
                return True
            for line in self._parser.feed(data):
                if self._parser.status != http.client.OK:
                    self._fail(self._refusal(line))
                elif self._failure is None:
                    self._take(line)
            if self._parser.ended:
                self._end_of_stream()
        except FramingError as error:
            self._fail(self._lost(str(error)))
        return True

    def _end_of_stream(self) -> None:
        if self._parser.status not in (None, http.client.OK):
            self._fail(self._refusal(self._parser.finish()))
        self._fail(self._lost("the stream ended"))

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if "error" in message:
                self._fail(self._refusal(line))
                return
            result = message["result"]
            self._accept(result)
            # In this order: a refused watch says created and canceled at once.
            if result.get("canceled"):
                self._fail(self._cancelled(result))
            elif result.get("created"):
                # Its revision is no bookmark: the watch may still be catching up.
                self._created = True
            else:
                self._ready.append(wire.watch_batch(result))
        except DtrainError as error:
            self._fail(error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._fail(self._lost(f"unreadable message: {error}"))

    def _end(self, why: str) -> None:
        """Let the reader open another stream: this one ends on purpose, by no fault of the member."""
        self._failure = self._lost(why)
        self.close()

    def _fail(self, error: DtrainError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        if isinstance(error, Unavailable) and not self._closed.is_set():
            self._on_dead()
        self.close()

    def _cancelled(self, result: Json) -> DtrainError:
        compacted = int(result.get("compact_revision", 0))
        reason = str(result.get("cancel_reason", ""))[:300]
        if compacted:
            return Refused(
                ErrorCode.ETCD_COMPACTED,
                f"the watch starts before revision {compacted}, which is compacted",
                fix="list again at the present revision",
            )
        if "permission denied" in reason:
            return Refused(
                ErrorCode.ETCD_AUTH, f"etcd refused the watch: {reason}", fix="check the etcd role"
            )
        if "auth" in reason or "user name is empty" in reason:
            return LoginNeeded(
                ErrorCode.ETCD_AUTH, f"etcd refused the watch: {reason}", fix="check the etcd user"
            )
        return self._lost(f"canceled: {reason}")

    def _refusal(self, body: bytes) -> DtrainError:
        code, message = parse_error(body.decode("utf-8", "replace"))
        error = classify(self._parser.status or 0, code, message)
        return self._lost(str(error)) if isinstance(error, OutcomeUnknown) else error

    def _lost(self, why: str) -> Unavailable:
        return Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"the watch on etcd at {self._endpoint} ended: {why}")


def open_stream(
    endpoint: Endpoint,
    body: Json,
    headers: dict[str, str],
    *,
    context: ssl.SSLContext | None,
    connect_s: float,
    open_s: float,
    accept: Callable[[Json], None],
    on_dead: Callable[[], None],
    why_end: Callable[[], str] = str,
) -> GatewayWatch:
    """Send the watch request and wait until the server has set it up.

    ``accept`` raises on a message of a wrong cluster; ``on_dead`` is called
    when the stream ends by a fault of this member. ``why_end`` is asked again and
    again, by whoever reads; unless it says "", the stream ends for that reason.

    Raises:
        Unavailable: another member may do better.
        Refused: compacted start, or no permission.
    """
    connection = (
        http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=connect_s, context=context)
        if context
        else http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=connect_s)
    )
    try:
        connection.request(
            "POST", "/v3/watch", json.dumps(body), headers | {"Content-Type": "application/json"}
        )
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise Unavailable(
            ErrorCode.ETCD_UNAVAILABLE, f"etcd at {endpoint} cannot be reached: {error}"
        ) from error
    sock: socket.socket = connection.sock
    _keep_alive(sock)
    stream = GatewayWatch(sock, endpoint, accept, on_dead, why_end)
    try:
        stream.wait_created(open_s)
    except DtrainError:
        stream.close()
        raise
    return stream


def _keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice a peer that vanished; the silence detector above is slower."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
