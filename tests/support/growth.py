"""Whether a long run grows: samples of processes, and the judgement over them. Pure, apart from ``Census``.

Processes of a soak are killed often, so none lives for the whole run, and a
young one is smaller than an old one. Two comparisons answer different leaks:

* over the run: all processes of a role, in calm moments and past their warm-up,
  in the first third of the run against the last. Finds what grows with the
  cluster's history: records, files, whatever a fresh process takes up again;
* over lives: the trend within each long enough life, the median of all lives of a role,
  carried on for an hour. Finds what a process loses little by little.

A replica that begins to lead opens channels to all agents, once: from then on it is
weighed in another role, and warms up again.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from dtrain.local import sweeping
from dtrain.local.cluster import LocalCluster
from dtrain.protocol.errors import DtrainError

LED = "coordinator that led"
LEADS_AGE_S_MIN = 15.0
"""Until the lease of its former life is surely over, the leader's record may name a young replica."""

_MODULES = {
    "dtrain.coordinator": "coordinator",
    "dtrain.agent": "agent",
    "dtrain.agent.launcher": "launcher",
    "dtrain.agent.transfer": "transfer",
    "dtrain.agent.launch.store": "rendezvous",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One process at one moment."""

    role: str
    name: str
    life: str
    """pid and start time: one life of the process."""
    age_s: float
    rss_mb: float
    threads: int
    fds: int
    leads: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """The whole cluster at one moment of the run; ``at_s`` since it began."""

    at_s: float
    calm: bool
    seen: tuple[Seen, ...]


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of one metric may be gained before it is called growth."""

    over_run: float
    over_run_part: float
    """As a part of what there was; the larger of both counts."""
    per_hour: float
    noise: float
    """What a life may gain whatever trend that makes: it is not carried on for an hour."""


LIMITS: Mapping[str, Limit] = {
    "rss_mb": Limit(8.0, 0.12, 24.0, 2.0),
    "threads": Limit(3.0, 0.2, 6.0, 1.5),
    # A life gains a connection for each thread and each member of etcd that it comes to talk to.
    "fds": Limit(6.0, 0.2, 12.0, 8.0),
}
ETCDS: Mapping[str, Limit] = {
    # Not ours: it keeps its last 100,000 writes in memory, whatever they are. Its database is judged instead.
    "rss_mb": Limit(float("inf"), 0.0, float("inf"), 0.0),
    "threads": Limit(6.0, 0.5, 24.0, 6.0),
    "fds": Limit(24.0, 0.5, 96.0, 24.0),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One role and metric: what was measured, and whether it grows."""

    role: str
    metric: str
    first: float | None
    last: float | None
    per_hour: float | None
    lives: int
    grows: bool

    def line(self) -> str:
        """As a line of the table."""

        def text(value: float | None) -> str:
            return f"{'-':>9}" if value is None else f"{value:9.1f}"

        verdict = "GROWS" if self.grows else "ok"
        return (
            f"{self.role:22} {self.metric:8} {text(self.first)} {text(self.last)} "
            f"{text(self.per_hour)} {self.lives:6}  {verdict}"
        )


HEAD = f"{'role':22} {'metric':8} {'first':>9} {'last':>9} {'per hour':>9} {'lives':>6}"


class Census:
    """Counts the processes of a cluster by role."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    def take(self) -> tuple[Seen, ...]:
        """Return every daemon, guardian, launcher and etcd member that is alive; ranks are the user's."""
        try:
            leader = self._cluster.leader()
        except DtrainError:
            leader = None
        found = sweeping.find(self._cluster.folder)
        modules = {process.pid: process.module for process in found}
        seen = []
        for process in found:
            role = _MODULES.get(process.module)
            above = modules.get(process.parent, "")
            if role is None or (role == "launcher" and above == process.module):
                continue
            # A guardian and what it guards run the same module; launchers may be adopted by a guardian.
            if role in ("coordinator", "agent") and above != process.module:
                role = f"{role} guardian"
            seen.append(_look(role, _name(process.command), process.pid))
        for member in self._cluster.etcd_servers.members:
            if member.process is not None and member.is_running:
                seen.append(_look("etcd", member.name, member.process.pid))
        return tuple(
            replace(one, leads=True)
            if one.role == "coordinator" and one.name == leader and one.age_s >= LEADS_AGE_S_MIN
            else one
            for one in seen
            if one is not None
        )


def judge(samples: Sequence[Sample], *, warm_up_s: float, life_s_min: float) -> list[Finding]:
    """Return a finding for each role and metric, of processes older than ``warm_up_s``."""
    samples = _by_duty(samples)
    end = max((sample.at_s for sample in samples), default=0.0)
    roles = sorted({one.role for sample in samples for one in sample.seen})
    findings = []
    for role in roles:
        for metric, limit in (ETCDS if role == "etcd" else LIMITS).items():
            warm = [
                (sample.at_s, sample.calm, one.life, float(getattr(one, metric)))
                for sample in samples
                for one in sample.seen
                if one.role == role and one.age_s >= warm_up_s
            ]
            calm = [(at_s, value) for at_s, is_calm, _, value in warm if is_calm]
            first = _median(value for at_s, value in calm if at_s <= end / 3)
            last = _median(value for at_s, value in calm if at_s >= 2 * end / 3)
            trends = _trends(warm, life_s_min)
            per_hour = 3600 * statistics.median(rate for rate, _ in trends) if trends else None
            gained = statistics.median(gain for _, gain in trends) if trends else 0.0
            grows = _grew(first, last, limit)
            if per_hour is not None and gained > limit.noise:
                grows |= per_hour > limit.per_hour
            findings.append(Finding(role, metric, first, last, per_hour, len(trends), grows))
    return findings


def _by_duty(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with each life that has come to lead as a new one, as old as its leadership."""
    led: dict[str, float] = {}
    found = []
    for sample in samples:
        for one in sample.seen:
            if one.leads:
                led.setdefault(one.life, sample.at_s)
        seen = (
            replace(one, role=LED, age_s=sample.at_s - led[one.life]) if one.life in led else one
            for one in sample.seen
        )
        found.append(replace(sample, seen=tuple(seen)))
    return found


def _grew(first: float | None, last: float | None, limit: Limit) -> bool:
    if first is None or last is None:
        return False
    return last > first + max(limit.over_run, limit.over_run_part * first)


def _trends(warm: Iterable[tuple[float, bool, str, float]], life_s_min: float) -> list[tuple[float, float]]:
    """Return the trend, per second, and the gain of each life that was watched for long enough."""
    lives: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for at_s, _, life, value in warm:
        lives[life].append((at_s, value))
    trends: list[tuple[float, float]] = []
    for points in lives.values():
        if points[-1][0] - points[0][0] >= life_s_min and len(points) >= 4:
            # Medians of both ends: one peak is no trend.
            third = max(1, len(points) // 3)
            gained = _middle(points[-third:]) - _middle(points[:third])
            took_s = statistics.fmean(at for at, _ in points[-third:]) - statistics.fmean(
                at for at, _ in points[:third]
            )
            trends.append((gained / took_s, gained))
    return trends


def _middle(points: Sequence[tuple[float, float]]) -> float:
    return statistics.median(value for _, value in points)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _name(command: Sequence[str]) -> str:
    for flag in ("--id", "--name"):
        if flag in command:
            return command[command.index(flag) + 1]
    return next((word for word in command if word.startswith("/")), "")


def _look(role: str, name: str, pid: int) -> Seen | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            began = process.create_time()
            return Seen(
                role,
                name,
                f"{pid}-{began:.2f}",
                max(0.0, time.time() - began),
                process.memory_info().rss / 2**20,
                process.num_threads(),
                process.num_fds(),
            )
    except psutil.Error:
        return None
