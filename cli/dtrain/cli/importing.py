"""Brings state from elsewhere into a job: reads it here, writes it to the job's store, has it committed.

The leader opens a checkpoint for the request, and commits it once what was
written is reported. The request lives by being renewed: killed at any moment,
this leaves an aborted checkpoint, and orphans that the next search takes away.
"""

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cli import checkpointing, waiting
from dtrain.cli.client import Client
from dtrain.cli.identity import new_id, whoami
from dtrain.cli.records import Job
from dtrain.protocol.checkpoint import OpenRecord
from dtrain.protocol.errors import Conflict, DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import ClusterName, JobName
from dtrain.storage.checkpoints import importing, importing_files
from dtrain.storage.checkpoints.exporting import Format

TTL_S = 30
RENEW_S = 7.0
OPEN_S = 120.0
"""How long the leader may take to open the checkpoint."""

TIMEOUT_S = 6 * 3600.0

_CONVERT = ("-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch")


@dataclass(frozen=True, slots=True)
class Imported:
    """A checkpoint that was committed."""

    seq: int
    step: int
    bytes: int


@contextlib.contextmanager
def source(path: Path, wanted: Format | None, *, trust: bool, scratch: Path | None) -> Iterator[Any]:
    """Open what is to be imported; a DCP folder, if it is trusted, is converted in a process of its own.

    Raises:
        Refused: it cannot be read, or must be trusted first.
    """
    with contextlib.ExitStack() as stack:
        if importing_files.guess(path) is Format.DCP and trust and wanted in (None, Format.DCP):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dtrain-import-", dir=scratch))
            converted = _converted(path, Path(folder) / "state.pt")
            contents = importing_files.read_converted(converted, path)
        else:
            contents = importing_files.read(path, wanted)
        stack.callback(contents.close)
        yield contents


def _converted(path: Path, to: Path) -> Path:
    done = subprocess.run(
        [sys.executable, *_CONVERT, str(path), str(to)], capture_output=True, text=True, check=False
    )
    if done.returncode or not to.is_file():
        told = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise Refused(
            ErrorCode.USAGE,
            f"torch cannot convert {path}: {told[:300]}",
            fix="look whether torch is installed here, the folder is whole, and --scratch has room for it",
        )
    return to


class _Request:
    """The request at the cluster, renewed until it is over."""

    def __init__(self, client: Client, job: str, step: int, timeout_s: float) -> None:
        self.id = new_id()
        self.answered = False
        self._client = client
        self._job = job
        self._asked: dict[str, Any] = {
            "request_id": self.id,
            "step": step,
            "ttl_s": TTL_S,
            "timeout_s": timeout_s,
            "by": whoami(),
        }
        self._lease = client.import_checkpoint(job, **self._asked).lease
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="import", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                done = self._client.import_checkpoint(self._job, **self._asked, lease=self._lease)
            except DtrainError:
                continue  # tried again: the lease lasts for several tries
            if done.answered:
                self.answered = True
                return

    def report(self, part: Any) -> None:
        """Say what was written."""
        done = self._client.import_checkpoint(self._job, **self._asked, lease=self._lease, part=part)
        self.answered = self.answered or done.answered

    def check(self) -> None:
        """Raise once the request has been answered while there was still something to write."""
        if self.answered:
            raise Conflict(
                ErrorCode.CONFLICT,
                f"the import into {self._job} was ended by the cluster",
                fix=f"see why: dtrain describe job {self._job}",
            )

    def close(self, *, withdraw: bool) -> None:
        """End it; what is not committed by now never will be."""
        self._over.set()
        if withdraw:
            with contextlib.suppress(DtrainError):  # then it ends with its lease
                self._client.withdraw_import(self._job, self.id)


def into(
    client: Client,
    name: str,
    arranged: importing.Arranged,
    *,
    step: int,
    store_uri: str = "",
    timeout_s: float,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Imported:
    """Make ``arranged`` a committed checkpoint of a job that waits for its first attempt.

    Raises:
        Conflict: the job has begun, somebody else imports, or the leader refused it.
        TimedOut: no leader opened, or committed, it in time.
        Refused, Unavailable: the store will not take it, or does not answer.
    """
    request = _Request(client, name, step, timeout_s)
    done = False
    try:
        job = waiting.until(
            client,
            name,
            lambda job: request.id not in job.orders or _opened(job, request.id) is not None,
            what="opening a checkpoint for what is imported",
            timeout_s=min(OPEN_S, timeout_s),
        )
        record = _opened(job, request.id)
        if record is None or job.status is None:
            raise _refused(job, name, (f"import/{request.id}",))
        cluster = ClusterName(client.info().cluster)
        with checkpointing.opened(store_uri or job.status.store) as store:
            part = importing.write(
                store,
                cluster,
                JobName(name),
                record,
                arranged,
                check=request.check,
                on_progress=on_progress,
            )
        request.report(part)
        job = waiting.until(
            client,
            name,
            lambda job: request.id not in job.orders,
            what="committing what was imported",
            timeout_s=timeout_s,
        )
        commit = job.commits.get(record.seq)
        if commit is None or commit.nonce != record.nonce:
            raise _refused(job, name, (f"checkpoint/{record.seq}", f"import/{request.id}"))
        done = True
        return Imported(int(commit.seq), int(commit.step), int(commit.bytes))
    finally:
        request.close(withdraw=not done)


@contextlib.contextmanager
def prepared(path: Path, *, partial: bool) -> Iterator[tuple[importing.Arranged, int]]:
    """What ``path`` holds under the names it comes with, and the step it is of."""
    with source(path, None, trust=False, scratch=None) as contents:
        yield importing.arrange(contents, partial=partial), int(contents.origin.get("step", 0))


def prepared_into(client: Client, name: str, ready: tuple[importing.Arranged, int]) -> Imported:
    """Import what was prepared into a job that was submitted to wait for it."""
    from dtrain.cli.progress import Progress

    arranged, step = ready
    with Progress(f"import into {name}") as progress:
        return into(client, name, arranged, step=step, timeout_s=TIMEOUT_S, on_progress=progress)


def _opened(job: Job, request_id: str) -> OpenRecord | None:
    return next((record for record in job.open.values() if record.imported == request_id), None)


def _refused(job: Job, name: str, about: tuple[str, ...]) -> Conflict:
    told = [event.message for _, event in sorted(job.events.items()) if event.object in about]
    why = told[-1] if told else "the request is gone: it was not renewed in time"
    return Conflict(
        ErrorCode.CONFLICT, f"nothing was imported into {name}: {why}", fix=f"dtrain describe job {name}"
    )
