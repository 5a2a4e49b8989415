"""The engine that strikes: draws faults from a mix, or repeats those of a schedule, and heals.

What a strike does is in ``kinds.py``. Each one is written down as it happens, with its target and all
that was drawn for it, so that the same run follows from the list alone.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Unavailable
from tests.sim import kinds
from tests.sim.kinds_more import HARMLESS, KINDS
from tests.sim.schedule import Storm, Strike
from tests.sim.scheduler import Event

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


HARM_S = 40.0
"""After a strike: leases end, others take over, what was late arrives."""


class Faults:
    """Strikes a cluster; rates that others read are fields."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster = cluster
        self.scheduler = cluster.scheduler
        self.rng = cluster.scheduler.chaos
        """What is struck, when, and for how long. The world's own chance is another."""
        self.raging = False
        self.seal_failure = 0.0
        self.launcher_failure = 0.0
        self.store_failure = 0.0
        self.store_slow_s = 0.0
        self.recorded: list[Strike] = []
        self.harm_until = 0.0
        """When what has struck so far can do no more harm: what is planned costs no step from then on."""
        self._heals: dict[int, Callable[[], None]] = {}
        self._number = 0
        self._due: list[Event] = []
        self._rates: dict[str, dict[int, float]] = {}
        cluster.store.fault = self._store_fault

    # Storms.

    def begin(self, storm: Storm) -> None:
        """Let faults strike until the storm's end."""
        self.raging = True
        schedule = self.cluster.schedule
        if schedule.strikes is None:
            for name, mean_s in schedule.mix.items():
                self._repeat(KINDS[name], mean_s, storm)
            return
        for strike in schedule.strikes:
            if storm.start <= strike.at < storm.end:
                self._due.append(self.scheduler.at(strike.at, lambda strike=strike: self.strike(strike)))  # type: ignore[misc]

    def calm(self) -> None:
        """No more faults; what can heal heals."""
        self.raging = False
        self.harm_until = min(self.harm_until, self.scheduler.now + HARM_S)
        self.scheduler.log("FAULTS", "calm begins")
        for event in self._due:
            event.cancel()
        self._due.clear()
        for number in list(self._heals):
            self._heal(number)
        kinds.repair(self.cluster)

    def strike(self, strike: Strike) -> None:
        """Do it, and write it down."""
        self.recorded.append(strike)
        if strike.kind not in HARMLESS:
            self.harm_until = max(self.harm_until, self.scheduler.now + strike.lasts_s + HARM_S)
        self.scheduler.log("FAULTS", strike.kind, at=strike.target, s=round(strike.lasts_s, 2), **strike.args)
        KINDS[strike.kind].apply(self, strike)

    def _repeat(self, kind: "kinds.Kind", mean_s: float, storm: Storm) -> None:
        def once() -> None:
            # Drawing is nothing that happens in the world: a schedule has the strikes only.
            self.scheduler.events -= 1
            target = kind.who(self)
            if target is not None:
                lasts_s = self.rng.uniform(*kind.lasts_s) if kind.lasts_s else 0.0
                args = {name: self.rng.uniform(*bounds) for name, bounds in kind.args.items()}
                self.scheduler.events += 1
                self.strike(Strike(self.scheduler.now, kind.name, target, lasts_s, args))
            again(self.rng.expovariate(1.0 / mean_s))

        def again(delay_s: float) -> None:
            if self.scheduler.now + delay_s < storm.end:
                self._due.append(self.scheduler.after(delay_s, once))

        again(self.rng.uniform(0.0, mean_s))

    # What kinds use.

    def until(self, strike: Strike, heal: Callable[[], None]) -> None:
        """Call ``heal`` when the strike's time is over, or when the calm begins."""
        self._number += 1
        number = self._number
        self._heals[number] = heal
        self.scheduler.after(strike.lasts_s, lambda: self._heal(number))

    def rate(self, strike: Strike, owner: Any, name: str, value: float) -> None:
        """Raise a rate for the strike's time; of several at once the highest counts."""
        active = self._rates.setdefault(name, {})
        self._number += 1
        number, calm_value = self._number, getattr(owner, name) if not active else active[0]
        active[0], active[number] = calm_value, value
        setattr(owner, name, max(active.values()))

        def heal() -> None:
            del active[number]
            setattr(owner, name, max(active.values()))
            if len(active) == 1:
                active.clear()

        self.until(strike, heal)

    def chance(self, strike: Strike) -> random.Random:
        """Chance that belongs to one strike: the same whenever it is repeated."""
        return random.Random(f"{strike.kind}/{strike.at!r}/{strike.target}")

    def _heal(self, number: int) -> None:
        heal = self._heals.pop(number, None)
        if heal is not None:
            heal()

    def _store_fault(self, operation: str, key: str) -> None:
        if not self.scheduler.chance(self.store_failure):
            return
        if operation == "put.stored" or (operation == "delete" and self.scheduler.chance(0.5)):
            raise OutcomeUnknown(ErrorCode.STORE_UNAVAILABLE, f"no answer to {operation} of {key}")
        raise Unavailable(ErrorCode.STORE_UNAVAILABLE, f"the store failed at {operation} of {key}")
