"""Blobs as files of one folder: a disk for one machine, a network mount for several.

A blob is written under ``.incoming/<nonce>/<key>``, synced, and then *linked* to
its key: a link, unlike a rename, fails where the key exists, so that nothing is
ever overwritten and a reader sees whole blobs only. The name is durable once the
folder that holds it, and every folder above it up to the root, is synced.

The file system must have hard links, and they must be atomic (NFS's are).

Whoever dies here leaves files in ``.incoming`` or folders without a file. Both are
told by ``list_unfinished``. A folder may be taken from anybody: ``rmdir`` refuses
one that holds something, and a writer that loses an empty one makes it again.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from mmap import mmap
from pathlib import Path

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import digest, outcomes
from dtrain.storage.blobs.flow import PIECE_BYTES, Flow
from dtrain.storage.blobs.mounts import file_system
from dtrain.storage.blobs.port import PART_BYTES, BlobInfo, check_key, check_prefix

INCOMING = ".incoming"

DIRECT_FROM_BYTES = 4 * 1024 * 1024
"""Blobs as long are written past the page cache, on ``DIRECT_ON``."""

DIRECT_ON = frozenset({"ext4", "xfs"})
"""Over a network each such write would be waited for."""

BLOCK_BYTES = 4096
"""Of such writes: a multiple of what any disk asks for."""

_TOKEN = re.compile(r"(?P<key>.+)\?upload=(?P<nonce>[0-9a-f]{16})")
_NONCE = re.compile(r"[0-9a-f]{16}")
_EMPTY = re.compile(r"(?:(?P<folder>.+)/)?\?empty(?:=(?P<nonce>[0-9a-f]{16}))?")
_REMAKE_LIMIT = 5
"""How often a writer makes folders again that somebody took, empty until then, between two calls."""
_SYNCED_MAX = 64


class LocalBlobs:
    """Implements ``BlobStore`` in a folder, which must exist: a missing one may be a lost mount."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._synced: OrderedDict[Path, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    def put(
        self,
        key: str,
        parts: Sequence[bytes | memoryview],
        *,
        chunk_crcs: Sequence[int],
        flow: Flow | None = None,
    ) -> BlobInfo:
        path = self._path(key)
        flow = flow or Flow()
        chunks = outcomes.views(parts, chunk_crcs)
        size = sum(len(chunk) for chunk in chunks)
        upload = self._root / INCOMING / secrets.token_hex(8)
        incoming = upload / key
        try:
            _write(self._begin(incoming), key, chunks, chunk_crcs, flow)
            linked = self._link(incoming, path, key)
        except OSError as error:
            raise self._translate(error, key, writing=True) from error
        finally:
            shutil.rmtree(upload, ignore_errors=True)
        try:
            if not linked:
                self._check_same(path, key, size, chunk_crcs)
            self._sync_folder(path.parent)
        except OSError as error:
            raise self._translate(error, key, writing=True, named=True) from error
        flow.confirmed(size)
        return BlobInfo(key, size, digest.to_hex(digest.full_crc(chunk_crcs, size, PART_BYTES)))

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        outcomes.check_range(offset, length)
        try:
            with self._path(key).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                wanted = size - offset if length is None else length
                if wanted < 0 or offset + wanted > size:
                    raise outcomes.short(key, offset=offset, wanted=length, found=max(0, size - offset))
                return _read(file.fileno(), key, offset, wanted)
        except OSError as error:
            raise self._translate(error, key) from error

    def get_into(self, key: str, offset: int, buffer: bytearray | memoryview | mmap) -> None:
        view = outcomes.target(buffer)
        outcomes.check_range(offset, len(view))
        try:
            with self._path(key).open("rb", buffering=0) as file:
                _read_into(file.fileno(), key, offset, view)
        except OSError as error:
            raise self._translate(error, key) from error

    def head(self, key: str) -> BlobInfo:
        try:
            found = self._path(key).stat()
        except OSError as error:
            raise self._translate(error, key) from error
        if not stat.S_ISREG(found.st_mode):
            raise outcomes.missing(key, self.uri)
        return BlobInfo(key, found.st_size)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        folder = self._root / check_prefix(prefix).rpartition("/")[0]
        for key, size in self._walk(folder, self._root, prefix):
            yield BlobInfo(key, size)

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        try:
            nonces = sorted(entry.name for entry in os.scandir(self._root / INCOMING) if entry.is_dir())
        except FileNotFoundError:
            self._check_root()
            nonces = []
        except OSError as error:
            raise self._translate(error, prefix) from error
        for nonce in nonces:
            if not _NONCE.fullmatch(nonce):
                continue
            upload = self._root / INCOMING / nonce
            alone = True
            for key, _size in self._walk(upload, upload, ""):
                alone = False
                if key.startswith(prefix):
                    yield f"{key}?upload={nonce}"
            if alone:
                # How far its writer came before it died, or is now: for which key is known only at the end.
                made = _deepest(upload)
                if (made + "/").startswith(prefix) or prefix.startswith(made + "/" if made else ""):
                    yield f"{made}/?empty={nonce}" if made else f"?empty={nonce}"
        for folder in self._empty_folders(self._root / prefix.rpartition("/")[0]):
            if f"{folder}/".startswith(prefix):
                yield f"{folder}/?empty"

    def discard_unfinished(self, token: str) -> None:
        if empty := _EMPTY.fullmatch(token):
            self._remove_empty(empty["folder"] or "", empty["nonce"] or "")
            return
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(f"bad upload token {token!r}")
        check_key(match["key"])
        # The writer may still live: its file goes first, so that its link fails and it learns.
        try:
            shutil.rmtree(self._root / INCOMING / match["nonce"])
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._translate(error, match["key"]) from error

    def delete(self, key: str) -> None:
        path = self._path(key)
        # Not synced: a blob that comes back after a power cut is garbage that the next pass finds.
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
        except OSError as error:
            raise self._translate(error, key) from error
        self._remove_upwards(path.parent, self._root)

    def close(self) -> None:
        """Do nothing: no file stays open between calls."""

    def file_of(self, key: str) -> Path:
        """The file that holds this blob, if there is one: to read it without a copy."""
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _check_root(self) -> None:
        if not self._root.is_dir():
            raise missing_root(self._root)

    def _begin(self, incoming: Path) -> int:
        """Create the file that a blob is written to; return its descriptor."""
        (self._root / INCOMING).mkdir(exist_ok=True)
        for _ in range(_REMAKE_LIMIT):
            try:
                incoming.parent.mkdir(parents=True, exist_ok=True)
                return os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                self._check_root()
        raise _keeps_being_removed(incoming)

    def _link(self, incoming: Path, path: Path, key: str) -> bool:
        """Give the blob its name; False if the key is taken."""
        for _ in range(_REMAKE_LIMIT):
            try:
                self._make_folders(path.parent)
                os.link(incoming, path)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if not incoming.exists():
                    raise outcomes.abandoned(key) from None
                # A collector removed a folder, empty until now, between mkdir and link.
                self._check_root()
                continue
            return True
        raise _keeps_being_removed(path)

    def _make_folders(self, folder: Path) -> None:
        """Create ``folder`` below the root, and make its name and those above it durable.

        A folder that another process created a moment ago may not be durable yet, so all of them are
        synced, whoever created them, before the first blob of this store in ``folder``. It is that folder
        which is remembered, and not those above: a checkpoint's own goes once and does not come back, but
        those that checkpoints share may be removed and made again by others. The root itself is never
        created: if a mount is gone, checkpoints must not go to the disk below.
        """
        with self._lock:
            known = folder in self._synced
        if known and folder.is_dir():
            return
        path = self._root
        for name in folder.relative_to(self._root).parts:
            parent, path = path, path / name
            with contextlib.suppress(FileExistsError):
                path.mkdir()
            self._sync_folder(parent)
        with self._lock:
            self._synced[folder] = None
            while len(self._synced) > _SYNCED_MAX:
                self._synced.popitem(last=False)

    def _sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _check_same(self, path: Path, key: str, size: int, chunk_crcs: Sequence[int]) -> None:
        with path.open("rb", buffering=0) as file:
            same = os.fstat(file.fileno()).st_size == size
            for index, crc in enumerate(chunk_crcs):
                if not same:
                    break
                offset = index * PART_BYTES
                chunk = _read(file.fileno(), key, offset, min(PART_BYTES, size - offset))
                same = digest.crc32c(chunk) == crc
            if not same:
                raise outcomes.exists(key, self.uri)
            # Whoever wrote it may have died before this.
            os.fsync(file.fileno())

    def _empty_folders(self, folder: Path) -> Iterator[str]:
        """Yield the keys of the folders at and below ``folder`` that hold nothing."""
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._translate(error, folder.relative_to(self._root).as_posix()) from error
        if not entries and folder != self._root:
            yield folder.relative_to(self._root).as_posix()
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from self._empty_folders(Path(entry.path))

    def _remove_empty(self, folder: str, nonce: str) -> None:
        """Remove folders that hold nothing, and those above that then do not either."""
        if folder:
            check_key(folder)
        base = self._root / INCOMING if nonce else self._root
        self._remove_upwards(base / nonce / folder, base)

    def _remove_upwards(self, folder: Path, top: Path) -> None:
        """Remove ``folder`` and those above it below ``top``, up to the first one that is needed."""
        while folder != top:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # somebody who died after this one
            except OSError:
                return
            folder = folder.parent

    def _walk(self, folder: Path, base: Path, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield (key, size) of the files below ``folder`` in key order."""
        try:
            with os.scandir(folder) as found:
                # "a/b" sorts after "a-b" as a key: a folder's name includes its slash.
                entries = sorted(
                    found, key=lambda e: e.name + "/" if e.is_dir(follow_symlinks=False) else e.name
                )
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return
        except OSError as error:
            raise self._translate(error, prefix) from error
        for entry in entries:
            key = Path(entry.path).relative_to(base).as_posix()
            if entry.is_dir(follow_symlinks=False):
                if key != INCOMING and (key.startswith(prefix) or prefix.startswith(key + "/")):
                    yield from self._walk(Path(entry.path), base, prefix)
            elif key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                # Deleted between listing and looking is the same as deleted before.
                with contextlib.suppress(FileNotFoundError):
                    yield key, entry.stat(follow_symlinks=False).st_size

    def _translate(
        self, error: OSError, key: str, *, writing: bool = False, named: bool = False
    ) -> DtrainError:
        """Return our error; ``named``: the blob has its name already, durable or not."""
        what = f"{key or 'the store'} in {self.uri}: {error.strerror or error}"
        code = error.errno
        if code == errno.ENOENT and writing and self._root.is_dir():
            return outcomes.abandoned(key)
        if code == errno.ENOENT or (code in (errno.ENOTDIR, errno.EISDIR) and not writing):
            return outcomes.missing(key, self.uri) if self._root.is_dir() else missing_root(self._root)
        if code in (errno.ENOSPC, errno.EDQUOT):
            return Refused(
                ErrorCode.STORE_FULL,
                f"no space left for {what}",
                fix="free space there, keep fewer checkpoints (keep_last), or use a larger store",
            )
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Refused(
                ErrorCode.STORE_REFUSED,
                f"not allowed: {what}",
                fix=f"let user {os.geteuid()} read and write {self._root}, on a file system with hard links",
            )
        if code in (errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENAMETOOLONG, errno.ENOTDIR):
            return Refused(
                ErrorCode.STORE_REFUSED,
                f"the file system cannot hold {what}",
                fix=f"use one file system with hard links and long names for all of {self._root}",
            )
        if named:
            return OutcomeUnknown(ErrorCode.STORE_UNAVAILABLE, f"it is not known whether {what} is durable")
        return Unavailable(ErrorCode.STORE_UNAVAILABLE, f"cannot use {what}", fix="check the disk or mount")


def missing_root(root: Path) -> Refused:
    """Return the refusal to use a folder that is not there."""
    return Refused(
        ErrorCode.STORE_REFUSED,
        f"the store's folder {root} does not exist",
        fix=f"create it (mkdir -p {root}), or mount it, on every machine that uses the store",
    )


def _deepest(folder: Path) -> str:
    """Return the path of the innermost folder of a writer that has one key; "" if there is none inside."""
    path = folder
    with contextlib.suppress(OSError):
        while inner := next((entry.path for entry in os.scandir(path) if entry.is_dir()), None):
            path = Path(inner)
    return "" if path == folder else path.relative_to(folder).as_posix()


def _keeps_being_removed(path: Path) -> Unavailable:
    return Unavailable(ErrorCode.STORE_UNAVAILABLE, f"the folder of {path} keeps being removed")


def _write(fd: int, key: str, chunks: Sequence[memoryview], chunk_crcs: Sequence[int], flow: Flow) -> None:
    try:
        direct = sum(map(len, chunks)) >= DIRECT_FROM_BYTES and _set_direct(fd, True)
        for index, chunk in enumerate(chunks):
            outcomes.check_or_hash(key, index, chunk, chunk_crcs)
            written = 0
            while written < len(chunk):
                piece = chunk[written : written + PIECE_BYTES]
                if direct and len(piece) > BLOCK_BYTES:
                    piece = piece[: -(len(piece) % BLOCK_BYTES) or None]
                elif direct:
                    direct = _set_direct(fd, False)
                flow.admit(len(piece))
                try:
                    size = os.write(fd, piece)
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    direct = _set_direct(fd, False)  # memory or position do not suit the device
                    size = os.write(fd, piece)
                written += size
                flow.taken(size)
        os.fsync(fd)
        # A frozen disk may have held this up for long: an end that was asked for meanwhile still counts.
        flow.wait(0)
    finally:
        os.close(fd)


def _set_direct(fd: int, wanted: bool) -> bool:
    """Write past the page cache, or not; return which it is now.

    The bytes are synced before anybody hears of them: a copy in the page cache costs half of a save's
    CPU time, and takes the place of what training reads.
    """
    if wanted and file_system(os.fstat(fd).st_dev) not in DIRECT_ON:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        if wanted:
            return False
        raise
    return wanted


def _read(fd: int, key: str, offset: int, length: int) -> bytes:
    # pread returns at most 2 GiB, and less when a signal comes in.
    pieces: list[bytes] = []
    left = length
    while left:
        piece = os.pread(fd, left, offset + length - left)
        if not piece:
            raise outcomes.short(key, offset=offset, wanted=length, found=length - left)
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_into(fd: int, key: str, offset: int, view: memoryview) -> None:
    found = 0
    while found < len(view):
        count = os.preadv(fd, [view[found:]], offset + found)
        if not count:
            raise outcomes.short(key, offset=offset, wanted=len(view), found=found)
        found += count
