"""A whole cluster in one process, and the story of one seed: faults, then calm, then success.

``run(seed)`` is the entry point. Sizes, rates and targets are drawn from the seed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tenacity.nap

from dtrain.agent import reporter
from dtrain.coordinator import work
from dtrain.coordinator.leadership import lease
from dtrain.coordinator.work import Stores
from dtrain.protocol import codec
from dtrain.protocol.ids import ClusterName, JobName, Uid
from dtrain.protocol.job import CheckpointPolicy, Entry, EntryKind, Intent, JobSpec, RestartPolicy
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

JOB = JobName("train")
CALM_S_MAX = 400.0
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
        self.rotten: dict[int, None] = {}
        self.network = Network(self)
        self.faults = Faults(self)
        self.agent_ttl_s = rng.choice((5, 10))
        self.nproc = rng.choice((1, 1, 2))
        self.nnodes_min = rng.choice((1, 2, 2, 3))
        self.nnodes_max = self.nnodes_min + rng.choice((0, 0, 0, 1))
        self.total_steps = rng.choice((25, 50, 80, 120))
        self.is_calm = calm
        self.replicas = {
            name: Replica(self, name, ttl_s=rng.choice((5, 10)))
            for name in ("c1", "c2", "c3")[: rng.choice((2, 3, 3))]
        }
        self.machines = {
            name: Machine(self, name, slots=2)
            for name in (f"a{n}" for n in range(1, self.nnodes_max + 1 + rng.choice((1, 2))))
        }
        self.every_steps = rng.choice((0, 5, 10, 20))
        self.every_seconds = (
            rng.choice((0.0, 5.0, 15.0)) if self.every_steps == 0 or rng.random() < 0.2 else 0.0
        )
        self.spec = JobSpec(
            JOB,
            Uid(f"u{seed}"),
            Entry(EntryKind.SCRIPT, "/train.py"),
            nnodes_min=self.nnodes_min,
            nnodes_max=self.nnodes_max,
            nproc_per_node=self.nproc,
            checkpoint=CheckpointPolicy(
                every_steps=self.every_steps,
                every_seconds=self.every_seconds,
                keep_last=rng.choice((1, 2, 3)) if calm else rng.choice((2, 3)),
                timeout_s=rng.choice((20.0, 60.0)),
            ),
            restarts=RestartPolicy(max_restarts=10_000),
            shutdown_grace_s=5.0,
            submitted_at="2026-01-01T00:00:00.000Z",
        )
        self.scheduler.at(rng.uniform(0.5, 8.0), self._submit)

    def new_port(self) -> int:
        self._ports += 1
        return self._ports

    def _submit(self) -> None:
        self.etcd.apply(
            lambda etcd: etcd.txn(
                Txn(
                    success=(
                        Put(self.keys.spec(JOB), codec.encode(self.spec)),
                        Put(self.keys.intent(JOB), codec.encode(Intent(self.spec.uid))),
                    )
                )
            )
        )

    def ask_checkpoint(self, token: str) -> None:
        """An operator wants a checkpoint now."""
        if self.etcd.memory._live.get(self.keys.intent(JOB)) is None or self.etcd.down:
            return
        intent = Intent(self.spec.uid, checkpoint_token=token)
        put = Put(self.keys.intent(JOB), codec.encode(intent))
        self.etcd.apply(lambda etcd: etcd.txn(Txn(success=(put,))))

    # What others ask.

    def leader_name(self) -> str | None:
        kv = self.etcd.memory._live.get(self.keys.leader)
        return None if kv is None else str(json.loads(kv.value)["replica"])

    def committed_seqs(self) -> list[int]:
        """Checkpoints that exist in etcd now."""
        return [
            s for s in sorted(self.checks.commits) if self.keys.checkpoint(JOB, s) in self.etcd.memory._live
        ]  # type: ignore[arg-type]

    def bad_seqs(self) -> list[int]:
        return [s for s in sorted(self.checks.commits) if self.keys.bad(JOB, s) in self.etcd.memory._live]  # type: ignore[arg-type]

    def rot(self, seq: int) -> None:
        """Flip a byte of, or lose, one blob of a committed checkpoint."""
        record = self.checks.commits[seq]
        folder = f"blobs/{seq:020d}/{record.attempt:06d}-{record.nonce}/"
        keys = [key for key in sorted(self.store._blobs) if folder in key and key.endswith(".st")]
        if not keys:
            return
        key = self.scheduler.rng.choice(keys)
        self.rotten[seq] = None
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
                limit = until + CALM_S_MAX + self.total_steps * 0.6
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
            0 if checks.status is None else checks.status.attempt,
            len(checks.commits),
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
