"""``dtrain get jobs`` in a cluster of 1,000 machines and 200 jobs, beside ``etcdctl`` and an empty Python.

The replica leads, and all machines report while it is asked. Whole processes are
measured, from fork to exit, and their CPU time too: on a machine that does
something else at the same time the clock says less.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.listing.crowd import Bustle, Crowd, write
from benchmarks.report import Result, result
from dtrain.local.cluster import LocalCluster

JOBS, AGENTS = 200, 1000
BAR_MS = 300.0
PER_ROUND = 5
SETTLE_S = 3.0


def measure(rounds: int) -> list[Result]:
    """Ask ``rounds`` times PER_ROUND times, each list and each peer in turn."""
    with (
        tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name,
        LocalCluster(Path(name), coordinators=1, agents=0, store="dir", etcd_fsync=False) as cluster,
    ):
        crowd = Crowd(cluster.keys, JOBS, AGENTS, time.time())
        records = write(cluster.etcd, crowd.puts())
        bustle = Bustle(cluster.etcd, crowd)
        bustle.start()
        time.sleep(SETTLE_S)
        dtrain = (sys.executable, "-m", "dtrain.cli")
        where = ("--coordinators", cluster.addresses[0])
        etcdctl = (
            cluster.etcdctl,
            f"--endpoints={cluster.endpoints[0]}",
            "get",
            "--prefix",
            cluster.keys.root,
        )
        commands: dict[str, Sequence[str]] = {
            "get jobs": (*dtrain, "get", "jobs", *where),
            "get agents": (*dtrain, "get", "agents", *where),
            "get jobs -o name": (*dtrain, "get", "jobs", "-o", "name", *where),
            "describe job": (*dtrain, "describe", "job-007", *where),
            "python": (sys.executable, "-c", "pass"),
            "etcdctl": etcdctl,
        }
        # Whatever was installed has its byte code beside it; so has what is measured here.
        env = {**os.environ, "PYTHONPYCACHEPREFIX": f"{name}/pyc"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        for command in commands.values():
            _run(command, env)
        took: dict[str, list[tuple[float, float]]] = {title: [] for title in commands}
        try:
            for _ in range(rounds * PER_ROUND):
                for title, command in commands.items():
                    took[title].append(_run(command, env))
        finally:
            bustle.close()
    print(f"{records} records, {bustle.rounds} reports of every machine meanwhile")
    results = []
    for title in [title for title in commands if title.startswith(("get", "describe"))]:
        bar = BAR_MS if title == "get jobs" else None
        wall, cpu = [wall for wall, _ in took[title]], [cpu for _, cpu in took[title]]
        name = f"dtrain {title}, {JOBS} jobs on {AGENTS} machines"
        for peer, label in (("etcdctl", "etcdctl get --prefix"), ("python", "python -c pass")):
            results.append(result(name, "ms", wall, [ms for ms, _ in took[peer]], label, ours_max=bar))
        peer_cpu = [ms for _, ms in took["etcdctl"]]
        results.append(result(f"{name}: its CPU time", "ms", cpu, peer_cpu, "etcdctl get --prefix"))
    return results


def _run(command: Sequence[str], env: Mapping[str, str]) -> tuple[float, float]:
    """Milliseconds from start to exit, and those of CPU time."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took = 1000 * (time.monotonic() - began)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.decode()}")
    return took, 1000 * (usage.ru_utime + usage.ru_stime)
