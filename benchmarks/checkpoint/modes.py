"""One way each to save a state, with the same face: ``save`` stalls, ``wait`` until it is on disk."""

import os
import queue
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dtrain.agent.transfer_client import TransferClient
from dtrain.agent.transferring import TransferReport, Upload, Uploaded
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import Begin, Sealed
from dtrain.protocol.snapshot import DurablePart
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver

State = dict[str, Any]

CLUSTER, JOB, UID, NONCE = ClusterName("bench"), JobName("bench"), Uid("bench-1"), "0123456789abcdef"


class Mode(Protocol):
    """How one process saves. ``prepare`` is what a run does once, behind its first step."""

    def prepare(self) -> None: ...
    def save(self, number: int) -> None: ...
    def wait(self) -> None: ...
    def other_cpu_s(self) -> float:
        """CPU time of processes beside this one."""

    def shared_bytes(self) -> int:
        """Memory that belongs to no process."""

    def close(self) -> None: ...


class TorchSave:
    """``torch.save`` into a file, synced, and its folder."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state = state
        self._folder = folder

    def prepare(self) -> None:
        """Nothing to do."""

    def save(self, number: int) -> None:
        path = self._folder / f"{number}.pt"
        with path.open("wb") as file:
            torch.save(self._state, file)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def wait(self) -> None:
        """Nothing to wait for."""

    def other_cpu_s(self) -> float:
        return 0.0

    def shared_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to end."""


class DcpSave(TorchSave):
    """``dcp.save`` with the writer it takes by itself, which syncs its files."""

    def save(self, number: int) -> None:
        dcp.save(self._state, checkpoint_id=self._folder / str(number))


class DcpAsync(TorchSave):
    """``dcp.async_save`` on a thread, with the stager it takes by itself."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._future: Future[Any] | None = None

    def save(self, number: int) -> None:
        self._started(dcp.async_save(self._state, checkpoint_id=self._folder / str(number)))

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()

    def _started(self, answer: Any) -> None:
        # The stall ends when training may change the state again.
        staged = getattr(answer, "staging_completion", None)
        if staged is not None:
            staged.result()
        self._future = getattr(answer, "upload_completion", answer)


class DcpAsyncReused(DcpAsync):
    """The same with one stager for all saves, which keeps its memory."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, number: int) -> None:
        self._started(
            dcp.async_save(self._state, checkpoint_id=self._folder / str(number), async_stager=self._stager)
        )

    def close(self) -> None:
        self._stager.close()


class Agent:
    """An agent's transfer process and its store."""

    def __init__(self, folder: Path) -> None:
        store = folder / "store"
        store.mkdir()
        self.uri = store.as_uri()
        self._reports: queue.SimpleQueue[TransferReport] = queue.SimpleQueue()
        self._client = TransferClient(self._reports.put)
        self._client.start()
        assert self._client.pid is not None
        self.process = psutil.Process(self._client.pid)

    def send(self, sealed: Sealed, rank: int, world: int) -> None:
        """Order one rank's snapshot to be made durable."""
        self._client.send(
            Upload(CLUSTER, JOB, UID, self.uri, Attempt(1), Rank(rank), world, sealed.step, sealed)
        )

    def await_part(self) -> DurablePart:
        """The next part that is durable.

        Raises:
            RuntimeError: it was not made durable.
        """
        report = self._reports.get(timeout=120)
        if not isinstance(report, Uploaded):
            raise RuntimeError(f"the upload failed: {report}")
        return report.part

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self._client.close()


class Ours:
    """What a rank and its agent do for one checkpoint, up to the part being durable."""

    def __init__(self, state: State, folder: Path) -> None:
        self.agent = Agent(folder)
        self._fd = os.memfd_create("bench-arena")
        self._saver = Saver(state, 0, 1, Arena(self._fd))
        self._sealed: Sealed | None = None

    def prepare(self) -> None:
        self._saver.prepare()

    def save(self, number: int) -> None:
        self._sealed = self._saver.seal(Begin(Seq(number + 1), NONCE, Step(number)))

    def wait(self) -> None:
        assert self._sealed is not None
        self.agent.send(self._sealed, 0, 1)
        self.agent.await_part()

    def other_cpu_s(self) -> float:
        return self.agent.cpu_s()

    def shared_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        self.agent.close()


MODES: dict[str, Any] = {
    "ours": Ours,
    "torch.save": TorchSave,
    "DCP save": DcpSave,
    "DCP async": DcpAsync,
    "DCP async, reused stager": DcpAsyncReused,
}


def empty(folder: Path) -> None:
    """Remove what was saved; what a mode keeps between saves stays."""
    for entry in folder.iterdir():
        if entry.name == "store":
            for part in entry.iterdir():
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else None
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
