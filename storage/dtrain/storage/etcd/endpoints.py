"""Which member of the etcd cluster to talk to next.

Sticky: all calls go to one member until it fails, so that connections and
tokens are few. A member that failed rests, unless all of them failed. Members
come from configuration, which may change while we run: asking etcd for its members needs permissions that
agents do not have, and answers addresses that may be unreachable from here.
"""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime import redact
from dtrain.runtime.clock import Clock
from dtrain.storage.etcd.access import split_endpoint

REST_S = 5.0
"""How long a member that failed is asked last."""

BACKOFF_S_FIRST = 0.05
BACKOFF_S_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a TLS client. ``cert`` without a CN: with one, etcd refuses tokens."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one member serves clients."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Read ``http://host:2379``; without a scheme it is http, without a port 2379.

    Raises:
        Refused: ``BAD_SETTING``.
    """
    try:
        secure, host, port = split_endpoint(text)
    except ValueError as error:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"{redact.url(text)[:100]!r} is not an etcd endpoint",
            fix="write endpoints as http://host:2379 or https://host:2379",
        ) from error
    return Endpoint("https" if secure else "http", host, port)


def backoff_s(failures: int, rng: random.Random) -> float:
    """Return the wait before the next try after ``failures`` in a row, with full jitter."""
    ceiling: float = min(BACKOFF_S_MAX, BACKOFF_S_FIRST * 2 ** min(failures, 10))
    return rng.uniform(0, ceiling)


class Endpoints:
    """The members in the order in which to ask them. Safe for several threads."""

    def __init__(self, urls: Sequence[str], clock: Clock, rng: random.Random) -> None:
        if not urls:
            raise Refused(
                ErrorCode.BAD_SETTING, "no etcd endpoint is configured", fix="set DTRAIN_ETCD_ENDPOINTS"
            )
        self._members = tuple(parse_endpoint(url) for url in urls)
        self._clock = clock
        self._rng = rng
        self._lock = threading.Lock()
        self._rests_until = dict.fromkeys(self._members, 0.0)
        # Clients that all began with the first member would load only that one.
        self._current = rng.randrange(len(self._members))

    def __len__(self) -> int:
        return len(self._members)

    def __str__(self) -> str:
        return ",".join(str(member) for member in self._members)

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._members

    def replace(self, urls: Sequence[str]) -> tuple[Endpoint, ...]:
        """Know these members from now on; return those that are gone.

        The current one stays so if it is still there.
        """
        members = tuple(parse_endpoint(url) for url in urls)
        with self._lock:
            gone = tuple(member for member in self._members if member not in members)
            current = self._members[self._current]
            self._members = members
            self._rests_until = {member: self._rests_until.get(member, 0.0) for member in members}
            if current in members:
                self._current = members.index(current)
            else:
                self._current = self._rng.randrange(len(members))
        return gone

    def in_order(self) -> list[Endpoint]:
        """Return every member once: the current one first, those that rest last."""
        with self._lock:
            now = self._clock.monotonic()
            turn = self._members[self._current :] + self._members[: self._current]
            return sorted(turn, key=lambda member: max(0.0, self._rests_until[member] - now))

    def worked(self, endpoint: Endpoint) -> None:
        """Stay with ``endpoint``."""
        with self._lock:
            # A call that was under way when its member was taken off the list is no reason to return.
            if endpoint in self._members:
                self._rests_until[endpoint] = 0.0
                self._current = self._members.index(endpoint)

    def failed(self, endpoint: Endpoint) -> None:
        """Let ``endpoint`` rest and, if it is the current one, go on to the next."""
        with self._lock:
            if endpoint not in self._members:
                return
            self._rests_until[endpoint] = self._clock.monotonic() + REST_S
            if self._members[self._current] == endpoint:
                self._current = (self._current + 1) % len(self._members)
