"""etcd is restored from an older snapshot under a running cluster: it stops, and an operator decides."""

import random
from dataclasses import replace

import pytest

from .cluster import Cluster, play
from .schedule import Storm
from .swarm import calm

LATE_S = 45.0
"""From the restore until everybody has noticed."""


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_restored_etcd_stops_the_coordinators_and_harms_nothing(seed: int) -> None:
    rng = random.Random(f"restore-{seed}")
    at, back = rng.uniform(15.0, 30.0), rng.choice((3, 10, 40))
    clusters: list[Cluster] = []
    blobs: set[str] = set()
    lives: dict[str, object] = {}

    def restore() -> None:
        (cluster,) = clusters
        blobs.update(key for key in cluster.store._blobs if not key.startswith("dtrain-probe/"))
        lives.update({name: replica.coordinator for name, replica in cluster.replicas.items()})
        cluster.checks.went_back = True
        cluster.etcd.restore(back)

    def prepare(cluster: Cluster) -> None:
        clusters.append(cluster)
        cluster.scheduler.at(at, restore)

    schedule = replace(calm(seed), storms=(Storm(0.0, at + LATE_S),), ends_calm=False)
    result = play(schedule, prepare=prepare)
    (cluster,) = clusters
    # No agent has gone back to a lower term or an older attempt: that is checked after every event.
    assert not result.violations
    assert blobs <= set(cluster.store._blobs)
    for name, replica in cluster.replicas.items():
        assert replica.guardian is not None
        # Whoever knew the newer state has stopped for good. One that lost its lease with the
        # restore was started anew and knows nothing: it may lead, but the agents do not follow.
        assert replica.guardian.stopped or replica.coordinator is not lives[name]
    stopped = sum(1 for r in cluster.replicas.values() if r.guardian is not None and r.guardian.stopped)
    assert stopped or len(cluster.replicas) == 1
