"""A TCP proxy in front of one server, whose behaviour can be changed while it runs.

It is the bad network of a local cluster: tests and ``dtrain chaos`` put one
before an etcd member, a coordinator or an S3 server and then cut, delay, drip
or garble what passes. One thread serves all connections of a proxy; it ends
with ``close``.

What does not get through is held, not dropped, because that is what TCP does
in a partition: it arrives late, in order, once the network is back. A server
that is dead behind the proxy shows as a connection that is accepted and then
reset, not as a refused one.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

READ_BYTES = 65536
HELD_BYTES_MAX = 4 * 1024 * 1024
"""What one direction of a connection holds; beyond it the sender is made to wait."""

_SENDS_PER_TURN = 256
"""How many pieces one connection sends before the others get a turn."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close sends RST."""


@dataclass(frozen=True, slots=True)
class Flow:
    """How the bytes of one direction travel. The default passes them on as they come."""

    deliver: bool = True
    delay_s: float = 0.0
    """How long after its arrival each piece is passed on."""
    bytes_per_s: float = 0.0
    """0: no bound."""
    chunk_bytes: int = 0
    """Bytes per send; 0: as they come. A fast sender's pieces may be read together."""

    def __post_init__(self) -> None:
        if self.delay_s < 0 or self.bytes_per_s < 0 or self.chunk_bytes < 0:
            raise ValueError(f"no part of {self} may be negative")


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a proxy treats its connections, present and new."""

    refuse: bool = False
    """Reset what is open and refuse what comes."""
    to_server: Flow = Flow()
    to_client: Flow = Flow()
    close_after_bytes: int | None = None
    """End each connection after so many further bytes to its client."""


PASS = Behaviour()
CUT = Behaviour(refuse=True)
BLACK_HOLE = Behaviour(to_server=Flow(deliver=False), to_client=Flow(deliver=False))
"""Half-open: connections are accepted and live, nothing arrives."""
ONLY_TO_SERVER = Behaviour(to_client=Flow(deliver=False))
ONLY_TO_CLIENT = Behaviour(to_server=Flow(deliver=False))


def http_chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk of a chunked HTTP response, for ``inject``."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class TcpProxy:
    """A proxy before ``server`` (``host:port`` or a URL). Thread-safe; ``close`` it.

    Each change of behaviour holds for all connections once the call returns.

    Raises:
        OSError: the listening port is taken.
    """

    def __init__(self, server: str, *, port: int = 0) -> None:
        url = urlsplit(server if "://" in server else f"tcp://{server}")
        if not url.hostname or not url.port:
            raise ValueError(f"{server!r} names no host and port")
        self._scheme = url.scheme
        self._server = (url.hostname, url.port)
        self._behaviour = PASS
        self._listener: socket.socket | None = _listen(port)
        self._port: int = self._listener.getsockname()[1]
        self._links: set[_Link] = set()
        self._accepted = 0
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._lock = threading.Lock()
        self._jobs: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._closing = False
        self._failure: Exception | None = None
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self._port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1; the same for its whole life."""
        return self._port

    @property
    def address(self) -> str:
        """``127.0.0.1:<port>``."""
        return f"127.0.0.1:{self._port}"

    @property
    def endpoint(self) -> str:
        """The address with the scheme that ``server`` had."""
        return f"{self._scheme}://{self.address}"

    @property
    def behaviour(self) -> Behaviour:
        """What was set last."""
        return self._behaviour

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._links)

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        return self._accepted

    # Changing what it does.

    def set(self, behaviour: Behaviour) -> None:
        """Treat every connection like this from now on; what was held may leave."""
        self._do(lambda: self._apply(behaviour))

    def passing(self) -> None:
        """Let everything through again."""
        self.set(PASS)

    def cut(self) -> None:
        """Reset what is open and refuse what comes."""
        self.set(CUT)

    def black_hole(self) -> None:
        """Accept connections and deliver nothing, in either direction."""
        self.set(BLACK_HOLE)

    def only_to_server(self) -> None:
        """Requests arrive, answers do not."""
        self.set(ONLY_TO_SERVER)

    def only_to_client(self) -> None:
        """Answers and streams arrive, requests do not."""
        self.set(ONLY_TO_CLIENT)

    def delay(self, seconds: float) -> None:
        """Deliver each piece ``seconds`` late, in both directions."""
        self._both(delay_s=seconds)

    def drip(self, bytes_per_s: float) -> None:
        """Bound each connection and direction to so many bytes a second."""
        self._both(bytes_per_s=bytes_per_s)

    def rechunk(self, size: int, *, to_server: bool = False, to_client: bool = True) -> None:
        """Send ``size`` bytes at a time."""
        flow = Flow(chunk_bytes=size)
        self.set(Behaviour(to_server=flow if to_server else Flow(), to_client=flow if to_client else Flow()))

    def close_after(self, count: int) -> None:
        """End each connection after ``count`` further bytes to its client."""
        self.set(Behaviour(close_after_bytes=count))

    def inject(self, data: bytes, *, where: Callable[[bytes], bool] = lambda _head: True) -> int:
        """Put ``data`` into the stream to the client, behind what has come; return into how many.

        ``where`` chooses connections by the first bytes that their client sent
        (an HTTP request line). In a chunked response use ``http_chunk``.
        """
        into: list[_Link] = []

        def put() -> None:
            into.extend(link for link in self._links if where(bytes(link.head)))
            for link in into:
                link.down.push(data, time.monotonic())

        self._do(put)
        return len(into)

    def reset_connections(self) -> None:
        """Reset what is open; new connections are treated as before."""
        self._do(self._reset_all)

    def close(self) -> None:
        """Reset all connections, give the port back and end the thread. Again is fine."""
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join(10.0)
        self._wake_out.close()

    # The thread's side.

    def _both(self, *, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        flow = Flow(delay_s=delay_s, bytes_per_s=bytes_per_s)
        self.set(Behaviour(to_server=flow, to_client=flow))

    def _do(self, job: Callable[[], None]) -> None:
        done = threading.Event()
        with self._lock:
            if self._closing or self._failure is not None:
                raise RuntimeError(f"the proxy at {self.address} is closed") from self._failure
            self._jobs.append((job, done))
        self._wake()
        done.wait(10.0)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_out.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception as error:
            # Nobody waits for this thread: the next call tells of it.
            self._failure = error
            raise
        finally:
            self._reset_all()
            if self._listener is not None:
                self._listener.close()
            self._selector.close()
            self._wake_in.close()
            with self._lock:
                self._closing = True
                for _, done in self._jobs:
                    done.set()

    def _turn(self) -> None:
        now = time.monotonic()
        wait_s: float | None = None
        for link in list(self._links):
            due_s = self._arm(link, now)
            if due_s is not None:
                wait_s = due_s if wait_s is None else min(wait_s, due_s)
        for key, mask in self._selector.select(wait_s):
            if key.fileobj is self._wake_in:
                self._run_jobs()
            elif key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, _Pump) and key.data.link in self._links:
                self._serve(key.data, mask)

    def _run_jobs(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)
        while True:
            with self._lock:
                if not self._jobs:
                    return
                job, done = self._jobs.popleft()
            job()
            done.set()

    def _apply(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        if behaviour.refuse:
            self._reset_all()
            if self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None
        elif self._listener is None:
            self._listener = _listen(self._port)
            self._selector.register(self._listener, selectors.EVENT_READ)
        for link in self._links:
            link.down.delivered = 0

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        self._accepted += 1
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connect_ex(self._server)
        self._links.add(_Link(client, server))

    def _arm(self, link: "_Link", now: float) -> float | None:
        """Ask the selector for what this connection can do; return in how many seconds time alone helps."""
        wanted = {link.client: 0, link.server: 0}
        due_s: float | None = None
        for pump in (link.up, link.down):
            flow = self._flow(pump)
            if not pump.ended and pump.held_bytes < HELD_BYTES_MAX:
                wanted[pump.source] |= selectors.EVENT_READ
            wait_s = pump.wait_s(flow, now)
            if wait_s == 0.0:
                wanted[pump.sink] |= selectors.EVENT_WRITE
            elif wait_s is not None:
                due_s = wait_s if due_s is None else min(due_s, wait_s)
        for end, mask in wanted.items():
            link.want(self._selector, end, mask)
        return due_s

    def _flow(self, pump: "_Pump") -> Flow:
        return self._behaviour.to_server if pump is pump.link.up else self._behaviour.to_client

    def _serve(self, by_source: "_Pump", mask: int) -> None:
        link = by_source.link
        end = by_source.source
        try:
            if mask & selectors.EVENT_READ:
                self._read(by_source)
            if mask & selectors.EVENT_WRITE:
                self._write(link.down if end is link.client else link.up)
        except BlockingIOError:
            pass
        except OSError:
            # One end is gone without a goodbye; so is the other now.
            self._drop(link, reset=True)

    def _read(self, pump: "_Pump") -> None:
        try:
            data = pump.source.recv(READ_BYTES)
        except BlockingIOError:
            raise
        except OSError:
            if self._flow(pump).deliver:
                raise
            # Across a partition nobody hears that the other end died.
            data = b""
        now = time.monotonic()
        if not data:
            pump.ended = True
        elif pump is pump.link.up:
            pump.link.head += data[: max(0, 256 - len(pump.link.head))]
        pump.push(data, now)

    def _write(self, pump: "_Pump") -> None:
        flow = self._flow(pump)
        limit = self._behaviour.close_after_bytes if pump is pump.link.down else None
        for _ in range(_SENDS_PER_TURN):
            if pump.wait_s(flow, time.monotonic()) != 0.0:
                return
            if limit is not None and pump.delivered >= limit:
                self._drop(pump.link, reset=False)
                return
            if not pump.send(flow, None if limit is None else limit - pump.delivered):
                self._finish(pump)
                return

    def _finish(self, pump: "_Pump") -> None:
        """Pass an end of stream on; the connection is over when both directions are."""
        with contextlib.suppress(OSError):
            pump.sink.shutdown(socket.SHUT_WR)
        pump.finished = True
        if pump.link.up.finished and pump.link.down.finished:
            self._drop(pump.link, reset=False)

    def _reset_all(self) -> None:
        for link in list(self._links):
            self._drop(link, reset=True)

    def _drop(self, link: "_Link", *, reset: bool) -> None:
        self._links.discard(link)
        for end in (link.client, link.server):
            link.want(self._selector, end, 0)
            if reset:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.close()


@dataclass(eq=False, slots=True)
class _Pump:
    """One direction of a connection: what has come from ``source`` and not yet gone to ``sink``."""

    link: "_Link"
    source: socket.socket
    sink: socket.socket
    ended: bool = False
    finished: bool = False
    delivered: int = 0
    held_bytes: int = 0
    _held: deque[tuple[float, memoryview]] = field(default_factory=deque)
    _free_at: float = 0.0

    def push(self, data: bytes, now: float) -> None:
        """Take what has come; b"" is the end of the stream."""
        self._held.append((now, memoryview(data)))
        self.held_bytes += len(data)

    def wait_s(self, flow: Flow, now: float) -> float | None:
        """Return in how many seconds the next piece may leave; None: nothing to wait for."""
        if not self._held or self.finished or not flow.deliver:
            return None
        came_at, _ = self._held[0]
        paced_until = self._free_at if flow.bytes_per_s else 0.0
        return max(0.0, came_at + flow.delay_s - now, paced_until - now)

    def send(self, flow: Flow, at_most: int | None) -> bool:
        """Send one piece; False: it was the end of the stream."""
        came_at, data = self._held[0]
        if not data:
            return False
        size = min(len(data), flow.chunk_bytes or len(data), at_most or len(data))
        if flow.bytes_per_s:
            size = min(size, max(1, int(flow.bytes_per_s * 0.05)))
        sent = self.sink.send(data[:size])
        self.delivered += sent
        self.held_bytes -= sent
        if flow.bytes_per_s:
            self._free_at = time.monotonic() + sent / flow.bytes_per_s
        if sent == len(data):
            self._held.popleft()
        else:
            self._held[0] = (came_at, data[sent:])
        return True


class _Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.up = _Pump(self, client, server)
        self.down = _Pump(self, server, client)
        self.head = bytearray()
        self._masks: dict[socket.socket, int] = {client: 0, server: 0}

    def want(self, selector: selectors.BaseSelector, end: socket.socket, mask: int) -> None:
        """Be told of ``mask`` on this end; 0: of nothing."""
        old = self._masks[end]
        if mask == old:
            return
        self._masks[end] = mask
        by_source = self.up if end is self.client else self.down
        if not mask:
            selector.unregister(end)
        elif not old:
            selector.register(end, mask, by_source)
        else:
            selector.modify(end, mask, by_source)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
