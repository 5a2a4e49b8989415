"""Submits ``script.py`` to a local cluster."""

import uuid
from pathlib import Path

from dtrain.cli.client import Client
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, JobSpec, RestartPolicy

SCRIPT = Path(__file__).parent / "script.py"


def submit(
    cluster: LocalCluster,
    name: str,
    marks: Path,
    steps: int,
    *,
    every_steps: int = 0,
    pause_ms: float = 5.0,
    nnodes: int = 2,
    nproc: int = 2,
    spares: int = 0,
) -> JobName:
    """Submit and return at once."""
    spec = JobSpec(
        JobName(name),
        Uid(""),
        Entry(
            EntryKind.SCRIPT,
            str(SCRIPT),
            ("--steps", str(steps), "--marks", str(marks), "--pause-ms", str(pause_ms)),
        ),
        nnodes,
        nnodes,
        nproc,
        working_dir=str(SCRIPT.parent),
        preload=("sklearn.datasets",),
        spares=spares,
        checkpoint=CheckpointPolicy(every_steps=every_steps),
        restarts=RestartPolicy(1000),
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
    )
    client = Client(cluster.addresses)
    try:
        client.submit(codec.encode(spec), uuid.uuid4().hex)
    finally:
        client.close()
    return JobName(name)
