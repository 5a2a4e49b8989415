"""What one decision asks the driver to do, in order."""

from dataclasses import dataclass
from typing import Any

from dtrain.protocol.checkpoint import Garbage, OpenRecord
from dtrain.protocol.commands import Command
from dtrain.protocol.ids import AgentName, ClusterName, JobName, Seq, Uid
from dtrain.protocol.snapshot import DurablePart


@dataclass(frozen=True, slots=True)
class Guard:
    """The key must still be at this mod revision (0: absent)."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class PutRecord:
    """Write a record (a protocol dataclass); ``expect_mod`` as in ``Guard``.

    ``lease_ttl_s`` above 0: under a lease of its own, so that the record goes by itself.
    """

    key: str
    value: Any
    expect_mod: int
    lease_ttl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    """Delete a record that is at this mod revision.

    ``expect_mod`` None: whatever its revision, without a compare. Only for
    records that nobody but the leader writes and that never change (events,
    quarantine): the fence and the compare on ``status`` protect them.
    """

    key: str
    expect_mod: int | None


Write = PutRecord | DeleteRecord


@dataclass(frozen=True, slots=True)
class NoKeysUnder:
    """No key may exist under the prefix when the writes happen (pins)."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Directed:
    """A command for one agent. Sent again every ``retry_s`` until the plan stops asking."""

    agent: AgentName
    address: str
    command: Command
    retry_s: float = 1.0
    incarnation: str = ""
    """The agent's life that it is meant for: no connection of a former one is used."""


@dataclass(frozen=True, slots=True)
class VerifyCheckpoint:
    """Read the rank manifests, check them against each other and the store, write the manifest.

    Answers with a ``Verdict``.
    """

    cluster: ClusterName
    job: JobName
    uid: Uid
    store: str
    record: OpenRecord
    parts: tuple[DurablePart, ...]
    parent: int | None


@dataclass(frozen=True, slots=True)
class CollectGarbage:
    """Delete a retired checkpoint's blobs, from its manifest's own list, then the manifest."""

    job: JobName
    store: str
    garbage: Garbage


@dataclass(frozen=True, slots=True)
class SweepOrphans:
    """List the store, then read etcd, then delete what no record names."""

    cluster: ClusterName
    job: JobName
    uid: Uid
    store: str


@dataclass(frozen=True, slots=True)
class ProbeStore:
    """Find out whether the job's store accepts and returns a small object."""

    job: JobName
    store: str


@dataclass(frozen=True, slots=True)
class InspectCheckpoint:
    """Read a committed checkpoint again: its blobs' sizes, one chunk, or every byte.

    Answers with an ``Inspection``. ``blob`` and ``chunk`` are for ``depth`` "chunk".
    """

    job: JobName
    store: str
    seq: Seq
    manifest: str
    digest: str
    depth: str
    blob: str = ""
    chunk: int = 0


Work = VerifyCheckpoint | CollectGarbage | SweepOrphans | ProbeStore | InspectCheckpoint


@dataclass(frozen=True, slots=True)
class Reason:
    """One sentence on where the job stands: log line, REASON column and test assertion alike."""

    text: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What one decision asks the driver to do, in this order.

    Writes are committed together, in one transaction that holds only if this
    leader's term is current, every guard is true and every written key is as it
    was read. Commands may leave only after that commit succeeded: an agent must
    never act on a decision that a successor could not read back. Work runs in
    the background; its result is a fact of the next view. ``wake_at`` (monotonic;
    None: nothing here depends on time alone) asks for another look.
    """

    guards: tuple[Guard, ...] = ()
    absent: tuple[NoKeysUnder, ...] = ()
    writes: tuple[Write, ...] = ()
    commands: tuple[Directed, ...] = ()
    work: tuple[Work, ...] = ()
    wake_at: float | None = None
    reasons: tuple[Reason, ...] = ()
