"""Blobs in a bucket of S3, or of anything that speaks it. The only home of boto3.

What the store must confirm is its own CRC32C of the whole object: for one part by
the PUT itself, for more by parts that carry their CRC and a completion that
carries the combined one. A store that answers without a checksum is read back.

``If-None-Match`` is a second belt: stores differ in how well they honour it, so
keys are unique by construction and only the commit in etcd decides.

boto3 is imported with the first call, so that an idle coordinator does not carry it.
Who talks to the store for this module, and with which credentials, is ``s3_client.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, partial
from mmap import mmap
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable
from dtrain.runtime import retry
from dtrain.storage.blobs import digest, outcomes, s3_errors
from dtrain.storage.blobs.flow import Flow, Stopped
from dtrain.storage.blobs.port import PART_BYTES, BlobInfo, check_key, check_prefix
from dtrain.storage.blobs.s3_client import S3Access
from dtrain.storage.blobs.s3_settings import S3Settings
from dtrain.storage.blobs.s3_wire import Body, Target

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MAX_PARTS = 10_000
"""S3's limit; at PART_BYTES each a blob ends at 156 GiB, far above what one lane writes."""

_ATTEMPTS_MAX = 1000  # the flow's patience is the bound
_PART_WAIT_S_MAX = 5.0
_TOKEN_MARK = "?uploadId="  # noqa: S105 - a separator, not a secret


class S3Blobs:
    """Implements ``BlobStore`` in ``bucket`` under ``prefix``.

    Args:
        credentials: access key and secret; default: boto3's usual chain.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        settings: S3Settings = S3Settings(),  # noqa: B008 - frozen
        *,
        credentials: tuple[str, str] | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = check_key(prefix) + "/" if prefix else ""
        self._settings = settings
        self._full_object = True
        self._access = S3Access(self.uri, bucket, settings, credentials)
        encryption = {"ServerSideEncryption": settings.sse, "SSEKMSKeyId": settings.sse_kms_key_id}
        self._encryption: dict[str, Any] = {name: value for name, value in encryption.items() if value}

    @property
    def uri(self) -> str:
        query = self._settings.query()
        path = f"s3://{self._bucket}/{quote(self._prefix.removesuffix('/'))}"
        return path + ("?" + query if query else "")

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        check_key(key)
        flow = flow or Flow()
        chunks = outcomes.views(parts, chunk_crcs)
        if len(chunks) > MAX_PARTS:
            raise ValueError(f"{key} has {len(chunks)} parts, S3 takes {MAX_PARTS}")
        size = sum(len(chunk) for chunk in chunks)

        # Asked for when the bytes have left: only then have lazy CRCs been computed, each by its lane.
        @cache
        def info() -> BlobInfo:
            return BlobInfo(key, size, digest.to_hex(digest.full_crc(chunk_crcs, size, PART_BYTES)))

        try:
            confirmed = (
                self._put_parts(key, chunks, chunk_crcs, info, flow)
                if len(chunks) > 1
                else self._put_whole(info(), chunks[0] if chunks else memoryview(b""), flow)
            )
        except s3_errors.Corrupted:
            raise self._corrupt(key, chunks, chunk_crcs) from None
        except s3_errors.Taken:
            if not self._holds(info(), chunk_crcs):
                raise outcomes.exists(key, self.uri) from None
        else:
            if confirmed != info().crc32c and not self._holds(info(), chunk_crcs):
                raise self._corrupt(key, chunks, chunk_crcs)
        return info()

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        outcomes.check_range(offset, length)
        if length is not None:
            memory = bytearray(length)
            self.get_into(key, offset, memory)
            return bytes(memory)
        full = self._full(key)
        ranged: dict[str, Any] = {"Range": f"bytes={offset}-"} if offset else {}

        def read(client: Any) -> bytes | None:
            answer = client.get_object(Bucket=self._bucket, Key=full, **ranged)
            with answer["Body"] as body:
                status = answer["ResponseMetadata"]["HTTPStatusCode"]
                return bytes(body.read()) if status == 206 or not ranged else None

        try:
            data = self._access.call(f"read {key}", read, key=key)
        except s3_errors.PastEnd:
            self._check_inside(key, offset, 0)
            return b""
        if data is None:
            raise self._no_ranges()
        return data

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        view = outcomes.target(buffer)
        outcomes.check_range(offset, len(view))
        full = self._full(key)
        if not view:
            # A range without bytes cannot be said in HTTP: whether it lies inside the blob, HEAD knows.
            self._check_inside(key, offset, 0)
            return

        def read(client: Any) -> int | None:
            target = Target(view)
            with self._access.carrying(target):
                answer = client.get_object(
                    Bucket=self._bucket, Key=full, Range=f"bytes={offset}-{offset + len(view) - 1}"
                )
            with answer["Body"] as body:
                if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                    return None
                return _read_into(body, view) if target.received is None else target.received

        try:
            received = self._access.call(f"read {key}", read, key=key)
        except s3_errors.PastEnd:
            self._check_inside(key, offset, len(view))
            return
        if received is None:
            raise self._no_ranges()
        if received < len(view):
            raise outcomes.short(key, offset=offset, wanted=len(view), found=received)

    def head(self, key: str) -> BlobInfo:
        return self._head(key, None)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        page = self._page(prefix)
        found: dict[str, int] = {}
        while True:
            answer = self._access.call(f"list {prefix or 'the store'}", partial(_list_objects, page=page))
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
            answer = self._access.call(
                f"list uploads of {prefix or 'the store'}",
                partial(_list_uploads, page=page),
            )
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
            self._access.call(
                f"delete {key}",
                lambda client: client.delete_object(Bucket=self._bucket, Key=full),
                writing=True,
                key=key,
            )
        except NotFound:
            return

    def close(self) -> None:
        self._access.close()

    def _head(self, key: str, flow: Flow | None) -> BlobInfo:
        full = self._full(key)
        answer = self._access.call(
            f"look at {key}",
            lambda client: client.head_object(Bucket=self._bucket, Key=full, ChecksumMode="ENABLED"),
            key=key,
            flow=flow,
        )
        return BlobInfo(key, answer["ContentLength"], _confirmed(answer) or "")

    def _put_whole(self, info: BlobInfo, data: memoryview, flow: Flow) -> str | None:
        def send(client: Any) -> Any:
            body = Body(data, flow)
            with self._access.carrying(body):
                return client.put_object(
                    Bucket=self._bucket,
                    Key=self._full(info.key),
                    Body=body if data else b"",
                    ChecksumCRC32C=digest.to_base64(digest.from_hex(info.crc32c)),
                    IfNoneMatch="*",
                    **self._encryption,
                )

        answer = self._access.call(f"write {info.key}", send, writing=True, key=info.key, flow=flow)
        flow.confirmed(info.size_bytes)
        return _confirmed(answer)

    def _put_parts(
        self,
        key: str,
        chunks: Sequence[memoryview],
        chunk_crcs: Sequence[int],
        info: Callable[[], BlobInfo],
        flow: Flow,
    ) -> str | None:
        # One look spares a repeated put its upload, and protects the key where a store ignores
        # If-None-Match on completion.
        try:
            self._head(key, flow)
        except NotFound:
            pass
        else:
            raise s3_errors.Taken(ErrorCode.BLOB_EXISTS, f"{key} exists")
        upload_id = self._begin(key, flow)
        try:
            done = self._send_parts(key, upload_id, chunks, chunk_crcs, flow)
            return self._complete(info(), upload_id, done, flow)
        except (OutcomeUnknown, Stopped):
            # Left alone: it may complete yet, or the caller does not wait. The collector discards it.
            raise
        except BaseException:
            self._abort_quietly(key, upload_id)
            raise

    def _begin(self, key: str, flow: Flow | None = None) -> str:
        wish: dict[str, Any] = {"ChecksumType": "FULL_OBJECT"} if self._full_object else {}
        try:
            answer = self._access.call(
                f"begin the upload of {key}",
                lambda client: client.create_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._full(key),
                    ChecksumAlgorithm="CRC32C",
                    **wish,
                    **self._encryption,
                ),
                key=key,
                flow=flow,
            )
        except s3_errors.Unsupported:
            if not self._full_object:
                raise
            self._full_object = False
            return self._begin(key, flow)
        return str(answer["UploadId"])

    def _send_parts(
        self,
        key: str,
        upload_id: str,
        chunks: Sequence[memoryview],
        chunk_crcs: Sequence[int],
        flow: Flow,
    ) -> "Sequence[CompletedPartTypeDef]":
        # The lanes end together: with the write, or with the first part that fails for good.
        lanes = flow.branch()

        def send(index: int) -> "CompletedPartTypeDef":
            # The lanes' own overlap: one hashes its chunk while others have theirs on the wire.
            checksum = digest.to_base64(chunk_crcs[index])

            def once() -> Any:
                def part(client: Any) -> Any:
                    body = Body(chunks[index], lanes)
                    with self._access.carrying(body):
                        return client.upload_part(
                            Bucket=self._bucket,
                            Key=self._full(key),
                            UploadId=upload_id,
                            PartNumber=index + 1,
                            Body=body,
                            ChecksumCRC32C=checksum,
                        )

                # Sending a part again is harmless, so a lost answer counts as not sent.
                return self._access.call(f"upload part {index + 1} of {key}", part, key=key, flow=lanes)

            try:
                answer = retry.call(
                    partial(_telling, flow, once),
                    attempts=_ATTEMPTS_MAX,
                    wait_s_max=_PART_WAIT_S_MAX,
                    deadline_s=flow.patience_s,
                    sleep=lanes.wait,
                )
            except NotFound as error:
                raise outcomes.abandoned(key) from error
            flow.confirmed(len(chunks[index]))
            return {"PartNumber": index + 1, "ETag": answer["ETag"], "ChecksumCRC32C": checksum}

        with (
            flow.breaking(lanes.stop),
            ThreadPoolExecutor(self._settings.lanes, thread_name_prefix="blob-lane") as pool,
        ):
            futures = [pool.submit(send, index) for index in range(len(chunks))]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                lanes.stop()
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]

    def _complete(
        self, info: BlobInfo, upload_id: str, done: "Sequence[CompletedPartTypeDef]", flow: Flow
    ) -> str | None:
        whole: dict[str, Any] = {}
        if self._full_object:
            checksum = digest.to_base64(digest.from_hex(info.crc32c))
            whole = {"ChecksumType": "FULL_OBJECT", "ChecksumCRC32C": checksum}

        def once() -> Any:
            return self._access.call(
                f"complete the upload of {info.key}",
                lambda client: client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._full(info.key),
                    UploadId=upload_id,
                    MultipartUpload={"Parts": done},
                    IfNoneMatch="*",
                    **whole,
                ),
                writing=True,
                key=info.key,
                flow=flow,
            )

        # Completing again is harmless: the upload is gone, or the key taken, if the first one worked. S3 may
        # also answer 200 and, in the body, that it failed: boto3 makes an error of that.
        try:
            return _confirmed(
                retry.call(
                    partial(_telling, flow, once),
                    attempts=_ATTEMPTS_MAX,
                    wait_s_max=_PART_WAIT_S_MAX,
                    deadline_s=flow.patience_s,
                    idempotent=True,
                    sleep=flow.wait,
                )
            )
        except NotFound as error:
            try:
                return self._head(info.key, flow).crc32c or None
            except NotFound:
                raise outcomes.abandoned(info.key) from error

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self._access.call(
                f"discard the upload of {key}",
                lambda client: client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._full(key), UploadId=upload_id
                ),
                writing=True,
                key=key,
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

    def _check_inside(self, key: str, offset: int, length: int) -> None:
        size = self.head(key).size_bytes
        if offset + length > size:
            raise outcomes.short(key, offset=offset, wanted=length, found=max(0, size - offset))

    def _no_ranges(self) -> Refused:
        return Refused(
            ErrorCode.STORE_REFUSED,
            f"{self.uri} ignores byte ranges, so that checkpoints cannot be read from it",
            fix="use a store that serves HTTP range requests",
        )

    def _page(self, prefix: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix)}

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)


def _telling(flow: Flow, request: Callable[[], Any]) -> Any:
    """Make a request that will be made again, and tell the flow what was in the way."""
    try:
        return request()
    except (Unavailable, OutcomeUnknown) as error:
        flow.troubled(error.message)
        raise


def _list_objects(client: Any, page: dict[str, Any]) -> Any:
    return client.list_objects_v2(**page)


def _list_uploads(client: Any, page: dict[str, Any]) -> Any:
    return client.list_multipart_uploads(**page)


def _read_into(body: Any, view: memoryview) -> int:
    received = 0
    while received < len(view) and (count := body.readinto(view[received:])):
        received += count
    return received


def _confirmed(answer: Any) -> str | None:
    """Return the store's CRC32C of the whole object in hex, if the answer has one."""
    value: str = answer.get("ChecksumCRC32C") or ""
    if not value or "-" in value or answer.get("ChecksumType") == "COMPOSITE":
        return None
    try:
        return digest.to_hex(digest.from_base64(value))
    except ValueError:
        return None
