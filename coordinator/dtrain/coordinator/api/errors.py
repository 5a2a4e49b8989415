"""The error tree as gRPC statuses: one table.

Code, message, cause and fix travel as JSON in the trailing metadata, so that a
client shows the same words wherever an error was raised.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

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
from dtrain.runtime import log

Handler = TypeVar("Handler", bound=Callable[..., Any])

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

_BY_CODE = {
    # More than the class says.
    ErrorCode.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorCode.NOT_PERMITTED: grpc.StatusCode.PERMISSION_DENIED,
}


def status_of(error: DtrainError) -> grpc.StatusCode:
    """Return the status for an error."""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
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


def translated(handler: Handler) -> Handler:
    """Wrap a servicer's method: what it raises ends the call with the right status."""

    @functools.wraps(handler)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return handler(self, request, context)
        except DtrainError as error:
            told = error
        except Exception as error:  # noqa: BLE001 - one call's bug must not look like the network's
            log.get("api").error("call failed", call=handler.__name__, exc_info=True)
            told = InvariantBroken(
                ErrorCode.BUG, f"{handler.__name__} failed: {type(error).__name__}", cause=str(error)
            )
        abort(context, told)

    return call  # type: ignore[return-value]
