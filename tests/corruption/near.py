"""Damage to the copies near by: sealed arenas of this machine and its cache, where a restart reads first.

They are nobody's promise: a rank may have written over its arena, and a file of the
cache may be anything. So a restore must come out right from whatever tier is sound,
and say what is damaged if none is. Also while it runs: a place that changes after the
rank was told of it, and where the agent verifies, after that, before it is copied.
"""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transferring import FetchFailed, KeptBlob, TransferReport
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import Begin
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from tests.corruption import making, ranks
from tests.corruption.making import Committed, Folder, Uploads

CACHE_BYTES = 1 << 30
SEED = 4242


@dataclass(slots=True)
class Place:
    """One machine that saved as two ranks, with its arenas and its cache; and the store."""

    shelf: Folder
    committed: Committed
    arenas: dict[str, int]
    """Blob key to the arena that it was uploaded from."""
    cache: Path
    pristine: dict[str, bytes] = field(default_factory=dict)

    def cache_files(self) -> list[Path]:
        """Of blobs, not of manifests."""
        return sorted(path for path in (self.cache / "blobs").iterdir() if path.is_file())

    def order(self, *, arenas: bool) -> Any:
        kept = tuple(
            KeptBlob(key, f"/proc/{os.getpid()}/fd/{fd}", 0, len(self.pristine[key]))
            for key, fd in (self.arenas if arenas else {}).items()
        )
        everyone = tuple(Rank(rank) for rank in range(self.committed.uploads.world))
        return replace(
            self.committed.order,
            on_demand=True,
            kept=kept,
            ranks=everyone,
            world=self.committed.uploads.world,
        )

    def close(self) -> None:
        for fd in self.arenas.values():
            os.close(fd)

    def mend(self) -> None:
        """Everything is as it was."""
        for key, fd in self.arenas.items():
            os.pwrite(fd, self.pristine[key], 0)
        cache = Cache(self.cache, CACHE_BYTES)
        for path in self.cache_files():
            path.unlink()
        for key in self.arenas:
            cache.keep(key, [self.pristine[key]], len(self.pristine[key]))
            self.shelf.write(key, self.pristine[key])
        order = self.committed.order
        cache.keep_manifest(order.digest, self.pristine[order.manifest])
        self.shelf.write(order.manifest, self.pristine[order.manifest])


def new_place(folder: Path) -> Place:
    """Save as two ranks of one machine."""
    shelf, world = Folder(folder / "store"), 2
    parts, held, fds = [], [], []
    for rank in range(world):
        state = making.tracked(SEED, rank, world)
        making.stir(SEED * 100 + rank)
        held.append((making.fingerprint(state), making.generators()))
        # The name that launchers give theirs: only such memory counts as an arena.
        fds.append(os.memfd_create(f"dtrain-arena-{rank}"))
        sealed = Saver(state, rank, world, Arena(fds[-1])).seal(Begin(Seq(7), "near", Step(70)))
        parts.append(making.upload(shelf.store, making.upload_order(sealed, rank, world, 1, shelf.store.uri)))
    uploads = Uploads(making.opened(parts, world), tuple(held), SEED, 0)
    verdict = making.verify(shelf.store, uploads)
    assert verdict.ok, verdict.problem
    committed = making.commit(shelf.store, uploads, verdict)
    arenas = {blob.key: fds[blob.rank] for blob in committed.manifest.blobs}
    (folder / "cache" / "blobs").mkdir(parents=True)
    place = Place(shelf, committed, arenas, folder / "cache")
    for key in (committed.order.manifest, *arenas):
        place.pristine[key] = shelf.read(key)
    place.mend()
    return place


def restore(
    place: Place, *, arenas: bool, between: Callable[[], None] = lambda: None
) -> FetchFailed | list[int]:
    """Restore every rank; those that hold something else than they saved, or what was said to be damaged."""
    reports: list[TransferReport] = []
    store = place.shelf.store
    fetcher = Fetcher(
        lambda _uri: store, reports.append, cache=Cache(place.cache, CACHE_BYTES), deadline_s=5.0
    )
    try:
        return ranks.restored(
            fetcher, reports, place.order(arenas=arenas), place.committed.uploads, between=between
        )
    finally:
        # Without what it would copy into the cache: the next case has its own.
        fetcher._cache = Cache()


# Damage -------------------------------------------------------------------------


def _harm(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Another content of the same length."""
    kind = rng.randrange(4)
    out = bytearray(data)
    at = rng.randrange(len(out))
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + 4096] = rng.randbytes(len(out[at : at + 4096]))
    elif kind == 2:
        half = len(out) // 2
        out = bytearray(other[: len(out)].ljust(len(out), b"\0")[:half] + out[half:])
    else:
        out = bytearray(len(out))
    return bytes(out)


def harm_arena(place: Place, rng: random.Random) -> None:
    """An arena holds something else: the next snapshot, in part or whole, or noise."""
    key, other = rng.sample(sorted(place.arenas), 2)
    os.pwrite(place.arenas[key], _harm(place.pristine[key], place.pristine[other], rng), 0)


def harm_cache(place: Place, rng: random.Random) -> None:
    """A file of the cache is cut, gone, exchanged or changed."""
    files = place.cache_files()
    path = rng.choice(files)
    data = path.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.write_bytes(_harm(data, rng.choice(files).read_bytes(), rng))


def harm_cached_manifest(place: Place, rng: random.Random) -> None:
    path = next(iter((place.cache / "manifests").iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def harm_store(place: Place, rng: random.Random) -> None:
    key = rng.choice(sorted(place.arenas))
    data = bytearray(place.pristine[key])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    place.shelf.write(key, bytes(data))


Harm = Callable[[Place, random.Random], None]
CASES: Mapping[str, tuple[tuple[Harm, ...], bool]] = {
    "arena": ((harm_arena,), True),
    "cache": ((harm_cache,), False),
    "cached manifest": ((harm_cached_manifest,), True),
    "arena and cache": ((harm_arena, harm_cache), True),
    "store behind a sound arena": ((harm_store,), True),
    "store behind a sound cache": ((harm_store,), False),
}
"""What is damaged, and whether the arenas are still there: some tier is always sound."""


def play(place: Place, name: str, rng: random.Random) -> str:
    """One case; "" if every rank holds what it saved."""
    harms, arenas = CASES[name]
    try:
        for harm in harms:
            harm(place, rng)
        found = restore(place, arenas=arenas)
    finally:
        place.mend()
    return "" if found == [] else f"{name}: {found}"


def play_everywhere(place: Place, rng: random.Random) -> str:
    """No sound copy of one blob is left: that must be said, with the evidence."""
    key = rng.choice(sorted(place.arenas))
    data = bytearray(place.pristine[key])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        os.pwrite(place.arenas[key], data, 0)
        next(path for path in place.cache_files() if path.name.endswith(key.rpartition("/")[2])).write_bytes(
            bytes(data)
        )
        place.shelf.write(key, bytes(data))
        found = restore(place, arenas=True)
    finally:
        place.mend()
    if (
        isinstance(found, FetchFailed)
        and found.bad is not None
        and (found.bad.blob, found.bad.chunk) == (key, 0)
    ):
        return ""
    return f"no sound copy of {key}: {found}"


def play_under_way(place: Place, rng: random.Random, *, arenas: bool) -> str:
    """An arena, or a file of the cache, changes after the rank was told to read there."""
    harm, when = (harm_arena, rng.randrange(2)) if arenas else (_write_into_cache, rng.randrange(2))
    asked = [0]

    def change() -> None:
        asked[0] += 1
        if asked[0] == when + 1:
            harm(place, rng)

    try:
        found = restore(place, arenas=arenas, between=change)
    finally:
        place.mend()
    assert asked[0] > when, "nothing was changed"
    return "" if found == [] else f"a place changed under way: {found}"


def _write_into_cache(place: Place, rng: random.Random) -> None:
    """Into the file itself: another one of its name would not be looked at any more."""
    path = rng.choice(place.cache_files())
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(_harm(data, bytes(len(data)), rng))
