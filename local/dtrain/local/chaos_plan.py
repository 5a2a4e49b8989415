"""What chaos does when: drawn from a seed, before anything is known of the cluster.

A ``Draw`` says what kind of fault comes next, how long it lasts and how patient
chaos is; a number between 0 and 1 chooses whom it hits among those that are
there at that moment. The same seed and settings give the same draws.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dtrain.local.faults import WEIGHTS, Fault, Kind, Part
from dtrain.local.links import WAYS
from dtrain.local.sight import Sight
from dtrain.protocol.errors import ErrorCode, Refused


@dataclass(frozen=True, slots=True)
class Settings:
    """How chaos behaves; times in seconds.

    ``targets`` are parts (agent, leader, ...) or names (a1, c2, etcd-0); () is
    everything. ``every_s`` is the mean pause between faults. ``hold_s`` bounds
    how long a fault lasts that must be healed. ``wait`` is the share of faults
    whose recovery is awaited before the next: the others may hit a recovery.
    """

    seed: int
    kinds: tuple[Kind, ...] = tuple(Kind)
    without: tuple[tuple[Kind, Part], ...] = ()
    targets: tuple[str, ...] = ()
    every_s: float = 5.0
    hold_s: tuple[float, float] = (0.5, 8.0)
    slow_s: tuple[float, float] = (0.02, 0.25)
    wait: float = 1.0
    count: int = 1_000_000_000
    for_s: float = float("inf")
    patience_s: float = 180.0
    """A fault that is not recovered from for so long ends the run."""

    def __post_init__(self) -> None:
        low, high = self.hold_s
        if not 0 < low <= high or self.every_s < 0 or not 0 <= self.wait <= 1 or self.patience_s <= high:
            raise Refused(
                ErrorCode.BAD_SETTING,
                "--every cannot be negative, --hold needs more than 0 s, and less than --patience",
            )
        known = {part.value for part in Part}
        for name in self.targets:
            if name not in known and not name[-1:].isdigit():
                raise Refused(
                    ErrorCode.BAD_SETTING,
                    f"{name!r} is no target",
                    fix=f"use {', '.join(sorted(known))}, or names such as a1, c2, etcd-0",
                )
        if not possible(self):
            raise Refused(
                ErrorCode.BAD_SETTING, "none of these kinds of fault can be done to any of these targets"
            )


@dataclass(frozen=True, slots=True)
class Draw:
    """One fault to come. ``pick`` in [0, 1) chooses whom it hits."""

    kind: Kind
    part: Part
    pick: float
    last_s: float
    way: str
    delay_s: float
    wait: bool
    pause_s: float

    def __str__(self) -> str:
        details = {
            Kind.CUT: f", {self.way}",
            Kind.SLOW: f", {1000 * self.delay_s:.0f} ms each way",
        }.get(self.kind, "")
        lasts = f" for {self.last_s:.1f} s" if Fault(self.kind, self.part).lasts else ""
        after = f"{'wait for recovery, then ' if self.wait else ''}pause {self.pause_s:.1f} s"
        return f"{self.kind} {self.part} (picks {self.pick:.3f}{details}){lasts}; {after}"


def possible(settings: Settings) -> dict[tuple[Kind, Part], int]:
    """Return the faults that the settings allow, with their weights."""
    parts = {part for part in Part if part.value in settings.targets}
    names = [name for name in settings.targets if name not in {part.value for part in parts}]
    for name in names:
        # A name says what it is the way local clusters name things; elsewhere all are tried.
        parts |= _parts_of(name)
    return {
        (kind, part): weight
        for (kind, part), weight in WEIGHTS.items()
        if kind in settings.kinds
        and (kind, part) not in settings.without
        and (part in parts or not settings.targets)
    }


def draws(settings: Settings, choices: dict[tuple[Kind, Part], int]) -> Iterator[Draw]:
    """Yield what comes, without end."""
    rng = random.Random(settings.seed)  # noqa: S311 - to be repeated, not to be secret
    kinds, weights = list(choices), list(choices.values())
    while True:
        # Always the same number of random numbers: one setting must not shift all others.
        kind, part = rng.choices(kinds, weights)[0]
        yield Draw(
            kind,
            part,
            pick=rng.random(),
            last_s=rng.uniform(*settings.hold_s),
            way=WAYS[int(rng.random() * len(WAYS))],
            delay_s=rng.uniform(*settings.slow_s),
            wait=rng.random() < settings.wait,
            pause_s=rng.uniform(0, 2 * settings.every_s),
        )


def aim(draw: Draw, sight: Sight, members: Sequence[str], settings: Settings) -> Fault | None:
    """Choose whom a draw hits, of what is there now; None if there is nothing of the kind."""
    names = [name for name in settings.targets if name not in {part.value for part in Part}]
    ranks = sorted(
        (name, number, rank.agent, rank.pid)
        for name, job in sight.jobs.items()
        if job.trains
        for number, rank in job.ranks.items()
        if not names or rank.agent in names
    )
    busy = sorted({agent for _, _, agent, _ in ranks}) or sorted(sight.agents)
    match draw.part:
        case Part.RANK:
            if not ranks:
                return None
            job, number, agent, pid = ranks[int(draw.pick * len(ranks))]
            return Fault(draw.kind, draw.part, agent, job=job, rank=number, pid=pid)
        case Part.LEADER:
            found = [sight.leader] if sight.leader else []
        case Part.COORDINATOR | Part.COORDINATOR_GUARDIAN:
            found = sorted(sight.coordinators)
        case Part.ETCD:
            found = list(members)
        case _:
            found = busy
    found = [name for name in found if not names or name in names or draw.part in settings.targets]
    if not found:
        return None
    name = found[int(draw.pick * len(found))]
    way = draw.way if draw.kind is Kind.CUT else ""
    delay_s = round(draw.delay_s, 3) if draw.kind is Kind.SLOW else 0.0
    return Fault(draw.kind, draw.part, name, pick=int(draw.pick * 1000), way=way, delay_s=delay_s)


def _parts_of(name: str) -> set[Part]:
    if name.startswith("etcd-"):
        return {Part.ETCD}
    if name.startswith("c") and name[1:].isdigit():
        return {Part.COORDINATOR, Part.COORDINATOR_GUARDIAN, Part.LEADER}
    agents = {Part.RANK, Part.LAUNCHER, Part.AGENT, Part.AGENT_GUARDIAN, Part.MACHINE}
    if name.startswith("a") and name[1:].isdigit():
        return agents
    return agents | {Part.COORDINATOR, Part.COORDINATOR_GUARDIAN, Part.LEADER}
