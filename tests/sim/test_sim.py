"""Random faults, then calm: the promises hold in every step, and the job ends as if nothing had happened."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from . import swarm
from .cluster import Cluster, Result, play, run

SEEDS_PER_CHUNK = 4
CHUNKS = 30
VACUOUS_MAX = 3
"""Of one chunk: storms and calms in which nothing succeeded prove little."""

PINNED = [
    int(line.split()[0])
    for line in Path(__file__).with_name("pinned.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def verdict(result: Result) -> str:
    """What went wrong, and how to see it again; "" if nothing did."""
    if not result.violations:
        return ""
    replay = f"  replay: make sim SEED={result.seed}"
    return f"{result.violations[0]}\n{replay}\n{result.schedule.describe()}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_promises_hold_under_faults(chunk: int) -> None:
    first = 1 + chunk * SEEDS_PER_CHUNK
    results = [run(seed) for seed in range(first, first + SEEDS_PER_CHUNK)]
    failed = [text for result in results if (text := verdict(result))]
    assert not failed, "\n".join(failed)
    assert sum(bool(result.vacuous) for result in results) <= VACUOUS_MAX


@pytest.mark.parametrize("seed", PINNED)
def test_a_seed_that_once_found_a_bug_passes(seed: int) -> None:
    assert not verdict(run(seed))


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_calm_run_needs_one_attempt_and_loses_no_checkpoint(seed: int) -> None:
    clusters: list[Cluster] = []
    result = run(seed, calm=True, prepare=clusters.append)
    assert not verdict(result)
    (cluster,) = clusters
    assert result.attempts == 1
    assert result.terms == 1
    ((name, job),) = cluster.jobs.items()
    steps = sorted({int(commit.step) for commit in cluster.checks.jobs[name].commits.values()})
    policy = job.spec.checkpoint
    assert steps[-1] == job.total_steps
    # Saving takes seconds: what is due more often than that is skipped, and rightly.
    if policy.every_steps >= 10 and not policy.every_seconds:
        wanted = range(policy.every_steps, job.total_steps, policy.every_steps)
        # A target that came too late is tried again with more slack: one may be missed, never most.
        assert len(set(wanted) - set(steps)) <= max(1, len(wanted) // 4)


def test_a_seed_is_a_history() -> None:
    first, second = run(7, trace=True), run(7, trace=True)
    assert first.fingerprint == second.fingerprint
    assert first.trace == second.trace


def test_no_real_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the store fails and is asked again: a run is its seed's, however slow the machine."""

    def slept(_seconds: float) -> None:
        raise AssertionError("slept in real time")

    monkeypatch.setattr(time, "sleep", slept)
    drawn = swarm.draw(4)
    mix = {"store failures": 4.0, "checkpoint now": 4.0, "damage reported": 4.0, "rank crash": 20.0}
    result = play(replace(drawn, mix=mix, shape=replace(drawn.shape, scrub_s=10.0)))
    assert not verdict(result)
    assert "damage reported" in result.faults
