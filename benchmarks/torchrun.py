"""The peer: two torchrun agents on loopback, tuned to recover as fast as they can."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parent / "script.py"


class Torchrun:
    """Agents of ``nproc`` ranks each. ``nnodes``: how many, or fewest and most of them, as "1:2"."""

    def __init__(
        self,
        folder: Path,
        port: int,
        script_args: list[str],
        *,
        nnodes: str = "2",
        nproc: int = 2,
        script: Path = SCRIPT,
    ) -> None:
        self._folder = folder
        self._command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={nnodes}",
            f"--nproc-per-node={nproc}",
            "--max-restarts=100",
            "--monitor-interval=0.1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=bench",
            "--rdzv-conf=last_call_timeout=1,join_timeout=120",
            "--local-addr=127.0.0.1",
            str(script),
            *script_args,
        ]
        self._nnodes = int(nnodes.rpartition(":")[2])
        self._agents: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._agents = [self._start(node) for node in range(self._nnodes)]

    def stop(self) -> None:
        """Kill the agents and every rank of theirs."""
        for agent in self._agents:
            _kill(agent)

    def kill(self, node: int) -> None:
        """Kill an agent with its ranks."""
        _kill(self._agents[node])

    def replace(self, node: int) -> None:
        """Kill an agent with its ranks; another one takes its place at once."""
        _kill(self._agents[node])
        self._agents[node] = self._start(node)

    def _start(self, node: int) -> "subprocess.Popen[bytes]":
        # With torch 2.13's shared store a killed rank was not back within a minute.
        env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with (self._folder / f"torchrun-{node}.log").open("ab") as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )


def _kill(agent: "subprocess.Popen[bytes]") -> None:
    try:
        family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    agent.wait()
