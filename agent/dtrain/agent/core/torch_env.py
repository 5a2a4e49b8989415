"""The environment of a rank: everything torchrun sets, and what the SDK needs.

``TORCHELASTIC_USE_AGENT_STORE`` is True because a child of rank 0's launcher
really serves a TCPStore at MASTER_ADDR:MASTER_PORT.
"""

from collections.abc import Mapping

from dtrain.agent.core.state import Machine
from dtrain.protocol import ranklink
from dtrain.protocol.commands import Prepare, Start
from dtrain.protocol.job import JobSpec

_NOT_INHERITED = ("DTRAIN_", "ETCDCTL_", "TORCHELASTIC_", "GRPC_")
"""Settings, passwords and lease descriptors of the agent are none of a rank's business."""


def base_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what ranks inherit from the agent's environment."""
    return {name: value for name, value in environ.items() if not name.startswith(_NOT_INHERITED)}


def launcher_env(machine: Machine, spec: JobSpec) -> dict[str, str]:
    """Return the environment of a job's launcher: it imports the user's modules."""
    return {**base_env(machine.env), **spec.env}


def split_endpoint(endpoint: str) -> tuple[str, str]:
    """Take ``host:port`` apart, IPv6 brackets removed."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), port


def rank_env(
    machine: Machine, prepare: Prepare, start: Start, log_dir: str, local_rank: int
) -> dict[str, str]:
    """Return the whole environment of one rank."""
    head = prepare.header
    nproc = prepare.ranks_here
    rank = prepare.first_rank + local_rank
    host, port = split_endpoint(start.rendezvous)
    env = launcher_env(machine, prepare.spec)
    if nproc > 1:
        # As torchrun: otherwise every rank takes all cores and they fight.
        env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(prepare.world_size),
            "LOCAL_WORLD_SIZE": str(nproc),
            "GROUP_RANK": str(prepare.node_rank),
            "GROUP_WORLD_SIZE": str(prepare.nnodes),
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(prepare.world_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": str(head.attempt - 1),
            "TORCHELASTIC_MAX_RESTARTS": str(prepare.max_restarts),
            "TORCHELASTIC_RUN_ID": f"{head.job}-{head.uid}",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_ERROR_FILE": f"{log_dir}/error.json",
            ranklink.ENV_SOCKET: machine.rank_socket,
            ranklink.ENV_JOB: head.job,
            ranklink.ENV_UID: head.uid,
            ranklink.ENV_ATTEMPT: str(head.attempt),
            ranklink.ENV_STACKS: f"{log_dir}/stacks.log",
        }
    )
    return env
