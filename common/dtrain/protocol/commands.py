"""What goes down from the leader to an agent: a closed union of commands.

Each command is idempotent and carries who orders it (term), for what (job,
uid, attempt) and an id that is a function of what it asks for, so that a
repeated one is recognised. Agents refuse a lower term or attempt, and confirm
a higher term by one linearizable read of the leader key: a number over gRPC is
no proof. The outcome comes back in the snapshot, never in the answer.
"""

from dataclasses import dataclass

from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import JobSpec, RestorePoint


@dataclass(frozen=True, slots=True)
class Header:
    """Common to all commands."""

    cluster: ClusterName
    term: Term
    job: JobName
    uid: Uid
    attempt: Attempt
    id: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """End older attempts here, verify that they are gone, ready the launcher, report READY.

    With ``serve_store`` also open the attempt's TCPStore and report its address.
    """

    header: Header
    spec: JobSpec
    store: str
    node_rank: int
    nnodes: int
    first_rank: Rank
    world_size: int
    serve_store: bool
    max_restarts: int = 0
    nproc: int = 0
    """Ranks on this machine; 0: as the job file says, from coordinators that know nothing else."""

    @property
    def ranks_here(self) -> int:
        return self.nproc or self.spec.nproc_per_node


@dataclass(frozen=True, slots=True)
class Start:
    """Fork the ranks of a prepared attempt; restore from ``restore`` (None: from scratch)."""

    header: Header
    rendezvous: str
    restore: RestorePoint | None


@dataclass(frozen=True, slots=True)
class BeginCheckpoint:
    """Copy the state at the boundary of ``step``, upload it, report it durable.

    With ``hold_s`` ranks stay at that boundary until the outcome is known or they
    are ended, at most so long: an attempt that is about to end takes no step in vain.
    ``asked``: the script itself saves this step; each rank seals when its script comes to it.
    """

    header: Header
    seq: Seq
    nonce: str
    step: Step
    hold_s: float = 0.0
    asked: bool = False


@dataclass(frozen=True, slots=True)
class AbortCheckpoint:
    """Checkpoint ``seq`` will never be: cancel its upload, free the slot.

    ``final``: no checkpoint at the end of training will be tried again; ranks
    that wait for it may exit, whether or not this agent knows ``seq``.
    """

    header: Header
    seq: Seq
    why: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class ConfirmCheckpoint:
    """Checkpoint ``seq`` is committed: free the slot.

    ``final``: it was the one at the end of training; ranks that wait for it may exit.
    """

    header: Header
    seq: Seq
    final: bool = False
    manifest: str = ""
    """Its key in the store, for agents that will restore from what they still hold; "": not known."""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """End all ranks of attempts up to the header's: SIGTERM, SIGKILL after ``grace_s``.

    With ``release`` the job is over: the launcher exits too and the snapshot is
    deleted. Logs stay.
    """

    header: Header
    grace_s: float
    release: bool
    why: str


@dataclass(frozen=True, slots=True)
class Warm:
    """Have a launcher of this job import everything, for a later PREPARE. ``nproc``: ranks it may get."""

    header: Header
    spec: JobSpec
    nproc: int


@dataclass(frozen=True, slots=True)
class DumpStacks:
    """Collect the stacks of all local ranks and show them in the snapshot, under the header's id."""

    header: Header
    why: str


Command = Prepare | Start | BeginCheckpoint | AbortCheckpoint | ConfirmCheckpoint | Stop | Warm | DumpStacks
"""Every command there is; matches are closed with ``assert_never``."""
