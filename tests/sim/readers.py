"""Those who read checkpoints beside training, and operators who ask about them: through the real desk.

The desk talks to the model of etcd at once: what races here is the leader, whose mirror and transactions lag.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtrain.coordinator.api.checkpoints import CheckpointDesk
from dtrain.coordinator.work import Orphans
from dtrain.protocol.checkpoint import Pin
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName, Seq
from tests.sim.process import SimClock
from tests.sim.schedule import Strike

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


@dataclass
class Reader:
    """Somebody who has pinned a checkpoint."""

    cluster: "Cluster"
    job: JobName
    seq: Seq
    holder: str
    ttl_s: int
    lease: int
    over: bool = False

    def renew(self) -> None:
        """Keep the lease alive until the end."""
        if self.over or not self.ttl_s:
            return
        if not self.cluster.etcd.down:
            self.cluster.etcd.apply(lambda memory: memory.keepalive(self.lease))
        self.cluster.scheduler.after(self.ttl_s / 3, self.renew)

    def end(self) -> None:
        """All has been read; the pin is taken off."""
        self.over = True
        etcd, checks = self.cluster.etcd, self.cluster.checks
        key = self.cluster.keys.pin(self.job, self.seq, self.holder)
        # An etcd that was restored may know nothing of it.
        if key in etcd.memory._live and not checks.went_back and not checks._raised:
            checks.read(self.job, self.seq)
        etcd.apply(lambda memory: _desk(self.cluster).unpin(self.job, self.seq, self.holder, self.lease))


def begin(cluster: "Cluster", strike: Strike, *, ttl_s: int) -> Reader | None:
    """Pin the newest checkpoint, or any other that is there; None: there is none, or nobody answers."""
    job, seq = JobName(strike.target), _seq(cluster, strike)
    if seq is None or cluster.etcd.down:
        return None
    holder = _token("reader", strike)
    lease = int(strike.at * 1e6) | 1 << 60
    if ttl_s and isinstance(cluster.etcd.apply(lambda memory: memory.grant(ttl_s, lease)), DtrainError):
        return None
    pin = Pin(seq, holder, ttl_s, "simulated", "reader")
    found: Any = cluster.etcd.apply(lambda _memory: _desk(cluster).pin(job, seq, pin, lease if ttl_s else 0))
    if isinstance(found, DtrainError):
        cluster.etcd.apply(lambda memory: memory.revoke(lease))
        return None
    cluster.scheduler.log("READER", "pins", job=job, seq=found.record.seq, ttl_s=ttl_s)
    return Reader(cluster, job, found.record.seq, holder, ttl_s, lease if ttl_s else 0)


def order(cluster: "Cluster", strike: Strike, what: str) -> None:
    """Ask as ``dtrain checkpoints`` does; what is refused is refused."""
    job, seq = JobName(strike.target), _seq(cluster, strike)
    if seq is None or cluster.etcd.down:
        return
    desk, token = _desk(cluster), _token(what, strike)
    if not seq and what != "collect":
        seq = Seq(max(cluster.committed_seqs(job)))

    def ask(_memory: object) -> Any:
        if what == "delete":
            return desk.delete(job, seq, token, "operator")
        if what == "collect":
            return desk.collect(job, token, "operator")
        record = cluster.checks.history(job).commits[seq]
        folder = f"{record.uid}/blobs/{seq:020d}/{record.attempt:06d}-{record.nonce}/"
        keys = [key for key in sorted(cluster.store._blobs) if folder in key and key.endswith(".st")]
        gone = [key for key in sorted(cluster.checks.damaged) if folder in key]
        return desk.report(job, seq, (gone or keys)[0], 0, request_id=token, by="a2")

    answer = cluster.etcd.apply(ask)
    cluster.scheduler.log("OPERATOR", what, job=job, seq=seq, answer=str(answer)[:80])


def unpin_all(cluster: "Cluster") -> None:
    """Nobody reads any more: those whom a restored etcd has brought back included."""
    for key, kv in list(cluster.etcd.memory._live.items()):
        place = cluster.keys.parse(key)
        if place is not None and place.kind == "pin":
            with contextlib.suppress(DtrainError):
                lease, held = kv.lease, place
                cluster.etcd.apply(
                    lambda memory, lease=lease, held=held: _desk(cluster).unpin(
                        held.job, held.seq, held.name, lease
                    )
                )


def _desk(cluster: "Cluster") -> CheckpointDesk:
    etcd: Any = cluster.etcd.memory
    clock: Any = SimClock(cluster.scheduler, 0.0, 1.0)
    return CheckpointDesk(etcd, cluster.name, clock, lambda _work: Orphans())


def _seq(cluster: "Cluster", strike: Strike) -> Seq | None:
    """Which checkpoint a strike is about: 0 stands for the newest that is good."""
    job = JobName(strike.target)
    seqs = cluster.committed_seqs(job) if job in cluster.jobs else []
    which = strike.args["which"]
    if not seqs:
        return None
    return Seq(0) if which < 0.3 else Seq(seqs[int((which - 0.3) / 0.7 * len(seqs)) % len(seqs)])


def _token(what: str, strike: Strike) -> str:
    return f"{what}-{strike.at:.4f}".replace(".", "-")
