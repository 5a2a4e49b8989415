"""Chaos: faults drawn at random strike a cluster, and it is watched until it has recovered.

``Chaos`` alternates as its user wants: ``storm`` strikes, ``calm`` heals what is
still broken and waits until everything is whole. The thread that calls does all
of it. What recovered means is in ``sight``, what may strike in ``faults``.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.local.chaos_plan import Draw, Settings, aim, draws, possible
from dtrain.local.chaos_report import Report, Struck
from dtrain.local.faults import Breaker, Fault, Kind, Part
from dtrain.local.sight import Eyes, Sight, away, failed, missing
from dtrain.local.watchman import Watchman
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable

POLL_S = 0.1
HEAL_AGAIN_S = 0.5
SETTLE_S = 30.0
"""How long the auditor may take to see the end of the history."""


@dataclass(slots=True)
class _Pending:
    """A fault that has struck: what there was before, and what is still to come."""

    struck: Struck
    fault: Fault
    before: Sight
    at: float
    heal_at: float | None
    """None: nothing to heal, or healed."""


class Chaos:
    """Breaks one cluster by ``breaker`` and watches it with ``eyes``.

    ``members`` are the names of etcd's members, () if they cannot be hit. ``say``
    hears one line for each thing that happens. Own the watchman, if there is
    one: it is started here and judged in ``report``.
    """

    def __init__(
        self,
        settings: Settings,
        eyes: Eyes,
        breaker: Breaker,
        *,
        members: Sequence[str] = (),
        watchman: Watchman | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self._eyes, self._breaker, self._watchman = eyes, breaker, watchman
        self._members = tuple(members)
        self._say = say
        choices = possible(settings)
        self._refused = {why for kind, part in choices if (why := breaker.cannot(kind, part))}
        choices = {fault: weight for fault, weight in choices.items() if not breaker.cannot(*fault)}
        if not choices:
            raise Refused(
                ErrorCode.BAD_SETTING,
                "none of these faults is possible in this cluster",
                cause="; ".join(sorted(self._refused)),
            )
        self._draws = draws(settings, choices)
        self._pending: list[_Pending] = []
        self._report = Report(settings.seed)
        self._expected: frozenset[str] = frozenset()
        self._first = Sight()
        self._began = time.monotonic()
        self._gave_up = False
        self._trained: set[tuple[str, str]] = set()

    @property
    def refused(self) -> tuple[str, ...]:
        """Why some faults are not possible here, one sentence each."""
        return tuple(sorted(self._refused))

    @property
    def gave_up(self) -> bool:
        """Something did not recover in time: there is no point in going on."""
        return self._gave_up

    @property
    def struck(self) -> int:
        """How many faults have struck."""
        return len(self._report.struck)

    # Doing -------------------------------------------------------------------------------

    def begin(self) -> Sight:
        """Look at the cluster as it is meant to be: what is registered now must be so in the end.

        Raises:
            Unavailable: there is no leader, or etcd does not answer.
        """
        self._first = self._remember(self._eyes.look())
        if not self._first.leader:
            raise Unavailable(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                "the cluster has no leader, so it would be blamed on chaos",
                fix="dtrain get coordinators",
            )
        self._expected = self._first.daemons
        self._began = time.monotonic()
        if self._watchman is not None:
            self._watchman.start()
        return self._first

    def storm(self, *, count: int | None = None, for_s: float | None = None) -> None:
        """Strike until ``count`` or ``for_s`` are over (default: the settings'), or it gives up."""
        count = self.settings.count if count is None else count
        end = time.monotonic() + (self.settings.for_s if for_s is None else for_s)
        left = count
        while left > 0 and time.monotonic() < end and not self._gave_up:
            draw = next(self._draws)
            pending = self._strike(draw)
            if pending is None:
                self._wait(2 * POLL_S)
                continue
            left -= 1
            if draw.wait:
                self._wait_until(lambda one=pending: one.struck.works_s is not None)  # type: ignore[misc]
            self._wait(min(draw.pause_s, max(0.0, end - time.monotonic())))

    def calm(self) -> bool:
        """Heal everything and wait until all of it is whole again; False: it is not, see the report."""
        for one in self._pending:
            if one.heal_at is not None:
                one.heal_at = 0.0
        end = time.monotonic() + self.settings.patience_s
        while self._pending and time.monotonic() < end:
            self.tend()
            time.sleep(POLL_S)
        self._check_whole()
        return not self._gave_up

    def report(self, *, interrupted: bool = False) -> Report:
        """Return what happened; waits for the auditor to see the end of it."""
        report = dataclasses.replace(
            self._report, took_s=time.monotonic() - self._began, interrupted=interrupted
        )
        watchman = self._watchman
        if watchman is not None:
            if not watchman.settle(SETTLE_S):
                report.problems.append("the auditor did not see the end of the history")
            if watchman.gaps:
                report.problems.append(
                    f"history was compacted {watchman.gaps} times before the auditor read it"
                )
            report.violations = [str(violation) for violation in watchman.violations]
            report.judged = watchman.judged
        return report

    def tend(self) -> None:
        """Heal what is due and note what has recovered: what ``storm`` and ``calm`` do all the time."""
        for one in self._pending:
            if one.heal_at is not None and one.heal_at <= time.monotonic():
                self._heal(one)
        if self._pending:
            self._judge()

    # Inside ------------------------------------------------------------------------------

    def _strike(self, draw: Draw) -> _Pending | None:
        try:
            before = self._remember(self._eyes.look())
        except DtrainError:
            return None
        fault = aim(draw, before, self._members, self.settings)
        if fault is None or not self._may(fault):
            return None
        at = time.monotonic()
        number = len(self._report.struck) + 1
        struck = Struck(number, fault.label, str(fault), at - self._began)
        pending = _Pending(struck, fault, before, at, at + draw.last_s if fault.lasts else None)
        # Before it is done: a signal in the middle of it must find what to heal.
        self._pending.append(pending)
        try:
            self._breaker.strike(fault)
        except NotFound:
            self._pending.remove(pending)
            return None
        except Unavailable as error:
            # Half done, as when etcd went away while it was filled: healed in its time.
            self._say(f"     {fault}: {error.message}")
        except Refused as error:
            self._pending.remove(pending)
            self._report.problems.append(f"{fault}: {error.message}")
            return None
        self._report.struck.append(struck)
        if fault.kind is Kind.FILL:
            pending.heal_at = time.monotonic() + draw.last_s
        lasts = f", for {draw.last_s:.1f} s" if fault.lasts else ""
        self._say(f"{struck.at_s:7.1f}s {number:4} {fault}{lasts}  ({_state(before)})")
        self._rebase(pending)
        return pending

    def _remember(self, sight: Sight) -> Sight:
        """Note which jobs train; those that do not, but did, are to train again."""
        self._trained |= {(name, job.uid) for name, job in sight.jobs.items() if job.trains}
        jobs = {
            name: dataclasses.replace(job, trained=(name, job.uid) in self._trained)
            for name, job in sight.jobs.items()
        }
        return dataclasses.replace(sight, jobs=jobs)

    def _may(self, fault: Fault) -> bool:
        broken = [one.fault for one in self._pending if one.heal_at is not None]
        if fault.part is Part.ETCD:
            # A second member would be the quorum: that etcd is away is a test of its own.
            return all(one.part is not Part.ETCD for one in broken)
        if fault.part in (Part.RANK, Part.LAUNCHER):
            return True
        return all(one.name != fault.name for one in broken)

    def _rebase(self, pending: _Pending) -> None:
        """Take the steps done until the fault struck for done before it."""
        try:
            now = self._eyes.look([name for name, job in pending.before.jobs.items() if job.trains])
        except DtrainError:
            return
        jobs = dict(pending.before.jobs)
        for name, job in jobs.items():
            found = now.jobs.get(name)
            if job.trains and found is not None and (found.uid, found.attempt) == (job.uid, job.attempt):
                ranks = {number: found.ranks.get(number, rank) for number, rank in job.ranks.items()}
                jobs[name] = dataclasses.replace(job, ranks=ranks)
        pending.before = dataclasses.replace(pending.before, jobs=jobs)

    def _heal(self, one: _Pending) -> None:
        try:
            self._breaker.heal(one.fault)
        except (NotFound, Refused) as error:
            one.heal_at = None
            self._report.problems.append(f"{one.fault} cannot be healed: {error.message}")
        except DtrainError as error:
            one.heal_at = time.monotonic() + HEAL_AGAIN_S
            if one.heal_at > one.at + self.settings.patience_s:
                one.heal_at = None
                self._give_up(f"{one.fault} cannot be healed: {error.message}")
        else:
            one.heal_at = None

    def _judge(self) -> None:
        names = {name for one in self._pending for name, job in one.before.jobs.items() if job.trained}
        try:
            now = self._eyes.look(sorted(names))
        except DtrainError as error:
            now, silence = None, error.message
        for one in list(self._pending):
            why = f"etcd does not answer: {silence}" if now is None else self._lacking(one, now)
            took_s = time.monotonic() - one.at
            if not why and one.struck.works_s is None:
                one.struck.works_s = took_s
                self._say(f"{'':13} works again after {took_s:.2f} s: {one.struck.label}")
            if not why and one.heal_at is None and now is not None:
                why = away(self._expected, now)
                if not why:
                    one.struck.whole_s = took_s
                    self._pending.remove(one)
            if why and one.heal_at is None and took_s > self.settings.patience_s:
                self._pending.remove(one)
                self._give_up(f"{one.struck.what}: not recovered after {took_s:.0f} s: {why}")

    def _lacking(self, one: _Pending, now: Sight) -> str:
        if one.struck.works_s is not None:
            return ""
        hit = one.fault.name and one.fault.name == one.before.leader
        # The record of a leader outlives it for a moment; slow links do not end its office.
        unseated = hit and one.fault.part in (Part.LEADER, Part.COORDINATOR, Part.COORDINATOR_GUARDIAN)
        if unseated and one.fault.kind is not Kind.SLOW and now.term == one.before.term and self._still(one):
            return f"{one.fault.name} is still the leader by record"
        if one.fault.kind is Kind.PREEMPT and one.heal_at is not None:
            # Its ranks train on while the checkpoint is taken: that is no recovery yet.
            staying = sorted(
                name for name, job in now.jobs.items() if job.trains and one.fault.name in job.agents
            )
            if staying:
                return f"{', '.join(staying)} still uses {one.fault.name}"
        return missing(one.before, now)

    def _still(self, one: _Pending) -> bool:
        return one.fault.kind is Kind.KILL or one.heal_at is not None

    def _check_whole(self) -> None:
        """Whatever the single faults did: everything is as it was in the beginning."""
        problem = "nothing was seen"
        end = time.monotonic() + self.settings.patience_s
        while problem and time.monotonic() < end:
            try:
                now = self._eyes.look()
                problem = "" if now.leader else "there is no leader"
                problem = problem or away(self._expected, now)
                if not problem:
                    told = set(self._report.problems)
                    self._report.problems += [text for text in failed(self._first, now) if text not in told]
                    return
            except DtrainError as error:
                problem = error.message
            time.sleep(POLL_S)
        self._give_up(f"not whole {self.settings.patience_s:.0f} s after the last fault: {problem}")

    def _give_up(self, why: str) -> None:
        self._gave_up = True
        self._report.problems.append(why)
        self._say(f"{'':13} {why}")

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._wait_until(lambda: time.monotonic() >= end)

    def _wait_until(self, done: Callable[[], bool]) -> None:
        while True:
            self.tend()
            if done() or self._gave_up:
                return
            time.sleep(POLL_S)


def _state(sight: Sight) -> str:
    jobs = [
        f"{name} {job.phase} in attempt {job.attempt}, step {max(one.step for one in job.ranks.values())}"
        for name, job in sight.jobs.items()
        if job.ranks
    ]
    return "; ".join(jobs) or "no job trains"
