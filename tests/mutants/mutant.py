"""What a deliberate bug is, and where the code and its tests lie."""

from dataclasses import dataclass

CORE = "coordinator/dtrain/coordinator/core"
COORDINATOR = "coordinator/dtrain/coordinator"
AGENT = "agent/dtrain/agent"
ETCD = "storage/dtrain/storage/etcd"
TRAINER = "trainer/dtrain/trainer"

ON_COORDINATOR = "tests/unit/coordinator"
ON_AGENT = "tests/unit/agent"
ON_TRAINER = "tests/unit/trainer"
ON_ETCD = "tests/contract/etcd"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug. ``breaks``: what is wrong, and which promise falls with it."""

    id: str
    breaks: str
    file: str
    old: str
    new: str
    killer: tuple[str, ...]


def mutant(identity: str, breaks: str, file: str, change: tuple[str, str], *killer: str) -> Mutant:
    """One bug, ``change`` being what stands there and what stands there instead."""
    return Mutant(identity, breaks, file, change[0], change[1], killer)
