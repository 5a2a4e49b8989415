"""What clients ask about committed checkpoints: pins, requests to the leader, and what would be deleted.

Pins and requests are written by whichever replica is asked, guarded by the
commit record that they are about: a checkpoint is pinned or retired, never both.
Deleting and quarantining are the leader's; it answers a request by deleting it.
"""

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from dtrain.coordinator.api.errors import contended
from dtrain.coordinator.core import retention
from dtrain.coordinator.core.decisions import SweepOrphans
from dtrain.coordinator.work import Orphans
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Latest, Order, OrderKind, Pin
from dtrain.protocol.errors import (
    Conflict,
    DtrainError,
    ErrorCode,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from dtrain.protocol.ids import ClusterName, JobName, Seq, parse_name, parse_token
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobSpec, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Etcd,
    Get,
    KeyValue,
    Put,
    Target,
    Txn,
    prefix_end,
)

T = TypeVar("T")

TRIES_MAX = 5
TEXT_CHARACTERS_MAX = 200
PINS_MAX = 64
"""On one checkpoint."""

ORDERS_MAX = 64
"""Requests of one job that wait for the leader."""

PIN_TTL_S_MIN, PIN_TTL_S_MAX = 5, 3600
IMPORT_S_MAX = 7 * 86400.0
STEP_MAX = 10**12
LEASE_BITS = 62

KEY_CHARACTERS_MAX = 512


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin in force: the checkpoint's record, where it is, and the lease to renew the pin by."""

    record: CommitRecord
    store: str
    lease: int
    revision: int


@dataclass(frozen=True, slots=True)
class Importing:
    """A request to import: its id, the lease it hangs on, and whether it is gone from the records."""

    order: str
    lease: int
    revision: int
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """Something in a store, whether it goes, and why."""

    kind: str
    seq: Seq
    what: str
    deleted: bool
    why: str
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Review:
    """What would be deleted now; ``problem``: why the collector would delete nothing."""

    items: tuple[Item, ...]
    revision: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    """A job's checkpoints at one revision."""

    spec: JobSpec
    status: JobStatus | None
    latest: Latest | None
    commits: Mapping[Seq, tuple[CommitRecord, int]]
    bad: frozenset[Seq]
    pins: Mapping[Seq, Mapping[str, KeyValue]]
    verified: frozenset[Seq]
    garbage: frozenset[Seq]
    orders: Mapping[str, int]
    imports: Mapping[str, KeyValue]
    revision: int

    def shelf(self) -> retention.Shelf:
        """The same, as retention looks at it."""
        status, uid = self.status, self.spec.uid
        placed = status is not None and status.uid == uid and status.phase not in TERMINAL_PHASES
        restore = status.restore if status is not None and placed else None
        return retention.Shelf(
            tuple(record for _, (record, _) in sorted(self.commits.items()) if record.uid == uid),
            self.spec.checkpoint.keep_last,
            self.spec.checkpoint.keep_every_steps,
            self.bad,
            frozenset(self.pins),
            None if self.latest is None else self.latest.seq,
            None if restore is None else restore.seq,
            self.verified,
            frozenset() if status is None or status.uid != uid else frozenset(status.passed_over),
        )


class CheckpointDesk:
    """Answers for any replica. Safe for several threads."""

    def __init__(
        self,
        etcd: Etcd,
        cluster: ClusterName,
        clock: Clock,
        find_orphans: Callable[[SweepOrphans], Orphans],
    ) -> None:
        self._etcd = etcd
        self._cluster = cluster
        self._keys = Keys(cluster)
        self._clock = clock
        self._find_orphans = find_orphans
        self._reviewing = threading.Lock()

    def pin(self, job: str, seq: int, pin: Pin, lease: int) -> Pinned:
        """Pin a checkpoint (seq 0: the newest that is not damaged), or renew the pin of ``lease``.

        Raises:
            NotFound: it does not exist, or no more.
            Refused: too many pins, or a holder's name that cannot be one.
            Conflict: others kept changing it.
        """
        name = JobName(parse_name(job, "job"))
        parse_token(pin.holder, "holder of a pin")
        if pin.ttl_s and not PIN_TTL_S_MIN <= pin.ttl_s <= PIN_TTL_S_MAX:
            raise Refused(
                ErrorCode.USAGE,
                f"a pin cannot last {pin.ttl_s} s",
                fix=f"use {PIN_TTL_S_MIN} to {PIN_TTL_S_MAX} s and renew it, or 0 for one that stays",
            )
        unknown: OutcomeUnknown | None = None
        for _ in range(TRIES_MAX):
            found = self._read(name)
            wanted = Seq(seq) if seq else _newest_good(found, name)
            commit, revision = self._commit(found, name, wanted)
            held = found.pins.get(wanted, {}).get(pin.holder)
            if pin.ttl_s:
                lease = self._alive(lease, pin.ttl_s)
            if held is not None and held.lease == (lease if pin.ttl_s else 0):
                return Pinned(commit, _store_of(found), lease if pin.ttl_s else 0, found.revision)
            if len(found.pins.get(wanted, {})) >= PINS_MAX:
                raise Refused(
                    ErrorCode.USAGE,
                    f"checkpoint {wanted} of {name} has {PINS_MAX} pins already",
                    fix=f"take some off: dtrain checkpoints unpin {name} {wanted} --all",
                )
            record = replace(pin, seq=wanted, why=_text(pin.why), by=_text(pin.by), at=self._now())
            put = Put(
                self._keys.pin(name, wanted, pin.holder), codec.encode(record), lease if pin.ttl_s else 0
            )
            guard = Compare(self._keys.checkpoint(name, wanted), Target.MOD, revision)
            try:
                result = self._etcd.txn(Txn((guard,), (put,)))
            except OutcomeUnknown as error:
                unknown = error
                continue
            if result.succeeded:
                return Pinned(commit, _store_of(found), put.lease, result.revision)
        raise unknown or contended(f"job {name}")

    def unpin(self, job: str, seq: int, holder: str, lease: int) -> tuple[bool, int]:
        """Take a pin off, or all of them ("*"); False: there was none.

        Raises:
            NotFound: the job does not exist.
        """
        name = JobName(parse_name(job, "job"))
        if holder != "*":
            parse_token(holder, "holder of a pin")
        found = self._read(name)
        held = found.pins.get(Seq(seq), {})
        gone = [key for key in held if holder in ("*", key)]
        if lease and all(held[key].lease == lease for key in gone):
            self._etcd.revoke(lease)
            return bool(gone), found.revision
        if not gone:
            return False, found.revision
        deletes = tuple(Delete(self._keys.pin(name, Seq(seq), key)) for key in gone)
        return True, self._etcd.txn(Txn(success=deletes)).revision

    def delete(self, job: str, seq: int, request_id: str, by: str) -> tuple[str, int]:
        """Ask the leader to delete a checkpoint; return the request's id and its revision.

        Raises:
            NotFound: there is none.
            Conflict: it is one that must stay; the message says why.
        """
        name = JobName(parse_name(job, "job"))
        found = self._read(name)
        if request_id in found.orders:
            return request_id, found.orders[request_id]
        self._commit(found, name, Seq(seq))
        shelf = found.shelf()
        why = retention.untouchable(shelf).get(Seq(seq))
        if why:
            fix = {
                "pinned": f"dtrain checkpoints unpin {name} {seq} --all, once nobody needs it",
                "the newest": "take a newer one first: dtrain checkpoint JOB --wait",
            }.get(why, "wait until there is another one")
            raise Conflict(
                ErrorCode.CONFLICT, f"checkpoint {seq} of {name} is not deleted: it is {why}", fix=fix
            )
        return self._order(found, name, request_id, Order(found.spec.uid, OrderKind.DELETE, Seq(seq), by=by))

    def report(
        self, job: str, seq: int, blob: str, chunk: int, *, request_id: str, by: str
    ) -> tuple[str, int]:
        """Ask the leader to read a chunk again that somebody found damaged."""
        name = JobName(parse_name(job, "job"))
        found = self._read(name)
        if request_id in found.orders:
            return request_id, found.orders[request_id]
        self._commit(found, name, Seq(seq))
        if not blob.isascii() or not blob.isprintable() or len(blob) > KEY_CHARACTERS_MAX:
            raise Refused(ErrorCode.USAGE, "that is no blob's key")
        order = Order(found.spec.uid, OrderKind.INSPECT, Seq(seq), blob, chunk, by)
        return self._order(found, name, request_id, order)

    def collect(self, job: str, request_id: str, by: str) -> tuple[str, int]:
        """Ask the leader to search the store for orphans now."""
        name = JobName(parse_name(job, "job"))
        found = self._read(name)
        return self._order(found, name, request_id, Order(found.spec.uid, OrderKind.COLLECT, by=by))

    def import_(self, job: str, request_id: str, order: Order, *, ttl_s: int, lease: int) -> Importing:
        """Ask the leader to open a checkpoint whose bytes the caller writes; or renew that request.

        With a ``part`` in the order the caller says what it has written. A request
        that is gone is not made again: its answer is in the job's records.

        Raises:
            NotFound: there is no such job.
            Conflict: the job has begun, or somebody else imports.
            Refused: a number that cannot be.
        """
        name = JobName(parse_name(job, "job"))
        parse_token(request_id, "id of a request")
        for _ in range(TRIES_MAX):
            found = self._read(name)
            held = found.imports.get(request_id)
            if held is None:
                if lease or order.part is not None:
                    return Importing(request_id, lease, found.revision, answered=True)
                return self._begin_import(found, name, request_id, order, ttl_s)
            known = codec.decode(Order, held.value)
            try:
                self._etcd.keepalive(held.lease)
            except NotFound:
                continue
            if order.part is None or order.part == known.part:
                return Importing(request_id, held.lease, found.revision)
            unchanged = Compare(held.key, Target.MOD, held.mod_revision)
            put = Put(held.key, codec.encode(replace(known, part=order.part)), held.lease)
            result = self._etcd.txn(Txn((unchanged,), (put,)))
            if result.succeeded:
                return Importing(request_id, held.lease, result.revision)
        raise contended(f"job {name}")

    def withdraw_import(self, job: str, request_id: str) -> Importing:
        """Take a request to import back, and with it what was opened for it."""
        name = JobName(parse_name(job, "job"))
        found = self._read(name)
        held = found.imports.get(request_id)
        if held is not None:
            self._etcd.revoke(held.lease)
        return Importing(request_id, 0, found.revision, answered=True)

    def _begin_import(
        self, found: _Job, name: JobName, request_id: str, order: Order, ttl_s: int
    ) -> Importing:
        status = None if found.status is None or found.status.uid != found.spec.uid else found.status
        # One that was suspended, or made room, is QUEUED as well.
        if status is not None and (status.phase is not JobPhase.QUEUED or status.step > 0):
            where = f"at step {status.step}" if status.phase is JobPhase.QUEUED else str(status.phase)
            raise Conflict(
                ErrorCode.CONFLICT,
                f"job {name} is {where}: a checkpoint is imported before its first attempt only",
                fix="submit a job that waits for it: dtrain submit FILE --set name=NEW "
                "--set checkpoint.await_import=true, then import into that one",
            )
        if found.imports:
            other = codec.decode(Order, next(iter(found.imports.values())).value)
            raise Conflict(
                ErrorCode.CONFLICT,
                f"{other.by or 'somebody'} is importing a checkpoint into {name} already",
                fix="wait until that has ended; a request whose maker has gone ends within a minute",
            )
        if not PIN_TTL_S_MIN <= ttl_s <= PIN_TTL_S_MAX or not 1.0 <= order.timeout_s <= IMPORT_S_MAX:
            raise Refused(
                ErrorCode.USAGE,
                f"an import cannot take {order.timeout_s:g} s, renewed every {ttl_s} s",
                fix=f"allow it up to {IMPORT_S_MAX:g} s",
            )
        if not 0 <= order.step <= STEP_MAX:
            raise Refused(ErrorCode.USAGE, f"{order.step} is no step", fix=f"use 0 to {STEP_MAX}")
        lease = self._alive(0, ttl_s)
        order_id, revision = self._order(found, name, request_id, replace(order, uid=found.spec.uid), lease)
        return Importing(order_id, lease, revision)

    def review(self, job: str) -> Review:
        """Say what would be deleted now, and why; nothing is.

        Raises:
            Unavailable: this replica is busy with another review, or the store does not answer.
        """
        name = JobName(parse_name(job, "job"))
        if not self._reviewing.acquire(blocking=False):
            raise Unavailable(ErrorCode.COORDINATOR_UNAVAILABLE, "another review is under way here")
        try:
            return self._review(name)
        finally:
            self._reviewing.release()

    def _review(self, name: JobName) -> Review:
        found = self._read(name)
        kept = retention.why_kept(found.shelf())
        items = []
        for seq, (record, _) in sorted(found.commits.items()):
            stale = record.uid != found.spec.uid
            why = "of an earlier job of this name" if stale else kept.get(seq, "no policy keeps it")
            goes = stale or seq not in kept
            if seq in found.pins:
                goes, why = False, f"pinned by {', '.join(sorted(found.pins[seq]))}"
            items.append(Item("checkpoint", seq, f"step {record.step}", goes, why, record.bytes))
        items += [
            Item("checkpoint", seq, "a tombstone", True, "it is retired: its blobs are being deleted")
            for seq in sorted(found.garbage)
        ]
        status = found.status
        if status is None or not status.store:
            return Review(tuple(items), found.revision, "the job has no store yet")
        try:
            orphans = self._find_orphans(SweepOrphans(self._cluster, name, status.uid, status.store))
        except DtrainError as error:
            return Review(tuple(items), found.revision, error.message)
        why = "no record names it, and none ever will"
        items += [Item("orphan", Seq(0), key, True, why, size) for key, size in orphans.keys.items()]
        items += [Item("upload", Seq(0), token, True, "abandoned; " + why) for token in orphans.uploads]
        return Review(tuple(items), found.revision, orphans.problem)

    # Inside.

    def _order(
        self, found: _Job, name: JobName, request_id: str, order: Order, lease: int = 0
    ) -> tuple[str, int]:
        parse_token(request_id, "id of a request")
        if request_id in found.orders:
            return request_id, found.orders[request_id]
        if len(found.orders) >= ORDERS_MAX:
            raise Unavailable(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                f"{ORDERS_MAX} requests about checkpoints of {name} wait for the leader",
                fix="see whether there is one: dtrain get coordinators",
            )
        key = self._keys.order(name, request_id)
        record = replace(order, by=_text(order.by), at=self._now())
        # The same request twice is one: what is there already has the same id.
        result = self._etcd.txn(
            Txn((Compare(key, Target.CREATE, 0),), (Put(key, codec.encode(record), lease),), (Get(key),))
        )
        if result.succeeded:
            return request_id, result.revision
        # The revision of the record, not of the store: another application may have written since.
        return request_id, result.responses[0][0].mod_revision

    def _commit(self, found: _Job, name: JobName, seq: Seq) -> tuple[CommitRecord, int]:
        if seq not in found.commits:
            raise NotFound(
                ErrorCode.NOT_FOUND,
                f"job {name} has no committed checkpoint {seq}",
                fix=f"list them: dtrain checkpoints list {name}",
            )
        return found.commits[seq]

    def _alive(self, lease: int, ttl_s: int) -> int:
        """Return a lease that lives: the one given, renewed, or a new one."""
        if lease:
            try:
                self._etcd.keepalive(lease)
            except NotFound:
                pass
            else:
                return lease
        lease = secrets.randbits(LEASE_BITS) | 1
        self._etcd.grant(ttl_s, lease)
        return lease

    def _read(self, name: JobName) -> _Job:
        keys = self._keys
        own = keys.job(name)
        # Not all of the job: its events and snapshots are no business of this.
        folders = [
            f"{own}{part}/" for part in ("checkpoints", "bad", "pins", "verified", "garbage", "orders")
        ]
        result = self._etcd.txn(
            Txn(
                success=(
                    Get(keys.spec(name)),
                    Get(keys.status(name)),
                    Get(keys.latest(name)),
                    *(Get(folder, prefix_end(folder)) for folder in folders),
                )
            )
        )
        found: dict[str, list[KeyValue]] = {}
        for kv in (kv for response in result.responses for kv in response):
            parsed = keys.parse(kv.key)
            if parsed is not None:
                found.setdefault(parsed.kind, []).append(kv)
        spec = _one(found, "spec", JobSpec)
        if spec is None:
            raise NotFound(ErrorCode.NOT_FOUND, f"there is no job {name}", fix="list jobs: dtrain get jobs")
        pins: dict[Seq, dict[str, KeyValue]] = {}
        for kv in found.get("pin", ()):
            parsed = keys.parse(kv.key)
            if parsed is not None:
                pins.setdefault(parsed.seq, {})[parsed.name] = kv

        def seqs(kind: str) -> frozenset[Seq]:
            parsed = (keys.parse(kv.key) for kv in found.get(kind, ()))
            return frozenset(one.seq for one in parsed if one is not None)

        commits = [(codec.decode(CommitRecord, kv.value), kv) for kv in found.get("checkpoint", ())]
        return _Job(
            spec,
            _one(found, "status", JobStatus),
            _one(found, "latest", Latest),
            {record.seq: (record, kv.mod_revision) for record, kv in commits},
            seqs("bad"),
            pins,
            seqs("verified"),
            seqs("garbage"),
            {kv.key.rpartition("/")[2]: kv.mod_revision for kv in found.get("order", ())},
            # Of all requests only these hang on a lease.
            {kv.key.rpartition("/")[2]: kv for kv in found.get("order", ()) if kv.lease},
            result.revision,
        )

    def _now(self) -> str:
        return iso(self._clock.wall())


def _newest_good(found: _Job, name: JobName) -> Seq:
    good = [record.seq for record in found.shelf().good()]
    if not good:
        raise NotFound(
            ErrorCode.NOT_FOUND,
            f"job {name} has no checkpoint that is not damaged",
            fix=f"list them: dtrain checkpoints list {name}",
        )
    return max(good)


def _store_of(found: _Job) -> str:
    return found.status.store if found.status is not None else ""


def _one(found: Mapping[str, list[KeyValue]], kind: str, of: type[T]) -> T | None:
    kvs = found.get(kind)
    return codec.decode(of, kvs[0].value) if kvs else None


def _text(text: str) -> str:
    return text[:TEXT_CHARACTERS_MAX]
