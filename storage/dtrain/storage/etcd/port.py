"""What dtrain needs of etcd: the specification that every transport meets.

Keys are ASCII strings, values are bytes. All reads are linearizable. An
implementation is safe to call from several threads.

Timing-critical: ``keepalive``, ``txn`` (campaign, commit). Everything else may
take seconds. Each call takes a total deadline and ends by it, whatever the
server does; a per-read socket timeout alone would let a slow drip hang it.

Outcomes, told apart because the callers' next step differs:

* ``Unavailable``     nothing was applied (refused connection, no leader): retry.
* ``OutcomeUnknown``  a write may be applied now or later: read, then resend the
  *same* transaction if its guards still hold. Reads never raise it.
* ``Refused``         the request is wrong (too large, too many operations, no
  permission, ...): retrying cannot help.
* ``NotFound`` with ``LEASE_NOT_FOUND``   the lease is gone: the session is over.
* ``Refused`` with ``ETCD_COMPACTED``     list again at a new revision.
* ``Refused`` with ``ETCD_NO_SPACE``      etcd accepts no new data; renewals,
  revokes and deletes go on working.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

OPERATIONS_PER_TXN_MAX = 128
"""etcd's default ``--max-txn-ops``, which bounds compares and each branch alike."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key at one revision. ``lease`` is 0 for a key that never expires."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Target(Enum):
    """What a compare looks at; all but VALUE are integers, 0 for an absent key."""

    CREATE = "CREATE"
    MOD = "MOD"
    VERSION = "VERSION"
    LEASE = "LEASE"
    VALUE = "VALUE"


class Relation(Enum):
    """How the stored side must relate to the operand."""

    EQUAL = "EQUAL"
    NOT_EQUAL = "NOT_EQUAL"
    GREATER = "GREATER"
    LESS = "LESS"


@dataclass(frozen=True, slots=True)
class Compare:
    """One guard of a transaction.

    With ``range_end`` it must hold for every key in [key, range_end). An absent
    key, and an empty range, compares as zeros; VALUE compared there is false.
    """

    key: str
    target: Target
    operand: int | bytes
    relation: Relation = Relation.EQUAL
    range_end: str | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Set a key. ``lease`` 0 detaches it from any lease."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, or all keys in [key, range_end)."""

    key: str
    range_end: str | None = None


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key, or all keys in [key, range_end) in key order."""

    key: str
    range_end: str | None = None


Operation = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class Txn:
    """If all compares hold, ``success`` happens atomically, else ``failure``.

    No key may be put twice, nor put and deleted, in one branch.
    """

    compares: tuple[Compare, ...] = ()
    success: tuple[Operation, ...] = ()
    failure: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Outcome of a transaction.

    ``responses`` matches the operations of the branch taken: the key-values of
    a Get, () for a Put, and () for a Delete.
    ``revision`` is the store's revision after the transaction: the revision of
    its writes if it wrote.
    """

    succeeded: bool
    revision: int
    responses: tuple[tuple[KeyValue, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class RangeResult:
    """Key-values in key order, read at ``revision``; ``more``: the limit cut it."""

    items: tuple[KeyValue, ...]
    revision: int
    more: bool = False
    raft_term: int = 0
    """Never older than that of an answer before it, unless etcd was restored; 0: not known."""


@dataclass(frozen=True, slots=True)
class Status:
    """Identity and progress of the server that answered, which may lag behind the cluster."""

    cluster_id: int
    member_id: int
    raft_term: int
    revision: int
    version: str
    alarms: tuple[str, ...] = ()
    db_size_bytes: int = 0
    """Of the member's database file; 0: not told."""
    db_quota_bytes: int = 0
    """What it may grow to; 0: not told (etcd tells from 3.6 on)."""


@dataclass(frozen=True, slots=True)
class Event:
    """A change of one key. ``previous`` is not carried: mirrors remember it."""

    kind: str
    """``put`` or ``delete``."""

    kv: KeyValue
    """For a delete only ``key`` and ``mod_revision`` mean anything."""


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Events of one or more whole revisions, never a part of one, in order.

    Without events it is a progress notification: nothing up to and including
    ``revision`` is missing.
    """

    revision: int
    events: tuple[Event, ...] = ()


class WatchStream(Protocol):
    """An open watch. Not safe to share between threads, except ``close``."""

    def next(self, timeout_s: float) -> WatchBatch | None:
        """Return the next batch, or None after ``timeout_s`` of silence.

        Raises:
            Unavailable: the stream ended; resume from the next revision.
            Refused: ``ETCD_COMPACTED`` (list again) or ``ETCD_AUTH``.
        """
        ...

    def close(self) -> None:
        """End the watch; a blocked ``next`` returns or raises soon after."""
        ...


class Etcd(Protocol):
    """A connection to one etcd cluster through any of its members."""

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult: ...

    def range(
        self,
        key: str,
        range_end: str | None = None,
        *,
        revision: int = 0,
        limit: int = 0,
        deadline_s: float = 5.0,
    ) -> RangeResult:
        """Read [key, range_end) at ``revision`` (0: now, linearizable)."""
        ...

    def grant(self, ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        """Grant ``lease`` (an id of the caller's) and return the TTL granted, s.

        Idempotent for one id: a lease that exists already counts as granted.
        """
        ...

    def keepalive(self, lease: int, *, deadline_s: float = 1.5) -> float:
        """Renew and return the TTL, s.

        Raises:
            NotFound: the lease has expired or was revoked.
        """
        ...

    def revoke(self, lease: int, *, deadline_s: float = 5.0) -> None:
        """Revoke; keys of the lease vanish in one revision. Gone already is fine."""
        ...

    def watch(self, key: str, range_end: str | None, start_revision: int) -> WatchStream:
        """Watch [key, range_end) from ``start_revision`` on, with progress."""
        ...

    def status(self, *, deadline_s: float = 5.0) -> Status: ...

    def close(self) -> None: ...


def prefix_end(prefix: str) -> str:
    """Return the key behind the last one that starts with ``prefix`` (ASCII)."""
    if not prefix:
        raise ValueError("an empty prefix would cover other applications' keys")
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def put_if_absent(key: str, value: bytes, lease: int = 0) -> Txn:
    """Create ``key``; on failure the transaction returns what is there."""
    return Txn((Compare(key, Target.CREATE, 0),), (Put(key, value, lease),), (Get(key),))


def flatten(responses: Sequence[tuple[KeyValue, ...]]) -> dict[str, KeyValue]:
    """Index the key-values of all Get responses by key."""
    return {kv.key: kv for kvs in responses for kv in kvs}
