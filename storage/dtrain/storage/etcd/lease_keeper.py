"""The guardian's thread that holds one lease at a time. Standard library only.

It grants, renews and says how it stands; it decides nothing. Deadlines count
from before the request that renewed the lease was sent: etcd cannot have
started to count later than it received that request.
"""

import bisect
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dtrain.storage.etcd.access import Access, LiveAccess
from dtrain.storage.etcd.lease_client import (
    AccessDenied,
    LeaseClient,
    LeaseGone,
    NotAnswered,
    boottime,
    new_lease_id,
)
from dtrain.storage.etcd.session_memory import (
    KILLS,
    RENEWAL_BOUNDS_S,
    GuardianCounts,
    LeaseView,
    SessionMemory,
)

DEMOTE_SHARE = 0.70
KILL_SHARE = 0.85
TRY_S_MAX = 1.5
_RETRY_S = 0.25
_COMPLAIN_EVERY_S = 5.0
_COMPLAIN_OF_DENIAL_EVERY_S = 60.0
"""Until a person has put the user or its role right, there is nothing new to say."""


@dataclass(frozen=True, slots=True)
class Held:
    """How the lease stands. ``lost``: etcd said that it is gone."""

    lease: int = 0
    generation: int = 0
    ttl_s: float = 0.0
    sent_at: float = 0.0
    lost: bool = False

    @property
    def kill_at(self) -> float:
        return self.sent_at + KILL_SHARE * self.ttl_s

    def view(self) -> LeaseView:
        """Return what the child may know; a lost lease is nothing to act on."""
        demote_at = 0.0 if self.lost else self.sent_at + DEMOTE_SHARE * self.ttl_s
        return LeaseView(self.lease, self.generation, self.ttl_s, demote_at, self.kill_at)


class LeaseKeeper:
    """``on_change`` wakes the guardian: granted or lost."""

    def __init__(
        self,
        access: Access,
        *,
        ttl_s: int,
        renew_share: float,
        on_change: Callable[[], None],
        report: Callable[..., Any],
    ) -> None:
        self._access = LiveAccess(access, boottime, report)
        self._ttl_s = ttl_s
        self._renew_share = renew_share
        self._on_change = on_change
        self._report = report
        self._client = LeaseClient(self._access)
        # Replicas that start together should not all turn to the first member.
        for _ in range(random.randrange(self._client.members)):  # noqa: S311 - only spreads load
            self._client.rotate()
        self._condition = threading.Condition()
        self._held = Held()
        self._wanted = False
        self._stopping = False
        self._candidate = 0
        self._due = 0.0
        self._orphans: list[int] = []
        self._memory: SessionMemory | None = None
        self._counts = GuardianCounts()
        self._failures = 0
        self._complained_at = float("-inf")
        self._denied = False
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify_all()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def held(self) -> Held:
        with self._condition:
            return self._held

    @property
    def revision_seen(self) -> int:
        """The newest revision that etcd has told, over all children of this guardian."""
        return self._client.revision_seen

    def share_with(self, memory: SessionMemory | None) -> None:
        """Publish to the page of this child from now on."""
        with self._condition:
            self._memory = memory
            self._publish()
            if memory is not None:
                memory.publish_counts(self._counts)

    def acquire(self) -> None:
        """Grant a lease as soon as etcd answers; ``held`` tells when."""
        with self._condition:
            self._wanted = True
            self._condition.notify_all()

    def child_ended(self, fenced: int, killed: str = "") -> None:
        """Count what a child leaves: decisions of it that etcd refused, and why it was killed ("": not)."""
        with self._condition:
            kills = tuple(n + (why == killed) for why, n in zip(KILLS, self._counts.kills, strict=True))
            self._counts = replace(self._counts, kills=kills, fenced=self._counts.fenced + fenced)

    def check(self) -> None:
        """Renew now: somebody has heard that the lease is gone."""
        with self._condition:
            self._due = 0.0
            self._condition.notify_all()

    def drop(self) -> int:
        """Forget the lease without revoking it and return its id."""
        with self._condition:
            lease = self._held.lease
            self._held = replace(self._held, lease=0, ttl_s=0.0, sent_at=0.0, lost=False)
            self._wanted = False
            self._due = 0.0
            self._publish()
            return lease

    def revoke(self, lease: int) -> bool:
        """Revoke a dropped lease now, asking each member once; else it is retried with the next renewals.

        Blocks for a try per member. Only for when the child is gone.
        """
        client = LeaseClient(self._access)
        try:
            for _ in range(client.members):
                try:
                    client.revoke(lease, self._try_s())
                except NotAnswered as error:
                    self._complain(error)
                    client.rotate()
                else:
                    return True
        finally:
            client.close()
        with self._condition:
            self._orphans.append(lease)
        return False

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._stopping:
                    self._client.close()
                    return
                held, now = self._held, boottime()
                if (held.lease == 0 and not self._wanted) or held.lost:
                    self._condition.wait()
                    continue
                if now < self._due:
                    self._condition.wait(self._due - now)
                    continue
            sent_at = boottime()
            try:
                if held.lease:
                    self._renewed(held, sent_at, self._client.keepalive(held.lease, self._try_s()))
                else:
                    self._candidate = self._candidate or new_lease_id()
                    ttl_s = self._client.grant(self._candidate, self._ttl_s, self._try_s())
                    self._granted(self._candidate, sent_at, ttl_s)
                self._worked()
            except LeaseGone:
                self._gone(held)
            except NotAnswered as error:
                self._failed(error)
            if held.lease:
                self._count(boottime() - sent_at)

    def _granted(self, lease: int, sent_at: float, ttl_s: float) -> None:
        self._candidate = 0
        with self._condition:
            self._held = Held(lease, self._held.generation + 1, ttl_s, sent_at)
            self._due = self._next_renewal(sent_at, ttl_s)
            self._publish()
        self._report("lease granted", lease=f"{lease:x}", ttl_s=ttl_s, generation=self._held.generation)
        self._on_change()

    def _renewed(self, held: Held, sent_at: float, ttl_s: float) -> None:
        with self._condition:
            # Dropped meanwhile: the answer is about a lease that nobody acts on any more.
            if self._held.lease != held.lease:
                return
            self._held = replace(self._held, ttl_s=ttl_s, sent_at=sent_at)
            self._due = self._next_renewal(sent_at, ttl_s)
            self._publish()

    def _gone(self, held: Held) -> None:
        with self._condition:
            if self._held.lease != held.lease:
                return
            self._held = replace(self._held, lost=True)
            self._due = 0.0
            self._publish()
        self._report("lease lost", lease=f"{held.lease:x}")
        self._on_change()

    def _failed(self, error: NotAnswered) -> None:
        self._failures += 1
        self._client.rotate()
        self._complain(error)
        # The other members at once; only after a whole round a pause.
        if self._failures % self._client.members == 0:
            pause_s = random.uniform(0.5, 1.0) * min(_RETRY_S, self._ttl_s / 20)  # noqa: S311 - jitter
            with self._condition:
                self._due = boottime() + pause_s

    def _worked(self) -> None:
        if self._failures:
            self._report("etcd answers again", endpoints=list(self._access.endpoints()[0]))
        self._failures = 0
        while self._orphans:
            with self._condition:
                lease = self._orphans.pop()
            try:
                self._client.revoke(lease, self._try_s())
            except NotAnswered:
                with self._condition:
                    self._orphans.append(lease)
                return

    def _complain(self, error: NotAnswered) -> None:
        now, denied = boottime(), isinstance(error, AccessDenied)
        every_s = _COMPLAIN_OF_DENIAL_EVERY_S if denied else _COMPLAIN_EVERY_S
        if now - self._complained_at >= every_s or denied != self._denied:
            self._complained_at, self._denied = now, denied
            event = "etcd denies access" if denied else "etcd does not answer"
            self._report(event, endpoints=list(self._access.endpoints()[0]), error=str(error))

    def _count(self, took_s: float) -> None:
        at = bisect.bisect_left(RENEWAL_BOUNDS_S, took_s)
        with self._condition:
            known = self._counts
            renewals = tuple(n + (number == at) for number, n in enumerate(known.renewals))
            took_us = max(0, round(took_s * 1e6))
            self._counts = replace(known, renewals=renewals, renewals_us=known.renewals_us + took_us)
            if self._memory is not None:
                self._memory.publish_counts(self._counts)

    def _publish(self) -> None:
        if self._memory is not None:
            self._memory.publish(self._held.view())

    def _next_renewal(self, sent_at: float, ttl_s: float) -> float:
        # Earlier by up to a tenth, so that a fleet that started together drifts apart.
        return sent_at + random.uniform(0.9, 1.0) * self._renew_share * ttl_s  # noqa: S311 - jitter

    def _try_s(self) -> float:
        return min(TRY_S_MAX, self._ttl_s / 6)
