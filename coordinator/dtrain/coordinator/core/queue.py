"""Who is next: the order of waiting jobs, what is kept free for them, and who has to make room.

Jobs wait in the order of priority, then of how long they have waited. Waiting
raises a job: AGING_S of it count as one point of priority, so that nobody
starves behind a stream of more important jobs. As both grow alike, two jobs
never change places by time alone.

In that order each job lays claim to machines; those behind take what is left:

* one that can begin now claims the machines for it, until it begins;
* one that cannot claims the machines of less important jobs, which make room: they
  take a checkpoint, stop, and wait in turn;
* of the others the first one, once it has waited for PATIENCE_S, claims as many
  machines as it needs, free or not. Until then others may slip in before it.

A claim only keeps others away from more than they have: what runs is never disturbed
by one, nor is it kept from starting again. Whoever would grow leaves alone what is claimed,
and what the first in the queue is about to claim: unlike what slips in, it would not be gone soon.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.wording import count, some

AGING_S = 600.0
"""Waiting that counts as much as one point of priority."""

PATIENCE_S = 30.0
"""How long the first in the queue lets others slip in before it."""

HOLD_S = 40.0
"""A job that could begin and does not, for reasons of its own, claims nothing after that."""

REST_S = 300.0
"""A job that had to make room before is left alone so long once it runs again."""

PLACES_TOLD = 20
"""Further back a job is not told its place: each change would be written to hundreds of records."""

KEPT_TOLD = 4
"""Machines held back for others that a job is told of."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job without machines. ``ranks`` on each of ``nodes_min`` to ``nodes_max``; 0: one for each slot.

    ``since`` is in seconds since the epoch, ``seen_at`` of the local monotonic clock.
    ``restarts``: it had machines until now.
    """

    job: JobName
    priority: int
    since: float
    seen_at: float
    nodes_min: int = 1
    nodes_max: int = 1
    ranks: int = 1
    restarts: bool = False
    after: str = ""
    """It made room for this job, and comes after it, whatever clocks say of how long either has waited."""
    ready: bool = True
    """Nothing but machines is missing, as far as is known: nobody makes room for one that could not begin."""

    @property
    def key(self) -> tuple[float, int, str]:
        """What the queue is sorted by."""
        return self.since - self.priority * AGING_S, -self.priority, self.job


@dataclass(frozen=True, slots=True)
class Running:
    """A job that has machines: ranks by agent. ``leaving``: they come free, nothing has to be done.

    ``since`` is of the local monotonic clock. ``saves``: it has a store, so that
    little is lost if it makes room.
    """

    job: JobName
    priority: int
    since: float
    ranks: Mapping[AgentName, int]
    leaving: bool = False
    saves: bool = True
    made_room: bool = False
    """It had to make room before it began."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that ranks may be placed on; ``free`` of its slots no attempt has."""

    slots: int
    free: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job stands in the queue.

    ``position`` from 1; 0: too far back to be told. ``first`` is who is at its head,
    ``others`` are between them. ``room``: the jobs that it waits for to make room.
    """

    position: int
    fits: bool
    first: Waiting | None = None
    others: int = 0
    room: tuple[str, ...] = ()
    kept: tuple[tuple[AgentName, JobName], ...] = ()
    """Machines that have enough free for it, and for whom they are held back; KEPT_TOLD at most."""


@dataclass(frozen=True, slots=True)
class Queue:
    """What came of arranging; ``changes_at``: when it is another by time alone."""

    places: Mapping[JobName, Place] = field(default_factory=dict)
    waiting: Mapping[JobName, Waiting] = field(default_factory=dict)
    claims: Mapping[JobName, Mapping[AgentName, int]] = field(default_factory=dict)
    """Slots by machine, in the order in which they were laid."""
    turns: Mapping[JobName, int] = field(default_factory=dict)
    """When in that order it was each job's turn."""
    victims: Mapping[JobName, JobName] = field(default_factory=dict)
    """Who has to make room, and for whom."""
    fitting: Mapping[JobName, float] = field(default_factory=dict)
    """Since when a job could begin."""
    changes_at: float | None = None
    soon: Mapping[AgentName, int] = field(default_factory=dict)
    """What the first in the queue claims once its patience is over."""

    def held_from(self, job: JobName) -> Mapping[AgentName, int]:
        """Slots that are not for ``job``: those before it claim them. A job that runs is not concerned."""
        turn = self.turns.get(job)
        if turn is None or not self.claims:
            return {}
        return _sum(claim for of, claim in self.claims.items() if self.turns[of] < turn)

    def claimed(self) -> Mapping[AgentName, int]:
        """Slots that any waiting job claims, or soon will: nothing for a running job to grow onto."""
        return _sum([*self.claims.values(), self.soon])

    def holders(self, job: JobName, agent: AgentName) -> tuple[JobName, ...]:
        """Those before ``job`` that claim slots of a machine."""
        turn = self.turns.get(job, 0)
        return tuple(of for of, claim in self.claims.items() if self.turns[of] < turn and agent in claim)

    def why(self, job: JobName) -> str:
        """Why it waits, as far as that lies with other jobs; "": it does not."""
        place, waiting = self.places.get(job), self.waiting.get(job)
        if place is None or waiting is None or place.fits:
            return ""
        what = f"waits for {_machines(waiting)}{_held_back(place.kept)}"
        if place.room:
            what = f"waits until {_names(place.room)} made room"
        if place.first is None:
            return what if place.room else ""
        if not place.position:
            return f"{what}, behind more than {PLACES_TOLD - 1} jobs"
        behind = f"behind {place.first.job} (priority {place.first.priority})"
        if place.others:
            behind += f" and {place.others} more"
        return f"{_ordinal(place.position)} in the queue: {what}, {behind}"


def arrange(
    waiting: Collection[Waiting],
    running: Collection[Running],
    machines: Mapping[AgentName, Machine],
    now: float,
    fitting: Mapping[JobName, float],
) -> Queue:
    """Say of each waiting job whether it is its turn, and what is claimed for it.

    ``fitting``: what an earlier ``Queue`` said.
    """
    keys: dict[str, tuple[float, int, str]] = {one.job: one.key for one in waiting}
    order = sorted(waiting, key=lambda one: (max(one.key, keys.get(one.after, one.key)), one.after in keys))
    room = _Room(machines, running, now)
    claims: dict[JobName, Mapping[AgentName, int]] = {}
    fits: dict[JobName, float] = {}
    made: dict[JobName, tuple[str, ...]] = {}
    turns: dict[JobName, int] = {}
    instants: list[float] = []
    kept: dict[JobName, tuple[AgentName, ...]] = {}
    patient: Waiting | None = None
    never: set[JobName] = set()
    # What only starts again has its machines still, as it were: nobody takes them meanwhile.
    again = [one for one in order if one.restarts and room.has(one)]
    rest = [one for one in order if one not in again] if again else order
    reserved = False
    for turn, one in enumerate([*again, *rest]):
        turns[one.job] = turn
        if room.has(one):
            since = fits[one.job] = fitting.get(one.job, now)
            if now < since + HOLD_S:
                instants.append(since + HOLD_S)
                claims[one.job] = room.take(one)
            continue
        if claims and len(kept) < PLACES_TOLD:
            kept[one.job] = room.kept_from(one)
        if not room.could_have(one):
            never.add(one.job)
        if not one.ready or one.job in never:
            continue  # with all machines to itself it could not begin: nothing is kept for it
        if found := room.make(one):
            made[one.job] = found
            claims[one.job] = room.take(one, coming=True)
        elif not reserved:
            reserved = True
            if now >= one.seen_at + PATIENCE_S:
                claims[one.job] = room.reserve(one)
            else:
                patient = one
                instants.append(one.seen_at + PATIENCE_S)
    return Queue(
        _places(order, fits, made, _holders(claims, turns, kept), never),
        {one.job: one for one in order},
        claims,
        turns,
        room.victims,
        fits,
        min([*instants, *room.instants], default=None),
        {} if patient is None else room.reserve(patient),
    )


def _places(
    order: Sequence[Waiting],
    fits: Mapping[JobName, float],
    made: Mapping[JobName, tuple[str, ...]],
    kept: Mapping[JobName, tuple[tuple[AgentName, JobName], ...]],
    never: Collection[JobName],
) -> dict[JobName, Place]:
    """Where each stands. ``never``: what they lack is machines; they hold up nobody, and nobody them."""
    places = {job: Place(0, True) for job in fits}
    stuck = [one for one in order if one.job not in fits]
    able = [one for one in stuck if one.job not in never]
    positions = {one.job: index for index, one in enumerate(able)}
    for index, one in enumerate(stuck):
        position = positions.get(one.job)
        if index >= PLACES_TOLD:
            places[one.job] = Place(0, False, order[0])
        elif position is None:
            places[one.job] = Place(0, False)
        else:
            places[one.job] = Place(
                position + 1,
                False,
                able[0] if position else None,
                max(0, position - 1),
                made.get(one.job, ()),
                kept.get(one.job, ()),
            )
    return places


def _holders(
    claims: Mapping[JobName, Mapping[AgentName, int]],
    turns: Mapping[JobName, int],
    kept: Mapping[JobName, tuple[AgentName, ...]],
) -> dict[JobName, tuple[tuple[AgentName, JobName], ...]]:
    """For whom machines are held back from each job: the first who claims them."""
    found = {}
    for job, names in kept.items():
        before = [of for of in claims if turns[of] < turns[job]]
        found[job] = tuple((name, next(of for of in before if name in claims[of])) for name in names)
    return found


class _Room:
    """The machines while claims are laid. ``coming``: slots that leaving jobs and victims have still."""

    def __init__(
        self, machines: Mapping[AgentName, Machine], running: Collection[Running], now: float
    ) -> None:
        self._machines = machines
        self._free = {name: machine.free for name, machine in sorted(machines.items())}
        self._levels = Counter(self._free.values())
        self._slots = Counter(machine.slots for machine in machines.values())
        self._claimed: Counter[AgentName] = Counter()
        self._coming: Counter[AgentName] = Counter()
        self._leaving = sorted(one.job for one in running if one.leaving)
        self.instants: list[float] = []
        self.victims: dict[JobName, JobName] = {}
        self._prey: list[Running] = []
        for one in running:
            if one.leaving:
                self._coming.update(one.ranks)
            elif one.made_room and now < one.since + REST_S:
                self.instants.append(one.since + REST_S)
            else:
                self._prey.append(one)
        # The least important first, then those that lose least, then the youngest.
        self._prey.sort(key=lambda one: (one.priority, not one.saves, -one.since, one.job))

    def has(self, one: Waiting) -> bool:
        """Whether enough is free for it."""
        if one.ranks:
            able = sum(count for level, count in self._levels.items() if level >= one.ranks)
        else:
            able = sum(1 for name in self._free if 0 < self._need(one, name) <= self._free[name])
        return able >= one.nodes_min

    def kept_from(self, one: Waiting) -> tuple[AgentName, ...]:
        """Machines on which enough would be free for it, had nobody before it claimed them."""
        able = (
            name
            for name, machine in self._machines.items()
            if self._free[name] < self._need(one, name) <= machine.free
        )
        return tuple(islice(able, KEPT_TOLD))

    def could_have(self, one: Waiting) -> bool:
        """Whether all machines together would do."""
        return sum(n for slots, n in self._slots.items() if slots >= max(1, one.ranks)) >= one.nodes_min

    def take(self, one: Waiting, *, coming: bool = False) -> dict[AgentName, int]:
        """Claim machines that are free, or come free."""
        able = [
            name
            for name in self._free
            if 0 < self._need(one, name) <= self._free[name] + (self._coming[name] if coming else 0)
        ]
        # Of what comes free no more than needed.
        able.sort(key=lambda name: self._free[name] < self._need(one, name))
        return self._claim(one, able[: one.nodes_min if coming else one.nodes_max])

    def reserve(self, one: Waiting) -> dict[AgentName, int]:
        """Claim machines whether they are free or not: those with the least on them."""
        able = [
            name
            for name, machine in self._machines.items()
            if 0 < self._need(one, name) <= machine.slots - self._claimed[name]
        ]
        able.sort(key=lambda name: (max(0, self._need(one, name) - self._free[name]), name))
        return self._claim(one, able[: one.nodes_min])

    def make(self, one: Waiting) -> tuple[str, ...]:
        """Find jobs that make room for it; (): there are none that would do."""
        total = Counter(self._free)
        total.update({name: slots for name, slots in self._coming.items() if name in self._free})
        able = self._able(one, total)
        if able >= one.nodes_min:
            return tuple(self._leaving)
        chosen: list[Running] = []
        for prey in self._prey:
            if prey.priority >= one.priority or able >= one.nodes_min:
                break
            chosen.append(prey)
            able += self._shift(one, total, prey, 1)
        if able < one.nodes_min:
            return ()
        for prey in list(chosen):
            # Taken for its slots and then not needed, as a later one has more of them.
            if able + (lost := self._shift(one, total, prey, -1)) < one.nodes_min:
                self._shift(one, total, prey, 1)
            else:
                able += lost
                chosen.remove(prey)
        for prey in chosen:
            self._prey.remove(prey)
            self._coming.update(prey.ranks)
            self.victims[prey.job] = one.job
        return tuple(sorted({*self._leaving, *(prey.job for prey in chosen)}))

    def _able(self, one: Waiting, total: Mapping[AgentName, int]) -> int:
        return sum(1 for name in self._free if 0 < self._need(one, name) <= total[name])

    def _shift(self, one: Waiting, total: Counter[AgentName], prey: Running, sign: int) -> int:
        """Add or take away its slots; return by how much the number of machines that will do changes."""
        change = 0
        for name, ranks in prey.ranks.items():
            if name in self._free:
                need = self._need(one, name)
                did = 0 < need <= total[name]
                total[name] += sign * ranks
                change += (0 < need <= total[name]) - did
        return change

    def _claim(self, one: Waiting, names: Iterable[AgentName]) -> dict[AgentName, int]:
        claim = {}
        for name in names:
            need = claim[name] = self._need(one, name)
            self._claimed[name] += need
            free = min(need, self._free[name])
            self._levels[self._free[name]] -= 1
            self._free[name] -= free
            self._levels[self._free[name]] += 1
            self._coming[name] -= need - free
        return claim

    def _need(self, one: Waiting, name: AgentName) -> int:
        return one.ranks or self._machines[name].slots


def _sum(claims: Iterable[Mapping[AgentName, int]]) -> dict[AgentName, int]:
    found: dict[AgentName, int] = {}
    for claim in claims:
        for name, slots in claim.items():
            found[name] = found.get(name, 0) + slots
    return found


def _machines(one: Waiting) -> str:
    agents = count(one.nodes_min, "agent")
    if not one.ranks:
        return f"{agents} with nothing else on {'it' if one.nodes_min == 1 else 'them'}"
    return f"{agents} with {count(one.ranks, 'free slot')}"


def _held_back(kept: Sequence[tuple[AgentName, JobName]]) -> str:
    by: dict[JobName, list[AgentName]] = {}
    for agent, job in kept:
        by.setdefault(job, []).append(agent)
    texts = [held_back(agents, job) for job, agents in by.items()]
    return f" ({', '.join(texts)})" if texts else ""


def held_back(agents: Sequence[AgentName], job: JobName) -> str:
    """Machines that are free and claimed by a job, in words."""
    return f"{', '.join(agents)} {'is' if len(agents) == 1 else 'are'} held back for {job}"


def _names(jobs: Sequence[str]) -> str:
    if len(jobs) > 3:
        return f"{some(jobs, 3)} have"
    return f"{' and '.join(jobs)} {'has' if len(jobs) == 1 else 'have'}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
