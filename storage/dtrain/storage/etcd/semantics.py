"""Rules of etcd's transactions, for the model: compares, limits, refusals. Pure."""

from operator import eq, gt, lt, ne

from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.storage.etcd.port import (
    OPERATIONS_PER_TXN_MAX,
    Compare,
    Delete,
    KeyValue,
    Operation,
    Put,
    Relation,
    Target,
    Txn,
)

REQUEST_BYTES_MAX = 1536 * 1024
"""etcd's default ``--max-request-bytes``: what a request that writes may take in the log."""

MESSAGE_BYTES_MAX = REQUEST_BYTES_MAX + 512 * 1024
"""What the server reads of any request, one that only reads included."""

LEASE_TTL_S_MIN, LEASE_TTL_S_MAX = 2, 9_000_000_000
"""The shortest TTL follows from etcd's default election timeout: less is raised to it."""

_FIELD_BYTES = 8
"""About what protobuf adds to a key or value: tags and lengths."""

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
        Refused: too many operations, too large, an empty key, or a key written twice.
    """
    if max(len(txn.compares), len(txn.success), len(txn.failure)) > OPERATIONS_PER_TXN_MAX:
        raise _refused("etcdserver: too many operations in txn request")
    for named in (*txn.compares, *txn.success, *txn.failure):
        check_key(named.key)
    for branch in (txn.success, txn.failure):
        _check_written_once(branch)
    writes = any(isinstance(operation, Put | Delete) for operation in txn.success + txn.failure)
    if _request_bytes(txn) > (REQUEST_BYTES_MAX if writes else MESSAGE_BYTES_MAX):
        raise _refused("etcdserver: request is too large")


def check_key(key: str) -> None:
    """Refuse the empty key.

    Raises:
        Refused: it is.
    """
    if not key:
        raise _refused("etcdserver: key is not provided")


def check_ttl(ttl_s: int) -> None:
    """Refuse a TTL beyond etcd's.

    Raises:
        Refused: it is.
    """
    if ttl_s > LEASE_TTL_S_MAX:
        raise _refused("etcdserver: too large lease TTL")


def _check_written_once(branch: tuple[Operation, ...]) -> None:
    puts: set[str] = set()
    for operation in branch:
        if isinstance(operation, Put):
            if operation.key in puts:
                raise _duplicate(operation.key)
            puts.add(operation.key)
    for operation in branch:
        if isinstance(operation, Delete):
            end = operation.range_end
            if any(key == operation.key if end is None else operation.key <= key < end for key in puts):
                raise _duplicate(operation.key)


def _request_bytes(txn: Txn) -> int:
    size = 0
    for compare in txn.compares:
        size += len(compare.key) + len(compare.range_end or "") + 2 * _FIELD_BYTES
        if isinstance(compare.operand, bytes):
            size += len(compare.operand)
    for operation in txn.success + txn.failure:
        size += len(operation.key) + _FIELD_BYTES
        size += len(operation.value) if isinstance(operation, Put) else len(operation.range_end or "")
    return size


def _duplicate(key: str) -> Refused:
    return _refused(f"etcdserver: duplicate key given in txn request: {key}")


def _refused(said: str) -> Refused:
    return Refused(ErrorCode.ETCD_REFUSED, f"etcd answered {said!r}")


def lease_not_found() -> NotFound:
    """Return the error of a lease that is not there."""
    return NotFound(ErrorCode.LEASE_NOT_FOUND, "the lease has expired or was revoked")
