"""Numbers that must stay finite: what they forbid, and what follows when a rank reports one that is not.

Ranks seal no state that such a number speaks against, and the leader commits none, whoever sealed
it. What else follows is the job's choice: a warning, once for each time that it lasts, or the end of the
attempt, with ``FailureKind.NONFINITE``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtrain.coordinator.core import rules
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.liveness import Seat
from dtrain.coordinator.core.stamps import parse_iso
from dtrain.protocol.checkpoint import OpenRecord
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank, Step
from dtrain.protocol.job import NonFiniteAction
from dtrain.protocol.snapshot import Failure, FailureKind, RankState, WorkerSnapshot

CONDITION = "NonFinite"
RULE_REASON = "nonfinite"

QUIET_STEPS = 50
QUIET_S = 60.0
"""What lasts is over once all was finite for so many steps, at least so long after it began."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Numbers of one rank that were not finite. ``step``: the last one in which; ``now``: which still are."""

    agent: AgentName
    rank: Rank
    names: tuple[str, ...]
    step: Step
    now: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"{are(self.names)} at step {self.step} on rank {self.rank}"


def are(names: Sequence[str]) -> str:
    """``loss is not finite``."""
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not finite"


def sightings(draft: Draft, members: Sequence[Seat]) -> list[Sighting]:
    """What ranks of the attempt report of the numbers that the job names, earliest first."""
    found = [
        one
        for seat in members
        for rank in seat.ranks
        if (one := _sighting(draft, seat.member.agent, rank)) is not None
    ]
    return sorted(found, key=lambda one: (one.step, one.rank))


def failure(draft: Draft, members: Sequence[Seat]) -> Failure | None:
    """What ends the attempt because of them; None: nothing does, or the job only wants to be warned.

    One of the job's failure rules about them counts for more than that.
    """
    found = sightings(draft, members)
    if not found or draft.fleet.withheld:
        return None
    first = found[0]
    sick = Failure(
        FailureKind.NONFINITE,
        f"{are(first.names)} at step {first.step}",
        agent=first.agent,
        attempt=draft.status.attempt,
        rank=first.rank,
        step=first.step,
        at=draft.moment.wall,
    )
    about = [rule for rule in draft.spec.failure_rules if RULE_REASON in rule.reasons]
    if draft.spec.nonfinite.action is NonFiniteAction.WARN and not any(rules.fits(r, sick) for r in about):
        return None
    return sick


def unfit_now(draft: Draft, members: Sequence[Seat]) -> str:
    """Why no checkpoint can be taken of the state as it is; "": one can."""
    bad = [one for one in sightings(draft, members) if one.now]
    return f"{are(bad[0].now)} on rank {bad[0].rank}" if bad else ""


def unfit_at_end(draft: Draft) -> str:
    """The same of the ranks' last words, of those that have gone too."""
    for snapshot in _shown(draft, draft.status.attempt):
        for rank in snapshot.ranks:
            one = _sighting(draft, snapshot.agent, rank)
            if one is not None and one.now:
                return f"{are(one.now)} on rank {one.rank}"
    return ""


def refusal(draft: Draft, record: OpenRecord) -> str:
    """Why what was sealed for an open checkpoint must never be committed; "": nothing speaks against it."""
    if record.imported:
        return ""
    for snapshot in _shown(draft, record.attempt):
        for problem in snapshot.problems:
            if problem.seq == record.seq and problem.unfit:
                return f"rank {problem.rank}: {problem.message}"
        for rank in snapshot.ranks:
            one = _sighting(draft, snapshot.agent, rank)
            if one is None:
                continue
            bad = one.now if rank.step == record.step else ()
            bad = bad or tuple(name for name in one.names if rank.nonfinite_seen.get(name) == record.step)
            if bad:
                return f"rank {rank.rank}: {are(bad)} at step {record.step}"
    return ""


def note(draft: Draft, members: Sequence[Seat]) -> None:
    """Tell of it when it begins and when it is over; in between the condition says so."""
    found = sightings(draft, members)
    if not found:
        return
    told = draft.condition(CONDITION)
    last = max(one.step for one in found)
    if told is None or told.status != "True":
        fresh = [one for one in found if one.step >= draft.status.nonfinite_step]
        if fresh:
            text = f"{fresh[0].sentence}: no checkpoint is taken of such a state"
            draft.event(EventReason.NON_FINITE, text, f"rank/{fresh[0].rank}", warning=True)
            draft.set(nonfinite_step=Step(last + 1))
            draft.note(CONDITION, "True", "NotFinite", text)
        return
    since = parse_iso(told.last_transition)
    rested = since is None or draft.moment.wall - since >= QUIET_S
    behind = min(rank.step for seat in members for rank in seat.ranks)
    if rested and behind >= last + QUIET_STEPS and not any(one.now for one in found):
        text = f"all numbers have been finite since step {last}"
        draft.event(EventReason.NON_FINITE, text, f"rank/{found[0].rank}")
        draft.set(nonfinite_step=Step(last + 1))
        draft.note(CONDITION, "False", "Finite", text)


def _sighting(draft: Draft, agent: AgentName, rank: RankState) -> Sighting | None:
    metrics = draft.spec.nonfinite.metrics
    now = tuple(name for name in rank.nonfinite if name in metrics)
    seen = {name: step for name, step in rank.nonfinite_seen.items() if name in metrics}
    if not now and not seen:
        return None
    names = tuple(sorted({*now, *seen}))
    return Sighting(agent, rank.rank, names, max(seen.values(), default=rank.step), now)


def _shown(draft: Draft, attempt: int) -> Iterable[WorkerSnapshot]:
    """Newest snapshots of an attempt, of agents that have gone too."""
    shown = [draft.job.workers[name].value for name in sorted(draft.job.workers)]
    shown += [draft.job.departed[name] for name in sorted(draft.job.departed)]
    return [one for one in shown if (one.uid, one.attempt) == (draft.status.uid, attempt)]
