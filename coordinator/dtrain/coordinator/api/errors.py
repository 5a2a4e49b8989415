"""What servicers raise ends the call: the only place where an error becomes a status."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc

from dtrain.protocol.errors import Conflict, DtrainError, ErrorCode, InvariantBroken
from dtrain.runtime import grpc_errors, log

Handler = TypeVar("Handler", bound=Callable[..., Any])


def contended(what: str) -> Conflict:
    """Return what is said of a record that others keep changing first."""
    return Conflict(ErrorCode.CONFLICT, f"{what} is being changed by others", fix="try again")


def abort(context: grpc.ServicerContext, error: DtrainError) -> NoReturn:
    """End a call with ``error``."""
    context.set_trailing_metadata(grpc_errors.metadata_of(error))
    context.abort(grpc_errors.status_of(error), error.message)
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
