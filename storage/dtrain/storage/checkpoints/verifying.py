"""Whether a committed checkpoint is what was committed: all of it, a chunk of it, or its outlines."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry, Manifest
from dtrain.protocol.errors import ErrorCode, NotFound, Refused, Unavailable
from dtrain.runtime import retry
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.checkpoints.reading import (
    LANES,
    Damage,
    DamageFound,
    read_chunk,
    read_manifest,
    tensors_in,
)

DAMAGE_TOLD_MAX = 100
"""One rotten disk can damage every chunk: the first of them say it."""

Progress = Callable[[int, int], None]
"""Bytes verified so far, and bytes in all."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a whole read found; no ``damages``: every byte is what was committed."""

    bytes: int
    blobs: int
    damages: tuple[Damage, ...] = ()
    step: int = 0


class Stopped(Exception):
    """Reading was told to stop before it had an answer."""


class Pace:
    """Keeps reading below ``bytes_per_s`` (0: no limit). For one reader at a time."""

    def __init__(
        self,
        bytes_per_s: float = 0.0,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._rate = bytes_per_s
        self._monotonic = monotonic
        self._pause = pause
        self._free_at = monotonic()

    def spend(self, count: int) -> None:
        """Wait until ``count`` bytes may be read."""
        if self._rate <= 0:
            return
        now = self._monotonic()
        if self._free_at > now:
            self._pause(self._free_at - now)
        self._free_at = max(now, self._free_at) + count / self._rate


def verify(
    store: BlobStore,
    manifest_key: str,
    sha256: str,
    *,
    lanes: int = LANES,
    pace: Pace | None = None,
    on_progress: Progress = lambda _done, _total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Report:
    """Read every byte of a checkpoint; what is wrong is read twice before it is called damage.

    Raises:
        Stopped: ``stopped`` said so.
        Unavailable, Refused: the store does not answer, or will not.
    """
    try:
        manifest = read_manifest(store, manifest_key, sha256)
    except DamageFound as found:
        _check_present(store, manifest_key)
        return Report(0, 0, (found.damage,))
    total = sum(blob.bytes for blob in manifest.blobs)
    damages: list[Damage] = []
    done = 0
    for length, damage in _read_all(store, manifest, lanes=lanes, pace=pace or Pace(), stopped=stopped):
        done += length
        if damage is not None and len(damages) < DAMAGE_TOLD_MAX:
            damages.append(damage)
        on_progress(done, total)
    damages.sort(key=lambda damage: (damage.blob, damage.chunk))
    return Report(done, len(manifest.blobs), tuple(damages), manifest.step)


def verify_chunk(store: BlobStore, manifest_key: str, sha256: str, blob: str, chunk: int) -> Damage | None:
    """Read one chunk, or the manifest if ``blob`` names it; None: it is what was committed.

    Raises:
        Refused: the checkpoint has no such chunk; or as ``verify``.
    """
    try:
        manifest = read_manifest(store, manifest_key, sha256)
    except DamageFound as found:
        _check_present(store, manifest_key)
        return found.damage
    if blob == manifest_key:
        return None
    index = next((i for i, entry in enumerate(manifest.blobs) if entry.key == blob), None)
    if index is None or not 0 <= chunk < len(manifest.blobs[index].chunks):
        raise Refused(ErrorCode.USAGE, f"checkpoint {manifest.seq} has no chunk {chunk} of {blob[:200]!r}")
    try:
        read_chunk(store, manifest, index, chunk)
    except DamageFound as found:
        return found.damage
    return None


def verify_heads(store: BlobStore, manifest_key: str, sha256: str) -> Damage | None:
    """Look whether the manifest and every blob are there, as long as they were, by the store's own word.

    Raises:
        Unavailable, Refused: as ``verify``.
    """
    try:
        manifest = read_manifest(store, manifest_key, sha256)
    except DamageFound as found:
        _check_present(store, manifest_key)
        return found.damage
    for index, blob in enumerate(manifest.blobs):
        seen = _look(store, blob) and _look(store, blob)
        if seen:
            tensors = tensors_in(manifest, index, 0, blob.bytes)
            return Damage(blob.key, 0, blob.crc, seen, blob.rank, tensors)
    return None


def _look(store: BlobStore, blob: BlobEntry) -> str:
    """What the store says of a blob if that is not what was committed, else ""."""
    try:
        info = retry.call(lambda: store.head(blob.key), idempotent=True)
    except NotFound:
        return "missing"
    if info.size_bytes != blob.bytes:
        return f"{info.size_bytes} bytes long"
    return info.crc32c if info.crc32c and info.crc32c.lower() != blob.crc.lower() else ""


def _read_all(
    store: BlobStore,
    manifest: Manifest,
    *,
    lanes: int,
    pace: Pace,
    stopped: Callable[[], bool],
) -> Iterator[tuple[int, Damage | None]]:
    gone = threading.Event()

    def one(index: int, number: int) -> tuple[int, Damage | None]:
        if gone.is_set():
            return 0, None
        try:
            return len(read_chunk(store, manifest, index, number)), None
        except DamageFound as found:
            return min(CHUNK_BYTES, manifest.blobs[index].bytes - number * CHUNK_BYTES), found.damage

    chunks = (
        (index, number) for index, blob in enumerate(manifest.blobs) for number in range(len(blob.chunks))
    )
    if lanes == 1:
        for index, number in chunks:
            if stopped():
                raise Stopped
            pace.spend(CHUNK_BYTES)
            yield one(index, number)
        return
    running: set[Future[tuple[int, Damage | None]]] = set()
    with ThreadPoolExecutor(lanes, thread_name_prefix="verify") as pool:
        try:
            for index, number in chunks:
                if stopped():
                    raise Stopped
                pace.spend(CHUNK_BYTES)
                running.add(pool.submit(one, index, number))
                if len(running) >= 2 * lanes:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for each in done:
                        yield each.result()
            for each in running:
                yield each.result()
        finally:
            gone.set()


def _check_present(store: BlobStore, manifest_key: str) -> None:
    """A store without anything of the job is no damage: it is not mounted, or another one."""
    root = manifest_key.partition("/manifests/")[0]
    if next(iter(store.list(f"{root}/")), None) is None:
        raise Unavailable(
            ErrorCode.STORE_UNAVAILABLE,
            f"{store.uri} holds nothing of this job at all: it is not the store that was written to",
            fix="look whether it is mounted, and whether the URI is right",
        )
