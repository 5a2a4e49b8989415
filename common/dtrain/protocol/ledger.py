"""Where a job's time went: every millisecond from its submission on, in exactly one category.

The leader keeps a ``Ledger`` in the job's status and writes it with what it writes anyway. What has
passed since then belongs to the category in ``doing``, so that any reader can tell the whole at any
time, with no coordinator there. ``docs/goodput.md`` says what each category means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.protocol.ids import Attempt, Step

PRODUCTIVE = "productive"
LOST_WORK = "lost_work"
DETECTION = "restart.detection"
BETWEEN = "restart.between"
PREPARE = "restart.prepare"
RENDEZVOUS = "restart.rendezvous"
RESTORE = "restart.restore"
WARM_UP = "restart.warm_up"
STOPPING = "restart.stopping"
CHECKPOINT = "stall.checkpoint"
HANG = "stall.hang"
QUEUED = "idle.queued"
WAITING = "idle.waiting"
PAUSED = "idle.paused"
SUSPENDED = "idle.suspended"

CATEGORIES = (
    PRODUCTIVE,
    LOST_WORK,
    DETECTION,
    BETWEEN,
    PREPARE,
    RENDEZVOUS,
    RESTORE,
    WARM_UP,
    STOPPING,
    CHECKPOINT,
    HANG,
    QUEUED,
    WAITING,
    PAUSED,
    SUSPENDED,
)
"""All of this release, in the order in which they are shown. A newer one may write others: what stands before
the dot is enough to understand them."""

HEADLINES = ("productive", "lost_work", "restart", "stall", "idle")

NOT_WANTED = frozenset({QUEUED, PAUSED, SUSPENDED})
"""Time in which nobody could have expected progress: goodput is a share of the rest."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Step ``step`` was completed when ``ms`` milliseconds had been productive."""

    step: Step
    ms: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """A job's time. The values of ``spent`` add up to ``until_ms - began_ms``, always."""

    began_ms: int
    """When the job was submitted, epoch milliseconds; of a job that an older release began: first sight."""
    until_ms: int
    """Up to when it is counted, epoch milliseconds by the fastest of the leaders' clocks; never goes back."""
    doing: str = ""
    """The category that time since ``until_ms`` belongs to, for all that is known; "": the job is over."""
    spent: Mapping[str, int] = field(default_factory=dict)
    """Milliseconds by category."""
    saved_ms: int = 0
    """Productive ones whose steps are in a committed checkpoint, or all of them after a success."""
    attempt: Attempt = Attempt(0)
    """The attempt that ``held_ms`` is of."""
    held_ms: int = 0
    """How long checkpoints had held the ranks of this attempt by ``until_ms``."""
    marks: tuple[Mark, ...] = ()
    """Productive time at some steps, ascending: those of checkpoints, and last the newest step."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """A ledger as it stands at one instant, in seconds."""

    wall_s: float
    """All time from submission to the end, or to now."""
    seconds: Mapping[str, float]
    """By category, in the order of ``CATEGORIES``; none that is zero."""
    headlines: Mapping[str, float]
    """By headline, all of them; they add up to ``wall_s``."""
    unsaved_s: float
    """Of the productive ones, those that a failure now would take away."""
    ratio: float | None
    """Productive time as a share of that in which progress was wanted; None: there was none yet."""
    over: bool
    """The job is over: nothing of this changes any more."""


def headline(category: str) -> str:
    """Return what stands before the dot."""
    return category.partition(".")[0]


def goodput(ledger: Ledger, now: float) -> Goodput:
    """Return the ledger at ``now`` (epoch seconds). A clock that is behind the ledger's adds nothing."""
    spent = dict(ledger.spent)
    if ledger.doing:
        since_ms = max(0, round(now * 1000) - ledger.until_ms)
        spent[ledger.doing] = spent.get(ledger.doing, 0) + since_ms
    known = [name for name in CATEGORIES if spent.get(name)]
    others = sorted(name for name in spent if name not in CATEGORIES and spent[name])
    headlines = dict.fromkeys(HEADLINES, 0)
    for name in [*known, *others]:
        headlines[headline(name)] = headlines.get(headline(name), 0) + spent[name]
    wall_ms = sum(spent.values())
    wanted_ms = wall_ms - sum(spent.get(name, 0) for name in NOT_WANTED)
    productive_ms = spent.get(PRODUCTIVE, 0)
    return Goodput(
        wall_s=wall_ms / 1000,
        seconds={name: spent[name] / 1000 for name in [*known, *others]},
        headlines={name: ms / 1000 for name, ms in headlines.items()},
        unsaved_s=(productive_ms - ledger.saved_ms) / 1000,
        ratio=productive_ms / wanted_ms if wanted_ms > 0 else None,
        over=not ledger.doing,
    )


def counters(ledger: Ledger) -> dict[str, float]:
    """Seconds by category that only ever rise, for counters of a monitoring system.

    Steps count once they are in a checkpoint, or the job has succeeded: until then a failure may turn
    them into lost work. Only a checkpoint that is given up afterwards takes something back. Time since
    the ledger was last written is not in it.
    """
    seconds = {name: ledger.spent.get(name, 0) / 1000 for name in CATEGORIES}
    seconds[PRODUCTIVE] = ledger.saved_ms / 1000
    return seconds


def faults(ledger: Ledger) -> list[str]:
    """Say in a sentence each what is wrong with a ledger."""
    found = []
    total = sum(ledger.spent.values())
    if total != ledger.until_ms - ledger.began_ms:
        found.append(f"{total} ms are spent of {ledger.until_ms - ledger.began_ms} ms")
    found += [f"{name} has {ms} ms" for name, ms in ledger.spent.items() if ms < 0]
    productive = ledger.spent.get(PRODUCTIVE, 0)
    if not 0 <= ledger.saved_ms <= productive:
        found.append(f"{ledger.saved_ms} of {productive} productive ms are saved")
    points = [(mark.step, mark.ms) for mark in ledger.marks]
    times = [ms for _, ms in points]
    if points != sorted(points) or times != sorted(times) or (times and times[-1] > productive):
        found.append(f"its marks are out of order: {points}")
    return found


def faults_between(before: Ledger, after: Ledger) -> list[str]:
    """Say what is wrong with ``after`` replacing ``before``, of the same submission."""
    if not before.doing:
        return [] if before == after else ["it changed after the end of the job"]
    if after.began_ms != before.began_ms:
        return [f"its beginning went from {before.began_ms} to {after.began_ms}"]
    if after.until_ms < before.until_ms:
        return [f"it went back from {before.until_ms} to {after.until_ms}"]
    return []
