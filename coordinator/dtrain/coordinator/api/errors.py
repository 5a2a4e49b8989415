"""The error tree as gRPC statuses: one table.

Code, message, cause and fix travel as JSON in the trailing metadata, so that a
client shows the same words wherever an error was raised.
"""

import json
from typing import NoReturn

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


def status_of(error: DtrainError) -> grpc.StatusCode:
    """Return the status for an error."""
    if error.code is ErrorCode.ALREADY_EXISTS:
        return grpc.StatusCode.ALREADY_EXISTS
    return next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def abort(context: grpc.ServicerContext, error: DtrainError) -> NoReturn:
    """End a call with ``error``."""
    detail = {
        "kind": type(error).__name__,
        "code": error.code.value,
        "message": error.message,
        "cause": error.cause,
        "fix": error.fix,
    }
    context.set_trailing_metadata(((ERROR_KEY, json.dumps(detail).encode()),))
    context.abort(status_of(error), error.message)
    raise AssertionError("abort returned")
