"""From a failure to the first step of the successors: dtrain beside torchrun, in one run.

A rank is killed; a machine with all its processes, with a spare at hand, one of them that of rank
0; and the agent alone, beside its launcher and ranks. 2 machines x 2 ranks, DDP, the digits model.
"""

import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import jobs, marks, timeline
from benchmarks.report import Result, result
from benchmarks.torchrun import Torchrun
from dtrain.local import ports
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobStatus
from dtrain.protocol.snapshot import WorkerSnapshot
from dtrain.storage.etcd.port import prefix_end

VICTIM = 3
TIMEOUT_S = 90.0
MANY_STEPS = 1_000_000
EVERY_STEPS = 50
TTL_S = 5.0
"""The fast profile."""
JOB = JobName("recovery")
UNDISTURBED_S = 4.0


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill cost."""

    seconds: float
    repeated: int = 0
    """Steps that were done twice."""
    since_commit: int = 0
    """Steps since the newest checkpoint that was committed when it happened."""


def measure(rounds: int) -> list[Result]:
    """Interleave ``rounds`` of each; the hops of a rank's kill are printed."""
    ours: list[Kill] = []
    peer: list[float] = []
    machines: dict[int, list[float]] = {1: [], 0: []}
    machines_peer: list[float] = []
    restarts: list[float] = []
    pauses: list[float] = []
    hops: list[dict[str, float]] = []
    for _ in range(rounds):
        ours += under_dtrain(hops=hops)
        peer += under_torchrun()
        for node_rank, taken in machines.items():
            taken.append(machine_under_dtrain(node_rank))
        machines_peer.append(machine_under_torchrun())
        restarted, pause = agent_restarted()
        restarts.append(float(restarted))
        pauses.append(pause)
    print(f"a rank's kill, hop by hop, medians of {len(hops)}:\n{timeline.table(hops)}")
    tuned = "torchrun, tuned flags"
    return [
        result(
            "kill -9 of a rank to the first step of its successor",
            "s",
            [kill.seconds for kill in ours],
            peer,
            tuned,
            ours_max=1.0,
            ratio_max=0.1,
        ),
        result(
            "steps done twice after it, beyond those since the newest checkpoint",
            "",
            [float(max(0, kill.repeated - kill.since_commit)) for kill in ours],
            [],
            "",
            ours_max=0.0,
        ),
        *(
            result(
                f"power cut of the machine of node rank {node_rank}, with a spare, to the first step",
                "s",
                taken,
                machines_peer if node_rank else [],
                tuned if node_rank else "torchrun's job dies",
                ours_max=TTL_S + 1.5,
            )
            for node_rank, taken in machines.items()
        ),
        result("restarts of ranks after kill -9 of an agent alone", "", restarts, [], "", ours_max=0.0),
        result("longest step while an agent is killed and comes back", "s", pauses, [], "", ours_max=1.0),
    ]


# A rank -----------------------------------------------------------------------------


def under_dtrain(kills: int = 2, hops: list[dict[str, float]] | None = None) -> list[Kill]:
    """Kill a rank ``kills`` times in one job."""
    found = []
    with _job(agents=2) as (cluster, steps):
        for _ in range(kills):
            pid = _await_checkpoint(cluster, steps)
            committed = _newest_commit(cluster)
            began, back = _kill(steps, pid)
            if back is None:
                found.append(Kill(TIMEOUT_S))
                continue
            if hops is not None:
                hops.append(timeline.read(cluster.folder, steps, began, back.at_ns))
            last = max(mark.step for mark in marks.read(steps, VICTIM) if mark.pid == pid)
            found.append(Kill((back.at_ns - began) / 1e9, last + 1 - back.step, last + 1 - committed))
    return found


def under_torchrun(kills: int = 1) -> list[float]:
    """The same under two torchrun agents."""
    found = []
    with _torchrun() as (_, folder):
        for _ in range(kills):
            pid = marks.await_steps(folder, VICTIM, 150, TIMEOUT_S)[-1].pid
            began, back = _kill(folder, pid)
            found.append(TIMEOUT_S if back is None else (back.at_ns - began) / 1e9)
    return found


def _kill(steps: Path, pid: int) -> tuple[int, marks.Mark | None]:
    began = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    return began, marks.first_of_another_process(steps, VICTIM, pid, TIMEOUT_S)


# A machine --------------------------------------------------------------------------


def machine_under_dtrain(node_rank: int) -> float:
    """Cut the power of one machine of two, with a third one as a spare."""
    with _job(agents=3, spares=1) as (cluster, steps):
        _await_checkpoint(cluster, steps)
        _await_spare(cluster)
        members = _status(cluster).members
        # A rank of the machine that stays: it steps again when the whole group does.
        other = next(member for member in members if member.node_rank != node_rank)
        pid = marks.read(steps, other.first_rank)[-1].pid
        began = time.monotonic_ns()
        cluster.power_cut(members[node_rank].agent)
        back = marks.first_of_another_process(steps, other.first_rank, pid, TIMEOUT_S)
        return TIMEOUT_S if back is None else (back.at_ns - began) / 1e9


def machine_under_torchrun() -> float:
    """Kill an agent of torchrun with its ranks, start another in its place at once; rank 0's stays."""
    with _torchrun() as (peer, folder):
        pid = marks.await_steps(folder, 0, 150, TIMEOUT_S)[-1].pid
        began = time.monotonic_ns()
        peer.replace(1)
        back = marks.first_of_another_process(folder, 0, pid, TIMEOUT_S)
        return TIMEOUT_S if back is None else (back.at_ns - began) / 1e9


# An agent alone ---------------------------------------------------------------------


def agent_restarted() -> tuple[int, float]:
    """Kill the agent's process beside its ranks; (attempts begun since, the longest step)."""
    with _job(agents=2) as (cluster, steps):
        _await_checkpoint(cluster, steps)
        before = _status(cluster)
        began = time.monotonic_ns()
        cluster.kill_agent(before.members[1].agent)
        time.sleep(UNDISTURBED_S)
        found = [mark.at_ns for mark in marks.read(steps, VICTIM) if mark.at_ns >= began - 1_000_000_000]
        pauses = [(after - earlier) / 1e9 for earlier, after in itertools.pairwise(found)]
        return _status(cluster).attempt - before.attempt, max(pauses, default=UNDISTURBED_S)


# What is common ---------------------------------------------------------------------


@contextlib.contextmanager
def _job(*, agents: int, spares: int = 0) -> Iterator[tuple[LocalCluster, Path]]:
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        steps = folder / "marks"
        steps.mkdir()
        with LocalCluster(
            folder / "cluster", agents=agents, slots=2, store="dir", ttl_s=int(TTL_S), etcd_fsync=False
        ) as cluster:
            jobs.submit(cluster, JOB, steps, MANY_STEPS, every_steps=EVERY_STEPS, spares=spares)
            yield cluster, steps


@contextlib.contextmanager
def _torchrun() -> Iterator[tuple[Torchrun, Path]]:
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        port = ports.reserve(1)
        arguments = ["--steps", str(MANY_STEPS), "--marks", name, "--save-every", str(EVERY_STEPS)]
        peer = Torchrun(Path(name), port[0], arguments)
        try:
            peer.start()
            yield peer, Path(name)
        finally:
            peer.stop()
            ports.release(port)


def _await_checkpoint(cluster: LocalCluster, steps: Path) -> int:
    """Wait until the attempt that runs has taken 150 steps and committed; the victim's pid."""
    while True:
        pid = marks.await_steps(steps, VICTIM, 150, TIMEOUT_S)[-1].pid
        attempt = _status(cluster).attempt
        if any(commit.attempt == attempt for commit in _commits(cluster)):
            return pid
        time.sleep(0.05)


def _await_spare(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(snapshot.warm for snapshot in _snapshots(cluster)):
        if time.monotonic() > deadline:
            raise TimeoutError("no machine became warm")
        time.sleep(0.05)


def _status(cluster: LocalCluster) -> JobStatus:
    found = cluster.etcd.range(cluster.keys.status(JOB)).items
    return codec.decode(JobStatus, found[0].value)


def _snapshots(cluster: LocalCluster) -> list[WorkerSnapshot]:
    return [snapshot for _, snapshot in cluster.snapshots()]


def _commits(cluster: LocalCluster) -> list[CommitRecord]:
    prefix = f"{cluster.keys.job(JOB)}checkpoints/"
    found = cluster.etcd.range(prefix, prefix_end(prefix)).items
    return [codec.decode(CommitRecord, one.value) for one in found]


def _newest_commit(cluster: LocalCluster) -> int:
    return max((commit.step for commit in _commits(cluster)), default=0)
