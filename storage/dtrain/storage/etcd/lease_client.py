"""Grant, renew and revoke over etcd's JSON gateway. Standard library only.

The guardian's own client: it must start in milliseconds, stay small and never
wait on anything but a socket with a deadline. One try asks one member; which
one is next and when is ``lease_keeper``'s decision.
"""

import contextlib
import http.client
import json
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_CONNECT_S = 0.5
_ANSWER_BYTES_MAX = 1024 * 1024


def boottime() -> float:
    """Return the clock of all deadlines: it also counts the time a machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def new_lease_id() -> int:
    """Return a random positive 63-bit id: an id of ours makes a grant idempotent."""
    return int.from_bytes(os.urandom(8), "big") >> 1 or 1


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach etcd; paths name PEM files."""

    endpoints: tuple[str, ...]
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""


class LeaseGone(Exception):
    """The lease has expired or was revoked."""


class NotAnswered(Exception):
    """This try brought nothing: another member, or later."""


class LeaseClient:
    """One connection to one member at a time. Not thread-safe."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._members = [_parse(endpoint) for endpoint in access.endpoints]
        self._current = 0
        self._connection: http.client.HTTPConnection | None = None
        self._token = ""
        self._context: ssl.SSLContext | None = None

    @property
    def members(self) -> int:
        return len(self._members)

    def rotate(self) -> None:
        """Turn to the next member."""
        self.close()
        self._current = (self._current + 1) % len(self._members)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        # Tokens are per member.
        self._token = ""

    def grant(self, lease: int, ttl_s: int, timeout_s: float) -> float:
        """Grant ``lease`` and return its TTL, s. Granted already is fine.

        Raises:
            NotAnswered: it may have been granted all the same; try the same id again.
        """
        end = boottime() + timeout_s
        try:
            return float(self._call("lease/grant", {"TTL": ttl_s, "ID": str(lease)}, end).get("TTL", ttl_s))
        except _Exists:
            try:
                return self.keepalive(lease, max(0.1, end - boottime()))
            except LeaseGone as error:
                raise NotAnswered("the lease ended while it was granted") from error

    def keepalive(self, lease: int, timeout_s: float) -> float:
        """Renew and return the TTL, s.

        Raises:
            LeaseGone, NotAnswered.
        """
        answer = self._call("lease/keepalive", {"ID": str(lease)}, boottime() + timeout_s)
        ttl_s = float(answer.get("TTL", 0))
        if ttl_s <= 0:
            raise LeaseGone
        return ttl_s

    def revoke(self, lease: int, timeout_s: float) -> None:
        """Revoke; gone already is fine.

        Raises:
            NotAnswered.
        """
        with contextlib.suppress(LeaseGone):
            self._call("lease/revoke", {"ID": str(lease)}, boottime() + timeout_s)

    def _call(self, path: str, body: dict[str, Any], end: float) -> dict[str, Any]:
        reused = self._connection is not None
        try:
            return self._exchange(path, body, end)
        except _LoginNeeded as error:
            if not self._access.user:
                raise NotAnswered(f"etcd wants a login: {error}") from error
            self._token = ""
        except _Dropped as error:
            # A kept connection may have been closed while idle; all three calls may be repeated.
            self.close()
            if not reused:
                raise NotAnswered(str(error)) from error
        try:
            return self._exchange(path, body, end)
        except (_LoginNeeded, _Dropped) as error:
            self.close()
            raise NotAnswered(str(error)) from error

    def _exchange(self, path: str, body: dict[str, Any], end: float) -> dict[str, Any]:
        if self._access.user and not self._token:
            login = {"name": self._access.user, "password": self._access.password}
            self._token = str(self._post("auth/authenticate", login, end).get("token", ""))
        return self._post(path, body, end)

    def _post(self, path: str, body: dict[str, Any], end: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Grpc-Metadata-Hasleader": "true"}
        if self._token:
            headers["Authorization"] = self._token
        try:
            connection = self._connect(end)
            connection.request("POST", f"/v3/{path}", json.dumps(body), headers)
            connection.sock.settimeout(_left(end))
            response = connection.getresponse()
            if connection.sock is not None:
                connection.sock.settimeout(_left(end))
            text = response.read(_ANSWER_BYTES_MAX)
            if response.will_close:
                connection.close()
                self._connection = None
        except TimeoutError as error:
            self.close()
            raise NotAnswered("no answer in time") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Dropped(str(error) or type(error).__name__) from error
        return _read(response.status, text)

    def _connect(self, end: float) -> http.client.HTTPConnection:
        if self._connection is None:
            secure, host, port = self._members[self._current]
            timeout_s = min(_CONNECT_S, _left(end))
            if secure:
                context = self._tls_context()
                self._connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
            else:
                self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
            self._connection.connect()
        self._connection.sock.settimeout(_left(end))
        return self._connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context(cafile=self._access.ca or None)
            if self._access.cert:
                self._context.load_cert_chain(self._access.cert, self._access.key or None)
        return self._context


class _LoginNeeded(Exception):
    pass


class _Dropped(Exception):
    pass


class _Exists(Exception):
    pass


def _left(end: float) -> float:
    left_s = end - boottime()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _parse(endpoint: str) -> tuple[bool, str, int]:
    url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{endpoint!r} is not an etcd endpoint")
    return url.scheme == "https", url.hostname, url.port or 2379


def _read(status: int, text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise NotAnswered(f"etcd answered {status} and no JSON") from error
    if not isinstance(answer, dict):
        raise NotAnswered(f"etcd answered {status} and no object")
    if status == http.client.OK and "error" not in answer:
        result = answer.get("result", answer)
        return result if isinstance(result, dict) else {}
    error_body = answer["error"] if isinstance(answer.get("error"), dict) else answer
    message = str(error_body.get("message") or error_body.get("error") or text[:200])
    known = message.lower()
    if "lease not found" in known:
        raise LeaseGone
    if "lease already exists" in known:
        raise _Exists
    if status == http.client.UNAUTHORIZED or any(
        sign in known for sign in ("invalid auth token", "auth store is old", "user name is empty")
    ):
        raise _LoginNeeded(message)
    raise NotAnswered(f"etcd answered {status}: {message[:200]}")


def check_endpoints(endpoints: Sequence[str]) -> None:
    """Refuse endpoints that cannot be asked.

    Raises:
        ValueError: none, or one that is no URL.
    """
    if not endpoints:
        raise ValueError("no etcd endpoint is configured")
    for endpoint in endpoints:
        _parse(endpoint)
