"""Decisions to etcd, fenced by the term: the only way in which a leader writes.

What is promised: a decision is applied whole or not at all, and never after
another replica has become leader. What is not: that an answer arrives. An
unknown outcome is resolved by reading, never by assuming.
"""

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dtrain.coordinator.core.decisions import Decision, PutRecord
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Unavailable
from dtrain.protocol.ids import ClusterName, Term
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import (
    OPERATIONS_PER_TXN_MAX,
    Compare,
    Delete,
    Etcd,
    Get,
    KeyValue,
    Operation,
    Put,
    Target,
    Txn,
    TxnResult,
    flatten,
    prefix_end,
)

COMMIT_DEADLINE_S = 5.0
LEASE_BITS = 62
_NO_LEASES: Mapping[str, int] = {}
REVOKE_DEADLINE_S = 1.0
LOOK_DEADLINE_S = 3.0
LOOK_AGAIN_S = 0.1
LOOK_REFUSED_S = 1.0
"""Between looks while etcd refuses even to be read."""

_PASSING = frozenset({ErrorCode.ETCD_NO_SPACE, ErrorCode.ETCD_AUTH})
"""Refusals that say nothing about the decision: somebody ends them, and then it may be written."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The writes happened, all at ``revision``."""

    revision: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """Nothing happened: a record had changed. ``revision``: decide from there on."""

    revision: int


@dataclass(frozen=True, slots=True)
class Deposed:
    """Nothing happened and nothing will: the term is over."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """The writes may still happen. ``revision`` was read after they were tried."""

    revision: int


@dataclass(frozen=True, slots=True)
class NotWritten:
    """Nothing happened: etcd was not reached or takes no writes now (``retry``), or it refused these."""

    problem: str
    retry: bool


Outcome = Committed | Conflict | Deposed | Unknown | NotWritten


class Committer:
    """Commits decisions. Safe for several threads; each call blocks until it is resolved.

    ``stored`` returns a record as it is known here, for what a newer release wrote in it.
    """

    def __init__(
        self,
        etcd: Etcd,
        cluster: ClusterName,
        *,
        may_act: Callable[[], bool],
        on_no_space: Callable[[], None] = lambda: None,
        stored: Callable[[str], KeyValue | None] = lambda _key: None,
        pause: Callable[[float], None] = time.sleep,
        new_lease: Callable[[], int] = lambda: secrets.randbits(LEASE_BITS) or 1,
    ) -> None:
        self._etcd = etcd
        self._keys = Keys(cluster)
        self._may_act = may_act
        self._on_no_space = on_no_space
        self._stored = stored
        self._pause = pause
        self._new_lease = new_lease

    def commit(self, term: Term, decision: Decision) -> Outcome:
        """Apply the writes of ``decision`` if ``term`` is current and every guard holds."""
        if not self._may_act():
            # Correctness never rests on it: it spares etcd a transaction that the fence would refuse.
            return Deposed()
        try:
            leases = self._leases(decision)
        except (Unavailable, OutcomeUnknown) as error:
            # Nothing of the decision is written: a lease without a key does no harm, and ends.
            return NotWritten(error.message, retry=True)
        except DtrainError as error:
            return self._not_accepted(error)
        former = self._replaced(decision)
        txn = fenced(self._keys, term, decision, self._stored, leases)
        try:
            result = self._etcd.txn(txn, deadline_s=COMMIT_DEADLINE_S)
        except OutcomeUnknown:
            return self._look(term, txn)
        except Unavailable as error:
            return NotWritten(error.message, retry=True)
        except DtrainError as error:
            return self._not_accepted(error)
        # One that no key holds would be seen in etcd for as long as it was to last: days.
        self._revoke(former if result.succeeded else leases.values())
        if result.succeeded:
            return Committed(result.revision)
        return self._refused(term, result)

    def _leases(self, decision: Decision) -> dict[str, int]:
        """Grant a lease for each record that goes by itself."""
        leases: dict[str, int] = {}
        for write in _that_go(decision):
            leases[write.key] = self._new_lease()
            self._etcd.grant(math.ceil(write.lease_ttl_s), leases[write.key], deadline_s=COMMIT_DEADLINE_S)
        return leases

    def _replaced(self, decision: Decision) -> list[int]:
        """Leases that hold nothing any more once ``decision`` is written: each held one record."""
        former: list[int] = []
        for write in _that_go(decision):
            kv = self._stored(write.key)
            if kv is not None and kv.mod_revision == write.expect_mod:
                former.append(kv.lease)
        return former

    def _revoke(self, leases: Iterable[int]) -> None:
        for lease in filter(None, leases):
            # It ends in any case, only later.
            with contextlib.suppress(DtrainError):
                self._etcd.revoke(lease, deadline_s=REVOKE_DEADLINE_S)

    def _not_accepted(self, error: DtrainError) -> NotWritten:
        if error.code is ErrorCode.ETCD_NO_SPACE:
            self._on_no_space()
        # Space and permissions come back, and then the very same decision is right: the job is not to blame.
        return NotWritten(f"{error.code}: {error.message}", retry=error.code in _PASSING)

    def _refused(self, term: Term, result: TxnResult) -> Outcome:
        found = flatten(result.responses)
        if not self._is_ours(term, found):
            return Deposed()
        # The newest of what was compared, not the store's revision: that one may belong to
        # another application's key, and a mirror of our prefix would wait for it in vain.
        return Conflict(max(kv.mod_revision for kv in found.values()))

    def _look(self, term: Term, txn: Txn) -> Outcome:
        """Read what the transaction compared, until etcd answers or the lease is over."""
        while self._may_act():
            try:
                result = self._etcd.txn(Txn(success=txn.failure), deadline_s=LOOK_DEADLINE_S)
            except (Unavailable, OutcomeUnknown):
                # All members were tried; the end of the lease bounds the loop.
                self._pause(LOOK_AGAIN_S)
                continue
            except DtrainError as error:
                if error.code not in _PASSING:
                    return self._not_accepted(error)
                # The writes may stand all the same, and only reading can tell.
                self._pause(LOOK_REFUSED_S)
                continue
            found = flatten(result.responses)
            if not self._is_ours(term, found):
                return Deposed()
            written = _written_at(txn, found)
            if written is not None:
                return Committed(written)
            return Unknown(max(kv.mod_revision for kv in found.values()))
        return Deposed()

    def _is_ours(self, term: Term, found: dict[str, KeyValue]) -> bool:
        leader = found.get(self._keys.leader)
        return leader is not None and leader.create_revision == term


def _that_go(decision: Decision) -> Iterator[PutRecord]:
    """Records that go by themselves."""
    return (write for write in decision.writes if isinstance(write, PutRecord) and write.lease_ttl_s > 0)


def fenced(
    keys: Keys,
    term: Term,
    decision: Decision,
    stored: Callable[[str], KeyValue | None] = lambda _key: None,
    leases: Mapping[str, int] = _NO_LEASES,
) -> Txn:
    """Translate a decision to a transaction that holds only under ``term``.

    ``leases`` are those of the records that have one, by key. A record that is rewritten keeps the
    fields of ``stored`` that only a newer release knows.

    Raises:
        AssertionError: the decision contradicts itself or is larger than one
            transaction may be; a bug of ``plan``.
    """
    expected: dict[str, int] = {}
    for key, mod_revision in [
        *((guard.key, guard.mod_revision) for guard in decision.guards),
        *((write.key, write.expect_mod) for write in decision.writes if write.expect_mod is not None),
    ]:
        assert expected.setdefault(key, mod_revision) == mod_revision, f"{key} is expected at two revisions"
    compares = [Compare(keys.leader, Target.CREATE, term)]
    compares += [Compare(key, Target.MOD, mod_revision) for key, mod_revision in expected.items()]
    # Over a range this holds only if no key is there.
    compares += [
        Compare(rule.prefix, Target.CREATE, 0, range_end=prefix_end(rule.prefix)) for rule in decision.absent
    ]
    success = tuple(
        Put(write.key, codec.encode(write.value, over=_replaced(write, stored)), leases.get(write.key, 0))
        if isinstance(write, PutRecord)
        else Delete(write.key)
        for write in decision.writes
    )
    failure: tuple[Operation, ...] = (Get(keys.leader), *(Get(key) for key in expected if key != keys.leader))
    for part in (compares, success, failure):
        assert len(part) <= OPERATIONS_PER_TXN_MAX, "a decision is larger than one transaction may be"
    return Txn(tuple(compares), success, failure)


def _replaced(write: PutRecord, stored: Callable[[str], KeyValue | None]) -> bytes:
    """The record that ``write`` takes the place of; nothing if it is not the one it was decided from."""
    found = stored(write.key) if write.expect_mod else None
    return found.value if found is not None and found.mod_revision == write.expect_mod else b""


def _written_at(txn: Txn, found: dict[str, KeyValue]) -> int | None:
    """Revision of the writes if they are there to be seen, else None.

    Values carry the term, and each put demanded the key's former revision: equal
    bytes at one common newer revision can only be this transaction's.
    """
    puts = [operation for operation in txn.success if isinstance(operation, Put)]
    before = {compare.key: compare.operand for compare in txn.compares if compare.target is Target.MOD}
    revisions = set()
    for put in puts:
        kv = found.get(put.key)
        if kv is None or kv.value != put.value or kv.mod_revision == before.get(put.key):
            return None
        revisions.add(kv.mod_revision)
    return revisions.pop() if len(revisions) == 1 else None
