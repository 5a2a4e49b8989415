"""What must come true after faults have stopped, whatever they were, and how soon (I10 to I12)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobPhase, JobStatus

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.machine import Machine

LEADER_SLACK_S = 5.0
"""Beyond the TTL: one leader."""

SETTLED_S = 60.0
"""Desired is actual."""

BRAKE_S_MAX = 80.0
"""For so long may what happened before hold the brake."""

HUNG_S_MAX = 200.0
"""For so long may a rank hang that hangs when the calm begins: agents wait longer after a long standstill."""

GROWN_S = 60.0
"""After that, and the cooldown, a job has the size that the fleet allows, and its spares are warm."""

STEP_S_MAX = 3.0
"""A job that trains has made a step within this."""

LOOK_S = 0.5


class Calm:
    """One period without faults, from now on."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._since = cluster.scheduler.now
        self._look_at = 0.0
        self._brake_ended_at = self._since

    def run(self, after_each: Callable[[], None]) -> float:
        """Let time pass until all is well or too late; return how long it took."""
        cluster = self._cluster
        ttl_s = max([*cluster.schedule.shape.replica_ttls_s, cluster.agent_ttl_s])
        # Drifting clocks stretch what their nodes count.
        slack = 1 + cluster.schedule.shape.clock_drift
        self._reach(
            (ttl_s + LEADER_SLACK_S) * slack, self._no_leader, "I10: there is no leader that acts", after_each
        )
        took_s = self._reach(SETTLED_S * slack, self._unsettled, "I10: not as desired", after_each)
        cooldown_s = max((job.spec.grow_cooldown_s for job in cluster.jobs.values()), default=0.0)
        limit_s = took_s + (GROWN_S + cooldown_s) * slack
        self._reach(limit_s, self._unfinished, "I10: not all as it could be", after_each)
        self._dead_loops()
        return took_s

    def _reach(
        self,
        within_s: float,
        wrong: Callable[[], str],
        what: str,
        after_each: Callable[[], None],
    ) -> float:
        scheduler, checks = self._cluster.scheduler, self._cluster.checks
        last = [""]

        def reached() -> bool:
            if checks.violations:
                return True
            if scheduler.now < self._look_at:
                return False
            self._look_at = scheduler.now + LOOK_S
            self._note_brake()
            last[0] = wrong()
            return not last[0]

        scheduler.run(self._since + within_s, after_each, reached)
        if last[0] and self._brake_ended_at > self._since:
            scheduler.run(self._brake_ended_at + within_s, after_each, reached)
        if not checks.violations and last[0]:
            last[0] = wrong()
        if not checks.violations and last[0]:
            checks.bad(f"{what} {scheduler.now - self._since:.0f} s after the faults have stopped: {last[0]}")
        return scheduler.now - self._since

    def _note_brake(self) -> None:
        """Under the brake nothing is placed, rightly, and hangs take time: it counts from their end."""
        now = self._cluster.scheduler.now
        if now - self._since < HUNG_S_MAX and self._is_hung():
            self._brake_ended_at = now
        for replica in self._cluster.replicas.values():
            coordinator = replica.coordinator
            if coordinator is not None and coordinator.driver.leads:
                graced = self._cluster.scheduler.now - self._since < BRAKE_S_MAX
                if graced and coordinator.driver.world.brake(coordinator.now()):
                    self._brake_ended_at = self._cluster.scheduler.now

    def _is_hung(self) -> bool:
        machines = self._cluster.machines.values()
        return any(rank.hung for machine in machines if machine.powered for rank in machine.ranks())

    def _no_leader(self) -> str:
        leading = [
            name
            for name, replica in self._cluster.replicas.items()
            if replica.coordinator is not None
            and replica.coordinator.driver.leads
            and replica.coordinator.leadership.may_act()
        ]
        holder = self._cluster.leader_name()
        return "" if [holder] == leading else f"{holder or 'nobody'} holds the key, {leading} lead"

    def _unsettled(self) -> str:
        wrong = [*self._cluster.checks.leases_wrong()]
        for name in self._cluster.jobs:
            if sentence := self._job_unsettled(name):
                wrong.append(f"job {name} {sentence}")
        return "; ".join(wrong)

    def _job_unsettled(self, name: JobName) -> str:
        cluster = self._cluster
        status, job = cluster.checks.history(name).status, cluster.jobs[name]
        if not job.submissions:
            return ""
        if status is None or status.uid != job.spec.uid:
            return "has not been looked at"
        if status.phase in TERMINAL_PHASES:
            return ""
        if status.phase not in PLACED_PHASES and (self._has_no_room(name) or self._comes_later(name)):
            return ""
        if status.phase is not JobPhase.RUNNING:
            return f"is {status.phase}: {status.reason}"
        # The newest first: a launcher that lost its agent keeps the store of an attempt prepared again.
        for group in reversed(cluster.groups.values()):
            if (group.job, group.uid, group.attempt) == (name, status.uid, status.attempt):
                if group.broken:
                    return f"is RUNNING, and the ranks of attempt {status.attempt} have lost one another"
                ended = all(rank.ending for rank in group.ranks.values())
                if group.step < 0 or (cluster.scheduler.now - group.stepped_at > STEP_S_MAX and not ended):
                    return f"is RUNNING and stands at step {group.step}"
                return ""
        return "is RUNNING without ranks"

    def _unfinished(self) -> str:
        """What is not as desired, or could be better by now."""
        wrong = [sentence for sentence in (self._unsettled(),) if sentence]
        for name in self._cluster.jobs:
            status = self._cluster.checks.history(name).status
            if status is not None and status.phase is JobPhase.RUNNING and not self._ends(name, status):
                wrong += [f"job {name} {sentence}" for sentence in self._job_unfinished(name, status)]
        return "; ".join(wrong)

    def _ends(self, name: JobName, status: JobStatus) -> bool:
        """Whether its ranks are about to end: nothing is changed about them any more."""
        ranks = [rank for machine in self._cluster.machines.values() for rank in machine.ranks()]
        return any(rank.ending for rank in ranks if rank.launcher.job == name)

    def _let_go(self, name: JobName, status: JobStatus) -> set[str]:
        """Machines that have let go of the job in this attempt, and are no spares before the next one."""
        holder = self._cluster.leader_name()
        leader = None if holder is None else self._cluster.replicas[holder].coordinator
        if leader is None:
            return set()
        view = leader.driver.world.job_view(name)
        return {
            agent
            for agent, last in view.departed.items()
            if (last.uid, last.attempt) == (status.uid, status.attempt) and agent not in view.workers
        }

    def _job_unfinished(self, name: JobName, status: JobStatus) -> list[str]:
        cluster, spec, wrong = self._cluster, self._cluster.spec_now(name), list[str]()
        members = {member.agent for member in status.members}
        beside = {machine.name for machine in self._free(name)} - members
        if len(members) > spec.nnodes_max:
            wrong.append(f"is on {len(members)} machines, {spec.nnodes_max} at most are wanted")
        others_wait = any(self._waits(other) for other in cluster.jobs if other != name)
        grown = len(members) + len(beside)
        if len(members) < spec.nnodes_max and beside and grown >= spec.nnodes_min and not others_wait:
            wrong.append(f"is on {len(members)} machines, and could be on {', '.join(sorted(beside))} too")
        launchers = [
            launcher
            for machine in cluster.machines.values()
            for launcher in machine.launchers.values()
            if launcher.job == name and not launcher.stray
        ]
        warm = {launcher.machine.name for launcher in launchers if launcher.ready} - members
        fit = beside - self._let_go(name, status)
        if len(warm) < min(spec.spares, len(fit)) and not others_wait:
            wrong.append(f"has {len(warm)} of {spec.spares} spares, and {', '.join(sorted(fit))} is free")
        if len(warm) > spec.spares + len(status.joining):
            wrong.append(f"has launchers on {', '.join(sorted(warm))}, and {spec.spares} spares")
        for launcher in launchers:
            if launcher.uid != status.uid:
                wrong.append(f"has a launcher of {launcher.uid} on {launcher.machine.name}")
            for rank in launcher.ranks:
                if rank.alive and rank.attempt != status.attempt:
                    wrong.append(f"has rank {rank.rank} of attempt {rank.attempt} on {launcher.machine.name}")
        return wrong

    def _waits(self, name: JobName) -> bool:
        """Whether it is to have machines and has none."""
        status = self._cluster.checks.history(name).status
        if status is None or not self._cluster.jobs[name].submissions:
            return bool(self._cluster.jobs[name].submissions)
        return status.phase not in PLACED_PHASES | TERMINAL_PHASES

    def _comes_later(self, name: JobName) -> bool:
        """Machines may be kept for another job that waits."""
        cluster = self._cluster
        return any(
            other != name
            and (status := cluster.checks.history(other).status) is not None
            and status.phase not in PLACED_PHASES | TERMINAL_PHASES
            and self._has_no_room(other)
            for other in cluster.jobs
        )

    def _has_no_room(self, name: JobName) -> bool:
        """The other jobs hold what this one needs."""
        return len(self._free(name)) < self._cluster.spec_now(name).nnodes_min

    def _free(self, name: JobName) -> list["Machine"]:
        """Machines that the job could have its ranks on, those that it has included."""
        cluster, spec = self._cluster, self._cluster.jobs[name].spec
        used: dict[str, int] = {}
        for other in cluster.jobs:
            status = cluster.checks.history(other).status
            if other != name and status is not None and status.phase in PLACED_PHASES:
                for member in status.members:
                    used[member.agent] = used.get(member.agent, 0) + member.nproc
        return [
            machine
            for machine in cluster.machines.values()
            if machine.powered
            and cluster.keys.cordon(AgentName(machine.name)) not in cluster.etcd.memory._live
            and machine.slots - used.get(machine.name, 0) >= (spec.nproc_per_node or machine.slots)
        ]

    def _dead_loops(self) -> None:
        """I12: a process that lives has all its loops."""
        if self._cluster.checks.violations:
            return
        for replica in self._cluster.replicas.values():
            coordinator = replica.coordinator
            if coordinator is not None and coordinator.process.alive:
                self._all_live(replica.name, [(task.name, task.done) for task in coordinator.loops])
        for machine in self._cluster.machines.values():
            agent = machine.agent
            if agent is not None and agent.process.alive:
                self._all_live(machine.name, [(task.name, task.done) for task in agent.loops])

    def _all_live(self, who: str, loops: list[tuple[str, bool]]) -> None:
        for name, done in loops:
            if done:
                self._cluster.checks.bad(f"I12: the {name} loop of {who} has ended, its process has not")
