"""``port.Etcd`` that measures every call on its way."""

from collections.abc import Callable
from typing import TypeVar

from dtrain.protocol.errors import DtrainError
from dtrain.runtime.clock import Clock
from dtrain.runtime.meters import Counter, Histogram, Meter
from dtrain.runtime.metrics import MILLISECONDS, Metric
from dtrain.storage.etcd.port import Etcd, RangeResult, Status, Txn, TxnResult, WatchStream

T = TypeVar("T")

REQUEST_SECONDS = Metric(
    "dtrain_etcd_request_duration_seconds",
    "histogram",
    "How long calls to etcd took until an answer or an error, all members that were asked included; "
    "`watch` until it was open.",
    ("op",),
    MILLISECONDS,
)
ERRORS = Metric(
    "dtrain_etcd_errors_total",
    "counter",
    "Calls to etcd that ended in an error, by operation and error code (docs/troubleshooting.md).",
    ("op", "code"),
)
METRICS = (REQUEST_SECONDS, ERRORS)

OPERATIONS = ("txn", "range", "grant", "keepalive", "revoke", "watch", "status")


class EtcdMeter:
    """What one process asks of etcd."""

    def __init__(self) -> None:
        self.seconds = Histogram(REQUEST_SECONDS, ((op,) for op in OPERATIONS))
        self.errors = Counter(ERRORS)

    @property
    def meters(self) -> tuple[Meter, ...]:
        return (self.seconds, self.errors)


class MeteredEtcd:
    """``inner``, with the duration and the errors of each call told to ``meter``."""

    def __init__(self, inner: Etcd, meter: EtcdMeter, clock: Clock) -> None:
        self._inner = inner
        self._meter = meter
        self._clock = clock

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        return self._timed("txn", lambda: self._inner.txn(txn, deadline_s=deadline_s))

    def range(
        self,
        key: str,
        range_end: str | None = None,
        *,
        revision: int = 0,
        limit: int = 0,
        deadline_s: float = 5.0,
    ) -> RangeResult:
        return self._timed(
            "range",
            lambda: self._inner.range(key, range_end, revision=revision, limit=limit, deadline_s=deadline_s),
        )

    def grant(self, ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        return self._timed("grant", lambda: self._inner.grant(ttl_s, lease, deadline_s=deadline_s))

    def keepalive(self, lease: int, *, deadline_s: float = 1.5) -> float:
        return self._timed("keepalive", lambda: self._inner.keepalive(lease, deadline_s=deadline_s))

    def revoke(self, lease: int, *, deadline_s: float = 5.0) -> None:
        self._timed("revoke", lambda: self._inner.revoke(lease, deadline_s=deadline_s))

    def watch(self, key: str, range_end: str | None, start_revision: int) -> WatchStream:
        return self._timed("watch", lambda: self._inner.watch(key, range_end, start_revision))

    def status(self, *, deadline_s: float = 5.0) -> Status:
        return self._timed("status", lambda: self._inner.status(deadline_s=deadline_s))

    def close(self) -> None:
        self._inner.close()

    def _timed(self, op: str, call: Callable[[], T]) -> T:
        began = self._clock.monotonic()
        try:
            return call()
        except DtrainError as error:
            self._meter.errors.add(op, error.code.value)
            raise
        finally:
            self._meter.seconds.observe(self._clock.monotonic() - began, op)
