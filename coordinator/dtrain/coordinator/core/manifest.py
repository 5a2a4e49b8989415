"""Rank manifests of one checkpoint merged into its manifest, or refused.

This is where divergence is caught: ranks of another attempt or step, tensors
with holes or overlaps, values that differ between replicas. Nothing is
repaired: a checkpoint whose parts disagree must not exist.
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CHUNK_BYTES,
    BlobEntry,
    ChunkEntry,
    Manifest,
    ObjectEntry,
    OpenRecord,
    RankManifest,
    TensorEntry,
)
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import ClusterName, JobName, Rank, Seq, Uid
from dtrain.protocol.wording import some

NAMES_TOLD_MAX = 3
PROBLEMS_TOLD_MAX = 5
RANKS_TOLD_MAX = 8

ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "C128": 128,
}
"""Bits per element of the safetensors dtypes; chunks of another dtype are not measured."""

CRC_ALGORITHM = "crc32c"


def merge(
    *,
    cluster: ClusterName,
    job: JobName,
    uid: Uid,
    record: OpenRecord,
    parts: Sequence[RankManifest],
    parent: Seq | None,
    created: str,
) -> Manifest:
    """Merge what the ranks wrote; pure, and the same for any order of ``parts``.

    ``record`` is the open checkpoint that the parts must belong to.

    Raises:
        Refused: RANKS_DISAGREE; naming up to PROBLEMS_TOLD_MAX of the problems.
    """
    manifests = sorted(parts, key=lambda manifest: manifest.rank)
    problems = _identity(record, manifests, cluster, job, uid)
    if not problems:
        problems = _layouts(manifests)
    if problems:
        raise _refusal(record, problems)
    blobs: list[BlobEntry] = []
    first: dict[str, TensorEntry] = {}
    chunks: dict[str, list[ChunkEntry]] = {}
    for manifest in manifests:
        base = len(blobs)
        blobs += manifest.blobs
        problems += _blobs(manifest)
        for name, entry in manifest.tensors.items():
            problems += _bounds(manifest, name, entry)
            known = first.setdefault(name, entry)
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                problems.append(
                    f"tensor {name} is {_form(entry)} on rank {manifest.rank} and {_form(known)} on another"
                )
                continue
            # Spelt out: with tens of thousands of chunks, ``replace`` costs more than anything else here.
            chunks.setdefault(name, []).extend(
                [ChunkEntry(c.o, c.s, c.b + base, c.off, c.len) for c in entry.chunks]
                if base
                else entry.chunks
            )
    tensors = {
        name: TensorEntry(entry.dtype, entry.shape, tuple(chunks[name])) for name, entry in first.items()
    }
    for name in sorted(tensors):
        problem = tiling_problem(tensors[name])
        if problem:
            problems.append(f"tensor {name} {_form(tensors[name])}: {problem}")
    objects, object_problems = _objects(manifests)
    problems += object_problems
    problems += _replicas(manifests)
    problems += _same_key_twice(blobs)
    paths = {name: path for manifest in manifests for name, path in manifest.paths.items()}
    if problems:
        raise _refusal(record, problems)
    return Manifest(
        v=1,
        cluster=cluster,
        job=job,
        uid=uid,
        seq=record.seq,
        attempt=record.attempt,
        nonce=record.nonce,
        step=record.step,
        world=record.world_size,
        chunk_bytes=CHUNK_BYTES,
        crc=CRC_ALGORITHM,
        bytes=sum(blob.bytes for blob in blobs),
        layout=manifests[0].layout if manifests else "",
        blobs=tuple(blobs),
        tensors=tensors,
        objects=objects,
        parent=parent,
        created=created,
        paths=paths,
    )


def _refusal(record: OpenRecord, problems: Sequence[str]) -> Refused:
    return Refused(
        ErrorCode.RANKS_DISAGREE,
        f"checkpoint {record.seq}: {some(problems, PROBLEMS_TOLD_MAX, between='; ')}",
        fix="state under one name must be equal on all ranks; give per-rank state a per-rank name; "
        "where ranks do not compute bit for bit alike, set DTRAIN_CHECK_REPLICAS=off in the job's env",
    )


def _identity(
    record: OpenRecord, manifests: Sequence[RankManifest], cluster: ClusterName, job: JobName, uid: Uid
) -> list[str]:
    problems = [] if record.uid == uid else [f"the open checkpoint is of submission {record.uid}, not {uid}"]
    wanted = {
        "cluster": cluster,
        "job": job,
        "uid": uid,
        "seq": record.seq,
        "attempt": record.attempt,
        "nonce": record.nonce,
        "step": record.step,
        "world": record.world_size,
    }
    for manifest in manifests:
        for field, value in wanted.items():
            found = getattr(manifest, field)
            if found != value:
                problems.append(f"rank {manifest.rank} wrote {field} {found}, not {value}")
        if manifest.v != 1:
            problems.append(f"rank {manifest.rank} wrote a manifest of version {manifest.v}")
    ranks = [manifest.rank for manifest in manifests]
    twice = sorted(rank for rank, count in Counter(ranks).items() if count > 1)
    if twice:
        problems.append(f"ranks {', '.join(map(str, twice[:8]))} are there twice")
    missing = sorted(set(range(record.world_size)) - set(ranks))
    if missing:
        problems.append(f"ranks {', '.join(map(str, missing[:8]))} are missing")
    strange = sorted(set(ranks) - {Rank(rank) for rank in range(record.world_size)})
    if strange:
        problems.append(f"ranks {', '.join(map(str, strange[:8]))} are not of this attempt")
    return problems


def _layouts(manifests: Sequence[RankManifest]) -> list[str]:
    by_layout: dict[str, list[RankManifest]] = {}
    for manifest in manifests:
        by_layout.setdefault(manifest.layout, []).append(manifest)
    if len(by_layout) <= 1:
        return []
    groups = "; ".join(
        f"ranks {_ranks(group)} have {layout or 'none'}" for layout, group in by_layout.items()
    )
    problem = f"ranks disagree about names, dtypes, shapes or meshes of the state: {groups}"
    return [problem, *_named_by_some(list(by_layout.values()))]


def _named_by_some(groups: Sequence[Sequence[RankManifest]]) -> list[str]:
    """Tensors that are known in one group only, for people who look for what differs."""
    if not all(manifest.same for group in groups for manifest in group):
        return []  # a rank tells of replicas that another one writes only where they are compared
    names = [{name for manifest in group for name in _names(manifest)} for group in groups]
    problems = []
    for group, own in zip(groups, names, strict=True):
        others = set().union(*(other for other in names if other is not own))
        # Random generators are each rank's own, and named so.
        alone = sorted(name for name in own - others if not name.startswith("rng/"))
        if alone:
            told = some(alone, NAMES_TOLD_MAX)
            problems.append(
                f"only ranks {_ranks(group)} name {told} (stages of a pipeline are saved by dcp.save)"
            )
    return problems


def _names(manifest: RankManifest) -> Iterator[str]:
    yield from manifest.tensors
    for key in manifest.same:
        name, _, part = key.rpartition("#")
        yield name if name and part.isdecimal() else key


def _ranks(group: Sequence[RankManifest]) -> str:
    return some((manifest.rank for manifest in group), RANKS_TOLD_MAX)


def _blobs(manifest: RankManifest) -> list[str]:
    problems = []
    for blob in manifest.blobs:
        if blob.rank != manifest.rank:
            problems.append(f"rank {manifest.rank} lists a blob of rank {blob.rank}")
        if len(blob.chunks) != -(-blob.bytes // CHUNK_BYTES):
            problems.append(f"blob {blob.key} of {blob.bytes} bytes has {len(blob.chunks)} digests")
    return problems


def _bounds(manifest: RankManifest, name: str, entry: TensorEntry) -> list[str]:
    """Each chunk lies within its tensor and its blob, and is as long as its elements are."""
    problems = []
    bits = ITEM_BITS.get(entry.dtype)
    where = f"rank {manifest.rank}: a chunk of tensor {name}"
    for chunk in entry.chunks:
        if not 0 <= chunk.b < len(manifest.blobs):
            problems.append(f"{where} is in blob {chunk.b}, which is not there")
        elif chunk.off < 0 or chunk.len < 0 or chunk.off + chunk.len > manifest.blobs[chunk.b].bytes:
            problems.append(f"{where} lies outside its blob")
        if bits is not None and math.prod(chunk.s) * bits != chunk.len * 8:
            problems.append(f"{where} has {chunk.len} bytes for {list(chunk.s)} {entry.dtype}")
    return problems


def _objects(manifests: Sequence[RankManifest]) -> tuple[dict[str, ObjectEntry], list[str]]:
    found: dict[str, ObjectEntry] = {}
    owner: dict[str, Rank] = {}
    problems = []
    for manifest in manifests:
        for name, entry in manifest.objects.items():
            if f"{zlib.crc32(codec.canonical(entry.value)):08x}" != entry.crc:
                # Damaged in memory on its way here: it must not become the value of all ranks.
                problems.append(f"object {name} of rank {manifest.rank} is not what its digest says")
            known = found.get(name)
            if known is None:
                found[name], owner[name] = entry, manifest.rank
            elif known.crc != entry.crc:
                problems.append(f"object {name} differs between ranks {owner[name]} and {manifest.rank}")
    return found, problems


def _replicas(manifests: Sequence[RankManifest]) -> list[str]:
    """Tensors that ranks should hold alike and do not, each with all the ranks that differ from the first."""
    first: dict[str, tuple[str, Rank]] = {}
    differing: dict[str, list[Rank]] = {}
    for manifest in manifests:
        if first and manifest.same == manifests[0].same:
            continue  # all of it, as it should be
        for name, digest in manifest.same.items():
            known = first.setdefault(name, (digest, manifest.rank))
            if known[0] != digest:
                differing.setdefault(name, []).append(manifest.rank)
    return [
        f"tensor {name} differs between rank {first[name][1]} and ranks {', '.join(map(str, ranks[:8]))}"
        for name, ranks in sorted(differing.items())
    ]


def _same_key_twice(blobs: Iterable[BlobEntry]) -> list[str]:
    seen: set[str] = set()
    problems = []
    for blob in blobs:
        if blob.key in seen:
            problems.append(f"blob {blob.key} is listed twice")
        seen.add(blob.key)
    return problems


def _form(entry: TensorEntry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


# Tiling ---------------------------------------------------------------------------


def tiling_problem(entry: TensorEntry) -> str:
    """Why the chunks do not cover the tensor exactly once; "" if they do.

    Volumes that add up, chunks inside the bounds and no overlap together mean
    an exact tiling. A tensor without elements may have any number of empty chunks.
    """
    shape = entry.shape
    for chunk in entry.chunks:
        if len(chunk.o) != len(shape) or len(chunk.s) != len(shape):
            return f"a chunk has {len(chunk.o)} dimensions"
        if any(o < 0 or s < 0 or o + s > n for o, s, n in zip(chunk.o, chunk.s, shape, strict=True)):
            return f"the chunk at {list(chunk.o)} of size {list(chunk.s)} lies outside"
    solid = [chunk for chunk in entry.chunks if math.prod(chunk.s)]
    total, covered = math.prod(shape), sum(math.prod(chunk.s) for chunk in solid)
    if covered < total:
        return f"chunks hold {covered} of {total} elements"
    if covered > total:
        return f"chunks hold {covered} elements, the tensor has {total}"
    if _overlap(solid):
        return "chunks overlap"
    return ""


def _overlap(chunks: Sequence[ChunkEntry]) -> bool:
    """Whether any two chunks share an element.

    Row blocks, by far the commonest, are compared with their neighbour only.
    Otherwise a sweep along the first dimension in which chunks differ keeps the
    pairs few; a grid of n chunks costs about n * sqrt(n).
    """
    if len(chunks) < 2:
        return False
    dimension = _widest(chunks)
    ordered = sorted(chunks, key=lambda chunk: chunk.o[dimension])
    ends = (chunk.o[dimension] + chunk.s[dimension] for chunk in ordered)
    if all(end <= after.o[dimension] for end, after in zip(ends, ordered[1:], strict=False)):
        return False
    active: list[ChunkEntry] = []
    for chunk in ordered:
        start = chunk.o[dimension]
        active = [other for other in active if other.o[dimension] + other.s[dimension] > start]
        if any(_intersect(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _widest(chunks: Sequence[ChunkEntry]) -> int:
    """Dimension along which the chunks begin at the most places; 0 for 0-d tensors is never asked."""
    dimensions = range(len(chunks[0].o))
    return max(dimensions, key=lambda dimension: len({chunk.o[dimension] for chunk in chunks}))


def _intersect(first: ChunkEntry, second: ChunkEntry) -> bool:
    return all(
        a < b + t and b < a + s for a, s, b, t in zip(first.o, first.s, second.o, second.s, strict=True)
    )
