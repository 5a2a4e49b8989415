"""CPU time of a whole save of 8,000 tensors of 256 bytes, two ranks, warm; and who writes how much.

``python -m benchmarks.checkpoint.tiny SAVES`` is the processes' side: two ranks that save with DCP,
its plan cached, and with ours, in turn.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from benchmarks.checkpoint.modes import CLUSTER, JOB, NONCE, UID, Agent, empty
from benchmarks.report import Result, result
from dtrain.coordinator.core import manifest
from dtrain.coordinator.core.decisions import VerifyCheckpoint
from dtrain.coordinator.work import Stores, Worker
from dtrain.local import ports
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import OpenRecord
from dtrain.protocol.ids import Attempt, Seq, Step, Term
from dtrain.protocol.ranklink import Begin, Sealed
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime.clock import SystemClock
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver

TENSORS = 8000
WORLD = 2
COLD = 1
"""Saves before those that count: DCP's plan is cached by then, and our form remembered."""


def measure(rounds: int) -> list[Result]:
    """Start the two ranks once; each round is a save by DCP and one by us."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.checkpoint.tiny",
            f"{folder}/saves",
            str(COLD + 2 * rounds),
        ]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    saves = [json.loads(line) for line in said.splitlines()][COLD:]
    dcp_cpu = [save["dcp_s"] * 1e3 for save in saves]
    ranks = [(save["ranks_s"] + save["transfer_s"]) * 1e3 for save in saves]
    whole, cold = (
        [own + save[leader] * 1e3 for own, save in zip(ranks, saves, strict=True)]
        for leader in ("leader_s", "new_leader_s")
    )
    peer = "DCP, cached plan"
    return [
        result("CPU of saving 8,000 tiny tensors, 2 ranks", "ms", ranks, dcp_cpu, peer, ratio_max=0.15),
        result("the same with the leader's merge and manifest", "ms", whole, dcp_cpu, peer, ratio_max=0.15),
        # No bar: once after a failover, as the form that it remembers is the job's from then on.
        result("the same with a leader that knows nothing yet", "ms", cold, dcp_cpu, peer),
    ]


def _main(folder: Path, saves: int) -> None:
    port = ports.reserve(1)
    mp.spawn(_rank, (str(port[0]), str(folder), saves), nprocs=WORLD)  # type: ignore[no-untyped-call]
    ports.release(port)


def _rank(rank: int, port: str, folder: str, saves: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(0)  # replicas: what differs between ranks is refused
    tensors = {f"layer.{index}.weight": torch.randn(64) for index in range(TENSORS)}
    state = {"model": tensors}
    saver = Saver(state, rank, WORLD, Arena(os.memfd_create("bench-arena")))
    saver.prepare()
    agent = Agent(Path(folder)) if rank == 0 else None
    leader = _leader()
    for number in range(saves):
        for tensor in tensors.values():
            tensor.add_(1e-3)
        dist.barrier()
        began = time.process_time()
        dcp.save(
            state,
            checkpoint_id=f"{folder}/{number}",
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
        )
        theirs = time.process_time() - began
        dist.barrier()
        began = time.process_time()
        sealed = saver.seal(Begin(Seq(number + 1), NONCE, Step(number)))
        ours = time.process_time() - began
        # Only to bring the figures and the two hand-overs together: not part of any save.
        _told(folder, rank).write_bytes(codec.dumps([theirs, ours, codec.to_json(sealed)]))
        dist.barrier()
        if agent is not None:
            _finish(agent, leader, number, [_hear(folder, other) for other in range(WORLD)])
            empty(Path(folder))
        dist.barrier()
    if agent is not None:
        agent.close()
    dist.destroy_process_group()


def _told(folder: str, rank: int) -> Path:
    return Path(f"{folder}.rank-{rank}.json")


def _hear(folder: str, rank: int) -> tuple[float, float, Sealed]:
    text = _told(folder, rank).read_bytes()
    theirs, ours, sealed = codec.loads(text, bytes_max=len(text))
    return theirs, ours, codec.from_json(Sealed, sealed)


def _leader() -> Worker:
    # It reads etcd only where the store holds a later checkpoint than the one at hand.
    return Worker(cast(Any, None), Stores(), manifest.merge, SystemClock())


def _finish(
    agent: Agent, leader: Worker, number: int, everyone: Sequence[tuple[float, float, Sealed]]
) -> None:
    before, own = agent.cpu_s(), time.process_time()
    for rank, (_, _, sealed) in enumerate(everyone):
        agent.send(sealed, rank, WORLD)
    parts = [agent.await_part() for _ in everyone]
    transfer = agent.cpu_s() - before + time.process_time() - own
    answer = {
        "dcp_s": sum(theirs for theirs, _, _ in everyone),
        "ranks_s": sum(ours for _, ours, _ in everyone),
        "transfer_s": transfer,
        "leader_s": _lead(leader, agent, number, parts),
        "new_leader_s": _lead(_leader(), agent, number, parts),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _lead(leader: Worker, agent: Agent, number: int, parts: Sequence[DurablePart]) -> float:
    """CPU seconds of what the leader does before it commits."""
    record = OpenRecord(Term(1), UID, Seq(number + 1), Attempt(1), Step(number), NONCE, WORLD, timeout_s=60.0)
    work = VerifyCheckpoint(CLUSTER, JOB, UID, agent.uri, record, tuple(parts), None)
    began = time.process_time()
    done = leader.run(work)
    took = time.process_time() - began
    if not done.verdict.ok:
        raise RuntimeError(f"the leader refused it: {done}")
    return took


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir()
    _main(Path(sys.argv[1]), int(sys.argv[2]))
