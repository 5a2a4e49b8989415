"""Grant, renew and revoke over etcd's JSON gateway. Standard library only.

The guardian's own client: it must start in milliseconds, stay small and never
wait on anything but a socket with a deadline. One try asks one member; which
one is next and when is ``lease_keeper``'s decision.
"""

import contextlib
import http.client
import json
import os
import random
import time
from typing import Any

from dtrain.storage.etcd.access import Access, LiveAccess, LoginRefused, split_endpoint

_CONNECT_S = 0.5
_ANSWER_BYTES_MAX = 1024 * 1024


def boottime() -> float:
    """Return the clock of all deadlines: it also counts the time a machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def new_lease_id() -> int:
    """Return a random positive 63-bit id: an id of ours makes a grant idempotent."""
    return int.from_bytes(os.urandom(8), "big") >> 1 or 1


class LeaseGone(Exception):
    """The lease has expired or was revoked."""


class NotAnswered(Exception):
    """This try brought nothing: another member, or later."""


class AccessDenied(NotAnswered):
    """etcd answers, and refuses: the user, its password or its role is wrong."""


class LeaseClient:
    """One connection to one member at a time. Not thread-safe."""

    def __init__(self, access: Access | LiveAccess) -> None:
        self._access = (
            access
            if isinstance(access, LiveAccess)
            else LiveAccess(access, boottime, lambda *_args, **_fields: None)
        )
        urls, self._list_version = self._access.endpoints()
        self._members = [split_endpoint(url) for url in urls]
        self._current = 0
        self._connection: http.client.HTTPConnection | None = None
        self._token = ""
        self._tls_version = 0
        self._dropped_token = False
        self.revision_seen = 0
        """The newest revision that etcd has told: one that is older later was restored."""

    @property
    def members(self) -> int:
        """How many members there are to ask."""
        return len(self._members)

    def rotate(self) -> None:
        """Turn to the next member."""
        self.close()
        self._current = (self._current + 1) % len(self._members)

    def close(self) -> None:
        self._disconnect()
        # Tokens are per member.
        self._token = ""
        self._dropped_token = False

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

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _look_at_files(self) -> None:
        """Let go of what was made with files that have been replaced since."""
        urls, list_version = self._access.endpoints()
        if list_version != self._list_version:
            self._list_version = list_version
            present = self._members[self._current]
            self._members = [split_endpoint(url) for url in urls]
            if present in self._members:
                self._current = self._members.index(present)
            else:
                self.close()
                self._current = random.randrange(len(self._members))  # noqa: S311 - only spreads load
        if not self._members[self._current][0]:
            return
        try:
            _, tls_version = self._access.context()
        except (OSError, ValueError) as error:
            raise NotAnswered(f"the TLS files cannot be used: {error}") from error
        if tls_version != self._tls_version:
            self._tls_version = tls_version
            self._disconnect()

    def _call(self, path: str, body: dict[str, Any], end: float) -> dict[str, Any]:
        self._look_at_files()
        reused, logged_in = self._connection is not None, False
        while True:
            try:
                return self._exchange(path, body, end)
            except _LoginNeeded as error:
                if not self._access.user:
                    raise AccessDenied(f"etcd wants a login: {error}") from error
                if logged_in:
                    raise NotAnswered(str(error)) from error
                # Tokens expire, and are unknown to a member that was restarted.
                self._dropped_token, self._token, logged_in = bool(self._token), "", True
            except _Dropped as error:
                # A kept connection may have been closed while idle; all three calls may be repeated.
                self._disconnect()
                if not reused:
                    raise NotAnswered(str(error)) from error
                reused = False

    def _exchange(self, path: str, body: dict[str, Any], end: float) -> dict[str, Any]:
        if self._access.user and not self._token:
            self._log_in(end)
        return self._post(path, body, end)

    def _log_in(self, end: float) -> None:
        logins = self._access.logins
        try:
            password, version = self._access.password()
        except (OSError, ValueError) as error:
            raise NotAnswered(f"the password cannot be read: {error}") from error
        try:
            logins.check(version)
            if self._dropped_token:
                time.sleep(logins.spread_s(max(0.0, end - boottime())))
            login = {"name": self._access.user, "password": password}
            self._token = str(self._post("auth/authenticate", login, end).get("token", ""))
        except LoginRefused as error:
            raise AccessDenied(f"etcd refuses the login: {error}") from error
        except (AccessDenied, _LoginNeeded) as error:
            logins.refused(version, str(error))
            raise AccessDenied(str(error)) from error
        self._dropped_token = False
        logins.accepted()

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
            raise _Dropped(self._access.explain(error)) from error
        answer = _read(response.status, text)
        header = answer.get("header")
        cluster_id = int(header.get("cluster_id", 0)) if isinstance(header, dict) else 0
        if self._access.is_foreign(cluster_id):
            # What it says of our lease is no news of ours: believing it would depose a leader.
            raise NotAnswered(f"another etcd cluster answers: {cluster_id:x}")
        if isinstance(header, dict):
            self.revision_seen = max(self.revision_seen, int(header.get("revision", 0)))
        return answer

    def _connect(self, end: float) -> http.client.HTTPConnection:
        if self._connection is None:
            secure, host, port = self._members[self._current]
            timeout_s = min(_CONNECT_S, _left(end))
            if secure:
                context, self._tls_version = self._access.context()
                self._connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
            else:
                self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
            self._connection.connect()
        self._connection.sock.settimeout(_left(end))
        return self._connection


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
    if status == http.client.FORBIDDEN or "authentication " in known:
        raise AccessDenied(f"etcd answered {status}: {message[:200]}")
    raise NotAnswered(f"etcd answered {status}: {message[:200]}")
