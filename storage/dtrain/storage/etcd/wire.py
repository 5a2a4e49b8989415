"""The port's values as JSON of etcd's gateway, and back. Pure.

The gateway writes int64 as strings, bytes as base64, and leaves zero fields
out: a failed transaction has no ``succeeded`` at all.
"""

from base64 import b64decode, b64encode
from typing import Any

from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    Target,
    Txn,
    TxnResult,
    WatchBatch,
)

Json = dict[str, Any]

_OPERAND_FIELDS = {
    Target.CREATE: "create_revision",
    Target.MOD: "mod_revision",
    Target.VERSION: "version",
    Target.LEASE: "lease",
}


def encode(data: bytes) -> str:
    """Return ``data`` as the gateway wants bytes."""
    return b64encode(data).decode("ascii")


def range_body(key: str, range_end: str | None, revision: int = 0, limit: int = 0) -> Json:
    """Return the request that reads [key, range_end), or one key."""
    body: Json = {"key": encode(key.encode("ascii"))}
    if range_end is not None:
        body["range_end"] = encode(range_end.encode("ascii"))
    if revision:
        body["revision"] = str(revision)
    if limit:
        body["limit"] = str(limit)
    return body


def txn_body(txn: Txn) -> Json:
    """Return the request of a transaction."""
    return {
        "compare": [_compare(compare) for compare in txn.compares],
        "success": [_operation(operation) for operation in txn.success],
        "failure": [_operation(operation) for operation in txn.failure],
    }


def _compare(compare: Compare) -> Json:
    body: Json = range_body(compare.key, compare.range_end)
    body["target"] = compare.target.value
    body["result"] = compare.relation.value
    if compare.target is Target.VALUE:
        assert isinstance(compare.operand, bytes)
        body["value"] = encode(compare.operand)
    else:
        assert isinstance(compare.operand, int)
        body[_OPERAND_FIELDS[compare.target]] = str(compare.operand)
    return body


def _operation(operation: Operation) -> Json:
    match operation:
        case Put(key, value, lease):
            put: Json = {"key": encode(key.encode("ascii")), "value": encode(value)}
            if lease:
                put["lease"] = str(lease)
            return {"request_put": put}
        case Delete(key, range_end):
            return {"request_delete_range": range_body(key, range_end)}
        case Get(key, range_end):
            return {"request_range": range_body(key, range_end)}


def header_int(answer: Json, field: str) -> int:
    """Return a number of the answer's header; absent is 0."""
    return int(answer.get("header", {}).get(field, 0))


def txn_result(answer: Json) -> TxnResult:
    """Read the answer to a transaction."""
    responses = tuple(
        tuple(_key_value(kv) for kv in response.get("response_range", {}).get("kvs", ()))
        for response in answer.get("responses", ())
    )
    return TxnResult(bool(answer.get("succeeded", False)), header_int(answer, "revision"), responses)


def range_result(answer: Json, revision: int = 0) -> RangeResult:
    """Read the answer to a range; one pinned to ``revision`` is of that revision."""
    items = tuple(_key_value(kv) for kv in answer.get("kvs", ()))
    return RangeResult(
        items,
        revision or header_int(answer, "revision"),
        bool(answer.get("more", False)),
        header_int(answer, "raft_term"),
    )


def watch_batch(result: Json) -> WatchBatch:
    """Read a watch message; deletions carry only key and revision."""
    events = tuple(
        Event("delete" if event.get("type") == "DELETE" else "put", _key_value(event["kv"]))
        for event in result.get("events", ())
    )
    # The header may be ahead of the events while the watch catches up: only events prove what was delivered.
    revision = events[-1].kv.mod_revision if events else header_int(result, "revision")
    return WatchBatch(revision, events)


def _key_value(kv: Json) -> KeyValue:
    return KeyValue(
        key=b64decode(kv["key"]).decode("utf-8", "surrogateescape"),
        value=b64decode(kv.get("value", "")),
        create_revision=int(kv.get("create_revision", 0)),
        mod_revision=int(kv.get("mod_revision", 0)),
        version=int(kv.get("version", 0)),
        lease=int(kv.get("lease", 0)),
    )
