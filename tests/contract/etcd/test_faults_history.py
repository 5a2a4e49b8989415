"""History that has gone: compacted under a reader, or restored from an older snapshot."""

import secrets
from pathlib import Path
from typing import Any

import pytest
from tests.contract.etcd.members import Seen, etcdctl, restore, settle
from tests.contract.etcd.support import binary, compact, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import RESTORE_BUMP_LEAST
from dtrain.storage.etcd.port import Delete, Put, RangeResult, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = pytest.mark.timeout(300)


class CompactsBetweenPages:
    """A client of real etcd whose history is compacted after each first page that it is given."""

    def __init__(self, etcd: GatewayEtcd, endpoint: str, times: int) -> None:
        self._etcd = etcd
        self._endpoint = endpoint
        self.left = times
        self.pages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._etcd, name)

    def range(self, key: str, range_end: str | None = None, **more: Any) -> RangeResult:
        page = self._etcd.range(key, range_end, **more)
        if page.more:
            self.pages += 1
            if self.left:
                self.left -= 1
                # Something changes behind the first page, and the revision of that page goes.
                victim = page.items[-1].key + "9"
                put = self._etcd.txn(Txn((), (Put(victim, b"new"), Delete(page.items[0].key))))
                compact(self._endpoint, put.revision)
        return page


def test_compaction_in_the_middle_of_a_paged_list_lists_again(etcd_35: EtcdCluster) -> None:
    prefix = f"/history/{secrets.token_hex(4)}/"
    endpoint = etcd_35.endpoints[0]
    real = GatewayEtcd([endpoint])
    for at in range(0, 1200, 100):
        real.txn(Txn((), tuple(Put(f"{prefix}{number:04}", b"x") for number in range(at, at + 100))))
    etcd = CompactsBetweenPages(real, endpoint, times=3)
    with Seen(etcd, prefix) as seen:  # type: ignore[arg-type]
        items = real.range(prefix, prefix_end(prefix)).items
        assert etcd.left == 0
        assert len(seen.relists) == 1, "half a list was taken for a whole one"
        assert tuple(seen.mirror.prefix(prefix)) == items
        revision = real.txn(Txn((), (Delete(f"{prefix}0700"),))).revision
        assert seen.mirror.wait_for(revision, 10.0)
        assert seen.mirror.get(f"{prefix}0700") is None
    real.close()


def test_compaction_while_the_stream_is_away_misses_no_deletion(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path / "etcd", size=1, binary=binary("3.5"), fsync=False, progress_s=1) as cluster:
        etcd, writer = GatewayEtcd(cluster.endpoints), GatewayEtcd(cluster.endpoints)
        writer.txn(Txn((), (Put("/h/goes", b"1"), Put("/h/stays", b"1"))))
        with Seen(etcd, "/h/") as seen:
            for number in range(3):
                # The stream ends; by the time it is back, what it needs is compacted.
                revision = writer.txn(Txn((), (Put("/h/stays", b"%d" % number), Delete("/h/goes")))).revision
                compact(cluster.endpoints[0], revision)
                cluster.kill()
                cluster.start()
                cluster.wait_ready()
                revision = writer.txn(Txn((), (Put("/h/goes", b"back"),))).revision
                assert seen.mirror.wait_for(revision, 20.0)
                assert {kv.key for kv in seen.mirror.prefix("/h/")} == {"/h/stays", "/h/goes"}
            assert not seen.alarms
        etcd.close()
        writer.close()


def test_a_mirror_that_is_new_goes_by_what_its_guardian_has_seen(etcd_35: EtcdCluster) -> None:
    etcd = GatewayEtcd(etcd_35.endpoints)
    now = etcd.txn(Txn((), (Put("/seen/k", b"1"),))).revision
    with Seen(etcd, "/seen/", revision_seen=now) as seen:
        assert not seen.alarms
    with Seen(etcd, "/seen/", revision_seen=now + 1_000_000) as seen:
        eventually(lambda: bool(seen.alarms))
        assert seen.alarms[0].code is ErrorCode.ETCD_WENT_BACK
    etcd.close()


def test_an_etcd_restored_with_raised_revisions_is_gone_on_with(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path / "etcd", size=3, binary=binary("3.5"), fsync=False, progress_s=1) as cluster:
        etcd = GatewayEtcd(cluster.endpoints)
        etcd.txn(Txn((), (Put("/r/k", b"old"),)))
        snapshot = tmp_path / "snapshot.db"
        etcdctl(cluster, "snapshot", "save", str(snapshot), member=0)
        # Elections that the restored cluster has not had: its raft terms begin anew, below these.
        for _ in range(2):
            cluster.stop()
            cluster.start()
            cluster.wait_ready()
        known = etcd.txn(Txn((), (Put("/r/k", b"new"),))).revision
        with Seen(etcd, "/r/") as seen:
            cluster.stop()
            restore(cluster, snapshot, tmp_path)
            cluster.start()
            cluster.wait_ready()
            revision = settle(etcd, Txn((), (Put("/r/later", b"x"),)))
            assert revision > known + RESTORE_BUMP_LEAST
            eventually(lambda: seen.mirror.get("/r/later") is not None, 30.0, "the mirror goes on")
            assert seen.mirror.get("/r/k").value == b"old"  # type: ignore[union-attr]
            assert not seen.alarms
        etcd.close()


@pytest.mark.parametrize(("size", "elections"), [(1, 2), (3, 0)])
def test_an_etcd_restored_from_an_older_snapshot_is_detected(
    tmp_path: Path, size: int, elections: int
) -> None:
    with EtcdCluster(
        tmp_path / "etcd", size=size, binary=binary("3.5"), fsync=False, progress_s=1
    ) as cluster:
        etcd = GatewayEtcd(cluster.endpoints)
        etcd.txn(Txn((), (Put("/r/k", b"old"),)))
        snapshot = tmp_path / "snapshot.db"
        etcdctl(cluster, "snapshot", "save", str(snapshot), member=0)
        for number in range(20):
            etcd.txn(Txn((), (Put("/r/k", b"%d" % number),)))
        for _ in range(elections):
            cluster.stop()
            cluster.start()
            cluster.wait_ready()
        with Seen(etcd, "/r/") as seen:
            assert seen.mirror.get("/r/k").value == b"19"  # type: ignore[union-attr]
            cluster.stop()
            restore(cluster, snapshot, tmp_path, bump=False)
            cluster.start()
            cluster.wait_ready()
            eventually(lambda: bool(seen.alarms), 30.0, "the alarm")
            assert seen.alarms[0].code is ErrorCode.ETCD_WENT_BACK
            assert "restored or replaced" in seen.alarms[0].fix
            assert seen.mirror.alarm is seen.alarms[0]
        # A restored etcd counts its elections anew: whoever has seen a later one refuses what answers
        # now, however often it asks. Where there was none, only the mirror's revision tells.
        for _ in range(5 if elections else 0):
            with pytest.raises(Refused) as caught:
                etcd.range("/r/k")
            assert caught.value.code is ErrorCode.ETCD_WENT_BACK
        etcd.close()
        # One that starts afresh reads what there is: whether that may be is for the operator.
        fresh = GatewayEtcd(cluster.endpoints)
        assert fresh.range("/r/k").items[0].value == b"old"
        fresh.close()
