"""The proxy that stands for a bad network."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dtrain.local.proxy import Flow, TcpProxy, _Link, http_chunk


class Echo:
    """A server that sends back what it gets and says which connections ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.received = bytearray()
        self.ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        # A blocked accept keeps the port; shutdown wakes it.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                self.received += data
                connection.sendall(data)
        self.ended.set()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy(echo.address) as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: TcpProxy, timeout_s: float = 5.0) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout_s) as client:
        yield client


def read(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := client.recv(count - len(data))):
        data += more
    return data


def nothing_comes(client: socket.socket, for_s: float = 0.2) -> bool:
    client.settimeout(for_s)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(5.0)
    return False


def test_what_passes_is_unchanged_in_both_directions(proxy: TcpProxy) -> None:
    payload = bytes(range(256)) * 8192
    with connected(proxy) as client:
        threading.Thread(target=client.sendall, args=(payload,), daemon=True).start()
        assert read(client, len(payload)) == payload


def test_a_half_closed_connection_still_gets_its_answer(proxy: TcpProxy, echo: Echo) -> None:
    with connected(proxy) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert read(client, 10) == b"last words"
        assert client.recv(1) == b""
    assert echo.ended.wait(5.0)


def test_a_cut_resets_what_is_open_and_refuses_what_comes(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with pytest.raises(ConnectionRefusedError), connected(proxy):
        pass
    proxy.passing()
    with connected(proxy) as client:
        client.sendall(b"b")
        assert read(client, 1) == b"b"


def test_a_black_hole_accepts_and_delivers_late_what_it_swallowed(proxy: TcpProxy, echo: Echo) -> None:
    proxy.black_hole()
    with connected(proxy) as client:
        client.sendall(b"hello")
        assert nothing_comes(client)
        assert not echo.received
        proxy.passing()
        assert read(client, 5) == b"hello"


def test_a_black_hole_hides_that_the_server_went_away(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        proxy.black_hole()
        client.shutdown(socket.SHUT_WR)
        assert nothing_comes(client)
        proxy.passing()
        assert client.recv(1) == b""


def test_one_way_to_the_server_only(proxy: TcpProxy, echo: Echo) -> None:
    proxy.only_to_server()
    with connected(proxy) as client:
        client.sendall(b"write")
        assert nothing_comes(client)
        assert echo.received == b"write"
        proxy.passing()
        assert read(client, 5) == b"write"


def test_one_way_to_the_client_only(proxy: TcpProxy, echo: Echo) -> None:
    with connected(proxy) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        proxy.only_to_client()
        client.sendall(b"b")
        assert nothing_comes(client)
        assert echo.received == b"a"
        assert proxy.inject(b"pushed") == 1
        assert read(client, 6) == b"pushed"


def test_a_delay_is_added_to_each_direction(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        proxy.delay(0.15)
        start = time.monotonic()
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        assert time.monotonic() - start >= 0.3


def test_a_drip_bounds_the_bytes_per_second(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        proxy.drip(2000)
        start = time.monotonic()
        client.sendall(b"x" * 1000)
        assert read(client, 1000) == b"x" * 1000
        assert 0.4 <= time.monotonic() - start < 5.0


def test_what_is_cut_into_single_bytes_arrives_whole(proxy: TcpProxy, echo: Echo) -> None:
    payload = bytes(range(200))
    with connected(proxy) as client:
        proxy.rechunk(1, to_server=True)
        client.sendall(payload)
        assert read(client, len(payload)) == payload
        assert echo.received == payload


@pytest.mark.parametrize(("size", "pieces"), [(1, [b"a", b"b", b"c", b"d", b"e"]), (2, [b"ab", b"cd", b"e"])])
def test_pieces_are_sent_one_by_one(size: int, pieces: list[bytes]) -> None:
    # Packets keep their bounds, so that what was sent together can be seen.
    sink, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sink, far:
        pump = _Link(sink, sink).down
        pump.push(b"abcde", 0.0)
        for piece in pieces:
            assert pump.send(Flow(chunk_bytes=size), None)
            assert far.recv(100) == piece
        assert pump.wait_s(Flow(), 1.0) is None


def test_a_connection_ends_after_so_many_bytes(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        client.sendall(b"ab")
        assert read(client, 2) == b"ab"
        proxy.close_after(3)
        client.sendall(b"cdefgh")
        assert read(client, 10) == b"cde"


def test_bytes_are_injected_where_the_request_says(proxy: TcpProxy) -> None:
    with connected(proxy) as watch, connected(proxy) as other:
        for client, request in ((watch, b"POST /v3/watch"), (other, b"POST /v3/kv")):
            client.sendall(request)
            assert read(client, len(request)) == request
        assert proxy.inject(http_chunk(b"garbage"), where=lambda head: b"/watch" in head) == 1
        assert read(watch, 12) == b"7\r\ngarbage\r\n"
        assert nothing_comes(other)


def test_a_dead_server_resets_its_clients(echo: Echo, proxy: TcpProxy) -> None:
    echo.close()
    with contextlib.suppress(ConnectionError), connected(proxy) as client:
        client.sendall(b"a")
        assert read(client, 1) == b""


def test_a_black_hole_hides_that_the_server_died(echo: Echo, proxy: TcpProxy) -> None:
    echo.close()
    proxy.black_hole()
    with connected(proxy) as client:
        client.sendall(b"a")
        assert nothing_comes(client)
        proxy.passing()
        client.settimeout(5.0)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


def test_a_sender_waits_when_too_much_is_held(proxy: TcpProxy) -> None:
    proxy.black_hole()
    with connected(proxy) as client:
        client.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 * 1024 * 1024:
                sent += client.send(b"x" * 65536)
        assert sent < 64 * 1024 * 1024


def test_closing_leaves_no_thread_and_frees_the_port(echo: Echo) -> None:
    proxy = TcpProxy(echo.address)
    name = f"proxy-{proxy.port}"
    with connected(proxy) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert name not in {thread.name for thread in threading.enumerate()}
    with TcpProxy(echo.address, port=proxy.port) as again:
        assert again.port == proxy.port
    with pytest.raises(RuntimeError):
        proxy.cut()


def test_a_url_keeps_its_scheme(echo: Echo) -> None:
    with TcpProxy(f"http://{echo.address}") as proxy:
        assert proxy.endpoint == f"http://127.0.0.1:{proxy.port}"
    with pytest.raises(ValueError, match="names no host"):
        TcpProxy("nowhere")
