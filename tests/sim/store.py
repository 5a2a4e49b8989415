"""The object store as one node reaches it: failing, slow, cut off, or silent after the deed."""

from collections.abc import Callable, Iterator, Sequence
from mmap import mmap
from typing import TYPE_CHECKING, TypeVar

from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Unavailable
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.port import BlobInfo
from tests.sim.link import Link

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

T = TypeVar("T")

CONNECT_S = 1.0
"""How long a call takes to find out that nobody answers."""


class NodeStore:
    """``BlobStore`` over the one store of the run, by way of a node's link.

    Tasks wait in virtual time; event code (the transfer process) asks ``wait_s`` and comes back later.
    """

    def __init__(self, cluster: "Cluster", link: Link, *, waits: bool) -> None:
        self._cluster = cluster
        self._inner = cluster.store
        self._link = link
        self._waits = waits

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
        return self._call("put", key, lambda: self._inner.put(key, parts, chunk_crcs=chunk_crcs), write=True)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._call("get", key, lambda: self._inner.get(key, offset=offset, length=length))

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        self._call("get", key, lambda: self._inner.get_into(key, offset, buffer))

    def head(self, key: str) -> BlobInfo:
        return self._call("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        return self._call("list", prefix, lambda: self._inner.list(prefix))

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        return self._call("list_unfinished", prefix, lambda: self._inner.list_unfinished(prefix))

    def discard_unfinished(self, token: str) -> None:
        self._call("discard", token, lambda: self._inner.discard_unfinished(token), write=True)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._inner.delete(key), write=True)

    def close(self) -> None:
        """Nothing is held."""

    def wait_s(self) -> float:
        """How long a call takes now."""
        faults = self._cluster.faults
        return self._cluster.scheduler.delay(faults.store_slow_s, 30.0) if faults.store_slow_s else 0.0

    def _call(self, operation: str, key: str, call: Callable[[], T], *, write: bool = False) -> T:
        if not self._link.out:
            self._wait(CONNECT_S)
            raise Unavailable(
                ErrorCode.STORE_UNAVAILABLE, f"{operation} of {key}: the store cannot be reached"
            )
        if self._waits:
            self._wait(self.wait_s())
        result = call()
        if not self._link.in_:
            self._wait(CONNECT_S)
            lost = OutcomeUnknown if write else Unavailable
            raise lost(ErrorCode.STORE_UNAVAILABLE, f"no answer to {operation} of {key}")
        return result

    def _wait(self, seconds: float) -> None:
        if self._waits and seconds:
            self._cluster.scheduler.current().sleep(seconds)
