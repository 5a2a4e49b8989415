"""What a replica's ``/metrics`` shows. A test holds ``docs/metrics.md`` to it."""

from dtrain.runtime.metrics import Metric

IS_LEADER = Metric(
    "dtrain_coordinator_is_leader", "gauge", "1 on the replica that leads and may act now, else 0."
)
TERM = Metric(
    "dtrain_coordinator_term",
    "gauge",
    "Term of the leader that this replica knows of, whoever it is; no sample while there is none.",
)
MIRROR_AGE = Metric(
    "dtrain_coordinator_mirror_age_seconds",
    "gauge",
    "How long ago this replica's copy of etcd was last known to be complete; no sample before it was read.",
)
MIRROR_REVISION = Metric(
    "dtrain_coordinator_mirror_revision", "gauge", "Revision of etcd that this replica's copy has reached."
)
LOOP_AGE = Metric(
    "dtrain_coordinator_loop_age_seconds", "gauge", "How long ago the loop that decides last came round."
)
PROBLEMS = Metric(
    "dtrain_coordinator_problems",
    "gauge",
    "Problems this replica knows of; `dtrain get coordinators` names them.",
)
JOBS = Metric("dtrain_jobs", "gauge", "Jobs by phase, as this replica's copy of etcd has them.", ("phase",))
AGENTS = Metric(
    "dtrain_agents",
    "gauge",
    "Registered agents by state: ready, cordoned, draining, blocked by a problem. Lost ones are not counted.",
    ("state",),
)

METRICS = (IS_LEADER, TERM, MIRROR_AGE, MIRROR_REVISION, LOOP_AGE, PROBLEMS, JOBS, AGENTS)
