"""What an agent knows: its machine, and one ``JobState`` for each job on it.

All of it is immutable and can be written to the journal with the codec.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dtrain.agent.launching import ProcessId
from dtrain.agent.transferring import KeptBlob
from dtrain.protocol.commands import Prepare, Start, Warm
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.ranklink import Have, Need, Outcome, RestorePlan, Sealed
from dtrain.protocol.snapshot import (
    BadBlob,
    CommandOutcome,
    DurablePart,
    Failure,
    RankState,
    SaveProblem,
    Stack,
    Timing,
    WorkerPhase,
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is fixed for one life of the agent process."""

    cluster: ClusterName
    agent: AgentName
    host: str
    """Address other machines' ranks reach this one under."""
    rank_socket: str
    run_dir: str
    """Short path: sockets live below it."""
    log_dir: str
    env: Mapping[str, str] = field(default_factory=dict)
    """The agent's own environment: the base of every rank's."""
    working_dir: str = "/"
    """Where programs run whose job names no folder."""
    tree_dir: str = "/"
    """Folder of the unpacked working directories."""
    life: str = "0"
    """Differs between lives of the agent process: folders are never shared."""
    orphan_grace_s: float = 600.0


class LauncherStatus(StrEnum):
    """Where a job's launcher stands. GONE: there is none, or it ended."""

    GONE = "gone"
    STARTING = "starting"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Launcher:
    """The launcher that serves the current attempt."""

    status: LauncherStatus = LauncherStatus.GONE
    folder: str = ""
    process: ProcessId | None = None
    warning: str = ""
    asked_at: float = 0.0
    """When it was last asked for something it must answer soon (monotonic)."""
    quitting: bool = False
    adopted: bool = False
    """Found by a restarted agent; it has not told its state yet."""
    killed: bool = False
    """It did not answer and was killed: its end is no failure, another one is started."""


@dataclass(frozen=True, slots=True)
class Departing:
    """The launcher of an earlier submission, told to quit; nothing starts before it is gone."""

    uid: Uid
    folder: str = ""
    process: ProcessId | None = None
    asked_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Restore:
    """What START asked for and how far it is."""

    id: str = ""
    """"" : nothing is to be fetched."""
    plan: RestorePlan | None = None
    tries: int = 0
    ordered: bool = False
    """The transfer process that runs now was told."""
    released: bool = False
    tiers: Mapping[str, int] = field(default_factory=dict)
    """Bytes verified by that process, by where they lay."""


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint taken on, whose outcome is not known here."""

    seq: Seq
    nonce: str
    step: Step
    hold_s: float = 0.0
    """Ranks stay at that step, at most so long."""
    asked: bool = False
    """The script asked for it, and hands its state over itself."""


@dataclass(frozen=True, slots=True)
class UploadTry:
    """How often one rank's part was handed to a transfer process; ``ordered``: to the one that runs."""

    seq: Seq
    rank: Rank
    tries: int
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Course:
    """How one upload of all local ranks, or one restore, has gone so far; ``moving`` has the rules."""

    seq: Seq
    fetch: str = ""
    """Id of the restore; "": it is an upload."""
    parts: Mapping[Rank, int] = field(default_factory=dict)
    """Bytes that the store has taken of each rank's part, as far as told."""
    done_bytes: int = 0
    total_bytes: int = 0
    """0: not known."""
    marks: tuple[tuple[float, int], ...] = ()
    """(monotonic instant, bytes done) of the last seconds, oldest first."""


@dataclass(frozen=True, slots=True)
class Watch:
    """How long a rank has stood at its step, and how long it usually does; ``hangs`` has the rules."""

    signs: tuple[str, ...] = ()
    """What it last said that shows that it goes on."""
    since: float = 0.0
    """When it first said that (monotonic); 0: it has said nothing."""
    looked_at: float = 0.0
    """Until when time has been counted."""
    counted_s: float = 0.0
    """How long it has stood still although it could have run."""
    disk_s: float = 0.0
    """How long it was seen to wait for a disk, which is not counted."""
    before_s: float = 0.0
    """How long it had stood at this step before it last said something new."""
    missed: bool = False
    """This process was not there all the time."""
    excused: bool = False
    """It had a reason to stand still: nothing is to be learned from how long it did."""
    raised_s: float = 0.0
    """A longer deadline, given once to a rank that was found at work."""
    stepped: bool = False
    """It has completed a step in this attempt."""
    usual: tuple[float, ...] = ()
    """Seconds for a step, the newest last."""
    steps: int = 0
    """How many have been measured in this attempt."""


@dataclass(frozen=True, slots=True)
class Habit:
    """What this machine knows of a submission's steps over all its attempts."""

    longest_s: float = 0.0
    """The longest standstill that ended with a step."""
    cut_step: Step = Step(-1)
    """Where the last attempt was taken for hung."""
    cut_s: float = 0.0
    """How long it had stood there; 0: none was."""
    cut_places: tuple[str, ...] = ()
    """What its ranks did there."""
    usual_s: float = 0.0
    """A step of this attempt takes between a quarter of it and all of it; 0: not measured."""


@dataclass(frozen=True, slots=True)
class LocalRank:
    """One rank on this machine."""

    rank: Rank
    local_rank: int
    process: ProcessId | None = None
    phase: WorkerPhase = WorkerPhase.RESTORING
    step: Step = Step(0)
    last_step: Step | None = None
    exit_code: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    sdk: bool = False
    restored: bool = False
    """Its state is loaded and verified, or it has none to load."""
    connection: int = 0
    """Its newest connection to the rank socket; 0: none."""
    forked_at: float | None = None
    """Monotonic; None: not forked yet, or forked in an earlier life of the agent."""
    wants_restore: bool = False
    plan_sent: bool = False
    demands: bool = False
    """It says what it needs; else it gets a plan with everything."""
    need: Need | None = None
    asked: Need | None = None
    """What the transfer process that runs now was asked for on its behalf."""
    have: Have | None = None
    """The answer to ``asked``."""
    have_sent: bool = False
    sealed: Sealed | None = None
    save_at: Step | None = None
    """Its script saves this step and waits for a checkpoint of exactly it."""
    settled: Seq = Seq(0)
    """The last outcome that it knew of when it said so."""
    wants_durable: Seq | None = None
    durable_told: Seq | None = None
    timing: Timing | None = None
    nonfinite: tuple[str, ...] = ()
    nonfinite_seen: Mapping[str, Step] = field(default_factory=dict)
    section: str = ""
    """What its script says it is doing."""
    beats: int = 0
    """Counts its signs of life beside steps."""
    collective: str = ""
    steps_total: Step = Step(0)
    watch: Watch = Watch()
    held_s: float = 0.0
    """How long checkpoints have held it."""

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def facts(self) -> RankState:
        """The rank as snapshots show it."""
        return RankState(
            self.rank,
            self.pid,
            self.phase,
            self.step,
            self.last_step,
            self.exit_code,
            self.metrics,
            self.sdk,
            self.save_at,
            self.timing,
            self.nonfinite,
            sealed=self.sealed.seq if self.sealed else Seq(0),
            nonfinite_seen=self.nonfinite_seen,
            steps_total=self.steps_total,
            held_s=self.held_s,
        )


@dataclass(frozen=True, slots=True)
class Stopping:
    """STOP was accepted: ranks are being ended; at the end the job is IDLE, or forgotten."""

    release: bool
    why: str
    kill_at: float
    """When nothing should be left (monotonic)."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the ranks of this attempt complete steps, as far as this life of the agent has seen."""

    step: int = 0
    at: float = 0.0
    """When ``step`` was first seen (monotonic); 0: no step yet."""
    longest_s: float = 0.0
    """The longest single step."""
    seconds: float = 0.0
    steps: int = 0
    """What ``seconds`` were needed for; 0: nothing has been measured."""


@dataclass(frozen=True, slots=True)
class Held:
    """A process that is to be gone and is not yet. ``overdue``: SIGKILL has not ended it in time."""

    process: ProcessId
    rank: Rank | None = None
    """None: something that a rank had started, or that is not known any more."""
    since: float = 0.0
    """When it was first missed (monotonic)."""
    overdue: bool = False
    waits_in: str = ""
    """Kernel function it waits in; "": the kernel does not tell."""


@dataclass(frozen=True, slots=True)
class JobState:
    """This machine's part of one job."""

    name: JobName
    uid: Uid
    attempt: Attempt
    phase: WorkerPhase
    prepare: Prepare | None = None
    start: Start | None = None
    started_at: float = 0.0
    """When START was taken on (monotonic)."""
    ranks: tuple[LocalRank, ...] = ()
    command: CommandOutcome | None = None
    cleared: bool = False
    """Nothing of an older attempt is alive under the current launcher."""
    leftovers: tuple[ProcessId, ...] = ()
    """Processes of a launcher that ended, or that it could not kill, not yet verified to be gone."""
    held: tuple[Held, ...] = ()
    """What is known of each of ``leftovers``."""
    departing: tuple[Departing, ...] = ()
    launcher: Launcher = Launcher()
    rendezvous: str = ""
    restore: Restore = Restore()
    saving: tuple[Saving, ...] = ()
    uploads: tuple[UploadTry, ...] = ()
    durable: tuple[DurablePart, ...] = ()
    kept: tuple[KeptBlob, ...] = ()
    """Uploaded blobs whose bytes still lie in arenas here, as far as is known."""
    problems: tuple[SaveProblem, ...] = ()
    seq_over: Seq = Seq(0)
    """The highest checkpoint number of this submission that is over here, over all attempts."""
    asked_over: Seq = Seq(0)
    """The highest one of this attempt that scripts had asked for."""
    outcomes: tuple[Outcome, ...] = ()
    """Of the current attempt, the newest last: a late BEGIN must not revive a seq."""
    failure: Failure | None = None
    bad: BadBlob | None = None
    kill_at: float | None = None
    """When the survivors of a failure are killed (monotonic)."""
    stopping: Stopping | None = None
    sdk: bool = False
    """A rank of this job has joined through the SDK, in this attempt or before."""
    pace: Pace = Pace()
    warm: Warm | None = None
    """A launcher is kept ready for a PREPARE that may come; nothing else is here."""
    warm_at: float = 0.0
    """Not before is one started (monotonic): the last one ended by itself."""
    note: str = ""
    """What was last done with it without an order, for people."""
    unpacked: bool = False
    """Its packed working directory is there."""
    unpacking: bool = False
    """The transfer process that runs now was told to make it."""
    unpack_tries: int = 0
    habit: Habit = Habit()
    dump: str = ""
    """The newest order to collect stacks, by its id."""
    stacks: tuple[Stack, ...] = ()
    """What came of it."""
    dumps: int = 0
    """How often stacks were collected in this attempt, for the leader or for a person."""
    dumped_at: float = 0.0
    """When that was last (wall time)."""
    courses: tuple[Course, ...] = ()
    """How far what moves is, for people."""

    @property
    def store(self) -> str:
        """The job's store; "": no checkpoints."""
        return self.prepare.store if self.prepare else ""

    def rank(self, rank: Rank) -> LocalRank | None:
        """The local rank of that number."""
        return next((local for local in self.ranks if local.rank == rank), None)

    @property
    def alive(self) -> bool:
        """Some rank has been forked and has not ended."""
        return any(rank.process is not None and rank.exit_code is None for rank in self.ranks)


class LinkState(StrEnum):
    """How a machine stands with etcd; ``isolation`` has the rules."""

    OK = "ok"
    SUSPECT = "suspect"
    ISOLATED = "isolated"


class Scope(StrEnum):
    """Whom etcd fails, according to coordinators. UNKNOWN: none has answered."""

    UNKNOWN = "unknown"
    ALONE = "alone"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class EtcdLink:
    """The machine's link to etcd. Times are monotonic, s; 0 while all is well."""

    state: LinkState = LinkState.OK
    since: float = 0.0
    """Since when: for an isolated machine, the deadline that it missed."""
    entered_at: float = 0.0
    """When this state was noticed."""
    silent_at: float = 0.0
    """When it was noticed that etcd does not answer, whatever came of it since."""
    scope: Scope = Scope.UNKNOWN


@dataclass(frozen=True, slots=True)
class Drain:
    """Told to end, the agent waits for its jobs to move; ``draining`` has the rules. Times are monotonic."""

    until: float
    grace_s: float
    heard_at: float
    """When a leader last ordered anything here."""
    since: str = ""
    """UTC time of the first wish, for people."""
    stays: bool = False
    """Nobody waits for the agent to end: its ranks go on until they have moved, or the grace is over."""
    answered: bool = False
    """A leader has ordered what the one that knows of it does."""
    over: str = ""
    """Why the agent may end now; "": it waits."""


RELEASED_KEPT = 256
"""Submissions whose last attempt here is remembered: late commands come within seconds."""


@dataclass(frozen=True, slots=True)
class AgentState:
    """Everything.

    ``term`` is the highest confirmed one; ``seen`` the command ids by job, oldest first; ``over`` the
    attempt with which a submission was released here: a late PREPARE of it must not bring it back.
    """

    machine: Machine
    incarnation: Incarnation
    term: Term = Term(0)
    jobs: Mapping[JobName, JobState] = field(default_factory=dict)
    seen: Mapping[JobName, tuple[str, ...]] = field(default_factory=dict)
    generation: int = 0
    over: Mapping[Uid, Attempt] = field(default_factory=dict)
    restored: Mapping[str, int] = field(default_factory=dict)
    """Bytes that restores of this life of the agent used, by where they lay."""
    link: EtcdLink = EtcdLink()
    coordinators: tuple[str, ...] = ()
    """Addresses of all replicas when etcd was last read: whom to ask when it cannot be."""
    refused_term: Term = Term(0)
    """The term of etcd's leader if it is lower than ``term``: etcd was restored from an older state."""
    drain: Drain | None = None
    """It is about to end. Not journaled: the guardian tells it to each life of the agent."""

    def with_job(self, job: JobState) -> "AgentState":
        """The state with this job replaced."""
        return dataclasses.replace(self, jobs={**self.jobs, job.name: job})

    def without_job(self, name: JobName) -> "AgentState":
        """The state without this job; its command ids go too."""
        job = self.jobs[name]
        others = [(uid, attempt) for uid, attempt in self.over.items() if uid != job.uid]
        return dataclasses.replace(
            self,
            jobs={key: job for key, job in self.jobs.items() if key != name},
            seen={key: ids for key, ids in self.seen.items() if key != name},
            over=dict([*others[1 - RELEASED_KEPT :], (job.uid, job.attempt)]),
        )


def coarse(seconds: float) -> float:
    """The power of two that is not below: what changes a little with each step is seldom written down."""
    return 2.0 ** math.ceil(math.log2(seconds)) if seconds > 0 else 0.0


def durable_view(job: JobState) -> JobState:
    """The job without what need not survive a crash of the agent: ranks tell it again."""
    ranks = tuple(
        LocalRank(
            rank=rank.rank,
            local_rank=rank.local_rank,
            process=rank.process,
            phase=rank.phase,
            exit_code=rank.exit_code,
            sdk=rank.sdk,
            restored=rank.restored,
            sealed=rank.sealed,
        )
        for rank in job.ranks
    )
    return dataclasses.replace(
        job,
        ranks=ranks,
        launcher=dataclasses.replace(job.launcher, asked_at=0.0),
        departing=tuple(dataclasses.replace(one, asked_at=0.0) for one in job.departing),
        restore=dataclasses.replace(job.restore, plan=None, tries=0, ordered=False, tiers={}),
        uploads=(),
        courses=(),
        pace=Pace(),
        habit=dataclasses.replace(job.habit, longest_s=coarse(job.habit.longest_s)),
        dump="",
        stacks=(),
        warm_at=0.0,
        unpacked=False,
        unpacking=False,
        unpack_tries=0,
        held=(),
        kill_at=None,
        stopping=dataclasses.replace(job.stopping, kill_at=0.0) if job.stopping else None,
    )
