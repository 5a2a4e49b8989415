"""The error tree over gRPC: what a servicer's error becomes on the wire, and what a client makes of it.

Code, message, cause and fix travel as JSON in the trailing metadata, so that a
client shows the same words wherever an error was raised. A status without them
comes from gRPC itself, or from a release that does not know the call.
"""

import json

import grpc

from dtrain.protocol.errors import (
    Conflict,
    DtrainError,
    ErrorCode,
    InvariantBroken,
    LeadershipLost,
    NotFound,
    OutcomeUnknown,
    Refused,
    TimedOut,
    Unavailable,
)

ERROR_KEY = "dtrain-error-bin"

_STATUS: tuple[tuple[type[DtrainError], grpc.StatusCode], ...] = (
    # Most special first.
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Refused, grpc.StatusCode.INVALID_ARGUMENT),
    (Conflict, grpc.StatusCode.ABORTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (OutcomeUnknown, grpc.StatusCode.UNKNOWN),
    (LeadershipLost, grpc.StatusCode.FAILED_PRECONDITION),
    (TimedOut, grpc.StatusCode.DEADLINE_EXCEEDED),
    (InvariantBroken, grpc.StatusCode.INTERNAL),
)

_STATUS_BY_CODE = {
    # More than the class says.
    ErrorCode.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorCode.NOT_PERMITTED: grpc.StatusCode.PERMISSION_DENIED,
}

_KINDS: dict[str, type[DtrainError]] = {kind.__name__: kind for kind, _ in _STATUS}

_ERROR_BY_STATUS: dict[grpc.StatusCode, tuple[type[DtrainError], ErrorCode]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (Refused, ErrorCode.USAGE),
    grpc.StatusCode.NOT_FOUND: (NotFound, ErrorCode.NOT_FOUND),
    grpc.StatusCode.ALREADY_EXISTS: (Conflict, ErrorCode.ALREADY_EXISTS),
    grpc.StatusCode.FAILED_PRECONDITION: (Conflict, ErrorCode.CONFLICT),
    grpc.StatusCode.ABORTED: (Conflict, ErrorCode.CONFLICT),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Refused, ErrorCode.USAGE),
    grpc.StatusCode.UNAUTHENTICATED: (Refused, ErrorCode.ETCD_AUTH),
    grpc.StatusCode.PERMISSION_DENIED: (Refused, ErrorCode.NOT_PERMITTED),
}

_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def status_of(error: DtrainError) -> grpc.StatusCode:
    """Return the status for an error."""
    if error.code in _STATUS_BY_CODE:
        return _STATUS_BY_CODE[error.code]
    return next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def metadata_of(error: DtrainError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata of a call that ends with ``error``."""
    told = {
        "kind": type(error).__name__,
        "code": error.code.value,
        "message": error.message,
        "cause": error.cause,
        "fix": error.fix,
    }
    return ((ERROR_KEY, json.dumps(told).encode()),)


def error_of(error: grpc.RpcError, address: str) -> DtrainError:
    """Return the error that the coordinator at ``address`` meant, or that its status stands for."""
    status = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
    if isinstance(error, grpc.Call):
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_KEY:
                return _told(value if isinstance(value, bytes) else value.encode(), details)
    if status in _SILENT:
        return Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE, f"the coordinator at {address} does not answer", cause=details
        )
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "concurrent" in details.lower():
        # Too many calls for this replica, which has not looked at ours; another one may have room.
        return Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE, f"the coordinator at {address} is busy", cause=details
        )
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return Refused(
            ErrorCode.OLDER_RELEASE,
            f"the coordinator at {address} is of a release that does not know how to do this",
            cause=details,
            fix="upgrade the coordinators first, one by one: docs/compatibility.md",
        )
    kind, code = _ERROR_BY_STATUS.get(status, (InvariantBroken, ErrorCode.BUG))
    return kind(code, f"the coordinator at {address} answered {status.name}: {details}")


def _told(value: bytes, details: str) -> DtrainError:
    try:
        told = json.loads(value)
        kind = _KINDS.get(told.get("kind", ""), DtrainError)
        code = ErrorCode(told.get("code", ""))
    except (ValueError, AttributeError):
        # A newer server may know codes that this client does not.
        return DtrainError(ErrorCode.BUG, details)
    # A replica that has just lost its leadership can still be asked again.
    kind = Unavailable if kind is LeadershipLost else kind
    return kind(
        code,
        str(told.get("message") or details),
        cause=str(told.get("cause", "")),
        fix=str(told.get("fix", "")),
    )
