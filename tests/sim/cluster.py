"""A whole cluster in one process, and the story of one seed: faults, then calm, then success.

``run(seed)`` is the entry point. Sizes, rates and targets are drawn from the seed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import tenacity.nap

from dtrain.agent import reporter
from dtrain.coordinator import work
from dtrain.coordinator.leadership import lease
from dtrain.coordinator.work import Stores
from dtrain.protocol import codec
from dtrain.protocol.ids import ClusterName, JobName, Seq, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, Intent, JobSpec, RestartPolicy, Wanted
from dtrain.protocol.keys import Keys
from dtrain.storage.blobs import probe
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.etcd import mirror
from dtrain.storage.etcd.port import Put, Txn
from tests.sim.checks import Checks
from tests.sim.coordinator import Replica
from tests.sim.etcd import EtcdServer
from tests.sim.faults import Faults
from tests.sim.machine import Machine
from tests.sim.network import Network
from tests.sim.scheduler import Scheduler, Trace
from tests.sim.training import Group

JOB, OTHER = JobName("train"), JobName("other")
SECOND_JOB_SHARE = 0.25
CALM_S_MAX = 250.0
"""From the calm to success, training itself not counted."""

CLEAN_S_MAX = 200.0
"""From success to nothing left behind."""

EVENTS_MAX = 600_000
"""More than this in one run is a storm: commands or writes that repeat without end."""


@dataclass
class Result:
    """What came of one seed."""

    seed: int
    violations: list[str]
    virtual_s: float
    events: int
    attempts: int
    commits: int
    terms: int
    faults: list[str]
    fingerprint: str
    calm_s: float = 0.0
    trace: list[str] = field(default_factory=list)


@dataclass
class Job:
    """A job as its operator knows it."""

    spec: JobSpec
    total_steps: int
    submissions: int = 0


class Cluster:
    """Everything that is there."""

    def __init__(self, seed: int, *, calm: bool = False, trace: Trace | None = None) -> None:
        self.scheduler = Scheduler(seed, trace)
        rng = self.scheduler.rng
        self.seed = seed
        self.name = ClusterName("sim")
        self.keys = Keys(self.name)
        self.checks = Checks(self)
        self.etcd = EtcdServer(self.scheduler)
        self.etcd.on_revision = self.checks.on_revision
        self.store = MemoryBlobs(f"sim-{seed}")
        self.stores = Stores(lambda _uri: self.store)
        self.groups: dict[str, Group] = {}
        self._ports = 10_000
        self.rotten: dict[tuple[JobName, int], None] = {}
        self.network = Network(self)
        self.faults = Faults(self)
        self.agent_ttl_s = rng.choice((5, 10))
        self.is_calm = calm
        self.replicas = {
            name: Replica(self, name, ttl_s=rng.choice((5, 10)))
            for name in ("c1", "c2", "c3")[: rng.choice((2, 3, 3))]
        }
        self.cancelled: dict[Uid, None] = {}
        self.jobs: dict[JobName, Job] = {JOB: self._draw_job(JOB)}
        if not calm and rng.random() < SECOND_JOB_SHARE:
            self.jobs[OTHER] = self._draw_job(OTHER)
        self.nodes_needed = max(job.spec.nnodes_max for job in self.jobs.values()) + 1
        self.machines = {
            name: Machine(self, name, slots=2)
            for name in (f"a{n}" for n in range(1, self.nodes_needed + rng.choice((0, 1, 1, 2))))
        }
        for name in self.jobs:
            self.scheduler.at(rng.uniform(0.5, 8.0), lambda name=name: self.submit(name))  # type: ignore[misc]

    def _draw_job(self, name: JobName) -> "Job":
        rng = self.scheduler.rng
        nnodes = rng.choice((1, 2, 2, 3))
        every_steps = rng.choice((0, 5, 10, 20))
        every_seconds = rng.choice((0.0, 5.0, 15.0)) if every_steps == 0 or rng.random() < 0.2 else 0.0
        spec = JobSpec(
            name,
            Uid(""),
            Entry(EntryKind.SCRIPT, "/train.py"),
            nnodes_min=nnodes,
            nnodes_max=nnodes + rng.choice((0, 0, 0, 1)),
            nproc_per_node=rng.choice((1, 1, 2)),
            checkpoint=CheckpointPolicy(
                every_steps=every_steps,
                every_seconds=every_seconds,
                keep_last=rng.choice((2, 3)),
                timeout_s=rng.choice((20.0, 60.0)),
            ),
            restarts=RestartPolicy(max_restarts=10_000),
            shutdown_grace_s=5.0,
        )
        return Job(spec, rng.choice((25, 50, 80, 120)))

    def new_port(self) -> int:
        self._ports += 1
        return self._ports

    # Operators.

    def submit(self, name: JobName) -> None:
        """Submit the job, for the first time or again."""
        job = self.jobs[name]
        job.submissions += 1
        stamp = f"2026-01-01T00:00:{job.submissions:02d}.000Z"
        job.spec = replace(job.spec, uid=Uid(f"{name}-{job.submissions}"), submitted_at=stamp)
        spec = Put(self.keys.spec(name), codec.encode(job.spec))
        intent = Put(self.keys.intent(name), codec.encode(Intent(job.spec.uid)))
        self.scheduler.log("OPERATOR", "submits", job=name, uid=job.spec.uid)
        self.etcd.apply(lambda etcd: etcd.txn(Txn(success=(spec, intent))))

    def ask(self, name: JobName, wanted: Wanted, token: str = "") -> bool:
        """Change what is wanted of a job; False if it cannot be now."""
        found = self.etcd.memory._live.get(self.keys.intent(name))
        if found is None or self.etcd.down:
            return False
        before = codec.decode(Intent, found.value)
        if before.wanted is Wanted.CANCEL:
            return False
        intent = replace(before, wanted=wanted, checkpoint_token=token or before.checkpoint_token)
        put = Put(self.keys.intent(name), codec.encode(intent))
        self.etcd.apply(lambda etcd: etcd.txn(Txn(success=(put,))))
        return True

    def submissions(self, name: JobName) -> int:
        return self.jobs[name].submissions

    def last_uid(self, name: JobName) -> Uid:
        return self.jobs[name].spec.uid

    # What others ask.

    def leader_name(self) -> str | None:
        kv = self.etcd.memory._live.get(self.keys.leader)
        return None if kv is None else str(json.loads(kv.value)["replica"])

    def committed_seqs(self, job: JobName) -> list[int]:
        """Checkpoints that exist in etcd now."""
        live = self.etcd.memory._live
        return [
            s for s in sorted(self.checks.history(job).commits) if self.keys.checkpoint(job, Seq(s)) in live
        ]

    def bad_seqs(self, job: JobName) -> list[int]:
        live = self.etcd.memory._live
        return [s for s in sorted(self.checks.history(job).commits) if self.keys.bad(job, Seq(s)) in live]

    def rot(self, job: JobName, seq: int) -> None:
        """Flip a byte of, or lose, one blob of a committed checkpoint."""
        record = self.checks.history(job).commits[seq]
        folder = f"{record.uid}/blobs/{seq:020d}/{record.attempt:06d}-{record.nonce}/"
        keys = [key for key in sorted(self.store._blobs) if folder in key and key.endswith(".st")]
        if not keys:
            return
        key = self.scheduler.rng.choice(keys)
        self.rotten[job, seq] = None
        self.checks.damaged.add(key)
        self.scheduler.log("FAULTS", "blob rot", seq=seq, key=key[-24:])
        data, crc = self.store._blobs[key]
        if self.scheduler.chance(0.3):
            del self.store._blobs[key]
        else:
            self.store._blobs[key] = (data[:-1] + bytes([data[-1] ^ 1]), crc)

    # The run.

    def run(self) -> Result:
        scheduler, checks = self.scheduler, self.checks
        rng = scheduler.rng
        until = 0.0
        if not self.is_calm:
            until = rng.choice((40.0, 80.0, 120.0))
            self.faults.start(until)

        def after_each() -> None:
            if scheduler.events > EVENTS_MAX:
                checks.bad(f"more than {EVENTS_MAX} events: something repeats without end")

        def stop() -> bool:
            return bool(checks.violations)

        def over() -> bool:
            return bool(checks.violations) or (checks.job_is_over() and scheduler.now > until)

        with determinism(scheduler):
            try:
                limit = until + CALM_S_MAX + 0.6 * sum(job.total_steps for job in self.jobs.values())
                scheduler.run(limit, after_each, over)
                calm_s = scheduler.now - until
                if not checks.violations:
                    scheduler.run(
                        scheduler.now + CLEAN_S_MAX,
                        after_each,
                        lambda: stop() or (scheduler.events % 64 == 0 and not checks.left_behind()),
                    )
                if not checks.violations:
                    checks.at_the_end()
            finally:
                scheduler.close()
        return self._result(calm_s)

    def _result(self, calm_s: float) -> Result:
        checks = self.checks
        memory = self.etcd.memory
        state = "|".join(
            f"{kv.key}@{kv.mod_revision}" for kv in sorted(memory._live.values(), key=lambda kv: kv.key)
        )
        text = f"{self.scheduler.events}/{self.scheduler.now!r}/{memory.revision}/{state}"
        return Result(
            self.seed,
            checks.violations,
            self.scheduler.now,
            self.scheduler.events,
            sum(history.status.attempt for history in checks.jobs.values() if history.status is not None),
            sum(len(history.commits) for history in checks.jobs.values()),
            checks.auditor.terms,
            self.faults.enabled,
            hashlib.sha256(text.encode()).hexdigest()[:16],
            calm_s,
        )


class _Secrets:
    """``secrets`` from the seed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def token_hex(self, count: int) -> str:
        return f"{self._scheduler.rng.getrandbits(8 * count):0{2 * count}x}"


class _Nap:
    """``time`` as tenacity's waits see it: virtual, and without its own chance."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def sleep(self, _seconds: float) -> None:
        self._scheduler.current().sleep(self._scheduler.rng.uniform(0.02, 0.5))


@contextmanager
def determinism(scheduler: Scheduler) -> Iterator[None]:
    """Replace the last sources of real time and chance for the time of a run."""
    swaps: list[tuple[Any, str, Any]] = [
        (work, "secrets", _Secrets(scheduler)),
        (lease, "secrets", _Secrets(scheduler)),
        (probe, "secrets", _Secrets(scheduler)),
        # Looked at ten times a second nothing new is found, and most of a run is spent on it.
        (lease, "LOOK_S", 0.4),
        (mirror, "_POLL_S", 1.0),
        (reporter, "SESSION_POLL_S", 0.5),
        (tenacity.nap, "time", _Nap(scheduler)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    for module, name, value in swaps:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def run(
    seed: int, *, calm: bool = False, trace: bool = False, prepare: Callable[[Cluster], None] | None = None
) -> Result:
    """Run one seed to its end and return what was found."""
    lines: list[str] = []
    cluster = Cluster(seed, calm=calm, trace=lines.append if trace else None)
    if prepare is not None:
        prepare(cluster)
    result = cluster.run()
    result.trace = lines
    return result
