"""The pages of an agent's status port: live, ready, metrics.

Live means that the loop which supervises comes round, and nothing else. An
agent that is cut off from etcd is live: its ranks train on, and a restart of
its container would end them. It is not ready: nothing new reaches it.

The thread of the port calls these; all that they read is published by others.
"""

from collections.abc import Callable

from dtrain.agent import metrics
from dtrain.agent.core import transfers
from dtrain.agent.core.state import AgentState, LinkState
from dtrain.agent.measures import Measures
from dtrain.runtime.metrics import Samples, exposition
from dtrain.runtime.serving import Page, Pages, live, verdict
from dtrain.storage.etcd import lease_metrics
from dtrain.storage.etcd.session import Session


class Status:
    """Reads one agent. ``loop_at`` and ``monotonic`` are of one clock."""

    def __init__(
        self,
        slots: int,
        *,
        state: Callable[[], AgentState],
        registered: Callable[[], bool],
        stopping: Callable[[], bool],
        loop_at: Callable[[], float],
        measures: Measures,
        session: Session,
        monotonic: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._state = state
        self._registered = registered
        self._stopping = stopping
        self._loop_at = loop_at
        self._measures = measures
        self._session = session
        self._monotonic = monotonic

    def pages(self) -> Pages:
        """Return the pages by path."""
        shown = exposition("agent", metrics.METRICS, self.samples)
        return {"/livez": self.live, "/readyz": self.ready, "/metrics": shown}

    def live(self) -> Page:
        """Return whether the loop comes round."""
        return live(self._monotonic() - self._loop_at())

    def ready(self) -> Page:
        """Return whether ranks can be placed here."""
        state = self._state()
        reasons = []
        if self._stopping():
            reasons.append("the agent is stopping")
        if not self._registered():
            reasons.append("the machine is not registered in etcd")
        if state.link.state is LinkState.ISOLATED:
            reasons.append("the machine is cut off from etcd; its ranks train on")
        return verdict(
            "ready",
            not reasons,
            reasons,
            agent=state.machine.agent,
            etcd_link=state.link.state.value,
            jobs=len(state.jobs),
        )

    def samples(self) -> Samples:
        """Return what ``metrics.METRICS`` are now."""
        state = self._state()
        ranks: dict[tuple[str, ...], float] = {}
        for job in state.jobs.values():
            for rank in job.ranks:
                labels = (job.name, rank.phase.value)
                ranks[labels] = ranks.get(labels, 0.0) + 1.0
        live = self._registered() and state.link.state is not LinkState.ISOLATED
        return {
            metrics.REGISTERED: {(): float(live)},
            metrics.LINK: {(link.value,): float(link is state.link.state) for link in LinkState},
            metrics.LOOP_AGE: {(): max(0.0, self._monotonic() - self._loop_at())},
            metrics.SLOTS: {(): float(self._slots)},
            metrics.RANKS: ranks,
            **lease_metrics.samples(self._session, self._monotonic()),
            **self._measures.samples(state.restored, self._monotonic()),
            metrics.RESTORED: {(name,): float(state.restored.get(name, 0)) for name, _ in transfers.TIERS},
        }
