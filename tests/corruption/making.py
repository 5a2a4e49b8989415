"""Committed checkpoints, made as the product makes them, and what each rank held when they were taken."""

import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import Fetch, Fetched, FetchFailed, TransferReport, Upload, Uploaded
from dtrain.coordinator.core.decisions import VerifyCheckpoint
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.views import Verdict
from dtrain.coordinator.results import Verified
from dtrain.coordinator.work import Stores, Worker, unpack
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest, OpenRecord
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.ranklink import Begin, RestorePlan, Sealed
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime.clock import SystemClock
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.trainer import Sampler
from dtrain.trainer.checkpoint import restore as restoring
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.checkpoint.source import PlanSource, Source

CLUSTER, JOB, UID = ClusterName("c1"), JobName("j1"), Uid("u1")

MIB = 1024 * 1024


class Shelf(Protocol):
    """A store, and the way round it by which its bytes are damaged."""

    @property
    def store(self) -> BlobStore: ...

    def read(self, key: str) -> bytes: ...

    def write(self, key: str, data: bytes) -> None:
        """Put these bytes there, whatever was there before."""

    def remove(self, key: str) -> None: ...


class Folder:
    """A directory store; its files are written past it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True)
        self._root = root
        self.store: BlobStore = LocalBlobs(root)

    def read(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def remove(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)


# What ranks track -----------------------------------------------------------------


def tracked(seed: int, rank: int, world: int, *, big_bytes: int = 0) -> dict[str, Any]:
    """State of many kinds; equal on all ranks but for the sampler's place among them."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + seed % 7))
    for _ in range(2):
        model(torch.randn(4, 96)).square().sum().backward()
        optimizer.step()
    sampler = Sampler(1000, 4, seed=seed, rank=rank, world_size=world)
    for _ in range(seed % 50):
        next(sampler)
    extra: dict[str, Any] = {
        "half": torch.randn(33, 7).to(torch.bfloat16),
        "scalar": torch.tensor(seed, dtype=torch.int64),
        "none": torch.empty(0, 5),
        "flags": torch.rand(129) > 0.5,
        "waves": torch.randn(17, dtype=torch.complex64),
        "table": torch.randn(400, 160),
        "plain": {"seed": seed, "ratio": 0.25 * seed, "names": ["a", "b"], "pair": (seed, None)},
    }
    if big_bytes:
        extra["big"] = torch.randint(0, 256, (64, big_bytes // 64), dtype=torch.uint8)
    return {"model": model, "optimizer": optimizer, "sampler": sampler, "extra": extra}


def fingerprint(value: Any) -> Any:
    """A value with every tensor replaced by dtype, shape and digest of its bytes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    if hasattr(value, "state_dict"):
        return fingerprint(value.state_dict())
    if isinstance(value, Mapping):
        return {key: fingerprint(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [fingerprint(part) for part in value]
    return value


def generators() -> Any:
    """The state of this process's generators."""
    name, keys, *rest = np.random.get_state()
    return fingerprint([random.getstate(), torch.get_rng_state(), (name, np.asarray(keys).tolist(), *rest)])


def stir(seed: int) -> None:
    """Set the generators as if training had drawn from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# Commits --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Uploads:
    """One checkpoint whose ranks have reported: durable, and not yet committed."""

    work: VerifyCheckpoint
    held: tuple[Any, ...]
    """Of each rank: what it tracked and its generators, as fingerprints."""
    seed: int
    big_bytes: int

    @property
    def world(self) -> int:
        return len(self.held)


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint behind its record; ``order`` is how an agent is told to fetch it."""

    order: Fetch
    manifest: Manifest
    uploads: Uploads


def seal(state: Mapping[str, Any], rank: int, world: int, begin: Begin) -> Sealed:
    """Seal one rank's state in an arena of its own."""
    return Saver(state, rank, world, Arena(os.memfd_create("campaign"))).seal(begin)


def upload_order(sealed: Sealed, rank: int, world: int, attempt: int, uri: str) -> Upload:
    """What the agent tells its transfer process."""
    return Upload(CLUSTER, JOB, UID, uri, Attempt(attempt), Rank(rank), world, sealed.step, sealed)


def upload(store: BlobStore, order: Upload) -> DurablePart:
    """Make one part durable.

    Raises:
        DtrainError: it did not become so.
    """
    reports: list[TransferReport] = []
    Uploader(lambda _uri: store, reports.append).run(order)
    (report,) = reports
    assert isinstance(report, Uploaded), report
    return report.part


def save(store: BlobStore, seq: int, step: int, attempt: int, world: int, *, big_bytes: int = 0) -> Uploads:
    """Every rank seals and uploads; nobody has committed yet."""
    nonce = f"{seq:08x}{attempt:08x}"
    parts, held, seed = [], [], 1000 * attempt + seq
    for rank in range(world):
        state = tracked(seed, rank, world, big_bytes=big_bytes)
        stir(seed * 100 + rank)
        held.append((fingerprint(state), generators()))
        sealed = seal(state, rank, world, Begin(Seq(seq), nonce, Step(step)))
        fd = int(sealed.path.rsplit("/", 1)[1])
        parts.append(upload(store, upload_order(sealed, rank, world, attempt, store.uri)))
        os.close(fd)
    return Uploads(opened(parts, world), tuple(held), seed, big_bytes)


def opened(parts: Sequence[DurablePart], world: int) -> VerifyCheckpoint:
    """What a leader's core asks for once these ranks have reported."""
    one = parts[0]
    record = OpenRecord(Term(1), UID, one.seq, one.attempt, one.step, one.nonce, world, timeout_s=60.0)
    return VerifyCheckpoint(CLUSTER, JOB, UID, "campaign", record, tuple(parts), parent=None)


def verify(store: BlobStore, uploads: Uploads) -> Verdict:
    """What the leader does before it commits: reads, compares, merges, writes the manifest."""
    stores = Stores(lambda _uri: store)
    worker = Worker(MemoryEtcd(lambda: 0.0), stores, merge, SystemClock())
    result = worker.run(uploads.work)
    assert isinstance(result, Verified), result
    return result.verdict


def commit(store: BlobStore, uploads: Uploads, verdict: Verdict) -> Committed:
    """The order that follows from the commit record."""
    record = uploads.work.record
    order = Fetch(
        f"f{record.seq}", JOB, UID, store.uri, record.seq, record.step, verdict.manifest, verdict.digest
    )
    data = unpack(store.get(verdict.manifest))
    return Committed(order, codec.decode(Manifest, data, bytes_max=1 << 26), uploads)


def commit_one(store: BlobStore, seq: int, step: int, attempt: int, world: int, **more: int) -> Committed:
    """Save and commit."""
    uploads = save(store, seq, step, attempt, world, **more)
    verdict = verify(store, uploads)
    assert verdict.ok, verdict.problem
    return commit(store, uploads, verdict)


# Restores -------------------------------------------------------------------------


@contextmanager
def fetched(store: BlobStore, order: Fetch) -> Iterator[Fetched | FetchFailed]:
    """Fetch as the agent's transfer process does; the memory is freed afterwards."""
    reports: list[TransferReport] = []
    fetcher = Fetcher(lambda _uri: store, reports.append, deadline_s=5.0)
    fetcher.run(order)
    (report,) = reports
    assert isinstance(report, Fetched | FetchFailed), report
    try:
        yield report
    finally:
        if isinstance(report, Fetched):
            fetcher.release(order.id)


def restores_right(source: Source, uploads: Uploads, rank: int) -> bool:
    """Whether a rank, restored from ``source``, holds exactly what it held when it saved."""
    state = tracked(uploads.seed + 1, rank, uploads.world, big_bytes=uploads.big_bytes)
    # The sampler checks that it is the same data.
    state["sampler"] = Sampler(1000, 4, seed=uploads.seed, rank=rank, world_size=uploads.world)
    stir(1)
    restoring.load(source, state, rank, uploads.world)
    return (fingerprint(state), generators()) == uploads.held[rank]


def wrong_ranks(plan: RestorePlan, uploads: Uploads) -> Sequence[int]:
    """Ranks that, restored from a plan that is there as a whole, hold something else than they saved."""
    return [rank for rank in range(uploads.world) if not restores_right(PlanSource(plan), uploads, rank)]
