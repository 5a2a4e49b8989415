"""More kinds of faults: ranks that hang or compute nonsense or give up, operators who scale and vacate,
receivers of webhooks that do not receive.
"""

from typing import TYPE_CHECKING, Any

from dtrain.coordinator.api.cordons import Cordons
from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.snapshot import StackKind
from tests.sim import rules
from tests.sim.kinds import KINDS, a_job, a_machine, a_rank, kind, nobody
from tests.sim.process import SimClock
from tests.sim.schedule import Strike

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.faults import Faults
    from tests.sim.training import SimRank

HARMLESS = frozenset(
    {"scale", "suspend", "pause", "checkpoint now", "cordon", "machine vacated", "checkpoint read"}
)
"""Kinds over which nothing is lost, and no step repeated."""

MEASURED_STEPS = 14
"""After so many steps an agent knows how long they take."""

STACKS = (StackKind.CODE, StackKind.DATA, StackKind.STOPPED, StackKind.COLLECTIVE, StackKind.KERNEL)

ENDS_SHARE, LEADER_SHARE = 0.4, 0.4


def _rank(faults: "Faults", strike: Strike) -> "SimRank | None":
    name, number = strike.target.split("/")
    machine = faults.cluster.machines.get(name)
    if machine is None or not machine.powered or machine.place.suspended:
        return None
    return next((rank for rank in machine.ranks() if rank.rank == int(number)), None)


@kind(
    "rank hangs",
    a_rank,
    every_s=(15.0, 60.0),
    lasts_s=(1.0, 60.0),
    args={"stack": (0.0, 4.3), "ends": (0.0, 1.0), "leader": (0.0, 1.0), "after_s": (0.5, 12.0)},
    apart=2,
)
def _hang(faults: "Faults", strike: Strike) -> None:
    """Some go on by themselves, too late or not; some leaders are lost while it is found out."""
    rank = _rank(faults, strike)
    if rank is None or rank.hung:
        return
    spec = faults.cluster.jobs[rank.launcher.job].spec
    if rank.trained < (2 if spec.hang.timeout_s else MEASURED_STEPS):
        return
    rank.hang(STACKS[int(strike.args["stack"])])
    if strike.args["ends"] < ENDS_SHARE:
        faults.until(strike, rank.go_on)
    if strike.args["leader"] < LEADER_SHARE:
        faults.scheduler.after(strike.args["after_s"], lambda: _lose_leader(faults))


def _lose_leader(faults: "Faults") -> None:
    leader = faults.cluster.replicas.get(faults.cluster.leader_name() or "")
    if faults.raging and leader is not None:
        leader.crash_child()


@kind("numbers not finite", a_rank, every_s=(15.0, 60.0), args={"steps": (1.0, 15.0)}, apart=2)
def _sick(faults: "Faults", strike: Strike) -> None:
    rank = _rank(faults, strike)
    if rank is None:
        return
    rank.sick_steps = int(strike.args["steps"])
    launcher = rank.launcher
    if rules.may_end_of_numbers(faults.cluster.jobs[launcher.job].spec):
        faults.cluster.may_fail[launcher.uid] = None


@kind("rank gives up", a_rank, every_s=(40.0, 150.0), args={"code": (0.0, 2.0)}, share=0.5, apart=2)
def _give_up(faults: "Faults", strike: Strike) -> None:
    """With the code that says that trying again is of no use, or with one that a rule may know."""
    rank = _rank(faults, strike)
    if rank is None:
        return
    code, launcher = (93, 77)[int(strike.args["code"])], rank.launcher
    if rules.ends_with(faults.cluster.jobs[launcher.job].spec, code):
        faults.cluster.may_fail[launcher.uid] = None
    rank.exit(code, "it gives up")


@kind("scale", a_job, every_s=(10.0, 50.0), args={"low": (0.0, 1.0), "more": (0.0, 4.0)}, apart=2)
def _scale(faults: "Faults", strike: Strike) -> None:
    """Any range that the machines of the calm can hold the least of."""
    cluster, job = faults.cluster, JobName(strike.target)
    if job in cluster.jobs:
        low = 1 + int(strike.args["low"] * (cluster.nodes_needed - 1))
        cluster.scale(job, low, low + int(strike.args["more"]))


@kind("machine vacated", a_machine, every_s=(15.0, 60.0), lasts_s=(2.0, 40.0), apart=2)
def _vacate(faults: "Faults", strike: Strike) -> None:
    """``dtrain drain``, and ``dtrain uncordon`` later."""
    cluster, agent = faults.cluster, AgentName(strike.target)
    if cluster.etcd.down or cluster.etcd.memory.out_of_space:
        return
    desk = _desk(cluster)
    cluster.etcd.apply(lambda _memory: desk.put(agent, "simulated", by="operator", ttl_s=0, drain=True))
    faults.until(strike, lambda: cluster.etcd.apply(lambda _memory: desk.remove(agent)))


def _desk(cluster: "Cluster") -> Cordons:
    etcd: Any = cluster.etcd.memory
    return Cordons(etcd, cluster.name, SimClock(cluster.scheduler, 0.0, 1.0))


__all__ = ["HARMLESS", "KINDS"]


@kind("pause", a_job, every_s=(10.0, 40.0), lasts_s=(0.2, 40.0), apart=1)
def _pause(faults: "Faults", strike: Strike) -> None:
    """An operator has a job stand still for a while; the calm finds every job going on."""
    cluster, job = faults.cluster, JobName(strike.target)
    if job in cluster.jobs and cluster.pause(job):
        faults.until(strike, lambda: cluster.unpause(job))


def _mood(name: str, attribute: str, much: tuple[float, float], lasts_s: tuple[float, float]) -> None:
    def apply(faults: "Faults", strike: Strike) -> None:
        hooks = faults.cluster.webhooks
        if hooks is not None:
            faults.rate(strike, hooks.receiver, attribute, strike.args["much"])

    kind(name, nobody, every_s=(10.0, 40.0), lasts_s=lasts_s, args={"much": much}, apart=3)(apply)


_mood("receiver away", "away", (0.3, 2.0), (2.0, 90.0))
_mood("receiver fails", "failing", (0.3, 2.0), (2.0, 60.0))
_mood("receiver refuses", "refusing", (0.2, 1.0), (2.0, 40.0))
_mood("receiver slow", "slow_s", (0.5, 25.0), (5.0, 60.0))
_mood("answers of the receiver lost", "deaf", (0.1, 0.8), (5.0, 60.0))
