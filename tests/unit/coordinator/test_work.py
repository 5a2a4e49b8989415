"""Work at the store: verify, collect, sweep, probe."""

import gzip
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from dtrain.coordinator.core.decisions import (
    CollectGarbage,
    InspectCheckpoint,
    ProbeStore,
    SweepOrphans,
    VerifyCheckpoint,
)
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.views import Verdict
from dtrain.coordinator.results import Collected, Inspected, Probed, Swept, Verified
from dtrain.coordinator.work import Stores, Worker
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    BlobEntry,
    ChunkEntry,
    CommitRecord,
    Garbage,
    Latest,
    Manifest,
    OpenRecord,
    RankManifest,
    TensorEntry,
    blob_key,
    blob_prefix,
    job_root,
    rank_manifest_key,
)
from dtrain.protocol.errors import ErrorCode, NotFound, Unavailable
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import Former, JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime.clock import SystemClock
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobInfo
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Put, Txn

CLUSTER, JOB, UID = ClusterName("c1"), JobName("job"), Uid("u1")
KEYS = Keys(CLUSTER)
ROOT = job_root(CLUSTER, JOB, UID)
URI = "memory://test"
_numbers = count()


class Store(MemoryBlobs):
    """A store that can be down, and lets something happen while it is listed."""

    def __init__(self) -> None:
        super().__init__(f"work-{next(_numbers)}")
        self.down = False
        self.before_list: Callable[[], None] = lambda: None
        self.after_list: Callable[[], None] = lambda: None

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if self.down:
            raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "the store is down")
        return super().get(key, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        self.before_list()
        yield from super().list(prefix)
        self.after_list()

    def all(self) -> set[str]:
        """Every blob, but for the mark of who decides about them."""
        return {info.key for info in super().list("") if "/_owners/" not in info.key}

    def write(self, key: str, data: bytes) -> None:
        self.put(key, [data], chunk_crcs=[digest.crc32c(data)])


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd(lambda: 0.0)


@pytest.fixture
def worker(store: Store, etcd: MemoryEtcd) -> Worker:
    return Worker(etcd, Stores(lambda _uri: store), merge, SystemClock())


def opened(seq: int = 1, nonce: str = "aa", world: int = 2) -> OpenRecord:
    return OpenRecord(Term(1), UID, Seq(seq), Attempt(1), Step(9), nonce, world, 60.0)


def write_rank(store: Store, record: OpenRecord, rank: int, **changes: Any) -> DurablePart:
    """Write one rank's blob (4 of 8 floats) and manifest, as an uploader does."""
    prefix = blob_prefix(ROOT, record.seq, record.attempt, record.nonce)
    data = bytes([rank]) * 16
    key = blob_key(prefix, Rank(rank), 0, "bb")
    store.write(key, data)
    crc = digest.to_hex(digest.crc32c(data))
    tensor = TensorEntry("F32", (8,), (ChunkEntry((4 * rank,), (4,), 0, 0, 16),))
    manifest = RankManifest(
        1,
        CLUSTER,
        JOB,
        UID,
        record.seq,
        record.attempt,
        record.nonce,
        record.step,
        Rank(rank),
        record.world_size,
        (BlobEntry(key, Rank(rank), 16, crc, (crc,)),),
        {"w": tensor},
        {},
        "layout",
    )
    packed = gzip.compress(codec.canonical(codec.to_json(replace(manifest, **changes))), mtime=0)
    name = rank_manifest_key(prefix, Rank(rank), "bb")
    store.write(name, packed)
    return DurablePart(
        record.seq,
        record.attempt,
        record.step,
        Rank(rank),
        record.nonce,
        name,
        hashlib.sha256(packed).hexdigest(),
        16,
    )


def verify(worker: Worker, record: OpenRecord, parts: list[DurablePart]) -> Verdict:
    work = VerifyCheckpoint(CLUSTER, JOB, UID, URI, record, tuple(parts), None)
    result = worker.run(work)
    assert isinstance(result, Verified), result
    return result.verdict


def commit(store: Store, worker: Worker, etcd: MemoryEtcd, seq: int, nonce: str = "aa") -> CommitRecord:
    """Write a whole checkpoint and its commit record."""
    record = opened(seq, nonce)
    verdict = verify(worker, record, [write_rank(store, record, rank) for rank in range(2)])
    assert verdict.ok, verdict.problem
    committed = CommitRecord(
        Term(1),
        UID,
        Seq(seq),
        Step(9),
        Attempt(1),
        nonce,
        2,
        32,
        verdict.manifest,
        verdict.manifest_bytes,
        verdict.digest,
    )
    put(etcd, KEYS.checkpoint(JOB, Seq(seq)), committed)
    put(etcd, KEYS.latest(JOB), Latest(Term(1), Seq(seq), Step(9)))
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(seq)))
    return committed


def put(etcd: MemoryEtcd, key: str, value: Any) -> None:
    etcd.txn(Txn(success=(Put(key, codec.encode(value)),)))


def test_a_verified_checkpoint_has_a_durable_manifest_with_its_digest(store: Store, worker: Worker) -> None:
    record = opened()
    verdict = verify(worker, record, [write_rank(store, record, rank) for rank in (1, 0)])
    assert verdict.ok
    data = store.get(verdict.manifest)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (verdict.manifest_bytes, verdict.digest)
    manifest = codec.decode(Manifest, gzip.decompress(data))
    assert (manifest.world, len(manifest.blobs), verdict.size_bytes) == (2, 2, 32)


def test_a_rank_manifest_that_is_not_what_was_reported_is_refused(store: Store, worker: Worker) -> None:
    record = opened()
    parts = [write_rank(store, record, rank) for rank in range(2)]
    verdict = verify(worker, record, [parts[0], replace(parts[1], digest="0" * 64)])
    assert (verdict.ok, verdict.retry) == (False, False)
    assert "is not what rank 1 reported" in verdict.problem


def test_a_blob_that_is_missing_or_another_is_refused(store: Store, worker: Worker) -> None:
    record = opened()
    parts = [write_rank(store, record, rank) for rank in range(2)]
    prefix = blob_prefix(ROOT, record.seq, record.attempt, record.nonce)
    key = blob_key(prefix, Rank(1), 0, "bb")
    store.delete(key)
    assert not verify(worker, record, parts).ok
    store.write(key, b"short")
    assert "holds 5 bytes, not 16" in verify(worker, record, parts).problem
    store.delete(key)
    store.write(key, b"x" * 16)
    assert "checksum" in verify(worker, record, parts).problem


def test_a_rank_cannot_name_blobs_of_another_checkpoint(store: Store, worker: Worker) -> None:
    record = opened()
    foreign = BlobEntry("c1/other/u9/blobs/x.st", Rank(1), 16, "00000000", ("00000000",))
    store.write(foreign.key, b"\1" * 16)
    parts = [write_rank(store, record, 0), write_rank(store, record, 1, blobs=(foreign,))]
    assert "not of this checkpoint" in verify(worker, record, parts).problem


def test_a_manifest_that_unpacks_to_no_json_is_refused_not_a_crash(store: Store, worker: Worker) -> None:
    record = opened(world=1)
    part = write_rank(store, record, 0)
    for number, data in enumerate([b"", b"plain", gzip.compress(b"{"), gzip.compress(b"[]")]):
        key = f"{part.manifest.removesuffix('.json.gz')}{number}.json.gz"
        store.write(key, data)
        bad = replace(part, manifest=key, digest=hashlib.sha256(data).hexdigest())
        verdict = verify(worker, record, [bad])
        assert (verdict.ok, verdict.retry) == (False, False)


def test_a_store_that_is_down_is_asked_again_later(store: Store, worker: Worker) -> None:
    record = opened()
    parts = [write_rank(store, record, rank) for rank in range(2)]
    store.down = True
    verdict = verify(worker, record, parts)
    assert (verdict.ok, verdict.retry) == (False, True)


def test_collecting_deletes_the_retired_checkpoint_and_nothing_else(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    retired = commit(store, worker, etcd, 1)
    before = store.all()
    kept = commit(store, worker, etcd, 2, "cc")
    work = CollectGarbage(JOB, URI, Garbage(Term(1), Seq(1), retired.manifest, retired.digest))
    for _ in range(2):
        assert worker.run(work) == Collected(work)
    assert not before & store.all()
    assert kept.manifest in store.all()
    assert len(store.all()) == 5


def test_collecting_goes_by_the_tombstones_digest(store: Store, worker: Worker, etcd: MemoryEtcd) -> None:
    retired = commit(store, worker, etcd, 1)
    before = store.all()
    work = CollectGarbage(JOB, URI, Garbage(Term(1), Seq(1), retired.manifest, "0" * 64))
    result = worker.run(work)
    assert isinstance(result, Collected)
    assert "nothing was deleted" in result.problem
    assert store.all() == before


def sweep(worker: Worker) -> Swept:
    result = worker.run(SweepOrphans(CLUSTER, JOB, UID, URI))
    assert isinstance(result, Swept), result
    return result


def test_a_sweep_deletes_what_no_record_names(store: Store, worker: Worker, etcd: MemoryEtcd) -> None:
    aborted = opened(2, "dead")
    write_rank(store, aborted, 0)
    commit(store, worker, etcd, 3, "cc")
    in_flight = opened(4, "ff")
    put(etcd, KEYS.open(JOB, Seq(4)), in_flight)
    write_rank(store, in_flight, 0)
    kept = {key for key in store.all() if "-dead" not in key}
    foreign = f"{ROOT}/notes/readme.txt"
    store.write(foreign, b"a person's")
    assert sweep(worker).deleted == 2
    assert store.all() == kept | {foreign}
    assert sweep(worker).deleted == 0


def test_unfinished_uploads_stay_only_where_the_checkpoint_is_still_open(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    commit(store, worker, etcd, 3, "cc")
    put(etcd, KEYS.open(JOB, Seq(4)), opened(4, "ff"))

    def die(op: str, _key: str) -> None:
        if op == "put.begun":
            raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "the writer is gone")

    store.fault = die
    keys = [
        blob_key(blob_prefix(ROOT, Seq(seq), Attempt(1), nonce), Rank(1), 0, "dd")
        for seq, nonce in ((2, "dead"), (3, "cc"), (4, "ff"))
    ]
    for key in keys:
        with pytest.raises(Unavailable):
            store.write(key, b"half")
    store.fault = lambda _op, _key: None
    assert sweep(worker).deleted == 2
    assert [token.partition("?")[0] for token in store.list_unfinished("")] == [keys[2]]


def test_an_earlier_submission_is_swept_only_while_the_status_remembers_it(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    write_rank(store, opened(2, "dead"), 0)
    status = JobStatus(Term(1), Uid("later"), JobPhase.RUNNING, seq_last=Seq(3))
    put(etcd, KEYS.status(JOB), status)
    assert "nothing was deleted" in sweep(worker).problem
    put(etcd, KEYS.status(JOB), replace(status, unswept=(Former(UID, URI),)))
    assert sweep(worker).deleted == 2
    assert not store.all()


@pytest.mark.parametrize("when", ["before_list", "after_list"])
def test_what_is_opened_while_the_store_is_listed_stays(
    store: Store, worker: Worker, etcd: MemoryEtcd, when: str
) -> None:
    commit(store, worker, etcd, 1)
    # Numbers that were given out and aborted: only the order of reading protects the next one.
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(9)))
    late = opened(2, "ee")

    def open_and_write() -> None:
        setattr(store, when, lambda: None)
        put(etcd, KEYS.open(JOB, Seq(2)), late)
        write_rank(store, late, 0)

    setattr(store, when, open_and_write)
    before = store.all()
    assert sweep(worker).deleted == 0
    assert len(store.all()) == len(before) + 2


def test_an_etcd_that_went_back_deletes_nothing(store: Store, worker: Worker, etcd: MemoryEtcd) -> None:
    commit(store, worker, etcd, 7)
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(3)))
    put(etcd, KEYS.latest(JOB), Latest(Term(1), Seq(3), Step(1)))
    etcd._live.pop(KEYS.checkpoint(JOB, Seq(7)))
    before = store.all()
    result = sweep(worker)
    assert "restored from a backup" in result.problem
    assert store.all() == before


def forget(etcd: MemoryEtcd, seq: int) -> None:
    """etcd is restored from a backup that knows numbers up to ``seq`` only."""
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(seq)))
    for number in range(seq + 1, seq + 9):
        etcd._live.pop(KEYS.checkpoint(JOB, Seq(number)), None)
    put(etcd, KEYS.latest(JOB), Latest(Term(1), Seq(seq), Step(1)))


def test_a_sweep_names_the_checkpoints_that_only_the_store_knows(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    for seq in (3, 5, 7):
        commit(store, worker, etcd, seq)
    forget(etcd, 3)
    assert sweep(worker).unknown == (5, 7)


def test_a_checkpoint_whose_number_the_store_knows_already_is_verified_and_tells_so(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    for seq in (3, 4, 6):
        commit(store, worker, etcd, seq)
    forget(etcd, 3)
    record = opened(4, "dd")
    verdict = verify(worker, record, [write_rank(store, record, rank) for rank in (0, 1)])
    assert verdict.ok
    assert verdict.unknown == (4, 6)


def test_no_verdict_speaks_of_unknown_numbers_while_etcd_forgets_nothing(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    commit(store, worker, etcd, 3)
    record = opened(4, "dd")
    parts = [write_rank(store, record, rank) for rank in (0, 1)]
    assert verify(worker, record, parts).unknown is None
    # The manifest of a try whose answer was lost is its own.
    assert verify(worker, record, parts).unknown is None


def test_a_verification_that_ends_long_after_its_checkpoint_takes_what_was_aborted_for_nothing_else(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    late, aborted = opened(4, "dd"), opened(5, "ee")
    parts = [write_rank(store, late, rank) for rank in (0, 1)]
    # Two tries at 4, which was aborted in between, and the same at 5.
    assert verify(worker, late, parts).unknown is None
    verify(worker, aborted, [write_rank(store, aborted, rank) for rank in (0, 1)])
    commit(store, worker, etcd, 6)
    assert verify(worker, late, parts).unknown is None
    # A number that etcd has not given out is a proof even then, and so is one that was given out twice.
    commit(store, worker, etcd, 8)
    etcd._live.pop(KEYS.checkpoint(JOB, Seq(8)))
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(6)))
    assert verify(worker, late, parts).unknown == (4, 8)
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(8)))
    twice = opened(4, "ff")
    found = verify(worker, twice, [write_rank(store, twice, rank) for rank in (0, 1)]).unknown
    assert found is not None
    assert found[0] == 4


def test_what_was_committed_in_a_forgotten_time_stays_until_a_person_deletes_its_manifest(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    commit(store, worker, etcd, 3)
    lost = commit(store, worker, etcd, 5)
    aborted = opened(6, "ee")
    write_rank(store, aborted, 0)
    commit(store, worker, etcd, 10)
    etcd._live.pop(KEYS.checkpoint(JOB, Seq(5)))
    known = JobStatus(
        Term(1), UID, JobPhase.RUNNING, seq_last=Seq(10), unknown_from=Seq(4), unknown_to=Seq(9)
    )
    put(etcd, KEYS.status(JOB), known)
    before = set(store.all())
    assert not sweep(worker).problem
    gone = before - set(store.all())
    assert gone, "what was never committed is collected all the same"
    assert all("/00000000000000000006/" in key for key in gone)
    store.delete(lost.manifest)
    sweep(worker)
    assert not [key for key in store.all() if "/00000000000000000005/" in key]


def test_an_etcd_without_the_jobs_status_deletes_nothing(store: Store, worker: Worker) -> None:
    record = opened()
    write_rank(store, record, 0)
    before = store.all()
    assert sweep(worker).problem
    assert store.all() == before


def test_a_record_that_cannot_be_read_stops_the_sweep(store: Store, worker: Worker, etcd: MemoryEtcd) -> None:
    commit(store, worker, etcd, 1)
    etcd.txn(Txn(success=(Put(KEYS.open(JOB, Seq(2)), b"{"),)))
    write_rank(store, opened(2, "dd"), 0)
    before = store.all()
    assert sweep(worker).problem
    assert store.all() == before


def test_a_probe_says_what_is_wrong_and_how_to_mend_it(etcd: MemoryEtcd, store: Store) -> None:
    work = ProbeStore(JOB, URI)
    assert Worker(etcd, Stores(lambda _uri: store), merge, SystemClock()).run(work) == Probed(work)
    missing = ProbeStore(JOB, "file:///no/such/folder")
    result = Worker(etcd, Stores(), merge, SystemClock()).run(missing)
    assert isinstance(result, Probed)
    assert "/no/such/folder" in result.problem


def test_a_store_is_opened_once_and_only_when_used() -> None:
    opened_uris: list[str] = []

    def opener(uri: str) -> Store:
        opened_uris.append(uri)
        return Store()

    stores = Stores(opener)
    assert not opened_uris
    assert stores.get("a") is stores.get("a")
    assert opened_uris == ["a"]


def test_a_missing_manifest_of_a_tombstone_means_that_all_is_done(worker: Worker, store: Store) -> None:
    work = CollectGarbage(JOB, URI, Garbage(Term(1), Seq(1), f"{ROOT}/manifests/gone.json.gz", ""))
    with pytest.raises(NotFound):
        store.get(work.garbage.manifest)
    assert worker.run(work) == Collected(work)


def test_blobs_of_a_number_that_was_never_given_out_stop_the_sweep(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    commit(store, worker, etcd, 1)
    # Another history: the original of which this etcd is a copy may be about to commit it.
    write_rank(store, opened(7, "ee"), 0)
    before = store.all()
    swept = sweep(worker)
    assert "nothing was deleted" in swept.problem
    assert swept.unknown == (7, 7)
    assert store.all() == before


def test_a_store_marked_as_another_etcds_is_left_alone(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    write_rank(store, opened(1, "dead"), 0)
    put(etcd, KEYS.status(JOB), JobStatus(Term(1), UID, JobPhase.RUNNING, seq_last=Seq(3)))
    assert worker.find_orphans(SweepOrphans(CLUSTER, JOB, UID, URI)).keys, "looking marks nothing"
    store.write(f"{CLUSTER}/_owners/{1:016x}.json", b"another")
    before = store.all()
    assert "another etcd" in sweep(worker).problem
    assert store.all() == before
    store.delete(f"{CLUSTER}/_owners/{1:016x}.json")
    assert sweep(worker).deleted == 2
    assert sweep(worker).problem == ""
    owners = [info.key for info in store.list(f"{CLUSTER}/_owners/")]
    assert owners == [f"{CLUSTER}/_owners/{etcd.status().cluster_id:016x}.json"]


def inspect(worker: Worker, record: CommitRecord, depth: str, blob: str = "", chunk: int = 0) -> Inspected:
    work = InspectCheckpoint(JOB, URI, record.seq, record.manifest, record.digest, depth, blob, chunk)
    result = worker.run(work)
    assert isinstance(result, Inspected), result
    return result


def test_an_inspection_finds_what_was_changed_and_names_it(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    record = commit(store, worker, etcd, 1)
    key = next(key for key in store.all() if key.endswith("00001-00-bb.st"))
    for depth in ("all", "heads", "chunk"):
        assert inspect(worker, record, depth, key if depth == "chunk" else "").damage is None
    store.delete(key)
    store.write(key, bytes(16))
    for depth in ("all", "heads", "chunk"):
        damage = inspect(worker, record, depth, key if depth == "chunk" else "").damage
        assert damage is not None
        assert (damage.blob, damage.rank, damage.tensors) == (key, 1, "tensor w"), depth
    store.delete(key)
    assert inspect(worker, record, "heads").damage.found == "missing"  # type: ignore[union-attr]


def test_an_inspection_without_an_answer_finds_nothing(
    store: Store, worker: Worker, etcd: MemoryEtcd
) -> None:
    record = commit(store, worker, etcd, 1)
    assert inspect(worker, record, "chunk", "c1/job/u1/other").problem
    for key in store.all():
        store.delete(key)
    result = inspect(worker, record, "heads")
    assert result.damage is None
    assert "holds nothing of this job" in result.problem
