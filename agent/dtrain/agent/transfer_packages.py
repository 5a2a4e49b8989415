"""Packed working directories on this machine: archives kept by content, one tree for each submission.

An archive is shared by all jobs of the same content, and verified each time it is
used: it may be deleted or damaged at any time. A tree belongs to one submission, so
that what its ranks write there is nobody else's; it is filled under another name and
renamed, so that a folder with its final name is whole. Killed at any moment, this
leaves archives and folders that the next life takes away.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from dtrain.agent.transferring import DropTree, TransferReport, Unpack, Unpacked, UnpackFailed
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime import log
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.packages import depot, unpacking

INCOMING = ".incoming-"
BOOT = ".boot"
TRIES_MAX = 3
"""Times that an archive is brought before its damage is taken for the store's."""

_READ_BYTES = 1024 * 1024

_log = log.get("transfer.packages")


class Packages:
    """Two folders below ``folder``; ``archives_bytes_max`` bounds what is kept of archives that nobody reads.

    ``boot_id`` tells a start of the machine from another: after a power cut a folder may be there
    without what was written to it, and nothing of a former start is in use.
    """

    def __init__(
        self,
        stores: Callable[[str], BlobStore],
        emit: Callable[[TransferReport], None],
        *,
        folder: Path | None,
        archives_bytes_max: int = 0,
        boot_id: str = "",
    ) -> None:
        self._stores = stores
        self._emit = emit
        self._bytes_max = archives_bytes_max
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._folder = folder
        if folder is not None:
            self._tidy(folder, boot_id)

    def unpack(self, order: Unpack) -> None:
        """Have the tree of one submission here; answer ``Unpacked``.

        Raises:
            Refused: PACKAGE_DAMAGED, or the store will not.
            Unavailable: the store does not answer.
            OSError: of the disk.
        """
        assert self._folder is not None
        tree = self._folder / "trees" / order.tree
        # Two orders for one tree, or two jobs with one archive: the second finds what the first has made.
        with self._alone(order.tree), self._alone(order.package.digest):
            if not tree.is_dir():
                self._make(tree, order)
        self._emit(Unpacked(order.job, order.uid, str(tree)))

    def put_aside(self, order: Unpack | DropTree) -> list[Path]:
        """Take away the names of trees that are nobody's by this order; return what is to be deleted.

        Called in the order of the orders, before any later one is begun: a tree that a later one
        makes must not be taken for one that an earlier one does not know.
        """
        if self._folder is None:
            return []
        trees = self._folder / "trees"
        if isinstance(order, DropTree):
            names = {order.tree}
        else:
            # Of submissions that the agent does not have: it died before it could say so.
            wanted = {*order.keep, order.tree}
            names = {path.name for path in _listed(trees) if path.name not in wanted}
        doomed = [_renamed(trees / name) for name in sorted(names) if not name.startswith(".")]
        return [path for path in doomed if path is not None]

    # One tree

    def _make(self, tree: Path, order: Unpack) -> None:
        archive = self._archive(order)
        incoming = tree.with_name(f"{INCOMING}{secrets.token_hex(8)}")
        try:
            incoming.mkdir(mode=0o755, parents=True)
            with archive.open("rb") as file:
                unpacking.unpack(file, incoming, order.package)
            incoming.rename(tree)
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        finally:
            self._evict(archive.parent)

    def _archive(self, order: Unpack) -> Path:
        """Return the verified archive, brought from the store if it is not here."""
        assert self._folder is not None
        package = order.package
        path = self._folder / "archives" / f"{package.digest}.tar.gz"
        if _digest(path) == package.digest:
            os.utime(path)
            return path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = self._stores(package.store)
        for tries in range(1, TRIES_MAX + 1):
            incoming = path.with_name(f"{INCOMING}{secrets.token_hex(8)}")
            try:
                depot.fetch(store, order.cluster, package, incoming)
                incoming.replace(path)
                return path
            except Refused as error:
                # A byte may have changed on its way; what is not there will not come by asking again.
                if error.code is not ErrorCode.PACKAGE_DAMAGED or tries == TRIES_MAX:
                    raise
                _log.warning("package_not_sound", job=order.job, tries=tries, error=error.message)
            finally:
                incoming.unlink(missing_ok=True)
        raise AssertionError("the last try returns or raises")

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    # Room

    def _evict(self, folder: Path) -> None:
        """Delete the archives unused for longest until they fit; one that is open stays readable."""
        found = []
        for path in _listed(folder):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        size = sum(one[1] for one in found)
        for _, size_bytes, path in sorted(found):
            if size <= self._bytes_max:
                return
            path.unlink(missing_ok=True)
            size -= size_bytes

    def _tidy(self, folder: Path, boot_id: str) -> None:
        """Delete what a former life left half done, and what a former start of the machine left at all."""
        for path in (*_listed(folder / "trees"), *_listed(folder / "archives")):
            if path.name.startswith(INCOMING):
                delete(path)
        mark = folder / BOOT
        try:
            known = mark.read_text()
        except OSError:
            known = ""
        if not boot_id or known == boot_id:
            return
        ready = folder / f"{BOOT}.new"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            ready.write_text(boot_id)
        except OSError as error:
            # Deleted without the mark they would be again by the next life, with ranks in them.
            _log.warning("packages_not_tidied", folder=str(folder), error=str(error))
            return
        for path in _listed(folder / "trees"):
            delete(path)
        ready.replace(mark)


def failed(order: Unpack, error: Exception, sentence: str) -> UnpackFailed:
    """What to answer where ``unpack`` raised."""
    damaged = isinstance(error, Refused) and error.code is ErrorCode.PACKAGE_DAMAGED
    return UnpackFailed(order.job, order.uid, sentence, hopeless=damaged)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                found.update(data)
    except OSError:
        return ""
    return found.hexdigest()


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _renamed(tree: Path) -> Path | None:
    """Cut off while it is deleted, nobody takes the rest for a whole tree."""
    doomed = tree.with_name(f"{INCOMING}{secrets.token_hex(8)}")
    try:
        tree.rename(doomed)
    except OSError:
        return None
    return doomed


def delete(path: Path) -> None:
    """Remove a file or a folder with all that is in it, as far as it goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
