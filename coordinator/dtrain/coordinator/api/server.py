"""Ports and pools of the API."""

import resource
import threading
from concurrent import futures

import grpc

from dtrain.coordinator.api.errors import abort
from dtrain.coordinator.api.lookup import REPLY_BYTES_MAX
from dtrain.coordinator.api.servicers import CoordinatorServicer
from dtrain.protocol.pb import coordinator_pb2_grpc
from dtrain.runtime import grpc_tls

THREADS_ANSWERING = 24
THREADS_WAITING = 72
"""Calls that wait for news hold a thread each; more of them are answered at once."""

REQUEST_BYTES_MAX = 4 * 1024 * 1024
QUEUED_MAX = 128
CONNECTIONS_MAX = 4000
DESCRIPTORS_WANTED = 2 * CONNECTIONS_MAX
"""Half for clients; the rest for agents, etcd and the store."""

OPTIONS = (
    *grpc_tls.SERVER_OPTIONS,
    # One connection may use all threads: whoever follows a job of many ranks waits on many logs.
    ("grpc.max_concurrent_streams", THREADS_ANSWERING + THREADS_WAITING + QUEUED_MAX),
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", REPLY_BYTES_MAX),
)


def _room_for_connections() -> int:
    """Raise this process's soft limit on descriptors, often 1,024; return how many are for clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS_WANTED:
        wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(DESCRIPTORS_WANTED, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, soft // 2)


def waiting_slots() -> threading.BoundedSemaphore:
    """Return the bound on calls that wait, as ``CoordinatorServicer`` takes it."""
    return threading.BoundedSemaphore(THREADS_WAITING)


class Server:
    """The gRPC server of one replica. Bound when built, serving once started."""

    def __init__(self, listen: str, tls: grpc_tls.Credentials | None = None) -> None:
        """Bind.

        Raises:
            Refused: PORT_IN_USE.
        """
        self._pool = futures.ThreadPoolExecutor(THREADS_ANSWERING + THREADS_WAITING, "api")
        self._server = grpc.server(
            self._pool,
            interceptors=[grpc_tls.Gate(tls, abort)],
            options=(*OPTIONS, ("grpc.max_allowed_incoming_connections", _room_for_connections())),
            maximum_concurrent_rpcs=THREADS_ANSWERING + THREADS_WAITING + QUEUED_MAX,
        )
        host, _, _port = listen.rpartition(":")
        self.address = f"{host}:{grpc_tls.bind(self._server, listen, tls)}"

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
