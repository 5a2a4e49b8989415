"""The background thread that holds the connection to the agent.

The agent may go and come back: the thread reconnects for ever, and says the
whole state again after each ``Hello``. Training never waits for it.
"""

import contextlib
import logging
import os
import select
import socket
import sys
import threading
import time

from dtrain.protocol import codec, ranklink
from dtrain.protocol.errors import Refused
from dtrain.protocol.ranklink import Hello, Report, Welcome
from dtrain.trainer.session import Session
from dtrain.trainer.stacks import Recorder, write_on_signal

log = logging.getLogger("dtrain.trainer")

EXIT_ATTEMPT_OVER = 75
"""Exit status of a rank whose attempt is over: nothing it could still do would count."""

REPORT_INTERVAL_S = 0.5
_RECONNECT_S_FIRST = 0.05
_RECONNECT_S_MAX = 2.0
_RECEIVE_BYTES = 256 * 1024


class AgentLink:
    """Carries ``session.report()`` to the agent, and its messages to ``session.handle``."""

    def __init__(self, path: str, hello: Hello) -> None:
        self._path = path
        self._hello = hello
        self.session = Session(hello.rank, self.wake)
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._socket: socket.socket | None = None
        self._urgent = False
        self._closing = False
        self._drained = threading.Event()
        self._sent: Report | None = None
        self._sent_at = 0.0
        self._pid = os.getpid()
        self._flight = Recorder()
        self._thread = threading.Thread(target=self._run, name="dtrain-link", daemon=True)

    def start(self) -> None:
        """Connect in the background."""
        os.register_at_fork(after_in_child=self._after_fork)
        self._thread.start()

    def wake(self) -> None:
        """Send a report at once instead of at the next interval."""
        self._urgent = True
        with contextlib.suppress(OSError):  # full: it wakes up anyway; closed: nobody is left to wake
            self._wake_in.send(b"w")

    def close(self, timeout_s: float) -> None:
        """Let the last report leave, for at most ``timeout_s``, and disconnect."""
        if self._pid != os.getpid():
            return
        self._closing = True
        self.wake()
        self._drained.wait(timeout_s)
        self._disconnect()

    def _after_fork(self) -> None:
        # Workers of a data loader must not speak for the rank, nor keep its
        # connection open once it is dead.
        self.session.after_fork()
        for end in (self._wake_in, self._wake_out):
            end.close()
        self._disconnect()

    def _disconnect(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _run(self) -> None:
        wait_s = _RECONNECT_S_FIRST
        while not self._closing:
            try:
                self._converse()
                wait_s = _RECONNECT_S_FIRST
            except (OSError, Refused) as error:
                log.debug("no connection to the agent at %s: %s", self._path, error)
            except Exception:
                # The thread must live: without it the rank could neither save nor finish.
                log.exception("the link to the agent failed and starts again")
            self._disconnect()
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _RECONNECT_S_MAX)
        self._drained.set()

    def _converse(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = connection
        connection.connect(self._path)
        connection.sendall(ranklink.encode_line(self._hello))
        # Not select(), which knows no descriptor above 1023: scripts open many files.
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        poller.register(self._wake_out, select.POLLIN)
        buffer = b""
        welcome = False
        self._sent = None
        while True:
            if welcome and self._send_if_due(connection):
                return
            # Closing with nothing to wait for still passes here once, to notice a dead agent.
            pause_s = REPORT_INTERVAL_S if not self._closing else 0.05
            ready = {fd for fd, _ in poller.poll(pause_s * 1000)}
            if self._wake_out.fileno() in ready:
                self._wake_out.recv(4096)
            if connection.fileno() not in ready:
                continue
            received = connection.recv(_RECEIVE_BYTES)
            if not received:
                raise ConnectionResetError("the agent closed the connection")
            *lines, buffer = (buffer + received).split(b"\n")
            if len(buffer) > ranklink.LINE_BYTES_MAX:
                raise ConnectionResetError("the agent sent a line without end")
            for line in lines:
                message = ranklink.decode_line(line)
                if isinstance(message, Welcome):
                    welcome = True
                    if not message.accepted:
                        _exit_attempt_over(message.why)
                self.session.handle(message)

    def _send_if_due(self, connection: socket.socket) -> bool:
        """Send what changed, if it is time; True once closing and all is said."""
        now = time.monotonic()
        closing = self._closing
        if not (self._urgent or closing or now - self._sent_at >= REPORT_INTERVAL_S):
            return False
        # Both read before the report is built: what changes after it is sent the next
        # time, and closing must not take effect before the last word is in a report.
        self._urgent = False
        self._flight.follow(self.session, now)
        report = self.session.report()
        if report != self._sent:
            connection.sendall(ranklink.encode_line(report))
            self._sent = report
            self._sent_at = now
        return closing


def connect_from_env(rank: int, local_rank: int) -> AgentLink | None:
    """Start the link if an agent launched this process; None otherwise."""
    path = os.environ.get(ranklink.ENV_SOCKET)
    if not path:
        return None
    hello = codec.from_json(
        Hello,
        {
            "v": codec.VERSION,
            "job": os.environ.get(ranklink.ENV_JOB, ""),
            "uid": os.environ.get(ranklink.ENV_UID, ""),
            "attempt": int(os.environ.get(ranklink.ENV_ATTEMPT, "0")),
            "rank": rank,
            "local_rank": local_rank,
            "pid": os.getpid(),
            "demands": True,
        },
    )
    write_on_signal()
    link = AgentLink(path, hello)
    link.start()
    return link


def _exit_attempt_over(why: str) -> None:
    sys.stderr.write(f"dtrain: this attempt is over ({why or 'no reason given'}); the rank exits\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    # Not sys.exit: this is a background thread, and the training thread may hang in a collective.
    os._exit(EXIT_ATTEMPT_OVER)
