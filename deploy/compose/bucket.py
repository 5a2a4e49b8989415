"""Make the bucket, and return once the store has taken a write: bucket.py ENDPOINT NAME."""

import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

WAIT_S = 120.0


def main(endpoint: str, bucket: str) -> int:
    """Try until it works or ``WAIT_S`` is over; making it again does no harm."""
    quick = Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 1, "mode": "standard"})
    store = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=quick)
    end = time.monotonic() + WAIT_S
    while True:
        try:
            try:
                store.create_bucket(Bucket=bucket)
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
            # The API answers before the store can keep anything.
            store.put_object(Bucket=bucket, Key="ready", Body=b"")
            store.delete_object(Bucket=bucket, Key="ready")
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > end:
                sys.stderr.write(f"the store at {endpoint} is not ready: {error}\n")
                return 1
            time.sleep(1)
        else:
            return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
