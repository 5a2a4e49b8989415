"""Machines are told to stop, or that they go, and nothing else happens: no step is lost."""

import random

import pytest

from .cluster import Cluster, play
from .schedule import JobShape, Schedule, Shape, Storm, Strike
from .training import SimRank

GRACE_S = 60.0


@pytest.mark.parametrize("kind", ["agent drained", "machine preempted"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(1, 3))
def test_drains_alone_repeat_no_step_and_cost_no_restart(seed: int, together: bool, kind: str) -> None:
    rng = random.Random(f"drains-{seed}-{together}")
    job = JobShape("train", 1.0, total_steps=120, nnodes_min=2, nnodes_max=2, nproc=rng.choice((1, 2)))
    at = rng.uniform(12.0, 20.0)
    times = {"a1": at, "a2": at + (rng.uniform(0.0, 0.5) if together else rng.uniform(10.0, 20.0))}
    strikes = tuple(
        Strike(when, kind, name, rng.uniform(1.0, 10.0), {"grace_s": GRACE_S})
        if kind == "agent drained"
        else Strike(when, kind, name, rng.uniform(25.0, 40.0))
        for name, when in times.items()
    )
    shape = Shape((10, 10, 10), 10, 4, (job,), clock_drift=0.0)
    schedule = Schedule(seed, shape, (Storm(0.0, 60.0),), strikes=strikes)
    done: list[tuple[int, int]] = []
    clusters: list[Cluster] = []

    def prepare(cluster: Cluster) -> None:
        clusters.append(cluster)
        stepped = cluster.checks.stepped

        def noted(rank: SimRank, step: int) -> None:
            done.append((rank.rank, step))
            stepped(rank, step)

        cluster.checks.stepped = noted  # type: ignore[method-assign]

    result = play(schedule, prepare=prepare)
    assert not result.violations, result.violations
    assert len(done) == len(set(done)), "steps were done twice"
    (cluster,) = clusters
    status = cluster.checks.history(next(iter(cluster.jobs))).status
    assert status is not None
    assert (status.restarts, status.failure) == ((), None)
    assert result.attempts >= 2


def test_the_same_without_time_loses_steps() -> None:
    """What the test above would see: with a grace that is over at once ranks are simply ended."""
    job = JobShape("train", 1.0, total_steps=60, nnodes_min=2, nnodes_max=2)
    strike = Strike(15.0, "agent drained", "a1", 5.0, {"grace_s": 0.05})
    shape = Shape((10,), 10, 3, (job,), clock_drift=0.0)
    schedule = Schedule(1, shape, (Storm(0.0, 40.0),), strikes=(strike,))
    done: list[tuple[int, int]] = []

    def prepare(cluster: Cluster) -> None:
        cluster.checks.stepped = lambda rank, step: done.append((rank.rank, step))  # type: ignore[method-assign]

    result = play(schedule, prepare=prepare)
    assert not result.violations
    assert len(done) > len(set(done))
