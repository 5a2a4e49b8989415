"""Commands on their way to agents: late, lost, twice, out of order, or into a partition."""

from typing import TYPE_CHECKING

from dtrain.coordinator.core.decisions import Directed

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.coordinator import Coordinator

LATENCY_S = 0.003
DEADLINE_S = 2.0


class Network:
    """Rates are set by the faults of a run, and zero in the calm."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self.loss = 0.0
        self.lost_answers = 0.0
        self.duplicates = 0.0
        self.late = 0.0
        self.late_s_max = 0.0

    def send(self, sender: "Coordinator", directed: Directed) -> None:
        """Deliver ``directed`` to whoever has its address, and the answer to the sender."""
        scheduler = self._cluster.scheduler
        answered = [False]

        def answer(ok: bool, problem: str) -> None:
            if not answered[0]:
                answered[0] = True
                timeout.cancel()
                sender.process.post(lambda: sender.answered(directed, ok, problem))

        timeout = scheduler.after(DEADLINE_S, lambda: answer(False, "timed out"))

        def arrive() -> None:
            machine = self._cluster.machines.get(directed.agent)
            agent = machine.agent if machine is not None else None
            if machine is None or sender.replica.cut_from_agents or machine.cut_from_coordinators:
                return
            if not machine.powered:
                return
            if agent is None or not agent.process.alive or directed.address != agent.address:
                answer(False, "refused")
                return

            def back(ok: bool, message: str) -> None:
                if scheduler.chance(self.lost_answers):
                    return
                delay_s = scheduler.delay(LATENCY_S)
                scheduler.after(delay_s, lambda: answer(ok, "" if ok else f"rejected: {message}"))

            scheduler.log(
                "network",
                type(directed.command).__name__,
                to=directed.agent,
                attempt=directed.command.header.attempt,
                id=directed.command.header.id,
            )
            agent.process.post(lambda: agent.command(directed.command, back))

        copies = 2 if scheduler.chance(self.duplicates) else 1
        for _ in range(copies):
            if scheduler.chance(self.loss):
                continue
            delay_s = scheduler.delay(LATENCY_S)
            if scheduler.chance(self.late):
                # Later than its deadline, maybe later than its leader: order means nothing.
                delay_s += scheduler.rng.uniform(0.0, self.late_s_max)
            scheduler.after(delay_s, arrive)
