"""What can happen to an agent: the inputs of ``step``, a closed union."""

from dataclasses import dataclass

from dtrain.agent.launching import LauncherReport, ProcessId
from dtrain.agent.transferring import TransferReport
from dtrain.protocol.commands import Command
from dtrain.protocol.ids import Attempt, Incarnation, JobName, Rank, Term, Uid
from dtrain.protocol.ranklink import Hello, Report
from dtrain.protocol.snapshot import Stack


@dataclass(frozen=True, slots=True)
class CommandArrived:
    """A command came in. ``confirmed``: its term is that of the leader key, read just now."""

    command: Command
    confirmed: bool


@dataclass(frozen=True, slots=True)
class EtcdWentBack:
    """The leader key is of ``term``, read after ``known``, a higher one, had been confirmed."""

    term: Term
    known: Term


@dataclass(frozen=True, slots=True)
class LauncherStarted:
    """A launcher process exists; it has not reported yet."""

    job: JobName
    uid: Uid
    process: ProcessId


@dataclass(frozen=True, slots=True)
class LauncherReported:
    """The launcher of one submission said something, or ended."""

    job: JobName
    uid: Uid
    report: LauncherReport


@dataclass(frozen=True, slots=True)
class ProcessesProbed:
    """Of the processes asked about, these are still alive; ``waits``: the kernel functions they wait in."""

    job: JobName
    uid: Uid
    alive: tuple[ProcessId, ...]
    waits: tuple[str, ...] = ()
    """In the order of ``alive``; "" where the kernel does not tell."""


@dataclass(frozen=True, slots=True)
class RankLook:
    """A rank at one moment. ``waited_s``: for a CPU, it or what it started, since the look before."""

    rank: Rank
    state: str
    """As in /proc/PID/stat: T is stopped, t is traced, D waits for a disk; "": it is gone."""
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RanksLookedAt:
    """Ranks that stand still were looked at."""

    job: JobName
    uid: Uid
    attempt: Attempt
    looks: tuple[RankLook, ...]


@dataclass(frozen=True, slots=True)
class StacksCollected:
    """The stacks that were asked for as ``dump``, of the ranks that still live."""

    job: JobName
    uid: Uid
    attempt: Attempt
    dump: str
    stacks: tuple[Stack, ...]


@dataclass(frozen=True, slots=True)
class StacksShown:
    """A person has had the stacks of the local ranks collected."""

    job: JobName
    uid: Uid
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class TransferReported:
    """The transfer process said something, or ended."""

    report: TransferReport


@dataclass(frozen=True, slots=True)
class RankConnected:
    """A process said Hello on a new connection (numbered from 1)."""

    connection: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class RankReported:
    """A rank sent its whole state."""

    connection: int
    report: Report


@dataclass(frozen=True, slots=True)
class RankDisconnected:
    """A connection ended; the rank itself may well be alive."""

    connection: int


@dataclass(frozen=True, slots=True)
class SessionRenewed:
    """The agent is registered anew: its keys in etcd were lost or are another life's."""

    generation: int
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class SessionSeen:
    """What the guardian says of the lease. ``deadline`` (monotonic) 0: etcd has called it lost."""

    lease: int
    ttl_s: float
    deadline: float


@dataclass(frozen=True, slots=True)
class CoordinatorsRead:
    """The addresses of all replicas, read from etcd just now."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """What a replica's mirror has of a job that it was asked about as attempt ``asked``."""

    job: JobName
    uid: Uid
    asked: Attempt
    current: bool
    """The submission is the present one and is not over."""
    attempt: Attempt
    member: bool
    """This agent is a member of that attempt."""


@dataclass(frozen=True, slots=True)
class ReplicaAnswer:
    """One replica's answer. ``etcd_age_s``: since its mirror was known to be current; negative: never."""

    etcd_age_s: float
    standings: tuple[Standing, ...] = ()


@dataclass(frozen=True, slots=True)
class Consulted:
    """Coordinators were asked, once around; ``answers`` of those that answered."""

    answers: tuple[ReplicaAnswer, ...] = ()


@dataclass(frozen=True, slots=True)
class ShutDown:
    """The agent was told to end: its ranks and launchers end first."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The agent was told to end at ``at`` (monotonic; ``since``: UTC), and may wait for its jobs to move.

    ``stays``: it is the machine that goes, at the end of the grace; nobody waits for the agent to end.
    """

    reason: str
    at: float
    since: str
    grace_s: float
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    CommandArrived
    | EtcdWentBack
    | LauncherStarted
    | LauncherReported
    | ProcessesProbed
    | RanksLookedAt
    | StacksCollected
    | StacksShown
    | TransferReported
    | RankConnected
    | RankReported
    | RankDisconnected
    | SessionRenewed
    | SessionSeen
    | CoordinatorsRead
    | Consulted
    | ShutDown
    | DrainAsked
    | Tick
)
