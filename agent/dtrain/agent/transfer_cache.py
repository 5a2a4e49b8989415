"""Files that spare a restart the store: manifests of committed checkpoints and, if it is given room, blobs.

A cache and nothing else. It is looked into only for what a committed manifest
names, what is found is verified, and whatever is missing, cut short or wrong is
read from the store. So nothing here is synced, and any file may be deleted at
any time.
"""

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path

from dtrain.protocol.ids import Seq, Uid
from dtrain.runtime import log

MANIFESTS_MAX = 16
_INCOMING = ".incoming-"

_log = log.get("transfer.cache")


class Cache:
    """A folder. ``folder`` None: there is none, nothing is ever found."""

    def __init__(self, folder: Path | None = None, size_bytes_max: int = 0) -> None:
        self._folder = folder
        self._size_max = size_bytes_max
        self._lock = threading.Lock()
        if folder is not None:
            self._tidy(folder)

    @property
    def keeps_blobs(self) -> bool:
        return self._folder is not None and self._size_max > 0

    # Manifests

    def manifest(self, digest: str) -> bytes | None:
        """Return the manifest with this SHA-256, verified, or None."""
        path = self._manifest_path(digest)
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def keep_manifest(self, digest: str, data: bytes) -> None:
        """Keep a manifest; of all of them, the newest ones stay."""
        path = self._manifest_path(digest)
        if path is not None:
            self._write(path, [data])
            self._evict(path.parent, path, count_max=MANIFESTS_MAX)

    # Blobs

    def find(self, key: str) -> Path | None:
        """Return the file that was kept for this blob, or None. Its bytes are yet to be verified."""
        path = self._blob_path(key)
        return path if path is not None and path.is_file() else None

    def keep(self, key: str, parts: Iterable[bytes | memoryview], size_bytes: int) -> None:
        """Keep a blob, in place of the oldest ones if need be. A failure is only logged."""
        path = self._blob_path(key)
        if path is None or size_bytes > self._size_max:
            return
        self._evict(path.parent, path, size_max=self._size_max - size_bytes)
        self._write(path, parts)
        self._evict(path.parent, path, size_max=self._size_max)

    def forget(self, uid: Uid, seq: Seq) -> None:
        """The checkpoint was aborted: its blobs are worth nothing."""
        if not self.keeps_blobs:
            return
        assert self._folder is not None
        for path in _files(self._folder / "blobs"):
            if f",{uid},blobs,{seq:020d}," in path.name:
                path.unlink(missing_ok=True)

    # Files

    def _manifest_path(self, digest: str) -> Path | None:
        return None if self._folder is None else self._folder / "manifests" / f"{digest}.json.gz"

    def _blob_path(self, key: str) -> Path | None:
        if not self.keeps_blobs:
            return None
        assert self._folder is not None
        # Keys hold no comma, so that no two of them share a name.
        name = key.replace("/", ",")
        return None if len(name) > 250 or "," in key else self._folder / "blobs" / name

    def _write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        incoming = path.with_name(f"{_INCOMING}{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with incoming.open("xb", buffering=0) as file:
                for part in parts:
                    _write_all(file.fileno(), part)
            incoming.replace(path)
        except OSError as error:
            _log.warning("cache_not_written", path=str(path), error=str(error))
            with contextlib.suppress(OSError):
                incoming.unlink(missing_ok=True)

    def _evict(
        self, folder: Path, newest: Path, *, size_max: int | None = None, count_max: int | None = None
    ) -> None:
        """Delete the oldest files until the bounds hold; ``newest`` stays."""
        with self._lock:
            found = []
            for path in _files(folder):
                with contextlib.suppress(OSError):
                    about = path.stat()
                    found.append((about.st_mtime_ns, about.st_size, path))
            found.sort()
            size, count = sum(one[1] for one in found), len(found)
            for _, size_bytes, path in found:
                over = (size_max is not None and size > size_max) or (
                    count_max is not None and count > count_max
                )
                if not over:
                    return
                if path != newest:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
                        size, count = size - size_bytes, count - 1

    def _tidy(self, folder: Path) -> None:
        """Delete what a former life left half written, and blobs that no longer have room."""
        for part in ("manifests", "blobs"):
            for path in _files(folder / part, all_of_them=True):
                if path.name.startswith(_INCOMING):
                    with contextlib.suppress(OSError):
                        path.unlink()
        self._evict(folder / "blobs", folder, size_max=self._size_max)


def _files(folder: Path, *, all_of_them: bool = False) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in found if all_of_them or not path.name.startswith(_INCOMING)]


def _write_all(fd: int, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while view:
        view = view[os.write(fd, view) :]
