"""The thread around the elector: campaigns, registers the replica, and notices the end.

Losing leadership ends the process, and its guardian starts a fresh one: there
is no second life in which work of the first could still be under way.
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
from dtrain.protocol.errors import DtrainError, LeadershipLost, OutcomeUnknown, Unavailable
from dtrain.protocol.ids import ClusterName, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime import log
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.etcd.port import Etcd, Get, KeyValue, Put, Txn, flatten, put_if_absent
from dtrain.storage.etcd.session import Session

TRY_S_MAX = 1.5
LOOK_S = 0.1
"""The session is looked at this often, whatever else happens."""

REGISTER_AGAIN_S = 1.0


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
        rng: random.Random | None = None,
    ) -> None:
        self._etcd = etcd
        self._session = session
        self._keys = Keys(cluster)
        self._replica = replica
        self._clock = clock
        self._on_term = on_term
        self._on_over = on_over
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
        self._term: Term | None = None

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
            now = self._clock.monotonic()
            until = self._turn(now)
            if until is None:
                return
            self._register(self._clock.monotonic())
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
            if view.lease == 0:
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
            self._log.warning("campaign refused", code=error.code, error=error.message)
            return
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
        record = replace(self._replica, since=iso(self._clock.wall()))
        put = Put(self._keys.coordinator(record.replica), codec.encode(record), view.lease)
        try:
            self._etcd.txn(Txn(success=(put,)), deadline_s=min(TRY_S_MAX, view.ttl_s / 6))
        except DtrainError as error:
            self._register_at = now + REGISTER_AGAIN_S
            self._log.info("not registered yet", error=error.message)
            return
        self._registered = view.generation


def _holder(kv: KeyValue | None) -> Holder | None:
    if kv is None:
        return None
    try:
        nonce = codec.decode(LeaderRecord, kv.value).nonce
    except DtrainError:
        # Whoever wrote it, it is there, and it is not ours.
        nonce = ""
    return Holder(Term(kv.create_revision), kv.lease, nonce)
