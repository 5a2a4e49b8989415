"""From START to forked ranks."""

import dataclasses

from dtrain.agent.core import packages
from dtrain.agent.core.decisions import Action, LauncherOrder, PrepareLogs
from dtrain.agent.core.state import JobState, LocalRank, Machine, Restore
from dtrain.agent.core.torch_env import rank_env
from dtrain.agent.launching import ForkRanks, RankLaunch
from dtrain.protocol.commands import Start
from dtrain.protocol.ids import Rank
from dtrain.protocol.snapshot import WorkerPhase


def start(machine: Machine, job: JobState, command: Start, now: float, out: list[Action]) -> JobState:
    """Fork the ranks; what they restore from is fetched beside, while they import."""
    assert job.prepare is not None
    first = job.prepare.first_rank
    restore = Restore()
    if command.restore is not None:
        restore = Restore(id=f"{job.name}-{job.uid}-{job.attempt}-{command.restore.seq}")
    ranks = tuple(LocalRank(Rank(first + local), local) for local in range(job.prepare.ranks_here))
    job = dataclasses.replace(
        job, start=command, started_at=now, phase=WorkerPhase.RESTORING, restore=restore, ranks=ranks
    )
    fork(machine, job, out)
    return job


def fork(machine: Machine, job: JobState, out: list[Action]) -> None:
    """Order the fork. Again is fine: a launcher forks each rank of an attempt once."""
    prepare, command = job.prepare, job.start
    assert prepare is not None
    assert command is not None
    folder = f"{machine.log_dir}/{job.name}-{job.uid}/attempt_{job.attempt}"
    launches = tuple(
        RankLaunch(
            rank=rank.rank,
            local_rank=rank.local_rank,
            env=rank_env(machine, prepare, command, f"{folder}/{rank.local_rank}", rank.local_rank),
            log_dir=f"{folder}/{rank.local_rank}",
        )
        for rank in job.ranks
    )
    out.append(PrepareLogs(job.name, job.uid, job.attempt, prepare.first_rank, len(job.ranks), prepare.store))
    order = ForkRanks(job.attempt, prepare.spec.entry, packages.working_dir(machine, prepare.spec), launches)
    out.append(LauncherOrder(job.name, job.uid, order))
