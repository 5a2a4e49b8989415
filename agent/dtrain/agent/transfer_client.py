"""The agent's side of the transfer process."""

import contextlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO

from dtrain.agent import lines
from dtrain.agent.transferring import (
    REPORTS,
    Archived,
    Aside,
    StoreUse,
    TransferEnded,
    TransferOrder,
    TransferReport,
)
from dtrain.protocol.errors import Refused
from dtrain.runtime import log

_CLOSE_S = 5.0

_log = log.get("transfer.client")


class TransferClient:
    """Starts the process, sends it orders, and hands its reports to ``on_report``.

    What is not the core's concern goes to ``on_aside`` instead. Both are called on a thread of
    the client's, one report at a time; the last one of each process is ``TransferEnded``. After
    that, orders are dropped until ``start`` is called again.
    """

    def __init__(
        self,
        on_report: Callable[[TransferReport], None],
        arguments: Sequence[str] = (),
        on_aside: Callable[[Aside], None] = lambda _: None,
    ) -> None:
        self._on_report = on_report
        self._on_aside = on_aside
        self._arguments = arguments
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[bytes | None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        """Start the process, unless it runs. Returns once it exists; orders sent from now on reach it."""
        with self._lock:
            if self._orders is not None:
                return
            self._orders = queue.SimpleQueue()
            started = threading.Event()
            self._thread = threading.Thread(
                target=self._attend, args=(self._orders, started), name="transfer-reports", daemon=True
            )
            self._thread.start()
        started.wait()

    def send(self, order: TransferOrder) -> None:
        """Queue an order. Never blocks; dropped if the process is gone, as ``TransferEnded`` tells."""
        with self._lock:
            if self._orders is not None:
                self._orders.put(lines.encode(order))

    def close(self) -> None:
        """End the process and wait for it; its transfers are lost."""
        with self._lock:
            orders, thread = self._orders, self._thread
        if orders is not None:
            orders.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)
            process = self._process
            if thread.is_alive() and process is not None:
                process.kill()
                thread.join(_CLOSE_S)

    def _attend(self, orders: "queue.SimpleQueue[bytes | None]", started: threading.Event) -> None:
        # The process is a child of this thread, and gets its parent-death signal when
        # the thread ends: so the thread that starts it must be the one that waits for it.
        exit_code: int | None = None
        try:
            try:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-m", "dtrain.agent.transfer", *self._arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            finally:
                started.set()
            assert process.stdin is not None
            assert process.stdout is not None
            writer = threading.Thread(
                target=_write, args=(orders, process.stdin), name="transfer-orders", daemon=True
            )
            writer.start()
            for line in process.stdout:
                self._take(line)
            exit_code = process.wait()
            process.stdout.close()
            orders.put(None)
            writer.join(_CLOSE_S)
        except OSError as error:
            _log.error("transfer_not_started", error=str(error))
        finally:
            with self._lock:
                self._orders = None
            self._on_report(TransferEnded(exit_code))

    def _take(self, line: bytes) -> None:
        try:
            report: TransferReport | Aside = lines.decode(REPORTS, line)
        except Refused as error:
            _log.error("transfer_report_unreadable", error=str(error))
            return
        try:
            if isinstance(report, Archived | StoreUse):
                self._on_aside(report)
            else:
                self._on_report(report)
        except Exception:  # noqa: BLE001 - the thread must live on for the next report
            _log.exception("transfer_report_failed", report=type(report).__name__)


def _write(orders: "queue.SimpleQueue[bytes | None]", pipe: IO[bytes]) -> None:
    # An error means that the process is gone: the reader finds out why.
    with contextlib.suppress(OSError), pipe:
        while (line := orders.get()) is not None:
            pipe.write(line)
            pipe.flush()
