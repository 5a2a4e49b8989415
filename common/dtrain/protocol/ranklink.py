"""What a rank and its agent say to each other: JSON lines over a Unix socket.

The SDK connects to the socket named by DTRAIN_AGENT_SOCKET, says ``Hello`` and
from then on sends ``Report`` whenever its state changed: always the whole
state, so that a lost or repeated one does no harm and a restarted agent knows
everything after the first. The agent answers ``Welcome`` and sends orders.
A line is one object ``{"type": <class name>, ...}`` of at most LINE_BYTES_MAX.

The agent may go and come back at any time: the SDK reconnects for ever and
training never waits for it, except to restore and for the last checkpoint.
"""

import dataclasses
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Attempt, JobName, Rank, Seq, Step, Uid
from dtrain.protocol.snapshot import SaveProblem, Timing, WorkerPhase

LINE_BYTES_MAX = 1024 * 1024

ENV_SOCKET = "DTRAIN_AGENT_SOCKET"
ENV_JOB = "DTRAIN_JOB"
ENV_UID = "DTRAIN_JOB_UID"
ENV_ATTEMPT = "DTRAIN_ATTEMPT"
ENV_ARENA_FD = "DTRAIN_ARENA_FD"
"""Descriptor of the memfd that the launcher keeps for this local rank. It
outlives the rank, so a sealed snapshot can be uploaded after a crash."""
ENV_STACKS = "DTRAIN_STACKS_FILE"
"""The file to which this rank writes the stacks of its threads when it is sent STACKS_SIGNAL."""

STACKS_SIGNAL = getattr(signal, "SIGRTMIN", 34) + 9
"""A real-time signal that no library is known to use. Who does not handle it is ended by it: look first."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A frozen snapshot in the arena: a complete safetensors file plus its index.

    ``path`` opens the arena in any process of the same user
    (``/proc/<launcher>/fd/<n>``). ``index`` is JSON: ``{"tensors": {name:
    TensorEntry with b=0 and off counted from the start of the blob}, "objects":
    {name: ObjectEntry}, "layout": hash, "same": {name: digest}}``.
    """

    seq: Seq
    nonce: str
    step: Step
    path: str
    offset: int
    size_bytes: int
    index_offset: int
    index_bytes: int
    index_crc: str = ""
    """CRC32 (zlib) of the index as it was made, in hex: nothing else vouches for it. "": not known."""


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """The rank could not load what it was given; training has not begun."""

    seq: Seq
    message: str


@dataclass(frozen=True, slots=True)
class Hello:
    """First line of a connection."""

    v: int
    job: JobName
    uid: Uid
    attempt: Attempt
    rank: Rank
    local_rank: int
    pid: int
    demands: bool = False
    """It says which bytes of a checkpoint it needs; one that does not gets all of them."""


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """``count`` chunks from number ``first`` of blob ``blob`` of the manifest."""

    blob: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a rank needs of the checkpoint behind plan ``plan``: always all of it, so saying it twice is fine.

    Answered by ``Have`` with the same ``plan`` and ``number``. ``again``: it has
    copied what it needed out of places that others can write to; were the bytes
    there the right ones all the time?

    ``unverified``: shared places are named as they are, the rank verifies what it has
    read. With ``again``: it found something else than was committed in these chunks.
    """

    plan: str
    number: int
    chunks: tuple[ChunkSpan, ...] = ()
    whole: bool = False
    """All chunks of all blobs."""
    again: bool = False
    unverified: bool = False
    """Agents of a release that does not know it verify first: slower, and no less right."""


@dataclass(frozen=True, slots=True)
class Report:
    """The rank's whole state.

    ``phase`` is RESTORING until its state is loaded, then TRAINING; DONE once
    the training loop has ended for good. ``sealed`` stays set until the agent
    sends the outcome of that checkpoint.
    """

    phase: WorkerPhase
    step: Step
    last_step: Step | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    sealed: Sealed | None = None
    problem: SaveProblem | None = None
    restore_failed: RestoreFailed | None = None
    wants_restore: bool = False
    """The rank is ready to load and waits for ``RestorePlan``."""
    save_at: Step | None = None
    """The script saves this step: it waits for ``Begin`` with ``asked`` of exactly it."""
    settled: Seq = Seq(0)
    """With ``save_at``: the last checkpoint whose outcome was known when it was said.
    What was said before an outcome may be about the very checkpoint that it ended."""
    wants_durable: Seq | None = None
    """The script waits for ``Durable`` of what is sealed for this checkpoint."""
    need: Need | None = None
    """Set from a plan ``on_demand`` until the state is loaded."""
    timing: Timing | None = None
    nonfinite: tuple[str, ...] = ()
    """Names of numbers whose newest value is NaN or infinite."""
    nonfinite_seen: Mapping[str, Step] = field(default_factory=dict)
    """Names of numbers that were ever reported so, and the step that it happened in last: a later value
    takes a name out of ``nonfinite``, perhaps before anybody has read it there."""
    section: str = ""
    """What the script says it is doing: a phase in which no step is to be expected."""
    beats: int = 0
    """Counts what proves that the script goes on although its step stands still: sections entered and left,
    snapshots taken."""
    collective: str = ""
    """While the step stands still, of torch's flight recorder: number and name of the newest collective."""
    steps_total: Step = Step(0)
    """As many steps as the script means to take; 0: it has not said."""
    held_s: float = 0.0
    """Seconds that checkpoints have held this rank, without waiting for the last one."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to ``Hello``. Not accepted: the attempt is over, the rank must exit."""

    accepted: bool
    checkpoints: bool
    """False: the job has no store; nothing will be saved or restored."""
    why: str = ""
    save_timeout_s: float = 0.0
    """How long one checkpoint may take. 0: this agent knows nothing of saves that scripts ask for."""
    finite: tuple[str, ...] = ()
    """Reported numbers that must be finite: a snapshot of a step at which one is not is never kept."""


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Where the restored bytes are; every one of them has been verified.

    ``seq`` None: there is no checkpoint, start from scratch. ``manifest_path``
    holds the decompressed manifest's JSON (``manifest_bytes`` long);
    ``blobs[i]`` is where blob ``i`` of it lies, unless ``on_demand``.
    """

    seq: Seq | None
    step: Step = Step(0)
    manifest_path: str = ""
    manifest_offset: int = 0
    manifest_bytes: int = 0
    blobs: tuple["BlobPlace", ...] = ()
    on_demand: bool = False
    """Blobs come with ``Have``, once the rank has said in its reports what it needs."""
    token: str = ""
    """Names this plan in ``Need`` and ``Have``. A plan with another token replaces it: what was
    fetched for the former one, and not opened yet, is gone."""


@dataclass(frozen=True, slots=True)
class BlobPlace:
    """A blob's bytes: ``size_bytes`` at ``offset`` of the file or memfd at ``path``."""

    path: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Held:
    """Where the wanted chunks of one blob lie. ``shared``: not in a copy made for this restore.

    Others can write to a shared place, so what was read there counts only if the rank
    verified what it has read, or once ``Need.again`` has been answered with ``good``.
    """

    blob: int
    place: BlobPlace
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Have:
    """All chunks of a ``Need`` are there and, unless it said otherwise, verified.

    ``blobs`` names each blob of it once.
    """

    plan: str
    number: int
    blobs: tuple[Held, ...] = ()
    good: bool = True
    """To ``again``. False: some bytes have changed, everything must be loaded anew."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Seal a snapshot at the boundary of ``step``; report a problem if it has passed.

    ``hold_s``: then stay there until the outcome comes, at most so long (0: train on).
    ``asked``: seal it when the script saves this step, and only then.
    """

    seq: Seq
    nonce: str
    step: Step
    hold_s: float = 0.0
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Durable:
    """What this rank sealed for checkpoint ``seq`` is in the store. Sent only to a rank that waits for it."""

    seq: Seq


@dataclass(frozen=True, slots=True)
class Outcome:
    """Checkpoint ``seq`` is committed or will never be: its slot is free.

    ``final``: this was the checkpoint at the end of training; the rank may exit.
    """

    seq: Seq
    committed: bool
    final: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class StopRank:
    """The attempt is over; the rank should leave its loop at the next step."""

    why: str


Message = Hello | Report | Welcome | RestorePlan | Have | Begin | Durable | Outcome | StopRank
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (Hello, Report, Welcome, RestorePlan, Have, Begin, Durable, Outcome, StopRank)
}


def encode_line(message: Message) -> bytes:
    """One line, newline included."""
    return codec.dumps({"type": type(message).__name__, **codec.to_json(message)}) + b"\n"


def decode_line(line: bytes) -> Message:
    """Parse one line.

    Raises:
        Refused: BAD_RECORD.
    """
    document = codec.loads(line, bytes_max=LINE_BYTES_MAX)
    if not isinstance(document, dict) or document.get("type") not in _TYPES:
        raise Refused(ErrorCode.BAD_RECORD, "a line from a rank has no known type")
    message: Any = codec.from_json(_TYPES[document["type"]], document)
    assert dataclasses.is_dataclass(message)
    return message  # type: ignore[return-value]
