"""State from elsewhere, made into what one rank would have written: blobs and a rank manifest.

What was found in a file or folder (``Contents``) is named as ``run.track`` names
state (``arrange``), then written into the folder of an open checkpoint (``write``).
Nothing here decides that a checkpoint exists, or whether one may be imported.
"""

import gzip
import hashlib
import math
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    MANIFEST_BYTES_MAX,
    BlobEntry,
    ChunkEntry,
    ObjectEntry,
    OpenRecord,
    RankManifest,
    TensorEntry,
    blob_key,
    blob_prefix,
    job_root,
    rank_manifest_key,
)
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import ClusterName, JobName, Rank
from dtrain.protocol.snapshot import DurablePart
from dtrain.protocol.wording import some
from dtrain.runtime import retry
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import PART_BYTES, BlobStore
from dtrain.storage.checkpoints.objects import ABOUT, OF_RANKS
from dtrain.storage.checkpoints.reading import ITEM_BYTES

BLOB_BYTES = 256 * 1024**2
"""Of one blob, which is put together in memory; rows of large tensors are spread over several."""

NAME = "model"
"""Tracked name of tensors whose source says nothing of any."""

HEADER_ALIGN = 64
STORE_PATIENCE_S = 600.0
_ATTEMPTS_MAX = 100_000  # the patience is the bound
_TOLD_MAX = 5
_OBJECTS_TOLD_MAX = 20

# What blobs keep under another type, as every release reads it: the view, and how many of it make one.
_AS = {
    "C64": ("F32", "complex64", 2),
    "C128": ("F64", "complex128", 2),
    "F8_E8M0": ("U8", "float8_e8m0fnu", 1),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a source; ``read(offset, length)`` returns bytes of it in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], bytes | memoryview]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a source holds.

    ``objects`` are values of tracked names as manifests have them; None: the
    source has tensors only, and their names are all that is known. ``origin``
    says which checkpoint was exported to it, if one was.
    """

    format: str
    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Arranged:
    """What will be imported: values by tracked name, and the tensors they refer to."""

    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def names(self) -> list[str]:
        """Tracked names, without what belongs to single ranks' generators."""
        return sorted(name for name in self.objects if not name.startswith(OF_RANKS))


def arrange(
    contents: Contents,
    *,
    maps: Sequence[tuple[str, str]] = (),
    prefix: str | None = None,
    only: Iterable[str] = (),
    partial: bool = False,
) -> Arranged:
    """Give everything the name under which a script tracks it.

    ``maps`` replace the beginning of full names (``model.layer.weight``), the
    first that fits; ``prefix`` goes before names that have no tracked name
    (default: ``model.``). ``partial``: whatever else is tracked begins fresh.

    Raises:
        Refused: names that collide or cannot be, types that cannot be kept, or
            tensors alone where ``partial`` was not said.
    """
    flat: list[tuple[str, Any, str]] = []
    objects: dict[str, Any] = {}
    if contents.objects is None:
        put = prefix if prefix is not None else "" if contents.origin else f"{NAME}."
        flat = [(put + name, {"$tensor": name}, "$ordered") for name in contents.tensors]
    elif prefix:
        raise _refused(f"this {contents.format} source has tracked names already", "use --map to change them")
    for name, value in (contents.objects or {}).items():
        entries, form = _flat(value)
        if entries is None or not maps:
            # A state is renamed as a whole, with the parts of it that each rank saved for itself.
            base, slash, rank = name.partition("/")
            final = _renamed(base, [(old, new) for old, new in maps if old == base]) + slash + rank
            if final in objects:
                raise _collision([final])
            objects[final] = value
        else:
            flat += [(f"{name}.{key}", node, form) for key, node in entries]
    sources: dict[str, str] = {}
    objects |= _grouped(flat, maps, objects, sources)
    wanted = list(dict.fromkeys(only))
    bases = {name: name.partition("/")[0] for name in objects}
    missing = [name for name in wanted if name not in objects and name not in bases.values()]
    if missing:
        known = some(sorted(objects), _OBJECTS_TOLD_MAX) or "nothing"
        raise _refused(f"there is nothing under the name {missing[0]!r}", f"it has {known}")
    if wanted:
        objects = {name: value for name, value in objects.items() if {name, bases[name]} & set(wanted)}
    if not objects:
        raise _refused(f"this {contents.format} source holds nothing", "look whether it is the right one")
    if (contents.objects is None or wanted) and not partial:
        raise _refused(
            "tensors alone do not say where an optimizer, a data loader or random generators stood",
            "give --weights-only to have what is not imported begin fresh, or import a whole training state",
        )
    for name in objects:
        _check_name(name)
    tensors, objects = _stored(contents, objects, sources)
    about = {
        "v": 1,
        "format": contents.format,
        "partial": partial,
        "world": contents.origin.get("world") if any(n.startswith(OF_RANKS) for n in objects) else None,
        "from": dict(contents.origin),
    }
    return Arranged(tensors, objects, about)


def _flat(value: Any) -> tuple[list[tuple[str, Any]] | None, str]:
    """Entries of a value that is nothing but named tensors, as that of a module is; None: it is more."""
    if not isinstance(value, dict) or not value or "$tensor" in value:
        return None, ""
    form = next((form for form in ("$ordered", "$dict") if form in value), "")
    pairs = list(zip(value[form][::2], value[form][1::2], strict=True)) if form else list(value.items())
    if all(isinstance(key, str) and isinstance(node, dict) and "$tensor" in node for key, node in pairs):
        return pairs, form
    return None, ""


def _renamed(name: str, maps: Sequence[tuple[str, str]]) -> str:
    for old, new in maps:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _grouped(
    flat: Iterable[tuple[str, Any, str]],
    maps: Sequence[tuple[str, str]],
    taken: Mapping[str, Any],
    sources: dict[str, str],
) -> dict[str, Any]:
    """Values of tracked names made of named tensors; ``sources`` learns what these were called before."""
    kept: dict[str, str] = {}
    groups: dict[str, dict[str, Any]] = {}
    forms: dict[str, str] = {}
    collisions = []
    for full, node, form in flat:
        tracked, _, key = (final := _renamed(full, maps)).partition(".")
        if key in (group := groups.setdefault(tracked, {})) or tracked in taken:
            collisions.append(final)
        # Under its new name, as exports and reports of damage tell tensors by it; tied ones under one.
        name = kept.setdefault(node["$tensor"], final)
        sources[name] = node["$tensor"]
        group[key] = {**node, "$tensor": name}
        forms.setdefault(tracked, form)
    for tracked, group in groups.items():
        if "" in group and len(group) > 1:
            collisions.append(tracked)
    if collisions:
        raise _collision(collisions)
    found: dict[str, Any] = {}
    for tracked, group in groups.items():
        if "" in group:
            found[tracked] = group[""]  # a tensor that is tracked itself
        elif forms[tracked] or list(group) != sorted(group) or any(key.startswith("$") for key in group):
            pairs = [part for pair in group.items() for part in pair]
            found[tracked] = {forms[tracked] or "$dict": pairs}
        else:
            found[tracked] = group
    return found


def _collision(names: Iterable[str]) -> Refused:
    told = some(sorted(set(names)), _TOLD_MAX)
    return _refused(f"several things would have the name {told}", "change --map or --prefix")


def _check_name(name: str) -> None:
    if not name or not name.isascii() or not name.isprintable() or name == ABOUT:
        raise _refused(f"{name!r} cannot name tracked state", "give another name by --map or --prefix")


def _stored(
    contents: Contents, objects: Mapping[str, Any], sources: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that are referred to, in types that blobs keep, and the values that say so."""
    tensors: dict[str, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(part) for part in value]
        if not isinstance(value, dict):
            return value
        if "$tensor" not in value:
            return {key: visit(part) for key, part in value.items()}
        name = value["$tensor"]
        tensor = contents.tensors.get(sources.get(name, name))
        if tensor is None:
            raise _refused(f"{name} is referred to, but is not there", "export it again, as a whole folder")
        if tensor.dtype not in _AS:
            tensors[name] = tensor
            return value
        dtype, original, parts = _AS[tensor.dtype]
        shape = (*tensor.shape, parts) if parts > 1 else tensor.shape
        tensors[name] = replace(tensor, dtype=dtype, shape=shape)
        return {**value, "dtype": original}

    return tensors, {name: visit(value) for name, value in objects.items()}


# Writing --------------------------------------------------------------------------------


def write(
    store: BlobStore,
    cluster: ClusterName,
    job: JobName,
    record: OpenRecord,
    arranged: Arranged,
    *,
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> DurablePart:
    """Make everything durable under the names of an open checkpoint; return what to report of it.

    ``check`` is called before each blob, and raises when the checkpoint is no more.

    Raises:
        Refused: too much for one manifest, the source changed, or the store will not take it.
        Unavailable: the store did not answer for STORE_PATIENCE_S.
    """
    prefix = blob_prefix(job_root(cluster, job, record.uid), record.seq, record.attempt, record.nonce)
    nonce = secrets.token_hex(8)
    rank = Rank(0)
    blobs: list[BlobEntry] = []
    chunks: dict[str, list[ChunkEntry]] = {name: [] for name in arranged.tensors}
    done, total = 0, arranged.size_bytes
    for group in _groups(arranged.tensors):
        check()
        data, offsets = _blob(arranged.tensors, group)
        key = blob_key(prefix, rank, len(blobs), nonce)
        for (name, origin, size, _, length), offset in zip(group, offsets, strict=True):
            chunks[name].append(ChunkEntry(origin, size, len(blobs), offset, length))
            done += length
        blobs.append(_put(store, key, rank, data))
        on_progress(done, total)
    values = {**arranged.objects, ABOUT: dict(arranged.about)}
    manifest = RankManifest(
        v=codec.VERSION,
        cluster=cluster,
        job=job,
        uid=record.uid,
        seq=record.seq,
        attempt=record.attempt,
        nonce=record.nonce,
        step=record.step,
        rank=rank,
        world=record.world_size,
        blobs=tuple(blobs),
        tensors={
            name: TensorEntry(tensor.dtype, tensor.shape, tuple(chunks[name]))
            for name, tensor in arranged.tensors.items()
        },
        objects={
            name: ObjectEntry(value, f"{zlib.crc32(codec.canonical(value)):08x}")
            for name, value in values.items()
        },
    )
    packed = gzip.compress(codec.canonical(codec.to_json(manifest)), compresslevel=6, mtime=0)
    if len(packed) > MANIFEST_BYTES_MAX:
        raise _refused(
            f"its manifest would take {len(packed)} bytes, more than {MANIFEST_BYTES_MAX}",
            "import fewer tensors, or without large values that are no tensors",
        )
    check()
    key = rank_manifest_key(prefix, rank, nonce)
    _put(store, key, rank, packed)
    return DurablePart(
        seq=record.seq,
        attempt=record.attempt,
        step=record.step,
        rank=rank,
        nonce=record.nonce,
        manifest=key,
        digest=hashlib.sha256(packed).hexdigest(),
        size_bytes=sum(blob.bytes for blob in blobs),
    )


_Piece = tuple[str, tuple[int, ...], tuple[int, ...], int, int]
"""Rows of a tensor: its name, their origin and size, and which of its bytes they are."""


def _pieces(name: str, tensor: Tensor) -> Iterator[_Piece]:
    shape, total = tensor.shape, tensor.size_bytes
    if total <= BLOB_BYTES or not shape:
        yield name, (0,) * len(shape), shape, 0, total
        return
    row = total // shape[0]
    rows = max(1, BLOB_BYTES // row)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        origin = (first, *(0 for _ in shape[1:]))
        yield name, origin, (count, *shape[1:]), first * row, count * row


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[_Piece]]:
    # Larger items first: then each one is aligned to its own size without holes.
    ordered = sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype])
    group: list[_Piece] = []
    size = 0
    for piece in (piece for name, tensor in ordered for piece in _pieces(name, tensor)):
        if group and size + piece[4] > BLOB_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece[4]
    if group:
        yield group


def _blob(tensors: Mapping[str, Tensor], group: Sequence[_Piece]) -> tuple[memoryview, list[int]]:
    """A safetensors file in memory, its items numbered, and where in it each of them begins."""
    table: dict[str, Any] = {}
    at = 0
    for number, (name, _, size, _, length) in enumerate(group):
        item = {"dtype": tensors[name].dtype, "shape": list(size), "data_offsets": [at, at + length]}
        table[str(number)] = item
        at += length
    header = codec.dumps(table)
    header += b" " * (-(8 + len(header)) % HEADER_ALIGN)
    data = bytearray(8 + len(header) + at)
    data[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
    offsets = []
    at = 8 + len(header)
    for name, _, _, start, length in group:
        offsets.append(at)
        if length:
            data[at : at + length] = tensors[name].read(start, length)
        at += length
    return memoryview(data), offsets


def _put(store: BlobStore, key: str, rank: Rank, data: bytes | memoryview) -> BlobEntry:
    view = memoryview(data)
    parts = [view[at : at + PART_BYTES] for at in range(0, len(view), PART_BYTES)]
    crcs = [digest.crc32c(part) for part in parts]
    # The same bytes under the same key: a repetition after a lost answer is harmless.
    retry.call(
        lambda: store.put(key, parts, chunk_crcs=crcs),
        attempts=_ATTEMPTS_MAX,
        deadline_s=STORE_PATIENCE_S,
        idempotent=True,
    )
    crc = digest.to_hex(digest.full_crc(crcs, len(view), PART_BYTES))
    return BlobEntry(key, rank, len(view), crc, tuple(digest.to_hex(one) for one in crcs))


def _refused(message: str, fix: str) -> Refused:
    return Refused(ErrorCode.USAGE, message, fix=fix)
