"""Whether a job's ledger tells what really happened: the run knows the true time and every step.

Wall clocks of replicas are set by faults, by hours. Each can shift the ledger's time once, by as much as it
is wrong; what is beyond that is a mistake.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.ledger import CHECKPOINT, DETECTION, HANG, PAUSED, PRODUCTIVE, WARM_UP

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

ROUNDING_S = 0.05
REPORT_S = 2.5
"""Between two reports of an agent's progress, and how late a report may be."""
EQUAL = 0.01
"""Share that counts as equal, beyond what monotonic clocks run fast or slow."""


class Timekeeper:
    """Keeps true time beside the ledgers of a run."""

    def __init__(self, cluster: "Cluster", bad: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._bad = bad
        self._submitted_at: dict[str, float] = {}
        self._wrong_s = 0.0
        """The most that any replica's wall clock has been wrong so far."""
        self._at: dict[tuple[str, int], tuple[int, float]] = {}
        """By submission and attempt: the newest step and when it was done."""
        self._took: dict[str, dict[int, float]] = {}
        """By submission: how long each step took the last time that it was done."""
        self._repeated: dict[str, float] = {}
        self._began_at: dict[tuple[str, int], float] = {}
        """By submission and attempt: when its first rank had its state."""
        self._seen: set[tuple[str, int]] = set()
        """Attempts that a leader has written to be training."""
        self._unseen: dict[str, float] = {}
        """By submission: how long its attempts trained before; to the ledger that is their start."""

    def submitted(self, uid: str) -> None:
        """etcd has the job file of a submission."""
        self._submitted_at.setdefault(uid, self._cluster.scheduler.now)

    def began(self, uid: str, attempt: int, step: int) -> None:
        """All ranks of an attempt have their state."""
        self._at[uid, attempt] = step, self._cluster.scheduler.now
        self._began_at.setdefault((uid, attempt), self._cluster.scheduler.now)

    def stepped(self, uid: str, attempt: int, step: int) -> None:
        """A rank has completed a step."""
        now = self._cluster.scheduler.now
        last, at = self._at.get((uid, attempt), (step - 1, now))
        if step <= last:
            return
        self._at[uid, attempt] = step, now
        took = self._took.setdefault(uid, {})
        self._repeated[uid] = self._repeated.get(uid, 0.0) + took.get(step, 0.0)
        took[step] = now - at

    def told(self, job: str, status: JobStatus) -> None:
        """A leader has written a status."""
        clocks = [replica.clock for replica in self._cluster.replicas.values()]
        self._wrong_s = max([self._wrong_s, *(abs(clock.wall_offset_s) for clock in clocks)])
        ledger, uid = status.ledger, str(status.uid)
        if ledger is None or uid not in self._submitted_at:
            return
        if status.phase is not JobPhase.STARTING:
            self._see(uid, status.attempt)
        true_s = self._cluster.scheduler.now - self._submitted_at[uid]
        total_s = (ledger.until_ms - ledger.began_ms) / 1000
        # Both its beginning and its end may be shifted.
        drift = self._cluster.schedule.shape.clock_drift
        allowed_s = (EQUAL + drift) * true_s + ROUNDING_S + 2 * self._wrong_s
        if abs(total_s - true_s) > allowed_s:
            self._bad(f"the ledger of {job} has {total_s:.2f} s of {true_s:.2f} s")
        if status.phase is JobPhase.SUCCEEDED and not self._wrong_s:
            self._check_kept(job, uid, status.attempt, ledger.spent)

    def _see(self, uid: str, attempt: int) -> None:
        began_at = self._began_at.get((uid, attempt))
        if began_at is not None and (uid, attempt) not in self._seen:
            self._seen.add((uid, attempt))
            self._unseen[uid] = self._unseen.get(uid, 0.0) + self._cluster.scheduler.now - began_at

    def _check_kept(self, job: str, uid: str, attempts: int, spent: Mapping[str, int]) -> None:
        """Productive is what the steps took that were kept, as near as reports let anybody know."""
        kept_s = sum(self._took.get(uid, {}).values())
        now = self._cluster.scheduler.now
        # From its last step to its end a script may have work left: nobody else knows.
        tail_s = now - max((at for (of, _), (_, at) in self._at.items() if of == uid), default=now)
        within = [CHECKPOINT, HANG, DETECTION, WARM_UP, PAUSED]
        aside_s = sum(spent.get(name, 0) for name in within) / 1000
        productive_s = spent.get(PRODUCTIVE, 0) / 1000
        slack_s = REPORT_S * attempts + (EQUAL + self._cluster.schedule.shape.clock_drift) * kept_s
        aside_s += self._unseen.get(uid, 0.0)
        if not kept_s - aside_s - slack_s <= productive_s <= kept_s + tail_s + slack_s:
            self._bad(f"the ledger of {job} has {productive_s:.2f} productive s of {kept_s:.2f} s")
