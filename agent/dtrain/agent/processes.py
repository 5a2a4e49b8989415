"""The driver's launchers and transfer process, as real processes.

Their clients report on threads of their own; what they report is handed on as
events, tagged with the job and submission it is about.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence

from dtrain.agent.core.events import Event, LauncherReported, TransferReported
from dtrain.agent.launch import processes as proc
from dtrain.agent.launcher_client import LauncherClient
from dtrain.agent.launching import (
    LauncherOrder,
    LauncherReport,
    LaunchSettings,
    ProcessId,
)
from dtrain.agent.transfer_client import TransferClient
from dtrain.agent.transferring import (
    Archived,
    Aside,
    StoreUse,
    TransferEnded,
    TransferOrder,
    TransferReport,
)
from dtrain.protocol.ids import JobName, Uid

Post = Callable[[Event], None]
"""Hands an event to the thread that owns the driver."""


class Launchers:
    """``driver.LauncherPort`` on ``LauncherClient``. Used by the driver's thread."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._clients: dict[tuple[JobName, Uid], LauncherClient] = {}

    def start(self, job: JobName, uid: Uid, settings: LaunchSettings) -> ProcessId:
        self._forget(job, uid)
        client = LauncherClient.start(settings, self._reports_of(job, uid))
        self._clients[job, uid] = client
        return client.process

    def attach(self, job: JobName, uid: Uid, folder: str, process: ProcessId) -> bool:
        self._forget(job, uid)
        client = LauncherClient.attach(folder, process, self._reports_of(job, uid))
        if client is None:
            return False
        self._clients[job, uid] = client
        return True

    def send(self, job: JobName, uid: Uid, order: LauncherOrder) -> None:
        client = self._clients.get((job, uid))
        if client is not None:
            client.send(order)

    def kill(self, process: ProcessId) -> None:
        kill(process)

    def is_alive(self, process: ProcessId) -> bool:
        return proc.is_alive(process)

    def waits_in(self, process: ProcessId) -> str:
        return proc.waits_in(process.pid)

    def close(self) -> None:
        """Let go of all launchers; they live on."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _forget(self, job: JobName, uid: Uid) -> None:
        old = self._clients.pop((job, uid), None)
        if old is not None:
            old.close()

    def _reports_of(self, job: JobName, uid: Uid) -> Callable[[LauncherReport], None]:
        return lambda report: self._post(LauncherReported(job, uid, report))


class Transfers:
    """``driver.TransferPort`` on ``TransferClient``. Orders may come from any thread.

    ``on_archived`` hears of archive orders, on a thread of the client's; None: all that
    are under way are lost. ``on_use`` hears what the process has asked of stores.
    """

    def __init__(
        self,
        post: Post,
        arguments: Sequence[str] = (),
        on_archived: Callable[[Archived | None], None] = lambda _: None,
        on_use: Callable[[StoreUse], None] = lambda _use: None,
    ) -> None:
        self._post = post
        self._on_archived = on_archived
        self._on_use = on_use
        self._client = TransferClient(self._take, arguments, self._take_aside)
        self._lock = threading.Lock()
        self._running = False

    def send(self, order: TransferOrder) -> None:
        with self._lock:
            if not self._running:
                # Not on the first sign of its end, but once the core has taken that in: else
                # an order would be given to the new process twice.
                self._running = True
                self._client.start()
        self._client.send(order)

    def _take(self, report: TransferReport) -> None:
        if isinstance(report, TransferEnded):
            self._on_archived(None)
        self._post(TransferReported(report))

    def _take_aside(self, report: Aside) -> None:
        match report:
            case Archived():
                self._on_archived(report)
            case StoreUse():
                self._on_use(report)

    def ended(self) -> None:
        with self._lock:
            self._running = False

    def close(self) -> None:
        self._client.close()


def kill(process: ProcessId) -> None:
    """SIGKILL exactly this process, if it lives: never another one under its pid."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        if proc.is_alive(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
