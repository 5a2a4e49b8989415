"""The agent's end of a launcher: start it, find it again, talk to it, learn of its death."""

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dtrain.agent import lines
from dtrain.agent.launch import processes, reading
from dtrain.agent.launch.link import SOCKET_NAME
from dtrain.agent.launching import (
    REPORTS,
    LauncherEnded,
    LauncherOrder,
    LauncherReport,
    LaunchSettings,
    ProcessId,
)
from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Unavailable

LOG_NAME = "launcher.log"
LEFTOVER_PATIENCE_S = 5.0
"""How long the processes of a dead launcher may take to vanish before its end is reported anyway."""
EXIT_PATIENCE_S = 5.0
"""How long a launcher that no longer listens may take to exit before it is killed."""

_SECRETS = ("DTRAIN_", "ETCDCTL_", "AWS_")
"""Of the agent's own environment; a job gets none of it."""

_log = logging.getLogger(__name__)

OnReport = Callable[[LauncherReport], None]


class LauncherClient:
    """A connection to one launcher.

    ``on_report`` is called on this client's own thread, in the order of the
    reports, the last time with ``LauncherEnded``. An exception it raises is
    logged and the next report is delivered.
    """

    def __init__(
        self,
        *,
        folder: str,
        process: ProcessId,
        connection: socket.socket,
        pidfd: int,
        child: "subprocess.Popen[bytes] | None",
        on_report: OnReport,
    ) -> None:
        self.process = process
        self._folder = folder
        self._socket = connection
        self._pidfd = pidfd
        self._child = child
        self._on_report = on_report
        self._lock = threading.Lock()
        self._outbox = bytearray()
        self._inbox = bytearray()
        self._closing = False
        self._connected = True
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"launcher-{process.pid}", daemon=True)

    @classmethod
    def start(cls, settings: LaunchSettings, on_report: OnReport) -> "LauncherClient":
        """Start a launcher in ``settings.folder`` and connect to it; returns before its imports.

        Call it from a thread that lives; the launcher has no parent-death
        signal and its own session, so that it survives this process.

        Raises:
            Unavailable: LAUNCHER_FAILED; no process could be started.
        """
        folder = Path(settings.folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _listening(folder) as listener, _settings_file(settings) as stdin:
                child = _spawn(settings, stdin, listener.fileno(), folder / LOG_NAME)
                pidfd = os.pidfd_open(child.pid)
                process = processes.identify(child.pid)
                connection = _connect(folder)
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(
                ErrorCode.LAUNCHER_FAILED,
                f"the launcher of {settings.folder} could not be started: {error}",
                fix="check free memory, process limits and that the folder can be written",
            ) from error
        assert process is not None, "an unreaped child has an entry in /proc"
        return cls(
            folder=settings.folder,
            process=process,
            connection=connection,
            pidfd=pidfd,
            child=child,
            on_report=on_report,
        )._begin()

    @classmethod
    def attach(cls, folder: str, process: ProcessId, on_report: OnReport) -> "LauncherClient | None":
        """Find a launcher again; its first report is ``LauncherState``.

        None: it is gone, and so is everything it had started.
        """
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            _end_session(process)
            return None
        # Compared after the pidfd was opened: from here on it cannot become another process.
        if not processes.is_alive(process):
            os.close(pidfd)
            _end_session(process)
            return None
        try:
            connection = _connect(Path(folder))
        except OSError:
            # Not listening: it is on its way out, or stuck so that nobody could use it.
            _await_exit(pidfd)
            os.close(pidfd)
            _end_session(process)
            return None
        return cls(
            folder=folder,
            process=process,
            connection=connection,
            pidfd=pidfd,
            child=None,
            on_report=on_report,
        )._begin()

    def send(self, order: LauncherOrder) -> None:
        """Queue an order and return at once. After the launcher's end it is dropped."""
        line = lines.encode(order)
        with self._lock:
            if self._connected:
                self._outbox += line
        self._wake()

    def close(self) -> None:
        """Let go of the launcher, which lives on; no report is delivered after this returns."""
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The thread

    def _begin(self) -> "LauncherClient":
        self._socket.setblocking(False)
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread.start()
        return self

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._loop(selector)
        except Exception:  # noqa: BLE001  this thread must not die without a word
            _log.exception("the connection to launcher %d failed", self.process.pid)
            self._await_end()
        finally:
            for item in (self._socket, self._wake_read, self._wake_write):
                item.close()
            os.close(self._pidfd)

    def _loop(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._wake_read, selectors.EVENT_READ, "wake")
        selector.register(self._pidfd, selectors.EVENT_READ, "end")
        selector.register(self._socket, selectors.EVENT_READ, "socket")
        while True:
            with self._lock:
                output = bool(self._outbox)
            if self._connected:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if output else 0)
                selector.modify(self._socket, events, "socket")
            ready = {key.data: events for key, events in selector.select()}
            if "wake" in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            self._flush()
            if self._closing:
                return
            if "socket" in ready and ready["socket"] & selectors.EVENT_READ:
                self._read()
                if not self._connected:
                    selector.unregister(self._socket)
            if "end" in ready:
                while self._connected and self._read():
                    pass  # its last words were still in the socket
                self._announce_end()
                return

    def _flush(self) -> None:
        with self._lock:
            try:
                while self._outbox and self._connected:
                    del self._outbox[: self._socket.send(self._outbox)]
            except BlockingIOError:
                return
            except OSError:
                self._outbox.clear()  # the reading side will see the end

    def _read(self) -> bool:
        """Deliver what has arrived; False: nothing had."""
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._connected = bool(data)
        self._inbox += data
        while (end := self._inbox.find(b"\n")) >= 0:
            line = bytes(self._inbox[:end])
            del self._inbox[: end + 1]
            self._deliver(lines.decode(REPORTS, line))
        return True

    def _deliver(self, report: Any) -> None:
        if self._closing:
            return
        try:
            self._on_report(report)
        except Exception:  # noqa: BLE001  the next report must still be delivered
            _log.exception("a report of launcher %d was not taken", self.process.pid)

    def _await_end(self) -> None:
        """The connection is unusable but the launcher may live: its end must still be reported."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            selector.register(self._pidfd, selectors.EVENT_READ, "end")
            while not self._closing:
                if any(key.data == "end" for key, _ in selector.select()):
                    self._announce_end()
                    return
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)

    def _announce_end(self) -> None:
        # Before the child is reaped: until then its pid, and so its session's id, is nobody else's.
        _end_session(self.process)
        code = self._child.wait() if self._child is not None else None
        self._deliver(LauncherEnded(code, reading.tail(Path(self._folder) / LOG_NAME)))


# Starting -----------------------------------------------------------------------


@contextlib.contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    """The launcher's socket, made here so that orders can be sent before it has even started."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with _short(folder) as short:
            path = short / SOCKET_NAME
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o600)
        listener.listen(8)
        yield listener


def _connect(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(folder) as short:
            connection.settimeout(EXIT_PATIENCE_S)
            connection.connect(str(short / SOCKET_NAME))
    except OSError:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[Path]:
    """The folder under a name of a few bytes: a socket's path holds 107."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _settings_file(settings: LaunchSettings) -> Iterator[int]:
    # In memory, not on disk: the environment in it may hold secrets of the job.
    descriptor = os.memfd_create("dtrain-launch-settings")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(codec.encode(settings))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _spawn(settings: LaunchSettings, stdin: int, listen_fd: int, log_path: Path) -> "subprocess.Popen[bytes]":
    env = {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}
    # -P: a folder or file of the job must not shadow what the launcher imports.
    command = [sys.executable, "-P", "-m", "dtrain.agent.launcher"]
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [*command, settings.folder, "--listen-fd", str(listen_fd)],
            stdin=stdin,
            stdout=log,
            stderr=log,
            env={**env, **settings.env},
            pass_fds=(listen_fd,),
            start_new_session=True,
        )


# Ending -------------------------------------------------------------------------


def _await_exit(pidfd: int) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        if not selector.select(EXIT_PATIENCE_S):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            selector.select(EXIT_PATIENCE_S)


def _end_session(launcher: ProcessId) -> None:
    """Kill what a dead launcher left: ranks follow it by themselves, their children may not.

    All of it is in the launcher's session. While one of them lives the kernel
    gives the session's id, the launcher's pid, to no other process; so if that
    pid is somebody else's now, nothing is left.
    """
    if launcher.boot_id != processes.boot_id():
        return
    deadline = time.monotonic() + LEFTOVER_PATIENCE_S
    while time.monotonic() < deadline:
        around = processes.look_around()
        holder = around.get(launcher.pid)
        if holder is not None and holder.start_time != launcher.start_time:
            return
        left = [
            seen.pid
            for seen in around.values()
            if seen.session == launcher.pid and seen.pid != launcher.pid and not seen.is_zombie
        ]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    _log.warning("processes of launcher %d do not die", launcher.pid)
