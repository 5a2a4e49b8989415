"""Digest of every tensor in a job's newest checkpoint: two runs are bit-identical if these are equal."""

import hashlib
import zlib

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Latest, Manifest
from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.protocol.ids import ClusterName, JobName
from dtrain.protocol.job import JobStatus
from dtrain.protocol.keys import Keys
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.open import open_store
from dtrain.storage.etcd.port import Etcd, Get, Txn, flatten

_MANIFEST_BYTES_MAX = 256 * 1024 * 1024


def newest_commit(etcd: Etcd, cluster: ClusterName, job: JobName) -> tuple[CommitRecord, str]:
    """Return the newest commit record and the URI of the store it is in.

    Raises:
        NotFound: the job does not exist or has no checkpoint.
    """
    keys = Keys(cluster)
    pair = Txn(success=(Get(keys.status(job)), Get(keys.latest(job))))
    found = flatten(etcd.txn(pair).responses)
    if keys.status(job) not in found or keys.latest(job) not in found:
        raise NotFound(ErrorCode.NOT_FOUND, f"job {job} has no checkpoint")
    status = codec.decode(JobStatus, found[keys.status(job)].value)
    latest = codec.decode(Latest, found[keys.latest(job)].value)
    record = etcd.range(keys.checkpoint(job, latest.seq)).items[0]
    return codec.decode(CommitRecord, record.value), status.store


def digests(etcd: Etcd, cluster: ClusterName, job: JobName, *, prefixes: tuple[str, ...]) -> dict[str, str]:
    """Return the SHA-256 of each tensor whose name starts with one of ``prefixes``.

    Every byte is verified on the way: manifest against the commit record, blobs
    against the manifest.

    Raises:
        Refused: BLOB_CORRUPT.
    """
    commit, store_uri = newest_commit(etcd, cluster, job)
    store = open_store(store_uri)
    try:
        packed = store.get(commit.manifest)
        if hashlib.sha256(packed).hexdigest() != commit.digest:
            raise Refused(ErrorCode.BLOB_CORRUPT, f"the manifest {commit.manifest} is not what was committed")
        unpacked = zlib.decompressobj(wbits=31).decompress(packed, _MANIFEST_BYTES_MAX)
        manifest = codec.decode(Manifest, unpacked, bytes_max=_MANIFEST_BYTES_MAX)
        blobs = []
        for entry in manifest.blobs:
            data = store.get(entry.key)
            if digest.to_hex(digest.crc32c(data)) != entry.crc:
                raise Refused(ErrorCode.BLOB_CORRUPT, f"the blob {entry.key} does not match its digest")
            blobs.append(data)
    finally:
        store.close()
    found = {}
    for name, tensor in sorted(manifest.tensors.items()):
        if name.startswith(prefixes):
            whole = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
            for chunk in sorted(tensor.chunks, key=lambda part: part.o):
                whole.update(blobs[chunk.b][chunk.off : chunk.off + chunk.len])
            found[name] = whole.hexdigest()
    return found
