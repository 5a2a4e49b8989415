"""An etcd without space, and a member whose disk is full."""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.etcd.members import Seen, Writer, etcdctl, leader_of, settle
from tests.contract.etcd.support import binary, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.port import Delete, Get, Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = pytest.mark.timeout(300)

QUOTA_BYTES = 16 * 1024 * 1024
DISK_MIB = 200
"""etcd reserves two log segments of 64 MB each before it begins."""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path / "etcd", size=3, binary=binary("3.5"), fsync=False, progress_s=1)
    cluster.flags = (f"--quota-backend-bytes={QUOTA_BYTES}",)
    with cluster:
        yield cluster


def fill(etcd: GatewayEtcd, prefix: str) -> None:
    """Write until etcd has no space."""
    chunk = os.urandom(1_000_000)
    with pytest.raises(Refused) as caught:
        _write(etcd, prefix, chunk, times=200)
    assert caught.value.code is ErrorCode.ETCD_NO_SPACE


def _write(etcd: GatewayEtcd, prefix: str, chunk: bytes, times: int) -> None:
    for number in range(times):
        settle(etcd, Txn((), (Put(f"{prefix}{number % 4}", chunk),)))


def test_no_space_refuses_new_data_and_nothing_else(small: EtcdCluster) -> None:
    etcd = GatewayEtcd(small.endpoints)
    held, other = new_lease_id(), new_lease_id()
    etcd.grant(60, held)
    etcd.grant(60, other)
    etcd.txn(Txn((), (Put("/space/held", b"x", held), Put("/space/other", b"x", other))))
    assert etcd.status().alarms == ()
    fill(etcd, "/space/fill/")
    with Seen(etcd, "/space/held", progress_interval_s=1.0) as seen:
        for refused in (
            lambda: etcd.txn(Txn((), (Put("/space/new", b"x"),))),
            lambda: etcd.grant(10, new_lease_id()),
        ):
            with pytest.raises(Refused) as caught:
                refused()
            assert caught.value.code is ErrorCode.ETCD_NO_SPACE
            assert "etcdctl alarm disarm" in caught.value.fix
        # What keeps a training run alive goes on.
        assert etcd.keepalive(held) > 0
        etcd.revoke(other)
        assert etcd.range("/space/other").items == ()
        etcd.txn(Txn((), (Delete("/space/fill/0"),)))
        assert etcd.txn(Txn((), (Get("/space/held"),))).succeeded
        eventually(lambda: "NOSPACE" in etcd.status().alarms, 10.0, "the alarm is told")
        assert seen.mirror.age_s() < 5.0

        # The operator's three steps; without the last one nothing is written.
        revision = etcd.range("/space/held").revision
        etcdctl(small, "compact", "--physical", str(revision))
        for member in range(3):
            etcdctl(small, "defrag", member=member)
        with pytest.raises(Refused):
            etcd.txn(Txn((), (Put("/space/new", b"x"),)))
        etcdctl(small, "alarm", "disarm")
        eventually(lambda: etcd.status().alarms == (), 10.0, "the alarm is over")
        assert settle(etcd, Txn((), (Put("/space/held", b"new", held),))) > revision
        assert seen.mirror.wait_for(revision + 1, 20.0)
        etcd.grant(10, new_lease_id())
    etcd.close()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that holds a mount of a few MB which nobody else sees, and which ends with it."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f"mount -t tmpfs -o size={DISK_MIB}m none '{place}' && echo ready && exec sleep 1000"
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process, place
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("who", ["follower", "leader"])
def test_a_full_disk_of_one_member_is_not_noticed(
    tmp_path: Path, holder: tuple[subprocess.Popen[bytes], Path], who: str
) -> None:
    process, place = holder
    cluster = EtcdCluster(tmp_path / "etcd", size=3, binary=binary("3.5"), fsync=False, progress_s=1)
    # Its folder is a disk of its own, as seen from inside; other members never look there.
    small, inside = 1, tmp_path / "etcd" / "etcd-1"
    inside.mkdir(parents=True)
    inside.chmod(0o700)
    bind = f'mount --bind "{place}" "{inside}" && exec "$@"'
    enter = ("nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "sh", "-c", bind, "sh")
    cluster.prefixes[small] = enter
    with cluster:
        client, direct = GatewayEtcd(cluster.endpoints), GatewayEtcd(cluster.endpoints)
        if (who == "leader") != (leader_of(cluster) == small):
            target = small if who == "leader" else 0
            name = f"{_member_id(cluster, target):x}"
            etcdctl(cluster, "move-leader", name, member=leader_of(cluster))
        prefix = f"/disk/{secrets.token_hex(4)}/"
        with Seen(client, prefix, progress_interval_s=1.0) as seen:
            writer = Writer(direct, f"{prefix}counter", value=b"%d " + b"x" * 20_000)
            eventually(lambda: len(seen.versions(writer._key)) > 10)
            ballast = Path(f"/proc/{process.pid}/root{place}/ballast")
            _fill_up(ballast)
            eventually(lambda: not cluster.members[small].is_running, 60.0, "it ends for want of space")
            more = writer.written + 50
            eventually(lambda: writer.written >= more, 30.0, "writes go on")
            ballast.unlink()
            cluster.start_member(small)
            cluster.wait_ready()
            revision = writer.stop()
            assert seen.mirror.wait_for(revision, 20.0)
            assert seen.relisted == 0
            seen.assert_exactly_once(writer._key)
        client.close()
        direct.close()


def _member_id(cluster: EtcdCluster, member: int) -> int:
    client = GatewayEtcd([cluster.endpoints[member]])
    try:
        return client.status().member_id
    finally:
        client.close()


def _fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        chunk = b"\0" * (1 << 20)
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(chunk[:size])
