"""What etcd3gw's HTTP layer does not tell: did the request leave, and a total deadline.

requests' timeout is per socket read, so a server that drips a byte a second
holds a call for ever. Sockets made here take the time that is left for each
read instead.
"""

import socket
import ssl
from typing import Any

import urllib3
import urllib3.connection
import urllib3.connectionpool

from dtrain.runtime.clock import Clock


class Exchange:
    """The call in progress on one session of one thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._end = 0.0
        self._connect_s = 0.0
        self.sent = False
        """Bytes of the request may have left: from here on the outcome can be unknown."""
        self.http_status = 0

    def begin(self, limit_s: float, connect_s: float) -> None:
        """Start a call that ends ``limit_s`` from now."""
        self._end = self._clock.monotonic() + limit_s
        self._connect_s = connect_s
        self.sent = False
        self.http_status = 0

    def left_s(self) -> float:
        """Return the time left.

        Raises:
            TimeoutError: there is none.
        """
        left_s = self._end - self._clock.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left_s

    def timeouts(self) -> tuple[float, float]:
        """Return (connect, read) for requests; 0 would mean 'for ever' there."""
        left_s = max(0.001, self._end - self._clock.monotonic())
        return min(self._connect_s, left_s), left_s


class _PlainSocket(socket.socket):
    exchange: Exchange | None = None

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.exchange is not None:
            self.settimeout(self.exchange.left_s())
        return super().recv_into(*args, **kwargs)


class _TlsSocket(ssl.SSLSocket):
    exchange: Exchange | None = None

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.exchange is not None:
            self.settimeout(self.exchange.left_s())
        return super().recv_into(*args, **kwargs)


def pool_classes(exchange: Exchange) -> dict[str, type[urllib3.connectionpool.HTTPConnectionPool]]:
    """Return urllib3's pool classes with connections that report to ``exchange``."""

    class Plain(urllib3.connection.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            assert self.sock is not None
            plain = _PlainSocket(self.sock.family, self.sock.type, self.sock.proto, fileno=self.sock.detach())
            plain.settimeout(exchange.left_s())
            plain.exchange = exchange
            self.sock = plain

        def send(self, data: Any) -> None:
            if self.sock is None:
                self.connect()
            exchange.sent = True
            super().send(data)

    class Secure(urllib3.connection.HTTPSConnection):
        def connect(self) -> None:
            # The context is urllib3's own, made per connection from the session's files.
            if self.ssl_context is None:
                self.ssl_context = urllib3.util.ssl_.create_urllib3_context()
            self.ssl_context.sslsocket_class = _TlsSocket
            super().connect()
            assert isinstance(self.sock, _TlsSocket)
            self.sock.exchange = exchange

        def send(self, data: Any) -> None:
            if self.sock is None:
                self.connect()
            exchange.sent = True
            super().send(data)

    class PlainPool(urllib3.connectionpool.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.connectionpool.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
