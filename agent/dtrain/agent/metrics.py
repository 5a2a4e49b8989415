"""What an agent's ``/metrics`` shows. A test holds ``docs/metrics.md`` to it."""

from dtrain.runtime.metrics import Metric

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
    "dtrain_agent_ranks", "gauge", "Ranks on this machine by state, living or not yet let go.", ("state",)
)
RESTORED = Metric(
    "dtrain_agent_restored_bytes_total",
    "counter",
    "Bytes of checkpoints supplied to ranks, by source: snapshots in memory here, the cache, the store.",
    ("source",),
)

METRICS = (REGISTERED, LINK, LOOP_AGE, SLOTS, RANKS, RESTORED)
