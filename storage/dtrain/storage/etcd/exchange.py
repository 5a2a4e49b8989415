"""What etcd3gw's HTTP layer does not tell: did the request leave, and a total deadline.

requests' timeout is per socket read, so a server that drips a byte a second
holds a call for ever. Sockets made here take the time that is left for each
read instead.
"""

import socket
import ssl
from collections.abc import Callable
from typing import Any

import requests
import requests.adapters
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


class HttpSession(requests.Session):
    """A session that keeps no proxy or .netrc of the environment and records what happened.

    ``context`` returns the TLS context for a new connection: the only place that
    says whom to trust, since requests would add the bundle that it ships with.
    """

    def __init__(self, exchange: Exchange, context: Callable[[], ssl.SSLContext]) -> None:
        super().__init__()
        self.trust_env = False
        adapter = _Adapter(exchange, context)
        self.mount("http://", adapter)
        self.mount("https://", adapter)
        self._exchange = exchange

    def post(self, url, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Send with the timeouts of the call at hand: etcd3gw has one per client."""
        kwargs |= {"timeout": self._exchange.timeouts(), "allow_redirects": False}
        return super().post(url, *args, **kwargs)


class _Adapter(requests.adapters.HTTPAdapter):
    def __init__(self, exchange: Exchange, context: Callable[[], ssl.SSLContext]) -> None:
        self._exchange = exchange
        self._context = context
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pool_classes(self._exchange, self._context)

    def cert_verify(self, conn, url, verify, cert):  # type: ignore[no-untyped-def]
        """Add nothing to what the context trusts."""
        del url, verify, cert
        conn.cert_reqs = "CERT_REQUIRED"

    def send(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        response = super().send(*args, **kwargs)
        self._exchange.http_status = response.status_code
        return response


def _pool_classes(
    exchange: Exchange, context: Callable[[], ssl.SSLContext]
) -> dict[str, type[urllib3.connectionpool.HTTPConnectionPool]]:
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
            self.ssl_context = context()
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
