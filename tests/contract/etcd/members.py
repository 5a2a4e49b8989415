"""What the fault tests do to the members of a real etcd cluster, and how they see that nothing was lost."""

import itertools
import json
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import DtrainError, OutcomeUnknown, Unavailable
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.port import Etcd, Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd


def etcdctl(cluster: EtcdCluster, *words: str, member: int | None = None, timeout_s: float = 30.0) -> str:
    """Run etcdctl against one member, or all, and return what it printed."""
    endpoints = cluster.endpoints if member is None else [cluster.endpoints[member]]
    command = [cluster.binary.etcdctl or "etcdctl", "--endpoints", ",".join(endpoints), *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def status(cluster: EtcdCluster, member: int) -> dict[str, Any]:
    """What one member says of itself."""
    [found] = json.loads(etcdctl(cluster, "endpoint", "status", "-w", "json", member=member))
    return dict(found["Status"])


def leader_of(cluster: EtcdCluster) -> int:
    """The number of the member that leads."""
    for index, member in enumerate(cluster.members):
        if member.is_running:
            found = status(cluster, index)
            if found["header"]["member_id"] == found.get("leader"):
                return index
    raise AssertionError("no member leads")


def follower_of(cluster: EtcdCluster) -> int:
    """The number of a member that does not lead."""
    return (leader_of(cluster) + 1) % len(cluster.members)


def settle(etcd: Etcd, txn: Txn, limit_s: float = 60.0) -> int:
    """Apply an idempotent transaction through faults and return its revision."""
    end = time.monotonic() + limit_s
    while True:
        try:
            return etcd.txn(txn, deadline_s=2.0).revision
        except (Unavailable, OutcomeUnknown):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


class Writer:
    """Writes a counter through whatever happens, until ``stop``."""

    def __init__(self, etcd: Etcd, key: str, *, pause_s: float = 0.005, value: bytes = b"%d") -> None:
        self._etcd, self._key, self._pause_s, self._value = etcd, key, pause_s, value
        self.written = 0
        self.revision = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.revision = settle(self._etcd, Txn((), (Put(self._key, self._value % (self.written + 1)),)))
            self.written += 1
            time.sleep(self._pause_s)

    def stop(self) -> int:
        """End, and return the revision of the last write."""
        self._stop.set()
        self._thread.join(90.0)
        assert not self._thread.is_alive()
        return self.revision


class Seen:
    """A running mirror and all that it told."""

    def __init__(self, etcd: Etcd, prefix: str, **options: Any) -> None:
        self.changes: list[Change] = []
        self.relists: list[int] = []
        self.alarms: list[DtrainError] = []
        self.failures: list[Exception] = []
        self.prefix = prefix
        self.etcd = etcd
        self.mirror = Mirror(
            etcd,
            prefix,
            on_changes=lambda changes, _revision: self.changes.extend(changes),
            on_relist=self.relists.append,
            on_alarm=self.alarms.append,
            on_failure=self.failures.append,
            **options,
        )
        self.mirror.start()
        assert self.mirror.wait_for(1, 15)

    def __enter__(self) -> "Seen":
        return self

    def __exit__(self, *_: object) -> None:
        self.mirror.close()
        assert not self.failures

    @property
    def relisted(self) -> int:
        """How often it listed again after its first list."""
        return len(self.relists) - 1

    def versions(self, key: str) -> list[int]:
        """The versions of a key in the order in which they were told."""
        return [change.after.version for change in self.changes if change.after and change.key == key]

    def assert_exactly_once(self, key: str) -> None:
        """Every version was told once and in order; a list may have jumped over some."""
        versions = self.versions(key)
        assert versions == sorted(set(versions)), "told twice, or out of order"
        jumps = sum(after != before + 1 for before, after in itertools.pairwise(versions))
        assert jumps <= self.relisted, f"{jumps} gaps and {self.relisted} lists"


SCRIPTS = Path(__file__).parents[3] / "deploy" / "etcd"


def script(
    cluster: EtcdCluster, name: str, *words: str, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run one of ``deploy/etcd``'s scripts with this cluster's programs, as an operator would."""
    settings = {
        "PATH": "/usr/bin:/bin",
        "ETCDCTL": cluster.binary.etcdctl or "etcdctl",
        "ETCDUTL": cluster.binary.etcdctl or "etcdctl",
        "ETCDCTL_ENDPOINTS": ",".join(cluster.endpoints),
    }
    return subprocess.run(
        [str(SCRIPTS / name), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=settings | dict(env or {}),
    )


def backup(cluster: EtcdCluster, folder: Path) -> Path:
    """Save a snapshot by the operator's script and return it."""
    done = script(cluster, "backup.sh", str(folder))
    assert done.returncode == 0, done.stderr
    return max(folder.glob("etcd-*.db"))


def restore(cluster: EtcdCluster, snapshot: Path, folder: Path, *, bump: bool = True) -> str:
    """Give every member the data of ``snapshot``, as an operator would after a disaster; tell what was said.

    The lost data are moved into ``folder``. ``bump``: revisions are raised.
    """
    everyone = ",".join(f"{m.name}={m.peer_url}" for m in cluster.members)
    said = ""
    for member in cluster.members:
        data = member.folder / member.name
        data.rename(folder / f"{member.name}-old")
        done = script(
            cluster,
            "restore.sh",
            *("--name", member.name, "--data-dir", str(data), "--initial-cluster", everyone),
            *("--token", f"{cluster._folder.name}-{cluster.members[0].peer_port}"),
            *(() if bump else ("--no-bump",)),
            str(snapshot),
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout
    return said


def used(etcd: GatewayEtcd, cluster: EtcdCluster) -> int:
    """The number of the member that a client talks to."""
    return cluster.endpoints.index(str(etcd._endpoints.in_order()[0]))
