"""What can happen to bytes at rest: each kind draws one damage of a committed checkpoint."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry
from tests.corruption.making import Committed

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Damage:
    """``files``: what the store holds under these keys instead; None: nothing."""

    kind: str
    said: str
    files: Mapping[str, bytes | None]


@dataclass(frozen=True, slots=True)
class Scene:
    """One checkpoint to damage, and others whose bytes may turn up in its place."""

    target: Committed
    others: tuple[Committed, ...]
    pristine: Mapping[str, bytes]

    def blob(self, rng: random.Random) -> BlobEntry:
        return rng.choice(self.target.manifest.blobs)


Kind = Callable[[Scene, random.Random], "Damage | None"]


def _flip(data: bytes, at: int, bit: int) -> bytes:
    out = bytearray(data)
    out[at] ^= 1 << bit
    return bytes(out)


def _flip_in(scene: Scene, rng: random.Random, kind: str, key: str, low: int, high: int) -> Damage:
    at, bit = rng.randrange(low, high), rng.randrange(8)
    return Damage(kind, f"bit {bit} of byte {at} of {key}", {key: _flip(scene.pristine[key], at, bit)})


def flip_header(scene: Scene, rng: random.Random) -> Damage:
    """One bit of the safetensors header, its length included."""
    key = scene.blob(rng).key
    length = 8 + int.from_bytes(scene.pristine[key][:8], "little")
    return _flip_in(scene, rng, "flip header", key, 0, length)


def flip_data(scene: Scene, rng: random.Random) -> Damage:
    """One bit of the tensors' bytes."""
    key = scene.blob(rng).key
    data = scene.pristine[key]
    return _flip_in(scene, rng, "flip data", key, 8 + int.from_bytes(data[:8], "little"), len(data))


def flip_edge(scene: Scene, rng: random.Random) -> Damage:
    """One bit of the first or last byte of a blob, a chunk, or of the header's padding."""
    key = scene.blob(rng).key
    data = scene.pristine[key]
    header = 8 + int.from_bytes(data[:8], "little")
    borders = {0, header - 1, header, len(data) - 1}
    for border in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
        borders |= {border - 1, border}
    at, bit = rng.choice(sorted(borders)), rng.randrange(8)
    return Damage("flip edge", f"bit {bit} of byte {at} of {key}", {key: _flip(data, at, bit)})


def flip_manifest(scene: Scene, rng: random.Random) -> Damage:
    """One bit of the gzipped manifest."""
    key = scene.target.order.manifest
    return _flip_in(scene, rng, "flip manifest", key, 0, len(scene.pristine[key]))


def burst(scene: Scene, rng: random.Random) -> Damage:
    """Random bytes over a stretch, as a misdirected write leaves them."""
    key = scene.blob(rng).key
    data = bytearray(scene.pristine[key])
    length = rng.choice((2, 17, 512, PAGE_BYTES))
    at = rng.randrange(max(1, len(data) - length))
    data[at : at + length] = rng.randbytes(min(length, len(data) - at))
    return Damage("burst", f"{length} random bytes at {at} of {key}", {key: bytes(data)})


def zero_page(scene: Scene, rng: random.Random) -> Damage:
    """A page or sector of zeros: what a file system may show after a crash."""
    key = scene.blob(rng).key
    data = bytearray(scene.pristine[key])
    size = rng.choice((512, PAGE_BYTES, 16 * PAGE_BYTES))
    at = rng.randrange(-(-len(data) // size)) * size
    end = min(len(data), at + size)
    data[at:end] = bytes(end - at)
    return Damage("zero page", f"zeros from {at} to {end} of {key}", {key: bytes(data)})


def swap_chunks(scene: Scene, rng: random.Random) -> Damage | None:
    """Two chunks of a blob change places; of a blob with one chunk, two pages."""
    key = scene.blob(rng).key
    data = bytearray(scene.pristine[key])
    size = CHUNK_BYTES if len(data) > 2 * CHUNK_BYTES else PAGE_BYTES
    whole = len(data) // size
    if whole < 2:
        return None
    first, second = (size * number for number in rng.sample(range(whole), 2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return Damage("swap chunks", f"{size} bytes at {first} and {second} of {key}", {key: bytes(data)})


def swap_ranks(scene: Scene, rng: random.Random) -> Damage | None:
    """The blobs of two ranks change places."""
    if len(scene.target.manifest.blobs) < 2:
        return None
    one, two = (blob.key for blob in rng.sample(scene.target.manifest.blobs, 2))
    return Damage("swap ranks", f"{one} and {two}", {one: scene.pristine[two], two: scene.pristine[one]})


def zombie(scene: Scene, rng: random.Random) -> Damage | None:
    """The blob that another step or a former attempt wrote for the same rank, under this one's name."""
    blob = scene.blob(rng)
    other = rng.choice(scene.others)
    theirs = [their.key for their in other.manifest.blobs if their.rank == blob.rank]
    if not theirs:
        return None
    was = f"attempt {other.manifest.attempt}, step {other.manifest.step}"
    return Damage("zombie", f"{blob.key} is of {was}", {blob.key: scene.pristine[theirs[0]]})


def zombie_manifest(scene: Scene, rng: random.Random) -> Damage:
    """A good manifest of another checkpoint under this one's name: sound, and not the one committed."""
    other = rng.choice(scene.others)
    key = scene.target.order.manifest
    return Damage(
        "zombie manifest",
        f"{key} is of checkpoint {other.manifest.seq}",
        {key: scene.pristine[other.order.manifest]},
    )


def truncate(scene: Scene, rng: random.Random) -> Damage:
    """A blob ends early, at any length."""
    key = scene.blob(rng).key
    size = len(scene.pristine[key])
    length = rng.choice((0, 1, 7, 8, size - 1, rng.randrange(size), rng.randrange(size)))
    return Damage("truncate", f"{key} to {length} of {size}", {key: scene.pristine[key][:length]})


def truncate_manifest(scene: Scene, rng: random.Random) -> Damage:
    """The manifest ends early."""
    key = scene.target.order.manifest
    length = rng.randrange(len(scene.pristine[key]))
    return Damage("truncate manifest", f"{key} to {length}", {key: scene.pristine[key][:length]})


def insert(scene: Scene, rng: random.Random) -> Damage:
    """A stretch of a blob is there twice, and all behind it has moved."""
    key = scene.blob(rng).key
    data = scene.pristine[key]
    at, length = rng.randrange(len(data)), rng.choice((1, 64, PAGE_BYTES))
    moved = data[: at + length] + data[at:]
    return Damage("duplicate inside", f"{length} bytes at {at} of {key} twice", {key: moved})


def cut_out(scene: Scene, rng: random.Random) -> Damage:
    """A stretch is missing, and the blob is filled up to its length."""
    key = scene.blob(rng).key
    data = scene.pristine[key]
    length = rng.choice((1, 64, PAGE_BYTES))
    at = rng.randrange(max(1, len(data) - length))
    moved = (data[:at] + data[at + length :]).ljust(len(data), b"\0")
    return Damage("cut out", f"{length} bytes at {at} of {key}", {key: moved})


def extend(scene: Scene, rng: random.Random) -> Damage:
    """Bytes follow the last one that was committed."""
    key = scene.blob(rng).key
    more = rng.randbytes(rng.choice((1, 64, PAGE_BYTES)))
    return Damage("extend", f"{key} by {len(more)}", {key: scene.pristine[key] + more})


def extend_manifest(scene: Scene, rng: random.Random) -> Damage:
    """Bytes follow the manifest's last one: gzip readers would not mind."""
    key = scene.target.order.manifest
    more = rng.choice((b"\0", rng.randbytes(64)))
    return Damage("extend manifest", f"{key} by {len(more)}", {key: scene.pristine[key] + more})


def delete(scene: Scene, rng: random.Random) -> Damage:
    """A blob is gone."""
    key = scene.blob(rng).key
    return Damage("delete", key, {key: None})


def delete_manifest(scene: Scene, rng: random.Random) -> Damage:
    """The manifest is gone."""
    return Damage("delete manifest", scene.target.order.manifest, {scene.target.order.manifest: None})


def duplicate(scene: Scene, rng: random.Random) -> Damage:
    """A copy of a blob or manifest lies under a name that looks like one of ours."""
    key = rng.choice((scene.blob(rng).key, scene.target.order.manifest))
    stem, dot, ending = key.rpartition("/")[2].partition(".")
    copy = f"{key.rpartition('/')[0]}/{stem[:-4]}{rng.getrandbits(16):04x}{dot}{ending}"
    return Damage("duplicate file", f"{key} as {copy}", {copy: scene.pristine[key]})


AT_REST: tuple[Kind, ...] = (
    flip_header,
    flip_data,
    flip_edge,
    flip_manifest,
    burst,
    zero_page,
    swap_chunks,
    swap_ranks,
    zombie,
    zombie_manifest,
    truncate,
    truncate_manifest,
    insert,
    cut_out,
    extend_manifest,
    delete,
    delete_manifest,
)

UNREAD: tuple[Kind, ...] = (extend, duplicate)
"""Bytes that nobody committed: all that was committed is there, and they are never read."""


def draw(kind: Kind, scene: Scene, rng: random.Random) -> Damage:
    """A damage of this kind that changes at least one byte."""
    for _ in range(1000):
        found = kind(scene, rng)
        if found is not None and any(scene.pristine.get(key) != data for key, data in found.files.items()):
            return found
    raise AssertionError(f"{kind.__name__} changes nothing")


def touched(scene: Scene, damage: Damage) -> set[tuple[str, int]]:
    """(key, chunk) of every committed byte that is not what it was; empty: none is."""
    found: set[tuple[str, int]] = set()
    blobs = {blob.key for blob in scene.target.manifest.blobs}
    for key, data in damage.files.items():
        before = scene.pristine.get(key)
        if before is None:
            continue
        if key not in blobs:
            found |= {(key, 0)} if data != before else set()
            continue
        for number, at in enumerate(range(0, len(before), CHUNK_BYTES)):
            if data is None or data[at : min(at + CHUNK_BYTES, len(before))] != before[at : at + CHUNK_BYTES]:
                found.add((key, number))
    return found
