"""``port.BlobStore`` that measures every call on its way."""

from collections.abc import Callable, Iterator, Sequence
from mmap import mmap
from typing import TypeVar

from dtrain.protocol.errors import DtrainError, OutcomeUnknown, Unavailable
from dtrain.runtime.clock import Clock
from dtrain.runtime.meters import Counter, Histogram, Meter
from dtrain.runtime.metrics import MINUTES, Metric
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.port import BlobInfo, BlobStore

T = TypeVar("T")

REQUEST_SECONDS = Metric(
    "dtrain_store_request_duration_seconds",
    "histogram",
    "How long operations on the store took, failed ones included: a whole blob for put, a page or more "
    "for list.",
    ("op",),
    MINUTES,
)
RETRIES = Metric(
    "dtrain_store_retries_total",
    "counter",
    "Operations on the store that failed in a way that deserves another try, by error code "
    "(docs/troubleshooting.md).",
    ("op", "code"),
)
METRICS = (REQUEST_SECONDS, RETRIES)

OPERATIONS = ("put", "get", "head", "list", "delete")


class StoreMeter:
    """What one process asks of stores."""

    def __init__(self) -> None:
        self.seconds = Histogram(REQUEST_SECONDS, ((op,) for op in OPERATIONS))
        self.retries = Counter(RETRIES)

    @property
    def meters(self) -> tuple[Meter, ...]:
        return (self.seconds, self.retries)

    def failed(self, op: str, error: DtrainError) -> None:
        """Count an error, if it is one to try again after."""
        if isinstance(error, Unavailable | OutcomeUnknown):
            self.retries.add(op, error.code.value)


class MeteredBlobs:
    """``inner``, with the duration and the passing errors of each call told to ``meter``."""

    def __init__(self, inner: BlobStore, meter: StoreMeter, clock: Clock) -> None:
        self._inner = inner
        self._meter = meter
        self._clock = clock

    @property
    def inner(self) -> BlobStore:
        """The store itself, for what only its kind can do."""
        return self._inner

    @property
    def uri(self) -> str:
        return self._inner.uri

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        return self._timed("put", lambda: self._inner.put(key, parts, chunk_crcs=chunk_crcs, flow=flow))

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._timed("get", lambda: self._inner.get(key, offset=offset, length=length))

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        self._timed("get", lambda: self._inner.get_into(key, offset, buffer))

    def head(self, key: str) -> BlobInfo:
        return self._timed("head", lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        return self._listed(lambda: self._inner.list(prefix))

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        return self._listed(lambda: self._inner.list_unfinished(prefix))

    def discard_unfinished(self, token: str) -> None:
        self._timed("delete", lambda: self._inner.discard_unfinished(token))

    def delete(self, key: str) -> None:
        self._timed("delete", lambda: self._inner.delete(key))

    def close(self) -> None:
        self._inner.close()

    def _listed(self, begin: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Measure a listing from its beginning to its end, what its reader does in between included."""
        began = self._clock.monotonic()
        try:
            yield from begin()
        except DtrainError as error:
            self._meter.failed("list", error)
            raise
        finally:
            self._meter.seconds.observe(self._clock.monotonic() - began, "list")

    def _timed(self, op: str, call: Callable[[], T]) -> T:
        began = self._clock.monotonic()
        try:
            return call()
        except DtrainError as error:
            self._meter.failed(op, error)
            raise
        finally:
            self._meter.seconds.observe(self._clock.monotonic() - began, op)
