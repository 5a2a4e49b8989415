"""What an agent's ``/metrics`` shows, by group. ``docs/metrics.md`` and the dashboard are made from it.

``measures`` counts what happens here, ``status`` reads the rest and puts both on the page.
"""

from dtrain.runtime.metrics import MINUTES, Metric
from dtrain.storage.blobs import metered as metered_store
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS
from dtrain.storage.etcd import lease_metrics, metered

REGISTERED = Metric(
    "dtrain_agent_registered", "gauge", "1 while this machine is registered in etcd under a lease that lives."
)
LINK = Metric(
    "dtrain_agent_etcd_link",
    "gauge",
    "1 for the state of the link to etcd, else 0: ok, suspect (renewals fail) or isolated (no lease).",
    ("state",),
)
LOOP_AGE = Metric(
    "dtrain_agent_loop_age_seconds", "gauge", "How long ago the loop that supervises last came round."
)
SLOTS = Metric("dtrain_agent_slots", "gauge", "Ranks that this machine can run at once.")

RANKS = Metric(
    "dtrain_ranks",
    "gauge",
    "Ranks on this machine by job and state, living or not yet let go.",
    ("job", "state"),
)
EXITS = Metric(
    "dtrain_worker_exits_total",
    "counter",
    "Ranks of this machine that ended: done, stopped (on order, or as another one had failed), signal "
    "or exit.",
    ("job", "agent", "reason"),
)
STEP_SECONDS = Metric(
    "dtrain_job_step_duration_seconds",
    "histogram",
    "What steps took, as rank 0 completes them; shown by its machine. Steps told of in one report count as "
    "equally long.",
    ("job",),
    MINUTES,
)

BYTES = Metric(
    "dtrain_checkpoint_bytes_total",
    "counter",
    "Bytes of checkpoints: upload (ranks' parts that became durable) and restore (supplied to ranks).",
    ("direction",),
)
RESTORED = Metric(
    "dtrain_agent_restored_bytes_total",
    "counter",
    "Bytes of checkpoints supplied to ranks, by where they lay: snapshots in memory here, the cache, "
    "the store.",
    ("kind",),
)
STALL = Metric(
    "dtrain_checkpoint_stall_seconds_total",
    "counter",
    "How long rank 0 stood still for snapshots; shown by its machine.",
    ("job",),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Machine": (REGISTERED, LINK, LOOP_AGE, SLOTS),
    "etcd": (*metered.METRICS, *lease_metrics.METRICS),
    "Ranks": (RANKS, EXITS, STEP_SECONDS),
    "Checkpoints": (STAGE_SECONDS, BYTES, RESTORED, STALL),
    "Store": metered_store.METRICS,
}

METRICS = tuple(metric for group in GROUPS.values() for metric in group)
