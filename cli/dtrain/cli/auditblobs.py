"""Whether committed checkpoints are what their records say: the part of I4 that lies in the store."""

import gzip
import hashlib
import io
from collections.abc import Iterator

from dtrain.cli.localstore import open_here
from dtrain.protocol import codec
from dtrain.protocol.audit import Violation
from dtrain.protocol.checkpoint import BlobEntry, CommitRecord, Latest, Manifest
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.job import JobStatus
from dtrain.protocol.keys import Keys, Parsed
from dtrain.runtime import retry
from dtrain.storage.blobs.digest import crc32c, to_hex
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.etcd.port import Etcd, prefix_end

MANIFEST_BYTES_UNPACKED_MAX = 256 * 1024 * 1024


class BlobAudit:
    """Reads every byte of ``latest``, and with ``everything`` of each retained checkpoint.

    ``checkpoints`` and ``bytes`` count what was read.
    """

    def __init__(self, etcd: Etcd, cluster: ClusterName, *, everything: bool) -> None:
        self._etcd = etcd
        self._keys = Keys(cluster)
        self._everything = everything
        self.checkpoints = 0
        self.bytes = 0

    def check(self) -> Iterator[Violation]:
        """Yield what is damaged without being in ``bad/``.

        Raises:
            Unavailable: etcd or a store does not answer.
            Refused: a store cannot be opened from here.
        """
        for place, commit in self._wanted():
            status = self._read(self._keys.status(place.job), JobStatus)
            if status is None or not status.store:
                continue
            store = open_here(status.store)
            try:
                problem = self._problem(store, commit)
            finally:
                store.close()
            self.checkpoints += 1
            # Read again, after the blobs: it may have been retired, or found bad, meanwhile.
            gone = not self._etcd.range(self._keys.checkpoint(place.job, place.seq)).items
            known = self._etcd.range(self._keys.bad(place.job, place.seq)).items
            if problem and not gone and not known:
                yield Violation(0, "I4", f"checkpoint {place.seq} of {place.job}: {problem}")

    def _wanted(self) -> Iterator[tuple[Parsed, CommitRecord]]:
        prefix = self._keys.jobs
        newest: dict[str, int] = {}
        commits: list[tuple[Parsed, CommitRecord]] = []
        for kv in self._etcd.range(prefix, prefix_end(prefix), deadline_s=30.0).items:
            place = self._keys.parse(kv.key)
            if place is not None and place.kind == "latest":
                newest[place.job] = codec.decode(Latest, kv.value).seq
            elif place is not None and place.kind == "checkpoint":
                commits.append((place, codec.decode(CommitRecord, kv.value)))
        for place, commit in commits:
            if self._everything or newest.get(place.job) == place.seq:
                yield place, commit

    def _read(self, key: str, kind: type[JobStatus]) -> JobStatus | None:
        found = self._etcd.range(key).items
        return codec.decode(kind, found[0].value) if found else None

    def _problem(self, store: BlobStore, commit: CommitRecord) -> str:
        try:
            packed = self._get(store, commit.manifest, 0, None)
            if hashlib.sha256(packed).hexdigest() != commit.digest or len(packed) != commit.manifest_bytes:
                return f"{commit.manifest} is not the manifest of the record"
            manifest = codec.decode(Manifest, _unpack(packed), bytes_max=MANIFEST_BYTES_UNPACKED_MAX)
            for blob in manifest.blobs:
                problem = self._blob_problem(store, blob, manifest.chunk_bytes)
                if problem:
                    return problem
        except Refused as error:  # NotFound too
            return error.message
        return ""

    def _blob_problem(self, store: BlobStore, blob: BlobEntry, chunk_bytes: int) -> str:
        for index, expected in enumerate(blob.chunks):
            offset = index * chunk_bytes
            length = min(chunk_bytes, blob.bytes - offset)
            data = self._get(store, blob.key, offset, length)
            if len(data) != length or to_hex(crc32c(data)) != expected:
                return f"chunk {index} of {blob.key} is not what was written"
        return ""

    def _get(self, store: BlobStore, key: str, offset: int, length: int | None) -> bytes:
        data = retry.call(
            lambda: store.get(key, offset=offset, length=length), attempts=3, deadline_s=60.0, idempotent=True
        )
        self.bytes += len(data)
        return data


def _unpack(packed: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            found = file.read(MANIFEST_BYTES_UNPACKED_MAX + 1)
    except (OSError, EOFError) as error:
        raise _unreadable(str(error)) from error
    if len(found) > MANIFEST_BYTES_UNPACKED_MAX:
        raise _unreadable("it unpacks to more than its limit")
    return found


def _unreadable(why: str) -> Refused:
    return Refused(ErrorCode.BAD_RECORD, f"a manifest cannot be read: {why}")
