"""The launcher's side of a connection: lines in, lines out, never blocking."""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from dtrain.agent import lines
from dtrain.agent.launching import ORDERS, LauncherOrder, LauncherReport
from dtrain.protocol.errors import Refused

SOCKET_NAME = "launcher.sock"

OUTBOX_BYTES_MAX = 16 * 1024 * 1024
"""More unread reports than this: the agent is taken for dead and cut off."""


def peer_is_own_user(connection: socket.socket) -> bool:
    """Whether the other end belongs to this user (or root)."""
    layout = "3i"
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(layout))
    _pid, uid, _gid = struct.unpack(layout, raw)
    return uid in {os.getuid(), 0}


class Link:
    """One agent's connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._inbox = bytearray()
        self._outbox = bytearray()

    @property
    def has_output(self) -> bool:
        return bool(self._outbox)

    def post(self, report: LauncherReport) -> bool:
        """Queue a report and send what the socket takes; False: the agent reads nothing any more."""
        self._outbox += lines.encode(report)
        self.flush()
        return len(self._outbox) <= OUTBOX_BYTES_MAX

    def flush(self) -> None:
        """Send what the socket takes.

        A broken connection is left to the reading side: the agent's last
        orders, a ``Quit`` perhaps, may still be waiting to be read.
        """
        try:
            while self._outbox:
                del self._outbox[: self.socket.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()

    def orders(self) -> Iterator[LauncherOrder]:
        """The complete orders that have arrived.

        Raises:
            ConnectionError: the agent has gone.
            Refused: BAD_RECORD; it does not speak our language.
        """
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError
        self._inbox += data
        while (end := self._inbox.find(b"\n")) >= 0:
            line = bytes(self._inbox[:end])
            del self._inbox[: end + 1]
            order: Any = lines.decode(ORDERS, line)
            yield order
        if len(self._inbox) > lines.LINE_BYTES_MAX:
            raise ConnectionAbortedError

    def close(self) -> None:
        self.socket.close()


LINK_ERRORS = (OSError, Refused)
