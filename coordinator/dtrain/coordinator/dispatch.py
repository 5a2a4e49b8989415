"""Calls to agents: short, with a deadline, never waiting for one another.

An answer says only that a command arrived; its outcome comes back in the
agent's snapshot. Of what supersedes each other only the newest is in flight, so
that a frozen agent never collects a queue.
"""

import threading
from collections.abc import Callable

import grpc

from dtrain.coordinator.core.decisions import Directed
from dtrain.protocol import wire
from dtrain.protocol.commands import AbortCheckpoint, BeginCheckpoint, Command, ConfirmCheckpoint
from dtrain.protocol.ids import AgentName
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.pb import agent_pb2_grpc
from dtrain.runtime import grpc_tls
from dtrain.runtime.clock import Clock, SystemClock

COMMAND_DEADLINE_S = 5.0
"""An agent that says nothing for so long counts as unreachable. A busy machine may
take seconds to answer, and its ranks may still be training."""

CHANNELS_IDLE_MAX = 2000
"""More open channels than this and the ones used longest ago are closed."""

MESSAGE_BYTES_MAX = 4 * 1024 * 1024

RETIRED_S = 60.0
"""How long a channel with a replaced certificate is kept for the calls under way on it:
longer than any of them may take."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A restarted agent is usable again within a second, not after the library's 20.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The control plane must not go through a proxy meant for users' downloads.
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # Else a new channel to the same address takes over the pauses of the old one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

REFUSED = "refused"
TIMED_OUT = "timed out"
REJECTED = "rejected"

_Key = tuple[AgentName, str, str]


class Channels:
    """One channel per agent and address, opened when first used. Thread-safe.

    With ``tls`` the other side must have that agent's certificate.
    """

    def __init__(self, tls: grpc_tls.Credentials | None = None, *, clock: Clock | None = None) -> None:
        self._tls = tls
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._open: dict[AgentName, tuple[str, grpc.Channel, int]] = {}
        self._lives: dict[AgentName, str] = {}
        self._retired: list[tuple[float, grpc.Channel]] = []

    def get(self, agent: AgentName, address: str, incarnation: str = "") -> grpc.Channel:
        """Return the agent's channel; one to a former address or life is closed.

        A channel whose agent was down pauses between its tries to connect and
        refuses all calls meanwhile: what the former life left says nothing about
        this one. ``incarnation`` "": any life will do.
        """
        generation = self._tls.generation if self._tls is not None else 0
        with self._lock:
            stale = self._expired()
            known = self._open.pop(agent, None)
            reborn = incarnation not in ("", self._lives.get(agent, incarnation))
            if incarnation:
                self._lives[agent] = incarnation
            if known is not None and (known[0] != address or reborn):
                stale.append(known[1])
                known = None
            elif known is not None and known[2] != generation:
                # Its calls are as good as ever; only the next ones take the new certificate.
                self._retired.append((self._clock.monotonic() + RETIRED_S, known[1]))
                known = None
            if known is None:
                channel = grpc_tls.to_agent(agent, address, self._tls, CHANNEL_OPTIONS)
                known = (address, channel, generation)
            # Put back last: the dictionary's order is the order of use.
            self._open[agent] = known
            while len(self._open) > CHANNELS_IDLE_MAX:
                oldest = next(iter(self._open))
                self._lives.pop(oldest, None)
                stale.append(self._open.pop(oldest)[1])
        for channel in stale:
            channel.close()
        return known[1]

    def close(self) -> None:
        """Close all channels; calls in flight are cancelled."""
        with self._lock:
            channels = [known[1] for known in self._open.values()] + [old for _, old in self._retired]
            self._open, self._retired = {}, []
        for channel in channels:
            channel.close()

    def _expired(self) -> list[grpc.Channel]:
        now = self._clock.monotonic()
        over = [channel for end, channel in self._retired if end <= now]
        self._retired = [(end, channel) for end, channel in self._retired if end > now]
        return over


class Dispatcher:
    """Sends commands. ``on_done(directed, ok, problem)`` runs on a grpc thread: it must only enqueue."""

    def __init__(
        self,
        channels: Channels,
        on_done: Callable[[Directed, bool, str], None],
        *,
        deadline_s: float = COMMAND_DEADLINE_S,
        on_timed: Callable[[str, float, str], None] = lambda _kind, _seconds, _code: None,
        clock: Clock | None = None,
    ) -> None:
        """Remember.

        ``on_timed`` gets each call's command, how long it took and how it ended: "" for taken on,
        ``refused``, ``timed-out`` or ``rejected``.
        """
        self._channels = channels
        self._on_timed = on_timed
        self._clock = clock or SystemClock()
        self._deadline_s = deadline_s
        self._on_done = on_done
        self._lock = threading.Lock()
        self._flying: dict[_Key, tuple[str, grpc.Future[pb.Ack]]] = {}
        self._closed = False

    def send(self, directed: Directed) -> None:
        """Begin the call; returns at once. An older one that this supersedes is cancelled, unreported.

        The same command while its call is under way is that call: cancelling it
        for its own repetition would keep a silent agent from ever timing out.
        """
        channel = self._channels.get(directed.agent, directed.address, directed.incarnation)
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        key = (directed.agent, directed.command.header.job, _lane(directed.command))
        with self._lock:
            if self._closed:
                return
            flying = self._flying.get(key)
            if flying is not None and flying[0] == directed.command.header.id:
                return
            superseded = self._flying.pop(key, None)
        if superseded is not None:
            superseded[1].cancel()
        began = self._clock.monotonic()
        call: grpc.Future[pb.Ack] = stub.Execute.future(
            wire.command_to_pb(directed.command), timeout=self._deadline_s, wait_for_ready=False
        )
        with self._lock:
            self._flying[key] = (directed.command.header.id, call)
        call.add_done_callback(lambda done: self._finished(key, directed, done, began))

    def close(self) -> None:
        """Send nothing more and drop what is in flight."""
        with self._lock:
            self._closed = True
            calls, self._flying = list(self._flying.values()), {}
        for _, call in calls:
            call.cancel()

    def _finished(self, key: _Key, directed: Directed, call: "grpc.Future[pb.Ack]", began: float) -> None:
        with self._lock:
            flying = self._flying.get(key)
            if flying is not None and flying[1] is call:
                del self._flying[key]
        if call.cancelled():
            return
        try:
            ack = call.result()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                # Its channel was closed: the agent has moved, or we are ending.
                return
            problem = _problem(error)
            self._timed(directed, began, problem)
            self._on_done(directed, False, problem)
            return
        self._timed(directed, began, "" if ack.accepted else REJECTED)
        if ack.accepted:
            self._on_done(directed, True, "")
        else:
            self._on_done(directed, False, f"{REJECTED}: {ack.message}")

    def _timed(self, directed: Directed, began: float, problem: str) -> None:
        code = problem.split(":", 1)[0].replace(" ", "-")
        self._on_timed(type(directed.command).__name__, self._clock.monotonic() - began, code)


def _lane(command: Command) -> str:
    """Return what supersedes what: the attempt's commands each other, a checkpoint's its own."""
    match command:
        case BeginCheckpoint() | AbortCheckpoint() | ConfirmCheckpoint():
            return f"checkpoint/{command.seq}"
        case _:
            return "attempt"


def _problem(error: grpc.RpcError) -> str:
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return REFUSED
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TIMED_OUT
    # The agent answered, so it is there; what it said is for the log.
    return f"{REJECTED}: {code.name}: {error.details()}"
