"""Agents that vanished: who, when, and whether so many at once that it is the network and not they.

While the brake is on nothing is declared lost. One agent that is alone in going
is acted on after a moment; those that go together are waited for first.
"""

from collections import deque
from collections.abc import Collection

from dtrain.protocol.ids import AgentName

BRAKE_WINDOW_S = 60.0
BRAKE_SHARE = 0.3
BRAKE_AGENTS_MIN = 3
MIRROR_AGE_S_MAX = 15.0
LOST_KEPT_S = 3600.0
AGENT_RENEWAL_SHARE = 1 / 3
"""Of the TTL, between two renewals of an agent's lease."""
ALONE_S = 0.25
"""How long an agent must be the only one that vanished: etcd ends many leases one after the other."""
LOSS_SLACK_S = 1.0
"""etcd looks for expired leases twice a second."""


class Losses:
    """What is remembered of agents that went. ``present``: those with a record; ``ttl_s``: their leases."""

    def __init__(self) -> None:
        self.lost_at: dict[AgentName, float] = {}
        self.left: set[AgentName] = set()
        """Of these, the ones that drained."""
        self._recent: deque[tuple[float, AgentName]] = deque()
        self._back_at: dict[AgentName, float] = {}
        """When agents that had been lost came back; only the last TTL matters."""

    def note_gone(self, agent: AgentName, now: float, *, drained: bool) -> None:
        """Remember that an agent's record went; one that had said so is no sign of a broken network."""
        self.lost_at[agent] = now
        self._back_at.pop(agent, None)
        if drained:
            self.left.add(agent)
        else:
            self._recent.append((now, agent))

    def note_present(self, agent: AgentName, now: float) -> None:
        """Remember that an agent's record is there."""
        self.left.discard(agent)
        if self.lost_at.pop(agent, None) is not None:
            self._back_at[agent] = now

    def count(self) -> int:
        """Return how many agents vanished within the last hour without a word, and are not back."""
        return len(self.lost_at.keys() - self.left)

    def brake(
        self, now: float, present: Collection[AgentName], *, heard_at: float | None, ttl_s: float
    ) -> str:
        """Return why nothing may be declared lost now, or ""; ``heard_at``: when etcd was heard of last."""
        if heard_at is None or now - heard_at > MIRROR_AGE_S_MAX:
            return f"etcd has not been heard of for {MIRROR_AGE_S_MAX:.0f} s"
        gone = {
            agent
            for at, agent in self._recent
            if now - at <= BRAKE_WINDOW_S
            and (self._is_gone(agent, present) or self._is_just_back(agent, now, ttl_s))
        }
        total = len({*present, *gone})
        if len(gone) >= BRAKE_AGENTS_MIN and len(gone) > BRAKE_SHARE * total:
            return f"{len(gone)} of {total} agents vanished within {BRAKE_WINDOW_S:.0f} s"
        return ""

    def settle_at(self, now: float, present: Collection[AgentName], *, ttl_s: float) -> float:
        """Return when it will be seen whether more agents follow those that just vanished; 0.0: no need to.

        Agents that lose etcd together lose their leases over the time between two renewals.
        Acting on each as it goes would restart a third of a fleet before the brake is on. One
        that is alone is acted on after a moment. One that is back was there all the time: it was
        etcd that ended its lease, and it has probably ended those of the others, too.
        """
        spread_s = ttl_s * AGENT_RENEWAL_SHARE + LOSS_SLACK_S
        recent = {agent: at for at, agent in self._recent if now - at <= spread_s}
        gone = [at for agent, at in recent.items() if self._is_gone(agent, present)]
        if not gone:
            return 0.0
        together = len(gone) > 1 or any(self._is_just_back(agent, now, ttl_s) for agent in recent)
        return max(gone) + (spread_s if together else ALONE_S)

    def changes_at(self, now: float, *, heard_at: float | None, ttl_s: float) -> float | None:
        """Return when the brake may change by time alone, or None."""
        instants = [at + BRAKE_WINDOW_S for at, _agent in self._recent]
        instants += [at + ttl_s for at in self._back_at.values()]
        if heard_at is not None:
            instants.append(heard_at + MIRROR_AGE_S_MAX)
        later = [instant for instant in instants if instant > now]
        # A hair later: at the instant itself the old answer still holds.
        return min(later) + 0.001 if later else None

    def forget(self, now: float, placed: Collection[AgentName], *, ttl_s: float) -> None:
        """Forget what no decision asks for any more; losses of those that jobs are ``placed`` on are kept."""
        while self._recent and now - self._recent[0][0] > BRAKE_WINDOW_S:
            self._recent.popleft()
        for agent in [name for name, at in self._back_at.items() if now - at > ttl_s]:
            del self._back_at[agent]
        for agent in [name for name, at in self.lost_at.items() if now - at > LOST_KEPT_S]:
            if agent not in placed:
                del self.lost_at[agent]
        self.left &= self.lost_at.keys()

    def _is_gone(self, agent: AgentName, present: Collection[AgentName]) -> bool:
        return agent in self.lost_at and agent not in present

    def _is_just_back(self, agent: AgentName, now: float, ttl_s: float) -> bool:
        """Whether others that vanished with it deserve a moment: a healed network brings them back singly.

        Released with the first of them, the brake would let go of all that are still on their way.
        """
        at = self._back_at.get(agent)
        return at is not None and now - at <= ttl_s
