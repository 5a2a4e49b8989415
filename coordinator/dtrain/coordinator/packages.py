"""Packed working directories in the stores: whether a job may be submitted with one, and which are garbage.

A package is shared by all jobs of the same content, so that no job's end says that nobody needs it.
It is garbage once no job's record names it, and has not for a while: between upload and submission
nobody does. Nothing here is fenced by a term, and need not be. In this order:

1. The names of what is to go are written down (``PackageCollection``). A submission compares the
   revision of that record with the one that it has read, and refuses a package that is in it: from here
   on no job can come to name one.
2. All jobs are read again. What one names after all, as it was submitted just before, stays.
3. The rest is deleted, and leaves the record once the store has it no more.

A name is never used twice: a deletion that arrives hours late, from a leader long gone, hits nothing.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from dtrain.protocol import codec
from dtrain.protocol.errors import Conflict, ErrorCode, NotFound, Refused
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.job import JobSpec
from dtrain.protocol.keys import Keys
from dtrain.protocol.package import (
    Package,
    PackageCollection,
    package_key,
    packages_prefix,
    parse_package_key,
)
from dtrain.runtime import retry
from dtrain.runtime.clock import Clock
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.etcd.port import Compare, Etcd, Put, Target, Txn, prefix_end

T = TypeVar("T")

GRACE_S = 3600.0
"""How long a package that no job names stays: for the job that is about to, and for the next one."""

EVERY_S = 300.0
"""Between two looks at one store: each job asks for one now and then."""

DELETED_AT_ONCE = 32
"""Also what bounds the record of names."""


def guard(etcd: Etcd, cluster: ClusterName, store: BlobStore, package: Package) -> Compare:
    """Return what must hold when a job with ``package`` is written: nobody is deleting it.

    Raises:
        Conflict: somebody is, or has; it has to be stored again, under another name.
        Unavailable, Refused: of etcd or the store.
    """
    keys = Keys(cluster)
    key = package_key(cluster, package.digest, package.nonce)
    # The record first: what is begun after it is found by the compare.
    record, revision = _read(etcd, keys)
    try:
        found = None if key in record.keys else _ask(lambda: store.head(key))
    except NotFound:
        found = None
    if found is None or found.size_bytes != package.size_bytes:
        raise Conflict(
            ErrorCode.CONFLICT,
            f"the packed working directory is not in {store.uri} (any more)",
            fix="submit the job again: it is stored anew",
        )
    return Compare(keys.packages, Target.MOD, revision)


class PackageCollector:
    """Deletes packages that no job names. Safe for several threads, and beside other replicas' collectors."""

    def __init__(self, etcd: Etcd, clock: Clock) -> None:
        self._etcd = etcd
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at: dict[str, float] = {}
        self._idle_since: dict[tuple[str, str], float] = {}
        """By store and key: since when, for all that this replica knows, no job has named it."""

    def collect(self, cluster: ClusterName, store: BlobStore) -> int:
        """Delete what is garbage in ``store``, unless that was looked for a moment ago; return how much.

        While another thread is at it nothing is done: there is a next time, and a store that hangs
        must not hold the sweeps of all others.

        Raises:
            Unavailable, OutcomeUnknown, Refused: of etcd or the store; nothing is half done that
                the next look does not end.
        """
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            now = self._clock.monotonic()
            before = self._looked_at.get(store.uri)
            if before is not None and now < before + EVERY_S:
                return 0
            self._looked_at[store.uri] = now
            return self._collect(cluster, store, now)
        finally:
            self._lock.release()

    def _collect(self, cluster: ClusterName, store: BlobStore, now: float) -> int:
        prefix, keys = packages_prefix(cluster), Keys(cluster)
        # What does not look like ours is not ours to delete.
        listed = [info.key for info in _ask(lambda: list(store.list(prefix))) if parse_package_key(info.key)]
        cut_off = [f"{token}" for token in _ask(lambda: list(store.list_unfinished(prefix)))]
        if not listed and not cut_off:
            return 0
        record, revision = _read(self._etcd, keys)
        pending = {key for key, uri in record.keys.items() if uri == store.uri}
        idle = self._idle(store.uri, listed, cut_off, _named(self._etcd, cluster), now)
        ripe = [one for one in idle if self._idle_since[store.uri, one] <= now - GRACE_S][:DELETED_AT_ONCE]
        for token in ripe:
            if token in cut_off:
                _ask(partial(store.discard_unfinished, token), idempotent=True)
        doomed = sorted(pending | {key for key in ripe if key not in cut_off})
        if not doomed:
            return 0
        marked = PackageCollection({**record.keys, **dict.fromkeys(doomed, store.uri)})
        revision = self._write(keys, marked, revision)
        named = _named(self._etcd, cluster)
        garbage = [key for key in doomed if key not in named]
        for key in garbage:
            _ask(partial(store.delete, key), idempotent=True)
        over = {key for key in doomed if key in named or not _exists(store, key)}
        self._write(
            keys,
            PackageCollection({key: uri for key, uri in marked.keys.items() if key not in over}),
            revision,
        )
        return len(garbage)

    def _idle(
        self, uri: str, listed: list[str], cut_off: list[str], named: set[str], now: float
    ) -> list[str]:
        """What no job names, the longest known first."""
        idle = [key for key in (*listed, *cut_off) if key not in named]
        known = {key: since for (store, key), since in self._idle_since.items() if store == uri}
        for key in known.keys() - set(idle):
            del self._idle_since[uri, key]
        for key in idle:
            self._idle_since.setdefault((uri, key), now)
        return sorted(idle, key=lambda key: (self._idle_since[uri, key], key))

    def _write(self, keys: Keys, record: PackageCollection, revision: int) -> int:
        put = Put(keys.packages, codec.encode(record))
        result = self._etcd.txn(Txn((Compare(keys.packages, Target.MOD, revision),), (put,)))
        if not result.succeeded:
            raise Conflict(ErrorCode.CONFLICT, "another replica collects packages at the same time")
        return result.revision


def _read(etcd: Etcd, keys: Keys) -> tuple[PackageCollection, int]:
    items = _ask(lambda: etcd.range(keys.packages)).items
    if not items:
        return PackageCollection(), 0
    return codec.decode(PackageCollection, items[0].value), items[0].mod_revision


def _named(etcd: Etcd, cluster: ClusterName) -> set[str]:
    """Store keys of the packages that jobs name, all at one revision.

    Raises:
        Refused: a job's record cannot be read, so that nothing may be called garbage.
    """
    return {
        package_key(cluster, spec.package.digest, spec.package.nonce)
        for spec in _specs(etcd, Keys(cluster))
        if spec.package is not None
    }


def _specs(etcd: Etcd, keys: Keys) -> Iterator[JobSpec]:
    """Each job's record, skipping from job to job: what else is below them is a hundred times as much."""
    at, end, revision = keys.jobs, prefix_end(keys.jobs), 0
    while True:
        found = _ask(partial(etcd.range, at, end, revision=revision, limit=1))
        revision = revision or found.revision
        if not found.items:
            return
        name = found.items[0].key.removeprefix(keys.jobs).partition("/")[0]
        job = f"{keys.jobs}{name}/"
        for kv in _ask(partial(etcd.range, f"{job}spec", revision=revision)).items:
            yield codec.decode(JobSpec, kv.value)
        at = prefix_end(job)


def _exists(store: BlobStore, key: str) -> bool:
    try:
        _ask(lambda: store.head(key))
    except NotFound:
        return False
    except Refused:
        return True  # it cannot be told: it stays in the record, and is looked at again
    return True


def _ask(operation: Callable[[], T], *, idempotent: bool = False) -> T:
    return retry.call(operation, attempts=3, deadline_s=20.0, idempotent=idempotent)
