"""The campaign for the leader key, as a function of what came back. Pure.

One key, created if absent, bound to the session's lease; its create revision is
the term. There is no queue of candidates: with a handful of replicas there is
no herd, and a frozen candidate is never promoted by order. Standbys try again
when the key is deleted, and at every ``retry_s`` whatever they have been told.
"""

from dataclasses import dataclass

from dtrain.protocol.ids import Term

JITTER_S_MAX = 0.05
"""Standbys that hear of a deletion together spread their tries over this."""

LOOK_AGAIN_S = 0.2
"""After a failed try: trying again is how an unknown outcome is resolved."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the leader key. ``term`` is its create revision."""

    term: Term
    lease: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Create the key if it is absent, bound to our lease; answer by ``on_claimed``."""


@dataclass(frozen=True, slots=True)
class Look:
    """Read the key; answer by ``on_looked``."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before ``until`` (monotonic), unless the key changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Lead:
    """The key is ours: act under this term. ``until``: when to look at the key again."""

    term: Term
    until: float


@dataclass(frozen=True, slots=True)
class StepDown:
    """Whatever this life of the process was, it is over: end it."""

    why: str


Action = Claim | Look | Wait | Lead | StepDown


class Elector:
    """One campaign of one lease. ``next`` says what to do, ``on_…`` what came of it."""

    def __init__(self, lease: int, nonce: str, *, retry_s: float) -> None:
        assert lease > 0, "a leader key without a lease would outlive its leader"
        self._lease = lease
        self._nonce = nonce
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
        if not self._over and lease != self._lease:
            # Another lease means another life: what the old one owned is gone or will be.
            self._over = "the session's lease has changed"
        if self._over:
            return StepDown(self._over)
        if now < self._try_at:
            return Wait(self._try_at) if self._term is None else Lead(self._term, self._try_at)
        return Claim() if self._term is None else Look()

    def on_claimed(self, won: Term | None, holder: Holder | None, now: float) -> None:
        """The claim was answered: ``won``, the term, or who holds the key instead."""
        self._try_at = now + self._retry_s
        if won is not None:
            self._term = won
        elif holder is not None and (holder.lease, holder.nonce) == (self._lease, self._nonce):
            # A claim of ours whose answer was lost. Its term is what the key says.
            self._term = holder.term

    def on_looked(self, holder: Holder | None, now: float) -> None:
        """The key was read while we lead."""
        self._try_at = now + self._retry_s
        if holder is None:
            self._over = "the leader key is gone"
        elif holder.term != self._term:
            self._over = "another replica leads"

    def on_failure(self, now: float) -> None:
        """A claim or a look failed, or may yet happen."""
        self._try_at = now + min(self._retry_s, LOOK_AGAIN_S)

    def on_key(self, holder: Holder | None, now: float, draw: float) -> None:
        """The mirror says who holds the key now; ``draw`` in [0, 1) spreads the tries."""
        if self._term is None:
            if holder is None:
                self._try_at = min(self._try_at, now + draw * JITTER_S_MAX)
        elif holder is None:
            # A mirror may be late: a nudge, not proof. Read the key now.
            self._try_at = now
        elif holder.term > self._term:
            self._over = "another replica leads"
