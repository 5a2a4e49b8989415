"""etcd is restored from an older snapshot under a running cluster.

Without raised revisions it stops, and an operator decides; with them it goes on.
"""

import random
from dataclasses import replace

import pytest

from .cluster import Cluster, play
from .schedule import Storm
from .swarm import calm

RAISED = 1_000_000_000
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


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 6, 7])
def test_a_cluster_goes_on_through_a_restored_etcd_with_raised_revisions(seed: int) -> None:
    rng = random.Random(f"raised-{seed}")
    at, back = rng.uniform(12.0, 30.0), rng.choice((3, 10, 40, 80))
    clusters: list[Cluster] = []
    before: dict[str, set[str]] = {}
    forgotten: set[str] = set()

    def restore() -> None:
        (cluster,) = clusters
        before["blobs"] = set(cluster.store._blobs)
        # A job that etcd forgets altogether has no operator here who submits it again.
        specs = [cluster.etcd.memory.range(cluster.keys.spec(job)).items for job in cluster.jobs]
        kept = max(found[0].mod_revision for found in specs)
        commits = {(job, seq) for job in cluster.jobs for seq in cluster.committed_seqs(job)}
        cluster.etcd.restore(min(back, cluster.etcd.memory.revision - kept), bump=RAISED)
        cluster.checks.etcd_was_raised(cluster.etcd.memory)
        gone = commits - {(job, seq) for job in cluster.jobs for seq in cluster.committed_seqs(job)}
        for job, seq in gone:
            record = cluster.checks.history(job).commits[seq]
            forgotten.update({record.manifest, f"{seq:020d}/{record.attempt:06d}-{record.nonce}"})

    def prepare(cluster: Cluster) -> None:
        clusters.append(cluster)
        cluster.scheduler.at(at, restore)

    result = play(calm(seed), prepare=prepare)
    (cluster,) = clusters
    assert before, "the jobs were over before etcd was restored"
    # What was committed in the forgotten time is left behind, and that alone.
    strange = [one for one in result.violations if not any(name in one for name in forgotten)]
    assert not strange
    lost = [key for key in before["blobs"] if any(name in key for name in forgotten)]
    assert set(lost) <= set(cluster.store._blobs), "a forgotten checkpoint was deleted"
    for replica in cluster.replicas.values():
        assert replica.guardian is not None
        assert not replica.guardian.stopped, "a coordinator ended for good"
