"""One call to whichever replica answers: failover, deadlines, and errors of the tree instead of statuses.

A call goes to the replica that answered last. One that is gone, frozen or cut
off is passed over for the next, within the call's own deadline. The servers'
errors come back as members of the error tree.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Unavailable
from dtrain.protocol.pb.coordinator_pb2_grpc import CoordinatorStub
from dtrain.runtime import grpc_tls
from dtrain.runtime.grpc_errors import error_of
from dtrain.runtime.tls import TlsFiles

T = TypeVar("T")

TRY_S_MAX = 3.0
"""One replica gets this long to answer before the next is asked: it may be frozen."""

REFUSED_S = 2.0
"""Where all replicas refuse the connection nobody is there: one that restarts is back sooner."""

_REQUEST_BYTES_MAX = 4 * 1024 * 1024
_REPLY_BYTES_MAX = 64 * 1024 * 1024
_PAUSE_S_FIRST, _PAUSE_S_MAX = 0.05, 0.5

_OPTIONS = (
    ("grpc.max_send_message_length", _REQUEST_BYTES_MAX),
    ("grpc.max_receive_message_length", _REPLY_BYTES_MAX),
    # Loopback and private addresses are no business of a web proxy.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class _Silent:
    def info(self, event: str, **fields: Any) -> None:
        pass

    warning = info


class Caller:
    """Connections to the replicas of one cluster. Safe for several threads.

    ``timeout_s`` bounds each call over all replicas; a wait inside a call comes
    on top of it.
    """

    def __init__(
        self, addresses: Sequence[str], *, timeout_s: float = 5.0, tls: TlsFiles | None = None
    ) -> None:
        """Remember the addresses.

        Raises:
            Refused: BAD_SETTING; the TLS files cannot be used.
        """
        assert addresses
        self._timeout_s = timeout_s
        self._addresses = tuple(addresses)
        # What a program prints must hold no log lines: ``problems`` is for its stderr.
        self._tls = grpc_tls.Credentials(tls, logger=_Silent()) if tls is not None else None
        self._lock = threading.Lock()
        self._retired: list[grpc.Channel] = []
        self._closed = False
        self._open()
        # Clients that all began with the first replica would load only that one.
        self._current = random.randrange(len(addresses))  # noqa: S311 - no secret
        self._seen_revision = 0

    def close(self) -> None:
        """End all connections; blocked calls fail."""
        with self._lock:
            self._closed = True
            channels, self._retired = [*self._channels, *self._retired], []
        for channel in channels:
            channel.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The replicas that are asked."""
        return self._addresses

    def problems(self) -> list[str]:
        """Sentences on this client's certificate, such as that it expires."""
        return self._tls.problems() if self._tls is not None else []

    def _call(self, call: Callable[[Any, float], T], *, wait_s: float = 0.0) -> T:
        begun = time.monotonic()
        deadline = begun + self._timeout_s + wait_s
        give_up_at = begun + self._timeout_s
        pause_s = _PAUSE_S_FIRST
        failures = 0
        refused: set[str] = set()
        while True:
            self._refresh()
            tried_at = time.monotonic()
            left_s = deadline - tried_at - wait_s
            current = self._current
            address = self._addresses[current]
            try:
                return call(self._stubs[current], max(0.2, min(left_s, TRY_S_MAX)))
            except grpc.RpcError as error:
                problem = error_of(error, address)
            except Unavailable as error:
                problem = error
            except ValueError as error:
                # What grpc says of a closed channel: a thread that followed a log was not quick enough.
                if not self._closed:
                    raise
                raise Unavailable(
                    ErrorCode.COORDINATOR_UNAVAILABLE, "the connection is closed", cause=str(error)
                ) from error
            # Everything here is idempotent, so an unknown outcome is asked for again.
            if not isinstance(problem, Unavailable | OutcomeUnknown):
                raise problem
            failures += 1
            self._current = (current + 1) % len(self._stubs)
            refused = refused | {address} if _is_refused(problem) else refused - {address}
            now = time.monotonic()
            # Time for an answer is for those who are there: only what a replica has really used of it counts.
            give_up_at = min(deadline, give_up_at + max(0.0, now - tried_at - TRY_S_MAX))
            nobody = len(refused) == len(set(self._addresses)) and now - begun >= REFUSED_S
            if nobody or now + pause_s >= give_up_at:
                raise self._unreachable(problem) from problem
            if failures % len(self._stubs) == 0:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    def _pass_over(self) -> None:
        """Ask another replica the next time."""
        self._current = (self._current + 1) % len(self._stubs)

    def _unreachable(self, last: DtrainError) -> DtrainError:
        if last.code is not ErrorCode.COORDINATOR_UNAVAILABLE:
            return last
        return Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"no coordinator answers at {', '.join(self._addresses)}",
            cause=last.cause or last.message,
            fix=_fix(last.cause, self._tls is not None),
        )

    def _open(self) -> None:
        self._generation = self._tls.generation if self._tls is not None else 0
        self._channels = [
            grpc_tls.to_coordinator(address, self._tls, _OPTIONS) for address in self._addresses
        ]
        self._stubs = [CoordinatorStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]

    def _refresh(self) -> None:
        """Open new channels once the certificate has been replaced: a follower lives for days."""
        if self._tls is None or self._tls.generation == self._generation:
            return
        with self._lock:
            if self._tls.generation == self._generation:
                return
            # Other threads' calls may be under way on the ones of last time, never on older ones.
            over, self._retired = self._retired, self._channels
            self._open()
        for channel in over:
            channel.close()


def _is_refused(problem: DtrainError) -> bool:
    return "connection refused" in problem.cause.lower()


def _fix(cause: str, secured: bool) -> str:
    told = cause.lower()
    if secured and any(word in told for word in ("handshake", "certificate", "verification", "ssl")):
        return (
            "the coordinator's certificate must be signed by --tls-cacert, be of the cluster that yours "
            "names, and neither may have expired: docs/security.md"
        )
    fix = "check --coordinators and that the replicas run, or start a local cluster: dtrain up"
    if not secured and ("socket closed" in told or "reset" in told or "handshake" in told):
        return f"{fix}; if they use TLS, give --tls-cert, --tls-key and --tls-cacert"
    return fix
