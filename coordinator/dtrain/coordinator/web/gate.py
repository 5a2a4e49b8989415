"""Who may see and change what: the Host header, the token, and what a browser may load.

There are no cookies: a browser holds the token in the page's own memory and
sends it in a header, which no other site can have it do. So a forged request
carries no authority, whoever's browser sends it. A page of another name that
resolves to this address (DNS rebinding) is turned away by the Host header.
"""

import hmac
import ipaddress
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrain.coordinator.web.settings import DashboardSettings, read_token
from dtrain.protocol.errors import DtrainError

FAILURES_MAX, FAILURES_S = 20, 10.0
"""So many wrong tokens in so many seconds, from whomever: then all are refused for a while, unlooked at."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'{others}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=()"),
)


class Denied(Exception):
    """Not served: an HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Token:
    """The token in a file, as the file says now; "" means that nobody can have it."""

    def __init__(self, path: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._monotonic = monotonic
        self._stamp: object = None
        self._known = ""
        self._failures: deque[float] = deque(maxlen=FAILURES_MAX)

    @property
    def exists(self) -> bool:
        """Somebody may change things here."""
        return bool(self._path)

    def check(self, headers: Headers) -> None:
        """Return if the request carries the token.

        Raises:
            Denied: it does not, or there is none.
        """
        if not self.exists:
            raise Denied(403, "this dashboard is read-only: it has no --dashboard-token-file")
        now = self._monotonic()
        while self._failures and now - self._failures[0] > FAILURES_S:
            self._failures.popleft()
        if len(self._failures) >= FAILURES_MAX:
            raise Denied(429, "too many wrong tokens; wait a few seconds")
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise Denied(401, "give the dashboard's token")
        # In constant time, whatever was given.
        if not hmac.compare_digest(given.strip().encode(), self._current().encode()):
            self._failures.append(now)
            raise Denied(401, "this is not the dashboard's token")

    def _current(self) -> str:
        try:
            found = Path(self._path).stat()
            stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
            if stamp != self._stamp:
                self._known, self._stamp = read_token(self._path), stamp
        except (OSError, DtrainError) as error:
            # A token that was taken away lets nobody in any more.
            self._stamp = None
            raise Denied(403, "the token's file cannot be read; see the coordinator's log") from error
        return self._known


class Gate:
    """ASGI middleware: refuses unknown hosts, and sets the headers of every answer."""

    def __init__(
        self, app: ASGIApp, settings: DashboardSettings, others: Callable[[], Iterable[str]]
    ) -> None:
        self._app = app
        self._names = known_names(settings)
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        host = Headers(scope=scope).get("host", "")
        if not is_known_host(host, self._names):
            refused = JSONResponse(
                {"error": f"this dashboard is not called {host[:80]!r}", "fix": "see --dashboard-hosts"}, 421
            )
            await refused(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS:
                    headers[name] = value
                if headers.get("content-type", "").startswith("text/html"):
                    others = "".join(f" {url}" for url in self._others())
                    headers["content-security-policy"] = POLICY.format(others=others)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, sending)


def check_same_origin(request: Request) -> None:
    """Return if a request that changes something was made by our own page, or by no browser.

    The token alone decides; this turns away what no page of ours would send.

    Raises:
        Denied: it was made for another site's page, or as a form.
    """
    headers = request.headers
    origin = headers.get("origin")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Denied(403, "requests of other sites are refused")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise Denied(403, f"requests of {origin[:80]} are refused")
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Denied(415, "send JSON")


def known_names(settings: DashboardSettings) -> frozenset[str]:
    """Return the names that a browser may call this dashboard by; addresses are always fine."""
    own = socket.gethostname()
    return frozenset(
        name.lower().strip("[]")
        for name in ("localhost", own, own.split(".")[0], settings.host, *settings.hosts)
    )


def is_known_host(header: str, names: frozenset[str]) -> bool:
    """Tell whether a Host header names us. A literal address cannot have been rebound by a DNS server."""
    name = header.lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def problem(error: Denied | DtrainError, status: int = 0) -> JSONResponse:
    """Return an answer that says what went wrong and what to do."""
    if isinstance(error, Denied):
        headers: Mapping[str, str] = {"www-authenticate": "Bearer"} if error.status == 401 else {}
        return JSONResponse({"error": error.message}, error.status, headers=dict(headers))
    document = {"code": error.code.value, "error": error.message, "cause": error.cause, "fix": error.fix}
    return JSONResponse(document, status or 500)
