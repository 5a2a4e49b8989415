"""What comes up from an agent: its node record and one snapshot per job.

A snapshot is the sole input to reconciliation; an RPC's answer never is. It is
written under the agent's lease, at once for changes of phase and errors, and at
most every two seconds for progress.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dtrain.protocol.ids import AgentName, Attempt, Incarnation, Rank, Seq, Step, Term, Uid

SNAPSHOT_BYTES_MAX = 16 * 1024
"""etcd keeps every version: a larger snapshot is cut before it is written."""

TRANSFERS_MAX = 4


class WorkerPhase(StrEnum):
    """Phase of one machine's part of a job, and of each rank.

    IDLE holds nothing. STARTING kills what is left of older attempts and readies
    the launcher. READY: prepared, nothing of an older attempt is alive. RESTORING
    from START until every local rank has its state. DONE: every local rank
    exited with 0. ERROR: a local rank failed, or the command could not be done.
    """

    IDLE = "IDLE"
    STARTING = "STARTING"
    READY = "READY"
    RESTORING = "RESTORING"
    TRAINING = "TRAINING"
    CHECKPOINTING = "CHECKPOINTING"
    DONE = "DONE"
    ERROR = "ERROR"


class FailureKind(StrEnum):
    """What ended a rank or an attempt, causes before consequences."""

    SIGNAL = "signal"
    EXIT = "exit"
    EXCEPTION = "exception"
    AGENT_LOST = "agent-lost"
    UNREACHABLE = "unreachable"
    UNKILLABLE = "unkillable"
    """What is left of an older attempt does not die: the machine cannot be used."""
    PREPARE = "prepare"
    RESTORE = "restore"
    ISOLATED = "isolated"
    """A machine was cut off: it ended its ranks in order, or those elsewhere have lost them."""
    NONFINITE = "non-finite"
    """A number that must stay finite was reported as NaN or infinite."""
    HANG = "hang"
    """No rank completed a step within its deadline; ``rank`` is the one that the others wait for."""
    COLLECTIVE = "collective"
    """An aborted collective: almost always the victim of another rank's end."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure, with enough to understand it without the machine."""

    kind: FailureKind
    message: str
    agent: AgentName = AgentName("")
    attempt: Attempt = Attempt(0)
    rank: Rank | None = None
    pid: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    step: Step = Step(0)
    at: float = 0.0
    """Wall time, epoch seconds: orders failures across machines for people."""
    log_tail: str = ""
    """Last lines of the rank's log, at most 2 KiB."""
    fingerprint: str = ""
    """Of the traceback, without what differs between processes: the same error again has the same one."""
    also: tuple[str, ...] = ()
    """What else failed with it, in one sentence each: almost always because of it."""
    hopeless: bool = False
    """No machine can do it, now or later: what the job is to run is not to be had."""


@dataclass(frozen=True, slots=True)
class DurablePart:
    """One rank's part of a checkpoint, confirmed by the store."""

    seq: Seq
    attempt: Attempt
    step: Step
    rank: Rank
    nonce: str
    """Nonce of the open record: ties the part to one intent."""
    manifest: str
    """Store key of the rank manifest."""
    digest: str
    """SHA-256 of the rank manifest's bytes as stored, in hex."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SaveProblem:
    """Why a rank has no part in checkpoint ``seq``: too late, or a failed copy or upload."""

    seq: Seq
    rank: Rank
    late: bool
    step: Step
    message: str
    unfit: bool = False
    """A number that must stay finite is not: what was sealed for it, durable or not, does not count."""


@dataclass(frozen=True, slots=True)
class BadBlob:
    """Evidence that a committed checkpoint does not hold what its manifest says."""

    seq: Seq
    blob: str
    chunk: int
    expected: str
    found: str
    rank: Rank
    message: str = ""


@dataclass(frozen=True, slots=True)
class StuckProcess:
    """A process that SIGKILL has not ended: it sits in the kernel and holds what it holds."""

    pid: int
    rank: Rank | None = None
    """The rank it is; None: something that a rank had started."""
    waits_in: str = ""
    """Kernel function it waits in, as far as the kernel tells."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a rank's steps took lately, medians in seconds.

    ``own_s`` is the part that does not wait for other ranks, ``data_s`` of it the part that waits for
    data. 0.0: not known.
    """

    step_s: float = 0.0
    data_s: float = 0.0
    own_s: float = 0.0


class StackKind(StrEnum):
    """What a rank that completes no step is doing, as its stack tells."""

    COLLECTIVE = "collective"
    DATA = "data"
    CODE = "code"
    """Python code that goes on without completing a step."""
    KERNEL = "kernel"
    """It sits in a system call that nothing ends."""
    STOPPED = "stopped"
    """It was stopped by a signal."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Stack:
    """One rank's stack, in short; the whole of it is in its log folder, stream ``stacks``.

    ``dump`` is the id of the command that asked for it.
    """

    rank: Rank
    kind: StackKind
    where: str
    """The innermost frame that says something: function, file and line."""
    dump: str
    step: Step = Step(0)
    collective: str = ""
    """From torch's flight recorder, if there is one: number and name of the newest collective."""
    moving: bool = False
    """Between two looks it went from one place to another and used the CPU, or it read or wrote files."""


@dataclass(frozen=True, slots=True)
class Stall:
    """A rank has completed no step for longer than its deadline, ``deadline_s``, while it could run."""

    rank: Rank
    step: Step
    deadline_s: float


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank as its agent sees it.

    ``last_step`` is set once the rank has announced the end of its training and
    waits for the final checkpoint. ``exit_code`` is negative for a signal.
    """

    rank: Rank
    pid: int
    phase: WorkerPhase
    step: Step = Step(0)
    last_step: Step | None = None
    exit_code: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    sdk: bool = False
    """The rank has joined through the SDK: it can be checkpointed."""
    save_at: Step | None = None
    """Its script saves this step and waits for a checkpoint of exactly it."""
    timing: Timing | None = None
    nonfinite: tuple[str, ...] = ()
    """Reported numbers that are NaN or infinite now."""
    sealed: Seq = Seq(0)
    """The newest checkpoint that lies complete in this rank's arena; known for sure once it has ended."""
    nonfinite_seen: Mapping[str, Step] = field(default_factory=dict)
    """Those that ever were in this attempt, and the step that it happened in last."""
    steps_total: Step = Step(0)
    """As many steps as its script means to take; 0: it has not said."""
    held_s: float = 0.0
    """How long checkpoints have held it in this attempt: copying, and waiting for an outcome."""


class TransferKind(StrEnum):
    """Which way the bytes of a checkpoint go."""

    SAVE = "save"
    RESTORE = "restore"


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far one machine's part of a checkpoint is on its way to the store, or to the ranks.

    For people alone: nothing is decided from it.
    """

    kind: TransferKind
    seq: Seq
    step: Step
    done_bytes: int
    """In the store, or at hand for the ranks; never less than was said before of the same transfer."""
    total_bytes: int = 0
    """0: not known yet, as some rank has not said what it has, or needs."""
    bytes_per_s: float = 0.0
    """Of the last seconds; 0.0: nothing moves, or nobody has watched for long enough."""


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """The newest command an agent has taken on for a job."""

    id: str
    kind: str
    ok: bool
    message: str = ""
    term: Term = Term(0)
    """Who ordered it: lets the auditor see that no older leader was obeyed after a newer one."""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """State of one job on one agent."""

    agent: AgentName
    uid: Uid
    incarnation: Incarnation
    attempt: Attempt
    phase: WorkerPhase
    ranks: tuple[RankState, ...] = ()
    command: CommandOutcome | None = None
    saving: tuple[Seq, ...] = ()
    """Checkpoints accepted whose outcome this agent does not know yet."""
    durable: tuple[DurablePart, ...] = ()
    problems: tuple[SaveProblem, ...] = ()
    failure: Failure | None = None
    bad: BadBlob | None = None
    rendezvous: str = ""
    """host:port of the attempt's TCPStore, on the member that serves it."""
    restored: bool = False
    """Every local rank has restored and verified its state."""
    note: str = ""
    """What the agent last did with the job of its own accord, in one sentence."""
    stuck: tuple[StuckProcess, ...] = ()
    """Processes of older attempts that cannot be killed: no rank is started beside them."""
    at: float = 0.0
    """Wall time of writing, epoch seconds, for people."""
    warm: bool = False
    """IDLE or ERROR, with a launcher that has imported everything: PREPARE will be answered at once."""
    warning: str = ""
    """Why ranks start slower here than they could, in one sentence."""
    stalls: tuple[Stall, ...] = ()
    stacks: tuple[Stack, ...] = ()
    dumps: int = 0
    """How often stacks of this attempt's ranks were written to their log folders, whoever asked."""
    dumped_at: float = 0.0
    """When that was last, wall time, epoch seconds, for people."""
    seq_over: Seq = Seq(0)
    """The highest checkpoint number of this submission that is over here: never to be given out again."""
    transfers: tuple[Transfer, ...] = ()
    """Of checkpoints under way and of the restore, at most ``TRANSFERS_MAX``; quick ones are over untold."""


@dataclass(frozen=True, slots=True)
class Draining:
    """An agent was told to end, and waits for its jobs to be moved. ``reason``: by what."""

    reason: str
    since: str = ""
    grace_s: float = 0.0
    """How long it waits from ``since`` on; then it ends its ranks itself."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One machine: written when its agent's session begins, under its lease."""

    agent: AgentName
    incarnation: Incarnation
    address: str
    """host:port of the agent's gRPC service."""
    host: str
    """Address that other machines' ranks reach it under."""
    slots: int
    """Ranks it can run at once."""
    boot_id: str = ""
    pid: int = 0
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    since: str = ""
    problem: str = ""
    """Why nothing new should be placed here, in one sentence."""
    draining: Draining | None = None
    """It is about to end: its jobs are to go on elsewhere, from a checkpoint taken now."""
