"""What one agent counts while it works: ``metrics`` declares it, ``status`` shows it.

Read off the agent's states, before and after each event: the core knows nothing of it.
``see`` is called by the thread that supervises, everything else by the one that answers.
"""

from collections.abc import Mapping

from dtrain.agent import metrics, transfer_use
from dtrain.agent.core.state import AgentState, JobState, LocalRank
from dtrain.agent.transferring import StoreUse
from dtrain.protocol.ids import AgentName, Attempt, JobName, Rank, Seq
from dtrain.protocol.snapshot import FailureKind, WorkerPhase
from dtrain.runtime.meters import Counter, Histogram, read
from dtrain.runtime.metrics import Samples
from dtrain.storage.blobs.metered import StoreMeter
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS
from dtrain.storage.etcd.metered import EtcdMeter

KEPT_S = 3600.0
"""How long the series of a job stay that is no more on this machine: a scrape must see its last counts."""

STALL_METRIC = "checkpoint_stall_s"
"""Under this name a rank reports how long it stood still for its newest snapshot."""

_Key = tuple[JobName, Attempt, Rank]


class Measures:
    """What happened to the jobs of this machine."""

    def __init__(self, agent: AgentName) -> None:
        self._agent = agent
        self.etcd = EtcdMeter()
        self._store = StoreMeter()
        self._exits = Counter(metrics.EXITS)
        self._steps = Histogram(metrics.STEP_SECONDS)
        self._stages = Histogram(STAGE_SECONDS, (("snapshot",), ("upload",), ("restore",)))
        self._bytes = Counter(metrics.BYTES, (("upload",),))
        self._stall = Counter(metrics.STALL)
        self._stepped_at: dict[_Key, float] = {}
        self._waits_since: dict[_Key, float] = {}
        self._sealed_at: dict[tuple[_Key, Seq], float] = {}
        self._gone_at: dict[JobName, float] = {}

    def see(self, before: AgentState, after: AgentState, now: float) -> None:
        """An event has led from one state to the next."""
        if before.jobs is after.jobs:
            return
        for name, job in after.jobs.items():
            old = before.jobs.get(name)
            if old is job:
                continue
            self._gone_at.pop(name, None)
            same = old if old is not None and (old.uid, old.attempt) == (job.uid, job.attempt) else None
            if same is None:
                self._forget(name)
            self._see_job(same, job, now)
        for name in before.jobs.keys() - after.jobs.keys():
            self._forget(name)
            self._gone_at[name] = now

    def store_used(self, use: StoreUse) -> None:
        """The transfer process has used stores."""
        transfer_use.take(self._store, use)

    def samples(self, restored: Mapping[str, int], now: float) -> Samples:
        """Return everything counted so far; ``restored``: bytes supplied to ranks, by where they lay."""
        over = {name for name, at in list(self._gone_at.items()) if now - at > KEPT_S}
        if over:
            for meter in (self._exits, self._steps, self._stall):
                meter.drop(lambda labels: labels[0] in over)
            for name in over:
                self._gone_at.pop(name, None)
        found = dict(
            read(
                (
                    *self.etcd.meters,
                    *self._store.meters,
                    self._exits,
                    self._steps,
                    self._stages,
                    self._bytes,
                    self._stall,
                )
            )
        )
        found[metrics.BYTES] = {**found[metrics.BYTES], ("restore",): float(sum(restored.values()))}
        return found

    def _see_job(self, old: JobState | None, job: JobState, now: float) -> None:
        for rank in job.ranks:
            was = old.rank(rank.rank) if old is not None else None
            if was is rank:
                continue
            key = (job.name, job.attempt, rank.rank)
            self._see_exit(job, was, rank)
            self._see_restore(key, was, rank, now)
            self._see_snapshot(key, was, rank, now)
            if rank.rank == 0:
                self._see_step(key, was, rank, now)
        if old is not None and old.durable is not job.durable:
            known = {(part.seq, part.rank) for part in old.durable}
            for part in job.durable:
                if (part.seq, part.rank) in known:
                    continue
                self._bytes.add("upload", amount=part.size_bytes)
                sealed_at = self._sealed_at.pop(((job.name, job.attempt, part.rank), part.seq), None)
                if sealed_at is not None:
                    self._stages.observe(now - sealed_at, "upload")
            current = {saving.seq for saving in job.saving}
            self._sealed_at = {
                of: at for of, at in self._sealed_at.items() if of[0][0] != job.name or of[1] in current
            }

    def _see_exit(self, job: JobState, was: LocalRank | None, rank: LocalRank) -> None:
        if was is not None and was.exit_code is None and rank.exit_code is not None:
            self._exits.add(job.name, self._agent, _why(job, rank))

    def _see_restore(self, key: _Key, was: LocalRank | None, rank: LocalRank, now: float) -> None:
        if rank.wants_restore and (was is None or not was.wants_restore):
            self._waits_since.setdefault(key, now)
        if (
            rank.restored
            and rank.exit_code is None
            and (since := self._waits_since.pop(key, None)) is not None
        ):
            self._stages.observe(now - since, "restore")

    def _see_snapshot(self, key: _Key, was: LocalRank | None, rank: LocalRank, now: float) -> None:
        if rank.sealed is not None and (
            was is None or was.sealed is None or was.sealed.seq != rank.sealed.seq
        ):
            self._sealed_at[key, rank.sealed.seq] = now
        stall_s = rank.metrics.get(STALL_METRIC)
        # A rank that is heard for the first time, by a restarted agent, tells of what was counted before.
        if was is None or not was.connection or stall_s is None or stall_s == was.metrics.get(STALL_METRIC):
            return
        self._stages.observe(stall_s, "snapshot")
        if rank.rank == 0:
            self._stall.add(key[0], amount=max(0.0, stall_s))

    def _see_step(self, key: _Key, was: LocalRank | None, rank: LocalRank, now: float) -> None:
        if rank.phase is not WorkerPhase.TRAINING or was is None or was.phase is not WorkerPhase.TRAINING:
            self._stepped_at.pop(key, None)
            return
        done = rank.step - was.step
        if done <= 0:
            return
        since = self._stepped_at.get(key)
        self._stepped_at[key] = now
        if since is not None:
            self._steps.observe((now - since) / done, key[0], times=done)

    def _forget(self, name: JobName) -> None:
        for known in (self._stepped_at, self._waits_since):
            for key in [key for key in known if key[0] == name]:
                del known[key]
        self._sealed_at = {of: at for of, at in self._sealed_at.items() if of[0][0] != name}


def _why(job: JobState, rank: LocalRank) -> str:
    if rank.exit_code == 0:
        return "done"
    failure = job.failure
    own = failure is not None and failure.rank == rank.rank and failure.kind is not FailureKind.COLLECTIVE
    if not own and (failure is not None or job.stopping is not None):
        return "stopped"
    return "signal" if rank.exit_code is not None and rank.exit_code < 0 else "exit"
