"""Errors over a real connection: what a servicer raises is what a client catches, in every program."""

import asyncio
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from dtrain.cli.client import Client, closing
from dtrain.coordinator.web.calls import Calls
from dtrain.protocol import errors
from dtrain.protocol.errors import (
    Conflict,
    DtrainError,
    ErrorCode,
    InvariantBroken,
    LeadershipLost,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb.coordinator_pb2_grpc import (
    CoordinatorServicer,
    CoordinatorStub,
    add_CoordinatorServicer_to_server,
)
from dtrain.runtime.grpc_errors import error_of, metadata_of, status_of

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, DtrainError) and kind is not DtrainError
]


class Ending(CoordinatorServicer):
    """Ends every call in the way it is told; without one it knows no call, as an older release."""

    def __init__(self) -> None:
        self.metadata: tuple[tuple[str, bytes], ...] = ()
        self.status: grpc.StatusCode | None = None

    def Info(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if self.status is None:
            return super().Info(request, context)
        context.set_trailing_metadata(self.metadata)
        context.abort(self.status, "told to")
        raise AssertionError

    def ends_with(self, error: DtrainError) -> None:
        self.metadata, self.status = metadata_of(error), status_of(error)


@pytest.fixture
def served() -> Iterator[tuple[Ending, str]]:
    ending = Ending()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_CoordinatorServicer_to_server(ending, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield ending, f"127.0.0.1:{port}"
    server.stop(None).wait()


def caught(address: str) -> DtrainError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as failed:
        CoordinatorStub(channel).Info(pb.InfoRequest(), timeout=5)  # type: ignore[no-untyped-call]
    return error_of(failed.value, address)


def test_every_kind_of_error_has_a_status_of_its_own() -> None:
    assert len(KINDS) == 8
    assert len({status_of(kind(ErrorCode.BUG, "x")) for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_arrives_as_it_was_raised(served: tuple[Ending, str], kind: type[DtrainError]) -> None:
    ending, address = served
    ending.ends_with(kind(ErrorCode.STORE_BUSY, "what", cause="why", fix="do this"))
    error = caught(address)
    # Who has just lost the leadership can be asked again.
    assert type(error) is (Unavailable if kind is LeadershipLost else kind)
    assert (error.code, error.message, error.cause, error.fix) == (
        ErrorCode.STORE_BUSY,
        "what",
        "why",
        "do this",
    )


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_arrives(served: tuple[Ending, str], code: ErrorCode) -> None:
    ending, address = served
    ending.ends_with(Refused(code, "what"))
    assert caught(address).code is code


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable, ErrorCode.COORDINATOR_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable, ErrorCode.COORDINATOR_UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, Unavailable, ErrorCode.COORDINATOR_UNAVAILABLE),
        (grpc.StatusCode.INVALID_ARGUMENT, Refused, ErrorCode.USAGE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Refused, ErrorCode.USAGE),
        (grpc.StatusCode.NOT_FOUND, NotFound, ErrorCode.NOT_FOUND),
        (grpc.StatusCode.ALREADY_EXISTS, Conflict, ErrorCode.ALREADY_EXISTS),
        (grpc.StatusCode.FAILED_PRECONDITION, Conflict, ErrorCode.CONFLICT),
        (grpc.StatusCode.ABORTED, Conflict, ErrorCode.CONFLICT),
        (grpc.StatusCode.UNAUTHENTICATED, Refused, ErrorCode.ETCD_AUTH),
        (grpc.StatusCode.PERMISSION_DENIED, Refused, ErrorCode.NOT_PERMITTED),
        (grpc.StatusCode.UNIMPLEMENTED, Refused, ErrorCode.OLDER_RELEASE),
        (grpc.StatusCode.INTERNAL, InvariantBroken, ErrorCode.BUG),
        (grpc.StatusCode.UNKNOWN, InvariantBroken, ErrorCode.BUG),
        (grpc.StatusCode.DATA_LOSS, InvariantBroken, ErrorCode.BUG),
    ],
)
def test_a_status_that_no_servicer_has_explained_stands_for_an_error(
    served: tuple[Ending, str], status: grpc.StatusCode, kind: type[DtrainError], code: ErrorCode
) -> None:
    ending, address = served
    ending.status = status
    error = caught(address)
    assert (type(error), error.code) == (kind, code)
    assert address in error.message
    assert "told to" in error.message + error.cause


@pytest.mark.parametrize("told", [b"no json", b"[1]", b'{"kind": "Refused", "code": "DT-4999"}'])
def test_what_a_newer_release_tells_is_not_lost(served: tuple[Ending, str], told: bytes) -> None:
    ending, address = served
    ending.ends_with(Refused(ErrorCode.USAGE, "what"))
    ((key, _),) = ending.metadata
    ending.metadata = ((key, told),)
    error = caught(address)
    assert (error.code, error.message) == (ErrorCode.BUG, "told to")


def test_a_servers_error_of_no_known_kind_keeps_its_words(served: tuple[Ending, str]) -> None:
    class Newer(DtrainError):
        pass

    ending, address = served
    ending.ends_with(Newer(ErrorCode.STORE_FULL, "what", fix="do this"))
    error = caught(address)
    assert (type(error), error.code, error.fix) == (DtrainError, ErrorCode.STORE_FULL, "do this")


@pytest.mark.parametrize(
    "problem",
    [None, OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "who knows"), Refused(ErrorCode.USAGE, "no")],
)
def test_dashboard_and_command_line_say_the_same(
    served: tuple[Ending, str], problem: DtrainError | None
) -> None:
    ending, address = served
    if problem is not None:
        ending.ends_with(problem)
    with closing(Client([address])) as client:
        told = client.info_each()[address]
    assert isinstance(told, DtrainError)
    calls = Calls(lambda: [address], None, "somebody")
    try:
        assert asyncio.run(calls.infos({"c1": address})) == {"c1": {"problem": told.message}}
    finally:
        calls.close()
