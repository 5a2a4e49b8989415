"""A job: what a user asks for, what is wanted of it now, and what it has become.

``JobSpec`` and ``Intent`` are written for operators, ``JobStatus`` by the
leader alone. Phases are in ``phases.py``, and known here by their names, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dtrain.protocol.ids import AgentName, Attempt, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.ledger import Ledger
from dtrain.protocol.package import Package
from dtrain.protocol.phases import PLACED_PHASES as PLACED_PHASES  # noqa: PLC0414 - known by both names
from dtrain.protocol.phases import TERMINAL_PHASES as TERMINAL_PHASES  # noqa: PLC0414 - known by both names
from dtrain.protocol.phases import JobPhase as JobPhase  # noqa: PLC0414 - known by both names
from dtrain.protocol.snapshot import Failure, FailureKind

EXIT_CODE_DO_NOT_RETRY = 93
"""A rank that exits with it ends the job: the cluster-wide convention for 'do not requeue'."""


class EntryKind(StrEnum):
    """How the training program is started."""

    SCRIPT = "script"
    MODULE = "module"
    COMMAND = "command"


@dataclass(frozen=True, slots=True)
class Entry:
    """The program: a script path, a module name, or an executable, and its arguments."""

    kind: EntryKind
    target: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """When and where checkpoints are taken.

    ``store`` "": the cluster's default store. ``every_steps`` and
    ``every_seconds`` 0: not by steps, not by time; a final checkpoint is always
    taken. ``keep_last`` committed ones are kept, and beyond them the first one at
    or after each multiple of ``keep_every_steps`` (0: no others). ``timeout_s`` is the time from
    opening one to its commit, after which it is aborted. ``bandwidth_mb_s`` bounds
    what each agent sends to the store for this job, in megabytes (10^6) a second; 0:
    not at all. With ``await_import`` the job never begins from scratch: its first
    attempt waits until a checkpoint has been imported.
    """

    store: str = ""
    every_steps: int = 0
    every_seconds: float = 0.0
    keep_last: int = 3
    timeout_s: float = 300.0
    bandwidth_mb_s: float = 0.0
    keep_every_steps: int = 0
    await_import: bool = False


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most ``max_restarts`` in ``window_s``; a committed checkpoint gives them all back."""

    max_restarts: int = 10
    window_s: float = 3600.0


class RuleAction(StrEnum):
    """What follows from a failure.

    RESTART counts against the budget, RESTART_FREE does not. ELSEWHERE also leaves the
    machine that failed out of the next attempt. ROLLBACK restores an older checkpoint.
    FAIL ends the job.
    """

    RESTART = "restart"
    RESTART_FREE = "restart-free"
    ELSEWHERE = "elsewhere"
    ROLLBACK = "rollback"
    FAIL = "fail"


RULE_REASONS: Mapping[str, frozenset[FailureKind]] = {
    "signal": frozenset({FailureKind.SIGNAL}),
    "exit": frozenset({FailureKind.EXIT}),
    "exception": frozenset({FailureKind.EXCEPTION}),
    "restore": frozenset({FailureKind.RESTORE}),
    "hang": frozenset({FailureKind.HANG}),
    "nonfinite": frozenset({FailureKind.NONFINITE}),
    "collective": frozenset({FailureKind.COLLECTIVE}),
    "node-lost": frozenset(
        {
            FailureKind.AGENT_LOST,
            FailureKind.UNREACHABLE,
            FailureKind.UNKILLABLE,
            FailureKind.PREPARE,
            FailureKind.ISOLATED,
        }
    ),
    "user-error": frozenset(),
}
"""What a rule may be about, and the kinds of failure it covers. ``user-error``: an exception with the same
traceback at the same step as one on another machine."""


@dataclass(frozen=True, slots=True)
class FailureRule:
    """If all it names is true of a failure, ``action`` follows. Rules are ordered, the first that fits wins.

    An empty field fits anything. ``reasons``: keys of RULE_REASONS. ``message`` is a
    regular expression, searched in the failure's message and its log's last lines.
    """

    action: RuleAction
    reasons: tuple[str, ...] = ()
    exit_codes: tuple[int, ...] = ()
    signals: tuple[int, ...] = ()
    message: str = ""
    cordon_s: float = 0.0
    """The machine that failed gets no new ranks, of any job, for so long."""
    back: int = 1
    """With ROLLBACK: how many checkpoints."""


@dataclass(frozen=True, slots=True)
class HangPolicy:
    """When ranks that complete no step are taken for hung.

    ``timeout_s`` 0: a deadline that follows the job's own step times. ``startup_s``
    bounds the time from START to the first step.
    """

    enabled: bool = True
    timeout_s: float = 0.0
    startup_s: float = 1800.0


class NonFiniteAction(StrEnum):
    """What follows from a reported number that is NaN or infinite."""

    WARN = "warn"
    ROLLBACK = "rollback"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class NonFinitePolicy:
    """``metrics``: reported numbers that must stay finite. ``back``: how many checkpoints to go back.

    Whatever the action, what is reported so is never committed.
    """

    action: NonFiniteAction = NonFiniteAction.WARN
    metrics: tuple[str, ...] = ("loss",)
    back: int = 1


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A validated job. ``nnodes_min`` to ``nnodes_max`` machines, ``nproc_per_node`` ranks on each.

    ``nproc_per_node`` 0: on each machine as many ranks as it has slots.
    ``spares`` machines beyond those are kept ready, without being reserved: one of them takes a
    lost one's place without having to import anything. With fewer than ``nnodes_max`` machines a job
    grows when others come free, at a checkpoint, at most every ``grow_cooldown_s``.
    Jobs of higher ``priority`` are placed first, and may suspend others.

    ``isolation_grace_s`` is how long ranks go on, while they complete steps, on a
    machine that cannot reach etcd; 0: ten minutes or two checkpoint intervals,
    whichever is longer. ``reschedule_grace_s`` is how long the leader waits for an
    agent whose lease has ended; 0: not at all.
    """

    name: JobName
    uid: Uid
    entry: Entry
    nnodes_min: int = 1
    nnodes_max: int = 1
    nproc_per_node: int = 1
    working_dir: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    restarts: RestartPolicy = RestartPolicy()
    shutdown_grace_s: float = 30.0
    isolation_grace_s: float = 0.0
    reschedule_grace_s: float = 0.0
    spares: int = 0
    grow_cooldown_s: float = 60.0
    priority: int = 0
    hang: HangPolicy = HangPolicy()
    nonfinite: NonFinitePolicy = NonFinitePolicy()
    failure_rules: tuple[FailureRule, ...] = ()
    submitted_at: str = ""
    request_id: str = ""
    """Chosen by the client: submitting again with the same one changes nothing."""
    package: Package | None = None
    """What the ranks start in instead of ``working_dir``: each machine unpacks it for itself."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """For people, to find jobs by: nothing is decided by them."""


class Wanted(StrEnum):
    """What an operator wants of a job."""

    RUN = "run"
    SUSPEND = "suspend"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Intent:
    """The operator's side. A new ``checkpoint_token`` asks for one checkpoint now.

    ``nnodes_min`` and ``nnodes_max`` replace those of the job file; 0: they do not.
    ``paused``: a running job stands still at a step, with all that it has.
    """

    uid: Uid
    wanted: Wanted = Wanted.RUN
    checkpoint_token: str = ""
    by: str = ""
    at: str = ""
    nnodes_min: int = 0
    nnodes_max: int = 0
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """One machine's part in an attempt: ranks ``first_rank`` to ``first_rank + nproc - 1``.

    ``incarnation`` is the agent's life that was chosen; the same agent under
    another incarnation has forgotten nothing, but is asked again. ``version`` is the release that
    starts the ranks: they keep it when their agent is replaced.
    """

    agent: AgentName
    node_rank: int
    first_rank: Rank
    nproc: int
    incarnation: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """The checkpoint an attempt starts from, fixed before any command leaves."""

    seq: Seq
    step: Step
    manifest: str
    """Key of the manifest in the job's store."""
    digest: str
    """SHA-256 of the manifest's bytes as stored, in hex."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One machine-readable statement on a job."""

    type: str
    status: str
    """``True``, ``False`` or ``Unknown``."""
    reason: str = ""
    message: str = ""
    last_transition: str = ""


@dataclass(frozen=True, slots=True)
class FailureMark:
    """One earlier failure, as far as it is needed to know the same one again."""

    attempt: Attempt
    agent: AgentName
    fingerprint: str
    step: Step = Step(0)
    rank: Rank | None = None


@dataclass(frozen=True, slots=True)
class Former:
    """An earlier submission of a name whose store may still hold what no record names."""

    uid: Uid
    store: str


@dataclass(frozen=True, slots=True)
class Tally:
    """What has happened in this submission so often, for metrics.

    Each rises in the transaction that makes it happen: no change of leader counts twice, or forgets.
    """

    attempts: Mapping[str, int] = field(default_factory=dict)
    """By why each began: ``first``, ``planned``, or the kind of failure that ended the one before."""
    commits: int = 0
    committed_bytes: int = 0
    aborts: Mapping[str, int] = field(default_factory=dict)
    """Checkpoints that were opened and not committed, by why: see docs/metrics.md."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What the leader has decided; everything a successor needs to go on.

    ``restarts`` are the wall times (epoch seconds) of restarts that count
    against the budget; policies may use the wall clock, safety never does.
    ``seq_last`` is the last checkpoint number given out: after an abort nothing
    else remembers it. ``token_done`` is the last checkpoint token answered.
    """

    term: Term
    uid: Uid
    phase: JobPhase
    reason: str = ""
    attempt: Attempt = Attempt(0)
    members: tuple[Member, ...] = ()
    restore: RestorePoint | None = None
    restarts: tuple[float, ...] = ()
    seq_last: Seq = Seq(0)
    token_done: str = ""
    event_last: int = 0
    store: str = ""
    """The store this job uses, fixed at its first start ("": checkpoints are off)."""
    step: Step = Step(0)
    """Newest step known when this record was written; live progress is in the snapshots."""
    failure: Failure | None = None
    """Root cause of the newest failed attempt."""
    final_tries: int = 0
    """How often the checkpoint at the end of training was tried in this attempt."""
    late_saves: int = 0
    """How far behind the ranks recent targets were: each 'late' adds one and doubles
    the slack of the next target step, each commit takes one off."""
    failed_saves: int = 0
    """Checkpoints in a row that failed for another reason: the next one waits longer."""
    fruitless: int = 0
    """Attempts in a row that ended without a new step or commit: the next one waits longer."""
    charge: bool = False
    """``failure`` ended the attempt and is still to be counted against the budget."""
    swept: bool = False
    """The job is over and its orphans in the store were collected after that."""
    since: str = ""
    """When the phase began (UTC)."""
    finished_at: str = ""
    conditions: tuple[Condition, ...] = ()
    unknown_from: Seq = Seq(0)
    unknown_to: Seq = Seq(0)
    """Numbers that were given out and then forgotten by an etcd restored from a backup; 0: none. What the
    store holds of them is neither used nor deleted."""
    marks: tuple[FailureMark, ...] = ()
    """The last failures that have a traceback, oldest first."""
    passed_over: tuple[Seq, ...] = ()
    """Committed checkpoints that no attempt begins from any more: training was rolled back past them."""
    nonfinite_step: Step = Step(0)
    """Numbers of this attempt that were not finite have been told of up to here, this step not included."""
    stragglers: tuple[Rank, ...] = ()
    """Ranks of this attempt that are persistently slower than the others."""
    joining: tuple[AgentName, ...] = ()
    """Machines that get ready to join a running job, in order of name."""
    joining_since: str = ""
    grown_at: str = ""
    """When it last grew: it does not again before its cooldown is over."""
    preempted_by: str = ""
    """With SUSPENDING, and QUEUED after it: the job that needs the machines. It stays while the job runs
    again, which is then left alone for a while."""
    stopping: bool = False
    """With SUSPENDING: the checkpoint is taken, or there will be none, and ranks are being stopped."""
    unswept: tuple[Former, ...] = ()
    """Earlier submissions of this name that were used again before their last sweep."""
    tally: Tally = Tally()
    ledger: Ledger | None = None
    """Where its time went; None: written by a release that kept none."""
    held: Seq = Seq(0)
    """Number of the commit that all ranks of this attempt are held at: the job is paused. 0: it is not."""

    @property
    def world_size(self) -> int:
        """Ranks of the current attempt."""
        return sum(member.nproc for member in self.members)
