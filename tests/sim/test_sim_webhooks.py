"""Webhooks under faults: whoever leads and whatever becomes of the receiver, it hears of everything."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from . import swarm
from .cluster import Cluster, play
from .schedule import Schedule, Storm

RECEIVER = {
    "receiver away": 25.0,
    "receiver fails": 20.0,
    "receiver refuses": 30.0,
    "receiver slow": 20.0,
    "answers of the receiver lost": 20.0,
}
LEADERS: Mapping[str, float] = {
    "coordinator crash": 12.0,
    "coordinator host loss": 30.0,
    "coordinator freeze": 30.0,
    "coordinator paused with its clocks": 30.0,
    "ambiguous writes": 20.0,
    "etcd outage": 30.0,
}


def told(seed: int, faults: Mapping[str, float] = LEADERS) -> tuple[Schedule, list[Cluster]]:
    """A run in which leaders, the receiver and ranks fail, and every event is to be told."""
    drawn = swarm.draw(seed)
    job = replace(drawn.shape.jobs[0], total_steps=150, every_steps=5, submissions_max=3)
    jobs = (job, replace(job, name="other", submit_at=job.submit_at + 3.0))
    shape = replace(drawn.shape, jobs=jobs, replica_ttls_s=(5, 5, 10), webhook=True)
    storms, mix = (Storm(0.0, 60.0), Storm(130.0, 170.0)), {**RECEIVER, **faults, "rank crash": 8.0}
    return replace(drawn, shape=shape, storms=storms, ends_calm=True, mix=mix), []


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_every_event_is_told_at_least_once_and_in_order(seed: int) -> None:
    schedule, clusters = told(seed)
    result = play(schedule, prepare=clusters.append)
    assert not result.violations, f"{result.violations[0]}\n{result.schedule.describe()}"
    hooks = clusters[0].webhooks
    assert hooks is not None
    assert result.terms > 2, "no leader was lost"
    assert hooks.calls > 50, "little was told"
