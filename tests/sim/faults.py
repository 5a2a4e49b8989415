"""What goes wrong in a run: a random subset of faults, each at its own random rate.

Swarm style: a run with few kinds of faults reaches states that a run with all of them never does. Faults
strike until the calm begins; then everything that is broken heals, except machines that are gone for good.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Unavailable
from dtrain.protocol.job import TERMINAL_PHASES, Wanted

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

ENABLED_SHARE = 0.4
CANCEL_SHARE = 0.15
SUBMISSIONS_MAX = 3
"""Of one job's name in one run."""


class Faults:
    """Schedules faults on a cluster; rates that others read are fields."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._rng = cluster.scheduler.rng
        self._calm = False
        self.seal_failure = 0.0
        self.launcher_failure = 0.0
        self.store_failure = 0.0
        self.enabled: list[str] = []
        self.count = 0

    def start(self, until: float) -> None:
        """Choose this run's faults and let them strike until ``until``."""
        scheduler = self._cluster.scheduler
        kinds: dict[str, Callable[[], None]] = {
            "coordinator crash": self._coordinator_crash,
            "coordinator host loss": self._coordinator_loss,
            "coordinator freeze": self._coordinator_freeze,
            "coordinator paused with its clocks": self._coordinator_pause,
            "coordinator hang": self._coordinator_hang,
            "coordinator cut from etcd": self._coordinator_cut,
            "coordinator cut from agents": self._coordinator_deaf,
            "agent crash": self._agent_crash,
            "agent guardian crash": self._agent_guardian_crash,
            "agent freeze": self._agent_freeze,
            "agent cut from etcd": self._agent_cut,
            "agent cut from coordinators": self._agent_deaf,
            "rank crash": self._rank_crash,
            "launcher crash": self._launcher_crash,
            "transfer crash": self._transfer_crash,
            "power cut": self._power_cut,
            "etcd outage": self._etcd_outage,
            "watch cut": self._watch_cut,
            "compaction": self._compaction,
            "blob rot": self._blob_rot,
            "checkpoint now": self._checkpoint_now,
            "journal failure": self._journal_failure,
        }
        for name, strike in kinds.items():
            if scheduler.chance(ENABLED_SHARE):
                self.enabled.append(name)
                self._repeat(name, strike, self._rng.uniform(8.0, 60.0), until)
        if scheduler.chance(CANCEL_SHARE):
            self.enabled.append("cancel")
            self._repeat("cancel", self._cancel, 25.0, until)
        self._rates()
        scheduler.at(until, self.calm)

    def _rates(self) -> None:
        rng, network, cluster = self._rng, self._cluster.network, self._cluster
        for name, apply in (
            ("commands lost", lambda: setattr(network, "loss", rng.uniform(0.05, 0.4))),
            ("answers lost", lambda: setattr(network, "lost_answers", rng.uniform(0.05, 0.4))),
            ("commands twice", lambda: setattr(network, "duplicates", rng.uniform(0.1, 0.6))),
            ("commands late", lambda: self._late(rng.uniform(0.05, 0.3), rng.uniform(1.0, 30.0))),
            ("ambiguous writes", lambda: setattr(cluster.etcd, "ambiguous", rng.uniform(0.01, 0.15))),
            ("store failures", lambda: setattr(self, "store_failure", rng.uniform(0.05, 0.4))),
            ("seal failures", lambda: setattr(self, "seal_failure", rng.uniform(0.02, 0.2))),
            ("launcher failures", lambda: setattr(self, "launcher_failure", rng.uniform(0.02, 0.3))),
        ):
            if cluster.scheduler.chance(ENABLED_SHARE):
                self.enabled.append(name)
                apply()
        cluster.store.fault = self._store_fault

    def _late(self, share: float, seconds: float) -> None:
        self._cluster.network.late, self._cluster.network.late_s_max = share, seconds

    def _store_fault(self, operation: str, key: str) -> None:
        if not self._cluster.scheduler.chance(self.store_failure):
            return
        if operation == "put.stored" or (operation == "delete" and self._cluster.scheduler.chance(0.5)):
            raise OutcomeUnknown(ErrorCode.STORE_UNAVAILABLE, f"no answer to {operation} of {key}")
        raise Unavailable(ErrorCode.STORE_UNAVAILABLE, f"the store failed at {operation} of {key}")

    def _repeat(self, name: str, strike: Callable[[], None], mean_s: float, until: float) -> None:
        scheduler = self._cluster.scheduler

        def once() -> None:
            if self._calm:
                return
            self.count += 1
            strike()
            scheduler.after(self._rng.expovariate(1.0 / mean_s), once)

        first = self._rng.uniform(0.0, mean_s)
        if first < until:
            scheduler.after(first, once)

    def calm(self) -> None:
        """No more faults; what can heal heals."""
        self._calm = True
        cluster = self._cluster
        cluster.scheduler.log("FAULTS", "calm begins")
        network = cluster.network
        network.loss = network.lost_answers = network.duplicates = network.late = 0.0
        cluster.etcd.ambiguous = 0.0
        self.store_failure = self.seal_failure = self.launcher_failure = 0.0
        if cluster.etcd.down:
            cluster.etcd.recover()
        for replica in cluster.replicas.values():
            replica.set_cut(False)
            replica.cut_from_agents = False
            if replica.guardian is None:
                replica.boot()
            elif replica.guardian.process.frozen:
                replica.guardian.thaw()
        for machine in cluster.machines.values():
            machine.journal.failing = False
            machine.set_cut(False)
            machine.cut_from_coordinators = False
            if machine.guardian is not None and machine.guardian.process.frozen:
                machine.guardian.thaw()
        need = max(plan.spec.nnodes_max for plan in cluster.jobs.values())
        for machine in cluster.machines.values():
            alive = sum(1 for other in cluster.machines.values() if other.powered)
            if not machine.powered and alive < need + 1:
                machine.power_on()

    # Who is struck.

    def _replica(self) -> Any:
        names = sorted(self._cluster.replicas)
        leader = self._cluster.leader_name()
        # Half of the blows go to the leader: what happens to a standby is dull.
        if leader is not None and self._cluster.scheduler.chance(0.6):
            return self._cluster.replicas[leader]
        return self._cluster.replicas[self._rng.choice(names)]

    def _machine(self) -> Any:
        machines = [machine for _, machine in sorted(self._cluster.machines.items()) if machine.powered]
        busy = [machine for machine in machines if machine.ranks()]
        if busy and self._cluster.scheduler.chance(0.75):
            return self._rng.choice(busy)
        return self._rng.choice(machines) if machines else None

    def _log(self, what: str, who: str) -> None:
        self._cluster.scheduler.log("FAULTS", what, at=who)

    def _heal(self, delay_s: float, heal: Callable[[], None]) -> None:
        self._cluster.scheduler.after(delay_s, heal)

    # Coordinators.

    def _coordinator_crash(self) -> None:
        replica = self._replica()
        self._log("coordinator crash", replica.name)
        replica.crash_child()

    def _coordinator_loss(self) -> None:
        replica = self._replica()
        if replica.guardian is None:
            return
        self._log("coordinator host loss", replica.name)
        replica.crash()
        self._heal(self._rng.uniform(0.5, 20.0), lambda: replica.boot() if replica.guardian is None else None)

    def _coordinator_freeze(self, *, clocks: bool = False) -> None:
        replica = self._replica()
        guardian = replica.guardian
        if guardian is None or guardian.process.frozen:
            return
        self._log("coordinator freeze" + (" with its clocks" if clocks else ""), replica.name)
        guardian.freeze(clocks=clocks)
        self._heal(
            self._rng.uniform(1.0, 25.0),
            lambda: guardian.thaw() if guardian.process.alive and guardian.process.frozen else None,
        )

    def _coordinator_pause(self) -> None:
        self._coordinator_freeze(clocks=True)

    def _coordinator_hang(self) -> None:
        replica = self._replica()
        if replica.guardian is not None and not replica.guardian.process.frozen:
            self._log("coordinator hang", replica.name)
            replica.guardian.freeze_child()

    def _coordinator_cut(self) -> None:
        replica = self._replica()
        self._log("coordinator cut from etcd", replica.name)
        replica.set_cut(True)
        self._heal(self._rng.uniform(0.5, 30.0), lambda: replica.set_cut(False))

    def _coordinator_deaf(self) -> None:
        replica = self._replica()
        self._log("coordinator cut from agents", replica.name)
        replica.cut_from_agents = True
        self._heal(self._rng.uniform(0.5, 15.0), lambda: setattr(replica, "cut_from_agents", False))

    # Machines.

    def _agent_crash(self) -> None:
        if (machine := self._machine()) is not None:
            self._log("agent crash", machine.name)
            machine.crash_agent()

    def _agent_guardian_crash(self) -> None:
        if (machine := self._machine()) is not None:
            self._log("agent guardian crash", machine.name)
            machine.crash_guardian()

    def _agent_freeze(self) -> None:
        machine = self._machine()
        if machine is None or machine.guardian is None or machine.guardian.process.frozen:
            return
        guardian = machine.guardian
        self._log("agent freeze", machine.name)
        guardian.freeze(clocks=False)
        self._heal(
            self._rng.uniform(0.5, 25.0),
            lambda: guardian.thaw() if guardian.process.alive and guardian.process.frozen else None,
        )

    def _agent_cut(self) -> None:
        if (machine := self._machine()) is not None:
            self._log("agent cut from etcd", machine.name)
            machine.set_cut(True)
            self._heal(self._rng.uniform(0.5, 40.0), lambda: machine.set_cut(False))

    def _agent_deaf(self) -> None:
        if (machine := self._machine()) is not None:
            self._log("agent cut from coordinators", machine.name)
            machine.cut_from_coordinators = True
            self._heal(self._rng.uniform(0.5, 15.0), lambda: setattr(machine, "cut_from_coordinators", False))

    def _rank_crash(self) -> None:
        machine = self._machine()
        ranks = machine.ranks() if machine is not None else []
        if ranks:
            rank = self._rng.choice(ranks)
            self._log("rank crash", f"{machine.name}/{rank.rank}")
            rank.exit(self._rng.choice((-9, -11, 1)), "fault")

    def _launcher_crash(self) -> None:
        machine = self._machine()
        launchers = [launcher for _, launcher in sorted(machine.launchers.items())] if machine else []
        if launchers:
            self._log("launcher crash", machine.name)
            self._rng.choice(launchers).end(-9)

    def _transfer_crash(self) -> None:
        machine = self._machine()
        if machine is not None and machine.agent is not None:
            self._log("transfer crash", machine.name)
            machine.agent.transfers.crash()

    def _journal_failure(self) -> None:
        if (machine := self._machine()) is not None:
            self._log("journal failure", machine.name)
            machine.journal.failing = True
            self._heal(self._rng.uniform(0.2, 5.0), lambda: setattr(machine.journal, "failing", False))

    def _power_cut(self) -> None:
        machine = self._machine()
        if machine is None:
            return
        powered = sum(1 for other in self._cluster.machines.values() if other.powered)
        for_good = powered > self._cluster.nodes_needed and self._cluster.scheduler.chance(0.3)
        self._log("power cut" + (" for good" if for_good else ""), machine.name)
        machine.power_off()
        if not for_good:
            self._heal(
                self._rng.uniform(1.0, 40.0), lambda: machine.power_on() if not machine.powered else None
            )

    # etcd and the store.

    def _etcd_outage(self) -> None:
        etcd = self._cluster.etcd
        if etcd.down:
            return
        self._log("etcd outage", "etcd")
        etcd.down = True
        self._heal(self._rng.uniform(0.5, 15.0), lambda: etcd.recover() if etcd.down else None)

    def _watch_cut(self) -> None:
        for watch in list(self._cluster.etcd.watches):
            if self._cluster.scheduler.chance(0.6):
                watch.cut()

    def _compaction(self) -> None:
        self._log("compaction", "etcd")
        self._cluster.etcd.compact(self._rng.choice((0, 1, 5, 50)))
        if self._cluster.scheduler.chance(0.5):
            self._watch_cut()

    def _blob_rot(self) -> None:
        cluster = self._cluster
        # A checkpoint that is whole must stay: the promise is the one before, not any.
        job = self._rng.choice(sorted(cluster.jobs))
        history = cluster.checks.history(job)
        seqs = [
            seq for seq in cluster.committed_seqs(job) if history.commits[seq].uid == cluster.last_uid(job)
        ]
        good = [seq for seq in seqs if (job, seq) not in cluster.rotten]
        if len(good) < 2:
            return
        cluster.rot(job, good[-1] if cluster.scheduler.chance(0.7) else self._rng.choice(good[1:]))

    def _checkpoint_now(self) -> None:
        self._cluster.ask(self._rng.choice(sorted(self._cluster.jobs)), Wanted.RUN, f"token-{self.count}")

    def _cancel(self) -> None:
        """An operator cancels, and then submits something else under the same name."""
        cluster = self._cluster
        job = self._rng.choice(sorted(cluster.jobs))
        status = cluster.checks.history(job).status
        if status is None or status.uid != cluster.last_uid(job):
            return
        if status.phase in TERMINAL_PHASES:
            if cluster.submissions(job) < SUBMISSIONS_MAX:
                cluster.submit(job)
        elif cluster.ask(job, Wanted.CANCEL):
            self._log("cancel", job)
            cluster.cancelled[status.uid] = None
