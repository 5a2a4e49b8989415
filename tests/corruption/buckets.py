"""A bucket of a real S3 server as a ``Shelf``: its bytes are damaged by a client that is not ours."""

import secrets
from typing import Any

from dtrain.local.weed import BUCKET, WeedServer
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.blobs.s3 import S3Blobs
from dtrain.storage.blobs.s3_settings import S3Settings


class Bucket:
    """``S3Blobs`` under a prefix of its own, and a plain boto3 client beside it."""

    def __init__(self, server: WeedServer) -> None:
        import boto3
        from botocore.config import Config

        key, secret = server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]
        self._prefix = f"campaign-{secrets.token_hex(4)}"
        self.store: BlobStore = S3Blobs(
            BUCKET,
            self._prefix,
            S3Settings(endpoint=server.endpoint, region="us-east-1", timeout_s=20.0),
            credentials=(key, secret),
        )
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(s3={"addressing_style": "path"}),
        )

    def read(self, key: str) -> bytes:
        answer = self._client.get_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}")
        data: bytes = answer["Body"].read()
        return data

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}", Body=data)

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}")
