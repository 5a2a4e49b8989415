"""Twenty planted hangs: how long until each is found, and is the right rank named?

torchrun finds none of them: it watches processes, and a process that hangs lives. Its job ends when the
process group's timeout is over, 30 minutes by default, and only if some other rank waits in a collective.
"""

import json
import tempfile
import time
import uuid
from itertools import product
from pathlib import Path

from benchmarks.report import Result, result
from dtrain.cli.client import Client
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, JobSpec, RestartPolicy

SCRIPT = Path(__file__).parent / "hanging.py"
KINDS = ("elsewhere", "mismatch", "data", "loop", "stop")
RANKS = 4
SLACK_S, STEPS = 5.0, 3.0
LIMIT_S = 60.0


def measure(rounds: int) -> list[Result]:
    """Plant each kind of hang on each rank, 2 machines x 2 ranks, ``rounds`` / 3 times (at least once)."""
    plan = [(kind, rank) for rank, kind in product(range(RANKS), KINDS)] * max(1, rounds // 3)
    times, right = find(plan)
    return [
        result(
            "a planted hang until it is found, beyond 3x the step time",
            "s",
            times,
            [],
            "torchrun: finds none",
            ours_max=SLACK_S,
        ),
        result(
            f"right rank named, of {len(plan)} planted hangs",
            "",
            [float(right)],
            [],
            "torchrun: names none",
            ours_min=float(len(plan)),
        ),
    ]


def find(plan: list[tuple[str, int]]) -> tuple[list[float], int]:
    """Plant these hangs one after another; return the times beyond 3 steps, and how many were named right."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        marks = folder / "marks"
        marks.mkdir()
        with LocalCluster(folder / "cluster", agents=2, slots=2, store="dir", etcd_fsync=False) as cluster:
            job = _submit(cluster, marks, plan)
            times, right = [], 0
            for number, (kind, rank) in enumerate(plan, 1):
                event = _found(cluster, job, number)
                mark = json.loads((marks / f"hang-{number}.json").read_text())
                took_s = _epoch(event.first) - mark["at"]
                ok = event.object == f"rank/{rank}"
                right += ok
                times.append(took_s - STEPS * mark["step_s"])
                verdict = "right" if ok else "WRONG"
                print(f"  {kind} on rank {rank}: {took_s:.2f} s, {verdict}: {event.message}", flush=True)
            return times, right


def _submit(cluster: LocalCluster, marks: Path, plan: list[tuple[str, int]]) -> JobName:
    text = ",".join(f"{kind}:{rank}" for kind, rank in plan)
    words = ("--steps", "1000000", "--plan", text, "--marks", str(marks))
    spec = JobSpec(
        JobName("hangs"),
        Uid(""),
        Entry(EntryKind.SCRIPT, str(SCRIPT), words),
        2,
        2,
        2,
        working_dir=str(SCRIPT.parent),
        checkpoint=CheckpointPolicy(every_steps=20),
        restarts=RestartPolicy(1000),
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
    )
    client = Client(cluster.addresses)
    try:
        client.submit(codec.encode(spec), uuid.uuid4().hex)
    finally:
        client.close()
    return spec.name


def _found(cluster: LocalCluster, job: JobName, attempt: int) -> EventRecord:
    deadline = time.monotonic() + LIMIT_S
    prefix = f"{cluster.keys.root}jobs/{job}/events/"
    while time.monotonic() < deadline:
        for item in cluster.etcd.range(prefix, prefix[:-1] + "0").items:
            event = codec.decode(EventRecord, item.value)
            if event.reason is EventReason.HANG_FOUND and event.attempt == attempt:
                return event
        time.sleep(0.1)
    raise TimeoutError(f"the hang of attempt {attempt} was not found in {LIMIT_S:g} s")


def _epoch(stamp: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
