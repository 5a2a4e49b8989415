"""The transfer process: ``python -m dtrain.agent.transfer``.

Reads orders from stdin and writes reports to stdout, both JSON lines; logs go to
stderr. It ends with its agent: when stdin closes, at once, whatever it was
doing. Everything it leaves behind then is an unfinished blob without a commit
record, which the collector takes away.
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from dtrain.agent import lines, transfer_archive
from dtrain.agent.launch.processes import boot_id
from dtrain.agent.transfer_cache import Cache
from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transfer_moves import TELL_EVERY_S as TELL_MOVES_EVERY_S
from dtrain.agent.transfer_moves import Observer
from dtrain.agent.transfer_packages import Packages, delete, failed
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transfer_use import TELL_EVERY_S, Teller
from dtrain.agent.transferring import (
    ORDERS,
    Archive,
    Archived,
    Aside,
    CancelUpload,
    Demand,
    DropTree,
    Fetch,
    FetchFailed,
    KeepManifest,
    Moved,
    ReleaseFetch,
    StoreUse,
    TransferOrder,
    TransferReport,
    Unpack,
    Upload,
    UploadFailed,
)
from dtrain.protocol.errors import DtrainError
from dtrain.runtime import log
from dtrain.runtime.clock import SystemClock
from dtrain.storage.blobs.metered import MeteredBlobs, StoreMeter
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import BlobStore

UPLOADS_AT_ONCE = 4
FETCHES_AT_ONCE = 2
UNPACKS_AT_ONCE = 2
DEMANDS_AT_ONCE = 64
"""Each of a rank of this machine that waits; the work itself is bounded by checkpoint."""

ASIDES_AT_ONCE = 4
"""What nobody waits for. It may hang with a store that is away, and must not take an upload's thread."""

UPLOAD_NICE = 10
"""A save has minutes, a step milliseconds: where cores are scarce, uploads take a tenth of what a rank
gets. Restores keep the agent's own priority, as ranks wait for them."""

_PR_SET_PDEATHSIG = 1

_log = log.get("transfer")


class Transfer:
    """Runs orders on a few threads; reports through ``emit``, which must be thread-safe."""

    def __init__(
        self,
        emit: Callable[[TransferReport | Archived], None],
        stores: Callable[[str], BlobStore],
        cache: Cache | None = None,
        packages: Path | None = None,
        packages_bytes: int = 0,
    ) -> None:
        self._emit = emit
        self._stores = stores
        self._cache = cache or Cache()
        self._cleanups = ThreadPoolExecutor(1, thread_name_prefix="upload-cleanup")
        self._uploader = Uploader(stores, emit, cache=self._cache, later=self._cleanups.submit)
        self._fetcher = Fetcher(stores, emit, cache=self._cache)
        self._demands = ThreadPoolExecutor(DEMANDS_AT_ONCE, thread_name_prefix="demand")
        self._asides = ThreadPoolExecutor(ASIDES_AT_ONCE, thread_name_prefix="aside")
        self._uploads = ThreadPoolExecutor(
            UPLOADS_AT_ONCE, thread_name_prefix="upload", initializer=_give_way
        )
        self._fetches = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch")
        self._unpacks = ThreadPoolExecutor(UNPACKS_AT_ONCE, thread_name_prefix="unpack")
        self._packages = Packages(
            stores, emit, folder=packages, archives_bytes_max=packages_bytes, boot_id=boot_id()
        )
        self._archives = ThreadPoolExecutor(1, thread_name_prefix="archive", initializer=_give_way)

    def handle(self, order: TransferOrder) -> None:
        """Take on one order; the answer comes later. Never blocks on the store."""
        if isinstance(order, Upload):
            self._uploads.submit(self._upload, order)
        elif isinstance(order, CancelUpload):
            self._uploader.cancel(order)
            self._asides.submit(self._aside, self._cache.forget, order.uid, order.seq)
        elif isinstance(order, Fetch):
            self._fetches.submit(self._fetch, order)
        elif isinstance(order, Demand):
            self._demands.submit(self._demand, order)
        elif isinstance(order, KeepManifest):
            self._asides.submit(self._aside, self._fetcher.keep_manifest, order)
        elif isinstance(order, ReleaseFetch):
            self._asides.submit(self._aside, self._fetcher.release(order.id))
        elif isinstance(order, Unpack):
            self._put_aside(order)
            self._unpacks.submit(self._unpack, order)
        elif isinstance(order, DropTree):
            self._put_aside(order)
        elif isinstance(order, Archive):
            self._archives.submit(self._archive, order)

    def progress(self) -> Moved:
        """Say how far everything is that runs now."""
        return Moved(self._uploader.progress(), self._fetcher.progress())

    def _upload(self, order: Upload) -> None:
        try:
            self._uploader.run(order)
        except Exception as error:  # noqa: BLE001 - every order gets an answer, bugs included
            if not isinstance(error, DtrainError):
                _log.exception("upload_failed", job=order.job, seq=order.sealed.seq, rank=order.rank)
            self._emit(UploadFailed(order.job, order.sealed.seq, order.rank, _sentence(error)))

    def _fetch(self, order: Fetch) -> None:
        try:
            self._fetcher.run(order)
        except Exception as error:  # noqa: BLE001 - every order gets an answer, bugs included
            if not isinstance(error, DtrainError):
                _log.exception("fetch_failed", job=order.job, seq=order.seq)
            self._emit(FetchFailed(order.id, _sentence(error)))

    def _demand(self, order: Demand) -> None:
        try:
            self._fetcher.demand(order)
        except Exception as error:  # noqa: BLE001 - every order gets an answer, bugs included
            if not isinstance(error, DtrainError):
                _log.exception("demand_failed", fetch=order.id, rank=order.rank)
            self._emit(FetchFailed(order.id, _sentence(error)))

    def _put_aside(self, order: Unpack | DropTree) -> None:
        for doomed in self._packages.put_aside(order):
            self._asides.submit(self._aside, delete, doomed)

    def _unpack(self, order: Unpack) -> None:
        try:
            self._packages.unpack(order)
        except Exception as error:  # noqa: BLE001 - every order gets an answer, bugs included
            if not isinstance(error, DtrainError | OSError):
                _log.exception("unpack_failed", job=order.job)
            self._emit(failed(order, error, _sentence(error)))

    def _archive(self, order: Archive) -> None:
        try:
            transfer_archive.run(order, self._stores)
        except Exception as error:  # noqa: BLE001 - every order gets an answer, bugs included
            if not isinstance(error, DtrainError | OSError):
                _log.exception("archive_failed", key=order.key)
            self._emit(Archived(order.id, _sentence(error)))
        else:
            self._emit(Archived(order.id))

    def _aside(self, work: Callable[..., None], *arguments: object) -> None:
        """What nobody waits for an answer to."""
        try:
            work(*arguments)
        except DtrainError as error:
            _log.info("left_undone", work=work.__name__, error=_sentence(error))
        except Exception:  # noqa: BLE001 - the thread is needed for the next order
            _log.exception("left_undone", work=work.__name__)


class Stores:
    """Opens each store once."""

    def __init__(self, meter: StoreMeter) -> None:
        self._meter = meter
        self._lock = threading.Lock()
        self._open: dict[str, BlobStore] = {}

    def __call__(self, uri: str) -> BlobStore:
        with self._lock:
            store = self._open.get(uri)
            if store is None:
                store = self._open[uri] = MeteredBlobs(open_store(uri), self._meter, SystemClock())
            return store


def _sentence(error: Exception) -> str:
    if isinstance(error, DtrainError):
        return f"{error} ({error.fix})" if error.fix else str(error)
    return f"{type(error).__name__}: {error}"


def _give_way() -> None:
    """Lower the priority of this thread, and of those that it starts: Linux keeps it by thread."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(UPLOAD_NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def serve(
    orders: IO[bytes],
    reports: IO[bytes],
    cache: Cache | None = None,
    packages: Path | None = None,
    packages_bytes: int = 0,
) -> None:
    """Work until ``orders`` ends."""
    lock = threading.Lock()

    def emit(report: TransferReport | Aside) -> None:
        with lock:
            try:
                reports.write(lines.encode(report))
                reports.flush()
            except OSError:
                os._exit(0)  # nobody reads any more

    meter = StoreMeter()
    transfer = Transfer(emit, Stores(meter), cache, packages, packages_bytes)
    threading.Thread(target=_tell_use, args=(Teller(meter), emit), name="use", daemon=True).start()
    threading.Thread(
        target=_tell_moves, args=(Observer(transfer.progress), emit), name="moves", daemon=True
    ).start()
    for line in orders:
        transfer.handle(lines.decode(ORDERS, line))


def _tell_moves(observer: Observer, emit: Callable[[Moved], None]) -> None:
    while True:
        time.sleep(TELL_MOVES_EVERY_S)
        if (moved := observer.news()) is not None:
            emit(moved)


def _tell_use(teller: Teller, emit: Callable[[StoreUse], None]) -> None:
    while True:
        time.sleep(TELL_EVERY_S)
        if (use := teller.news()) is not None:
            emit(use)


def main() -> None:
    """Run the process; never returns normally."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.agent.transfer")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--cache-bytes", type=int, default=0)
    parser.add_argument("--packages-dir", type=Path)
    parser.add_argument("--packages-bytes", type=int, default=0)
    arguments = parser.parse_args()
    _die_with_parent()
    log.configure(component="transfer")
    # Whatever a library prints must not end up among the reports.
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    code = 0
    try:
        serve(
            sys.stdin.buffer,
            reports,
            Cache(arguments.cache_dir, arguments.cache_bytes),
            arguments.packages_dir,
            arguments.packages_bytes,
        )
    except KeyboardInterrupt:
        pass
    except Exception:  # noqa: BLE001 - said, and the exit status tells the agent
        _log.exception("transfer_ended")
        code = 1
    # Without waiting for transfers in flight: nobody would hear of them.
    os._exit(code)


if __name__ == "__main__":
    main()
