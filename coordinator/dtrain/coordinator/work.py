"""Work that takes long: everything a leader does at the object store.

Runs in a small pool, ends in a ``WorkResult``, changes no record in etcd. Each
piece may be cut off and repeated at any point, here or by another leader.
"""

import gzip
import hashlib
import io
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, assert_never

from dtrain.coordinator.core.decisions import (
    CollectGarbage,
    InspectCheckpoint,
    ProbeStore,
    SweepOrphans,
    VerifyCheckpoint,
    Work,
)
from dtrain.coordinator.core.forms import RankText, judge
from dtrain.coordinator.core.views import Damage, Verdict
from dtrain.coordinator.packages import PackageCollector
from dtrain.coordinator.remembered import Forms
from dtrain.coordinator.results import (
    Collected,
    Inspected,
    Probed,
    Swept,
    Verified,
    WorkCrashed,
    WorkResult,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    MANIFEST_BYTES_MAX,
    CommitRecord,
    Garbage,
    Latest,
    Manifest,
    OpenRecord,
    RankManifest,
    blob_prefix,
    job_root,
    manifest_key,
    owners_prefix,
)
from dtrain.protocol.errors import (
    Conflict,
    DtrainError,
    ErrorCode,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from dtrain.protocol.ids import ClusterName, JobName, Seq, Uid
from dtrain.protocol.job import JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime import retry
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import BlobStore, check_key
from dtrain.storage.blobs.probe import probe
from dtrain.storage.checkpoints import reading, verifying
from dtrain.storage.etcd.port import Etcd, Get, KeyValue, Txn, prefix_end

T = TypeVar("T")


class Merge(Protocol):
    """``core.manifest.merge``: rank manifests to the manifest, or ``Refused``."""

    def __call__(
        self,
        *,
        cluster: ClusterName,
        job: JobName,
        uid: Uid,
        record: OpenRecord,
        parts: Sequence[RankManifest],
        parent: Seq | None,
        created: str,
    ) -> Manifest: ...


MANIFEST_BYTES_UNPACKED_MAX = 128 * 1024 * 1024
"""A manifest that unpacks to more than this is damage, or an attack."""

_BLOB = re.compile(r"blobs/(\d{20})/(\d{6})-([0-9a-f]+)/")
_MANIFEST = re.compile(r"manifests/(\d{20})-(\d{6})-([0-9a-f]+)-[0-9a-f]+\.json\.gz")
_RANK_BLOB = re.compile(r"(/\d{5})-\d{2}-([0-9a-f]+)\.st$")
_RANK_FILE = re.compile(r"/\d{5}(-\d{2})?-[0-9a-f]+\.(st|json\.gz)$")
_Triple = tuple[int, int, str]


class Stores:
    """Store clients by URI, made when first used: an idle replica loads no S3 library."""

    def __init__(self, opener: Callable[[str], BlobStore] = open_store) -> None:
        self._open = opener
        self._lock = threading.Lock()
        self._stores: dict[str, BlobStore] = {}

    def get(self, uri: str) -> BlobStore:
        """Return the client for ``uri``, always the same one."""
        with self._lock:
            if uri not in self._stores:
                self._stores[uri] = self._open(uri)
            return self._stores[uri]

    def close(self) -> None:
        """Close all clients."""
        with self._lock:
            stores, self._stores = self._stores, {}
        for store in stores.values():
            store.close()


class Worker:
    """Does work. Safe for several threads; every call ends in a result, never in an exception."""

    def __init__(
        self,
        etcd: Etcd,
        stores: Stores,
        merge: Merge,
        clock: Clock,
        *,
        scrub_bytes_per_s: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Remember how to reach things.

        ``scrub_bytes_per_s`` bounds the reading of whole checkpoints again (0: no
        bound); ``stopped`` is asked between chunks whether the process is about to end.
        """
        self._etcd = etcd
        self._stores = stores
        self._merge = merge
        self._clock = clock
        self._forms = Forms()
        self._scrub_bytes_per_s = scrub_bytes_per_s
        self._stopped = stopped
        self._packages = PackageCollector(etcd, clock)

    def run(self, work: Work) -> WorkResult:
        """Do one piece of work."""
        try:
            match work:
                case VerifyCheckpoint():
                    return Verified(work, self._verify(work))
                case CollectGarbage():
                    return self._collect(work)
                case SweepOrphans():
                    return self._sweep(work)
                case ProbeStore():
                    return self._probe(work)
                case InspectCheckpoint():
                    return self._inspect(work)
                case _:
                    assert_never(work)
        except Exception as error:  # noqa: BLE001 - the pool's thread must live on
            return WorkCrashed(work, f"{type(error).__name__}: {error}")

    # Verify and merge.

    def _verify(self, work: VerifyCheckpoint) -> Verdict:
        seq, nonce = work.record.seq, work.record.nonce
        try:
            unknown = self._forgotten(work)
            size_bytes, key, data = self._merged(work)
        except (Unavailable, OutcomeUnknown) as error:
            return Verdict(seq, nonce, ok=False, retry=True, problem=error.message)
        except DtrainError as error:
            return Verdict(seq, nonce, ok=False, problem=error.message)
        return Verdict(
            seq,
            nonce,
            ok=True,
            manifest=key,
            manifest_bytes=len(data),
            digest=hashlib.sha256(data).hexdigest(),
            size_bytes=size_bytes,
            unknown=unknown,
        )

    def _forgotten(self, work: VerifyCheckpoint) -> tuple[Seq, Seq] | None:
        """Look for checkpoints of this number or later ones: an etcd that went back gives them out again."""
        record, root = work.record, job_root(work.cluster, work.job, work.uid)
        own = (record.seq, record.attempt, record.nonce)
        store = self._stores.get(work.store)
        try:
            keys = _ask(lambda: [info.key for info in store.list(f"{root}/manifests/")])
        except Refused:
            return None  # listing is the collector's right, and it looks for itself
        found = {of for key in keys if (of := _triple(_MANIFEST, root, key)) and of != own}
        if all(of[0] < record.seq for of in found):
            return None
        # The store first, etcd after, as in a sweep. A slow store may let this checkpoint and later ones be
        # aborted meanwhile: that nothing names a manifest proves less than a number that was not given out.
        records = read_records(self._etcd, work.cluster, work.job)
        if not any(of[0] == record.seq or of[0] > records.seq_last for of in found):
            return None
        return _unknown(keys, root, records)

    def _merged(self, work: VerifyCheckpoint) -> tuple[int, str, bytes]:
        store = self._stores.get(work.store)
        record = work.record
        root = job_root(work.cluster, work.job, work.uid)
        prefix = blob_prefix(root, record.seq, record.attempt, record.nonce)
        texts = [self._rank_text(store, prefix, part) for part in work.parts]
        created = iso(self._clock.wall())

        def merge(parts: Sequence[RankManifest]) -> Manifest:
            return self._merge(
                cluster=work.cluster,
                job=work.job,
                uid=work.uid,
                record=record,
                parts=parts,
                parent=None if work.parent is None else Seq(work.parent),
                created=created,
            )

        job = (work.cluster, work.job, work.uid)
        judged = judge(texts, merge, self._forms.get(job), bytes_max=MANIFEST_BYTES_UNPACKED_MAX)
        for blob in judged.blobs:
            if not _is_below(prefix, blob.key):
                named = blob.key[:200]
                raise _unfit(f"rank {blob.rank} names {named!r}, which is not of this checkpoint")
            found = _ask(partial(store.head, blob.key))
            if found.size_bytes != blob.bytes:
                raise _unfit(f"{blob.key} holds {found.size_bytes} bytes, not {blob.bytes}")
            if found.crc32c and found.crc32c.lower() != blob.crc.lower():
                raise _unfit(f"{blob.key} has the checksum {found.crc32c}, not {blob.crc}")
        # mtime 0 and no name: the bytes are a function of the manifest alone.
        data = gzip.compress(judged.text, compresslevel=6, mtime=0)
        if len(data) > MANIFEST_BYTES_MAX:
            raise _unfit(f"its manifest takes {len(data)} bytes, the limit is {MANIFEST_BYTES_MAX}")
        key = manifest_key(root, record.seq, record.attempt, record.nonce, secrets.token_hex(4))
        # Hashed as it leaves, and once: nothing can change it before.
        _ask(lambda: store.put(key, [data], chunk_crcs=digest.ChunkCrcs([data])), idempotent=True)
        if judged.form is not None:
            self._forms.put(job, judged.form)
        return judged.bytes, key, data

    def _rank_text(self, store: BlobStore, prefix: str, part: DurablePart) -> RankText:
        if not _is_below(prefix, part.manifest):
            named = part.manifest[:200]
            raise _unfit(f"rank {part.rank} reports {named!r}, which is not of this checkpoint")
        size = _ask(lambda: store.head(part.manifest)).size_bytes
        if size > MANIFEST_BYTES_MAX:
            raise _unfit(f"{part.manifest} has {size} bytes, the limit is {MANIFEST_BYTES_MAX}")
        # No more than was looked at: an agent could make it longer meanwhile.
        data = _ask(lambda: store.get(part.manifest, length=size))
        if hashlib.sha256(data).hexdigest() != part.digest:
            raise _unfit(f"{part.manifest} is not what rank {part.rank} reported")
        return RankText(part.rank, part.manifest, unpack(data))

    # Collect.

    def _collect(self, work: CollectGarbage) -> Collected:
        try:
            self._delete_retired(self._stores.get(work.store), work.garbage)
        except DtrainError as error:
            return Collected(work, error.message)
        return Collected(work)

    def _delete_retired(self, store: BlobStore, garbage: Garbage) -> None:
        try:
            data = _ask(lambda: store.get(garbage.manifest))
        except NotFound:
            # The manifest goes last: without it nothing else of this checkpoint is left.
            return
        if hashlib.sha256(data).hexdigest() != garbage.digest:
            raise _unfit(f"{garbage.manifest} is not the retired one; nothing was deleted")
        manifest = codec.decode(Manifest, unpack(data), bytes_max=MANIFEST_BYTES_UNPACKED_MAX)
        root = job_root(manifest.cluster, manifest.job, manifest.uid)
        prefix = f"{blob_prefix(root, manifest.seq, manifest.attempt, manifest.nonce)}/"
        if manifest.seq != garbage.seq or not garbage.manifest.startswith(f"{root}/"):
            raise _unfit(f"{garbage.manifest} is of checkpoint {manifest.seq}; nothing was deleted")
        listed = _ask(lambda: [info.key for info in store.list(prefix)])
        for key in [*(blob.key for blob in manifest.blobs), *listed]:
            if key.startswith(prefix):
                _ask(partial(store.delete, key), idempotent=True)
        _ask(lambda: store.delete(garbage.manifest), idempotent=True)

    # Sweep.

    def _sweep(self, work: SweepOrphans) -> Swept:
        try:
            return self._delete_orphans(work)
        except (Unavailable, OutcomeUnknown, Conflict) as error:
            return Swept(work, problem=error.message, retry=True)
        except DtrainError as error:
            return Swept(work, problem=error.message)

    def _delete_orphans(self, work: SweepOrphans) -> Swept:
        store = self._stores.get(work.store)
        found = self.find_orphans(work, mark=True)
        if found.problem:
            return Swept(work, problem=found.problem, unknown=found.unknown)
        for key in found.keys:
            _ask(partial(store.delete, key), idempotent=True)
        for token in found.uploads:
            _ask(partial(store.discard_unfinished, token), idempotent=True)
        packages = self._packages.collect(work.cluster, store)
        return Swept(work, len(found.keys) + len(found.uploads) + packages)

    def find_orphans(self, work: SweepOrphans, *, mark: bool = False) -> "Orphans":
        """Find what no record names, in the one order that proves it; ``mark``: the store as ours, too.

        Raises:
            Unavailable, OutcomeUnknown, Refused: store or etcd did not answer, or refused.
        """
        store = self._stores.get(work.store)
        root = job_root(work.cluster, work.job, work.uid)
        # The store first, etcd after: blobs exist only after their open record, so what is
        # listed now and named by no record then can never be committed.
        sizes = _ask(lambda: {info.key: info.size_bytes for info in store.list(f"{root}/")})
        keys = list(sizes)
        uploads = _ask(lambda: list(store.list_unfinished(f"{root}/")))
        if not keys and not uploads:
            return Orphans()
        records = read_records(self._etcd, work.cluster, work.job)
        # Blobs too: what carries a number that this etcd has not given out belongs to another
        # history, and there it may be about to be committed.
        seqs = [of[0] for key in keys if (of := _triple(_BLOB, root, key) or _triple(_MANIFEST, root, key))]
        newest = max(seqs, default=0)
        if newest > records.newest:
            return Orphans(
                problem=f"the store holds checkpoint {newest}, etcd knows none after {records.seq_last}: "
                "etcd may have been restored from a backup; nothing was deleted",
                unknown=_unknown(keys, root, records),
            )
        if work.uid != records.uid and work.uid not in records.unswept:
            return Orphans(problem="the job was submitted anew; nothing was deleted")
        foreign = self._foreign_owner(store, work.cluster, mark)
        if foreign:
            return Orphans(problem=foreign)
        # Committed, for all that is known, in a time that etcd has forgotten: for a person to delete.
        forgotten = {
            of
            for key in keys
            if (of := _triple(_MANIFEST, root, key)) and records.unknown_from <= of[0] <= records.unknown_to
        }
        surplus = self._surplus(store, root, keys, records)
        orphans: dict[str, int] = {}
        for key in keys:
            blob, manifest = _triple(_BLOB, root, key), _triple(_MANIFEST, root, key)
            of = blob or manifest
            # What does not look like ours is not ours to delete.
            if of is None or of in records.named or key in records.manifests:
                continue
            if of in forgotten and of not in records.committed:
                continue
            # Of a committed checkpoint only the manifest in its record counts: the others were
            # written by tries whose answer was lost.
            if blob in records.committed and key not in surplus:
                continue
            orphans[key] = sizes[key]
        # What a committed one names is complete: what is unfinished beside it was cut off and repeated.
        abandoned = [token for token in uploads if not any(_names(token, of) for of in records.named)]
        return Orphans(orphans, tuple(abandoned))

    def _foreign_owner(self, store: BlobStore, cluster: ClusterName, mark: bool) -> str:
        """Why another etcd may decide about these blobs; "" if this one does.

        Two clusters of one name, or a copy of an etcd beside the original, would
        each take the other's blobs for orphans.
        """
        own = f"{owners_prefix(cluster)}{self._etcd.status().cluster_id:016x}.json"
        owners = _ask(lambda: [info.key for info in store.list(owners_prefix(cluster))])
        if not owners and mark:
            about = codec.canonical({"v": 1, "cluster": cluster, "etcd": own.rpartition("/")[2][:16]})
            try:
                _ask(lambda: store.put(own, [about], chunk_crcs=[digest.crc32c(about)]), idempotent=True)
            except Refused:
                # Another sweep may have taken this upload for one that was cut off: then the mark is there.
                owners = _ask(lambda: [info.key for info in store.list(owners_prefix(cluster))])
                if own not in owners:
                    raise
            # Somebody else may have done the same meanwhile: whoever sees two stands still.
            owners = _ask(lambda: [info.key for info in store.list(owners_prefix(cluster))])
        others = [key for key in owners if key != own]
        if not others:
            if mark:
                # The mark is there: whoever began to write it and did not end is dead, or need not.
                for token in _ask(lambda: list(store.list_unfinished(owners_prefix(cluster)))):
                    _ask(partial(store.discard_unfinished, token), idempotent=True)
            return ""
        return (
            f"{store.uri} is marked as that of another etcd with the same cluster name"
            f" ({', '.join(others[:2])}): nothing was deleted; delete the mark once no other uses this store"
        )

    # Inspect.

    def _inspect(self, work: InspectCheckpoint) -> Inspected:
        try:
            store = self._stores.get(work.store)
            if work.depth == "chunk":
                return Inspected(
                    work,
                    _told(verifying.verify_chunk(store, work.manifest, work.digest, work.blob, work.chunk)),
                )
            if work.depth == "heads":
                return Inspected(work, _told(verifying.verify_heads(store, work.manifest, work.digest)))
            report = verifying.verify(
                store,
                work.manifest,
                work.digest,
                lanes=1,
                pace=verifying.Pace(self._scrub_bytes_per_s, monotonic=self._clock.monotonic),
                stopped=self._stopped,
            )
            return Inspected(work, _told(report.damages[0] if report.damages else None), bytes=report.bytes)
        except verifying.Stopped:
            return Inspected(work, problem="this replica stops")
        except DtrainError as error:
            return Inspected(work, problem=error.message)

    def _surplus(self, store: BlobStore, root: str, keys: Iterable[str], records: "Records") -> set[str]:
        """Files in the folders of committed checkpoints that their manifests do not name.

        A transfer process that died before its report uploads the rank's part again: nobody
        will ever name the first one, and its folder stays for as long as the checkpoint does.
        """
        folders: dict[_Triple, list[str]] = {}
        for key in keys:
            of = _triple(_BLOB, root, key)
            if of in records.commits:
                folders.setdefault(of, []).append(key)
        found: set[str] = set()
        for of, listed in folders.items():
            commit = records.commits[of]
            # A blob and a manifest of each rank: then there is nothing to look for.
            if len(listed) <= 2 * commit.world_size:
                continue
            try:
                data = _ask(partial(store.get, commit.manifest))
            except NotFound:
                continue
            if hashlib.sha256(data).hexdigest() != commit.digest:
                continue  # damaged: whoever reads it says so, and nothing is deleted by it
            manifest = codec.decode(Manifest, unpack(data), bytes_max=MANIFEST_BYTES_UNPACKED_MAX)
            named = {blob.key for blob in manifest.blobs}
            named |= {_RANK_BLOB.sub(r"\1-\2.json.gz", key) for key in named}
            found |= {key for key in listed if key not in named and _RANK_FILE.search(key)}
        return found

    # Probe.

    def _probe(self, work: ProbeStore) -> Probed:
        try:
            probe(self._stores.get(work.store))
        except DtrainError as error:
            return Probed(work, error.message + (f" ({error.fix})" if error.fix else ""))
        return Probed(work)


@dataclass(frozen=True, slots=True)
class Orphans:
    """What a store holds of a submission and no record names; ``problem``: why none of it may go."""

    keys: Mapping[str, int] = field(default_factory=dict)
    """With the size of each, bytes."""
    uploads: tuple[str, ...] = ()
    problem: str = ""
    unknown: tuple[Seq, Seq] | None = None


class Records:
    """What etcd says of one job's checkpoints at one revision."""

    def __init__(self, items: Iterable[KeyValue], keys: Keys) -> None:
        self.uid = ""
        self.latest = 0
        self.seq_last = 0
        self.unswept: set[Uid] = set()
        self.unknown_from = self.unknown_to = 0
        self.named: set[_Triple] = set()
        self.committed: set[_Triple] = set()
        self.commits: dict[_Triple, CommitRecord] = {}
        self.manifests: set[str] = set()
        for kv in items:
            parsed = keys.parse(kv.key)
            match parsed.kind if parsed else "":
                case "status":
                    status = codec.decode(JobStatus, kv.value)
                    self.uid, self.seq_last = status.uid, status.seq_last
                    self.unswept = {former.uid for former in status.unswept}
                    self.unknown_from, self.unknown_to = status.unknown_from, status.unknown_to
                case "latest":
                    self.latest = codec.decode(Latest, kv.value).seq
                case "open":
                    opened = codec.decode(OpenRecord, kv.value)
                    self.named.add((opened.seq, opened.attempt, opened.nonce))
                case "checkpoint":
                    commit = codec.decode(CommitRecord, kv.value)
                    self.committed.add((commit.seq, commit.attempt, commit.nonce))
                    self.commits[commit.seq, commit.attempt, commit.nonce] = commit
                    self.manifests.add(commit.manifest)
                case "garbage":
                    garbage = codec.decode(Garbage, kv.value)
                    self.manifests.add(garbage.manifest)
                    self.named |= _named_by(garbage.manifest)

    @property
    def newest(self) -> int:
        """The highest checkpoint number that was given out, for all that etcd knows."""
        numbers = [of[0] for of in self.named | self.committed]
        return max([self.latest, self.seq_last, *numbers])


def read_records(etcd: Etcd, cluster: ClusterName, job: JobName) -> Records:
    """Read what names blobs of ``job``: linearizably, at one revision.

    Raises:
        Refused: BAD_RECORD; one of them cannot be read, so that nothing may be
            called an orphan.
    """
    keys = Keys(cluster)
    prefixes = [f"{keys.job(job)}{folder}/" for folder in ("open", "checkpoints", "garbage")]
    operations = (
        Get(keys.status(job)),
        Get(keys.latest(job)),
        *(Get(prefix, prefix_end(prefix)) for prefix in prefixes),
    )
    result = _ask(lambda: etcd.txn(Txn(success=operations)), idempotent=True)
    return Records((kv for response in result.responses for kv in response), keys)


def unpack(data: bytes) -> bytes:
    """Return gunzipped ``data``, at most ``MANIFEST_BYTES_UNPACKED_MAX`` of it.

    Raises:
        Refused: BAD_RECORD; not gzip, or it unpacks to more.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            unpacked = packed.read(MANIFEST_BYTES_UNPACKED_MAX + 1)
    except (OSError, EOFError) as error:
        raise Refused(ErrorCode.BAD_RECORD, f"a manifest is not gzip ({error})") from error
    if len(unpacked) > MANIFEST_BYTES_UNPACKED_MAX:
        raise Refused(ErrorCode.BAD_RECORD, "a manifest unpacks to more than its limit")
    return unpacked


def _unknown(keys: Iterable[str], root: str, records: Records) -> tuple[Seq, Seq] | None:
    """Lowest and highest number of the manifests that no record names, and of blobs never heard of."""
    seqs = []
    for key in keys:
        manifest, blob = _triple(_MANIFEST, root, key), _triple(_BLOB, root, key)
        if manifest and manifest not in records.committed | records.named and key not in records.manifests:
            seqs.append(manifest[0])
        elif blob and blob[0] > records.newest:
            seqs.append(blob[0])
    return (Seq(min(seqs)), Seq(max(seqs))) if seqs else None


def _is_below(prefix: str, key: str) -> bool:
    """Tell whether an agent's key lies in the folder of its checkpoint, wherever it claims to begin."""
    try:
        return check_key(key).startswith(f"{prefix}/")
    except ValueError:
        return False


def _ask(operation: Callable[[], T], *, idempotent: bool = False) -> T:
    return retry.call(operation, attempts=3, deadline_s=20.0, idempotent=idempotent)


def _triple(pattern: re.Pattern[str], root: str, key: str) -> _Triple | None:
    found = pattern.match(key.removeprefix(f"{root}/"))
    return None if found is None else (int(found[1]), int(found[2]), found[3])


def _named_by(manifest: str) -> set[_Triple]:
    found = _MANIFEST.search(manifest)
    return set() if found is None else {(int(found[1]), int(found[2]), found[3])}


def _names(token: str, of: _Triple) -> bool:
    """Whether an unfinished upload's token, whatever else is in it, belongs to a checkpoint."""
    seq, attempt, nonce = of
    return f"{seq:020d}/{attempt:06d}-{nonce}/" in token or f"{seq:020d}-{attempt:06d}-{nonce}-" in token


def _told(damage: reading.Damage | None) -> Damage | None:
    if damage is None:
        return None
    return Damage(
        damage.blob,
        damage.chunk,
        damage.expected,
        damage.found,
        damage.rank,
        reading.told(damage.tensors) if damage.tensors else "",
    )


def _unfit(what: str) -> Refused:
    return Refused(ErrorCode.BLOB_CORRUPT, what)
