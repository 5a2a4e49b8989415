"""Rules of etcd's transactions, for the model: compares, limits, refusals. Pure."""

from operator import eq, gt, lt, ne

from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.storage.etcd.port import (
    OPERATIONS_PER_TXN_MAX,
    Compare,
    Delete,
    KeyValue,
    Put,
    Relation,
    Target,
    Txn,
)

REQUEST_BYTES_MAX = 1536 * 1024
"""etcd's default ``--max-request-bytes``."""

_RELATIONS = {Relation.EQUAL: eq, Relation.NOT_EQUAL: ne, Relation.GREATER: gt, Relation.LESS: lt}


def holds(compare: Compare, found: list[KeyValue]) -> bool:
    """Tell whether a guard holds for the keys it covers that exist.

    Where none exists, etcd compares zeros, for a range as for a key; only a
    value that is not there satisfies nothing.
    """
    if found:
        return all(_relates(compare, kv) for kv in found)
    return compare.target is not Target.VALUE and _relates(compare, KeyValue(compare.key, b"", 0, 0, 0))


def _relates(compare: Compare, kv: KeyValue) -> bool:
    stored: int | bytes
    match compare.target:
        case Target.CREATE:
            stored = kv.create_revision
        case Target.MOD:
            stored = kv.mod_revision
        case Target.VERSION:
            stored = kv.version
        case Target.LEASE:
            stored = kv.lease
        case Target.VALUE:
            stored = kv.value
    return bool(_RELATIONS[compare.relation](stored, compare.operand))


def check_limits(txn: Txn) -> None:
    """Refuse what etcd refuses before it looks at any key.

    Raises:
        Refused: too many operations, too large, or a key written twice.
    """
    if max(len(txn.compares), len(txn.success), len(txn.failure)) > OPERATIONS_PER_TXN_MAX:
        raise Refused(
            ErrorCode.ETCD_REFUSED, "etcd answered 'etcdserver: too many operations in txn request'"
        )
    size = 0
    for branch in (txn.success, txn.failure):
        puts: set[str] = set()
        for operation in branch:
            size += len(operation.key) + 8
            if isinstance(operation, Put):
                size += len(operation.value)
                if operation.key in puts:
                    raise _duplicate(operation.key)
                puts.add(operation.key)
        for operation in branch:
            if isinstance(operation, Delete):
                end = operation.range_end
                if any(key == operation.key if end is None else operation.key <= key < end for key in puts):
                    raise _duplicate(operation.key)
    if size > REQUEST_BYTES_MAX:
        raise Refused(ErrorCode.ETCD_REFUSED, "etcd answered 'request is too large'")


def _duplicate(key: str) -> Refused:
    return Refused(ErrorCode.ETCD_REFUSED, f"etcd answered 'duplicate key given in txn request': {key}")


def lease_not_found() -> NotFound:
    """Return the error of a lease that is not there."""
    return NotFound(ErrorCode.LEASE_NOT_FOUND, "the lease has expired or was revoked")
