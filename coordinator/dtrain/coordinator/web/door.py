"""Where connections to an HTTPS dashboard come in: who speaks plain HTTP is told so, instead of hung up on.

A TLS client's first byte is always the same, so it is looked at before anything is read. Nothing of a plain
request is understood: whatever it holds, a token included, was in the clear already.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

GREETINGS_MAX = 128
"""Connections that have not said yet what they speak; beyond that they are closed."""

GREETING_S = 10.0
"""How long one may take to say so, and the TLS handshake after it."""

AGAIN_S = 0.1
"""After a connection could not be accepted, as without free file descriptors."""

LINGER_S = 1.0
REQUEST_BYTES_MAX = 64 * 1024
"""Read after the answer, so that it arrives: closing with bytes unread would reset the connection."""

_HANDSHAKE = b"\x16"
_TEXT = b"This port speaks HTTPS: begin the address with https://\n"
_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: %d\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n%s" % (len(_TEXT), _TEXT)
)


class Door:
    """Accepts what comes to ``listener``; what begins a handshake goes to a protocol of ``factory``."""

    def __init__(
        self, listener: socket.socket, context: ssl.SSLContext, factory: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listener, self._context, self._factory = listener, context, factory
        self._greetings: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError:
                    await asyncio.sleep(AGAIN_S)
                    continue
                if len(self._greetings) >= GREETINGS_MAX:
                    connection.close()
                    continue
                task = loop.create_task(self._greet(connection))
                self._greetings.add(task)
                task.add_done_callback(self._greetings.discard)
        finally:
            for task in list(self._greetings):
                task.cancel()

    async def _greet(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        ours = True
        # Whoever it was went away, says nothing, or cannot agree on a handshake.
        with contextlib.suppress(OSError, TimeoutError):
            try:
                async with asyncio.timeout(GREETING_S):
                    first = await _first_byte(connection)
                    if first and first != _HANDSHAKE:
                        await _refuse(connection)
                if first == _HANDSHAKE:
                    # From here on the loop closes it: done twice, a newer one of its number may be hit.
                    ours = False
                    await asyncio.get_running_loop().connect_accepted_socket(
                        self._factory, connection, ssl=self._context, ssl_handshake_timeout=GREETING_S
                    )
            finally:
                if ours:
                    connection.close()


async def _first_byte(connection: socket.socket) -> bytes:
    """Wait for the first byte, and leave it unread; b"": there will be none."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


async def _refuse(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, _ANSWER)
    connection.shutdown(socket.SHUT_WR)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            left = REQUEST_BYTES_MAX
            while left > 0 and (read := await loop.sock_recv(connection, 16 * 1024)):
                left -= len(read)
