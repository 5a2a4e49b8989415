"""Rank manifests judged as text, so that what did not change since the last checkpoint is not parsed again.

Names, dtypes, shapes and places of a state's tensors, by far the most of a rank manifest of many small
ones, are the same at every save, and so are most objects. A ``Form`` holds digests of texts that were
parsed and found right, and what followed from them. A text is recognised only byte by byte (SHA-256);
everything else is parsed and checked as if it were the first checkpoint.

Nothing is refused here: whatever is new in form, odd or wrong goes the long way (``judge_in_full``),
which decides and says why. With or without a form the verdict and the manifest are the same.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.coordinator.core import tensor_text
from dtrain.coordinator.core.tensor_text import Odd, Tensors, member, past
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import BlobEntry, Manifest, RankManifest
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Rank

Merge = Callable[[Sequence[RankManifest]], Manifest]
"""``manifest.merge`` for one checkpoint."""

OBJECT_BYTES_MIN = 256
"""Shorter objects are parsed as fast as recognised."""


@dataclass(frozen=True, slots=True)
class RankText:
    """A rank manifest as it was written, unpacked; ``name`` is its key in the store."""

    rank: Rank
    name: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Known:
    """The text of an object that was found to be what ``crc`` says."""

    length: int
    digest: bytes
    crc: str


@dataclass(frozen=True, slots=True)
class RankForm:
    """The tensors of one rank: digest of their text, and how long each of its blobs has to be for them."""

    digest: bytes
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """What a checkpoint was found to look like. An empty one recognises nothing."""

    objects: Mapping[str, tuple[Known, ...]] = field(default_factory=dict)
    ranks: tuple[RankForm, ...] = ()
    tensors: bytes = b""
    """The merged tensors in canonical JSON: valid for just these ranks with just these texts."""

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory."""
        return len(self.tensors) + 200 * (1 + len(self.ranks) + len(self.objects))


@dataclass(frozen=True, slots=True)
class Judged:
    """A checkpoint whose parts fit together. ``form``: for the next one, if there is anything to remember."""

    text: bytes
    """The manifest in canonical JSON."""
    blobs: tuple[BlobEntry, ...]
    bytes: int
    form: Form | None = None


def judge(texts: Sequence[RankText], merge: Merge, known: Form, *, bytes_max: int) -> Judged:
    """Merge what the ranks wrote, with what ``known`` recognises taken as read.

    Raises:
        Refused: BAD_RECORD, BLOB_CORRUPT or RANKS_DISAGREE.
    """
    try:
        return _Reading(known, bytes_max).judge(texts, merge)
    except (Odd, Refused):
        return judge_in_full(texts, merge, bytes_max=bytes_max)


def judge_in_full(texts: Sequence[RankText], merge: Merge, *, bytes_max: int) -> Judged:
    """The same with every value parsed and checked: what decides, and says what is wrong.

    Raises:
        Refused: BAD_RECORD, BLOB_CORRUPT or RANKS_DISAGREE.
    """
    parts = []
    for item in texts:
        part = codec.decode(RankManifest, item.text, bytes_max=bytes_max)
        if part.rank != item.rank:
            raise Refused(ErrorCode.BLOB_CORRUPT, f"{item.name} is of rank {part.rank}, not {item.rank}")
        parts.append(part)
    merged = merge(parts)
    return Judged(codec.canonical(codec.to_json(merged)), merged.blobs, merged.bytes)


@dataclass(frozen=True, slots=True)
class _Part:
    head: RankManifest
    """Without objects and tensors."""
    objects: Mapping[str, "_Object"]
    text: str
    tensors_at: int
    digest: bytes
    """Of the text from the tensors on, the closing brace included."""

    def fits(self, form: RankForm) -> bool:
        blobs = self.head.blobs
        return (
            self.digest == form.digest
            and len(blobs) == len(form.ends)
            and all(end <= blob.bytes for end, blob in zip(form.ends, blobs, strict=True))
        )


@dataclass(frozen=True, slots=True)
class _Object:
    text: bytes
    known: Known


class _Reading:
    """One checkpoint's parts. What one rank wrote is recognised at the next as well."""

    def __init__(self, known: Form, bytes_max: int) -> None:
        self._known = known
        self._bytes_max = bytes_max
        self._objects: dict[str, list[_Object]] = {}
        self._same: list[tuple[str, Mapping[str, str]]] = []

    def judge(self, texts: Sequence[RankText], merge: Merge) -> Judged:
        parts = sorted((self._read(item) for item in texts), key=lambda part: part.head.rank)
        objects = _agreed(parts)
        form = self._known
        if len(parts) == len(form.ranks) and all(map(_Part.fits, parts, form.ranks)):
            merged, ranks, tensors = merge([part.head for part in parts]), form.ranks, form.tensors
        else:
            read, base = [], 0
            for part in parts:
                blobs = len(part.head.blobs)
                read.append(tensor_text.read(part.text, part.tensors_at, blobs=blobs, base=base))
                base += blobs
            merged = merge(
                [replace(part.head, tensors=own.others) for part, own in zip(parts, read, strict=True)]
            )
            ranks = tuple(
                RankForm(part.digest, _ends(part, own)) for part, own in zip(parts, read, strict=True)
            )
            tensors = tensor_text.joined(read, merged.tensors)
            merged = replace(merged, tensors={})
        text = _spliced(codec.to_json(merged), {"objects": objects, "tensors": tensors})
        remembered = {
            name: tuple(item.known for item in items if item.known.length >= OBJECT_BYTES_MIN)
            for name, items in self._objects.items()
        }
        new = Form({name: items for name, items in remembered.items() if items}, ranks, tensors)
        return Judged(text, merged.blobs, merged.bytes, new)

    def _read(self, item: RankText) -> _Part:
        """Take a rank manifest apart; its tensors come last and are left as they are."""
        data = item.text
        if not data.isascii():
            raise Odd
        codec.check_size(data, bytes_max=self._bytes_max)
        text = data.decode()
        document: dict[str, Any] = {}
        objects: Mapping[str, _Object] = {}
        same: Mapping[str, str] = {}
        names: set[str] = set()
        at = past(text, 0, "{")
        while True:
            name, at = member(text, at, names)
            if name == "tensors":
                break
            if name == "objects":
                objects, at = self._read_objects(data, text, at)
            elif name == "same":
                same, at = self._read_same(text, at)
            else:
                document[name], at = codec.value_at(text, at, levels=codec.DEPTH_MAX - 1)
            at = past(text, at, ",")
        head = codec.from_json(RankManifest, document)
        if head.rank != item.rank:
            raise Odd
        digest = hashlib.sha256(memoryview(data)[at:]).digest()
        return _Part(replace(head, same=same), objects, text, at, digest)

    def _read_same(self, text: str, at: int) -> tuple[Mapping[str, str], int]:
        # Replicas that are alike say so in the same words.
        for known, same in self._same:
            if text.startswith(known, at):
                return same, at + len(known)
        document, end = codec.value_at(text, at, levels=codec.DEPTH_MAX - 1)
        same = codec.from_json_each(str, document)
        if not self._same:  # one is enough: where ranks hold different parts nothing is alike
            self._same.append((text[at:end], same))
        return same, end

    def _read_objects(self, data: bytes, text: str, at: int) -> tuple[Mapping[str, _Object], int]:
        found: dict[str, _Object] = {}
        names: set[str] = set()
        at = past(text, at, "{")
        if text.startswith("}", at):
            return found, at + 1
        while True:
            name, at = member(text, at, names)
            found[name] = self._recognised(name, data, at) or self._parsed(name, data, text, at)
            at += found[name].known.length
            if text.startswith("}", at):
                return found, at + 1
            at = past(text, at, ",")

    def _recognised(self, name: str, data: bytes, at: int) -> _Object | None:
        """The object that begins at ``at`` if its text is known, which is a whole value and ends there."""
        seen = self._objects.get(name, ())
        for item in seen:
            if data.startswith(item.text, at):
                return item
        for known in self._known.objects.get(name, ()):
            text = data[at : at + known.length]
            if hashlib.sha256(text).digest() == known.digest:
                item = _Object(text, known)
                self._objects.setdefault(name, []).append(item)
                return item
        return None

    def _parsed(self, name: str, data: bytes, text: str, at: int) -> _Object:
        document, end = codec.value_at(text, at, levels=codec.DEPTH_MAX - 2)
        if not isinstance(document, dict) or "value" not in document:
            raise Odd
        value = codec.canonical(document["value"])
        crc = f"{zlib.crc32(value):08x}"
        own = data[at:end]
        if own != b'{"crc":"%b","value":%b}' % (crc.encode(), value):
            raise Odd  # damaged, or not canonical
        digest = hashlib.sha256(own).digest() if len(own) >= OBJECT_BYTES_MIN else b""
        item = _Object(own, Known(len(own), digest, crc))
        self._objects.setdefault(name, []).append(item)
        return item


def _agreed(parts: Sequence[_Part]) -> bytes:
    """The objects of all ranks in canonical JSON, each as the first rank has it."""
    found: dict[str, _Object] = {}
    for part in parts:
        for name, item in part.objects.items():
            if found.setdefault(name, item).known.crc != item.known.crc:
                raise Odd
    return _joined({name: item.text for name, item in found.items()})


def _ends(part: _Part, tensors: Tensors) -> tuple[int, ...]:
    """How long the blobs have to be; those that are not whole were found to lie in their blobs."""
    ends = list(tensors.ends)
    for entry in tensors.others.values():
        for chunk in entry.chunks:
            ends[chunk.b] = max(ends[chunk.b], chunk.off + chunk.len)
    if any(end > blob.bytes for end, blob in zip(ends, part.head.blobs, strict=True)):
        raise Odd
    return tuple(ends)


def _joined(members: Mapping[str, bytes]) -> bytes:
    """A JSON object of texts that are JSON; nothing if it has no members, as records are written."""
    if not members:
        return b""
    return b"{%b}" % b",".join(b"%b:%b" % (codec.canonical(name), members[name]) for name in sorted(members))


def _spliced(document: Mapping[str, Any], texts: Mapping[str, bytes]) -> bytes:
    """Canonical JSON of ``document`` with further members of which the text is there."""
    members = {name: codec.canonical(item) for name, item in document.items()}
    return _joined(members | {name: text for name, text in texts.items() if text})
