"""A leader is lost until another one leads: crash, SIGTERM, and guardian and all.

No peer has replicas to fail over to; the yardstick is the lease's TTL, which a
failover takes wherever nobody notices the crash.
"""

import contextlib
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.report import Result, result
from dtrain.local.cluster import LocalCluster
from dtrain.protocol.errors import Unavailable

TTL_S = 5.0
SETTLE_S = 2.0


def measure(rounds: int) -> list[Result]:
    """Kill the leader ``rounds`` times in each way, interleaved."""
    taken: dict[str, list[float]] = {"crash": [], "sigterm": [], "guardian": []}
    with (
        tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name,
        LocalCluster(Path(name), agents=1, store="dir", ttl_s=int(TTL_S), etcd_fsync=False) as cluster,
    ):
        time.sleep(SETTLE_S)
        for _ in range(rounds):
            for way, seconds in taken.items():
                seconds.append(_fail_over(cluster, way))
    peer = [TTL_S] * rounds
    bars = {"crash": 1.0, "sigterm": 0.25, "guardian": TTL_S + 1.0}
    titles = {
        "crash": "kill -9 of the leader's process to a new leader",
        "sigterm": "SIGTERM of the leader to a new leader",
        "guardian": "kill -9 of the leader's guardian to a new leader",
    }
    return [
        result(titles[way], "s", seconds, peer, "lease TTL", ours_max=bars[way])
        for way, seconds in taken.items()
    ]


def _fail_over(cluster: LocalCluster, way: str) -> float:
    before, name = _term(cluster), cluster.leader()
    assert name is not None
    began = time.monotonic()
    if way == "crash":
        cluster.kill_leader_process(signal.SIGKILL)
    elif way == "sigterm":
        cluster.daemon(name).send(signal.SIGTERM)
    else:
        cluster.kill_guardian(name)
    while _term(cluster) in (0, before):
        time.sleep(0.002)
    took = time.monotonic() - began
    if way != "crash":
        cluster.daemon(name).wait(10.0)
        cluster.start_daemon(name)
    time.sleep(SETTLE_S)
    return took


def _term(cluster: LocalCluster) -> int:
    with contextlib.suppress(Unavailable):
        found = cluster.etcd.range(cluster.keys.leader).items
        return found[0].create_revision if found else 0
    return 0
