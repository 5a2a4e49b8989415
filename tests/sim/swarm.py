"""Which cluster, which jobs and which faults a seed stands for.

Swarm testing: a run with few kinds of faults, each at its own rate, reaches states that a run with all
of them at once never does. So sizes, policies, storms and the mix are all drawn.
"""

import random
from dataclasses import replace

from tests.sim.kinds_more import KINDS
from tests.sim.rules import RULES
from tests.sim.schedule import JobShape, Schedule, Shape, Storm

SECOND_JOB_SHARE = 0.25
FOCUS_SHARE = 0.15
"""Of the runs in which one or two kinds strike all the time."""

MORE_FOCUS_SHARE = 0.4
"""Of the runs with many hangs, numbers that are not finite, changes of size."""

CALM_BETWEEN_S = 70.0

NO_WEBHOOK, WEBHOOK_SHARE = 1000, 0.3
"""Seeds up to it go on telling the stories that they told before there were receivers."""


def calm(seed: int) -> Schedule:
    """A run of one job without faults."""
    rng = random.Random(f"dtrain-shape-{seed}")
    job = _job(rng, "train", again=1, long=False)
    return Schedule(seed, _shape(rng, (job,)))


def draw(seed: int) -> Schedule:
    """The run that ``seed`` stands for; its strikes are drawn while it runs."""
    rng = random.Random(f"dtrain-swarm-{seed}")
    storms, ends_calm = _storms(rng)
    long = len(storms) > 1 or not ends_calm
    jobs = [_job(rng, "train", again=9 if long else 1, long=long)]
    if rng.random() < SECOND_JOB_SHARE:
        jobs.append(_job(rng, "other", again=9 if long else 1, long=long))
        ranks = random.Random(f"dtrain-priority-{seed}")
        jobs = [replace(job, priority=ranks.choice((0, 0, 5))) for job in jobs]
    more = random.Random(f"dtrain-more-{seed}")
    jobs = [_more_of(more, job) for job in jobs]
    shape, mix = _shape(rng, tuple(jobs)), _mix(rng)
    apart = random.Random(f"dtrain-apart-{seed}")
    shape = replace(shape, scrub_s=apart.choice((0.0, 0.0, 10.0, 40.0)))
    shape = _more_machines(more, shape)
    mix |= _mix_apart(apart, 1, (0.0, 0.0, 0.3, 0.6)) | _mix_more(more)
    if seed > NO_WEBHOOK and more.random() < WEBHOOK_SHARE:
        shape = replace(shape, webhook=True)
        mix |= _mix_apart(more, 3, (0.0, 0.4, 0.8))
    return Schedule(seed, shape, storms, ends_calm, mix)


def _storms(rng: random.Random) -> tuple[tuple[Storm, ...], bool]:
    match rng.choices(("one", "some", "endless", "years"), (60, 20, 18, 2))[0]:
        case "one":
            return (Storm(0.0, rng.choice((40.0, 80.0, 120.0))),), True
        case "some":
            storms, at = [], rng.uniform(0.0, 20.0)
            for _ in range(rng.choice((2, 2, 3))):
                end = at + rng.uniform(15.0, 45.0)
                storms.append(Storm(at, end))
                at = end + CALM_BETWEEN_S
            return tuple(storms), True
        case "endless":
            return (Storm(0.0, rng.uniform(80.0, 200.0)),), False
        case _:
            # Long enough for the longest outage, and for what comes after it.
            return (Storm(rng.uniform(0.0, 30.0), 700.0),), True


def _mix(rng: random.Random) -> dict[str, float]:
    names = [name for name, kind in KINDS.items() if not kind.apart]
    if rng.random() < FOCUS_SHARE:
        chosen = rng.sample(names, rng.choice((1, 2)))
        return {name: rng.uniform(2.0, 8.0) for name in sorted(chosen)}
    share = rng.choice((0.1, 0.25, 0.4))
    pace = rng.choice((0.5, 1.0, 2.0))
    return {
        name: pace * rng.uniform(*KINDS[name].every_s)
        for name in names
        if rng.random() < share * KINDS[name].share
    }


def _mix_apart(rng: random.Random, number: int, shares: tuple[float, ...]) -> dict[str, float]:
    share = rng.choice(shares)
    return {
        name: rng.uniform(*kind.every_s)
        for name, kind in KINDS.items()
        if kind.apart == number and rng.random() < share * kind.share
    }


def _mix_more(rng: random.Random) -> dict[str, float]:
    if rng.random() > MORE_FOCUS_SHARE:
        return _mix_apart(rng, 2, (0.0, 0.3, 0.6))
    names = [name for name, kind in KINDS.items() if kind.apart == 2]
    mix = {name: rng.uniform(6.0, 20.0) for name in rng.sample(names, rng.choice((1, 2, 3)))}
    return mix | ({"coordinator crash": rng.uniform(10.0, 30.0)} if rng.random() < 0.4 else {})


def _more_of(rng: random.Random, job: JobShape) -> JobShape:
    """Ranges of sizes, spares, and what is to follow from failures: each in some of the runs."""
    if rng.random() < 0.4:
        low = rng.choice((1, 1, job.nnodes_min))
        job = replace(job, nnodes_min=low, nnodes_max=low + rng.choice((1, 2, 3)))
    if rng.random() < 0.15:
        # Most jobs are over before a calm has shown what they make of it.
        job = replace(job, total_steps=max(400, job.total_steps))
    return replace(
        job,
        grow_cooldown_s=rng.choice((0.0, 5.0, 15.0)),
        nproc=0 if rng.random() < 0.2 else job.nproc,
        spares=rng.choice((0, 0, 0, 1, 2)),
        hang_s=rng.choice((0.0, 0.0, 6.0, 15.0)),
        nonfinite=rng.choice(("warn", "warn", "rollback", "rollback", "fail")),
        back=rng.choice((1, 1, 2)),
        rules=tuple(rng.sample(sorted(RULES), rng.choice((1, 2, 3)))) if rng.random() < 0.3 else (),
    )


def _more_machines(rng: random.Random, shape: Shape) -> Shape:
    """Machines that differ: enough of them can hold whatever the jobs want of one."""
    unequal: tuple[int, ...] = ()
    if rng.random() < 0.3:
        needed = max(job.nnodes_max for job in shape.jobs)
        unequal = tuple(rng.choice((2, 2, 3) if n < needed else (1, 2, 4)) for n in range(shape.machines))
    return replace(shape, unequal=unequal, cordon_s=rng.choice((0.0, 0.0, 20.0, 40.0)))


def _shape(rng: random.Random, jobs: tuple[JobShape, ...]) -> Shape:
    replicas = rng.choice((1, 2, 3, 3, 3, 5))
    needed = max(job.nnodes_max for job in jobs)
    return Shape(
        replica_ttls_s=tuple(rng.choice((5, 10)) for _ in range(replicas)),
        agent_ttl_s=rng.choice((5, 10)),
        machines=needed + rng.choice((0, 1, 1, 2, 4)),
        jobs=jobs,
        clock_drift=rng.choice((0.0, 0.03, 0.03, 0.1)),
        page_keys=rng.choice((500, 500, 7, 3)),
    )


def _job(rng: random.Random, name: str, *, again: int, long: bool) -> JobShape:
    nnodes = rng.choice((1, 2, 2, 3))
    every_steps = rng.choice((0, 5, 10, 20))
    every_seconds = rng.choice((0.0, 5.0, 15.0)) if every_steps == 0 or rng.random() < 0.2 else 0.0
    submit_at = rng.uniform(0.5, 8.0)
    # Not drawn from the seed's own numbers: pinned seeds must go on telling their stories.
    save_every = random.Random(repr(submit_at)).choice((0, 0, 0, 0, 9, 25))
    return JobShape(
        name,
        submit_at=submit_at,
        total_steps=rng.choice((80, 150, 400) if long else (25, 50, 80, 120)),
        nnodes_min=nnodes,
        nnodes_max=nnodes + rng.choice((0, 0, 0, 1)),
        nproc=rng.choice((1, 1, 2)),
        every_steps=every_steps,
        every_seconds=every_seconds,
        keep_last=rng.choice((2, 3)),
        timeout_s=rng.choice((20.0, 60.0)),
        isolation_grace_s=rng.choice((0.0, 0.0, 5.0, 20.0)),
        reschedule_grace_s=rng.choice((0.0, 0.0, 0.0, 5.0, 20.0)),
        save_every=save_every,
        submissions_max=again,
    )
