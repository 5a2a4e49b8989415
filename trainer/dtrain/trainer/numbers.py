"""Reported numbers that are not finite: which, and what of the state they speak against.

A number speaks against the state at the boundary before the step in which it was reported, as
that is what it was computed from, and against that of each boundary until a finite value of it
is reported.
"""

from collections.abc import Collection, Mapping

STEPS_KEPT = 1024
"""Boundaries that are remembered: a copy of one is taken that much later at most."""

NAMES_MAX = 64


class Unfit:
    """The book of them. Whoever uses it from several threads brings the lock."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        """Not finite as of now."""
        self.seen: Mapping[str, int] = {}
        """Ever reported so, by name: the boundary before the step in which it was last."""
        self._steps: dict[int, tuple[str, ...]] = {}

    def report(self, names: Collection[str], now: tuple[str, ...], step: int) -> bool:
        """Take in what was just reported as not finite, and all that is so ``now``; True for a new name."""
        self.names = now
        if not names:
            return False
        new = [name for name in names if name not in self.seen]
        seen = {**self.seen, **dict.fromkeys(names, step)}
        # Replaced, not changed: the report that is being sent holds the former one.
        self.seen = dict(list(seen.items())[-NAMES_MAX:])
        self._mark(step, tuple(names))
        return bool(new)

    def complete(self, step: int) -> None:
        """A step is over: what is not finite by then speaks against the state as it is."""
        if self.names:
            self._mark(step, self.names)

    def against(self, step: int, finite: Collection[str]) -> str:
        """Why the state at ``step`` must not be kept if these numbers must be finite; "": it may."""
        if not self._steps:
            return ""
        bad = [name for name in self._steps.get(step, ()) if name in finite]
        if not bad:
            return ""
        return f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite at step {step}"

    def _mark(self, step: int, names: tuple[str, ...]) -> None:
        known = self._steps.pop(step, ())
        self._steps[step] = (*known, *(name for name in names if name not in known))
        while len(self._steps) > STEPS_KEPT:
            del self._steps[next(iter(self._steps))]
