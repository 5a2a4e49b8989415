"""torch's ``RendezvousHandler`` on etcd: what torchrun's agent calls.

The thread of ``next_rendezvous`` looks at the run, asks ``core.join`` for the
next step and takes it, until the round is complete. Rank 0 then opens a
TCPStore *for this round* and writes its address into the state; agents and
workers meet there, so that nothing of an older round can be mistaken for news,
and no machine has to outlive the others.

etcd may be away at any time after the start: a round that is complete goes on.
"""

import atexit
import contextlib
import os
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from dtrain.integrations.rendezvous import core
from dtrain.integrations.rendezvous.address import own_address
from dtrain.integrations.rendezvous.board import PAUSE_S, Board, View
from dtrain.integrations.rendezvous.core import Closed, Formed, Limits, RunState, TimedOut, Wait, Write
from dtrain.integrations.rendezvous.membership import Membership
from dtrain.integrations.rendezvous.records import keys_of
from dtrain.integrations.rendezvous.settings import Settings, parse
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Unavailable
from dtrain.runtime import log
from dtrain.runtime.addresses import bracketed
from dtrain.storage.etcd.open import open_etcd
from dtrain.storage.etcd.transport import GatewayEtcd

CONNECT_STORE_S = 10.0
"""One try to reach rank 0's store; between tries we look whether rank 0 still lives."""

STORE_LINGER_S = 5.0
"""The node that holds the round's store ends so much later than the others at most: they may be reading."""

PRIVATE_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torch's switch: 1 gives the workers a store of their own instead of the agents'."""


def open_handler(params: RendezvousParameters) -> "EtcdRendezvousHandler":
    """Return the handler of this node, connected to etcd.

    Raises:
        RendezvousConnectionError: etcd does not answer, or refuses this user.
        ValueError: a setting is wrong.
    """
    if not structlog.is_configured():
        log.configure(json_lines=False)
    settings = parse(params.endpoint, params.config, os.environ)
    with _torch_errors():
        handler = EtcdRendezvousHandler(
            open_etcd(settings.etcd),
            params.run_id,
            Limits(params.min_nodes, params.max_nodes),
            settings,
            backend=params.backend,
            addr=params.local_addr or "",
        )
        handler.open()
    return handler


class EtcdRendezvousHandler(RendezvousHandler):
    """One node's side of a run. torch calls it from one thread."""

    def __init__(
        self,
        etcd: GatewayEtcd,
        run_id: str,
        limits: Limits,
        settings: Settings,
        *,
        backend: str = "dtrain",
        addr: str = "",
    ) -> None:
        if not run_id:
            raise ValueError("the run id (--rdzv-id) must not be empty")
        self._etcd = etcd
        self._run_id = run_id
        self._limits = limits
        self._settings = settings
        self._backend = backend
        self._addr = addr or own_address(settings.etcd.endpoints)
        self._log = log.get("rendezvous")
        keys = keys_of(settings.prefix, run_id)
        self._board = Board(etcd, keys, settings.ttl)
        self._me = Membership(
            etcd,
            keys,
            addr=self._addr,
            ttl_s=settings.ttl,
            interval_s=settings.keep_alive_interval,
            lease_of_state=self._lease_to_renew,
        )
        self._round = -1
        """The last round that this node took part in."""
        self._server: tuple[int, TCPStore] | None = None
        """The store that this node holds, and for which round."""
        self._enough_since: tuple[int, float] | None = None
        self._turned_away = False
        self._closed = False

    def open(self) -> None:
        """Reach etcd. From here on, only SIGKILL keeps this node from giving its lease back at its end."""
        try:
            self._board.open(self._settings.connect_timeout)
        except BaseException:
            self._etcd.close()
            raise
        # torchrun does not shut a rendezvous down when a signal ends it: that would close it for all.
        atexit.register(_leave, weakref.ref(self))

    # torch's interface.

    def get_backend(self) -> str:
        return self._backend

    def get_run_id(self) -> str:
        return self._run_id

    @property
    def use_agent_store(self) -> bool:
        return os.environ.get(PRIVATE_STORE, "0") != "1"

    def next_rendezvous(self) -> RendezvousInfo:
        self._turned_away = False
        try:
            with _torch_errors():
                return self._meet()
        except (RendezvousTimeoutError, RendezvousConnectionError, RendezvousStateError):
            self._turned_away = True
            raise

    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for a new round; a lost one, or our own lost lease, counts as one."""
        with _torch_errors():
            view = self._board.look()
            waiting = core.reasons_to_restart(view.state, view.alive, self._me.node, self._round)
            return max(waiting, int(self._me.lost and not view.state.closed))

    def is_closed(self) -> bool:
        with _torch_errors():
            return self._board.look().state.closed

    def set_closed(self) -> None:
        with _torch_errors():
            self._close()

    def shutdown(self) -> bool:
        """Close the run and leave it; False: etcd could not be told, and the lease ends by itself.

        A node that could not get into a round leaves without closing: those who
        train, if any do, have no reason to hear of it.
        """
        if self._closed:
            return True
        self._closed = True
        told = True
        try:
            if not self._turned_away:
                with _torch_errors():
                    self._close()
        except (RendezvousTimeoutError, RendezvousConnectionError, RendezvousStateError) as error:
            self._log.warning("the run could not be closed", run=self._run_id, error=str(error))
            told = False
        with contextlib.suppress(DtrainError):
            self._linger()
        self.leave()
        self._board.close()
        self._etcd.close()
        self._server = None
        return told

    def leave(self) -> None:
        """Give this node's place up at once, and nothing else."""
        self._me.leave()

    # Meeting.

    def _meet(self) -> RendezvousInfo:
        deadline = time.monotonic() + self._settings.join_timeout
        said = ""
        while True:
            now = time.monotonic()
            expired = now > deadline
            if not self._is_registered(expired=expired):
                continue
            view = self._board.look(self._round + 1)
            state = view.state
            if state.round == self._round and not state.closed:
                turned = core.turn_over(state, self._me.node)
                if turned != state:
                    self._write(view, turned)
                    continue
            over_at = self._last_call_over_at(state, now)
            step = core.join(
                state, self._me.node, self._limits, expired=expired, last_call_over=now >= over_at
            )
            match step:
                case Write(new, restart_clock):
                    if self._write(view, new) and restart_clock:
                        deadline = time.monotonic() + self._settings.join_timeout
                case Wait(why):
                    if why != said:
                        said = why
                        self._log.info(why, run=self._run_id, node=self._me.node)
                    standing_by = self._me.node in state.standby
                    until = min(over_at, float("inf") if standing_by else deadline)
                    self._board.wait_beyond(view, min(until - now, self._settings.ttl) + 0.001)
                case Formed() as formed:
                    if info := self._at_store(view, formed, expired=expired):
                        return info
                case Closed(stood_by=True):
                    raise self._not_needed()
                case Closed():
                    raise RendezvousClosedError(
                        f"the run {self._run_id!r} has ended and takes no more agents; its id can be used "
                        f"again {self._settings.ttl} s after its last agent has gone"
                    )
                case TimedOut():
                    raise RendezvousTimeoutError(
                        f"no round of the run {self._run_id!r} formed within "
                        f"{self._settings.join_timeout:g} s: "
                        f"{said or 'etcd took no write'}; at least {self._limits.least} agents are needed"
                    )

    def _not_needed(self) -> BaseException:
        text = f"the run {self._run_id!r} has ended; this agent stood by and was not needed"
        if _is_torchrun():
            # Its launcher asks the result that this agent does not have whether it is a failure,
            # and ends with exit code 1 and a traceback.
            self._log.info(text)
            return SystemExit(0)
        return RendezvousGracefulExitError(text)

    def _is_registered(self, *, expired: bool) -> bool:
        """Make this node a living one if it is none."""
        if self._me.node and not self._me.lost and self._me.node in self._board.look().alive:
            return True
        try:
            self._board.await_revision(self._me.enter())
            # Whatever this node was before, the others have dropped it.
            self._enough_since = None
        except (Unavailable, OutcomeUnknown):
            if expired:
                raise
            time.sleep(PAUSE_S)
            return False
        return True

    def _last_call_over_at(self, state: RunState, now: float) -> float:
        """Return when this round stops waiting for more; counted from when this node saw enough of them."""
        if not core.enough(state, self._limits):
            self._enough_since = None
            return float("inf")
        if self._enough_since is None or self._enough_since[0] != state.round:
            self._enough_since = state.round, now
        return self._enough_since[1] + self._settings.last_call_timeout

    def _write(self, view: View, state: RunState) -> bool:
        return self._board.replace(view, state, self._me.node, self._me.lease)

    # The store of a round.

    def _at_store(self, view: View, formed: Formed, *, expired: bool) -> RendezvousInfo | None:
        """Return what torch wants to know, once the round's store is reached; None: look again."""
        state = view.state
        if any(node not in view.alive for node in state.world):
            # It was lost while the round formed: this one will not do anything any more.
            self._round = formed.round
            return None
        if formed.rank == 0 and state.store != (own := self._own_store(formed.round)):
            self._write(view, replace(state, store=own))
            return None
        if not state.store:
            if expired:
                raise RendezvousTimeoutError(
                    f"{state.world[0]} has rank 0 in round {formed.round} and opened no store in time"
                )
            self._board.wait_beyond(view, 1.0)
            return None
        host, _, port = state.store.rpartition(":")
        if formed.rank == 0 and self._server is not None:
            store: Store = self._server[1]
        else:
            reached = self._reach(host.strip("[]"), int(port), expired=expired)
            if reached is None:
                return None
            store = reached
        self._round = formed.round
        # A key of an agent must never be one of a worker: both use the same store.
        agents = PrefixStore("dtrain.agents", store)
        if self.use_agent_store:
            bootstrap = RendezvousStoreInfo(host.strip("[]"), int(port))
        else:
            bootstrap = RendezvousStoreInfo.build(formed.rank, agents, local_addr=self._addr)
        self._log.info(
            "round is complete", run=self._run_id, round=formed.round, rank=formed.rank, size=formed.size
        )
        return RendezvousInfo(agents, formed.rank, formed.size, bootstrap)

    def _own_store(self, round_number: int) -> str:
        """Return where this node holds the store of a round; a former round's is let go of."""
        if self._server is None or self._server[0] != round_number:
            server = TCPStore(self._addr, 0, is_master=True, multi_tenant=True, timeout=self._store_timeout())
            self._server = round_number, server
        return f"{bracketed(self._addr)}:{self._server[1].port}"

    def _reach(self, host: str, port: int, *, expired: bool) -> TCPStore | None:
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=CONNECT_STORE_S))
        except (DistError, RuntimeError) as error:
            if not expired:
                self._log.warning("rank 0's store cannot be reached yet", store=f"{bracketed(host)}:{port}")
                return None
            raise RendezvousConnectionError(
                f"the agent with rank 0 cannot be reached at {bracketed(host)}:{port}: "
                "give each agent an address that the others can reach, with --local-addr"
            ) from error
        store.set_timeout(self._store_timeout())
        return store

    def _store_timeout(self) -> timedelta:
        return timedelta(seconds=self._settings.store_timeout)

    # Ending.

    def _close(self) -> None:
        end = time.monotonic() + self._settings.close_timeout
        while True:
            view = self._board.look(self._round + 1)
            if view.state.closed:
                return
            if self._board.replace(view, replace(view.state, closed=True)):
                self._log.info("the run is closed", run=self._run_id, node=self._me.node)
                return
            if time.monotonic() > end:
                raise Unavailable(
                    ErrorCode.ETCD_UNAVAILABLE,
                    f"etcd took no write for {self._settings.close_timeout:g} s",
                    fix="check that etcd runs, has a quorum and is reachable from here",
                )

    def _linger(self) -> None:
        """Hold the store while other agents of its round are still there, for a moment."""
        end = time.monotonic() + STORE_LINGER_S
        while self._server is not None and time.monotonic() < end:
            view = self._board.look()
            others = (set(view.state.world) & view.alive) - {self._me.node}
            if self._server[0] != view.state.round or not others:
                return
            self._board.wait_beyond(view, end - time.monotonic())

    def _lease_to_renew(self, node: str) -> int:
        view = self._board.look()
        return view.state_lease if core.keeps_state(view.alive, node) else 0


def _leave(handler: "weakref.ref[EtcdRendezvousHandler]") -> None:
    found = handler()
    if found is not None:
        found.leave()


def _is_torchrun() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", "") == "torch.distributed.run" or Path(sys.argv[0]).name == "torchrun"


@contextlib.contextmanager
def _torch_errors() -> Iterator[None]:
    """Translate our errors into those that torch's agents know."""
    try:
        yield
    except (Unavailable, OutcomeUnknown) as error:
        raise RendezvousConnectionError(_sentence(error)) from error
    except DtrainError as error:
        kinds: dict[ErrorCode, type[Exception]] = {
            ErrorCode.BAD_RECORD: RendezvousStateError,
            ErrorCode.ETCD_WENT_BACK: RendezvousStateError,
        }
        raise kinds.get(error.code, RendezvousConnectionError)(_sentence(error)) from error


def _sentence(error: DtrainError) -> str:
    return f"[{error.code}] {error.message}" + (f"; {error.fix}" if error.fix else "")
