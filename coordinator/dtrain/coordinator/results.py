"""What background work answers: facts for the next view."""

from dataclasses import dataclass

from dtrain.coordinator.core.decisions import (
    CollectGarbage,
    InspectCheckpoint,
    ProbeStore,
    SweepOrphans,
    VerifyCheckpoint,
    Work,
)
from dtrain.coordinator.core.views import Damage, Verdict
from dtrain.protocol.ids import Seq


@dataclass(frozen=True, slots=True)
class Verified:
    """``verdict.at`` is set by the driver."""

    work: VerifyCheckpoint
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Collected:
    """``problem`` "": the blobs are gone, and the tombstone may go too."""

    work: CollectGarbage
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Swept:
    """``deleted`` blobs and uploads; ``problem``: why the sweep stood still.

    ``retry``: the store or etcd did not answer, so that it is still due.
    """

    work: SweepOrphans
    deleted: int = 0
    problem: str = ""
    retry: bool = False
    unknown: tuple[Seq, Seq] | None = None
    """Lowest and highest number of checkpoints that the store holds and etcd does not know."""


@dataclass(frozen=True, slots=True)
class Probed:
    """``problem`` "": the store answers."""

    work: ProbeStore
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """``damage`` None and ``problem`` "": what was read is what was committed."""

    work: InspectCheckpoint
    damage: Damage | None = None
    problem: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkCrashed:
    """The work itself failed in a way that nobody foresaw."""

    work: Work
    problem: str


WorkResult = Verified | Collected | Swept | Probed | Inspected | WorkCrashed
