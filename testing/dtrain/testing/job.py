"""One job under test: what it is at the moment, and waiting for what it should become.

Everything is read straight from etcd. Each wait ends early when what is waited
for cannot come any more, and fails with the job's story: its phase and the
reason, its last events, the logs of what failed.
"""

import contextlib
import time
from typing import TYPE_CHECKING, TypeVar

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound
from dtrain.protocol.events import EventRecord
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobStatus, Member
from dtrain.protocol.snapshot import RankState, WorkerSnapshot
from dtrain.testing.patience import limited, patiently

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtrain.testing.cluster import Cluster

T = TypeVar("T")

WAIT_S = 300.0
"""Default limit of a wait that includes training."""

_POLL_S = 0.05
_LOG_BYTES_MAX = 16 * 1024 * 1024


class Job:
    """A job of ``cluster``. Made by ``Cluster.submit`` and ``Cluster.job``."""

    def __init__(self, cluster: "Cluster", name: str) -> None:
        self.name = JobName(name)
        """Its name."""
        self._cluster = cluster

    def __repr__(self) -> str:
        return f"Job({self.name!r})"

    # What it is now --------------------------------------------------------------------------

    @property
    def status(self) -> JobStatus:
        """The leader's whole record of it.

        Raises:
            NotFound: no leader has taken the job on yet.
            Unavailable: etcd has not answered for 30 s.
        """
        key = self._cluster.keys.status(self.name)
        found = patiently(lambda: self._cluster.etcd.range(key)).items
        if not found:
            raise NotFound(ErrorCode.NOT_FOUND, f"no leader has taken {self.name} on yet")
        return codec.decode(JobStatus, found[0].value)

    @property
    def phase(self) -> JobPhase:
        """QUEUED, STARTING, RUNNING, RECOVERING, CANCELLING, SUCCEEDED, FAILED or CANCELLED."""
        with contextlib.suppress(NotFound):
            return self.status.phase
        return JobPhase.QUEUED

    @property
    def attempt(self) -> int:
        """How often it has been started: 1 until something was lost."""
        with contextlib.suppress(NotFound):
            return int(self.status.attempt)
        return 0

    @property
    def step(self) -> int:
        """A step that every rank of the current attempt has completed, as last reported.

        After a restart it begins again at the checkpoint's step. 0 for scripts that do
        not use ``dtrain.trainer``.
        """
        with contextlib.suppress(NotFound):
            return self._step(self.status)
        return 0

    @property
    def members(self) -> tuple[Member, ...]:
        """The machines of the current attempt, with the ranks that each one runs."""
        with contextlib.suppress(NotFound):
            return self.status.members
        return ()

    @property
    def agents(self) -> tuple[str, ...]:
        """Names of the machines of the current attempt, that of rank 0 first."""
        return tuple(str(member.agent) for member in self.members)

    def ranks(self) -> dict[int, RankState]:
        """Every rank of the current attempt as its agent last reported it."""
        with contextlib.suppress(NotFound):
            return self._ranks(self.status)
        return {}

    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that run. In containers they are those inside the agent's container."""
        return {
            rank: state.pid for rank, state in self.ranks().items() if state.exit_code is None and state.pid
        }

    def commits(self) -> list[CommitRecord]:
        """The committed checkpoints that are kept, oldest first."""
        found = self._cluster.read(f"jobs/{self.name}/checkpoints/")
        return [codec.decode(CommitRecord, item.value) for _, item in sorted(found.items())]

    def events(self, reason: str = "") -> list[EventRecord]:
        """What has happened to it, oldest first; ``reason`` ("AgentLost") picks one kind."""
        found = self._cluster.read(f"jobs/{self.name}/events/")
        events = [codec.decode(EventRecord, item.value) for _, item in sorted(found.items())]
        return [event for event in events if reason in ("", event.reason)]

    def logs(self, rank: int = 0, *, stream: str = "", attempt: int = 0) -> str:
        """What a rank has written; ``stream`` "stdout" or "stderr", default the one after the other.

        ``attempt`` 0: the current one.

        Raises:
            NotFound: there is no such rank or attempt, or its machine has gone.
            Unavailable: the coordinators, or the rank's agent, cannot be reached.
        """
        data = b""
        for one in (stream,) if stream else ("stdout", "stderr"):
            offset = 0
            while len(data) < _LOG_BYTES_MAX:
                chunk = self._cluster.client.read_log(self.name, rank, one, attempt=attempt, offset=offset)
                data += chunk.data
                if not chunk.data or chunk.eof:
                    break
                offset = chunk.next_offset
        return data.decode(errors="replace")

    # Waiting ---------------------------------------------------------------------------------

    def wait(self, timeout_s: float = WAIT_S, *, phase: str = JobPhase.SUCCEEDED) -> JobStatus:
        """Wait for its end, which must be ``phase``.

        Raises:
            AssertionError: it ended in another phase, or not in ``timeout_s``.
        """

        def ended(status: JobStatus) -> JobStatus | None:
            return status if status.phase in TERMINAL_PHASES else None

        status = self._until(f"it ends {phase}", ended, timeout_s, to_its_end=True)
        if status.phase != phase:
            raise AssertionError(f"{self.name} ended {status.phase}, not {phase}\n{self.describe()}")
        return status

    def wait_for_step(self, step: int, timeout_s: float = WAIT_S) -> int:
        """Wait until every rank has completed ``step`` in the current attempt; return the step it is at.

        Raises:
            AssertionError: it ended before, or not in ``timeout_s``.
        """

        def reached(status: JobStatus) -> int | None:
            now = self._step(status)
            return now if now >= step else None

        return self._until(f"it reaches step {step}", reached, timeout_s)

    def wait_for_commit(self, after: int = 0, timeout_s: float = WAIT_S) -> CommitRecord:
        """Wait for a committed checkpoint with a number beyond ``after``; return the newest one.

        ``job.wait_for_commit(after=job.commits()[-1].seq)`` waits for a fresh one.

        Raises:
            AssertionError: it ended without one, or not in ``timeout_s``.
        """

        def committed(_: JobStatus) -> CommitRecord | None:
            return next((record for record in reversed(self.commits()) if record.seq > after), None)

        return self._until(f"it commits a checkpoint after number {after}", committed, timeout_s)

    def wait_for_attempt(self, attempt: int, timeout_s: float = WAIT_S) -> JobStatus:
        """Wait until all ranks of ``attempt``, or of a later one, train.

        Raises:
            AssertionError: it ended before, or not in ``timeout_s``.
        """

        def trains(status: JobStatus) -> JobStatus | None:
            trained = status.phase in (JobPhase.RUNNING, JobPhase.SUCCEEDED)
            return status if status.attempt >= attempt and trained else None

        return self._until(f"attempt {attempt} trains", trains, timeout_s)

    def wait_for_event(self, reason: str, text: str = "", timeout_s: float = WAIT_S) -> EventRecord:
        """Wait for an event of this kind whose message contains ``text``; return the first.

        Raises:
            AssertionError: it ended without one, or not in ``timeout_s``.
        """

        def found(_: JobStatus) -> EventRecord | None:
            return next((event for event in self.events(reason) if text in event.message), None)

        return self._until(f"it has an event {reason} {text}".rstrip(), found, timeout_s)

    # Doing -----------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask for its end; ``wait(phase="CANCELLED")`` waits for it.

        Raises:
            Conflict: it has ended.
        """
        self._cluster.client.set_intent(self.name, wanted="cancel")

    # Telling ---------------------------------------------------------------------------------

    def describe(self) -> str:
        """Its story, in lines for people: phase, reason, machines, failure, last events, last log lines."""
        try:
            with limited():
                status = self.status
                events = self.events()[-12:]
        except DtrainError as error:
            return f"job {self.name}: {error.message}\n{self._cluster.describe()}"
        where = f"attempt {status.attempt}, step {self._shown_step(status)}"
        lines = [
            f"job {self.name}: {status.phase}, {where}: {status.reason}",
            f"  on {', '.join(str(member.agent) for member in status.members) or 'no machine'}",
        ]
        failure = status.failure
        if failure is not None:
            where = f"rank {failure.rank} on " if failure.rank is not None else ""
            lines.append(
                f"  failed: {failure.kind}, {where}{failure.agent or 'no machine'}: {failure.message}"
            )
            lines += [f"    | {line}" for line in failure.log_tail.strip().splitlines()[-12:]]
        lines += [f"  {event.last or event.first} {event.reason}: {event.message}" for event in events]
        if status.phase is not JobPhase.SUCCEEDED:
            lines.append(self._cluster.describe())
            if failure is not None and failure.agent in self._cluster.agents:
                lines += [f"  the log of {failure.agent} ends:", *self._cluster.tail(failure.agent)]
        return "\n".join(lines)

    # Inside ----------------------------------------------------------------------------------

    def _until(
        self,
        what: str,
        condition: "Callable[[JobStatus], T | None]",
        timeout_s: float,
        *,
        to_its_end: bool = False,
    ) -> T:
        deadline = time.monotonic() + timeout_s
        problem = ""
        while True:
            try:
                with limited():
                    status = self.status
                    found = condition(status)
                    ended = status.phase in TERMINAL_PHASES and not to_its_end
                    if found is None and ended:
                        # Once more: what was looked for may have come with the end.
                        found = condition(self.status)
                if found is not None:
                    return found
                problem = ""
                if ended:
                    raise AssertionError(f"{self.name} ended before {what}\n{self.describe()}")
            except DtrainError as error:
                # A test takes etcd away; that nobody has taken the job on yet is no error either.
                problem = f" ({error.message})"
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {timeout_s:g} s: {what}{problem}\n{self.describe()}")
            time.sleep(_POLL_S)

    def _ranks(self, status: JobStatus) -> dict[int, RankState]:
        ranks: dict[int, RankState] = {}
        for key, item in self._cluster.read("agents/").items():
            parsed = self._cluster.keys.parse(key)
            if parsed is None or parsed.kind != "worker" or parsed.job != self.name:
                continue
            snapshot = codec.decode(WorkerSnapshot, item.value)
            if snapshot.attempt == status.attempt and snapshot.uid == status.uid:
                ranks |= {int(state.rank): state for state in snapshot.ranks}
        return ranks

    def _step(self, status: JobStatus) -> int:
        if status.phase in TERMINAL_PHASES:
            return int(status.step)
        ranks = self._ranks(status)
        base = int(status.restore.step) if status.restore else 0
        if not ranks or len(ranks) < status.world_size:
            return base
        return max(base, min(int(state.step) for state in ranks.values()))

    def _shown_step(self, status: JobStatus) -> str:
        try:
            with limited():
                return str(self._step(status))
        except DtrainError:
            return "unknown"
