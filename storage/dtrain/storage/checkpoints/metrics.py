"""What leader and machines measure of checkpoints: one metric, each of its stages shown by one role."""

from dtrain.runtime.metrics import MINUTES, Metric

STAGE_SECONDS = Metric(
    "dtrain_checkpoint_duration_seconds",
    "histogram",
    "How long a stage took. The leader: verify (reading and merging what ranks wrote), commit (the "
    "transaction). An agent, of each rank: snapshot (training stands still), upload, restore.",
    ("stage",),
    MINUTES,
)
