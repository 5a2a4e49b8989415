"""The faults that chaos knows, as values, and the port through which they strike.

``Fault`` is concrete: it names who is hit. ``Breaker`` does it and undoes it;
there is one for a cluster that this process runs (``breaker``), one that asks
the process that does (``fault_port``), and one for marked clusters that nobody
here runs (``host_breaker``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Kind(StrEnum):
    """What is done."""

    KILL = "kill"
    FREEZE = "freeze"
    CUT = "cut"
    SLOW = "slow"
    FILL = "fill"
    PREEMPT = "preempt"


class Part(StrEnum):
    """What it is done to."""

    RANK = "rank"
    LAUNCHER = "launcher"
    AGENT = "agent"
    AGENT_GUARDIAN = "agent-guardian"
    MACHINE = "machine"
    COORDINATOR = "coordinator"
    LEADER = "leader"
    COORDINATOR_GUARDIAN = "coordinator-guardian"
    ETCD = "etcd"


WEIGHTS: Mapping[tuple[Kind, Part], int] = {
    (Kind.KILL, Part.RANK): 5,
    (Kind.KILL, Part.LAUNCHER): 2,
    (Kind.KILL, Part.AGENT): 3,
    (Kind.KILL, Part.AGENT_GUARDIAN): 2,
    (Kind.KILL, Part.MACHINE): 3,
    (Kind.KILL, Part.COORDINATOR): 1,
    (Kind.KILL, Part.LEADER): 2,
    (Kind.KILL, Part.COORDINATOR_GUARDIAN): 2,
    (Kind.KILL, Part.ETCD): 2,
    (Kind.FREEZE, Part.AGENT): 2,
    (Kind.FREEZE, Part.COORDINATOR): 1,
    (Kind.FREEZE, Part.LEADER): 1,
    (Kind.FREEZE, Part.ETCD): 2,
    (Kind.CUT, Part.AGENT): 3,
    (Kind.CUT, Part.COORDINATOR): 1,
    (Kind.CUT, Part.LEADER): 2,
    (Kind.SLOW, Part.AGENT): 2,
    (Kind.SLOW, Part.COORDINATOR): 1,
    (Kind.SLOW, Part.LEADER): 1,
    (Kind.FILL, Part.ETCD): 1,
    (Kind.PREEMPT, Part.MACHINE): 2,
}
"""Every fault there is, and how often it is drawn by default."""

_FOR_GOOD = {Part.AGENT_GUARDIAN, Part.MACHINE, Part.COORDINATOR_GUARDIAN, Part.ETCD}
"""Who is not brought back by the rest of the cluster: there is nobody above it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``name`` is the daemon or etcd member; ``job``, ``rank`` and ``pid`` say which rank.

    ``pick`` chooses among several launchers. ``way`` and ``delay_s`` are of cut and slow.
    """

    kind: Kind
    part: Part
    name: str = ""
    job: str = ""
    rank: int = 0
    pid: int = 0
    pick: int = 0
    way: str = ""
    delay_s: float = 0.0

    @property
    def lasts(self) -> bool:
        """It stays until it is healed: somebody must."""
        return self.kind is not Kind.KILL or self.part in _FOR_GOOD

    @property
    def label(self) -> str:
        """What it is counted as: kind and part."""
        return f"{self.kind} {self.part}"

    def __str__(self) -> str:
        match self.kind, self.part:
            case Kind.KILL, Part.RANK:
                return f"kill rank {self.rank} of {self.job} on {self.name} (pid {self.pid})"
            case Kind.CUT, _:
                return f"cut {self.part} {self.name} off from etcd ({self.way})"
            case Kind.SLOW, _:
                return f"slow {self.part} {self.name} by {1000 * self.delay_s:.0f} ms each way"
            case Kind.FILL, _:
                return "fill etcd up to its quota"
            case Kind.PREEMPT, _:
                return f"take machine {self.name} away, with a notice before"
            case _:
                return f"{self.kind} {self.part} {self.name}"


class Breaker(Protocol):
    """Breaks one cluster. Safe to call from one thread at a time."""

    def cannot(self, kind: Kind, part: Part) -> str:
        """Return "" if this kind of fault is possible here, else a sentence that says why not."""
        ...

    def strike(self, fault: Fault) -> None:
        """Do it.

        Raises:
            NotFound: there is nothing of that name to hit just now.
            Refused: it is not possible here.
        """
        ...

    def heal(self, fault: Fault) -> None:
        """Undo a fault that lasts; doing so again, or before it struck, does no harm.

        Raises:
            Unavailable: not yet; try again.
        """
        ...

    def close(self) -> None:
        """Leave; what was not healed is healed where that is possible."""
        ...
