"""How to reach etcd, and what the files behind that say now. Standard library only.

Both clients, the gateway's and the guardian's, ask here before each call, so
that certificates, the password and the list of members may change without a
restart. A version comes with each value: whoever sees another one than before
lets go of connections made with the former.
"""

import calendar
import math
import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dtrain.runtime import redact
from dtrain.runtime.watched import Watched, read_bounded, read_endpoints, read_password

RESPREAD_S = 1.0
"""A login after a token was dropped waits up to this long: others lost theirs at the same moment."""

REST_S_FIRST, REST_S_MAX = 1.0, 10.0
COMPLAIN_EVERY_S = 60.0
EXPIRY_WARNING_S = 14 * 86400.0
TELL_EXPIRY_EVERY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach etcd; paths name PEM files. What files hold wins over what stands here."""

    endpoints: tuple[str, ...]
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    endpoints_file: str = ""


class LoginRefused(Exception):
    """etcd does not know this user and password; it is asked again later, or with another password."""


class LiveAccess:
    """An ``Access`` whose files are read again when they change. Safe for several threads.

    ``report`` is told what was replaced and what cannot be used.
    """

    def __init__(self, access: Access, monotonic: Callable[[], float], report: Callable[..., Any]) -> None:
        self.user = access.user
        self.logins = Logins(access.user, monotonic, report)
        self._access = access
        self._monotonic = monotonic
        self._report = report
        self._expiry_at = float("-inf")
        self._identity_lock = threading.Lock()
        self._cluster_id = 0
        self._endpoints = Watched(
            "etcd endpoints file",
            (access.endpoints_file,),
            self._read_endpoints,
            monotonic=monotonic,
            report=report,
            initial=access.endpoints or None,
        )
        self._tls = Watched(
            "TLS files for etcd",
            (access.ca, access.cert, access.key),
            self._make_context,
            monotonic=monotonic,
            report=report,
        )
        self._password = Watched(
            "etcd password file",
            (access.password_file,),
            self._read_password,
            monotonic=monotonic,
            report=report,
            initial=access.password or None,
        )

    def endpoints(self) -> tuple[tuple[str, ...], int]:
        """Return the members' URLs and the version of the list."""
        return self._endpoints.get()

    def context(self) -> tuple[ssl.SSLContext, int]:
        """Return the TLS context for new connections, and its version.

        Raises:
            OSError, ValueError: the files have never fitted together.
        """
        found = self._tls.get()
        self._tell_expiry()
        return found

    def password(self) -> tuple[str, int]:
        """Return the password and its version."""
        return self._password.get()

    def problems(self, wall_s: float) -> tuple[str, ...]:
        """Return what a person should know: files that cannot be used, a certificate that ends soon."""
        found = [watched.problem for watched in (self._endpoints, self._tls, self._password)]
        found.append(self.logins.problem)
        if self._access.cert:
            found.append(expiry_problem(self._access.cert, wall_s))
        return tuple(text for text in found if text)

    def explain(self, error: BaseException) -> str:
        """Return what the error says, and what it hides: servers seldom tell why they end a handshake."""
        text = str(error) or type(error).__name__
        # By name: urllib3 has one of its own, without a cause.
        if "SSL" in type(error).__name__ and self._access.cert:
            why = expiry_problem(self._access.cert, time.time(), warning_s=0.0)
            return f"{text} ({why})" if why else text
        return text

    def is_foreign(self, cluster_id: int) -> bool:
        """Tell whether another cluster than the first one seen has answered."""
        with self._identity_lock:
            self._cluster_id = self._cluster_id or cluster_id
            return cluster_id not in (0, self._cluster_id)

    def _tell_expiry(self) -> None:
        now = self._monotonic()
        if self._access.cert and now >= self._expiry_at:
            self._expiry_at = now + TELL_EXPIRY_EVERY_S
            if problem := expiry_problem(self._access.cert, time.time()):
                self._report("certificate for etcd", problem=problem, fix="renew it and replace the files")

    def _read_endpoints(self) -> tuple[str, ...]:
        if not self._access.endpoints_file:
            return self._access.endpoints
        found = read_endpoints(self._access.endpoints_file)
        check_endpoints(found)
        return found

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._access.ca or None)
        if self._access.cert:
            context.load_cert_chain(self._access.cert, self._access.key or None)
        return context

    def _read_password(self) -> str:
        if not self._access.password_file:
            return self._access.password
        return read_password(self._access.password_file)


class Logins:
    """When to log in. Safe for several threads.

    A refused login costs etcd a tenth of a second of CPU and brings nothing: the
    next one waits, growing to ``REST_S_MAX``, unless the password has changed.
    """

    def __init__(self, user: str, monotonic: Callable[[], float], report: Callable[..., Any]) -> None:
        self._user = user
        self._monotonic = monotonic
        self._report = report
        self._rng = random.Random()  # noqa: S311 - jitter only
        self._lock = threading.Lock()
        self._refusal = ""
        self._version = 0
        self._rest_s = REST_S_FIRST
        self._rests_until = float("-inf")
        self._complained_at = float("-inf")

    @property
    def problem(self) -> str:
        """What etcd said to the last login if it refused it, else ""."""
        with self._lock:
            return f"etcd refuses the login of {self._user}: {self._refusal}" if self._refusal else ""

    def check(self, version: int) -> None:
        """Return if a login with the password of that version may be tried now.

        Raises:
            LoginRefused: it was refused a moment ago.
        """
        with self._lock:
            if self._refusal and version == self._version and self._monotonic() < self._rests_until:
                raise LoginRefused(self._refusal)

    def refused(self, version: int, text: str) -> None:
        """Remember that etcd refused the login."""
        with self._lock:
            now = self._monotonic()
            if version != self._version:
                self._rest_s = REST_S_FIRST
            self._version, self._refusal = version, text[:300] or "refused"
            self._rests_until = now + self._rest_s * self._rng.uniform(0.5, 1.0)
            self._rest_s = min(REST_S_MAX, 2 * self._rest_s)
            if now - self._complained_at < COMPLAIN_EVERY_S:
                return
            self._complained_at = now
        self._report(
            "etcd refuses the login", user=self._user, error=text[:300], fix="check the user and its password"
        )

    def accepted(self) -> None:
        """Remember that etcd let us in."""
        with self._lock:
            again, self._refusal = bool(self._refusal), ""
            self._rest_s, self._complained_at = REST_S_FIRST, float("-inf")
        if again:
            self._report("etcd accepts the login again", user=self._user)

    def spread_s(self, limit_s: float) -> float:
        """Return how long to wait before logging in anew, within a call that may take ``limit_s``."""
        return self._rng.uniform(0.0, min(RESPREAD_S, limit_s / 4))


def check_endpoints(endpoints: tuple[str, ...]) -> None:
    """Refuse endpoints that cannot be asked.

    Raises:
        ValueError: none, or one that is no URL.
    """
    if not endpoints:
        raise ValueError("no etcd endpoint is configured")
    for endpoint in endpoints:
        split_endpoint(endpoint)


def split_endpoint(endpoint: str) -> tuple[bool, str, int]:
    """Return (TLS or not, host, port) of a client URL.

    Raises:
        ValueError: it is none.
    """
    url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    rest = url.path.strip("/") or url.query or url.fragment or url.username
    if url.scheme not in ("http", "https") or not url.hostname or rest:
        raise ValueError(f"{redact.url(endpoint)[:100]!r} is not an etcd endpoint")
    return url.scheme == "https", url.hostname, url.port or 2379


def certificate_ends(path: str) -> float | None:
    """Return when the first certificate in a file ends, s since the epoch; None if none can be read."""
    try:
        return not_after(ssl.PEM_cert_to_DER_cert(_first_certificate(path)))
    except (OSError, ValueError, IndexError):
        return None


def expiry_problem(cert_path: str, wall_s: float, *, warning_s: float = EXPIRY_WARNING_S) -> str:
    """Say so if the certificate in that file ends soon or has ended; "" if all is well."""
    ends_at = certificate_ends(cert_path)
    if ends_at is None:
        return ""
    left_s = ends_at - wall_s
    if left_s <= 0:
        return f"the certificate {cert_path} has expired"
    if left_s < warning_s:
        return f"the certificate {cert_path} expires in {math.ceil(left_s / 86400)} days or less"
    return ""


def _first_certificate(path: str) -> str:
    text = read_bounded(path).decode("ascii", "replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    if begin not in text or end not in text:
        raise ValueError(f"{path} holds no certificate")
    return begin + text.split(begin, 1)[1].split(end, 1)[0] + end


def not_after(der: bytes) -> float:
    """Return the end of a certificate's validity, s since the epoch.

    The standard library decodes no certificate of a file, so this walks to it:
    version, serial, algorithm and issuer stand before the validity.

    Raises:
        ValueError, IndexError: it is no certificate.
    """
    certificate = _content(der, 0)
    body = _content(der, certificate[0])
    at = body[0]
    if der[at] == 0xA0:
        at = _content(der, at)[1]
    for _ in range(3):
        at = _content(der, at)[1]
    validity = _content(der, at)
    start = _content(der, validity[0])
    begin, end = _content(der, start[1])
    text = der[begin:end].decode("ascii").rstrip("Z")
    if der[start[1]] == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    parts = [int(text[:4]), *(int(text[index : index + 2]) for index in range(4, 14, 2))]
    return float(calendar.timegm((*parts, 0, 0, 0)))


def _content(der: bytes, at: int) -> tuple[int, int]:
    """Return where the content of the element at ``at`` begins and ends."""
    length, begin = der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, begin = int.from_bytes(der[begin : begin + count], "big"), begin + count
    if begin + length > len(der):
        raise ValueError("not a certificate")
    return begin, begin + length
