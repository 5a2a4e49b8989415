"""Ports and pools of the API."""

import threading
from concurrent import futures

import grpc

from dtrain.coordinator.api.servicers import CoordinatorServicer
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.pb import coordinator_pb2_grpc

THREADS_ANSWERING = 24
THREADS_WAITING = 72
"""Calls that wait for news hold a thread each; more of them are answered at once."""

REQUEST_BYTES_MAX = 4 * 1024 * 1024
QUEUED_MAX = 128

OPTIONS = (
    # Without it two processes bind one port without an error, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


def waiting_slots() -> threading.BoundedSemaphore:
    """Return the bound on calls that wait, as ``CoordinatorServicer`` takes it."""
    return threading.BoundedSemaphore(THREADS_WAITING)


class Server:
    """The gRPC server of one replica. Bound when built, serving once started."""

    def __init__(self, listen: str) -> None:
        self._pool = futures.ThreadPoolExecutor(THREADS_ANSWERING + THREADS_WAITING, "api")
        self._server = grpc.server(
            self._pool,
            options=OPTIONS,
            maximum_concurrent_rpcs=THREADS_ANSWERING + THREADS_WAITING + QUEUED_MAX,
        )
        host, _, _port = listen.rpartition(":")
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            port, cause = 0, str(error)
        else:
            cause = ""
        if not port:
            raise Refused(
                ErrorCode.PORT_IN_USE,
                f"{listen} cannot be listened on",
                cause=cause,
                fix="choose another address with --listen, or stop what listens there",
            )
        self.address = f"{host}:{port}"

    def start(self, servicer: CoordinatorServicer) -> None:
        """Serve."""
        register = coordinator_pb2_grpc.add_CoordinatorServicer_to_server
        register(servicer, self._server)  # type: ignore[no-untyped-call]
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Take no more calls, give those under way ``grace_s``, and wait no longer than that."""
        self._server.stop(grace_s).wait(grace_s)

    def close(self) -> None:
        """Free the port and the threads, at leisure; ``stop`` comes first."""
        # The server's own thread hands calls to the pool until it has ended.
        self._server.wait_for_termination(5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)
