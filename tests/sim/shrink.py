"""From a failing schedule to a small one: leave out, shorten, and keep what still fails the same way.

Delta debugging over the strikes, then over everything else that a schedule holds. Leaving something out
changes all that follows, so a candidate that does not fail is tried under a few other seeds of the world.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tests.sim.schedule import Schedule, Strike

Play = Callable[[Schedule], Sequence[str]]
"""Runs a schedule and returns its violations."""

RESEEDS = 2
"""Other worlds that a candidate is tried in, once few strikes are left."""

RESEED_STRIKES_MAX = 16


def name_of(violation: str) -> str:
    """What kind of violation it is: the same bug gives the same name in another run."""
    text = re.sub(r"^at [\d.]+ s: ", "", violation.splitlines()[0])
    text = re.sub(r"^auditor: revision \d+: ", "auditor ", text)
    found = re.match(r"((?:auditor )?[GI]\d+)\b", text)
    if found is None:
        # Names and numbers are of one run; the words are of the bug.
        text = re.sub(r"\b(?:[ac]\d+|train|other)\b|[\d.]+|'[^']*'", "", text)
        return " ".join(text.split()[:8])
    rest = re.sub(r"\b(?:[ac]\d+|train|other)\b|[\d.]+", "", text[found.end() :])
    return f"{found[1]} {' '.join(rest.strip(': ').split()[:3])}"


class Shrinker:
    """One search. ``best`` is the smallest failing schedule so far."""

    def __init__(
        self,
        failing: Schedule,
        violation: str,
        play: Play,
        *,
        limit_s: float = 300.0,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        assert failing.strikes is not None
        self.name = name_of(violation)
        self.best = replace(failing, violation=self.name, mix={})
        self.runs = 0
        self._play = play
        self._end = time.monotonic() + limit_s
        self._say = say

    def run(self) -> Schedule:
        """Shrink until nothing can go, or the time is over."""
        assert self.best.strikes is not None
        size = -1
        while size != self._size() and not self._late():
            size = self._size()
            self._fewer_strikes()
            for simpler in (_without_storms, _without_machines, _simpler_jobs, _shorter_strikes):
                self._take_while(simpler)
        return self.best

    def _size(self) -> int:
        return len(self.best.dumps())

    def _late(self) -> bool:
        return time.monotonic() > self._end

    def _fails(self, candidate: Schedule) -> Schedule | None:
        """The candidate, maybe under another seed, if it fails in the same way."""
        strikes = candidate.strikes or ()
        tries = 1 + (RESEEDS if len(strikes) <= RESEED_STRIKES_MAX else 0)
        for number in range(tries):
            if self._late():
                return None
            seeded = replace(candidate, seed=candidate.seed + 1_000_003 * number)
            self.runs += 1
            if any(name_of(violation) == self.name for violation in self._play(seeded)):
                return seeded
        return None

    def _keep(self, schedule: Schedule) -> None:
        self.best = schedule
        self._say(f"{self.runs} runs: {len(schedule.strikes or ())} strikes, {self._size()} bytes")

    def _fewer_strikes(self) -> None:
        """Drop halves, then quarters, ... then single strikes, for as long as anything goes."""
        chunk = max(1, len(self.best.strikes or ()) // 2)
        while not self._late():
            dropped = False
            at = 0
            while at < len(self.best.strikes or ()) and not self._late():
                strikes = self.best.strikes or ()
                rest = strikes[:at] + strikes[at + chunk :]
                if found := self._fails(replace(self.best, strikes=rest)):
                    self._keep(found)
                    dropped = True
                else:
                    at += chunk
            if chunk == 1 and not dropped:
                return
            if not dropped or chunk > len(self.best.strikes or ()):
                chunk = max(1, chunk // 2)

    def _take_while(self, simpler: Callable[[Schedule], Iterator[Schedule]]) -> None:
        again = True
        while again and not self._late():
            again = False
            for candidate in simpler(self.best):
                if found := self._fails(candidate):
                    self._keep(found)
                    again = True
                    break


def _without_storms(schedule: Schedule) -> Iterator[Schedule]:
    """One storm less; the last one shorter."""
    strikes, storms = schedule.strikes or (), schedule.storms
    if len(storms) > 1:
        for storm in storms:
            yield replace(schedule, storms=tuple(other for other in storms if other != storm))
    last = storms[-1]
    of_last = [strike.at for strike in strikes if strike.at >= last.start]
    end = max(of_last, default=last.start) + 0.001
    for shorter in (end, (end + last.end) / 2):
        if shorter < last.end - 1.0:
            yield replace(schedule, storms=(*storms[:-1], replace(last, end=shorter)))


def _without_machines(schedule: Schedule) -> Iterator[Schedule]:
    shape = schedule.shape
    if len(shape.replica_ttls_s) > 1:
        yield replace(schedule, shape=replace(shape, replica_ttls_s=shape.replica_ttls_s[:-1]))
    if shape.machines > max(job.nnodes_max for job in shape.jobs):
        yield replace(schedule, shape=replace(shape, machines=shape.machines - 1))
    if shape.clock_drift:
        yield replace(schedule, shape=replace(shape, clock_drift=0.0))
    if shape.page_keys != 500:
        yield replace(schedule, shape=replace(shape, page_keys=500))


def _simpler_jobs(schedule: Schedule) -> Iterator[Schedule]:
    shape = schedule.shape
    if len(shape.jobs) > 1:
        for job in shape.jobs:
            yield replace(schedule, shape=replace(shape, jobs=tuple(j for j in shape.jobs if j != job)))
    for number, job in enumerate(shape.jobs):
        candidates = []
        if job.submissions_max > 1:
            candidates.append(replace(job, submissions_max=1))
        if job.nnodes_max > job.nnodes_min:
            candidates.append(replace(job, nnodes_max=job.nnodes_min))
        if job.nnodes_min > 1:
            candidates.append(replace(job, nnodes_min=job.nnodes_min - 1, nnodes_max=job.nnodes_max - 1))
        if job.nproc > 1:
            candidates.append(replace(job, nproc=1))
        if job.total_steps > 25:
            candidates.append(replace(job, total_steps=job.total_steps // 2))
        for simpler in candidates:
            jobs = (*shape.jobs[:number], simpler, *shape.jobs[number + 1 :])
            yield replace(schedule, shape=replace(shape, jobs=jobs))


def _shorter_strikes(schedule: Schedule) -> Iterator[Schedule]:
    strikes = schedule.strikes or ()
    if len(strikes) > RESEED_STRIKES_MAX:
        return
    for number, strike in enumerate(strikes):
        if strike.lasts_s > 1.0:
            shorter: Strike = replace(strike, lasts_s=round(strike.lasts_s / 2, 3))
            yield replace(schedule, strikes=(*strikes[:number], shorter, *strikes[number + 1 :]))
