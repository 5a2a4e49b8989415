"""The transfer process: uploads sealed shares, fetches committed checkpoints, verifies every byte.

A blob begins with a line that says which attempt, step and rank wrote it, so that a mixture is seen.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.agent.transferring import (
    CancelUpload,
    Fetch,
    Fetched,
    FetchFailed,
    ReleaseFetch,
    TransferOrder,
    TransferReport,
    Upload,
    Uploaded,
    UploadFailed,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    BlobEntry,
    ChunkEntry,
    Manifest,
    ObjectEntry,
    RankManifest,
    TensorEntry,
    blob_key,
    blob_prefix,
    job_root,
    rank_manifest_key,
)
from dtrain.protocol.errors import DtrainError, NotFound, OutcomeUnknown, Unavailable
from dtrain.protocol.ids import Rank
from dtrain.protocol.ranklink import RestorePlan
from dtrain.protocol.snapshot import BadBlob, DurablePart
from dtrain.storage.blobs import digest

if TYPE_CHECKING:
    from tests.sim.machine import Machine
from tests.sim.training import WEIGHT_BYTES

HEAD_BYTES = 128
TENSOR = "model.w"
TRIES_MAX = 12


class Damaged(Exception):
    def __init__(self, bad: BadBlob) -> None:
        super().__init__(bad.message)
        self.bad = bad


class SimTransfer:
    """One life of the process: ends with its agent, or by a fault."""

    def __init__(self, machine: "Machine", emit: Callable[[TransferReport], None]) -> None:
        self.machine = machine
        self.scheduler = machine.place
        self.store = machine.store
        self.emit = emit
        self.alive = True
        self._cancelled: dict[tuple[str, int], None] = {}
        self._released: dict[str, None] = {}
        self._held: list[str] = []

    def die(self) -> None:
        self.alive = False
        for key in self._held:
            self.machine.fetched.pop(key, None)

    def order(self, order: TransferOrder) -> None:
        if not self.alive:
            return
        rng = self.scheduler.rng
        match order:
            case Upload():
                nonce = f"{rng.getrandbits(64):016x}"
                slow_s = self.store.wait_s()
                self._later(
                    slow_s + rng.uniform(0.05, 1.5), lambda: self._upload(order, nonce, TRIES_MAX, [])
                )
            case CancelUpload(_, uid, seq):
                self._cancelled[uid, seq] = None
            case Fetch():
                slow_s = self.store.wait_s()
                self._later(slow_s + rng.uniform(0.05, 1.5), lambda: self._fetch(order, TRIES_MAX))
            case ReleaseFetch(fetch_id):
                self._released[fetch_id] = None
                self.machine.fetched.pop(self._place(fetch_id), None)

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.scheduler.after(delay_s, lambda: call() if self.alive and self.machine.powered else None)

    def _report(self, report: TransferReport) -> None:
        self._later(0.003, lambda: self.emit(report))

    # Upload.

    def _upload(self, order: Upload, nonce: str, tries: int, written: list[str]) -> None:
        seq = order.sealed.seq
        if (order.uid, seq) in self._cancelled:
            self._discard(written)
            self._report(UploadFailed(order.job, seq, order.rank, "the checkpoint was aborted"))
            return
        sealed = self.machine.sealed_at(order.sealed.path)
        if sealed is None:
            self._report(UploadFailed(order.job, seq, order.rank, "the sealed snapshot is gone"))
            return
        try:
            part = self._write(order, nonce, sealed, written)
        except (Unavailable, OutcomeUnknown) as error:
            if tries > 1:
                self._later(
                    self.scheduler.rng.uniform(0.1, 1.0),
                    lambda: self._upload(order, nonce, tries - 1, written),
                )
                return
            self._discard(written)
            self._report(UploadFailed(order.job, seq, order.rank, error.message))
        except DtrainError as error:
            self._discard(written)
            self._report(UploadFailed(order.job, seq, order.rank, error.message))
        else:
            self.scheduler.log(self.machine.name, "part durable", seq=seq, rank=order.rank, step=order.step)
            self._report(Uploaded(order.job, part))

    def _write(self, order: Upload, nonce: str, data: bytes, written: list[str]) -> DurablePart:
        sealed = order.sealed
        root = job_root(order.cluster, order.job, order.uid)
        prefix = blob_prefix(root, sealed.seq, order.attempt, sealed.nonce)
        key = blob_key(prefix, order.rank, 0, nonce)
        of = (order.uid, sealed.seq, order.attempt, sealed.step)
        head = json.dumps(dict(zip(("uid", "seq", "attempt", "step"), of, strict=True)))
        blob = head.encode().ljust(HEAD_BYTES) + data
        crc = digest.crc32c(blob)
        if key not in written:
            written.append(key)
        self.store.put(key, [blob], chunk_crcs=[crc])
        step = {"step": int(sealed.step)}
        manifest = RankManifest(
            v=1,
            cluster=order.cluster,
            job=order.job,
            uid=order.uid,
            seq=sealed.seq,
            attempt=order.attempt,
            nonce=sealed.nonce,
            step=sealed.step,
            rank=order.rank,
            world=order.world,
            blobs=(BlobEntry(key, order.rank, len(blob), digest.to_hex(crc), (digest.to_hex(crc),)),),
            tensors={
                TENSOR: TensorEntry(
                    "U8",
                    (WEIGHT_BYTES,),
                    (ChunkEntry((sealed.offset,), (len(data),), 0, HEAD_BYTES, len(data)),),
                )
            },
            objects={"progress": ObjectEntry(step, f"{zlib.crc32(codec.canonical(step)):08x}")},
            layout="sim",
        )
        text = gzip.compress(codec.canonical(codec.to_json(manifest)), mtime=0)
        name = rank_manifest_key(prefix, order.rank, nonce)
        if name not in written:
            written.append(name)
        self.store.put(name, [text], chunk_crcs=[digest.crc32c(text)])
        return DurablePart(
            sealed.seq,
            order.attempt,
            sealed.step,
            order.rank,
            sealed.nonce,
            name,
            hashlib.sha256(text).hexdigest(),
            len(blob),
        )

    def _discard(self, written: list[str]) -> None:
        for key in written:
            try:
                self.store.delete(key)
            except DtrainError:
                self.scheduler.log(self.machine.name, "left behind", key=key)

    # Fetch.

    def _place(self, fetch_id: str) -> str:
        return f"{self.machine.name}/{id_of(fetch_id)}"

    def _fetch(self, order: Fetch, tries: int) -> None:
        if order.id in self._released:
            return
        try:
            step, state = read_checkpoint(self.machine, order.seq, order.manifest, order.digest)
        except Damaged as damaged:
            self._report(FetchFailed(order.id, str(damaged), damaged.bad))
        except (Unavailable, OutcomeUnknown) as error:
            if tries > 1:
                self._later(self.scheduler.rng.uniform(0.1, 1.0), lambda: self._fetch(order, tries - 1))
                return
            self._report(FetchFailed(order.id, error.message))
        else:
            place = self._place(order.id)
            self.machine.fetched[place] = (step, state)
            self._held.append(place)
            self._report(Fetched(order.id, RestorePlan(order.seq, order.step, place)))


def id_of(fetch_id: str) -> str:
    return hashlib.sha256(fetch_id.encode()).hexdigest()[:12]


def read_checkpoint(machine: "Machine", seq: int, manifest_name: str, sha: str) -> tuple[int, bytes]:
    """Return step and weights of a checkpoint, every byte verified.

    Raises:
        Damaged: the store holds something else than was committed.
    """
    store = machine.store
    try:
        text = store.get(manifest_name)
    except NotFound as error:
        raise Damaged(BadBlob(seq, manifest_name, 0, sha, "", Rank(0), "the manifest is gone")) from error
    found = hashlib.sha256(text).hexdigest()
    if found != sha:
        raise Damaged(BadBlob(seq, manifest_name, 0, sha, found, Rank(0), "the manifest is damaged"))
    manifest = codec.decode(Manifest, gzip.decompress(text))
    blobs = []
    for blob in manifest.blobs:
        try:
            data = store.get(blob.key)
        except NotFound as error:
            raise Damaged(BadBlob(seq, blob.key, 0, blob.crc, "", blob.rank, "a blob is gone")) from error
        crc = digest.to_hex(digest.crc32c(data))
        if crc != blob.crc:
            raise Damaged(BadBlob(seq, blob.key, 0, blob.crc, crc, blob.rank, "a blob is damaged"))
        blobs.append(data)
    state = bytearray(WEIGHT_BYTES)
    for chunk in manifest.tensors[TENSOR].chunks:
        state[chunk.o[0] : chunk.o[0] + chunk.s[0]] = blobs[chunk.b][chunk.off : chunk.off + chunk.len]
    return int(manifest.step), bytes(state)
