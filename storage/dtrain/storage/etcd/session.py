"""The child's side of the lease that its guardian holds.

``attach`` at the very start of the process, ``set_started`` once the loop that
calls ``beat`` runs. A leader checks ``may_act`` right before each send, but
never relies on it for correctness: that is what the fenced transaction is for.
"""

import ctypes
import os
import signal
from typing import Protocol

from dtrain.protocol.errors import ErrorCode, LeadershipLost, Refused
from dtrain.storage.etcd.session_memory import (
    CLEAN_STOP,
    FD_VARIABLE,
    GUARDIAN_PID_VARIABLE,
    READY,
    REVISION_VARIABLE,
    STARTED,
    STOPPING_VARIABLE,
    GuardianCounts,
    LeaseView,
    SessionMemory,
)

_PR_SET_PDEATHSIG = 1


class Session(Protocol):
    """A lease that somebody else renews. Times are ``Clock.monotonic``, s."""

    @property
    def lease(self) -> int:
        """The present lease; another one after a loss. 0: none at the moment."""
        ...

    @property
    def generation(self) -> int:
        """Rises with each new lease: what was bound to the former one is gone."""
        ...

    @property
    def ttl_s(self) -> float: ...

    @property
    def deadline(self) -> float:
        """Until when the lease surely lives; a leader stops acting then."""
        ...

    def view(self) -> LeaseView:
        """Return lease, generation and deadlines of one moment."""
        ...

    def may_act(self, now: float) -> bool:
        """Tell whether the deadline is ahead and, once acting, the lease still the same."""
        ...

    def beat(self) -> None:
        """Say that the main loop lives. From ``set_started`` on, every 0.1 TTL or sooner."""
        ...

    def set_started(self) -> None: ...

    def set_ready(self) -> None:
        """Say that this process serves others, from the thread that calls ``set_started``; again is fine."""
        ...

    def set_acting(self, acting: bool, generation: int | None = None) -> None:
        """Say that leadership was won, or given up.

        Pass the ``generation`` of the lease that the leader key is bound to.

        Raises:
            LeadershipLost: that lease is gone already.
        """
        ...

    def doubt(self) -> None:
        """Say that etcd knows the lease no more: the guardian asks it at once, and gets a new one."""
        ...

    def count_fenced(self) -> None:
        """Count a decision that etcd refused because its term was over: this process ends by it."""
        ...

    def counts(self) -> GuardianCounts:
        """Return what was counted over all lives of this process."""
        ...

    def set_clean_stop(self) -> None:
        """Say that this process ends on purpose: with exit code 0 it is not restarted."""
        ...


class GuardedSession:
    """The session of a process that runs under ``guardian``; made by ``attach``."""

    def __init__(self, memory: SessionMemory, revision_seen: int = 0, stopping_since: float = 0.0) -> None:
        self._memory = memory
        self._acting = 0
        self.revision_seen = revision_seen
        """The newest revision of etcd that the guardian had heard of when it started this process."""
        self.stopping_since = stopping_since
        """When the guardian was told to stop, if that was before this process began; else 0."""

    @property
    def lease(self) -> int:
        return self._memory.view().lease

    @property
    def generation(self) -> int:
        return self._memory.view().generation

    @property
    def ttl_s(self) -> float:
        return self._memory.view().ttl_s

    @property
    def deadline(self) -> float:
        return self._memory.view().demote_at

    def view(self) -> LeaseView:
        return self._memory.view()

    def may_act(self, now: float) -> bool:
        view = self._memory.view()
        return now < view.demote_at and self._acting in (0, view.generation)

    def beat(self) -> None:
        self._memory.beat()

    def set_started(self) -> None:
        self._memory.beat()
        self._memory.raise_flag(STARTED)

    def set_ready(self) -> None:
        self._memory.raise_flag(READY)

    def set_acting(self, acting: bool, generation: int | None = None) -> None:
        now_at = self._memory.view().generation
        self._acting = (now_at if generation is None else generation) if acting else 0
        # First the flag, then the question: the guardian checks it against its own generation.
        self._memory.set_acting(self._acting)
        if acting and self._memory.view().generation != self._acting:
            raise LeadershipLost(ErrorCode.LEADERSHIP_LOST, "the lease was lost while leadership was won")

    def doubt(self) -> None:
        self._memory.doubt()

    def count_fenced(self) -> None:
        self._memory.count_fenced()

    def counts(self) -> GuardianCounts:
        return self._memory.counts()

    def set_clean_stop(self) -> None:
        self._memory.raise_flag(CLEAN_STOP)


class FixedSession:
    """A session without a guardian: for tests and the simulation, which set its fields."""

    def __init__(self, lease: int, *, ttl_s: float = 10.0, deadline: float = float("inf")) -> None:
        self.lease = lease
        self.generation = 1
        self.ttl_s = ttl_s
        self.deadline = deadline
        self.beats = 0
        self.started = False
        self.ready = False
        self.acting = 0
        self.doubts = 0
        self.fenced = 0
        self.clean_stop = False

    def view(self) -> LeaseView:
        kill_at = self.deadline + 0.15 * self.ttl_s
        return LeaseView(self.lease, self.generation, self.ttl_s, self.deadline, kill_at)

    def replace(self, lease: int, deadline: float = float("inf")) -> None:
        """Do what a guardian does after a loss."""
        self.lease, self.deadline = lease, deadline
        self.generation += 1

    def may_act(self, now: float) -> bool:
        return now < self.deadline and self.acting in (0, self.generation)

    def beat(self) -> None:
        self.beats += 1

    def set_started(self) -> None:
        self.started = True

    def set_ready(self) -> None:
        self.ready = True

    def set_acting(self, acting: bool, generation: int | None = None) -> None:
        self.acting = (self.generation if generation is None else generation) if acting else 0
        if acting and self.acting != self.generation:
            raise LeadershipLost(ErrorCode.LEADERSHIP_LOST, "the lease was lost while leadership was won")

    def doubt(self) -> None:
        self.doubts += 1

    def count_fenced(self) -> None:
        self.fenced += 1

    def counts(self) -> GuardianCounts:
        return GuardianCounts(fenced=self.fenced)

    def set_clean_stop(self) -> None:
        self.clean_stop = True


def attach() -> GuardedSession:
    """Join the guardian that started this process, and die with it from now on.

    Raises:
        Refused: there is no guardian, or it has died already.
    """
    fd_text = os.environ.pop(FD_VARIABLE, "")
    guardian = os.environ.pop(GUARDIAN_PID_VARIABLE, "")
    revision = os.environ.pop(REVISION_VARIABLE, "")
    stopping = os.environ.pop(STOPPING_VARIABLE, "")
    if not fd_text.isdigit() or not guardian.isdigit():
        raise Refused(
            ErrorCode.USAGE,
            "this process must be started by its guardian",
            fix="use 'dtrain coordinator' or 'dtrain agent'",
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise Refused(ErrorCode.BUG, f"no parent-death signal: {os.strerror(ctypes.get_errno())}")
    # It may have died before the line above: then no signal will ever come.
    if os.getppid() != int(guardian):
        raise Refused(ErrorCode.LEADERSHIP_LOST, "the guardian died before this process was ready")
    os.set_inheritable(int(fd_text), False)
    memory = SessionMemory.open(int(fd_text))
    return GuardedSession(
        memory, int(revision) if revision.isdigit() else 0, float(stopping) if stopping else 0.0
    )
