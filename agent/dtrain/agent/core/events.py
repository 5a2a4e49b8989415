"""What can happen to an agent: the inputs of ``step``, a closed union."""

from dataclasses import dataclass

from dtrain.agent.launching import LauncherReport, ProcessId
from dtrain.agent.transferring import TransferReport
from dtrain.protocol.commands import Command
from dtrain.protocol.ids import Incarnation, JobName, Uid
from dtrain.protocol.ranklink import Hello, Report


@dataclass(frozen=True, slots=True)
class CommandArrived:
    """A command came in. ``confirmed``: its term is that of the leader key, read just now."""

    command: Command
    confirmed: bool


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
    """Of the processes asked about, these are still alive."""

    job: JobName
    uid: Uid
    alive: tuple[ProcessId, ...]


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
class ShutDown:
    """The agent was told to end: its ranks and launchers end first."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    CommandArrived
    | LauncherStarted
    | LauncherReported
    | ProcessesProbed
    | TransferReported
    | RankConnected
    | RankReported
    | RankDisconnected
    | SessionRenewed
    | ShutDown
    | Tick
)
