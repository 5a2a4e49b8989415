"""Jobs that wait for one another, make room and are suspended: no step is lost, everybody's turn comes."""

import random

import pytest

from .cluster import Cluster, play
from .schedule import JobShape, Schedule, Shape, Storm, Strike
from .training import SimRank


def played(schedule: Schedule) -> tuple[Cluster, list[tuple[str, int, int]]]:
    """Run it; return the cluster and every step that any rank has done."""
    done: list[tuple[str, int, int]] = []
    clusters: list[Cluster] = []

    def prepare(cluster: Cluster) -> None:
        clusters.append(cluster)
        stepped = cluster.checks.stepped

        def noted(rank: SimRank, step: int) -> None:
            done.append((rank.launcher.job, rank.rank, step))
            stepped(rank, step)

        cluster.checks.stepped = noted  # type: ignore[method-assign]

    result = play(schedule, prepare=prepare)
    assert not result.violations, result.violations
    return clusters[0], done


@pytest.mark.parametrize("seed", range(1, 4))
def test_suspending_repeats_no_step_and_costs_no_restart(seed: int) -> None:
    rng = random.Random(f"suspends-{seed}")
    job = JobShape("train", 1.0, total_steps=150, nnodes_min=2, nnodes_max=2, nproc=rng.choice((1, 2)))
    strikes = tuple(
        Strike(at + rng.uniform(0.0, 5.0), "suspend", "train", rng.uniform(0.2, 12.0)) for at in (12.0, 40.0)
    )
    shape = Shape((10, 10, 10), 10, 3, (job,), clock_drift=0.0)
    cluster, done = played(Schedule(seed, shape, (Storm(0.0, 80.0),), strikes=strikes))
    assert len(done) == len(set(done)), "steps were done twice"
    status = next(iter(cluster.checks.jobs.values())).status
    assert status is not None
    assert (status.restarts, status.failure, status.attempt) == ((), None, 3)


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_pause_repeats_no_step_and_starts_no_attempt(seed: int) -> None:
    rng = random.Random(f"pauses-{seed}")
    job = JobShape("train", 1.0, total_steps=150, nnodes_min=2, nnodes_max=2, nproc=rng.choice((1, 2)))
    strikes = tuple(
        Strike(at + rng.uniform(0.0, 5.0), kind, target, rng.uniform(5.0, 12.0))
        for at in (12.0, 40.0)
        for kind, target in (("pause", "train"), ("coordinator crash", rng.choice(("c1", "c2"))))
    )
    shape = Shape((10, 10, 10), 10, 3, (job,), clock_drift=0.0)
    cluster, done = played(Schedule(seed, shape, (Storm(0.0, 80.0),), strikes=strikes))
    assert len(done) == len(set(done)), "steps were done twice"
    status = next(iter(cluster.checks.jobs.values())).status
    assert status is not None
    assert (status.restarts, status.failure, status.attempt, status.held) == ((), None, 1, 0)
    live = cluster.etcd.memory._live
    told = [kv.value for key, kv in live.items() if "/events/" in key and b'"Paused"' in kv.value]
    assert told, "it was never paused"


@pytest.mark.parametrize("seed", range(1, 3))
def test_jobs_make_room_for_more_important_ones_and_nobody_loses_a_step(seed: int) -> None:
    rng = random.Random(f"priorities-{seed}")
    jobs = tuple(
        JobShape(f"job{n}", rng.uniform(1.0, 30.0), total_steps=60, nproc=2, priority=priority)
        for n, priority in enumerate((0, 0, 5, 9))
    )
    wide = JobShape("wide", 15.0, total_steps=60, nnodes_min=2, nnodes_max=2, nproc=2, priority=7)
    shape = Shape((10,), 10, 2, (*jobs, wide), clock_drift=0.0)
    cluster, done = played(Schedule(seed, shape, (Storm(0.0, 60.0),), strikes=()))
    assert len(done) == len(set(done)), "steps were done twice"
    attempts = {
        name: history.status.attempt for name, history in cluster.checks.jobs.items() if history.status
    }
    assert max(attempts.values()) > 1, "nobody had to make room"
    assert attempts["job3"] == 1, "the most important one never has to"


@pytest.mark.parametrize("seed", range(1, 7))
def test_whatever_strikes_each_job_comes_to_its_end(seed: int) -> None:
    rng = random.Random(f"queue-{seed}")
    jobs = tuple(
        JobShape(
            f"job{n}",
            rng.uniform(0.5, 30.0),
            total_steps=rng.choice((25, 50, 80)),
            nnodes_min=rng.choice((1, 2)),
            nnodes_max=2,
            nproc=rng.choice((1, 2)),
            every_steps=rng.choice((0, 10)),
            timeout_s=20.0,
            priority=rng.choice((0, 0, 5)),
        )
        for n in range(3)
    )
    shape = Shape((5, 10, 10), rng.choice((5, 10)), rng.choice((2, 3)), jobs)
    kinds = ("coordinator crash", "rank crash", "agent crash", "power cut", "cancel", "agent drained")
    mix = {"suspend": rng.uniform(6.0, 15.0)}
    mix |= {name: rng.uniform(15.0, 40.0) for name in rng.sample(kinds, 2)}
    result = play(Schedule(seed, shape, (Storm(0.0, rng.choice((60.0, 100.0))),), mix=mix))
    assert not result.violations, result.violations
