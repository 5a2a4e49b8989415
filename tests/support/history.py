"""The auditor attached to a cluster under test: the code of ``dtrain audit``."""

from dtrain.cli.auditing import Replay
from dtrain.protocol.audit import Auditor
from dtrain.protocol.ids import ClusterName
from dtrain.storage.etcd.port import Etcd
from dtrain.testing.following import Following

__all__ = ["Following", "audit"]


def audit(etcd: Etcd, cluster: ClusterName) -> Auditor:
    """Replay everything since the oldest revision that is not compacted."""
    auditor = Auditor(cluster)
    replay = Replay(etcd, cluster, auditor)
    try:
        replay.catch_up(60.0)
    finally:
        replay.close()
    return auditor
