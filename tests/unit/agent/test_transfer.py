"""Uploads and fetches: durable before reported, verified before used, cancelled without harm."""

import gzip
import json
import os
import queue
import signal
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.trainer.pipeline import merge

from dtrain.agent.transfer import UPLOAD_NICE, Transfer
from dtrain.agent.transfer_client import TransferClient
from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import (
    CancelUpload,
    Fetch,
    Fetched,
    FetchFailed,
    Moved,
    ReleaseFetch,
    StoreUse,
    TransferEnded,
    TransferReport,
    Upload,
    Uploaded,
    UploadFailed,
)
from dtrain.protocol.checkpoint import CHUNK_BYTES
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Unavailable
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import Sealed
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobInfo, BlobStore

WAIT_S = 20.0
JOB, UID = JobName("j1"), Uid("u1")


@pytest.fixture
def sealed() -> Iterator[Sealed]:
    """A snapshot of two and a half chunks, written without torch."""
    values = os.urandom(1024) * (CHUNK_BYTES * 5 // 2 // 1024)
    header = json.dumps(
        {"x": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}
    ).encode()
    header += b" " * (-(8 + len(header)) % 64)
    blob = struct.pack("<Q", len(header)) + header + values
    entry = {"dtype": "U8", "shape": [len(values)], "chunks": [
        {"o": [0], "s": [len(values)], "b": 0, "off": 8 + len(header), "len": len(values)}]}  # fmt: skip
    index = json.dumps({"layout": "h", "objects": {}, "tensors": {"x": entry}}).encode()
    fd = os.memfd_create("test-arena")
    os.write(fd, blob + index)
    yield Sealed(Seq(7), "n1", Step(40), f"/proc/{os.getpid()}/fd/{fd}", 0, len(blob), len(blob), len(index))
    os.close(fd)


def upload(sealed: Sealed, store: str = "memory://x") -> Upload:
    return Upload(ClusterName("c1"), JOB, UID, store, Attempt(2), Rank(0), 1, sealed.step, sealed)


class Flaky(MemoryBlobs):
    """Fails the first calls; counts them."""

    def __init__(self, *failures: DtrainError) -> None:
        super().__init__("flaky")
        self.failures = list(failures)

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        if self.failures:
            raise self.failures.pop(0)
        return super().put(key, parts, chunk_crcs=chunk_crcs, flow=flow)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        return super().get(key, offset=offset, length=length)

    def head(self, key: str) -> BlobInfo:
        if self.failures:
            raise self.failures.pop(0)
        return super().head(key)


def keys(store: BlobStore) -> list[str]:
    return [info.key for info in store.list("")]


def commit(root: Path, sealed: Sealed) -> Fetch:
    root.mkdir()
    store = LocalBlobs(root)
    reports: list[TransferReport] = []
    Uploader(lambda _uri: store, reports.append).run(upload(sealed))
    (uploaded,) = reports
    assert isinstance(uploaded, Uploaded)
    key, sha = merge(store, [uploaded.part])
    return Fetch("f1", JOB, UID, store.uri, sealed.seq, sealed.step, key, sha)


def fetch(root: Path, order: Fetch) -> TransferReport:
    store = LocalBlobs(root)
    reports: list[TransferReport] = []
    Fetcher(lambda _uri: store, reports.append, deadline_s=0.5).run(order)
    (report,) = reports
    return report


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_an_upload_survives_a_store_that_fails_for_a_while(sealed: Sealed) -> None:
    store = Flaky(
        Unavailable(ErrorCode.STORE_UNAVAILABLE, "down"), OutcomeUnknown(ErrorCode.STORE_UNAVAILABLE, "lost")
    )
    reports: list[TransferReport] = []
    Uploader(lambda _uri: store, reports.append).run(upload(sealed))
    (report,) = reports
    assert isinstance(report, Uploaded)
    assert report.part.manifest in keys(store)
    assert (report.part.seq, report.part.attempt, report.part.nonce) == (7, 2, "n1")


def test_an_upload_that_fails_leaves_nothing(sealed: Sealed) -> None:
    store = Flaky(*[Unavailable(ErrorCode.STORE_UNAVAILABLE, "down")] * 1000)
    with pytest.raises(Unavailable):
        Uploader(lambda _uri: store, pytest.fail, patience_s=0.2).run(upload(sealed))
    assert keys(store) == []


def test_two_uploads_of_one_snapshot_never_share_a_key(sealed: Sealed) -> None:
    store = MemoryBlobs("twice")
    uploader = Uploader(lambda _uri: store, lambda report: None)
    uploader.run(upload(sealed))
    uploader.run(upload(sealed))
    assert len(set(keys(store))) == 4


def test_a_cancelled_upload_deletes_what_it_wrote(sealed: Sealed) -> None:
    cancel = CancelUpload(JOB, UID, sealed.seq)

    class Cancelling(MemoryBlobs):
        def put(
            self,
            key: str,
            parts: Sequence[bytes | memoryview],
            *,
            chunk_crcs: Sequence[int],
            flow: Flow | None = None,
        ) -> BlobInfo:
            info = super().put(key, parts, chunk_crcs=chunk_crcs, flow=flow)
            uploader.cancel(cancel)  # between blob and manifest
            return info

    store = Cancelling("cancelled")
    uploader = Uploader(lambda _uri: store, pytest.fail)
    with pytest.raises(DtrainError, match="aborted"):
        uploader.run(upload(sealed))
    assert keys(store) == []


class Paused(MemoryBlobs):
    """Stops in the middle of a blob until its write is ended."""

    def __init__(self) -> None:
        super().__init__("paused")
        self.begun = threading.Event()

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        assert flow is not None
        self.begun.set()
        flow.wait(WAIT_S)
        pytest.fail("nobody ended it")


def test_a_cancel_ends_an_upload_in_the_middle_of_a_blob(sealed: Sealed) -> None:
    store = Paused()
    uploader = Uploader(lambda _uri: store, pytest.fail)
    ended: list[DtrainError] = []

    def run() -> None:
        with pytest.raises(DtrainError) as error:
            uploader.run(upload(sealed))
        ended.append(error.value)

    thread = threading.Thread(target=run)
    thread.start()
    assert store.begun.wait(WAIT_S)
    uploader.cancel(CancelUpload(JOB, UID, Seq(sealed.seq + 1)))
    uploader.cancel(CancelUpload(JOB, UID, sealed.seq))
    thread.join(WAIT_S)
    (error,) = ended
    assert error.code == ErrorCode.CONFLICT
    assert f"0 of {sealed.size_bytes} bytes were durable" in error.message


def test_an_upload_that_hangs_gives_its_reason_when_its_patience_ends(sealed: Sealed) -> None:
    store = Paused()
    order = replace(upload(sealed), patience_s=0.2, bandwidth_mb_s=3.0)
    with pytest.raises(Unavailable) as error:
        Uploader(lambda _uri: store, pytest.fail).run(order)
    assert "bytes were durable after 0.2 s, at 3 MB/s at most" in error.value.message


def test_the_reason_of_a_store_that_stays_away_is_told(sealed: Sealed) -> None:
    store = Flaky(*[Unavailable(ErrorCode.STORE_UNAVAILABLE, "nobody answers the door")] * 1000)
    with pytest.raises(Unavailable, match="nobody answers the door"):
        Uploader(lambda _uri: store, pytest.fail).run(replace(upload(sealed), patience_s=0.5))


def test_an_upload_keeps_to_its_job_s_bandwidth_and_shares_it(sealed: Sealed) -> None:
    store = MemoryBlobs("capped")
    uploader = Uploader(lambda _uri: store, lambda report: None)
    order = replace(upload(sealed), bandwidth_mb_s=100.0)
    began = time.monotonic()
    threads = [threading.Thread(target=uploader.run, args=(order,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    # Memory takes a chunk at a time, each paid for by the next: two chunks and the burst come for free.
    least_s = (2 * sealed.size_bytes - 2 * CHUNK_BYTES) / 100e6 - 0.25
    assert time.monotonic() - began >= least_s > 0.1


def test_each_chunk_is_hashed_once_even_if_the_store_fails_in_between(
    sealed: Sealed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed: list[int] = []
    real = digest.crc32c

    def counting(data: bytes | memoryview, value: int = 0) -> int:
        hashed.append(len(data))
        return real(data, value)

    monkeypatch.setattr(digest, "crc32c", counting)
    Uploader(lambda _uri: LocalBlobs(tmp_path), lambda report: None).run(upload(sealed))
    chunks = [CHUNK_BYTES, CHUNK_BYTES, sealed.size_bytes - 2 * CHUNK_BYTES]
    assert [size for size in hashed if size in chunks] == chunks


def test_a_part_once_reported_is_never_deleted_by_a_cancel(sealed: Sealed) -> None:
    store = MemoryBlobs("reported")
    uploader = Uploader(lambda _uri: store, lambda report: None)
    uploader.run(upload(sealed))
    uploader.cancel(CancelUpload(JOB, UID, sealed.seq))
    assert len(keys(store)) == 2


def test_a_fetched_checkpoint_is_what_was_uploaded(tmp_path: Path, sealed: Sealed) -> None:
    order = commit(tmp_path / "store", sealed)
    report = fetch(tmp_path / "store", order)
    assert isinstance(report, Fetched)
    (place,) = report.plan.blobs
    memory = Path(place.path).read_bytes()
    assert (
        memory[place.offset : place.offset + place.size_bytes]
        == Path(sealed.path).read_bytes()[: place.size_bytes]
    )
    text = memory[report.plan.manifest_offset :][: report.plan.manifest_bytes]
    assert json.loads(text)["seq"] == 7


@pytest.mark.parametrize(("offset", "chunk"), [(100, 0), (CHUNK_BYTES, 1), (-1, 2)])
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, sealed: Sealed, offset: int, chunk: int) -> None:
    order = commit(tmp_path / "store", sealed)
    (blob,) = (tmp_path / "store").rglob("*.st")
    flip(blob, offset)
    report = fetch(tmp_path / "store", order)
    assert isinstance(report, FetchFailed)
    assert report.bad is not None
    assert (report.bad.seq, report.bad.chunk, report.bad.rank) == (7, chunk, 0)
    assert report.bad.blob == blob.relative_to(tmp_path / "store").as_posix()
    assert report.bad.expected != report.bad.found


def test_missing_short_and_foreign_bytes_are_found(tmp_path: Path, sealed: Sealed) -> None:
    root = tmp_path / "store"
    order = commit(root, sealed)
    (blob,) = root.rglob("*.st")
    whole = blob.read_bytes()

    blob.unlink()
    report = fetch(root, order)
    assert isinstance(report, FetchFailed)
    assert report.bad is not None
    assert report.bad.found == "missing"

    blob.write_bytes(whole[:-1])
    report = fetch(root, order)
    assert isinstance(report, FetchFailed)
    assert report.bad is not None
    assert (report.bad.found, report.bad.chunk) == ("short", 2)

    blob.unlink()
    blob.write_bytes(whole)
    assert isinstance(fetch(root, order), Fetched)
    other = fetch(root, replace(order, step=Step(41)))
    assert isinstance(other, FetchFailed)
    assert other.bad is not None

    flip(root / order.manifest, 20)
    report = fetch(root, order)
    assert isinstance(report, FetchFailed)
    assert report.bad is not None
    assert report.bad.blob == order.manifest


def test_a_good_manifest_that_is_not_the_committed_one_is_refused(tmp_path: Path, sealed: Sealed) -> None:
    """A try whose answer was lost leaves one of the same checkpoint behind."""
    order = commit(tmp_path / "store", sealed)
    path = tmp_path / "store" / order.manifest
    manifest = json.loads(gzip.decompress(path.read_bytes()))
    path.unlink()
    path.write_bytes(gzip.compress(json.dumps(manifest | {"created": "at another time"}).encode()))
    report = fetch(tmp_path / "store", order)
    assert isinstance(report, FetchFailed)
    assert report.bad is not None
    assert (report.bad.blob, report.bad.expected) == (order.manifest, order.digest)
    assert report.bad.found != order.digest


def test_a_store_that_does_not_answer_does_not_damn_the_checkpoint(tmp_path: Path, sealed: Sealed) -> None:
    order = commit(tmp_path / "store", sealed)
    down = Flaky(*[Unavailable(ErrorCode.STORE_UNAVAILABLE, "down")] * 1000)
    with pytest.raises(Unavailable):
        Fetcher(lambda _uri: down, pytest.fail, deadline_s=0.2).run(order)


# The process itself -------------------------------------------------------------


class Client:
    def __init__(self) -> None:
        self.reports: queue.SimpleQueue[TransferReport] = queue.SimpleQueue()
        self.client = TransferClient(self.reports.put)
        self.client.start()

    def next(self) -> TransferReport:
        """The next answer; how far things are, and what the store is asked, comes now and then."""
        while isinstance(report := self.reports.get(timeout=WAIT_S), Moved | StoreUse):
            pass
        return report


@pytest.fixture
def process() -> Iterator[Client]:
    client = Client()
    yield client
    client.client.close()


def test_the_process_uploads_fetches_and_releases(tmp_path: Path, sealed: Sealed, process: Client) -> None:
    (tmp_path / "store").mkdir()
    store = LocalBlobs(tmp_path / "store")
    process.client.send(upload(sealed, store.uri))
    uploaded = process.next()
    assert isinstance(uploaded, Uploaded)
    key, sha = merge(store, [uploaded.part])
    process.client.send(Fetch("f1", JOB, UID, store.uri, sealed.seq, sealed.step, key, sha))
    fetched = process.next()
    assert isinstance(fetched, Fetched)
    path = Path(fetched.plan.blobs[0].path)
    assert path.exists()
    process.client.send(ReleaseFetch("f1"))
    deadline = time.monotonic() + WAIT_S
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_orders_that_cannot_be_done_are_answered(tmp_path: Path, sealed: Sealed, process: Client) -> None:
    process.client.send(upload(replace(sealed, path="/proc/1/fd/999999"), tmp_path.as_uri()))
    failed = process.next()
    assert isinstance(failed, UploadFailed)
    assert "gone" in failed.message
    process.client.send(upload(sealed, (tmp_path / "nowhere").as_uri()))
    failed = process.next()
    assert isinstance(failed, UploadFailed)
    assert "does not exist" in failed.message
    process.client.send(Fetch("f", JOB, UID, "ftp://x", Seq(1), Step(1), "m", "d"))
    refused = process.next()
    assert isinstance(refused, FetchFailed)
    assert refused.bad is None


class Niceness(MemoryBlobs):
    """Notes how nice the threads are that write and read."""

    def __init__(self) -> None:
        super().__init__("niceness")
        self.of: dict[str, set[int]] = {"put": set(), "get": set()}

    def note(self, call: str) -> None:
        self.of[call].add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        self.note("put")
        return super().put(key, parts, chunk_crcs=chunk_crcs, flow=flow)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self.note("get")
        return super().get(key, offset=offset, length=length)


def test_uploads_give_way_to_training_and_restores_do_not(sealed: Sealed) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    store = Niceness()
    reports: queue.Queue[TransferReport] = queue.Queue()
    transfer = Transfer(reports.put, lambda _uri: store)
    transfer.handle(upload(sealed))
    uploaded = reports.get(timeout=WAIT_S)
    assert isinstance(uploaded, Uploaded)
    assert store.of == {"put": {max(own, UPLOAD_NICE)}, "get": set()}
    key, sha = merge(store, [uploaded.part])
    store.of["get"].clear()
    transfer.handle(Fetch("f1", JOB, UID, store.uri, sealed.seq, sealed.step, key, sha))
    assert isinstance(reports.get(timeout=WAIT_S), Fetched)
    assert store.of["get"] == {own}


def test_a_killed_process_is_reported_once_and_can_be_started_again(
    tmp_path: Path, sealed: Sealed, process: Client
) -> None:
    pid = process.client.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert process.next() == TransferEnded(-signal.SIGKILL)
    process.client.send(ReleaseFetch("dropped"))
    process.client.start()
    process.client.send(upload(sealed, tmp_path.as_uri()))
    assert isinstance(process.next(), Uploaded)
    assert process.reports.empty()


def test_the_process_ends_with_its_client(process: Client) -> None:
    process.client.close()
    assert process.next() == TransferEnded(0)


def test_the_process_survives_the_thread_that_started_it(tmp_path: Path, sealed: Sealed) -> None:
    clients: list[Client] = []
    thread = threading.Thread(target=lambda: clients.append(Client()))
    thread.start()
    thread.join()
    (client,) = clients
    client.client.send(upload(sealed, tmp_path.as_uri()))
    assert isinstance(client.next(), Uploaded)
    client.client.close()


def test_the_process_never_imports_torch() -> None:
    import subprocess
    import sys

    script = (
        "import sys, dtrain.agent.transfer\n"
        "print([name for name in ('torch', 'numpy', 'grpc', 'boto3') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
