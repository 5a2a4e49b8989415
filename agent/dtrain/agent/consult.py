"""Asking coordinators what etcd cannot tell: a thread of its own, idle while all is well.

While etcd answers it notes where the coordinators are, so that a machine that is
cut off later knows whom to ask. While etcd does not answer it asks a few of them,
over gRPC, what has become of this machine's jobs; what follows from the answers
is decided in ``core.isolation``.
"""

import random
import threading
from collections.abc import Callable, Sequence

import grpc

from dtrain.agent.core.events import Consulted, CoordinatorsRead, Event, ReplicaAnswer, Standing
from dtrain.agent.core.isolation import scope_of, to_ask
from dtrain.agent.core.state import AgentState, LinkState, Scope
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import AgentName, Attempt, JobName, ReplicaId, Uid
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb import coordinator_pb2_grpc
from dtrain.runtime import grpc_tls
from dtrain.runtime.clock import Clock
from dtrain.storage.etcd.port import Etcd, prefix_end

POLL_S = 0.25
READ_EVERY_S = 120.0
READ_RETRY_S = 10.0
READS_AT_FIRST = 3
"""So many, soon after each other, when a session begins: replicas often start, or come back, just then."""
READ_S = 2.0

ASK_S = 2.0
ASKED_AT_ONCE = 3
PAUSE_S = {Scope.ALONE: 3.0, Scope.UNKNOWN: 4.0, Scope.ALL: 20.0}
"""Between rounds, on average, by what was heard. When etcd is down for all, all agents ask: rarely."""

ANSWER_BYTES_MAX = 1024 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
)

Ask = Callable[[Sequence[str], pb.ConsultRequest], list[pb.ConsultReply]]
"""Puts one question to several replicas at once; returns the answers of those that answered."""


class Consultant:
    """``work`` does what is due and returns when it is next due. For one thread."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        agent: AgentName,
        clock: Clock,
        *,
        state: Callable[[], AgentState],
        post: Callable[[Event], None],
        ask: Ask,
        rng: random.Random | None = None,
        log: Callable[..., None] = lambda *_args, **_fields: None,
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._agent = agent
        self._clock = clock
        self._state = state
        self._post = post
        self._ask = ask
        self._rng = rng or random.Random()  # noqa: S311 - spreads load only
        self._log = log
        self._read_of = -1
        self._read_for: frozenset[tuple[JobName, Uid, Attempt]] = frozenset()
        self._reads = 0
        self._read_at = float("-inf")
        self._ask_at = float("-inf")

    def work(self) -> float:
        """Read addresses, or ask, if it is time to."""
        now, state = self._clock.monotonic(), self._state()
        if state.link.state is LinkState.OK:
            self._ask_at = float("-inf")
            # With ranks that are new there is something to ask about, and whoever started them is
            # registered: an agent that found no replica when it began learns of them before a cut.
            runs = frozenset(to_ask(state))
            new, self._read_for = runs - self._read_for, runs
            # After each new session at once: the replicas may have moved while nobody could look.
            if state.generation and (new or state.generation != self._read_of or now >= self._read_at):
                self._read(state.generation, now)
        elif now >= self._ask_at:
            self._consult(state, now)
        return self._clock.monotonic() + POLL_S

    def _read(self, generation: int, now: float) -> None:
        prefix = self._keys.coordinator(ReplicaId(""))
        self._reads = self._reads + 1 if generation == self._read_of else 1
        self._read_of = generation
        try:
            found = self._etcd.range(prefix, prefix_end(prefix), deadline_s=READ_S).items
            addresses = tuple(codec.decode(ReplicaRecord, kv.value).address for kv in found)
        except DtrainError as error:
            self._log("coordinators not read", error=error.message)
            self._read_at = now + READ_RETRY_S
            return
        soon = self._reads < READS_AT_FIRST or not addresses
        pause_s = READ_RETRY_S if soon else READ_EVERY_S
        self._read_at = now + pause_s * (0.75 + 0.5 * self._rng.random())
        # While none of them is alive, the former addresses are the best guess.
        if addresses and tuple(sorted(addresses)) != self._state().coordinators:
            self._post(CoordinatorsRead(addresses))

    def _consult(self, state: AgentState, now: float) -> None:
        jobs = to_ask(state)
        self._ask_at = now + PAUSE_S[Scope.UNKNOWN] * (0.75 + 0.5 * self._rng.random())
        if not jobs or not state.coordinators:
            return
        count = min(ASKED_AT_ONCE, len(state.coordinators))
        addresses = self._rng.sample(state.coordinators, count)
        parts = [pb.JobPart(job=job, uid=uid, attempt=attempt) for job, uid, attempt in jobs]
        replies = self._ask(addresses, pb.ConsultRequest(agent=self._agent, jobs=parts))
        event = Consulted(tuple(_answer(reply, jobs) for reply in replies))
        now = self._clock.monotonic()
        # Spread, because all agents lose etcd at the same moment.
        self._ask_at = now + PAUSE_S[scope_of(state.link, event, now)] * (0.75 + 0.5 * self._rng.random())
        self._post(event)


def _answer(reply: pb.ConsultReply, jobs: Sequence[tuple[JobName, Uid, Attempt]]) -> ReplicaAnswer:
    asked = {job: (uid, attempt) for job, uid, attempt in jobs}
    standings = tuple(
        Standing(
            JobName(one.job),
            *asked[JobName(one.job)],
            current=one.current,
            attempt=Attempt(one.attempt),
            member=one.member,
        )
        for one in reply.jobs
        if one.job in asked
    )
    return ReplicaAnswer(reply.etcd_age_s, standings)


def ask_over_grpc(tls: grpc_tls.Credentials | None) -> Ask:
    """Return what asks replicas over gRPC, each call on a connection of its own: they are rare."""

    def ask(addresses: Sequence[str], request: pb.ConsultRequest) -> list[pb.ConsultReply]:
        channels = [grpc_tls.to_coordinator(address, tls, OPTIONS) for address in addresses]
        try:
            stubs = [coordinator_pb2_grpc.CoordinatorStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
            calls = [stub.Consult.future(request, timeout=ASK_S) for stub in stubs]
            replies = []
            for call in calls:
                try:
                    replies.append(call.result(ASK_S + 0.5))
                except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                    continue
            return replies
        finally:
            for channel in channels:
                channel.close()

    return ask


class ConsultThread:
    """Runs a consultant until ``close``. ``on_death``: it ended by an error of its own."""

    def __init__(
        self, consultant: Consultant, clock: Clock, on_death: Callable[[BaseException], None]
    ) -> None:
        self._consultant = consultant
        self._clock = clock
        self._on_death = on_death
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="consult", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(READ_S + ASK_S + 1.0)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                until = self._consultant.work()
                self._closing.wait(max(0.0, until - self._clock.monotonic()))
        except BaseException as error:  # noqa: BLE001 - the agent must not live on unheard
            self._on_death(error)
