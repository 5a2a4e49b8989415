"""Orders to a job's launcher and what it reports back.

The launcher is an exec'd, single-threaded process, one per job on a machine.
It imports torch and the job's preload list once and forks the ranks. It listens
on a Unix socket in its folder, so that a restarted agent finds it again;
without an agent for ``orphan_grace_s`` it kills its ranks and exits. On every
new connection it first sends ``LauncherState``, the whole truth, and then
``RankEnded`` again for every ended rank that has not been cleared.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.protocol.ids import Attempt, Rank
from dtrain.protocol.job import Entry


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for good: a pid may be used again, with its start time it is not.

    ``start_time`` is field 22 of /proc/PID/stat, in ticks since ``boot_id``'s boot.
    """

    pid: int
    start_time: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How to start a launcher; ``folder`` holds its socket and log."""

    folder: str
    working_dir: str
    env: Mapping[str, str]
    preload: tuple[str, ...]
    orphan_grace_s: float
    nproc: int


# Orders -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClearBelow:
    """Kill every rank and store of attempts lower than ``attempt``; answer ``Cleared``.

    SIGTERM first if ``grace_s`` > 0, then SIGKILL to each process group.
    """

    attempt: Attempt
    grace_s: float


@dataclass(frozen=True, slots=True)
class ServeStore:
    """Open the attempt's TCPStore in a child, on a free port of ``host``; answer ``StoreReady``."""

    attempt: Attempt
    host: str
    world_size: int


@dataclass(frozen=True, slots=True)
class RankLaunch:
    """One rank to fork. ``env`` is its whole environment."""

    rank: Rank
    local_rank: int
    env: Mapping[str, str]
    log_dir: str
    """Gets stdout.log, stderr.log and error.json."""


@dataclass(frozen=True, slots=True)
class ForkRanks:
    """Start the attempt's ranks; answer ``Forked``, later ``RankEnded`` for each."""

    attempt: Attempt
    entry: Entry
    working_dir: str
    ranks: tuple[RankLaunch, ...]


@dataclass(frozen=True, slots=True)
class SignalRanks:
    """Send a signal to the process group of every rank of the attempt."""

    attempt: Attempt
    signal: int


@dataclass(frozen=True, slots=True)
class Quit:
    """Kill whatever is left and exit."""

    grace_s: float


LauncherOrder = ClearBelow | ServeStore | ForkRanks | SignalRanks | Quit


# Reports ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LiveRank:
    """A rank that runs, or has ended and has not been cleared yet."""

    attempt: Attempt
    rank: Rank
    local_rank: int
    process: ProcessId
    exit_code: int | None = None
    """Negative: ended by that signal."""


@dataclass(frozen=True, slots=True)
class LauncherState:
    """Everything a (re)connected agent must know."""

    process: ProcessId
    ready: bool
    """Imports are done; ranks can be forked."""
    ranks: tuple[LiveRank, ...] = ()
    store_attempt: Attempt | None = None
    store_port: int | None = None
    warning: str = ""
    """Why ranks are exec'd instead of forked, naming the offender."""


@dataclass(frozen=True, slots=True)
class LauncherReady:
    """Imports are done."""

    warning: str = ""


@dataclass(frozen=True, slots=True)
class Unkilled:
    """A process that SIGKILL does not end, and the rank it is or descends from, if that can be told."""

    process: ProcessId
    rank: Rank | None = None


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing of an attempt lower than ``attempt`` is alive. ``stuck``: pids that cannot be killed."""

    attempt: Attempt
    stuck: tuple[int, ...] = ()
    unkilled: tuple[Unkilled, ...] = ()
    """Who they are; empty from a launcher of an older version."""


@dataclass(frozen=True, slots=True)
class StoreReady:
    """The attempt's TCPStore listens on ``port`` (0: it could not be opened)."""

    attempt: Attempt
    port: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Forked:
    """The ranks of the attempt run."""

    attempt: Attempt
    ranks: tuple[LiveRank, ...]


@dataclass(frozen=True, slots=True)
class RankEnded:
    """A rank has ended. ``error`` is its error.json as ``@record`` writes it, if any."""

    attempt: Attempt
    rank: Rank
    pid: int
    exit_code: int
    """Negative: ended by that signal."""
    at: float
    """Wall time, epoch seconds."""
    error: str = ""
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class LauncherEnded:
    """The launcher is gone (sent by its client, not by itself). All its ranks are dead too."""

    exit_code: int | None
    log_tail: str = ""


LauncherReport = LauncherState | LauncherReady | Cleared | StoreReady | Forked | RankEnded | LauncherEnded

ORDERS: Mapping[str, type] = {
    kind.__name__: kind for kind in (ClearBelow, ServeStore, ForkRanks, SignalRanks, Quit)
}
REPORTS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (LauncherState, LauncherReady, Cleared, StoreReady, Forked, RankEnded, LauncherEnded)
}
