"""torchrun's flags for ``run``: which act, and what the others mean here. Pure."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

EXPLAINED: Mapping[str, str] = {
    "rdzv-backend": "etcd holds the membership, and each attempt gets a store of its own",
    "rdzv-endpoint": "the replicas are found by --coordinators, etcd or the context file",
    "rdzv-conf": "there is no join deadline: a job waits for machines, and says so",
    "monitor-interval": "exits are noticed at once, without polling",
    "start-method": "ranks are forked from a launcher that has imported torch already",
    "role": "there is one role",
    "local-addr": "agents advertise their address: dtrain agent --host",
    "node-rank": "ranks are placed by the leader",
    "master-addr": "rank 0's machine and port are chosen for each attempt",
    "master-port": "rank 0's machine and port are chosen for each attempt",
    "signals-to-handle": "SIGINT, SIGTERM and SIGHUP are handled",
    "event-log-handler": "events are in etcd: dtrain get events",
    "run-path": "scripts are run by runpy in any case",
    "redirects": "output is always kept in files: dtrain logs",
}
"""Flags that are accepted and do nothing, with the reason that is shown."""

REFUSED: Mapping[str, str] = {
    "logs-specs": "read logs with dtrain logs, or have them copied with --log-dir",
    "duplicate-stdout-filters": "filter what is shown: dtrain run ... | grep, or dtrain logs --grep",
    "duplicate-stderr-filters": "filter what is shown: dtrain run ... | grep, or dtrain logs --grep",
    "numa-binding": "bind ranks in the script, or start a command: dtrain run --no-python numactl ...",
    "virtual-local-rank": "choose the device by LOCAL_RANK, or set CUDA_VISIBLE_DEVICES in the script",
}
"""Flags that change what ranks see or where output goes: without them a script would do something else."""


def check(given: Mapping[str, Any]) -> None:
    """Refuse flags that cannot be meant here.

    Raises:
        Refused: with what to use instead.
    """
    for flag, instead in REFUSED.items():
        if given.get(flag.replace("-", "_")):
            raise Refused(ErrorCode.USAGE, f"--{flag} is not supported", fix=instead)
    rank = given.get("node_rank")
    if rank not in (None, "0"):
        raise Refused(
            ErrorCode.USAGE,
            f"--node-rank {rank}: this command is given once, not on each machine",
            cause="each time would submit another job",
            fix="start an agent on each machine (dtrain agent), and run this once, without --node-rank",
        )


def check_nodes(text: str) -> tuple[int, int]:
    """Read ``2`` or ``2:4``.

    Raises:
        Refused: neither.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match:
        low, high = int(match[1]), int(match[2] or match[1])
        if 1 <= low <= high:
            return low, high
    raise Refused(ErrorCode.USAGE, f"--nnodes cannot be {text!r}", fix="write 2, or a range such as 2:4")


def local_nproc(text: str, *, here: bool, gpus: int, cpus: int) -> int:
    """Read ``--nproc-per-node``; words are resolved only if the job runs ``here``.

    Elsewhere auto is 0: as many ranks as each machine has slots.

    Raises:
        Refused: not a number, and not one of auto, cpu, gpu on this machine.
    """
    word = text.strip().lower()
    if word.isdecimal() and 1 <= int(word) <= 1024:
        return int(word)
    if word in ("auto", "cpu", "gpu"):
        if word == "auto" and not here:
            return 0
        if not here:
            raise Refused(
                ErrorCode.USAGE,
                f"--nproc-per-node {word} cannot be resolved here",
                cause="the job runs in a cluster, and which machines it gets is not known yet",
                fix="write auto for as many as a machine has slots, or a number",
            )
        if word == "gpu" and not gpus:
            raise Refused(
                ErrorCode.USAGE, "--nproc-per-node gpu: this machine has no GPU", fix="write a number"
            )
        return gpus if word == "gpu" or (word == "auto" and gpus) else cpus
    raise Refused(
        ErrorCode.USAGE, f"--nproc-per-node cannot be {text!r}", fix="write a number, auto, cpu or gpu"
    )


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        present = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        present = 0
    if visible is None or not present:
        return present
    return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])


def tees(text: str) -> bool:
    """Whether ``--tee`` asks for anything on the console: ``3``, ``0:3,1:1``."""
    parts = [part.rpartition(":")[2].strip() for part in text.split(",") if part.strip()]
    if not all(part in ("0", "1", "2", "3") for part in parts):
        raise Refused(
            ErrorCode.USAGE, f"--tee cannot be {text!r}", fix="write 0 to 3, or RANK:0..3,RANK:0..3"
        )
    return any(part != "0" for part in parts)


def local_ranks(text: str) -> frozenset[int]:
    """Read ``--local-ranks-filter``: ``0,1``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise Refused(
            ErrorCode.USAGE, f"--local-ranks-filter cannot be {text!r}", fix="write numbers, such as 0,1"
        )
    return frozenset(int(part) for part in parts)


def job_name(program: str, suffix: str) -> str:
    """A name for a job that was given none, from its program."""
    stem = Path(program).stem if program.endswith(".py") else program.rpartition("/")[2]
    clean = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-")
    return f"{clean or 'job'}-{suffix}" if suffix else clean or "job"
