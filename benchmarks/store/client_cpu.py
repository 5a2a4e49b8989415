"""Client CPU per gigabyte sent to S3, over plain HTTP to a server that throws everything away."""

import importlib.util
import json
import statistics
import subprocess
import sys

from benchmarks import report

MIB, TIMES = 256, 2
PEERS = {"boto3": ("boto3 upload_fileobj", 0.3), "s3torchconnector": ("s3torchconnector", 1.0)}


def measure(rounds: int) -> list[report.Result]:
    """Run each client in turn, ``rounds`` times; a peer that is not installed is left out, and said so."""
    peers = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(name)}
    for name in PEERS.keys() - peers.keys():
        print(f"{name} is not installed: no comparison with it")
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.store.discard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        runs: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                found = _run(name, endpoint)
                run.append(found["cpu_s_per_gb"])
                speeds[name].append(found["gb_per_s"])
    finally:
        server.communicate()
    for name, speed in speeds.items():
        print(f"  {name}: {statistics.median(runs[name]):.2f} CPU s/GB, {statistics.median(speed):.2f} GB/s")
    return [
        report.result(
            f"client CPU per GB to S3, beside {title}",
            "CPU s/GB",
            runs["ours"],
            runs[name],
            title,
            ratio_max=bar,
        )
        for name, (title, bar) in peers.items()
    ]


def _run(name: str, endpoint: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store.clients", name, endpoint, str(MIB), str(TIMES)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
