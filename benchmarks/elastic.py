"""A job that grows from one machine to two and shrinks to one again: dtrain beside torchrun.

The pause is the time without a finished step: from the last one in the old size to the first in
the new one. Under dtrain the job also shows that no step is done twice where nothing is lost, that
every sample is seen once per epoch, and that the loss goes on where it was.
"""

import contextlib
import itertools
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import marks
from benchmarks.report import Result, result
from benchmarks.torchrun import Torchrun
from dtrain.cli.client import Client
from dtrain.local import ports
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, JobSpec, JobStatus, RestartPolicy

SCRIPT = Path(__file__).parent / "elastic_script.py"
JOB = JobName("elastic")
MANY_STEPS = 1_000_000
SETTLED_STEPS = 100
TIMEOUT_S = 120.0
SAMPLES = 1797
PAUSE_S_MAX = 2.0


@dataclass(slots=True)
class Found:
    """Pauses in seconds by what happened, and what was lost of training."""

    grown: list[float] = field(default_factory=list)
    scaled_down: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    """Steps done twice over each change that loses no machine."""
    jumps: list[float] = field(default_factory=list)
    """Change of the loss over such a change, in multiples of the largest between two steps before it."""
    wrong_samples: int = 0
    """Samples that an epoch has not had exactly once."""


def measure(rounds: int) -> list[Result]:
    """Interleave ``rounds`` of each."""
    ours, peer = Found(), Found()
    for _ in range(rounds):
        under_dtrain(ours)
        under_torchrun(peer)
    tuned = "torchrun, tuned flags"
    bar = {"ours_max": PAUSE_S_MAX}
    return [
        result("pause: a machine joins, 1 to 2", "s", ours.grown, peer.grown, tuned, **bar),
        result("pause: scaled down, 2 to 1", "s", ours.scaled_down, [], "", **bar),
        result("pause: a machine is lost, 2 to 1", "s", ours.lost, peer.lost, tuned, **bar),
        result("steps done twice when it grows or is scaled", "", ours.repeated, [], "", ours_max=0.0),
        result(
            "samples not seen exactly once per epoch", "", [float(ours.wrong_samples)], [], "", ours_max=0.0
        ),
        result("jump of the loss over a change of size", "steps", ours.jumps, [], "", ours_max=1.5),
    ]


def under_dtrain(found: Found) -> None:
    """One job: a machine is lost, comes back, is scaled away, and comes again."""
    with _folder() as folder:
        steps = folder / "marks"
        steps.mkdir()
        with LocalCluster(folder / "cluster", agents=2, slots=1, store="dir", etcd_fsync=False) as cluster:
            _submit(cluster, steps)
            found.lost.append(_change(steps, 2, 1, lambda: cluster.power_cut(_second(cluster))))
            found.grown.append(_change(steps, 1, 2, lambda: _bring_back(cluster)))
            _judge(found, steps)
            found.scaled_down.append(_change(steps, 2, 1, lambda: _scale(cluster, 1)))
            _judge(found, steps)
            found.grown.append(_change(steps, 1, 2, lambda: _scale(cluster, 2)))
            _judge(found, steps)
            _await(steps, 2)
            found.wrong_samples += _wrong_samples(steps)


def under_torchrun(found: Found) -> None:
    """The same under two torchrun agents; they cannot be scaled."""
    with _folder() as folder:
        port = ports.reserve(1)
        args = ["--steps", str(MANY_STEPS), "--marks", str(folder)]
        peer = Torchrun(folder, port[0], args, nnodes="1:2", nproc=1, script=SCRIPT)
        try:
            peer.start()
            found.lost.append(_change(folder, 2, 1, lambda: peer.kill(1)))
            # It does not always come back within the limit; then there is nothing that could grow.
            if found.lost[-1] < TIMEOUT_S:
                found.grown.append(_change(folder, 1, 2, lambda: peer.replace(1)))
        finally:
            peer.stop()
            ports.release(port)


# Changes ---------------------------------------------------------------------------


def _change(steps: Path, before: int, after: int, act: Callable[[], None]) -> float:
    """Once the job has settled, change its size; return the time without a finished step."""
    pids = _await(steps, before)
    act()
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        last = max(mark.at_ns for mark in _marks(steps) if mark.pid in pids)
        back = [m.at_ns for m in marks.read(steps, after - 1) if m.pid not in pids and m.at_ns > last]
        if back and _ranks(steps)[-1:] == [after]:
            first = min(mark.at_ns for mark in _marks(steps) if mark.at_ns > last and mark.pid not in pids)
            return (first - last) / 1e9
        time.sleep(0.05)
    return TIMEOUT_S


def _await(steps: Path, ranks: int) -> set[int]:
    """Wait until ``ranks`` have settled; return their pids."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        newest = [found[-1].pid for rank in range(ranks) if (found := marks.read(steps, rank))]
        counts = [sum(mark.pid == pid for mark in _marks(steps)) for pid in newest]
        if len(counts) == ranks == _ranks(steps)[-1] and min(counts) >= SETTLED_STEPS:
            return set(newest)
        time.sleep(0.1)
    raise TimeoutError(f"{ranks} ranks did not finish {SETTLED_STEPS} steps in {TIMEOUT_S:g} s")


def _marks(steps: Path) -> list[marks.Mark]:
    return marks.read(steps, 0) + marks.read(steps, 1)


def _ranks(steps: Path) -> list[int]:
    """How many ranks each finished step had, by the lines of rank 0."""
    return [line.ranks for line in _lines(steps, 0)]


def _second(cluster: LocalCluster) -> str:
    status = codec.decode(JobStatus, cluster.etcd.range(cluster.keys.status(JOB)).items[0].value)
    return str(status.members[1].agent)


def _bring_back(cluster: LocalCluster) -> None:
    for name, daemon in cluster.agents.items():
        if not daemon.is_running:
            cluster.start_daemon(name)


def _scale(cluster: LocalCluster, most: int) -> None:
    with contextlib.closing(Client(cluster.addresses)) as client:
        client.set_intent(JOB, nnodes=(1, most), by="benchmark")


# What it shows -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    attempt: int
    ranks: int
    step: int
    loss: float
    samples: tuple[int, ...]


def _lines(steps: Path, rank: int) -> list[_Line]:
    path = steps / f"samples-{rank}"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().split("\n")[:-1]:
        attempt, ranks, step, loss, *samples = line.split()
        found.append(_Line(int(attempt), int(ranks), int(step), float(loss), tuple(map(int, samples))))
    return found


def _judge(found: Found, steps: Path) -> None:
    """Look at the newest change of size."""
    lines = _lines(steps, 0)
    newest = lines[-1].attempt
    after = [line for line in lines if line.attempt == newest]
    before = [line for line in lines if line.attempt < newest]
    found.repeated.append(float(before[-1].step + 1 - after[0].step))
    losses = [line.loss for line in before[-SETTLED_STEPS:]]
    usual = max(abs(a - b) for a, b in itertools.pairwise(losses))
    found.jumps.append(abs(after[0].loss - losses[-1]) / usual)


def _wrong_samples(steps: Path) -> int:
    """Of steps that were done twice the later one counts."""
    kept: dict[int, dict[int, _Line]] = {}
    for rank in (0, 1):
        for line in _lines(steps, rank):
            of = kept.setdefault(line.step, {})
            if any(other.attempt > line.attempt for other in of.values()):
                continue
            if any(other.attempt < line.attempt for other in of.values()):
                of.clear()
            of[rank] = line
    stream: list[int] = []
    for step, each in sorted(kept.items()):
        if 0 not in each or len(each) != each[0].ranks:
            if step < max(kept) - 1:
                return SAMPLES  # of a step in the middle the lines of a rank are missing
            break  # a rank has not written its line yet
        stream += [each[rank].samples[i] for i in range(len(each[0].samples)) for rank in sorted(each)]
    whole = len(stream) // SAMPLES * SAMPLES
    epochs = [stream[i : i + SAMPLES] for i in range(0, whole, SAMPLES)]
    return sum(SAMPLES - len(set(epoch)) for epoch in epochs)


def _submit(cluster: LocalCluster, steps: Path) -> None:
    spec = JobSpec(
        JOB,
        Uid(""),
        Entry(EntryKind.SCRIPT, str(SCRIPT), ("--steps", str(MANY_STEPS), "--marks", str(steps))),
        1,
        2,
        1,
        working_dir=str(SCRIPT.parent),
        preload=("sklearn.datasets",),
        checkpoint=CheckpointPolicy(every_steps=50),
        restarts=RestartPolicy(1000),
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
        grow_cooldown_s=0.0,
    )
    with contextlib.closing(Client(cluster.addresses)) as client:
        client.submit(codec.encode(spec), uuid.uuid4().hex)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        yield Path(name)
