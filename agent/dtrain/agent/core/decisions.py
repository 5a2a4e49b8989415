"""What one step asks the driver to do."""

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.agent.core.state import JobState
from dtrain.agent.launching import LauncherOrder as Order
from dtrain.agent.launching import LaunchSettings, ProcessId
from dtrain.agent.transferring import TransferOrder as Transfer
from dtrain.protocol.ids import Attempt, JobName, Rank, Term, Uid
from dtrain.protocol.ranklink import Begin, Durable, Have, Outcome, RestorePlan, StopRank, Welcome
from dtrain.protocol.snapshot import Draining, WorkerSnapshot


@dataclass(frozen=True, slots=True)
class JournalJob:
    """Make the job's state durable, and the ids of commands taken on since."""

    job: JobState
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JournalTerm:
    """Remember the highest confirmed term."""

    term: Term


@dataclass(frozen=True, slots=True)
class ForgetJob:
    """The job has left this machine: drop its journal entry. Logs stay."""

    job: JobName


@dataclass(frozen=True, slots=True)
class JournalOver:
    """Remember with which attempt a submission was released."""

    uid: Uid
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class JournalCoordinators:
    """Remember whom to ask when etcd cannot be reached."""

    addresses: tuple[str, ...]


JournalWrite = JournalJob | JournalTerm | JournalOver | ForgetJob | JournalCoordinators


@dataclass(frozen=True, slots=True)
class EnsureLauncher:
    """Start a launcher for this submission; answer with ``LauncherStarted``."""

    job: JobName
    uid: Uid
    settings: LaunchSettings


@dataclass(frozen=True, slots=True)
class LauncherOrder:
    """Send an order to the launcher of one submission."""

    job: JobName
    uid: Uid
    order: Order


@dataclass(frozen=True, slots=True)
class KillLauncher:
    """The launcher does not answer: SIGKILL it; its ranks die with it."""

    job: JobName
    uid: Uid
    process: ProcessId


@dataclass(frozen=True, slots=True)
class ProbeProcesses:
    """Kill these processes if they live; answer with ``ProcessesProbed``."""

    job: JobName
    uid: Uid
    processes: tuple[ProcessId, ...]


@dataclass(frozen=True, slots=True)
class LookAtRanks:
    """See what ranks that stand still do; answer with ``RanksLookedAt``."""

    job: JobName
    uid: Uid
    attempt: Attempt
    processes: Mapping[Rank, ProcessId]


@dataclass(frozen=True, slots=True)
class CollectStacks:
    """Collect the stacks of these ranks, twice; answer with ``StacksCollected``."""

    job: JobName
    uid: Uid
    attempt: Attempt
    dump: str
    processes: Mapping[Rank, ProcessId]


@dataclass(frozen=True, slots=True)
class PrepareLogs:
    """Remember which global ranks the attempt's log folders belong to, and where to copy them."""

    job: JobName
    uid: Uid
    attempt: Attempt
    first_rank: Rank
    ranks: int
    store: str
    """"" : they stay on this machine alone."""


@dataclass(frozen=True, slots=True)
class TransferOrder:
    """Send an order to the transfer process, starting it if there is none."""

    order: Transfer


@dataclass(frozen=True, slots=True)
class RankMessage:
    """Send a message on one rank's connection."""

    connection: int
    message: Welcome | RestorePlan | Have | Begin | Durable | Outcome | StopRank


@dataclass(frozen=True, slots=True)
class DropConnection:
    """Close a connection once what was sent has left."""

    connection: int


@dataclass(frozen=True, slots=True)
class WriteSnapshot:
    """Publish the job's snapshot: at once if ``urgent``, else when progress is due."""

    job: JobName
    snapshot: WorkerSnapshot
    urgent: bool


@dataclass(frozen=True, slots=True)
class DeleteSnapshot:
    """Delete the job's snapshot."""

    job: JobName


@dataclass(frozen=True, slots=True)
class PublishHealth:
    """Say in the node record what is wrong with the machine; "": nothing any more."""

    problem: str


@dataclass(frozen=True, slots=True)
class PublishDraining:
    """Say in the node record that the agent is about to end."""

    draining: Draining


Action = (
    EnsureLauncher
    | LauncherOrder
    | KillLauncher
    | ProbeProcesses
    | LookAtRanks
    | CollectStacks
    | PrepareLogs
    | TransferOrder
    | RankMessage
    | DropConnection
    | WriteSnapshot
    | DeleteSnapshot
    | PublishHealth
    | PublishDraining
)


@dataclass(frozen=True, slots=True)
class Answer:
    """To a command: taken on, or why not."""

    accepted: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What one step asks the driver to do, in this order.

    ``journal`` is durable before any action is carried out: a restarted agent
    must know of everything it has set in motion. ``answer`` is set for commands
    alone. ``wake_at`` (monotonic; None: nothing depends on time alone) asks for
    a ``Tick``.
    """

    journal: tuple[JournalWrite, ...] = ()
    actions: tuple[Action, ...] = ()
    answer: Answer | None = None
    wake_at: float | None = None
