"""Every kind of fault: whom it strikes, for how long, and what it does.

A kind is a function of the engine and one strike; all chance is in the strike, or is the world's own.
Rows of the fault list that a simulation cannot have (TLS, disks of etcd, framing) have tests of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtrain.protocol import codec
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.job import TERMINAL_PHASES, Wanted
from dtrain.storage.etcd.port import Delete, Put, Txn
from tests.sim import readers
from tests.sim.link import Link
from tests.sim.schedule import Strike

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.coordinator import Replica
    from tests.sim.faults import Faults
    from tests.sim.machine import Machine

SUBMISSIONS_MAX = 3
"""Of one job's name by the fault that cancels."""

Apply = Callable[["Faults", Strike], None]
Who = Callable[["Faults"], str | None]


@dataclass(frozen=True, slots=True)
class Kind:
    """``who`` returns the target, or None if there is none now."""

    name: str
    apply: Apply
    who: Who
    every_s: tuple[float, float] = (8.0, 60.0)
    lasts_s: tuple[float, float] | None = None
    args: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    share: float = 1.0
    """How much rarer than others it is part of a mix."""
    apart: int = 0
    """Drawn apart from the others, which seeds that were pinned before go on drawing as they did: those of
    one number together."""


KINDS: dict[str, Kind] = {}


def kind(name: str, who: Who, **how: Any) -> Callable[[Apply], Apply]:
    """Register a kind of fault."""

    def register(apply: Apply) -> Apply:
        args = how.pop("args", {})
        KINDS[name] = Kind(name, apply, who, args=args, **how)
        return apply

    return register


# Whom.


def nobody(_faults: "Faults") -> str:
    return ""


def a_replica(faults: "Faults") -> str:
    """Half of the blows go to the leader: what happens to a standby is dull."""
    leader = faults.cluster.leader_name()
    if leader is not None and leader in faults.cluster.replicas and faults.rng.random() < 0.6:
        return leader
    return faults.rng.choice(sorted(faults.cluster.replicas))


def a_machine(faults: "Faults") -> str | None:
    """One that is on, and most often one that runs ranks."""
    machines = [machine for _, machine in sorted(faults.cluster.machines.items()) if machine.powered]
    busy = [machine for machine in machines if machine.ranks()]
    if busy and faults.rng.random() < 0.75:
        return faults.rng.choice(busy).name
    return faults.rng.choice(machines).name if machines else None


def a_node(faults: "Faults") -> str | None:
    return a_replica(faults) if faults.rng.random() < 0.5 else a_machine(faults)


def a_pair(faults: "Faults") -> str | None:
    machine = a_machine(faults)
    return None if machine is None else f"{a_replica(faults)}/{machine}"


def a_rank(faults: "Faults") -> str | None:
    machine = a_machine(faults)
    ranks = faults.cluster.machines[machine].ranks() if machine is not None else []
    return f"{machine}/{faults.rng.choice(ranks).rank}" if ranks else None


def a_job(faults: "Faults") -> str:
    return str(faults.rng.choice(sorted(faults.cluster.jobs)))


def _replica(faults: "Faults", strike: Strike) -> "Replica | None":
    return faults.cluster.replicas.get(strike.target)


def _machine(faults: "Faults", strike: Strike) -> "Machine | None":
    """The machine struck, if it is on and awake."""
    machine = faults.cluster.machines.get(strike.target.split("/")[0])
    return machine if machine is not None and machine.powered and not machine.place.suspended else None


def _links(faults: "Faults", strike: Strike) -> tuple[Link, Link, Link] | None:
    """Its links to etcd, to its peers and to the store."""
    node: Any = faults.cluster.replicas.get(strike.target)
    if node is not None:
        return node.etcd, node.peers, node.store
    node = faults.cluster.machines.get(strike.target)
    return None if node is None else (node.etcd, node.peers, node.store_link)


# Coordinators.


@kind("coordinator crash", a_replica)
def _coordinator_crash(faults: "Faults", strike: Strike) -> None:
    if replica := _replica(faults, strike):
        replica.crash_child()


@kind("coordinator host loss", a_replica, lasts_s=(0.5, 20.0))
def _coordinator_loss(faults: "Faults", strike: Strike) -> None:
    replica = _replica(faults, strike)
    if replica is None or replica.guardian is None:
        return
    replica.crash()
    faults.until(strike, lambda: replica.boot() if replica.guardian is None else None)


@kind("all coordinators lost", nobody, every_s=(60.0, 200.0), lasts_s=(1.0, 60.0), share=0.5)
def _coordinators_loss(faults: "Faults", strike: Strike) -> None:
    for replica in faults.cluster.replicas.values():
        if replica.guardian is not None:
            replica.crash()

    def boot() -> None:
        for replica in faults.cluster.replicas.values():
            if replica.guardian is None:
                replica.boot()

    faults.until(strike, boot)


def _freeze_coordinator(faults: "Faults", strike: Strike, *, clocks: bool) -> None:
    replica = _replica(faults, strike)
    guardian = replica.guardian if replica is not None else None
    if guardian is None or guardian.process.frozen:
        return
    guardian.freeze(clocks=clocks)
    faults.until(
        strike, lambda: guardian.thaw() if guardian.process.alive and guardian.process.frozen else None
    )


@kind("coordinator freeze", a_replica, lasts_s=(1.0, 25.0))
def _coordinator_freeze(faults: "Faults", strike: Strike) -> None:
    _freeze_coordinator(faults, strike, clocks=False)


@kind("coordinator paused with its clocks", a_replica, lasts_s=(1.0, 25.0))
def _coordinator_pause(faults: "Faults", strike: Strike) -> None:
    _freeze_coordinator(faults, strike, clocks=True)


@kind("coordinator hang", a_replica)
def _coordinator_hang(faults: "Faults", strike: Strike) -> None:
    replica = _replica(faults, strike)
    if replica is not None and replica.guardian is not None and not replica.guardian.process.frozen:
        replica.guardian.freeze_child()


@kind("two replicas with one name", a_replica, every_s=(30.0, 120.0), lasts_s=(5.0, 40.0), share=0.6)
def _twin(faults: "Faults", strike: Strike) -> None:
    cluster = faults.cluster
    if cluster.twins or strike.target not in cluster.replicas:
        return
    twin = cluster.new_twin(strike.target)
    faults.until(strike, lambda: cluster.end_twin(twin))


# Machines.


@kind("agent crash", a_machine)
def _agent_crash(faults: "Faults", strike: Strike) -> None:
    if machine := _machine(faults, strike):
        machine.crash_agent()


@kind("agent guardian crash", a_machine)
def _agent_guardian_crash(faults: "Faults", strike: Strike) -> None:
    if machine := _machine(faults, strike):
        machine.crash_guardian()


@kind("agent freeze", a_machine, lasts_s=(0.5, 25.0))
def _agent_freeze(faults: "Faults", strike: Strike) -> None:
    machine = _machine(faults, strike)
    guardian = machine.guardian if machine is not None else None
    if machine is None or guardian is None or guardian.process.frozen:
        return
    guardian.freeze(clocks=False)

    def thaw() -> None:
        if guardian.process.alive and guardian.process.frozen and not machine.place.suspended:
            guardian.thaw()

    faults.until(strike, thaw)


@kind("machine suspended with its clocks", a_machine, lasts_s=(0.5, 60.0))
def _machine_suspend(faults: "Faults", strike: Strike) -> None:
    machine = _machine(faults, strike)
    if machine is None or (machine.guardian is not None and machine.guardian.process.frozen):
        return
    machine.suspend()
    faults.until(strike, machine.wake)


@kind("rank crash", a_rank, args={"code": (0.0, 3.0)})
def _rank_crash(faults: "Faults", strike: Strike) -> None:
    machine = _machine(faults, strike)
    number = int(strike.target.split("/")[1])
    for rank in machine.ranks() if machine is not None else []:
        if rank.rank == number:
            rank.exit((-9, -11, 1)[int(strike.args["code"])], "fault")
            return


@kind("launcher crash", a_machine)
def _launcher_crash(faults: "Faults", strike: Strike) -> None:
    machine = _machine(faults, strike)
    launchers = [launcher for _, launcher in sorted(machine.launchers.items())] if machine else []
    if launchers:
        faults.chance(strike).choice(launchers).end(-9)


@kind("transfer crash", a_machine)
def _transfer_crash(faults: "Faults", strike: Strike) -> None:
    machine = _machine(faults, strike)
    if machine is not None and machine.agent is not None:
        machine.agent.transfers.crash()


@kind("journal full", a_machine, lasts_s=(0.2, 20.0))
def _journal_failure(faults: "Faults", strike: Strike) -> None:
    if machine := _machine(faults, strike):
        journal = machine.journal
        journal.failing += 1

        def heal() -> None:
            journal.failing -= 1

        faults.until(strike, heal)


@kind("journal lost", a_machine, every_s=(30.0, 120.0), share=0.5)
def _journal_lost(faults: "Faults", strike: Strike) -> None:
    if machine := _machine(faults, strike):
        machine.lose_journal()


def _power_off(faults: "Faults", strike: Strike, machine: "Machine") -> None:
    machine.power_off()
    if strike.lasts_s:
        faults.until(strike, lambda: machine.power_on() if not machine.powered else None)


@kind("power cut", a_machine, lasts_s=(1.0, 40.0))
def _power_cut(faults: "Faults", strike: Strike) -> None:
    if machine := _machine(faults, strike):
        _power_off(faults, strike, machine)


@kind("power cut for good", a_machine, every_s=(20.0, 120.0))
def _power_cut_for_good(faults: "Faults", strike: Strike) -> None:
    machine = _machine(faults, strike)
    if machine is not None and faults.cluster.nodes_there > faults.cluster.nodes_needed:
        _power_off(faults, strike, machine)


@kind(
    "many power cuts",
    nobody,
    every_s=(60.0, 200.0),
    lasts_s=(1.0, 60.0),
    args={"share": (0.3, 1.0)},
    share=0.6,
)
def _power_cuts(faults: "Faults", strike: Strike) -> None:
    machines = [machine for _, machine in sorted(faults.cluster.machines.items()) if machine.powered]
    count = round(strike.args["share"] * len(machines))
    for machine in faults.chance(strike).sample(machines, count):
        _power_off(faults, strike, machine)


@kind("cordon", a_machine, lasts_s=(2.0, 40.0), share=0.5)
def _cordon(faults: "Faults", strike: Strike) -> None:
    etcd, agent = faults.cluster.etcd, AgentName(strike.target)
    key = faults.cluster.keys.cordon(agent)
    if etcd.down or etcd.memory.out_of_space:
        return
    value = codec.encode(Cordon(agent, "simulated", "operator"))
    etcd.apply(lambda memory: memory.txn(Txn(success=(Put(key, value),))))
    faults.until(strike, lambda: etcd.apply(lambda memory: memory.txn(Txn(success=(Delete(key),)))))


# Networks.


def _cut(faults: "Faults", strike: Strike, which: int, *, out: bool = True, in_: bool = True) -> None:
    links = _links(faults, strike)
    if links is not None:
        link, token = links[which], object()
        link.block(token, out=out, in_=in_)
        faults.until(strike, lambda: link.unblock(token))


for _number, _what, _lasts in (
    (0, "etcd", (0.5, 40.0)),
    (1, "its peers", (0.5, 15.0)),
    (2, "the store", (0.5, 40.0)),
):

    def _cut_both(faults: "Faults", strike: Strike, number: int = _number) -> None:
        _cut(faults, strike, number)

    def _cut_out(faults: "Faults", strike: Strike, number: int = _number) -> None:
        _cut(faults, strike, number, in_=False)

    def _cut_in(faults: "Faults", strike: Strike, number: int = _number) -> None:
        _cut(faults, strike, number, out=False)

    kind(f"cut from {_what}", a_node, lasts_s=_lasts)(_cut_both)
    kind(f"cannot reach {_what}", a_node, lasts_s=_lasts, share=0.7)(_cut_out)
    kind(f"cannot hear {_what}", a_node, lasts_s=_lasts, share=0.7)(_cut_in)


@kind("pair cut", a_pair, lasts_s=(0.5, 30.0), args={"way": (0.0, 3.0)})
def _pair_cut(faults: "Faults", strike: Strike) -> None:
    replica, machine = strike.target.split("/")
    link, token, way = faults.cluster.network.pair(replica, machine), object(), int(strike.args["way"])
    link.block(token, out=way != 1, in_=way != 2)
    faults.until(strike, lambda: link.unblock(token))


@kind("network on and off", a_node, every_s=(30.0, 120.0), lasts_s=(5.0, 120.0), share=0.7)
def _flapping(faults: "Faults", strike: Strike) -> None:
    links, token, over = _links(faults, strike), object(), [False]
    if links is None:
        return

    def flip(blocked: bool) -> None:
        if over[0]:
            return
        for link in links:
            if blocked:
                link.block(token)
            else:
                link.unblock(token)
        faults.scheduler.after(1.0, lambda: flip(not blocked))

    def heal() -> None:
        over[0] = True
        for link in links:
            link.unblock(token)

    flip(True)
    faults.until(strike, heal)


def _network_rate(name: str, low: float, high: float) -> Apply:
    def apply(faults: "Faults", strike: Strike) -> None:
        faults.rate(strike, faults.cluster.network, name, strike.args["share"])

    kind({"loss": "commands lost", "lost_answers": "answers lost", "duplicates": "commands twice"}[name],
         nobody, lasts_s=(5.0, 60.0), args={"share": (low, high)})(apply)  # fmt: skip
    return apply


_network_rate("loss", 0.05, 0.6)
_network_rate("lost_answers", 0.05, 0.6)
_network_rate("duplicates", 0.1, 0.8)


@kind("commands late", nobody, lasts_s=(5.0, 60.0), args={"share": (0.05, 0.5), "late_s": (1.0, 40.0)})
def _commands_late(faults: "Faults", strike: Strike) -> None:
    network = faults.cluster.network
    faults.rate(strike, network, "late_s_max", strike.args["late_s"])
    faults.rate(strike, network, "late", strike.args["share"])


@kind("command replayed", nobody, every_s=(1.0, 20.0), args={"back": (0.0, 300.0)})
def _replay(faults: "Faults", strike: Strike) -> None:
    faults.cluster.network.replay(int(strike.args["back"]))


# etcd.


@kind("etcd outage", nobody, lasts_s=(0.5, 20.0))
def _etcd_outage(faults: "Faults", strike: Strike) -> None:
    etcd, token = faults.cluster.etcd, object()
    etcd.go_away(token)
    faults.until(strike, lambda: etcd.come_back(token))


@kind(
    "long etcd outage",
    nobody,
    every_s=(100.0, 400.0),
    lasts_s=(30.0, 600.0),
    args={"frozen": (0.0, 2.0)},
    share=0.4,
)
def _etcd_freeze(faults: "Faults", strike: Strike) -> None:
    """All members stand still: when they go on, the leases end together, or a new leader extends them."""
    etcd, token = faults.cluster.etcd, object()
    etcd.go_away(token)
    faults.until(strike, lambda: etcd.come_back(token, expired=strike.args["frozen"] < 1.0))


@kind("etcd leader moves", nobody, every_s=(5.0, 40.0), lasts_s=(0.2, 3.0))
def _etcd_leader(faults: "Faults", strike: Strike) -> None:
    """Writes on their way are lost, late or answered as unknown; a part of the watches ends."""
    etcd = faults.cluster.etcd
    faults.rate(strike, etcd, "ambiguous", 0.9)
    _cut_watches(faults, strike, 0.4)
    faults.until(strike, etcd.new_leader)


@kind("etcd slow", nobody, lasts_s=(2.0, 30.0), args={"latency_s": (0.05, 1.5)})
def _etcd_slow(faults: "Faults", strike: Strike) -> None:
    faults.rate(strike, faults.cluster.etcd, "latency_s", strike.args["latency_s"])


@kind("etcd out of space", nobody, every_s=(30.0, 120.0), lasts_s=(1.0, 60.0), share=0.7)
def _etcd_space(faults: "Faults", strike: Strike) -> None:
    memory = faults.cluster.etcd.memory
    if memory.out_of_space:
        return
    memory.out_of_space = True

    def disarm() -> None:
        memory.out_of_space = False

    faults.until(strike, disarm)


@kind("ambiguous writes", nobody, lasts_s=(5.0, 60.0), args={"share": (0.01, 0.3)})
def _ambiguous(faults: "Faults", strike: Strike) -> None:
    faults.rate(strike, faults.cluster.etcd, "ambiguous", strike.args["share"])


@kind("etcd credentials refused", a_node, lasts_s=(0.5, 30.0), share=0.7)
def _auth(faults: "Faults", strike: Strike) -> None:
    links = _links(faults, strike)
    if links is not None:
        link = links[0]
        link.auth_denied += 1

        def heal() -> None:
            link.auth_denied -= 1

        faults.until(strike, heal)


@kind("member lags", a_node, lasts_s=(2.0, 40.0), args={"lag_s": (0.2, 8.0)})
def _lag(faults: "Faults", strike: Strike) -> None:
    links = _links(faults, strike)
    if links is not None:
        link = links[0]
        link.lag_s = strike.args["lag_s"]
        faults.until(strike, lambda: setattr(link, "lag_s", 0.0))


def _cut_watches(faults: "Faults", strike: Strike, share: float) -> None:
    rng = faults.chance(strike)
    for watch in list(faults.cluster.etcd.watches):
        if rng.random() < share:
            watch.cut()


@kind("watch cut", nobody)
def _watch_cut(faults: "Faults", strike: Strike) -> None:
    _cut_watches(faults, strike, 0.6)


@kind("compaction", nobody, args={"kept": (0.0, 4.0), "cut": (0.0, 2.0)})
def _compaction(faults: "Faults", strike: Strike) -> None:
    faults.cluster.etcd.compact((0, 1, 5, 50)[int(strike.args["kept"])])
    if strike.args["cut"] < 1.0:
        _cut_watches(faults, strike, 0.6)


@kind("compaction all the time", nobody, every_s=(20.0, 80.0), lasts_s=(1.0, 15.0), share=0.6)
def _compactions(faults: "Faults", strike: Strike) -> None:
    """Between the pages of every list, and behind every watch that ends."""
    etcd, over, rng = faults.cluster.etcd, [False], faults.chance(strike)

    def compact() -> None:
        if over[0]:
            return
        etcd.compact(0)
        if rng.random() < 0.02:
            etcd.memory.cut_watches()
        faults.scheduler.after(rng.uniform(0.002, 0.1), compact)

    compact()
    faults.until(strike, lambda: over.__setitem__(0, True))


# Clocks.


@kind("wall clock set", a_node, args={"by_s": (-3600.0, 3600.0)})
def _wall(faults: "Faults", strike: Strike) -> None:
    node: Any = faults.cluster.replicas.get(strike.target) or faults.cluster.machines.get(strike.target)
    if node is not None:
        node.clock.wall_offset_s += strike.args["by_s"]


# The store.


@kind("store failures", nobody, lasts_s=(5.0, 60.0), args={"share": (0.05, 1.0)})
def _store_failures(faults: "Faults", strike: Strike) -> None:
    faults.rate(strike, faults, "store_failure", strike.args["share"])


@kind("store slow", nobody, lasts_s=(5.0, 60.0), args={"by_s": (0.1, 10.0)})
def _store_slow(faults: "Faults", strike: Strike) -> None:
    faults.rate(strike, faults, "store_slow_s", strike.args["by_s"])


@kind("blob rot", a_job, args={"newest": (0.0, 1.0)})
def _blob_rot(faults: "Faults", strike: Strike) -> None:
    cluster, job, rng = faults.cluster, JobName(strike.target), faults.chance(strike)
    if job not in cluster.jobs:
        return
    # A checkpoint that is whole must stay: the promise is the one before, not any.
    history = cluster.checks.history(job)
    seqs = [seq for seq in cluster.committed_seqs(job) if history.commits[seq].uid == cluster.last_uid(job)]
    good = [seq for seq in seqs if (job, seq) not in cluster.rotten]
    if len(good) >= 2:
        cluster.rot(job, good[-1] if strike.args["newest"] < 0.7 else rng.choice(good[1:]), rng)


# What the trainer and the launcher do not manage.


@kind("seal failures", nobody, lasts_s=(5.0, 60.0), args={"share": (0.02, 0.3)})
def _seal_failures(faults: "Faults", strike: Strike) -> None:
    faults.rate(strike, faults, "seal_failure", strike.args["share"])


@kind("launcher failures", nobody, lasts_s=(5.0, 60.0), args={"share": (0.02, 0.5)})
def _launcher_failures(faults: "Faults", strike: Strike) -> None:
    faults.rate(strike, faults, "launcher_failure", strike.args["share"])


# Operators.


@kind("checkpoint now", a_job)
def _checkpoint_now(faults: "Faults", strike: Strike) -> None:
    if strike.target in faults.cluster.jobs:
        faults.cluster.ask(JobName(strike.target), Wanted.RUN, f"token-{strike.at:.3f}")


@kind("cancel", a_job, every_s=(20.0, 40.0), share=0.4)
def _cancel(faults: "Faults", strike: Strike) -> None:
    """An operator cancels, and then submits something else under the same name."""
    cluster, job = faults.cluster, JobName(strike.target)
    status = cluster.checks.history(job).status if job in cluster.jobs else None
    if status is None or status.uid != cluster.last_uid(job):
        return
    if status.phase in TERMINAL_PHASES:
        if cluster.submissions(job) < SUBMISSIONS_MAX:
            cluster.submit(job)
    elif cluster.ask(job, Wanted.CANCEL):
        cluster.cancelled[status.uid] = None


# Readers of checkpoints, and what operators ask the leader to do about them.


@kind(
    "checkpoint read",
    a_job,
    every_s=(3.0, 20.0),
    lasts_s=(1.0, 60.0),
    args={"which": (0.0, 1.0), "ttl_s": (5.0, 30.0), "dies": (0.0, 1.0)},
    apart=1,
)
def _read(faults: "Faults", strike: Strike) -> None:
    """A reader pins, renews its pin, reads and unpins; some die and leave their pin to its lease."""
    ttl_s = 0 if strike.args["dies"] < 0.3 else int(strike.args["ttl_s"])
    reader = readers.begin(faults.cluster, strike, ttl_s=ttl_s)
    if reader is None:
        return
    if ttl_s and strike.args["dies"] > 0.8:
        return
    reader.renew()
    faults.until(strike, reader.end)


@kind("checkpoint deleted", a_job, every_s=(5.0, 30.0), args={"which": (0.0, 1.0)}, apart=1)
def _delete(faults: "Faults", strike: Strike) -> None:
    readers.order(faults.cluster, strike, "delete")


@kind("damage reported", a_job, every_s=(5.0, 30.0), args={"which": (0.0, 1.0)}, apart=1)
def _report(faults: "Faults", strike: Strike) -> None:
    """Rightly or wrongly: a machine's own memory may be what is bad."""
    readers.order(faults.cluster, strike, "report")


@kind("orphans searched", a_job, every_s=(5.0, 30.0), args={"which": (0.0, 1.0)}, apart=1)
def _collect(faults: "Faults", strike: Strike) -> None:
    readers.order(faults.cluster, strike, "collect")


@kind("agent drained", a_machine, every_s=(15.0, 90.0), lasts_s=(0.5, 30.0), args={"grace_s": (4.0, 60.0)})
def _drain(faults: "Faults", strike: Strike) -> None:
    if machine := _machine(faults, strike):
        machine.drain(strike.args["grace_s"], strike.lasts_s)


@kind("machine preempted", a_machine, every_s=(15.0, 90.0), lasts_s=(1.0, 60.0), apart=1)
def _preempt(faults: "Faults", strike: Strike) -> None:
    """A notice, and the end of the machine that it announces; another one comes under its name."""
    machine = _machine(faults, strike)
    if machine is None or not machine.preempt(strike.lasts_s):
        return
    boots = machine.boots

    def goes() -> None:
        if machine.powered and machine.boots == boots:
            machine.power_off()
            faults.scheduler.after(1.0, lambda: None if machine.powered else machine.power_on())

    faults.until(strike, goes)


def repair(cluster: "Cluster") -> None:
    """What no strike heals by itself: replicas that are gone start, and enough machines."""
    readers.unpin_all(cluster)
    for replica in cluster.replicas.values():
        if replica.guardian is None:
            replica.boot()
        elif replica.guardian.stopped:
            # Ended by a fault that only an operator may overrule.
            replica.crash()
            replica.boot()
    for machine in cluster.machines.values():
        if not machine.powered and cluster.is_fit(machine) and cluster.nodes_there < cluster.nodes_needed:
            machine.power_on()


@kind("suspend", a_job, every_s=(10.0, 40.0), lasts_s=(0.2, 40.0), apart=1)
def _suspend(faults: "Faults", strike: Strike) -> None:
    """An operator wants the machines for a while; the calm finds every job resumed."""
    cluster, job = faults.cluster, JobName(strike.target)
    if job in cluster.jobs and cluster.ask(job, Wanted.SUSPEND):
        faults.until(strike, lambda: cluster.resume(job))
