"""One port, several etcds: what the contract tests need of each."""

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from dtrain.local.etcd import EtcdBinary, find_etcd, probe
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Etcd, Put, Txn, WatchBatch, WatchStream

REPOSITORY = Path(__file__).resolve().parents[3]
CACHE = REPOSITORY / ".cache"


def binary(version: str) -> EtcdBinary:
    """Return an etcd of that line; Debian's packages are unpacked on first use."""
    suite, folder = {"3.4": ("bookworm", "etcd-3.4"), "3.5": ("trixie", "etcd")}[version]
    path = CACHE / folder / "usr" / "bin" / "etcd"
    if not path.exists() and (version == "3.4" or shutil.which("apt-get")):
        script = REPOSITORY / "deploy" / "etcd" / "fetch-etcd.sh"
        command = ["sh", str(script), str(CACHE / folder), suite]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
        if done.returncode and version == "3.4":
            raise RuntimeError(done.stderr.strip())
    return probe(str(path)) if path.exists() else find_etcd()


class World:
    """An etcd behind the port, with what the port cannot do: pass time, compact."""

    def __init__(
        self, etcd: Etcd, prefix: str, advance: Callable[[float], None], compact: Callable[[int], None]
    ):
        self.etcd = etcd
        self.prefix = prefix
        self.advance = advance
        self.compact = compact

    @property
    def is_model(self) -> bool:
        return isinstance(self.etcd, MemoryEtcd)

    def key(self, name: str) -> str:
        return self.prefix + name

    def put(self, name: str, value: bytes = b"x", lease: int = 0) -> int:
        return self.etcd.txn(Txn((), (Put(self.key(name), value, lease),))).revision


def compact(endpoint: str, revision: int) -> None:
    """Compact a real etcd, physically, so that the very next read notices."""
    url = urlsplit(endpoint)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 0, timeout=10)
    connection.request("POST", "/v3/kv/compaction", json.dumps({"revision": str(revision), "physical": True}))
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 200, body


def collect(stream: WatchStream, count: int, timeout_s: float = 10.0) -> list[WatchBatch]:
    """Read batches until they hold ``count`` events."""
    end = time.monotonic() + timeout_s
    batches: list[WatchBatch] = []
    while sum(len(batch.events) for batch in batches) < count:
        left_s = end - time.monotonic()
        assert left_s > 0, f"only {batches} after {timeout_s} s"
        batch = stream.next(min(left_s, 1.0))
        if batch is not None and batch.events:
            batches.append(batch)
    return batches


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0, what: str = "") -> float:
    """Wait for ``condition`` and return how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not in {timeout_s} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - start
