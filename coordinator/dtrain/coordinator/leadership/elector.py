"""The campaign for the leader key, as a function of what came back.

One key, created if absent, bound to the session's lease; its create revision is
the term. There is no queue of candidates: with a handful of replicas there is
no herd, and a frozen candidate is never promoted by order. Standbys try again
when the key is deleted, and at every ``retry_s`` whatever they have been told.
"""

from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import Term
from dtrain.storage.etcd.port import Get, KeyValue, Txn, TxnResult, flatten, put_if_absent

JITTER_S_MAX = 0.05
"""Standbys that hear of a deletion together spread their tries over this."""


@dataclass(frozen=True, slots=True)
class Try:
    """Send this transaction now."""

    txn: Txn


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before ``until`` (monotonic), unless the key changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Lead:
    """The key is ours: act under this term until ``StepDown``."""

    term: Term
    until: float
    """When to look at the key again."""


@dataclass(frozen=True, slots=True)
class StepDown:
    """Whatever this life of the process was, it is over: end it."""

    why: str


Action = Try | Wait | Lead | StepDown


class Elector:
    """One campaign of one lease. ``next`` says what to do, ``on_…`` what came of it."""

    def __init__(self, key: str, record: LeaderRecord, lease: int, *, retry_s: float) -> None:
        assert lease > 0, "a leader key without a lease would outlive its leader"
        self._key = key
        self._record = record
        self._lease = lease
        self._retry_s = retry_s
        self._try_at = 0.0
        self._term: Term | None = None
        self._over = ""

    @property
    def term(self) -> Term | None:
        """The term won, or None."""
        return self._term

    def next(self, now: float, lease: int) -> Action:
        """Return what to do now, given the lease that the session holds (0: none)."""
        if self._over:
            return StepDown(self._over)
        if lease != self._lease:
            # Another lease means another life: what the old one owned is gone or will be.
            return self._end("the session's lease has changed")
        if now < self._try_at:
            return Wait(self._try_at) if self._term is None else Lead(self._term, self._try_at)
        if self._term is not None:
            return Try(Txn(success=(Get(self._key),)))
        return Try(put_if_absent(self._key, codec.encode(self._record), self._lease))

    def on_result(self, result: TxnResult, now: float) -> None:
        """A transaction of ``Try`` was answered."""
        self._try_at = now + self._retry_s
        if self._term is None and result.succeeded:
            self._term = Term(result.revision)
            return
        self._saw(flatten(result.responses).get(self._key), now)

    def on_failure(self, now: float) -> None:
        """A transaction of ``Try`` failed, or may yet be applied."""
        # Trying again is how an unknown outcome is resolved: our own key is recognised by its nonce.
        self._try_at = now + min(self._retry_s, 0.2)

    def on_key(self, kv: KeyValue | None, now: float, draw: float) -> None:
        """The mirror says what the key is now; ``draw`` in [0, 1) spreads the tries."""
        if self._term is None:
            if kv is None:
                self._try_at = min(self._try_at, now + draw * JITTER_S_MAX)
            return
        # A mirror may be late: only what is newer than our own win says anything.
        if kv is not None and kv.create_revision > self._term:
            self._end("another replica leads")
        elif kv is None:
            # A nudge, not proof: read the key now.
            self._try_at = now

    def _saw(self, kv: KeyValue | None, now: float) -> None:
        if self._term is not None:
            if kv is None or kv.create_revision != self._term:
                self._end("the leader key is gone" if kv is None else "another replica leads")
            return
        if kv is None:
            self._try_at = now
        elif kv.lease == self._lease and self._is_ours(kv):
            # A create of ours whose answer was lost. Its term is what the key says.
            self._term = Term(kv.create_revision)

    def _is_ours(self, kv: KeyValue) -> bool:
        try:
            return codec.decode(LeaderRecord, kv.value).nonce == self._record.nonce
        except DtrainError:
            return False

    def _end(self, why: str) -> StepDown:
        self._over = why
        return StepDown(why)
