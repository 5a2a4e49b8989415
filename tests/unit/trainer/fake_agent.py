"""An agent and a leader in one, small enough to read: real socket, real transfer process, real store."""

import contextlib
import dataclasses
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.unit.trainer import pipeline

from dtrain.agent.transfer_client import TransferClient
from dtrain.agent.transferring import (
    Demand,
    Fetch,
    Fetched,
    Moved,
    ReleaseFetch,
    StoreUse,
    Supplied,
    TransferReport,
    Uploaded,
    UploadFailed,
)
from dtrain.protocol import ranklink
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import (
    Begin,
    Durable,
    Hello,
    Message,
    Need,
    Outcome,
    Report,
    RestorePlan,
    Welcome,
)
from dtrain.storage.blobs.local import LocalBlobs

WAIT_S = 30.0


class FakeAgent:
    """Serves one rank. ``saves`` names the steps to checkpoint, besides the last one."""

    def __init__(
        self,
        folder: Path,
        *,
        saves: tuple[int, ...] = (),
        restore: Fetch | None = None,
        accept: bool = True,
        checkpoints: bool = True,
        name: str = "agent",
        on_demand: bool = True,
    ) -> None:
        self.socket_path = str(folder / f"{name}.sock")
        root = folder / "store"
        root.mkdir(exist_ok=True)
        self.store = LocalBlobs(root)
        self.saves = list(saves)
        self.accept = accept
        self.checkpoints = checkpoints
        self.restore = restore if restore is None else dataclasses.replace(restore, on_demand=on_demand)
        self.answered: Need | None = None
        self.committed: list[Fetch] = []
        self.hellos: list[Hello] = []
        self.reports: list[Report] = []
        self.transfer: queue.SimpleQueue[TransferReport] = queue.SimpleQueue()
        self.client = TransferClient(self._told)
        self._changed = threading.Condition()
        self._connection: socket.socket | None = None
        self._seq = 0 if restore is None else restore.seq
        self._open: Begin | None = None
        self._final_seq: int | None = None
        self._asked_over = 0
        self.finite: tuple[str, ...] = ()
        """Numbers that must be finite."""
        self.grants = True
        """Open a checkpoint for each save that the script asks for."""
        self.may_commit = threading.Event()
        self.may_commit.set()
        self._planned = False
        self.may_plan = threading.Event()
        self.may_plan.set()

    def __enter__(self) -> "FakeAgent":
        self.client.start()
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        self.client.close()

    def listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(self.socket_path).unlink()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.socket_path)
        self._server.listen()
        self._thread = threading.Thread(target=self._serve, args=(self._server,), daemon=True)
        self._thread.start()

    def hang_up(self) -> None:
        """Go away, as a killed agent does."""
        for end in (self._server, self._connection):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._thread.join(WAIT_S)

    def send(self, message: Message) -> None:
        assert self._connection is not None
        self._connection.sendall(ranklink.encode_line(message))

    def begin(self, step: int, *, asked: bool = False) -> Begin:
        self._seq += 1
        begin = Begin(Seq(self._seq), pipeline.NONCE, Step(step), asked=asked)
        self.send(begin)
        return begin

    def wait_report(self, wanted: Callable[[Report], bool]) -> Report:
        """Wait for a report that satisfies the predicate."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(wanted(r) for r in self.reports), WAIT_S), self.reports[
                -3:
            ]
            return next(r for r in reversed(self.reports) if wanted(r))

    def _serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                self._connection = connection
                with connection, connection.makefile("rb") as stream:
                    for line in stream:
                        self._on_message(ranklink.decode_line(line))

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Hello):
            self.send(
                Welcome(self.accept, self.checkpoints, "test", save_timeout_s=WAIT_S, finite=self.finite)
            )
            with self._changed:
                self.hellos.append(message)
                self._changed.notify_all()
            return
        assert isinstance(message, Report)
        with self._changed:
            self.reports.append(message)
            self._changed.notify_all()
        self._lead(message)

    def settle(self, seq: int) -> None:
        """An outcome that the test itself has sent."""
        self._asked_over, self._open = max(self._asked_over, seq), None

    def _told(self, report: TransferReport) -> None:
        # How far it is, and what it asks of the store, comes now and then, and answers nothing.
        if not isinstance(report, Moved | StoreUse):
            self.transfer.put(report)

    def _lead(self, report: Report) -> None:
        if not self.checkpoints:
            return
        if report.wants_restore and not self._planned:
            self._planned = True
            assert self.may_plan.wait(WAIT_S)
            self.send(self._plan())
        if report.need is not None and report.need != self.answered and self.restore is not None:
            self.answered = report.need
            self.client.send(Demand(self.restore.id, Rank(0), report.need))
            supplied = self.transfer.get(timeout=WAIT_S)
            assert isinstance(supplied, Supplied), supplied
            self.send(supplied.have)
        trouble = report.problem
        if trouble is not None and trouble.unfit and self._open is not None and trouble.seq == self._open.seq:
            self._asked_over = trouble.seq if self._open.asked else self._asked_over
            self._open = None
            self.send(Outcome(trouble.seq, committed=False, final=False, why=trouble.message))
        elif report.sealed is not None and self._open is not None and report.sealed.seq == self._open.seq:
            self._commit(report.sealed, final=report.sealed.seq == self._final_seq)
        if self._open is None and self._planned:
            if report.save_at is not None and report.settled >= self._asked_over and self.grants:
                self._open = self.begin(report.save_at, asked=True)
            elif report.last_step is not None and self._final_seq is None:
                self._open = self.begin(report.last_step)
                self._final_seq = self._open.seq
            elif report.last_step is None and self.saves:
                self._open = self.begin(self.saves.pop(0))

    def _plan(self) -> RestorePlan:
        if self.restore is None:
            return RestorePlan(seq=None)
        self.client.send(self.restore)
        report = self.transfer.get(timeout=WAIT_S)
        assert isinstance(report, Fetched), report
        return report.plan

    def _commit(self, sealed: ranklink.Sealed, *, final: bool) -> None:
        self.client.send(pipeline.upload_order(sealed, 0, 1, self.store.uri))
        report = self.transfer.get(timeout=WAIT_S)
        assert isinstance(report, Uploaded | UploadFailed)
        committed = isinstance(report, Uploaded)
        if isinstance(report, Uploaded):
            key, sha = pipeline.merge(self.store, [report.part])
            self.committed.append(
                Fetch(
                    f"f{sealed.seq}",
                    pipeline.JOB,
                    pipeline.UID,
                    self.store.uri,
                    sealed.seq,
                    sealed.step,
                    key,
                    sha,
                )
            )
        if self._open is not None and self._open.asked:
            self._asked_over = sealed.seq
            if committed:
                self.send(Durable(sealed.seq))
        assert self.may_commit.wait(WAIT_S)
        self._open = None
        why = report.message if isinstance(report, UploadFailed) else ""
        self.send(Outcome(sealed.seq, committed=committed, final=final, why=why))

    def release(self) -> None:
        if self.restore is not None:
            self.client.send(ReleaseFetch(self.restore.id))
