"""The doctor on real servers: a sound one, an old one, a full one, and some that are away."""

import time
from pathlib import Path

import pytest
from tests.contract.etcd.support import binary
from tests.contract.etcd.test_faults_space import QUOTA_BYTES, fill

from dtrain.cli.doctor import etcd, running
from dtrain.cli.doctor.findings import Finding, Level
from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.ids import ClusterName
from dtrain.runtime.config import EtcdOptions
from dtrain.storage.etcd.transport import GatewayEtcd

ELECTION_S_MAX = 20.0


def looked(endpoints: tuple[str, ...]) -> dict[str, list[Finding]]:
    checks = etcd.checks(ClusterName("doctor"), EtcdOptions(endpoints), ttl_s=60.0)
    found: dict[str, list[Finding]] = {}
    for one in running.run(checks, lambda _: None):
        found.setdefault(one.check, []).append(one)
    return found


def test_a_sound_server_is_measured_and_keeps_no_lease(etcd_35: EtcdCluster) -> None:
    found = looked(tuple(etcd_35.endpoints))
    worst = {name: max(one.level for one in ones) for name, ones in found.items()}
    assert Level.FAIL not in worst.values(), found
    assert "of 20" in found["latency"][0].measured
    assert found["disk"][0].level is not Level.SKIPPED
    assert "revisions are kept" in found["compaction"][0].measured
    assert "agrees with this machine" in found["clock"][0].measured
    assert any("%" in one.measured for one in found["database"])


def test_a_server_that_loses_data_fails(etcd_34: EtcdCluster) -> None:
    [version] = looked(tuple(etcd_34.endpoints))["version"]
    assert version.level is Level.FAIL
    assert "3.5.13" in version.fix


def test_a_full_server_fails_with_what_helps(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path, binary=binary("3.5"), fsync=False, quota_bytes=QUOTA_BYTES) as cluster:
        client = GatewayEtcd(cluster.endpoints)
        fill(client, "/space/")
        client.close()
        found = looked(tuple(cluster.endpoints))
    alarms = found["database"][0]
    assert alarms.level is Level.FAIL
    assert "maintain.sh" in alarms.fix
    assert found["latency"][0].level is Level.FAIL


@pytest.mark.parametrize(("killed", "level"), [((1,), Level.WARN), ((1, 2), Level.FAIL)])
def test_members_that_are_away_are_named(
    three_members: EtcdCluster, killed: tuple[int, ...], level: Level
) -> None:
    for index in killed:
        three_members.kill(index)
    gone = [three_members.endpoints[index] for index in killed]
    # Those that are left elect another leader first, and are not well meanwhile.
    end = time.monotonic() + ELECTION_S_MAX
    while True:
        [members] = looked(tuple(three_members.endpoints))["members"]
        if (
            members.level is level and len(killed) == members.measured.count("http")
        ) or time.monotonic() > end:
            break
    assert members.level is level, members.measured
    assert all(endpoint in members.measured for endpoint in gone)
