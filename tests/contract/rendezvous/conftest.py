from collections.abc import Iterator

import pytest
from tests.contract.etcd.support import binary

from dtrain.local.etcd import EtcdCluster


@pytest.fixture(scope="session")
def rdzv_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("rdzv"), binary=binary("3.5"), fsync=False) as cluster:
        yield cluster
