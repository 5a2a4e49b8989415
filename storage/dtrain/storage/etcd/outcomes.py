"""What an answer of etcd means for the caller, decided by (status, code, message).

The table is ordered, the first match wins. Messages decide where etcd uses one
code for outcomes that differ: 503/14 is both "no leader", where nothing
happened, and "request timed out", which was seen to be applied 7 s later.
"""

import json
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable

INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, PERMISSION_DENIED = 3, 4, 5, 7
EXHAUSTED, OUT_OF_RANGE, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = 8, 11, 14, 15, 16


class LoginNeeded(Refused):
    """The token is missing, expired or of another member: log in once and resend."""


class LeaseExists(Refused):
    """A grant of an id that is granted already."""


def parse_error(body: str) -> tuple[int, str]:
    """Return (grpc code, message) of an error body: three shapes are in use."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return 2, body[:200].strip()
    return read_error(value) if isinstance(value, dict) else (2, body[:200].strip())


def read_error(value: dict[str, Any]) -> tuple[int, str]:
    """Return (grpc code, message) of a decoded error body."""
    if isinstance(value.get("error"), dict):
        value = value["error"]
    code = value.get("grpc_code", value.get("code", 2))
    message = value.get("message") or value.get("error") or ""
    return code if isinstance(code, int) else 2, str(message)[:500]


def classify(http_status: int, code: int, message: str) -> DtrainError:
    """Return the error to raise for an answer that is not a success."""
    text = message.lower()
    said = f"etcd answered {message!r} ({http_status}/{code})"
    if code == NOT_FOUND and "lease not found" in text:
        return NotFound(ErrorCode.LEASE_NOT_FOUND, "the lease has expired or was revoked")
    if "lease already exists" in text:
        return LeaseExists(ErrorCode.ETCD_REFUSED, said)
    if code == OUT_OF_RANGE and "compacted" in text:
        return Refused(ErrorCode.ETCD_COMPACTED, said, fix="list again at the present revision")
    if code == EXHAUSTED and "database space exceeded" in text:
        return no_space(said)
    if code == EXHAUSTED and "too many requests" in text:
        return Unavailable(ErrorCode.ETCD_UNAVAILABLE, said)
    if code == UNAUTHENTICATED or any(
        known in text for known in ("auth store is old", "user name is empty", "invalid auth token")
    ):
        return LoginNeeded(ErrorCode.ETCD_AUTH, said, fix="set the etcd user and password")
    if (
        code == PERMISSION_DENIED
        or "authentication failed" in text
        or "authentication is not enabled" in text
    ):
        return Refused(ErrorCode.ETCD_AUTH, said, fix="check the etcd user, its password and its role")
    if code == DATA_LOSS or "corrupt cluster" in text:
        return OutcomeUnknown(
            ErrorCode.ETCD_OUTCOME_UNKNOWN, said, fix="an etcd member is corrupt: replace it"
        )
    if "no leader" in text or "not a primary lessor" in text or "etcdserver: not leader" in text:
        return Unavailable(ErrorCode.ETCD_UNAVAILABLE, said)
    if code in (INVALID_ARGUMENT, OUT_OF_RANGE, NOT_FOUND, EXHAUSTED) or http_status in (400, 404, 405, 413):
        return Refused(ErrorCode.ETCD_REFUSED, said)
    # What is left (timeouts, a leader that changed, a member that stops, a proxy's 5xx) may yet be applied.
    return OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, said)


def no_space(said: str) -> Refused:
    """Return the error of a cluster that accepts no new data."""
    return Refused(
        ErrorCode.ETCD_NO_SPACE,
        "etcd has no space left and accepts no new data",
        cause=said,
        fix="etcdctl compact <revision>, then etcdctl defrag --cluster, then etcdctl alarm disarm",
    )
