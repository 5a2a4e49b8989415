"""What the guardian of either daemon counts of its lease and its child, as metrics of that child.

It counts over all its children: a process that was killed can tell of it in its next life.
"""

from dtrain.runtime.metrics import Distribution, Metric, Samples
from dtrain.storage.etcd.lease_keeper import KILL_SHARE
from dtrain.storage.etcd.session import Session
from dtrain.storage.etcd.session_memory import KILLS, RENEWAL_BOUNDS_S

RENEW_SECONDS = Metric(
    "dtrain_lease_renew_duration_seconds",
    "histogram",
    "How long tries to renew this daemon's lease took, failed ones included; counted by its guardian.",
    buckets=RENEWAL_BOUNDS_S,
)
REMAINING = Metric(
    "dtrain_lease_remaining_seconds",
    "gauge",
    "How long this daemon's lease surely lives on if nobody renews it; 0: there is none.",
)
TTL = Metric(
    "dtrain_lease_ttl_seconds",
    "gauge",
    "How long a renewal makes this daemon's lease live; 0: there is none.",
)
KILLED = Metric(
    "dtrain_guardian_kills_total",
    "counter",
    "How often the guardian killed this daemon's process: hang (its loop stood still), lease (it led without "
    "one), stop (it did not stop in time).",
    ("reason",),
)
METRICS = (RENEW_SECONDS, REMAINING, TTL, KILLED)


def samples(session: Session, now: float) -> Samples:
    """Return how the lease stands at ``now`` (``Clock.monotonic``) and what was counted."""
    counts, view = session.counts(), session.view()
    # Deadlines stand at shares of the TTL: what is left of it behind the last one is the rest.
    ends_at = view.kill_at + (1 - KILL_SHARE) * view.ttl_s
    left_s = max(0.0, ends_at - now) if view.lease else 0.0
    return {
        RENEW_SECONDS: {(): Distribution(counts.renewals, counts.renewals_us / 1e6)},
        REMAINING: {(): left_s},
        TTL: {(): view.ttl_s if view.lease else 0.0},
        KILLED: {(why,): float(times) for why, times in zip(KILLS, counts.kills, strict=True)},
    }
