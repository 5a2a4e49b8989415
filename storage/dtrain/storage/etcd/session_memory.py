"""The page of memory that a guardian and its child share. Standard library only.

Aligned 8-byte fields, each written by one side: single fields are never torn.
The guardian's fields change together under a sequence number, which is odd
while they change, so that the child never pairs one lease with the deadline of
another.
"""

import mmap
import os
import struct
from dataclasses import dataclass

FD_VARIABLE = "DTRAIN_SESSION_FD"
GUARDIAN_PID_VARIABLE = "DTRAIN_GUARDIAN_PID"
REVISION_VARIABLE = "DTRAIN_GUARDIAN_REVISION"
STOPPING_VARIABLE = "DTRAIN_GUARDIAN_STOPPING"
"""Since when (CLOCK_BOOTTIME, s) the child is to stop: for one that is started after that."""

STARTED = 1
"""The child's heart beats from now on: a pause is a hang."""

CLEAN_STOP = 2
"""The child ends because it wants to: exit code 0 is no crash."""

READY = 4
"""The child does what it is there for: it serves, or is registered. Never taken back."""

_SIZE = 4096
_MAGIC = 0x6474_7261_696E_0001
_AT_MAGIC, _AT_SEQUENCE, _AT_LEASE = 0, 8, 16
_LEASE = struct.Struct("=QQddd")
_AT_BEAT, _AT_FLAGS, _AT_ACTING, _AT_DOUBTS, _AT_FENCED = 64, 72, 80, 88, 96
_AT_COUNTS = 256

RENEWAL_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds by which renewals are counted; none takes longer than a try may."""

KILLS = ("hang", "lease", "stop")
"""Why a guardian kills its child: its loop stands still, it leads without a lease, it does not stop."""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """What the guardian says. Times are CLOCK_BOOTTIME, s; 0 in ``demote_at``: not to act."""

    lease: int = 0
    generation: int = 0
    ttl_s: float = 0.0
    demote_at: float = 0.0
    kill_at: float = 0.0


@dataclass(frozen=True, slots=True)
class GuardianCounts:
    """What a guardian has counted over all its children; only for people."""

    renewals: tuple[int, ...] = (0,) * (len(RENEWAL_BOUNDS_S) + 1)
    """Tries to renew by how long they took, failed ones included; the last one without a bound."""
    renewals_us: int = 0
    """Their sum, microseconds."""
    kills: tuple[int, ...] = (0,) * len(KILLS)
    fenced: int = 0
    """Decisions that etcd refused because their term was over."""


_COUNTS = struct.Struct(f"={len(GuardianCounts().renewals)}QQ{len(KILLS)}QQ")


class SessionMemory:
    """A mapping of the page; ``create`` for the guardian, ``open`` for the child."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> "SessionMemory":
        fd = os.memfd_create("dtrain-session")
        os.ftruncate(fd, _SIZE)
        memory = cls(fd)
        memory._words[_AT_MAGIC // 8] = _MAGIC
        return memory

    @classmethod
    def open(cls, fd: int) -> "SessionMemory":
        """Map the page behind ``fd``.

        Raises:
            ValueError: it is none of this version.
        """
        memory = cls(fd)
        if memory._words[_AT_MAGIC // 8] != _MAGIC:
            raise ValueError("the session descriptor holds no session of this version")
        return memory

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)

    # The guardian writes, the child reads.

    def publish(self, view: LeaseView) -> None:
        sequence = self._words[_AT_SEQUENCE // 8]
        self._words[_AT_SEQUENCE // 8] = sequence + 1
        _LEASE.pack_into(
            self._map, _AT_LEASE, view.lease, view.generation, view.ttl_s, view.demote_at, view.kill_at
        )
        self._words[_AT_SEQUENCE // 8] = sequence + 2

    def view(self) -> LeaseView:
        """Return the guardian's fields; nothing to act on if it died half way through a change."""
        for _ in range(10_000):
            before = self._words[_AT_SEQUENCE // 8]
            if before % 2 == 0:
                view = LeaseView(*_LEASE.unpack_from(self._map, _AT_LEASE))
                if self._words[_AT_SEQUENCE // 8] == before:
                    return view
            os.sched_yield()
        return LeaseView()

    def publish_counts(self, counts: GuardianCounts) -> None:
        _COUNTS.pack_into(
            self._map, _AT_COUNTS, *counts.renewals, counts.renewals_us, *counts.kills, counts.fenced
        )

    def counts(self) -> GuardianCounts:
        """Return what the guardian has counted; a sum may be a moment ahead of its parts."""
        values = _COUNTS.unpack_from(self._map, _AT_COUNTS)
        buckets = len(GuardianCounts().renewals)
        return GuardianCounts(values[:buckets], values[buckets], values[buckets + 1 : -1], values[-1])

    # The child writes, the guardian reads.

    def beat(self) -> None:
        self._words[_AT_BEAT // 8] = (self._words[_AT_BEAT // 8] + 1) & 0xFFFF_FFFF_FFFF_FFFF

    def beats(self) -> int:
        return self._words[_AT_BEAT // 8]

    def raise_flag(self, flag: int) -> None:
        self._words[_AT_FLAGS // 8] |= flag

    def has_flag(self, flag: int) -> bool:
        return bool(self._words[_AT_FLAGS // 8] & flag)

    def set_acting(self, generation: int) -> None:
        self._words[_AT_ACTING // 8] = generation

    def acting(self) -> int:
        """Return the generation of the lease under which the child leads, 0: it does not."""
        return self._words[_AT_ACTING // 8]

    def doubt(self) -> None:
        self._words[_AT_DOUBTS // 8] += 1

    def doubts(self) -> int:
        """Return how often etcd has told the child that it knows no such lease."""
        return self._words[_AT_DOUBTS // 8]

    def count_fenced(self) -> None:
        self._words[_AT_FENCED // 8] += 1

    def fenced(self) -> int:
        """Return how many of the child's decisions etcd refused because their term was over."""
        return self._words[_AT_FENCED // 8]
