"""dcp.save and dcp.load of several ranks, each a process, with real storage and the leader's real merge.

Each rank runs ``main`` in a process of its own; the leader's part is played by the test once all
have sealed: upload, merge, fetch.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.unit.trainer import pipeline

from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import Fetch, Fetched, TransferReport, Uploaded
from dtrain.protocol.ids import Seq, Step
from dtrain.protocol.ranklink import Begin, RestorePlan, Sealed
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.trainer.checkpoint.source import PlanSource
from dtrain.trainer.dcp.reader import Reader
from dtrain.trainer.dcp.writer import Writer
from dtrain.trainer.session import Ask, Session


class GrantingSession(Session):
    """A session whose every save is granted at once, and never answered."""

    def __init__(self, rank: int, seq: int) -> None:
        super().__init__(rank, lambda: None)
        self.seq = seq
        self.given_up = ""
        self.kept: Sealed | None = None

    def ask_save(self, step: int) -> tuple[Ask, Begin]:
        return Ask(step), Begin(Seq(self.seq), pipeline.NONCE, Step(step), asked=True)

    def keep(self, sealed: Sealed) -> None:
        self.kept = sealed

    def give_up(self, begin: Begin, message: str) -> None:
        self.given_up = message


def writer(session: GrantingSession, rank: int, world: int, step: int, arena: Any) -> Writer:
    @contextmanager
    def lock() -> Any:
        yield arena

    return Writer(session, rank=rank, world_size=world, step=step, wait="snapshotted", lock_arena=lock)


def save_one(
    state: dict[str, Any], root: Path, rank: int, world: int, seq: int, **more: Any
) -> TransferReport:
    """One rank's ``dcp.save`` and the upload of what it sealed."""
    session = GrantingSession(rank, seq)
    storage = writer(session, rank, world, 10 * seq, pipeline.new_arena())
    dcp.save(state, storage_writer=storage, **more)
    return upload(session.kept, root, rank, world)


def upload(sealed: Sealed | None, root: Path, rank: int, world: int) -> TransferReport:
    assert sealed is not None
    store = LocalBlobs(root)
    reports: list[TransferReport] = []
    Uploader(lambda _uri: store, reports.append).run(pipeline.upload_order(sealed, rank, world, store.uri))
    return reports[-1]


def merged(root: Path, reports: list[TransferReport]) -> Fetch:
    """The leader's part."""
    parts = [report.part for report in reports if isinstance(report, Uploaded)]
    store = LocalBlobs(root)
    key, sha = pipeline.merge(store, parts)
    first = parts[0]
    return Fetch(f"f{first.seq}", pipeline.JOB, pipeline.UID, store.uri, first.seq, first.step, key, sha)


def reader(root: Path, order: Fetch) -> tuple[Reader, RestorePlan]:
    report = pipeline.fetch(root, order)
    assert isinstance(report, Fetched), report
    return Reader(PlanSource(report.plan), report.plan.step), report.plan


def ranks(world: int, main: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``main(rank, world, *arguments)`` in ``world`` processes of one gloo group; their results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload([main.__module__])
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, world, port, queue, main, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(30.0)
    failures = [text for ok, text in results.values() if not ok]
    assert not failures, "\n".join(failures)
    return [results[rank][1] for rank in range(world)]


def _rank(rank: int, world: int, port: int, queue: Any, main: Callable[..., Any], arguments: Any) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world)
        )
        dist.init_process_group("gloo", rank=rank, world_size=world)
        queue.put((rank, (True, main(rank, world, *arguments))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  told to the test, which fails with it
        queue.put((rank, (False, traceback.format_exc())))
        sys.exit(1)
