"""Blobs in a bucket of S3, or of anything that speaks it. The only home of boto3.

What the store must confirm is its own CRC32C of the whole object: for one part by
the PUT itself, for more by parts that carry their CRC and a completion that
carries the combined one. A store that answers without a checksum is read back.

``If-None-Match`` is a second belt: stores differ in how well they honour it, so
keys are unique by construction and only the commit in etcd decides.

boto3 is imported with the first call, so that an idle coordinator does not carry it.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable
from dtrain.runtime import retry
from dtrain.storage.blobs import digest, outcomes, s3_errors
from dtrain.storage.blobs.port import PART_BYTES, BlobInfo, check_key, check_prefix

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MAX_PARTS = 10_000
"""S3's limit; at PART_BYTES each a blob ends at 156 GiB, far above what one lane writes."""

_TOKEN_MARK = "?uploadId="  # noqa: S105 - a separator, not a secret


class S3Blobs:
    """Implements ``BlobStore`` in ``bucket`` under ``prefix``.

    Args:
        endpoint: URL of a store other than AWS; its buckets are addressed by path.
        region: default: what boto3 is configured with, else ``us-east-1``.
        credentials: access key and secret; default: boto3's usual chain.
        lanes: parts of one blob on their way at once; each holds PART_BYTES.
        timeout_s: for an answer, once connected.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        credentials: tuple[str, str] | None = None,
        lanes: int = 4,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 60.0,
    ) -> None:
        self._bucket = bucket
        self._prefix = check_key(prefix) + "/" if prefix else ""
        self._endpoint = endpoint
        self._region = region
        self._credentials = credentials
        self._lanes = lanes
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._full_object = True
        self._lock = threading.Lock()
        self._clients: dict[int, S3Client] = {}

    @property
    def uri(self) -> str:
        query = {k: v for k, v in (("endpoint", self._endpoint), ("region", self._region)) if v}
        path = f"s3://{self._bucket}/{quote(self._prefix.removesuffix('/'))}"
        return path + ("?" + urlencode(query, safe=":/") if query else "")

    def put(self, key: str, parts: Sequence[bytes | memoryview], *, chunk_crcs: Sequence[int]) -> BlobInfo:
        check_key(key)
        chunks = outcomes.views(parts, chunk_crcs)
        if len(chunks) > MAX_PARTS:
            raise ValueError(f"{key} has {len(chunks)} parts, S3 takes {MAX_PARTS}")
        size = sum(len(chunk) for chunk in chunks)
        info = BlobInfo(key, size, digest.to_hex(digest.full_crc(chunk_crcs, size, PART_BYTES)))
        try:
            confirmed = (
                self._put_parts(info, chunks, chunk_crcs)
                if len(chunks) > 1
                else self._put_whole(info, bytes(chunks[0]) if chunks else b"")
            )
        except s3_errors.Corrupted:
            raise self._corrupt(key, chunks, chunk_crcs) from None
        except s3_errors.Taken:
            if not self._holds(info, chunk_crcs):
                raise outcomes.exists(key, self.uri) from None
        else:
            if confirmed != info.crc32c and not self._holds(info, chunk_crcs):
                raise self._corrupt(key, chunks, chunk_crcs)
        return info

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        outcomes.check_range(offset, length)
        last = "" if length is None else str(offset + length - 1)
        full = self._full(key)
        ranged: dict[str, Any] = {"Range": f"bytes={offset}-{last}"} if offset or length is not None else {}
        if length == 0:
            return self._get_nothing(key, offset, length)
        try:
            with self._translated(f"read {key}", key=key):
                answer = self._client().get_object(Bucket=self._bucket, Key=full, **ranged)
                partial = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
                data = answer["Body"].read() if partial or not ranged else b""
                answer["Body"].close()
        except s3_errors.PastEnd:
            return self._get_nothing(key, offset, length)
        if ranged and not partial:
            raise Refused(
                ErrorCode.STORE_REFUSED,
                f"{self.uri} ignores byte ranges, so that checkpoints cannot be read from it",
                fix="use a store that serves HTTP range requests",
            )
        if length is not None and len(data) != length:
            raise outcomes.short(key, offset=offset, wanted=length, found=len(data))
        return data

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        view = outcomes.target(buffer)
        view[:] = self.get(key, offset=offset, length=len(view))

    def head(self, key: str) -> BlobInfo:
        full = self._full(key)
        with self._translated(f"look at {key}", key=key):
            answer = self._client().head_object(Bucket=self._bucket, Key=full, ChecksumMode="ENABLED")
        return BlobInfo(key, answer["ContentLength"], _confirmed(answer) or "")

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        page = self._page(prefix)
        found: dict[str, int] = {}
        while True:
            with self._translated(f"list {prefix or 'the store'}"):
                answer = self._client().list_objects_v2(**page)
            found.update((item["Key"], item["Size"]) for item in answer.get("Contents", []))
            if not answer.get("IsTruncated"):
                break
            page["ContinuationToken"] = answer["NextContinuationToken"]
        # Not every store lists in the order of keys: SeaweedFS goes folder by folder, AWS's directory
        # buckets in no order at all.
        for key in sorted(found):
            yield BlobInfo(key.removeprefix(self._prefix), found[key])

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        page = self._page(prefix)
        while True:
            with self._translated(f"list uploads of {prefix or 'the store'}"):
                answer = self._client().list_multipart_uploads(**page)
            for item in answer.get("Uploads", []):
                yield item["Key"].removeprefix(self._prefix) + _TOKEN_MARK + item["UploadId"]
            # SeaweedFS marks its pages by upload alone, and a key marker would make it skip some.
            markers = {
                ours: value
                for ours, value in (
                    ("KeyMarker", answer.get("NextKeyMarker")),
                    ("UploadIdMarker", answer.get("NextUploadIdMarker")),
                )
                if value
            }
            # Without a new marker the same page would come for ever; the next pass finds the rest.
            if not answer.get("IsTruncated") or page == page | markers:
                return
            page |= markers

    def discard_unfinished(self, token: str) -> None:
        key, mark, upload_id = token.rpartition(_TOKEN_MARK)
        if not mark or not upload_id:
            raise ValueError(f"bad upload token {token!r}")
        self._abort(check_key(key), upload_id)

    def delete(self, key: str) -> None:
        full = self._full(key)
        try:
            with self._translated(f"delete {key}", writing=True, key=key):
                self._client().delete_object(Bucket=self._bucket, Key=full)
        except NotFound:
            return

    def close(self) -> None:
        with self._lock:
            client = self._clients.pop(os.getpid(), None)
        if client is not None:
            client.close()

    def _put_whole(self, info: BlobInfo, data: bytes) -> str | None:
        with self._translated(f"write {info.key}", writing=True, key=info.key):
            answer = self._client().put_object(
                Bucket=self._bucket,
                Key=self._full(info.key),
                Body=data,
                ChecksumCRC32C=digest.to_base64(digest.from_hex(info.crc32c)),
                IfNoneMatch="*",
            )
        return _confirmed(answer)

    def _put_parts(
        self, info: BlobInfo, chunks: Sequence[memoryview], chunk_crcs: Sequence[int]
    ) -> str | None:
        # One look spares a repeated put its upload, and protects the key where a store ignores
        # If-None-Match on completion.
        try:
            self.head(info.key)
        except NotFound:
            pass
        else:
            raise s3_errors.Taken(ErrorCode.BLOB_EXISTS, f"{info.key} exists")
        upload_id = self._begin(info.key)
        try:
            done = self._send_parts(info.key, upload_id, chunks, chunk_crcs)
        except BaseException:
            self._abort_quietly(info.key, upload_id)
            raise
        try:
            return self._complete(info, upload_id, done)
        except OutcomeUnknown:
            # Left alone: it may complete yet. The collector discards what did not.
            raise
        except NotFound as error:
            raise outcomes.abandoned(info.key) from error
        except BaseException:
            self._abort_quietly(info.key, upload_id)
            raise

    def _begin(self, key: str) -> str:
        wish: dict[str, Any] = {"ChecksumType": "FULL_OBJECT"} if self._full_object else {}
        try:
            with self._translated(f"begin the upload of {key}", key=key):
                answer = self._client().create_multipart_upload(
                    Bucket=self._bucket, Key=self._full(key), ChecksumAlgorithm="CRC32C", **wish
                )
        except s3_errors.Unsupported:
            if not self._full_object:
                raise
            self._full_object = False
            return self._begin(key)
        return answer["UploadId"]

    def _send_parts(
        self, key: str, upload_id: str, chunks: Sequence[memoryview], chunk_crcs: Sequence[int]
    ) -> "Sequence[CompletedPartTypeDef]":
        def send(index: int) -> "CompletedPartTypeDef":
            checksum = digest.to_base64(chunk_crcs[index])

            def once() -> str:
                # Sending a part again is harmless, so a lost answer counts as not sent.
                with self._translated(f"upload part {index + 1} of {key}", key=key):
                    return self._client().upload_part(
                        Bucket=self._bucket,
                        Key=self._full(key),
                        UploadId=upload_id,
                        PartNumber=index + 1,
                        Body=bytes(chunks[index]),
                        ChecksumCRC32C=checksum,
                    )["ETag"]

            try:
                etag = retry.call(once, attempts=4, wait_s_max=1.0, deadline_s=self._timeout_s)
            except NotFound as error:
                raise outcomes.abandoned(key) from error
            return {"PartNumber": index + 1, "ETag": etag, "ChecksumCRC32C": checksum}

        with ThreadPoolExecutor(self._lanes, thread_name_prefix="blob-lane") as pool:
            futures = [pool.submit(send, index) for index in range(len(chunks))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _complete(self, info: BlobInfo, upload_id: str, done: "Sequence[CompletedPartTypeDef]") -> str | None:
        whole: dict[str, Any] = {}
        if self._full_object:
            checksum = digest.to_base64(digest.from_hex(info.crc32c))
            whole = {"ChecksumType": "FULL_OBJECT", "ChecksumCRC32C": checksum}
        with self._translated(f"complete the upload of {info.key}", writing=True, key=info.key):
            answer = self._client().complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._full(info.key),
                UploadId=upload_id,
                MultipartUpload={"Parts": done},
                IfNoneMatch="*",
                **whole,
            )
        return _confirmed(answer)

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            with self._translated(f"discard the upload of {key}", writing=True, key=key):
                self._client().abort_multipart_upload(
                    Bucket=self._bucket, Key=self._full(key), UploadId=upload_id
                )
        except NotFound:
            return

    def _abort_quietly(self, key: str, upload_id: str) -> None:
        try:
            self._abort(key, upload_id)
        except DtrainError:
            # The error on its way up says more; the collector finds the upload.
            return

    def _holds(self, info: BlobInfo, chunk_crcs: Sequence[int]) -> bool:
        """Return whether the key holds exactly this blob, by the store's checksum or by reading it."""
        try:
            held = self.head(info.key)
        except NotFound as error:
            raise Unavailable(
                ErrorCode.STORE_UNAVAILABLE, f"{info.key} vanished while it was written, try again"
            ) from error
        if held.size_bytes != info.size_bytes:
            return False
        if held.crc32c:
            return held.crc32c == info.crc32c
        for index, crc in enumerate(chunk_crcs):
            offset = index * PART_BYTES
            chunk = self.get(info.key, offset=offset, length=min(PART_BYTES, info.size_bytes - offset))
            if digest.crc32c(chunk) != crc:
                return False
        return True

    def _corrupt(self, key: str, chunks: Sequence[memoryview], chunk_crcs: Sequence[int]) -> Refused:
        """Return the refusal of a blob that the store found damaged, naming the chunk if it was ours."""
        for index, (chunk, crc) in enumerate(zip(chunks, chunk_crcs, strict=True)):
            if digest.crc32c(chunk) != crc:
                return outcomes.chunk_corrupt(key, index, crc)
        return Refused(
            ErrorCode.BLOB_CORRUPT,
            f"{self.uri} holds or received other bytes for {key} than were sent",
            fix="the bytes changed on their way: if it happens again, look at the network and its proxies",
        )

    def _get_nothing(self, key: str, offset: int, length: int | None) -> bytes:
        # A range without bytes cannot be said in HTTP: whether it lies inside the blob, HEAD knows.
        size = self.head(key).size_bytes
        if offset + (length or 0) > size:
            raise outcomes.short(key, offset=offset, wanted=length, found=max(0, size - offset))
        return b""

    def _page(self, prefix: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix)}

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _translated(self, doing: str, *, writing: bool = False, key: str = "") -> s3_errors.Translated:
        return s3_errors.Translated(self.uri, self._bucket, doing, writing=writing, key=key)

    def _client(self) -> "S3Client":
        # Connections and their locks do not survive a fork: each process makes its own.
        with self._lock:
            client = self._clients.get(os.getpid())
            if client is None:
                client = self._clients[os.getpid()] = self._connect()
            return client

    def _connect(self) -> "S3Client":
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise Refused(
                ErrorCode.STORE_REFUSED,
                f"{self.uri} needs boto3, which is not installed here",
                fix="pip install 'dtrain[s3]'",
            ) from error
        session = boto3.Session()
        key, secret = self._credentials or (None, None)
        loopback = self._endpoint and urlsplit(self._endpoint).hostname in ("127.0.0.1", "::1", "localhost")
        config = Config(
            # Our own CRCs are sent: a second one in a trailer costs CPU and breaks some servers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=self._connect_timeout_s,
            read_timeout=self._timeout_s,
            max_pool_connections=4 * self._lanes,
            tcp_keepalive=True,
            # A proxy cannot reach this machine's loopback.
            proxies={} if loopback else None,
            s3={
                "addressing_style": "path" if self._endpoint else "auto",
                # The CRC header is signed; hashing the body again with SHA-256 costs more than sending it.
                "payload_signing_enabled": False,
            },
        )
        make: Callable[..., S3Client] = session.client
        try:
            with self._translated("connect"):
                return make(
                    "s3",
                    endpoint_url=self._endpoint,
                    region_name=self._region or session.region_name or "us-east-1",
                    aws_access_key_id=key,
                    aws_secret_access_key=secret,
                    config=config,
                )
        except ValueError as error:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"{self.uri} cannot be used: {error}",
                fix="correct the endpoint in the store's URI",
            ) from error


def _confirmed(answer: Any) -> str | None:
    """Return the store's CRC32C of the whole object in hex, if the answer has one."""
    value: str = answer.get("ChecksumCRC32C") or ""
    if not value or "-" in value or answer.get("ChecksumType") == "COMPOSITE":
        return None
    try:
        return digest.to_hex(digest.from_base64(value))
    except ValueError:
        return None
