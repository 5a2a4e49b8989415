"""The thread around the elector: campaigns, registers the replica, and notices the end.

Losing leadership ends the process, and its guardian starts a fresh one: there
is no second life in which work of the first could still be under way.

Nobody campaigns who is not registered, and an id is registered once: two
replicas of one name, by a copied configuration, would take each other's records
for their own. A key that a lost host left behind goes with its lease. One that
stays longer is somebody's if something answers at its address; else it is waited
for: an etcd whose leader keeps changing extends leases of the dead as well.
"""

import queue
import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace

from dtrain.coordinator.leadership.elector import Claim, Elector, Holder, Lead, Look, StepDown, Wait
from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord, ReplicaRecord
from dtrain.protocol.errors import (
    DtrainError,
    ErrorCode,
    LeadershipLost,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from dtrain.protocol.ids import ClusterName, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime import log
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.etcd.port import Etcd, Get, KeyValue, Txn, flatten, put_if_absent
from dtrain.storage.etcd.session import Session

TRY_S_MAX = 1.5
LOOK_S = 0.1
"""The session is looked at this often, whatever else happens."""

REGISTER_AGAIN_S = 1.0
TAKEN_TTLS, TAKEN_S = 1.5, 2.0
"""A foreign key of our id is waited for: so many TTLs, and a little for etcd's own elections."""


class Leadership:
    """Campaigns for as long as it runs. Callbacks come from its thread and must only enqueue."""

    def __init__(
        self,
        etcd: Etcd,
        session: Session,
        cluster: ClusterName,
        replica: ReplicaRecord,
        *,
        clock: Clock,
        on_term: Callable[[Term], None],
        on_over: Callable[[str], None],
        answers: Callable[[str], bool],
        on_taken: Callable[[DtrainError], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Remember.

        ``answers`` tells whether another process serves at an address; it may take a second.
        ``on_taken`` hears that another replica lives under this id (default: ``on_over``).
        """
        self._etcd = etcd
        self._session = session
        self._keys = Keys(cluster)
        self._replica = replica
        self._clock = clock
        self._on_term = on_term
        self._on_over = on_over
        self._answers = answers
        self._on_taken = on_taken
        self._rng = rng or random.Random()  # noqa: S311 - jitter only
        self._log = log.get("leadership").bind(replica=replica.replica)
        self._nudges: queue.SimpleQueue[KeyValue | None] = queue.SimpleQueue()
        self._woken = threading.Event()
        self._stop = threading.Event()
        self._elector: Elector | None = None
        self._record: LeaderRecord | None = None
        self._lease = 0
        self._generation = 0
        self._registered = 0
        self._register_at = 0.0
        self._other: tuple[int, float] | None = None
        """Lease of a foreign key of our id, and since when it has been seen without a break."""
        self._term: Term | None = None
        self._refusal = ""

    @property
    def term(self) -> Term | None:
        """The term under which this replica leads, or None."""
        return self._term

    def may_act(self) -> bool:
        """Whether a leader's message may leave now. A belt: the fence in etcd is the lock."""
        return (
            self._term is not None
            and not self._stop.is_set()
            and self._session.may_act(self._clock.monotonic())
        )

    def nudge(self, kv: KeyValue | None) -> None:
        """The mirror has seen the leader key change to ``kv``."""
        self._nudges.put(kv)
        self._woken.set()

    def stop(self) -> None:
        """Campaign and act no more; the lease is the guardian's to revoke."""
        self._stop.set()
        self._woken.set()

    def run(self) -> None:
        """Campaign until ``stop`` or the end of leadership. The body of the lease thread."""
        while not self._stop.is_set():
            self._register(self._clock.monotonic())
            if self._stop.is_set():
                return
            until = self._turn(self._clock.monotonic())
            if until is None:
                return
            wait_s = min(until - self._clock.monotonic(), LOOK_S)
            if wait_s > 0:
                self._woken.wait(wait_s)
            self._woken.clear()
            self._take_nudges()

    def _turn(self, now: float) -> float | None:
        """Do one thing and return when to do the next; None: it is over."""
        view = self._session.view()
        if self._term is not None and not self._session.may_act(now):
            self._over("the lease was not renewed in time")
            return None
        if self._elector is None or (self._term is None and view.generation != self._generation):
            if view.lease == 0 or view.generation != self._registered:
                return now + LOOK_S
            self._campaign(view.lease, view.generation, view.ttl_s)
        assert self._elector is not None
        if self._term is None and now >= view.demote_at:
            # Winning with a lease that may be gone would be leading nothing.
            return now + LOOK_S
        action = self._elector.next(now, view.lease if view.generation == self._generation else 0)
        match action:
            case StepDown(why):
                if self._term is not None:
                    self._over(why)
                    return None
                self._elector = None
                return now
            case Wait(until) | Lead(_, until):
                return until
            case Claim() | Look():
                self._try(action, min(TRY_S_MAX, view.ttl_s / 6))
                return None if self._stop.is_set() else now

    def _campaign(self, lease: int, generation: int, ttl_s: float) -> None:
        nonce = secrets.token_hex(8)
        self._record = LeaderRecord(
            self._replica.replica, self._replica.address, nonce, iso(self._clock.wall())
        )
        self._elector = Elector(lease, nonce, retry_s=max(0.5, ttl_s / 4))
        self._lease = lease
        self._generation = generation

    def _try(self, action: Claim | Look, deadline_s: float) -> None:
        assert self._elector is not None
        key = self._keys.leader
        txn = Txn(success=(Get(key),))
        if isinstance(action, Claim):
            assert self._record is not None
            txn = put_if_absent(key, codec.encode(self._record), self._lease)
        try:
            result = self._etcd.txn(txn, deadline_s=deadline_s)
        except (Unavailable, OutcomeUnknown) as error:
            self._elector.on_failure(self._clock.monotonic())
            self._log.info("campaign interrupted", error=error.message)
            return
        except DtrainError as error:
            # A lease that has just gone, or a role without permission: the next look tells.
            self._elector.on_failure(self._clock.monotonic())
            if error.message != self._refusal:
                self._refusal = error.message
                self._log.warning("campaign refused", code=error.code, error=error.message)
            return
        self._refusal = ""
        now = self._clock.monotonic()
        holder = _holder(flatten(result.responses).get(key))
        if isinstance(action, Claim):
            self._elector.on_claimed(Term(result.revision) if result.succeeded else None, holder, now)
        else:
            self._elector.on_looked(holder, now)
        if self._term is None and self._elector.term is not None:
            self._won(self._elector.term)

    def _won(self, term: Term) -> None:
        try:
            # Before anything acts: from here on the guardian kills what outlives its lease.
            self._session.set_acting(True, self._generation)
        except LeadershipLost as error:
            self._over(error.message)
            return
        self._term = term
        self._on_term(term)

    def _over(self, why: str) -> None:
        self._stop.set()
        self._term = None
        self._log.error("leadership lost", reason=why)
        self._on_over(why)

    def _take_nudges(self) -> None:
        while not self._nudges.empty():
            kv = self._nudges.get()
            if self._elector is not None:
                self._elector.on_key(_holder(kv), self._clock.monotonic(), self._rng.random())

    def _register(self, now: float) -> None:
        """Keep ``coordinators/<id>`` under the present lease: with a new lease the key is gone."""
        view = self._session.view()
        if not view.lease or view.generation == self._registered or now < self._register_at:
            return
        record = replace(self._replica, since=iso(self._clock.wall()), ttl_s=view.ttl_s)
        key = self._keys.coordinator(record.replica)
        try:
            result = self._etcd.txn(
                put_if_absent(key, codec.encode(record), view.lease),
                deadline_s=min(TRY_S_MAX, view.ttl_s / 6),
            )
        except DtrainError as error:
            # What cannot be seen proves nothing about its lease.
            self._register_at, self._other = now + REGISTER_AGAIN_S, None
            self._log.info("not registered yet", error=error.message)
            return
        found = flatten(result.responses).get(key)
        # A lease is nobody's but ours: the key under it is an earlier write whose answer was lost.
        if result.succeeded or found is None or found.lease == view.lease:
            if result.succeeded or found is not None:
                self._registered, self._other = view.generation, None
            return
        self._register_at = now + min(REGISTER_AGAIN_S, view.ttl_s / 10)
        self._wait_for_other(found, view.ttl_s, now)

    def _wait_for_other(self, found: KeyValue, ttl_s: float, now: float) -> None:
        """Our id is in use, or was by a host that is lost: the end of its lease tells."""
        if self._other is None or self._other[0] != found.lease:
            self._other = (found.lease, now)
            self._log.warning("replica id in use", lease=f"{found.lease:x}")
        try:
            other = codec.decode(ReplicaRecord, found.value)
        except DtrainError:
            other = ReplicaRecord(self._replica.replica, "?")
        if now - self._other[1] < TAKEN_TTLS * max(ttl_s, other.ttl_s) + TAKEN_S:
            return
        if not self._answers(other.address):
            self._log.warning("replica id still in use", lease=f"{found.lease:x}", silent=other.address)
            self._other = (found.lease, now)
            return
        error = Refused(
            ErrorCode.REPLICA_ID_TAKEN,
            f"another coordinator runs as {self._replica.replica}: at {other.address}, process {other.pid} "
            f"on {other.host or 'an unknown host'}",
            fix="give each replica an --id of its own, or stop the other one",
        )
        if self._on_taken is None:
            self._over(error.message)
            return
        self._stop.set()
        self._on_taken(error)


def _holder(kv: KeyValue | None) -> Holder | None:
    if kv is None:
        return None
    try:
        nonce = codec.decode(LeaderRecord, kv.value).nonce
    except DtrainError:
        # Whoever wrote it, it is there, and it is not ours.
        nonce = ""
    return Holder(Term(kv.create_revision), kv.lease, nonce)
