"""Commands on their way to agents: late, lost, twice, out of order, replayed, or into a partition."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dtrain.coordinator.core.decisions import Directed
from dtrain.protocol.pb import coordinator_pb2 as pb
from tests.sim.link import Link

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.coordinator import Coordinator
    from tests.sim.machine import SimAgent

LATENCY_S = 0.003
DEADLINE_S = 2.0
REMEMBERED_MAX = 400


class Network:
    """Rates are set by the faults of a run, and zero in the calm."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self.loss = 0.0
        self.lost_answers = 0.0
        self.duplicates = 0.0
        self.late = 0.0
        self.late_s_max = 0.0
        self.pairs: dict[tuple[str, str], Link] = {}
        """Between one coordinator (``out``) and one agent (``in_``), beside what each has with everybody."""
        self.sent: deque[Directed] = deque(maxlen=REMEMBERED_MAX)
        """What an eavesdropper could replay."""

    def pair(self, replica: str, machine: str) -> Link:
        return self.pairs.setdefault((replica, machine), Link())

    def send(self, sender: "Coordinator", directed: Directed) -> None:
        """Deliver ``directed`` to whoever has its address, and the answer to the sender."""
        scheduler = self._cluster.scheduler
        self.sent.append(directed)
        answered = [False]

        def answer(ok: bool, problem: str) -> None:
            if not answered[0]:
                answered[0] = True
                timeout.cancel()
                sender.process.post(lambda: sender.answered(directed, ok, problem))

        timeout = scheduler.after(DEADLINE_S, lambda: answer(False, "timed out"))

        def arrive() -> None:
            machine = self._cluster.machines.get(directed.agent)
            if machine is None or not machine.powered:
                return
            replica, pair = sender.replica, self.pair(sender.replica.name, machine.name)

            def back(ok: bool, problem: str) -> None:
                if scheduler.chance(self.lost_answers):
                    return
                if machine.peers.out and replica.peers.in_ and pair.in_:
                    answer(ok, problem)

            if not (replica.peers.out and machine.peers.in_ and pair.out):
                return
            self._deliver(directed, back)

        copies = 2 if scheduler.chance(self.duplicates) else 1
        for _ in range(copies):
            if scheduler.chance(self.loss):
                continue
            delay_s = scheduler.delay(LATENCY_S)
            if scheduler.chance(self.late):
                # Later than its deadline, maybe later than its leader: order means nothing.
                delay_s += scheduler.rng.uniform(0.0, self.late_s_max)
            scheduler.after(delay_s, arrive)

    def replay(self, back: int) -> None:
        """Deliver the command sent ``back`` commands ago once more, to whoever has that name now."""
        if not self.sent:
            return
        directed = self.sent[-1 - back % len(self.sent)]
        machine = self._cluster.machines[directed.agent]
        if machine.powered and machine.agent is not None:
            agent = machine.agent
            agent.process.post(lambda: agent.command(directed.command, lambda _ok, _message: None))

    def consult(
        self, agent: "SimAgent", addresses: Sequence[str], request: pb.ConsultRequest
    ) -> list[pb.ConsultReply]:
        """Ask replicas as an agent does; the task that asks waits for the slowest of them."""
        task, machine = self._cluster.scheduler.current(), agent.machine
        replies: list[pb.ConsultReply] = []
        task.sleep(self._cluster.scheduler.delay(LATENCY_S))
        for address in addresses:
            replica = self._cluster.replicas.get(address.split(":")[0])
            coordinator = replica.coordinator if replica is not None else None
            if replica is None or coordinator is None or coordinator.process.frozen:
                continue
            pair = self.pair(replica.name, machine.name)
            if machine.peers.out and replica.peers.in_ and pair.in_ and not self._is_lost():
                reply = coordinator.consult(request)
                if replica.peers.out and machine.peers.in_ and pair.out and not self._is_lost():
                    replies.append(reply)
        task.sleep(self._cluster.scheduler.delay(LATENCY_S) if len(replies) == len(addresses) else DEADLINE_S)
        return replies

    def _is_lost(self) -> bool:
        return self._cluster.scheduler.chance(self.loss)

    def _deliver(self, directed: Directed, back: Callable[[bool, str], None]) -> None:
        scheduler = self._cluster.scheduler
        agent = self._cluster.machines[directed.agent].agent
        if agent is None or not agent.process.alive or directed.address != agent.address:
            back(False, "refused")
            return

        def done(ok: bool, message: str) -> None:
            delay_s = scheduler.delay(LATENCY_S)
            scheduler.after(delay_s, lambda: back(ok, "" if ok else f"rejected: {message}"))

        scheduler.log(
            "network",
            type(directed.command).__name__,
            to=directed.agent,
            attempt=directed.command.header.attempt,
            id=directed.command.header.id,
        )
        agent.process.post(lambda: agent.command(directed.command, done))
