"""What one replica counts while it works: ``metrics`` declares it, ``status`` shows it.

Passed in where things happen; nothing here is read by a decision. A process that ends
takes its counts along, which is what Prometheus expects of a process.
"""

from dtrain.coordinator import metrics
from dtrain.coordinator.core.decisions import Decision, PutRecord, VerifyCheckpoint, Work, Write
from dtrain.coordinator.core.views import FleetView, JobView, Moment
from dtrain.coordinator.driver import Plan
from dtrain.coordinator.persistence import Committed, Outcome
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.commands import Command
from dtrain.runtime.clock import Clock
from dtrain.runtime.meters import Counter, Histogram, read
from dtrain.runtime.metrics import Samples
from dtrain.storage.blobs.metered import MeteredBlobs, StoreMeter
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS
from dtrain.storage.etcd.metered import EtcdMeter
from dtrain.storage.etcd.port import KeyValue

COMMANDS = tuple((kind.__name__,) for kind in Command.__args__)


class Measures:
    """Thread-safe; every method returns at once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.etcd = EtcdMeter()
        self._store = StoreMeter()
        self._transitions = Counter(metrics.TRANSITIONS)
        self._takeovers = Histogram(metrics.TAKEOVER_SECONDS)
        self._plans = Histogram(metrics.PLAN_SECONDS)
        self._plan_failures = Counter(metrics.PLAN_FAILURES)
        self._commands = Histogram(metrics.COMMAND_SECONDS, COMMANDS)
        self._command_failures = Counter(metrics.COMMAND_FAILURES)
        self._stages = Histogram(STAGE_SECONDS, (("verify",), ("commit",)))
        self._leader = 0
        """Create-revision of the newest leader key seen."""
        self._fell_at: float | None = None
        """When the leader's key was seen to go, and no other one has come yet."""
        self._leaderless_since: float | None = None
        """That of the leader there is now; None: it came without a fall that was seen here."""
        self._in_office = False

    def open_store(self, uri: str) -> BlobStore:
        """Open a store whose use is measured."""
        return MeteredBlobs(open_store(uri), self._store, self._clock)

    def planning(self, plan: Plan) -> Plan:
        """Return ``plan``, measured."""

        def measured(job: JobView, fleet: FleetView, moment: Moment) -> Decision:
            began = self._clock.monotonic()
            try:
                return plan(job, fleet, moment)
            except Exception:
                self._plan_failures.add()
                raise
            finally:
                self._plans.observe(self._clock.monotonic() - began)

        return measured

    def leader_seen(self, kv: KeyValue | None) -> None:
        """The mirror has brought a change of the leader's key."""
        if kv is None:
            self._fell_at = self._clock.monotonic()
        elif kv.create_revision != self._leader:
            if self._leader:
                self._transitions.add()
            self._leader = kv.create_revision
            self._leaderless_since, self._fell_at = self._fell_at, None

    def office(self, leads: bool) -> None:
        """This replica decides about jobs now, or not; said at every turn of its loop."""
        if leads and not self._in_office and self._leaderless_since is not None:
            self._takeovers.observe(self._clock.monotonic() - self._leaderless_since)
        self._in_office = leads

    def command(self, kind: str, seconds: float, code: str) -> None:
        """An agent has answered a command, or has not."""
        self._commands.observe(seconds, kind)
        if code:
            self._command_failures.add(kind, code)

    def committed(self, decision: Decision, outcome: Outcome, seconds: float) -> None:
        """A decision was committed, or not; only one that commits a checkpoint is a stage of it."""
        if isinstance(outcome, Committed) and any(_is_commit(write) for write in decision.writes):
            self._stages.observe(seconds, "commit")

    def worked(self, work: Work, seconds: float) -> None:
        """A piece of work at the store has ended, well or not."""
        if isinstance(work, VerifyCheckpoint):
            self._stages.observe(seconds, "verify")

    def samples(self) -> Samples:
        """Return everything counted so far."""
        return read(
            (
                *self.etcd.meters,
                *self._store.meters,
                self._transitions,
                self._takeovers,
                self._plans,
                self._plan_failures,
                self._commands,
                self._command_failures,
                self._stages,
            )
        )


def _is_commit(write: Write) -> bool:
    return isinstance(write, PutRecord) and isinstance(write.value, CommitRecord)
