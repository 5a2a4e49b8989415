"""The three blob stores under one roof: a real SeaweedFS, a folder, memory."""

import contextlib
import itertools
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from dtrain.local.weed import BUCKET, WeedServer
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import PART_BYTES, BlobInfo, BlobStore
from dtrain.storage.blobs.s3 import S3Blobs
from dtrain.storage.blobs.s3_settings import S3Settings

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Backend:
    """A store, and how to leave an upload in it as a writer that died would."""

    store: BlobStore
    leave_unfinished: Callable[[str], None]


def put(store: BlobStore, key: str, data: bytes | memoryview | mmap) -> BlobInfo:
    """Put ``data`` in the chunks that the port asks for."""
    view = memoryview(data)
    parts = [view[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
    return store.put(key, parts, chunk_crcs=[digest.crc32c(part) for part in parts])


@pytest.fixture(scope="session")
def big() -> bytes:
    """Two and a half parts."""
    return random.Random(5).randbytes(PART_BYTES * 5 // 2)


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeedServer]:
    server = WeedServer(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def s3(weed: WeedServer) -> Iterator[S3Blobs]:
    store = s3_store(weed)
    yield store
    store.close()


def s3_store(weed: WeedServer, **changes: object) -> S3Blobs:
    settings: dict[str, object] = {"endpoint": weed.endpoint, "region": "us-east-1", "timeout_s": 20.0}
    settings |= changes
    bucket = str(settings.pop("bucket", BUCKET))
    prefix = str(settings.pop("prefix", f"test {secrets.token_hex(4)}/root"))
    own = (weed.env["AWS_ACCESS_KEY_ID"], weed.env["AWS_SECRET_ACCESS_KEY"])
    credentials = settings.pop("credentials", own)
    made = S3Settings(**settings)  # type: ignore[arg-type]
    return S3Blobs(bucket, prefix, made, credentials=credentials)  # type: ignore[arg-type]


def client_of(store: S3Blobs) -> Any:
    """Return the boto3 client that the store uses, to fail or to count its requests."""
    return store._access._connect().client


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    root = tmp_path / "root"
    root.mkdir()
    return LocalBlobs(root)


@pytest.fixture(params=["memory", "local", "s3"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "memory":
        memory = MemoryBlobs()

        def die(op: str, key: str) -> None:
            if op == "put.begun":
                raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "the writer died")

        def leave_in_memory(key: str) -> None:
            memory.fault = die
            with contextlib.suppress(Unavailable):
                put(memory, key, b"half")
            memory.fault = lambda _op, _key: None

        return Backend(memory, leave_in_memory)
    if request.param == "local":
        local = request.getfixturevalue("local")

        def leave_in_folder(key: str) -> None:
            path = tmp_path / "root" / ".incoming" / f"{next(_numbers):016x}" / key
            path.parent.mkdir(parents=True)
            path.write_bytes(b"half")

        return Backend(local, leave_in_folder)
    s3 = request.getfixturevalue("s3")

    def leave_in_bucket(key: str) -> None:
        upload = s3._begin(key)
        client_of(s3).upload_part(
            Bucket=BUCKET, Key=s3._full(key), UploadId=upload, PartNumber=1, Body=b"half"
        )

    return Backend(s3, leave_in_bucket)


@pytest.fixture
def store(backend: Backend) -> BlobStore:
    return backend.store
