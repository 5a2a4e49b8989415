"""What a replica's ``/metrics`` shows, by group. ``docs/metrics.md`` and the dashboard are made from it.

``measures`` counts what happens here, ``job_series`` reads what the records tell, ``status``
puts both on the page.
"""

from dtrain.runtime.metrics import MICROSECONDS, MILLISECONDS, Metric
from dtrain.storage.blobs import metered as metered_store
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS
from dtrain.storage.etcd import lease_metrics, metered

# Who leads.

IS_LEADER = Metric(
    "dtrain_coordinator_is_leader", "gauge", "1 on the replica that leads and may act now, else 0."
)
TERM = Metric(
    "dtrain_leader_term",
    "gauge",
    "Term of the leader that this replica knows of, whoever it is; no sample while there is none.",
)
TRANSITIONS = Metric(
    "dtrain_leader_transitions_total",
    "counter",
    "Leaders that this replica has seen take over, the first one it saw not counted.",
)
TAKEOVER_SECONDS = Metric(
    "dtrain_takeover_duration_seconds",
    "histogram",
    "From the end of the former leader's key, as seen here, until this replica decides about jobs.",
    buckets=MILLISECONDS,
)
FENCED = Metric(
    "dtrain_fenced_writes_total",
    "counter",
    "Decisions that etcd refused because their term was over: each ended the process that had made it.",
)
BRAKE_ON = Metric(
    "dtrain_brake_on",
    "gauge",
    "1 while this replica leads and declares nobody lost: many agents vanished together, or etcd is silent.",
)
LOOP_AGE = Metric(
    "dtrain_coordinator_loop_age_seconds", "gauge", "How long ago the loop that decides last came round."
)
PROBLEMS = Metric(
    "dtrain_coordinator_problems",
    "gauge",
    "Problems this replica knows of; `dtrain get coordinators` names them.",
)

# etcd.

MIRROR_AGE = Metric(
    "dtrain_mirror_age_seconds",
    "gauge",
    "How long ago this replica's copy of etcd was last known to be complete; no sample before it was read.",
)
MIRROR_REVISION = Metric(
    "dtrain_mirror_revision", "gauge", "Revision of etcd that this replica's copy has reached."
)
RELISTS = Metric(
    "dtrain_mirror_relists_total",
    "counter",
    "How often everything was read from etcd, by why: start, compacted, silent, went-back.",
    ("reason",),
)
DB_SIZE = Metric(
    "dtrain_etcd_db_size_bytes", "gauge", "Size of the database of the etcd member that answered last."
)
DB_QUOTA = Metric(
    "dtrain_etcd_db_quota_bytes",
    "gauge",
    "What that database may grow to; no sample from members older than etcd 3.6, which do not tell.",
)

# Reconciling.

PLAN_SECONDS = Metric(
    "dtrain_plan_duration_seconds",
    "histogram",
    "How long one decision about one job took to compute.",
    buckets=MICROSECONDS,
)
PLAN_FAILURES = Metric(
    "dtrain_plan_failures_total",
    "counter",
    "Decisions that crashed: a bug, or a record that cannot be. The job is left alone for a while, "
    "others go on.",
)
COMMAND_SECONDS = Metric(
    "dtrain_command_duration_seconds",
    "histogram",
    "How long agents took to answer a command, by its kind; taken on or not.",
    ("kind",),
    MILLISECONDS,
)
COMMAND_FAILURES = Metric(
    "dtrain_command_failures_total",
    "counter",
    "Commands that were not taken on: refused (nobody there), timed-out, or rejected by the agent.",
    ("kind", "code"),
)

# Jobs.

JOBS = Metric("dtrain_jobs", "gauge", "Jobs by phase, as this replica's copy of etcd has them.", ("phase",))
JOBS_UNSHOWN = Metric(
    "dtrain_jobs_unshown",
    "gauge",
    "Jobs beyond the thousand that get series of their own; ended ones go first, the oldest of them.",
)
ATTEMPTS = Metric(
    "dtrain_job_attempts_total",
    "counter",
    "Attempts by why they began: first, planned (another size, a drain, a resume), or the kind of "
    "failure before it.",
    ("job", "reason"),
)
STEP = Metric(
    "dtrain_job_step",
    "gauge",
    "Newest step that every rank has completed, as `dtrain get jobs` shows it.",
    ("job",),
)
PROGRESS_AT = Metric(
    "dtrain_job_last_progress_timestamp_seconds",
    "gauge",
    "When this leader last saw the step of a running job rise, or first saw the job; no sample in other "
    "phases and while it is paused.",
    ("job",),
)
PHASE_AT = Metric(
    "dtrain_job_phase_since_timestamp_seconds", "gauge", "When the job's present phase began.", ("job",)
)
STEP_USUAL = Metric(
    "dtrain_job_step_seconds",
    "gauge",
    "What a step of a running job takes lately, the median over ranks of each one's own median.",
    ("job",),
)
TIME = Metric(
    "dtrain_job_time_seconds_total",
    "counter",
    "Where a job's time went, by category (docs/goodput.md); steps count as productive once a "
    "checkpoint holds them.",
    ("job", "category"),
)
GOODPUT = Metric(
    "dtrain_job_goodput_ratio",
    "gauge",
    "Productive time as a share of that in which progress was wanted, as `dtrain get jobs` shows it.",
    ("job",),
)
STRAGGLER = Metric(
    "dtrain_straggler_ratio",
    "gauge",
    "Own time per step over the usual own time, of the slowest rank of a machine that is named as "
    "persistently slow.",
    ("job", "agent"),
)

# Checkpoints.

COMMITS = Metric("dtrain_checkpoint_commits_total", "counter", "Checkpoints that were committed.", ("job",))
COMMITTED_BYTES = Metric(
    "dtrain_checkpoint_committed_bytes_total",
    "counter",
    "Bytes of the checkpoints that were committed.",
    ("job",),
)
CHECKPOINT_FAILURES = Metric(
    "dtrain_checkpoint_failures_total",
    "counter",
    "Checkpoints that were opened and not committed: late, rank, timeout, verify, unfit, or superseded "
    "(not needed any more).",
    ("job", "reason"),
)
COMMITTED_STEP = Metric(
    "dtrain_checkpoint_last_committed_step", "gauge", "Step of the newest committed checkpoint.", ("job",)
)
COMMITTED_AT = Metric(
    "dtrain_checkpoint_last_committed_timestamp_seconds",
    "gauge",
    "When the newest checkpoint was committed.",
    ("job",),
)
INTERVAL = Metric(
    "dtrain_checkpoint_interval_seconds",
    "gauge",
    "How often a running job should commit, by its job file and what its steps take lately; no sample "
    "if never or not known.",
    ("job",),
)

# Agents.

AGENTS = Metric(
    "dtrain_agents",
    "gauge",
    "Agents by state: ready, cordoned, draining, blocked by a problem, or lost within the last hour "
    "without a word.",
    ("state",),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Leadership": (
        IS_LEADER,
        TERM,
        TRANSITIONS,
        TAKEOVER_SECONDS,
        *lease_metrics.METRICS,
        FENCED,
        BRAKE_ON,
        LOOP_AGE,
        PROBLEMS,
    ),
    "etcd": (*metered.METRICS, MIRROR_AGE, MIRROR_REVISION, RELISTS, DB_SIZE, DB_QUOTA),
    "Reconciling": (PLAN_SECONDS, PLAN_FAILURES, COMMAND_SECONDS, COMMAND_FAILURES),
    "Jobs": (JOBS, JOBS_UNSHOWN, ATTEMPTS, STEP, PROGRESS_AT, PHASE_AT, STEP_USUAL, TIME, GOODPUT, STRAGGLER),
    "Checkpoints": (
        STAGE_SECONDS,
        COMMITS,
        COMMITTED_BYTES,
        CHECKPOINT_FAILURES,
        COMMITTED_STEP,
        COMMITTED_AT,
        INTERVAL,
    ),
    "Agents": (AGENTS,),
    "Store": metered_store.METRICS,
}

METRICS = tuple(metric for group in GROUPS.values() for metric in group)
