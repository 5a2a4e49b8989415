"""What the nodes of a run have written: read from a mirror, changed by compare-and-swap."""

import contextlib
import time
from dataclasses import dataclass

from dtrain.integrations.rendezvous.core import RunState, living
from dtrain.integrations.rendezvous.records import Keys, decode, encode
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Unavailable
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Compare, Etcd, KeyValue, Operation, Put, Target, Txn

PAUSE_S = 0.2
"""Before etcd is asked again after a call that failed."""

OWN_WRITE_S = 5.0
"""How long a write of ours may take to come back by the watch before we look without it."""


@dataclass(frozen=True, slots=True)
class View:
    """The run at one moment, without the nodes that have gone."""

    state: RunState
    alive: frozenset[str]
    revision: int
    """Of the whole view; something newer may exist."""
    state_revision: int
    """0: there is no state yet."""
    state_lease: int


class Board:
    """One run's keys. Safe for several threads; ``close`` ends it."""

    def __init__(self, etcd: Etcd, keys: Keys, ttl_s: int) -> None:
        self.keys = keys
        self._etcd = etcd
        self._ttl_s = ttl_s
        self._mirror = Mirror(etcd, keys.prefix)
        self._decoded: tuple[int, RunState] = (0, RunState())

    def open(self, timeout_s: float) -> None:
        """Reach etcd and begin to follow the run.

        Raises:
            Unavailable: no member answered in time.
            Refused: etcd lets this user not read here.
        """
        end = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(0.5, end - time.monotonic())
                self._etcd.range(self.keys.state, deadline_s=left_s)
                break
            except Unavailable:
                if time.monotonic() + PAUSE_S > end:
                    raise
            time.sleep(PAUSE_S)
        self._mirror.start()
        if not self._mirror.wait_for(1, max(OWN_WRITE_S, end - time.monotonic())):
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "etcd answers, and tells nothing of the run's keys")

    def close(self) -> None:
        """Stop following; the client stays open."""
        self._mirror.close()

    def look(self, first_round: int = 0) -> View:
        """Return what is known of the run. ``first_round``: the number of a new run's first round.

        Raises:
            Refused: BAD_RECORD, or ETCD_WENT_BACK.
        """
        if self._mirror.alarm is not None:
            raise self._mirror.alarm
        revision = self._mirror.revision
        found = {kv.key: kv for kv in self._mirror.prefix(self.keys.prefix)}
        kv = found.pop(self.keys.state, None)
        alive = frozenset(key[len(self.keys.nodes) :] for key in found if key.startswith(self.keys.nodes))
        state = RunState(round=first_round) if kv is None else self._read(kv)
        return View(
            living(state, alive), alive, revision, kv.mod_revision if kv else 0, kv.lease if kv else 0
        )

    def wait_beyond(self, view: View, timeout_s: float) -> None:
        """Return when something may have changed since ``view``, or after ``timeout_s``."""
        self._mirror.wait_for(view.revision + 1, max(0.0, timeout_s))

    def replace(self, view: View, state: RunState, node: str = "", lease: int = 0) -> bool:
        """Write ``state`` if nobody wrote since ``view``; False: look again.

        With ``node``, only while that node lives under ``lease``: one that was
        taken for dead must not write itself into a round.

        Raises:
            Refused: etcd does not take the write, and will not.
        """
        made = 0
        compares = [Compare(self.keys.state, Target.MOD, view.state_revision)]
        if node:
            compares.append(Compare(self.keys.node(node), Target.LEASE, lease))
        try:
            if not view.state_revision:
                made = new_lease_id()
                self._etcd.grant(self._ttl_s, made)
            put: tuple[Operation, ...] = (Put(self.keys.state, encode(state), made or view.state_lease),)
            result = self._etcd.txn(Txn(tuple(compares), put))
        except NotFound:
            # The state's lease has ended, and the state with it: the mirror is about to tell.
            self.wait_beyond(view, PAUSE_S)
            return False
        except (Unavailable, OutcomeUnknown):
            # If it was applied after all, the next look shows it, and nothing is left to be done.
            time.sleep(PAUSE_S)
            return False
        if made and not result.succeeded:
            with contextlib.suppress(DtrainError):
                self._etcd.revoke(made)
        self._mirror.wait_for(result.revision, OWN_WRITE_S)
        return result.succeeded

    def await_revision(self, revision: int) -> None:
        """Wait until a write at ``revision`` can be seen."""
        self._mirror.wait_for(revision, OWN_WRITE_S)

    def _read(self, kv: KeyValue) -> RunState:
        # Agents look ten times a second; most of the time nothing is new.
        revision, state = self._decoded
        if revision != kv.mod_revision:
            state = decode(kv.value)
            self._decoded = kv.mod_revision, state
        return state
