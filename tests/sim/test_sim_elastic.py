"""Sizes that change, ranks that hang, numbers that are not finite: what is planned costs nothing, what fails
is found, and the checks would see it if it were not so."""

import random
from dataclasses import replace
from typing import Any

import pytest

from dtrain.coordinator.core import elastic, hangs, nonfinite, spares
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import FailureKind
from dtrain.trainer.session import Session

from .cluster import Cluster, play
from .schedule import JobShape, Schedule, Shape, Storm, Strike

JOB = JobShape("train", 1.0, total_steps=200, nnodes_min=1, nnodes_max=2, grow_cooldown_s=0.0)


def scaled(seed: int, *times: float) -> Schedule:
    """Ranges drawn at random, one after the other, and nothing else."""
    rng = random.Random(f"scale-{seed}")
    strikes = tuple(
        Strike(at, "scale", "train", 0.0, {"low": rng.uniform(0.0, 0.9), "more": rng.uniform(0.0, 3.0)})
        for at in times
    )
    job = replace(JOB, nproc=rng.choice((0, 1, 2)), spares=rng.choice((0, 1)))
    shape = Shape((10, 10), 10, 4, (job,), clock_drift=0.0, unequal=rng.choice(((), (2, 3, 2, 4))))
    return Schedule(seed, shape, (Storm(0.0, 80.0),), strikes=strikes)


@pytest.mark.parametrize("seed", range(1, 5))
def test_scaling_repeats_no_step_and_costs_no_restart(seed: int) -> None:
    done: list[tuple[int, int]] = []
    sizes: set[int] = set()
    clusters: list[Cluster] = []

    def prepare(cluster: Cluster) -> None:
        clusters.append(cluster)
        stepped = cluster.checks.stepped

        def noted(rank: Any, step: int) -> None:
            done.append((rank.rank, step))
            sizes.add(rank.world)
            stepped(rank, step)

        cluster.checks.stepped = noted  # type: ignore[method-assign]

    result = play(scaled(seed, 15.0, 30.0, 45.0, 60.0), prepare=prepare)
    assert not result.violations, result.violations
    assert len(done) == len(set(done)), "steps were done twice"
    assert len(sizes) > 1, "its size has never changed"
    status = clusters[0].checks.history(next(iter(clusters[0].jobs))).status
    assert status is not None
    assert (status.restarts, status.failure) == ((), None)


def hung(seed: int, *, leader: float = 1.0, hang_s: float = 0.0) -> Schedule:
    """A rank that hangs for good; ``leader`` below the share: leaders are lost while that is found out."""
    rng = random.Random(f"hang-{seed}")
    args = {"ends": 1.0, "leader": leader, "after_s": rng.uniform(2.0, 9.0), "stack": rng.uniform(0.0, 2.9)}
    strike = Strike(25.0, "rank hangs", "a2/1", 0.0, args)
    job = replace(JOB, nnodes_min=2, every_steps=10, hang_s=hang_s)
    shape = Shape((5, 5, 5), 10, 3, (job,), clock_drift=0.0)
    return Schedule(seed, shape, (Storm(0.0, 50.0),), strikes=(strike,))


@pytest.mark.parametrize("hang_s", [0.0, 6.0])
@pytest.mark.parametrize("leader", [1.0, 0.0])
@pytest.mark.parametrize("seed", range(1, 3))
def test_a_hang_is_found_whoever_leads(seed: int, leader: float, hang_s: float) -> None:
    clusters: list[Cluster] = []
    result = play(hung(seed, leader=leader, hang_s=hang_s), prepare=clusters.append)
    assert not result.violations, result.violations
    status = clusters[0].checks.history(next(iter(clusters[0].jobs))).status
    assert status is not None
    assert status.failure is not None
    assert (status.failure.kind, status.attempt) == (FailureKind.HANG, 2)


def sick(action: str) -> Schedule:
    strike = Strike(25.0, "numbers not finite", "a1/0", 0.0, {"steps": 8.0})
    job = replace(JOB, nnodes_max=1, every_steps=5, total_steps=120, nonfinite=action)
    shape = Shape((10,), 10, 2, (job,), clock_drift=0.0)
    return Schedule(1, shape, (Storm(0.0, 50.0),), strikes=(strike,))


@pytest.mark.parametrize(
    ("action", "phase", "attempt"),
    [
        ("warn", JobPhase.SUCCEEDED, 1),
        ("rollback", JobPhase.SUCCEEDED, 2),
        ("fail", JobPhase.FAILED, 1),
    ],
)
def test_what_follows_from_a_loss_that_is_not_finite(action: str, phase: JobPhase, attempt: int) -> None:
    clusters: list[Cluster] = []
    result = play(sick(action), prepare=clusters.append)
    assert not result.violations, result.violations
    status = clusters[0].checks.history(next(iter(clusters[0].jobs))).status
    assert status is not None
    assert (status.phase, status.attempt) == (phase, attempt)
    assert bool(status.passed_over) == (action == "rollback")


# The checks can fail.


def test_a_state_that_is_not_finite_and_committed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "refusal", lambda _draft, _record: "")
    monkeypatch.setattr(nonfinite, "unfit_now", lambda _draft, _members: "")
    assert not play(sick("warn")).violations, "ranks alone see to it"
    monkeypatch.setattr(Session, "_is_unfit", lambda *_: False)
    monkeypatch.setattr(Session, "_refuse_unfit", lambda *_: False)
    assert any("was not finite" in violation for violation in play(sick("warn")).violations)


def test_growing_without_a_checkpoint_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "is_due", lambda *_: True)
    found = [violation for seed in range(1, 5) for violation in play(scaled(seed, 15.0, 40.0)).violations]
    assert any("repeats steps" in violation for violation in found)


def test_a_job_that_does_not_grow_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "due", lambda _draft, _members: None)
    strike = Strike(60.0, "scale", "train", 0.0, {"low": 0.0, "more": 3.0})
    schedule = replace(scaled(1), strikes=(strike,))
    job = replace(JOB, total_steps=600)
    found = play(replace(schedule, shape=replace(schedule.shape, jobs=(job,)))).violations
    assert any("could be on" in violation or "at most are wanted" in violation for violation in found)


def test_spares_that_stay_cold_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "keep_warm", lambda _draft: None)
    schedule = scaled(1)
    job = replace(JOB, total_steps=600, nnodes_max=1, spares=1)
    schedule = replace(schedule, shape=replace(schedule.shape, jobs=(job,)), strikes=())
    assert any("spares" in violation for violation in play(schedule).violations)


def test_a_hang_that_nobody_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "find", lambda _draft, _members: None)
    assert any("stands at step" in violation for violation in play(hung(1)).violations)


def test_the_wrong_rank_blamed_for_a_hang_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "who", lambda suspects: min(suspects, key=lambda one: one.stack.rank))
    assert any("those that are: [1]" in violation for violation in play(hung(2)).violations)
