"""This node's place in a run: its lease, its key, and the thread that renews them.

The thread also renews the lease of the run's state if it is this node's turn.
A renewal that fails for want of etcd is no news: leases do not end while etcd
has no leader, and begin anew when it has one again.
"""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable

from dtrain.integrations.rendezvous.records import Keys
from dtrain.protocol.errors import DtrainError, NotFound, OutcomeUnknown, Unavailable
from dtrain.runtime import log
from dtrain.runtime.clock import SystemClock, iso
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.port import Etcd, put_if_absent

LEAVE_S = 2.0
"""How long a node that ends tries to give its lease back; after that the lease ends by itself."""


class Membership:
    """``enter`` and ``leave`` belong to one thread; all else is safe for several.

    ``lease_of_state`` returns the lease of the run's state if this node is to
    renew it, else 0.
    """

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        *,
        addr: str,
        ttl_s: int,
        interval_s: float,
        lease_of_state: Callable[[str], int],
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._addr = addr
        self._ttl_s = ttl_s
        self._interval_s = interval_s
        self._lease_of_state = lease_of_state
        self._log = log.get("rendezvous")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self.node = ""
        """The present id; "" outside."""
        self.lease = 0
        self.lost = False
        """The lease ended although it was renewed: the others have gone on without this node."""

    def enter(self) -> int:
        """Become a living node under a new id; return the revision at which it is one.

        Raises:
            Unavailable: etcd does not answer.
            OutcomeUnknown: it may have happened, under an id that nobody uses and that soon ends.
            Refused: etcd does not take the write, and will not.
        """
        lease = new_lease_id()
        # Containers have equal process ids, and sometimes equal addresses.
        node = f"{self._addr}_{os.getpid()}_{secrets.token_hex(4)}"
        value = {"v": 1, "addr": self._addr, "pid": os.getpid(), "since": iso(SystemClock().wall())}
        self._etcd.grant(self._ttl_s, lease)
        result = self._etcd.txn(put_if_absent(self._keys.node(node), json.dumps(value).encode(), lease))
        self.node, self.lease, self.lost, self._pid = node, lease, False, os.getpid()
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="rendezvous-lease", daemon=True)
            self._thread.start()
        return result.revision

    def leave(self) -> None:
        """End the lease, so that the others know at once. A forked child, and a second call, do nothing."""
        if self._pid != os.getpid():
            return
        self._stop.set()
        lease, self.node, self.lease = self.lease, "", 0
        if lease:
            with contextlib.suppress(DtrainError):
                self._etcd.revoke(lease, deadline_s=LEAVE_S)

    def _renew(self) -> None:
        while not self._stop.wait(self._interval_s):
            lease = self.lease
            try:
                self._etcd.keepalive(lease, deadline_s=self._interval_s)
            except NotFound:
                if lease == self.lease and not self._stop.is_set() and not self.lost:
                    self.lost = True
                    self._log.warning("the lease of this node has ended; it joins again", node=self.node)
            except (Unavailable, OutcomeUnknown) as error:
                self._log.warning("the lease could not be renewed now", node=self.node, error=str(error))
            except DtrainError as error:
                self._log.error("etcd refuses to renew the lease", error=str(error), fix=error.fix)
            with contextlib.suppress(DtrainError):
                of_state = self._lease_of_state(self.node)
                if of_state:
                    self._etcd.keepalive(of_state, deadline_s=self._interval_s)
