"""One client in a process of its own: ``python -m benchmarks.store.clients NAME ENDPOINT MIB TIMES``.

Prints CPU seconds (user and system, of all its threads) per gigabyte (10^9 bytes).
A first, small upload is not counted: imports, credentials, the first connection.
"""

import io
import json
import mmap
import os
import random
import resource
import struct
import sys
import time
from collections.abc import Callable

BUCKET = "bench"
WARM_BYTES = 17 * 1024 * 1024
Send = Callable[[int], None]
"""Uploads the first so many bytes."""


def ours(endpoint: str, memory: mmap.mmap, fd: int) -> Send:
    """The agent's uploader, from a sealed snapshot to the rank's manifest."""
    from dtrain.agent.transfer_upload import Uploader
    from dtrain.agent.transferring import Upload
    from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
    from dtrain.protocol.ranklink import Sealed
    from dtrain.storage.blobs.open import open_store

    store = open_store(f"s3://{BUCKET}/x?endpoint={endpoint}&region=us-east-1")
    uploader = Uploader(lambda _uri: store, lambda _report: None)

    def send(size: int) -> None:
        entry = {"dtype": "U8", "shape": [size - 64], "chunks": [
            {"o": [0], "s": [size - 64], "b": 0, "off": 64, "len": size - 64}]}  # fmt: skip
        index = json.dumps({"layout": "h", "objects": {}, "tensors": {"x": entry}}).encode()
        memory[:8] = struct.pack("<Q", 56)
        memory[-4096 : len(index) - 4096] = index
        at = len(memory) - 4096
        sealed = Sealed(Seq(1), "n1", Step(1), f"/proc/{os.getpid()}/fd/{fd}", 0, size, at, len(index))
        uploader.run(
            Upload(
                ClusterName("c1"),
                JobName("j1"),
                Uid("u1"),
                store.uri,
                Attempt(1),
                Rank(0),
                1,
                Step(1),
                sealed,
            )
        )

    return send


def boto3_default(endpoint: str, memory: mmap.mmap, _fd: int) -> Send:
    """``upload_fileobj`` as it comes."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")

    def send(size: int) -> None:
        client.upload_fileobj(io.BytesIO(memoryview(memory)[:size]), BUCKET, "key")

    return send


def s3torchconnector(endpoint: str, memory: mmap.mmap, _fd: int) -> Send:
    """Its writer, in pieces of 16 MiB."""
    from s3torchconnector._s3client import S3Client, S3ClientConfig

    config = S3ClientConfig(force_path_style=True)
    client = S3Client("us-east-1", endpoint=endpoint, s3client_config=config)

    def send(size: int) -> None:
        view = memoryview(memory)
        writer = client.put_object(BUCKET, "key")
        for start in range(0, size, 16 * 1024 * 1024):
            writer.write(bytes(view[start : min(size, start + 16 * 1024 * 1024)]))
        writer.close()

    return send


CLIENTS = {"ours": ours, "boto3": boto3_default, "s3torchconnector": s3torchconnector}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    name, endpoint, mib, times = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    size = mib * 1024 * 1024
    fd = os.memfd_create("bench")
    os.ftruncate(fd, size + 4096)
    memory = mmap.mmap(fd, size + 4096)
    block = random.Random(1).randbytes(1024 * 1024)
    for index in range(mib):
        memory[index * len(block) : (index + 1) * len(block)] = block
    send = CLIENTS[name](endpoint, memory, fd)
    send(WARM_BYTES)
    cpu_s, began = _cpu_s(), time.monotonic()
    for _ in range(times):
        send(size)
    gigabytes = size * times / 1e9
    print(
        json.dumps(
            {
                "cpu_s_per_gb": (_cpu_s() - cpu_s) / gigabytes,
                "gb_per_s": gigabytes / (time.monotonic() - began),
            }
        )
    )


if __name__ == "__main__":
    main()
