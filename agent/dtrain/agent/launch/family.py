"""The launcher's children: who runs, who has ended, who must go.

Processes are attributed to an attempt by descent from a rank, by a rank's
process group, or by DTRAIN_ATTEMPT in the environment they were exec'd with, so
that a clean-up also finds what a rank left behind when it died.
"""

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

from dtrain.agent.launch import processes
from dtrain.agent.launching import LiveRank, RankEnded, Unkilled
from dtrain.protocol.ids import Attempt, Rank
from dtrain.protocol.ranklink import ENV_ATTEMPT

ALL_ATTEMPTS = float("inf")


@dataclass(slots=True)
class RankChild:
    """A rank of ours; ``ended`` once it has been reaped."""

    live: LiveRank
    log_dir: str
    error_file: str
    ended: RankEnded | None = None


@dataclass(slots=True)
class StoreChild:
    """A store of ours; ``port`` 0 until it has said where it listens."""

    attempt: Attempt
    pid: int
    answer_fd: int
    port: int = 0


@dataclass(slots=True)
class Family:
    """All children by pid. Ended ranks are kept until their attempt is cleared."""

    ranks: dict[int, RankChild] = field(default_factory=dict)
    stores: dict[int, StoreChild] = field(default_factory=dict)
    newest_forked: int = -1
    household: frozenset[tuple[int, int]] = frozenset()
    """Pid and start time of helpers that preloaded modules started: of no attempt, used by all."""

    def adopt_household(self) -> None:
        """Take the descendants of this moment, before any rank, for such helpers."""
        around = processes.look_around()
        mine = processes.descendants(os.getpid(), around) - set(self.stores)
        self.household = frozenset((pid, around[pid].start_time) for pid in mine)

    def running(self) -> list[RankChild]:
        return [child for child in self.ranks.values() if child.ended is None]

    def of_attempt(self, attempt: Attempt) -> dict[Rank, RankChild]:
        return {child.live.rank: child for child in self.ranks.values() if child.live.attempt == attempt}

    def store_of(self, attempt: Attempt) -> StoreChild | None:
        return next((store for store in self.stores.values() if store.attempt == attempt), None)

    def newest_store(self) -> StoreChild | None:
        serving = [store for store in self.stores.values() if store.port]
        return max(serving, key=lambda store: store.attempt, default=None)

    def forget_below(self, attempt: int) -> None:
        """Drop ended ranks of older attempts: the agent has been told that they are cleared."""
        self.ranks = {
            pid: child
            for pid, child in self.ranks.items()
            if child.ended is None or child.live.attempt >= attempt
        }

    def older_than(self, attempt: float, *, with_stores: bool) -> set[int]:
        """Living pids that belong to attempts lower than ``attempt``.

        A process that no attempt can be told of counts as old only while no
        rank of ``attempt`` or a later one was started: afterwards it may be theirs.
        """
        around = processes.look_around()
        mine = processes.descendants(os.getpid(), around)
        attempt_of = {child.live.process.pid: child.live.attempt for child in self.ranks.values()}
        if with_stores:
            attempt_of |= {store.pid: store.attempt for store in self.stores.values()}
        spared = set() if with_stores else set(self.stores)
        if attempt != ALL_ATTEMPTS:
            spared |= {pid for pid in mine if (pid, around[pid].start_time) in self.household}
        found = set()
        for pid in mine - spared:
            owner = self._owner(pid, around, attempt_of)
            old = owner < attempt if owner is not None else self.newest_forked < attempt
            # Ours are not over before they are reaped, whatever they look like.
            if old and (pid in attempt_of or not processes.is_over(around[pid])):
                found.add(pid)
        return found

    def named(self, pids: Iterable[int]) -> tuple[Unkilled, ...]:
        """Processes by lasting identity, with the rank each is or descends from."""
        around = processes.look_around()
        rank_of = {pid: child.live.rank for pid, child in self.ranks.items()}
        found = []
        for pid in pids:
            process = processes.identify(pid)
            if process is None:
                continue
            at: int | None = pid
            while at is not None and at in around and at not in rank_of and at != os.getpid():
                group = around[at].group
                at = group if group in rank_of else around[at].parent
            found.append(Unkilled(process, None if at is None else rank_of.get(at)))
        return tuple(found)

    def _owner(
        self, pid: int, around: dict[int, processes.Seen], attempt_of: dict[int, Attempt]
    ) -> int | None:
        at: int | None = pid
        while at is not None and at in around and at != os.getpid():
            if at in attempt_of:
                return attempt_of[at]
            if around[at].group in attempt_of:
                return attempt_of[around[at].group]
            at = around[at].parent
        told = processes.environment_value(pid, ENV_ATTEMPT)
        return int(told) if told is not None and told.isdigit() else None


def signal_all(pids: Iterable[int], number: int) -> None:
    """Signal processes that are our descendants; those just gone are none of our concern."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def signal_group(leader: int, number: int) -> None:
    """Signal the process group of an unreaped child (its id cannot have been used again)."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        signal_all((leader,), number)


@dataclass(slots=True)
class Clearing:
    """One clean-up under way: ask, then kill, then give up on what cannot die."""

    below: float
    ask_until: float
    """Monotonic time at which patience ends."""
    give_up_at: float | None = None
    asked: bool = False

    KILL_PATIENCE_S = 5.0

    def advance(self, family: Family, now: float) -> tuple[bool, tuple[int, ...]]:
        """Do what is due; (finished, pids that would not die)."""
        if self.give_up_at is None:
            left = family.older_than(self.below, with_stores=False)
            if left and now < self.ask_until:
                if not self.asked:
                    self.asked = True
                    signal_all(left, signal.SIGTERM)
                return False, ()
            self.give_up_at = now + self.KILL_PATIENCE_S
        left = family.older_than(self.below, with_stores=True)
        signal_all(left, signal.SIGKILL)
        if not left:
            return True, ()
        return now >= self.give_up_at, tuple(sorted(left))
