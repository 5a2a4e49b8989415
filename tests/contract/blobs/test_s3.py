"""What a bucket adds to the contract: credentials, networks and servers that fail."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.contract.blobs.conftest import client_of, put, s3_store

from dtrain.local import ports
from dtrain.local.weed import WeedServer
from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import PART_BYTES
from dtrain.storage.blobs.probe import probe
from dtrain.storage.blobs.s3 import S3Blobs


class Cutter:
    """A proxy that passes requests on and cuts the line instead of answering."""

    def __init__(self, endpoint: str) -> None:
        self._target = int(endpoint.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                while answer := server.recv(65536):
                    if not answer.startswith(b"HTTP/1.1 100"):
                        break
                    client.sendall(answer)
                client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _forward(client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                server.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def cutter(weed: WeedServer) -> Iterator[Cutter]:
    proxy = Cutter(weed.endpoint)
    yield proxy
    proxy.close()


def test_a_lost_answer_to_a_write_is_an_unknown_outcome(
    weed: WeedServer, s3: S3Blobs, cutter: Cutter
) -> None:
    cut = s3_store(weed, prefix=s3._prefix[:-1], endpoint=cutter.endpoint)
    with pytest.raises(OutcomeUnknown) as error:
        put(cut, "a", b"x")
    assert error.value.code == ErrorCode.STORE_UNAVAILABLE
    assert s3.get("a") == b"x"
    put(s3, "a", b"x")


def test_a_lost_answer_to_a_read_may_be_asked_again(weed: WeedServer, s3: S3Blobs, cutter: Cutter) -> None:
    cut = s3_store(weed, prefix=s3._prefix[:-1], endpoint=cutter.endpoint)
    for call in (lambda: cut.get("a"), lambda: cut.head("a"), lambda: list(cut.list(""))):
        with pytest.raises(Unavailable):
            call()


@pytest.mark.parametrize("credentials", [("unknown-key", "secret"), (None, "wrong-secret")])
def test_wrong_credentials_are_refused_with_a_fix(
    weed: WeedServer, credentials: tuple[str | None, str]
) -> None:
    key, secret = credentials
    store = s3_store(weed, credentials=(key or weed.env["AWS_ACCESS_KEY_ID"], secret))
    for call in (
        lambda: put(store, "a", b"x"),
        lambda: store.get("a"),
        lambda: store.head("a"),
        lambda: list(store.list("")),
        lambda: probe(store),
    ):
        with pytest.raises(Refused) as refusal:
            call()
        assert refusal.value.code in (ErrorCode.STORE_CREDENTIALS, ErrorCode.STORE_DENIED)
        assert "AWS_ACCESS_KEY_ID" in refusal.value.fix
        assert secret not in refusal.value.message


def test_no_credentials_at_all_are_refused_with_a_fix(
    weed: WeedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(Refused, match="no usable credentials") as refusal:
        probe(open_store(weed.store_uri("x")))
    assert "AWS_ACCESS_KEY_ID" in refusal.value.fix


def test_a_missing_bucket_is_refused_with_a_fix(weed: WeedServer) -> None:
    store = s3_store(weed, bucket="no-such-bucket")
    with pytest.raises(Refused, match="bucket no-such-bucket does not exist") as refusal:
        probe(store)
    assert refusal.value.code == ErrorCode.STORE_NO_BUCKET
    assert "create the bucket" in refusal.value.fix


def test_a_server_that_is_gone_is_unavailable_even_for_writes(weed: WeedServer, big: bytes) -> None:
    (port,) = ports.reserve(1)
    store = s3_store(weed, endpoint=f"http://127.0.0.1:{port}")
    for call in (
        lambda: put(store, "a", b"x"),
        lambda: put(store, "a", big),
        lambda: store.get("a"),
        lambda: store.delete("a"),
        lambda: probe(store),
    ):
        with pytest.raises(Unavailable, match="the connection failed") as error:
            call()
        assert error.value.code == ErrorCode.STORE_UNAVAILABLE
        assert "store runs" in error.value.fix
    ports.release([port])


def test_listings_go_on_over_many_pages(s3: S3Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"n/{n:02d}" for n in range(7)]
    for key in keys:
        put(s3, key, b"x")
    page = s3._page
    monkeypatch.setattr(s3, "_page", lambda prefix: page(prefix) | {"MaxKeys": 3})
    assert [info.key for info in s3.list("n/")] == keys
    uploads = [s3._begin(key) for key in keys]
    monkeypatch.setattr(s3, "_page", lambda prefix: page(prefix) | {"MaxUploads": 3})
    tokens = list(s3.list_unfinished("n/"))
    assert sorted(tokens) == sorted(f"{k}?uploadId={u}" for k, u in zip(keys, uploads, strict=True))


def test_a_part_whose_answer_was_lost_is_sent_again(
    s3: S3Blobs, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(s3)
    real, failed = client.upload_part, set()

    def flaky(**request: Any) -> object:
        number = request["PartNumber"]
        if number not in failed:
            failed.add(number)
            raise ClientError(
                {"Error": {"Code": "InternalError"}, "ResponseMetadata": {"HTTPStatusCode": 500}},  # type: ignore[typeddict-item]
                "UploadPart",
            )
        return real(**request)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "upload_part", flaky)
    put(s3, "big", big)
    assert failed == {1, 2, 3}
    assert s3.head("big").crc32c == digest.to_hex(digest.crc32c(big))


def test_a_failed_upload_is_aborted(s3: S3Blobs, big: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> object:
        raise ClientError(
            {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}},  # type: ignore[typeddict-item]
            "UploadPart",
        )

    monkeypatch.setattr(client_of(s3), "upload_part", full)
    with pytest.raises(Refused, match="AccessDenied") as refusal:
        put(s3, "big", big)
    assert refusal.value.code == ErrorCode.STORE_DENIED
    assert "allow s3:PutObject" in refusal.value.fix
    assert list(s3.list_unfinished("")) == []


def test_a_writer_whose_upload_is_discarded_is_told(
    s3: S3Blobs, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = s3._complete

    def discard_first(*args: object) -> object:
        for token in s3.list_unfinished(""):
            s3.discard_unfinished(token)
        return complete(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(s3, "_complete", discard_first)
    with pytest.raises(Refused, match="discarded while it ran"):
        put(s3, "big", big)
    assert list(s3.list("")) == []


def test_a_store_without_full_object_checksums_is_read_back(
    s3: S3Blobs, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(s3)
    create, get, read = client.create_multipart_upload, client.get_object, []

    def older(**request: object) -> object:
        if "ChecksumType" in request:
            raise ClientError(
                {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}},  # type: ignore[typeddict-item]
                "CreateMultipartUpload",
            )
        return create(**request)  # type: ignore[arg-type]

    def counting(**request: object) -> object:
        read.append(request["Range"])
        return get(**request)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "create_multipart_upload", older)
    monkeypatch.setattr(client, "get_object", counting)
    put(s3, "big", big)
    assert len(read) == 3
    assert s3.get("big", offset=PART_BYTES, length=10) == big[PART_BYTES : PART_BYTES + 10]


def test_its_uri_opens_it_again_with_credentials_from_the_environment(
    weed: WeedServer, s3: S3Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    put(s3, "a", b"x")
    again = open_store(s3.uri)
    assert again.uri == s3.uri
    assert again.get("a") == b"x"
    assert weed.env["AWS_SECRET_ACCESS_KEY"] not in again.uri
    again.close()
    probe(open_store(weed.store_uri("some/prefix")))


def test_a_write_takes_no_memory_beside_its_parts(s3: S3Blobs, big: bytes) -> None:
    def anonymous_kb() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
        return int(line.split()[1])

    put(s3, "first", b"x" * PART_BYTES)  # connections, libraries
    before, most = anonymous_kb(), []
    flow = Flow(lambda _size: most.append(anonymous_kb()) or 0.0)  # type: ignore[func-returns-value]
    parts = [memoryview(big)[at : at + PART_BYTES] for at in range(0, len(big), PART_BYTES)] * 4
    parts = [part for part in parts if len(part) == PART_BYTES]
    s3.put("big", parts, chunk_crcs=digest.ChunkCrcs(parts), flow=flow)
    assert max(most) - before < PART_BYTES // 1024


def test_opening_a_bucket_does_not_load_boto3() -> None:
    script = (
        "import sys; from dtrain.storage.blobs.open import open_store; open_store('s3://bucket/x');"
        "print(sorted(m for m in ('boto3', 'botocore') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
