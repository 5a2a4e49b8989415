import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.etcd.support import World, binary, compact

from dtrain.local.etcd import EtcdCluster
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.transport import GatewayEtcd


@pytest.fixture(scope="session")
def etcd_34(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(
        tmp_path_factory.mktemp("etcd34"), binary=binary("3.4"), fsync=False, progress_s=1
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def etcd_35(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(
        tmp_path_factory.mktemp("etcd35"), binary=binary("3.5"), fsync=False, progress_s=1
    ) as cluster:
        yield cluster


@pytest.fixture
def fresh_etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    """One member that a test may freeze and kill."""
    with EtcdCluster(tmp_path / "fresh", binary=binary("3.5"), fsync=False) as cluster:
        yield cluster


@pytest.fixture
def three_members(tmp_path: Path) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path / "three", size=3, binary=binary("3.5"), fsync=False, progress_s=1) as cluster:
        yield cluster


@pytest.fixture(params=["memory", "gateway-3.4", "gateway-3.5"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    prefix = f"/contract/{secrets.token_hex(6)}/"
    if request.param == "memory":
        now = [1000.0]

        def advance(seconds: float) -> None:
            now[0] += seconds

        model = MemoryEtcd(lambda: now[0])
        yield World(model, prefix, advance, model.compact)
        model.close()
        return
    cluster: EtcdCluster = request.getfixturevalue("etcd_" + request.param[-3:].replace(".", ""))
    endpoint = cluster.endpoints[0]
    gateway = GatewayEtcd([endpoint])
    yield World(gateway, prefix, time.sleep, lambda revision: compact(endpoint, revision))
    gateway.close()
