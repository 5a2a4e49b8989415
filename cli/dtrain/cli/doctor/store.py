"""Measures a store: everything that a checkpoint asks of it, with blobs that are deleted again."""

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dtrain.cli.doctor import judging
from dtrain.cli.doctor.findings import Check, Verdict, fail, passed, skipped, warn
from dtrain.cli.localstore import open_here
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import PART_BYTES, BlobStore
from dtrain.storage.blobs.probe import PREFIX, probe

RACERS = 8
SPEED_PARTS = 4
LIMIT_S = 60.0
SYNCS = 10


def checks(uri: str) -> list[Check]:
    """What to look at in the store ``uri``."""
    access = _Access(uri)
    looks = {
        "write-once": _overwriting,
        "race": _racing,
        "checksums": _checksums,
        "throughput": _speed,
        "leftovers": _leftovers,
        "disk": _disk,
    }
    return [
        Check("store", "access", access.verdicts, LIMIT_S),
        *(Check("store", name, partial(_each, access, look), LIMIT_S) for name, look in looks.items()),
    ]


class _Access:
    """Whether the store can be used at all, asked once: all else would only say the same again."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._answer: str | DtrainError | None = None

    def answer(self) -> str | DtrainError:
        with self._lock:
            if self._answer is None:
                self._answer = self._ask()
            return self._answer

    def verdicts(self) -> list[Verdict]:
        answer = self.answer()
        if isinstance(answer, DtrainError):
            raise answer
        return [passed(answer)]

    def _ask(self) -> str | DtrainError:
        begun = time.monotonic()
        try:
            with contextlib.closing(open_here(self.uri)) as store:
                probe(store)
        except DtrainError as error:
            return error
        return f"{self.uri} lists, writes, reads, deletes ({time.monotonic() - begun:.2f} s for all)"


def _each(access: _Access, look: Callable[[BlobStore, str], Iterator[Verdict]]) -> Iterator[Verdict]:
    """Look at the store with a folder of this check's own, and leave nothing there."""
    if isinstance(access.answer(), DtrainError):
        yield skipped("the store cannot be used: see store/access")
        return
    with contextlib.closing(open_here(access.uri)) as store:
        folder = f"{PREFIX}doctor-{secrets.token_hex(6)}/"
        try:
            yield from look(store, folder)
        finally:
            with contextlib.suppress(DtrainError):
                for info in list(store.list(folder)):
                    store.delete(info.key)


def _put(store: BlobStore, key: str, data: bytes) -> None:
    parts = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
    store.put(key, parts, chunk_crcs=[digest.crc32c(part) for part in parts])


def _overwriting(store: BlobStore, folder: str) -> Iterator[Verdict]:
    key = f"{folder}once"
    _put(store, key, b"first")
    try:
        _put(store, key, b"other")
    except Refused as error:
        if error.code is not ErrorCode.BLOB_EXISTS:
            raise
    held = store.get(key)
    if held == b"first":
        yield passed("what is there is not overwritten")
    else:
        yield fail(
            "it overwrites a blob that is there: conditional writes (If-None-Match) do not count",
            "use a store that refuses them with 412: they are the second belt behind etcd",
        )


def _racing(store: BlobStore, folder: str) -> Iterator[Verdict]:
    """Several writers of one new key at once: one may win."""
    key, won, errors = f"{folder}race", list[int](), list[str]()
    start = threading.Barrier(RACERS)

    def write(number: int) -> None:
        start.wait()
        try:
            _put(store, key, b"writer %d" % number)
            won.append(number)
        except Refused as error:
            if error.code is not ErrorCode.BLOB_EXISTS:
                errors.append(error.message)
        except DtrainError as error:
            # Whether it was written is then not known: no verdict hangs on it.
            errors.append(error.message)

    racers = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    if len(won) == 1:
        yield passed(f"of {RACERS} writers of one name at once, one was told that it had written")
    elif not won:
        yield warn(f"of {RACERS} writers of one name at once, none succeeded: {errors[:1]}", "try again")
    else:
        yield warn(
            f"of {RACERS} writers of one name at once, {len(won)} were told that they had written",
            "nothing to do: dtrain never uses a name twice, and etcd decides what counts",
        )


def _checksums(store: BlobStore, folder: str) -> Iterator[Verdict]:
    key, data = f"{folder}checked", b"not what the checksum says"
    try:
        store.put(key, [data], chunk_crcs=[digest.crc32c(data) ^ 1])
    except Refused as error:
        if error.code is not ErrorCode.BLOB_CORRUPT:
            raise
        yield passed("a blob that is not what its CRC32C says is refused")
    else:
        yield warn(
            "it accepts a blob that is not what its CRC32C says",
            "only dtrain's own digests then find damage, when a checkpoint is verified or restored",
        )


def _speed(store: BlobStore, folder: str) -> Iterator[Verdict]:
    key, data = f"{folder}speed", os.urandom(PART_BYTES) * SPEED_PARTS
    begun = time.monotonic()
    _put(store, key, data)
    written = time.monotonic()
    if store.get(key) != data:
        yield fail("it returns other bytes than were written", "do not use this store")
        return
    read = time.monotonic()
    yield judging.store_speed("wrote", len(data), written - begun)
    yield judging.store_speed("read", len(data), read - written)


def _leftovers(store: BlobStore, _folder: str) -> Iterator[Verdict]:
    # The other checks upload at this moment.
    unfinished = sum(1 for token in store.list_unfinished("") if PREFIX not in token)
    if unfinished:
        yield warn(
            f"{unfinished} uploads were begun and not ended; those of dtrain are collected",
            "a lifecycle rule AbortIncompleteMultipartUpload of a few days takes what others left",
        )
    else:
        yield passed("no upload was left unfinished")


def _disk(store: BlobStore, _folder: str) -> Iterator[Verdict]:
    place = urlsplit(store.uri)
    if place.scheme != "file":
        yield skipped("it is no folder")
        return
    root = Path(unquote(place.path))
    yield judging.free_space(str(root), shutil.disk_usage(root).free)
    path = root / f".doctor-{secrets.token_hex(6)}"
    try:
        with path.open("wb") as file:
            begun = time.monotonic()
            for _ in range(SYNCS):
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
            took_s = (time.monotonic() - begun) / SYNCS
    finally:
        path.unlink(missing_ok=True)
    yield passed(f"a sync to this disk takes {took_s * 1000:.1f} ms")
