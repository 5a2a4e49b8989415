"""Where ranks talk to the agent: a Unix socket, served by one selector thread.

A connection that sends anything but a Hello and then Reports is closed, and so
is one that does not read: no rank can hold up another, or the agent.
"""

import contextlib
import hashlib
import os
import selectors
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.agent.core.events import Event, RankConnected, RankDisconnected, RankReported
from dtrain.protocol import codec, ranklink
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ranklink import LINE_BYTES_MAX, Hello, Message, Report

PATH_BYTES_MAX = 107
CONNECTIONS_MAX = 1024
OUTBOX_BYTES_MAX = 8 * 1024 * 1024


def short_run_dir(data_dir: Path) -> Path:
    """Return the folder for sockets: below ``data_dir``, unless that path is too long for one.

    A function of ``data_dir`` alone: ranks look for the socket of a restarted agent where it was.

    Raises:
        Refused: BAD_SETTING; the short folder belongs to somebody else.
    """
    wanted = data_dir / "run"
    if len(os.fsencode(wanted / "ranks.sock")) > PATH_BYTES_MAX:
        digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
        wanted = Path(tempfile.gettempdir()) / f"dtrain-{os.getuid()}-{digest}"
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = wanted.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Refused(
            ErrorCode.BAD_SETTING, f"{wanted} belongs to somebody else", fix="use a shorter --data-dir"
        )
    wanted.chmod(0o700)
    return wanted


@dataclass(slots=True)
class _Connection:
    number: int
    socket: socket.socket
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    greeted: bool = False
    closing: bool = False


class RankServer:
    """``on_event`` is called on the server's thread; it should only enqueue."""

    def __init__(
        self,
        path: Path,
        on_event: Callable[[Event], None],
        *,
        on_refusal: Callable[[str], None] = lambda _why: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self._on_event = on_event
        self._on_refusal = on_refusal
        self._on_death = on_death
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._last = 0
        self._closing = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)

    def start(self) -> None:
        """Bind and serve.

        Raises:
            OSError: the socket cannot be made.
        """
        # The data directory's lock says that no other agent listens here.
        self.path.unlink(missing_ok=True)
        self._listener.bind(str(self.path))
        self.path.chmod(0o600)
        self._listener.listen(128)
        for sock in (self._listener, self._wake_read, self._wake_write):
            sock.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._selector.register(self._wake_read, selectors.EVENT_READ, "wake")
        self._thread.start()

    def send(self, connection: int, message: Message) -> None:
        """Queue a message; dropped if the connection is gone."""
        line = ranklink.encode_line(message)
        with self._lock:
            found = self._connections.get(connection)
            if found is not None and not found.closing:
                found.outbox += line
                if len(found.outbox) > OUTBOX_BYTES_MAX:
                    found.outbox.clear()
                    found.closing = True
        self._wake()

    def drop(self, connection: int) -> None:
        """Close a connection once what was sent has left."""
        with self._lock:
            found = self._connections.get(connection)
            if found is not None:
                found.closing = True
        self._wake()

    def close(self) -> None:
        """End the thread and all connections."""
        self._closing = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(5.0)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except BaseException:
            self._on_death()
            raise
        finally:
            for connection in self._connections.values():
                connection.socket.close()
            for sock in (self._listener, self._wake_read, self._wake_write):
                sock.close()
            self._selector.close()

    def _turn(self) -> None:
        for key, mask in self._selector.select(5.0):
            if key.data == "listener":
                self._accept()
            elif key.data == "wake":
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            elif mask & selectors.EVENT_READ:
                self._read(key.data)
        self._flush_all()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            self._on_refusal(f"{CONNECTIONS_MAX} connections are open")
            sock.close()
            return
        sock.setblocking(False)
        self._last += 1
        connection = _Connection(self._last, sock)
        with self._lock:
            self._connections[connection.number] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        if connection.closing:
            return  # told to leave: what it still says is of no interest
        connection.inbox += data
        try:
            while (end := connection.inbox.find(b"\n")) >= 0:
                line = bytes(connection.inbox[:end])
                del connection.inbox[: end + 1]
                self._take(connection, line)
            if len(connection.inbox) > LINE_BYTES_MAX:
                raise Refused(ErrorCode.BAD_RECORD, f"a line is longer than {LINE_BYTES_MAX} bytes")
        except DtrainError as error:
            self._on_refusal(error.message)
            self._close(connection)

    def _take(self, connection: _Connection, line: bytes) -> None:
        message = ranklink.decode_line(line)
        if isinstance(message, Hello) and not connection.greeted:
            if message.v != codec.VERSION:
                # It goes on training, and only its checkpoints are missed: better than to misread it.
                raise Refused(
                    ErrorCode.BAD_RECORD,
                    f"rank {message.rank} of {message.job} speaks version {message.v} of the rank link; "
                    f"this agent speaks version {codec.VERSION}",
                )
            connection.greeted = True
            self._on_event(RankConnected(connection.number, message))
        elif isinstance(message, Report) and connection.greeted:
            self._on_event(RankReported(connection.number, message))
        else:
            raise Refused(ErrorCode.BAD_RECORD, f"a rank may not send {type(message).__name__} here")

    def _flush_all(self) -> None:
        for connection in list(self._connections.values()):
            with self._lock:
                alive = self._flush(connection)
                output, closing = bool(connection.outbox), connection.closing
            if not alive or (closing and not output):
                self._close(connection)
                continue
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if output else 0)
            if self._selector.get_key(connection.socket).events != wanted:
                self._selector.modify(connection.socket, wanted, connection)

    def _flush(self, connection: _Connection) -> bool:
        try:
            while connection.outbox:
                del connection.outbox[: connection.socket.send(connection.outbox)]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _close(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.pop(connection.number, None) is None:
                return
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.greeted:
            self._on_event(RankDisconnected(connection.number))
