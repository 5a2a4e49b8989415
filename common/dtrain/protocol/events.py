"""What happened, why, and to whom: the bounded history of a job.

Reasons are public interface: stable, CamelCase, never renamed.
"""

from dataclasses import dataclass
from enum import StrEnum

from dtrain.protocol.ids import Attempt, Term

EVENTS_KEPT = 200
"""Events of one job in etcd; the oldest goes when a new one comes."""


class EventType(StrEnum):
    """Normal progress, or something an operator may want to look at."""

    NORMAL = "Normal"
    WARNING = "Warning"


class EventReason(StrEnum):
    """Every reason an event can have."""

    JOB_SUBMITTED = "JobSubmitted"
    ATTEMPT_STARTED = "AttemptStarted"
    ALL_RANKS_TRAINING = "AllRanksTraining"
    RESTORED = "RestoredFromCheckpoint"
    CHECKPOINT_COMMITTED = "CheckpointCommitted"
    CHECKPOINT_ABORTED = "CheckpointAborted"
    CHECKPOINT_SETTLED = "CheckpointSettled"
    CHECKPOINT_QUARANTINED = "CheckpointQuarantined"
    CHECKPOINT_DELETED = "CheckpointDeleted"
    GARBAGE_COLLECTED = "GarbageCollected"
    RANK_EXITED = "RankExited"
    RANK_SIGNALED = "RankSignaled"
    AGENT_LOST = "AgentLost"
    MASS_LOSS = "MassLoss"
    PREPARE_TIMEOUT = "PrepareTimeout"
    PACKAGE_UNUSABLE = "PackageUnusable"
    PROCESS_UNKILLABLE = "ProcessUnkillable"
    AGENT_DRAINING = "AgentDraining"
    DRAINED = "Drained"
    LEADER_CHANGED = "LeaderChanged"
    BUDGET_EXHAUSTED = "BudgetExhausted"
    DO_NOT_RETRY = "DoNotRetry"
    JOB_SUCCEEDED = "JobSucceeded"
    JOB_FAILED = "JobFailed"
    JOB_CANCELLED = "JobCancelled"
    STORE_UNAVAILABLE = "StoreUnavailable"
    ETCD_RESTORED = "EtcdRestored"
    USER_REQUESTED = "UserRequested"
    HANG_FOUND = "HangFound"
    NON_FINITE = "NonFiniteMetric"
    ROLLED_BACK = "RolledBack"
    STRAGGLER = "Straggler"
    USER_ERROR = "UserError"
    MACHINE_SUSPECTED = "MachineSuspected"
    CORDONED = "Cordoned"
    GROWING = "Growing"
    SHRINKING = "Shrinking"
    PREEMPTED = "Preempted"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    PAUSED = "Paused"
    UNPAUSED = "Unpaused"
    MIXED_RELEASES = "MixedReleases"


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event. ``object`` names what it is about: ``rank/3``, ``agent/gpu-02``, ``checkpoint/7``."""

    term: Term
    seq: int
    type: EventType
    reason: EventReason
    message: str
    object: str = ""
    attempt: Attempt = Attempt(0)
    count: int = 1
    first: str = ""
    last: str = ""
