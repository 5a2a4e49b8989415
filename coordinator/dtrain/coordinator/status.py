"""The pages of a replica's status port: live, ready, metrics.

Live means that the loop which decides comes round, and nothing else. etcd's
absence never makes a replica dead: a restart would not bring etcd back, and
would throw away the copy and the connections that it needs on etcd's return.
Ready means that a client is served well here: the API is open and the copy of
etcd is neither missing nor old. A replica that stands by is as ready as the
leader, because any replica serves any client.

The thread of the port calls these; all that they read is published by others.
"""

from collections.abc import Callable, Mapping

from dtrain.coordinator import metrics
from dtrain.coordinator.health import MIRROR_STALE_S
from dtrain.coordinator.job_series import JobSeries
from dtrain.coordinator.measures import Measures
from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import ReplicaId
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import Clock
from dtrain.runtime.metrics import Metric, Sample, Samples, exposition
from dtrain.runtime.serving import Page, Pages, live, verdict
from dtrain.storage.etcd import lease_metrics
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import KeyValue
from dtrain.storage.etcd.session import Session


class Status:
    """Reads one replica. ``loop_at`` is of ``clock``; ``serves``: the API is open."""

    def __init__(
        self,
        replica: ReplicaId,
        keys: Keys,
        mirror: Mirror,
        *,
        leads: Callable[[], bool],
        serves: Callable[[], bool],
        loop_at: Callable[[], float],
        problems: Callable[[], list[str]],
        brake_on: Callable[[], bool],
        db_bytes: Callable[[], tuple[int, int]],
        lost: Callable[[], int],
        measures: Measures,
        session: Session,
        clock: Clock,
    ) -> None:
        self._replica = replica
        self._keys = keys
        self._mirror = mirror
        self._leads = leads
        self._serves = serves
        self._loop_at = loop_at
        self._problems = problems
        self._brake_on = brake_on
        self._db_bytes = db_bytes
        self._measures = measures
        self._session = session
        self._monotonic = clock.monotonic
        self._series = JobSeries(keys, mirror, lost=lost, monotonic=clock.monotonic, wall=clock.wall)

    def pages(self) -> Pages:
        """Return the pages by path."""
        shown = exposition("coordinator", metrics.METRICS, self.samples)
        return {"/livez": self.live, "/readyz": self.ready, "/metrics": shown}

    def live(self) -> Page:
        """Return whether the loop comes round."""
        return live(self._monotonic() - self._loop_at())

    def ready(self) -> Page:
        """Return whether a client is served well here, and who leads."""
        age_s = self._mirror.age_s()
        reasons = []
        if not self._serves():
            reasons.append("the API is not open")
        if age_s == float("inf"):
            reasons.append("etcd has not been read yet")
        elif age_s >= MIRROR_STALE_S:
            reasons.append(f"etcd was last heard of {age_s:.0f} s ago")
        found = self._mirror.get(self._keys.leader)
        leader, term = ("", 0) if found is None else (_leader(found), found.create_revision)
        return verdict(
            "ready",
            not reasons,
            reasons,
            replica=self._replica,
            leads=self._leads(),
            leader=leader,
            term=term,
            mirror_age_s=None if age_s == float("inf") else round(age_s, 3),
        )

    def samples(self) -> Samples:
        """Return what ``metrics.METRICS`` are now."""
        leads = self._leads()
        found: dict[Metric, Mapping[tuple[str, ...], Sample]] = {
            metrics.IS_LEADER: {(): float(leads)},
            metrics.BRAKE_ON: {(): float(leads and self._brake_on())},
            metrics.MIRROR_REVISION: {(): float(self._mirror.revision)},
            metrics.RELISTS: {(why.value,): float(times) for why, times in self._mirror.relists().items()},
            metrics.LOOP_AGE: {(): max(0.0, self._monotonic() - self._loop_at())},
            metrics.PROBLEMS: {(): float(len(self._problems()))},
            metrics.FENCED: {(): float(self._session.counts().fenced)},
            **lease_metrics.samples(self._session, self._monotonic()),
            **self._measures.samples(),
        }
        for metric, size_bytes in zip((metrics.DB_SIZE, metrics.DB_QUOTA), self._db_bytes(), strict=True):
            if size_bytes:
                found[metric] = {(): float(size_bytes)}
        age_s = self._mirror.age_s()
        if age_s == float("inf"):
            return found
        found[metrics.MIRROR_AGE] = {(): age_s}
        leader = self._mirror.get(self._keys.leader)
        if leader is not None:
            found[metrics.TERM] = {(): float(leader.create_revision)}
        return {**found, **self._series.samples(leads=leads)}


def _leader(kv: KeyValue) -> str:
    try:
        return codec.decode(LeaderRecord, kv.value).replica
    except DtrainError:
        return ""
