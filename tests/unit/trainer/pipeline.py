"""The checkpoint pipeline without processes: seal, upload, merge, fetch, load."""

import gzip
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import Fetch, Fetched, TransferReport, Upload, Uploaded
from dtrain.coordinator.core.manifest import merge as leader_merge
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest, OpenRecord, RankManifest
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.ranklink import Begin, RestorePlan, Sealed
from dtrain.protocol.snapshot import DurablePart
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.port import BlobStore
from dtrain.trainer.checkpoint import restore as restoring
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.checkpoint.source import PlanSource

CLUSTER, JOB, UID = ClusterName("c1"), JobName("j1"), Uid("u1")
NONCE = "n1"


_held: list[Callable[[], None]] = []
"""Lets go of the memory that a test made: every part of it is an open file."""


def let_go() -> None:
    """Close what this test has open."""
    while _held:
        _held.pop()()


def new_arena() -> Arena:
    fd = os.memfd_create("test-arena")
    _held.append(lambda: os.close(fd))
    return Arena(fd)


def seal(tracked: Mapping[str, Any], rank: int, world: int, *, seq: int = 1, step: int = 10) -> Sealed:
    saver = Saver(tracked, rank, world, new_arena())
    return saver.seal(Begin(Seq(seq), NONCE, Step(step)))


def upload_order(sealed: Sealed, rank: int, world: int, store: str) -> Upload:
    return Upload(CLUSTER, JOB, UID, store, Attempt(1), Rank(rank), world, sealed.step, sealed)


def read_rank_manifest(store: BlobStore, part: DurablePart) -> RankManifest:
    data = store.get(part.manifest)
    assert hashlib.sha256(data).hexdigest() == part.digest
    return codec.decode(RankManifest, gzip.decompress(data), bytes_max=1 << 28)


def merge(store: BlobStore, parts: list[DurablePart]) -> tuple[str, str]:
    """What the leader does; returns the manifest's key and digest."""
    manifests = [read_rank_manifest(store, part) for part in parts]
    first = manifests[0]
    record = OpenRecord(
        Term(1), UID, first.seq, first.attempt, first.step, first.nonce, first.world, timeout_s=60.0
    )
    whole = leader_merge(
        cluster=CLUSTER, job=JOB, uid=UID, record=record, parts=manifests, parent=None, created=""
    )
    data = gzip.compress(codec.canonical(codec.to_json(whole)), mtime=0)
    key = f"{CLUSTER}/{JOB}/{UID}/manifests/{first.seq:020d}.json.gz"
    store.put(key, [data], chunk_crcs=[digest.crc32c(data)])
    return key, hashlib.sha256(data).hexdigest()


def save(root: Path, tracked_by_rank: list[Mapping[str, Any]], *, seq: int = 1, step: int = 10) -> Fetch:
    """Save as that many ranks; returns the order that fetches the checkpoint."""
    root.mkdir(exist_ok=True)
    world = len(tracked_by_rank)
    return upload_all(
        root, [seal(tracked, rank, world, seq=seq, step=step) for rank, tracked in enumerate(tracked_by_rank)]
    )


def upload_all(root: Path, sealed: list[Sealed]) -> Fetch:
    """Upload and commit what the ranks have sealed."""
    store = LocalBlobs(root)
    reports: list[TransferReport] = []
    uploader = Uploader(lambda _uri: store, reports.append)
    for rank, one in enumerate(sealed):
        uploader.run(upload_order(one, rank, len(sealed), store.uri))
    key, sha = merge(store, [report.part for report in reports if isinstance(report, Uploaded)])
    return Fetch(f"f{sealed[0].seq}", JOB, UID, store.uri, sealed[0].seq, sealed[0].step, key, sha)


def fetch(root: Path, order: Fetch) -> TransferReport:
    reports: list[TransferReport] = []
    store = LocalBlobs(root)
    fetcher = Fetcher(lambda _uri: store, reports.append, deadline_s=1.0)
    fetcher.run(order)
    _held.append(lambda: fetcher.release(order.id)())
    (report,) = reports
    return report


def fetched(root: Path, order: Fetch) -> RestorePlan:
    report = fetch(root, order)
    assert isinstance(report, Fetched), report
    return report.plan


def load(root: Path, order: Fetch, tracked: Mapping[str, Any], rank: int = 0, world: int = 1) -> None:
    restoring.load(PlanSource(fetched(root, order)), tracked, rank, world)


def manifest(root: Path, order: Fetch) -> Manifest:
    """What was committed."""
    data = gzip.decompress(LocalBlobs(root).get(order.manifest))
    return codec.decode(Manifest, data, bytes_max=1 << 28)
