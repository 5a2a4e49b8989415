"""What systemd is told of a daemon: up, alive, in a word how it is, and stopping. Standard library only.

The protocol is a datagram of lines to the socket that ``NOTIFY_SOCKET`` names
(sd_notify(3)). Without that variable nothing is sent, and nothing here fails a
daemon: who does not hear of it is systemd's business.
"""

import contextlib
import os
import socket
from collections.abc import Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""For this process only: whoever it starts must not speak for it."""

BEATS_PER_TIMEOUT = 4
EXTEND_EVERY_S, EXTEND_BY_S = 10.0, 60.0


class Notifier:
    """Speaks for this process, from one thread. Instants are those of one monotonic clock, s."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        meant = not pid or pid == str(os.getpid())
        self.watchdog_s = int(usec) / 1e6 if meant and usec.isdecimal() else 0.0
        """How long systemd goes without a sign of life; 0: for ever."""
        self._beat_at = float("-inf")
        self._extend_at = float("-inf")
        self._status = ""
        self._ready = False
        self._socket: socket.socket | None = None
        if self._address:
            with contextlib.suppress(OSError):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                # A reader that is behind must not hold up what watches over the daemon.
                self._socket.setblocking(False)

    @property
    def is_ready(self) -> bool:
        """Whether ``ready`` has been said."""
        return self._ready

    def ready(self) -> None:
        """Say, once, that the daemon is up."""
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def status(self, text: str) -> None:
        """Say how it is, where that has changed."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def beat(self, now: float) -> None:
        """Say that it lives, where that is due; until ``ready``, that starting takes longer."""
        if not self._ready and now >= self._extend_at:
            self._extend_at = now + EXTEND_EVERY_S
            self._send(f"EXTEND_TIMEOUT_USEC={int(EXTEND_BY_S * 1e6)}")
        if self.watchdog_s and now >= self._beat_at:
            self._beat_at = now + self.watchdog_s / BEATS_PER_TIMEOUT
            self._send("WATCHDOG=1")

    def stopping(self, text: str, within_s: float) -> None:
        """Say that the end has begun, and within which time it will have come."""
        self._status = text
        self._send(f"STOPPING=1\nSTATUS={text}\nEXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def _send(self, text: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(text.encode(), self._address)
