"""A run as data: the shape of its cluster, its storms, and every fault with its time and target.

A run that draws its faults writes down what it did; the same run follows from what was written. That is
what makes a failure small: ``shrink.py`` leaves out one thing after the other and runs the rest.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class JobShape:
    """A job as it will be submitted, and how long its training is."""

    name: str
    submit_at: float
    total_steps: int
    nnodes_min: int = 1
    nnodes_max: int = 1
    nproc: int = 1
    every_steps: int = 0
    every_seconds: float = 0.0
    keep_last: int = 3
    timeout_s: float = 60.0
    isolation_grace_s: float = 0.0
    reschedule_grace_s: float = 0.0
    save_every: int = 0
    """Its script saves every so many steps itself, and waits for the commit; 0: never."""
    priority: int = 0
    spares: int = 0
    grow_cooldown_s: float = 60.0
    hang_s: float = 0.0
    """Ranks that complete no step for so long are called hung; 0: a deadline that follows their steps."""
    nonfinite: str = "warn"
    """What follows from a loss that is not finite: the name of a ``NonFiniteAction``."""
    back: int = 1
    """How many checkpoints that goes back, if it does."""
    rules: tuple[str, ...] = ()
    """Names of ``rules.RULES``."""
    submissions_max: int = 1
    """An operator who sees it end while faults go on submits it again, so often in all."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is there: one TTL per replica, machines with ``slots`` slots each, jobs."""

    replica_ttls_s: tuple[int, ...]
    agent_ttl_s: int
    machines: int
    jobs: tuple[JobShape, ...]
    slots: int = 2
    unequal: tuple[int, ...] = ()
    """Slots of the first machines, where they differ; the others have ``slots``."""
    cordon_s: float = 0.0
    """For so long are machines kept free that are blamed too often; 0: never."""
    clock_drift: float = 0.03
    """A node's clock is at most so much faster or slower than true time."""
    page_keys: int = 500
    """How many keys the mirror asks for at once."""
    scrub_s: float = 0.0
    """Interval in which committed checkpoints are read again; 0: never."""
    webhook: bool = False
    """The leader tells a receiver of everything that happens."""

    def slots_of(self, number: int) -> int:
        """Slots of machine ``number``, from 1."""
        return self.unequal[number - 1] if number <= len(self.unequal) else self.slots


@dataclass(frozen=True, slots=True)
class Storm:
    """Faults strike in [``start``, ``end``); afterwards everything heals."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault. ``lasts_s`` 0: it heals by itself, or only when its storm is over."""

    at: float
    kind: str
    target: str = ""
    lasts_s: float = 0.0
    args: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.at:9.3f} s  {self.kind}"
        if self.target:
            text += f" at {self.target}"
        if self.lasts_s:
            text += f" for {self.lasts_s:.3f} s"
        named = ", ".join(f"{name} {value:g}" for name, value in self.args.items())
        return f"{text} ({named})" if named else text


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that ``run`` needs. With ``strikes`` None they are drawn from ``mix``."""

    seed: int
    shape: Shape
    storms: tuple[Storm, ...] = ()
    ends_calm: bool = True
    """After the last storm all must end well; False: faults strike to the very end."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Kinds of faults of this run, each with the mean time between two strikes, s."""
    strikes: tuple[Strike, ...] | None = None
    about: str = ""
    """What it shows, in a sentence."""
    violation: str = ""
    """Name of the violation that it was stored for."""

    def describe(self) -> str:
        """Return it as lines for people."""
        shape = self.shape
        ttls = ", ".join(f"{ttl} s" for ttl in shape.replica_ttls_s)
        slots = "/".join(str(shape.slots_of(1 + n)) for n in range(len(shape.unequal))) or shape.slots
        lines = [
            f"seed {self.seed}: {len(shape.replica_ttls_s)} replicas (TTL {ttls}), {shape.machines} machines"
            f" (TTL {shape.agent_ttl_s} s, {slots} slots), clocks within {shape.clock_drift:.0%}"
            + (f", bad machines kept free for {shape.cordon_s:g} s" if shape.cordon_s else "")
            + (", a webhook" if shape.webhook else "")
        ]
        for job in shape.jobs:
            more = {
                "priority": job.priority,
                "spares": job.spares,
                "cooldown": job.grow_cooldown_s if job.nnodes_max > job.nnodes_min else 0,
                "hang after": job.hang_s,
            }
            lines.append(
                f"  job {job.name}: {job.nnodes_min}-{job.nnodes_max} x {job.nproc or 'all slots'},"
                f" {job.total_steps} steps,"
                f" a checkpoint each {job.every_steps} steps / {job.every_seconds:g} s,"
                f" submitted at {job.submit_at:.1f} s"
                + "".join(f", {name} {value:g}" for name, value in more.items() if value)
                + (f", not finite: {job.nonfinite}" if job.nonfinite != "warn" else "")
                + (f", rules: {', '.join(job.rules)}" if job.rules else "")
            )
        storms = ", ".join(f"{storm.start:.1f}-{storm.end:.1f} s" for storm in self.storms)
        lines.append(
            f"  storms: {storms or 'none'}; {'then calm' if self.ends_calm else 'no calm at the end'}"
        )
        if self.strikes is None:
            mix = ", ".join(f"{kind} each {mean_s:.0f} s" for kind, mean_s in self.mix.items())
            lines.append(f"  mix: {mix or 'nothing'}")
        else:
            lines += [f"  {strike}" for strike in self.strikes]
        return "\n".join(lines)

    def dumps(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load(path: Path) -> Schedule:
    """Read what ``Schedule.dumps`` wrote."""
    return parse(json.loads(path.read_text()))


def parse(document: dict[str, Any]) -> Schedule:
    """Return the schedule in a JSON document."""
    shape = dict(document["shape"])
    shape["replica_ttls_s"] = tuple(shape["replica_ttls_s"])
    shape["jobs"] = tuple(JobShape(**{**job, "rules": tuple(job.get("rules", ()))}) for job in shape["jobs"])
    shape["unequal"] = tuple(shape.get("unequal", ()))
    strikes = document["strikes"]
    return Schedule(
        **{
            **document,
            "shape": Shape(**shape),
            "storms": tuple(Storm(**storm) for storm in document["storms"]),
            "strikes": None if strikes is None else tuple(Strike(**strike) for strike in strikes),
        }
    )
