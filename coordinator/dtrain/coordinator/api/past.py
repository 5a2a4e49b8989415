"""Reads archived records: of jobs whose name was used again, or that etcd has no record of any more."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from dtrain.protocol import archive, codec
from dtrain.protocol.archive import RecordName
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Unavailable
from dtrain.protocol.ids import ClusterName, JobName, Uid
from dtrain.protocol.job import JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.wording import some
from dtrain.runtime import retry
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.etcd.mirror import Mirror

T = TypeVar("T")

STORES_MAX = 8
"""Asked for a job that etcd knows nothing of."""
SUBMISSIONS_MAX = 1000
"""Of one listing: the newest ones."""
UIDS_TOLD_MAX = 5
READS_AT_ONCE = 2
BUSY_S_MAX = 2.0
READ_S_MAX = 8.0
FOUND_KEPT = 256


@dataclass(frozen=True, slots=True)
class Past:
    """One archived submission: its records and events as etcd had them, by key below the cluster's root."""

    store: str
    job: JobName
    uid: Uid
    finished: str
    documents: dict[str, Any]

    @property
    def status(self) -> JobStatus:
        """Raises Refused: BAD_RECORD."""
        found = self.documents.get(f"jobs/{self.job}/status", {})
        return codec.decode(JobStatus, json.dumps(found))


class PastJobs:
    """The archived records of one cluster. Thread-safe."""

    def __init__(
        self,
        cluster: ClusterName,
        mirror: Mirror,
        stores: Callable[[str], BlobStore],
        default_store: str,
    ) -> None:
        self._cluster, self._mirror, self._stores = cluster, mirror, stores
        self._default_store = default_store
        self._keys = Keys(cluster)
        self._reads = threading.BoundedSemaphore(READS_AT_ONCE)
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, str], Past] = OrderedDict()

    def submissions(self, job: str = "") -> tuple[list[tuple[str, RecordName]], str]:
        """(store, name) of archived records, of one job or of all, newest first; and what was not read."""
        found: dict[tuple[str, str], tuple[str, RecordName]] = {}
        problems = []
        with self._reading():
            for store in self._places():
                try:
                    names = self._names(store, archive.jobs_prefix(self._cluster, job))
                except DtrainError as error:
                    problems.append(error.message)
                    continue
                for name in sorted(names, key=lambda name: (name.finished, name.last)):
                    if name.kind == "record":
                        found[name.job, name.uid] = (store, name)
        ordered = sorted(found.values(), key=lambda one: one[1].finished, reverse=True)
        return ordered[:SUBMISSIONS_MAX], "; ".join(problems)

    def find(self, job: str, uid: str = "") -> Past:
        """Return an archived submission of ``job``: ``uid``, or the newest one.

        Raises:
            NotFound: there is none.
            Unavailable: a store that may have it did not answer.
        """
        with self._lock:
            known = self._found.get((job, uid)) if uid else None
        if known is not None:
            return known
        names, problem = self.submissions(job)
        chosen = next(((store, name) for store, name in names if uid in ("", name.uid)), None)
        if chosen is None:
            if problem:
                raise Unavailable(
                    ErrorCode.STORE_UNAVAILABLE, f"the archive could not be read: {problem}", fix="try again"
                )
            uids = some((name.uid for _, name in names), UIDS_TOLD_MAX)
            raise NotFound(
                ErrorCode.NOT_FOUND,
                f"there is no archived job {job}" + (f" with uid {uid}" if uid else ""),
                fix=f"archived are {uids}" if uids else "list those that there are: dtrain archive",
            )
        with self._reading():
            past = self._read(*chosen)
        with self._lock:
            self._found[job, past.uid] = past
            while len(self._found) > FOUND_KEPT:
                self._found.popitem(last=False)
        return past

    def earlier_events(self, job: JobName, uid: Uid, store: str, before: int) -> list[Any]:
        """Events of a submission below number ``before``, which etcd has dropped; raises DtrainError."""
        with self._reading():
            names = self._names(store, archive.jobs_prefix(self._cluster, job, uid))
            return self._events(store, [name for name in names if name.first < before])

    def _read(self, store: str, name: RecordName) -> Past:
        blobs = self._stores(store)
        document = archive.unpack_document(_ask(lambda: blobs.get(name.key)))
        records = document.get("records", {})
        documents = {f"jobs/{name.job}/{key}": value for key, value in records.items()}
        names = self._names(store, archive.jobs_prefix(self._cluster, name.job, name.uid))
        batches = self._events(store, [one for one in names if one.kind == "events"])
        for event in [*batches, *document.get("events", [])]:
            key = self._keys.event(name.job, int(event["seq"])).removeprefix(self._keys.root)
            documents[key] = event
        return Past(store, name.job, name.uid, name.finished, documents)

    def _events(self, store: str, names: Iterable[RecordName]) -> list[Any]:
        blobs = self._stores(store)
        found: dict[int, Any] = {}
        for name in names:
            document = archive.unpack_document(_ask(lambda name=name: blobs.get(name.key)))  # type: ignore[misc]
            found |= {int(event["seq"]): event for event in document.get("events", [])}
        return [found[seq] for seq in sorted(found)]

    def _names(self, store: str, prefix: str) -> list[RecordName]:
        blobs = self._stores(store)
        keys = _ask(lambda: [info.key for info in blobs.list(prefix)])
        return [name for key in keys if (name := archive.parse_record_key(self._cluster, key))]

    def _places(self) -> list[str]:
        """Stores that may hold something: the cluster's own, and those of the jobs that are known."""
        found = dict.fromkeys([self._default_store] if self._default_store else [])
        for name in self._mirror.children(self._keys.jobs):
            kv = self._mirror.get(self._keys.status(JobName(name)))
            if kv is not None and len(found) < STORES_MAX:
                store = json.loads(kv.value).get("store", "")
                found |= {store: None} if store else {}
        return list(found)

    def _reading(self) -> "_Slot":
        return _Slot(self._reads)


class _Slot:
    """One of few places: other calls must find a free thread."""

    def __init__(self, places: threading.BoundedSemaphore) -> None:
        self._places = places

    def __enter__(self) -> None:
        if not self._places.acquire(timeout=BUSY_S_MAX):
            raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "the archive is busy", fix="try again in a moment")

    def __exit__(self, *_: object) -> None:
        self._places.release()


def _ask(operation: Callable[[], T]) -> T:
    return retry.call(operation, attempts=2, deadline_s=READ_S_MAX, idempotent=True)
