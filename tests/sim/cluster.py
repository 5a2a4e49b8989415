"""A whole cluster in one process, and the story of one seed: faults, then calm, then success.

``run(seed)`` and ``play(schedule)`` are the entry points; ``swarm.draw`` makes a schedule of a seed.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import tenacity.nap

from dtrain.agent import consult, reporter
from dtrain.coordinator import work
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.leadership import lease
from dtrain.protocol import codec
from dtrain.protocol.ids import ClusterName, JobName, Seq, Uid
from dtrain.protocol.job import (
    TERMINAL_PHASES,
    CheckpointPolicy,
    Entry,
    EntryKind,
    HangPolicy,
    Intent,
    JobSpec,
    NonFiniteAction,
    NonFinitePolicy,
    RestartPolicy,
    Wanted,
)
from dtrain.protocol.keys import Keys
from dtrain.storage.blobs import probe
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.checkpoints import reading
from dtrain.storage.etcd import mirror
from dtrain.storage.etcd.port import Put, Txn
from tests.sim import swarm
from tests.sim.calm import Calm
from tests.sim.checks import Checks
from tests.sim.coordinator import Replica
from tests.sim.etcd import EtcdServer
from tests.sim.faults import Faults
from tests.sim.machine import Machine
from tests.sim.network import Network
from tests.sim.process import WALL_AT_START, SimClock
from tests.sim.rules import RULES
from tests.sim.schedule import JobShape, Schedule
from tests.sim.scheduler import Scheduler, Trace
from tests.sim.training import Group
from tests.sim.webhooks import TOLD_S_MAX, Webhooks

CALM_S_MAX = 250.0
"""From the calm to success, training itself not counted."""

CLEAN_S_MAX = 200.0
"""From success to nothing left behind."""

OPERATOR_S = 3.0
"""How often the operator looks after the jobs."""

LOOK_S = 0.25
"""How often it is asked whether all is over."""

EVENTS_PER_S_MAX, EVENTS_SPARE = 3_000, 300_000
"""More than this is a storm of its own: commands or writes that repeat without end."""


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
    schedule: Schedule
    """What was done, strike by strike: run again, it gives this result again."""
    fingerprint: str
    calm_s: float = 0.0
    """From the last calm to the end of the last job."""
    vacuous: str = ""
    """Why this run proves little; "" if it proves something."""
    settled_s: float = 0.0
    """The longest time that any calm took until all was as desired."""
    trace: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return sorted({strike.kind for strike in self.schedule.strikes or ()})


@dataclass
class Job:
    """A job as its operator knows it."""

    spec: JobSpec
    shape: JobShape
    submissions: int = 0

    @property
    def total_steps(self) -> int:
        return self.shape.total_steps

    def save_of(self, rank: int, step: int) -> int | None:
        """The step that the script of ``rank`` saves when it has done ``step`` steps."""
        every = self.shape.save_every
        return step if every and step % every == 0 and step < self.total_steps else None


class Cluster:
    """Everything that is there."""

    def __init__(self, schedule: Schedule, trace: Trace | None = None) -> None:
        self.schedule = schedule
        shape = schedule.shape
        self.scheduler = Scheduler(schedule.seed, trace)
        self.seed = schedule.seed
        self.name = ClusterName("sim")
        self.keys = Keys(self.name)
        self.checks = Checks(self)
        self.etcd = EtcdServer(self.scheduler)
        self.etcd.on_revision = self.checks.on_revision
        self.store = MemoryBlobs(f"sim-{schedule.seed}")
        self.groups: dict[str, Group] = {}
        self._ports = 10_000
        self.rotten: dict[tuple[JobName, int], None] = {}
        self.network = Network(self)
        self.faults = Faults(self)
        self.webhooks = Webhooks(self) if shape.webhook else None
        self.agent_ttl_s = shape.agent_ttl_s
        self.replicas = {
            f"c{number}": Replica(self, f"c{number}", ttl_s=ttl_s)
            for number, ttl_s in enumerate(shape.replica_ttls_s, 1)
        }
        self.twins: list[Replica] = []
        """Replicas under a name that another one has."""
        self.twin_names: set[str] = set()
        self.cancelled: dict[Uid, None] = {}
        self.may_fail: dict[Uid, None] = {}
        """Submissions that met what their rules end a job for."""
        self.record_leases: set[int] = set()
        """Of records that go by themselves: of nobody's session."""
        self.jobs = {JobName(job.name): Job(_spec(job), job) for job in shape.jobs}
        self.nodes_needed = max((job.nnodes_max for job in shape.jobs), default=0) + 1
        self.machines = {
            f"a{n}": Machine(self, f"a{n}", slots=shape.slots_of(n)) for n in range(1, shape.machines + 1)
        }
        for name, job in self.jobs.items():
            self.scheduler.at(job.shape.submit_at, lambda name=name: self.submit(name))  # type: ignore[misc]

    def new_record_lease(self) -> int:
        lease = self.scheduler.rng.getrandbits(62) + 1
        self.record_leases.add(lease)
        return lease

    def is_fit(self, machine: Machine) -> bool:
        """Whether each job could have its ranks on it."""
        return machine.slots >= max((job.nproc for job in self.schedule.shape.jobs), default=1)

    @property
    def nodes_there(self) -> int:
        """Machines that are on and fit for each job."""
        return sum(1 for machine in self.machines.values() if machine.powered and self.is_fit(machine))

    def new_twin(self, name: str) -> Replica:
        """Another replica under a name that is taken."""
        twin = Replica(self, name, ttl_s=self.replicas[name].ttl_s)
        self.twins.append(twin)
        self.twin_names.add(name)
        return twin

    def is_twin_alive(self, replica: Replica) -> bool:
        """Whether something serves at the address of another replica of the same id."""
        ones = [*self.twins, self.replicas.get(replica.name)]
        return any(
            one is not None and one is not replica and one.name == replica.name and one.guardian is not None
            for one in ones
        )

    def end_twin(self, twin: Replica) -> None:
        self.twins.remove(twin)
        twin.crash()

    def new_clock(self) -> SimClock:
        """The clock of a machine that boots: its own origin, its own error."""
        rng, drift = self.scheduler.rng, self.schedule.shape.clock_drift
        return SimClock(self.scheduler, rng.uniform(0, 1e5), rng.uniform(1 - drift, 1 + drift))

    def rank_saved(self, rank: int, text: str) -> None:
        """A script's own save has come to its end; the log has it."""

    def new_port(self) -> int:
        self._ports += 1
        return self._ports

    # Operators.

    def submit(self, name: JobName) -> None:
        """Submit the job, for the first time or again."""
        job = self.jobs[name]
        number = job.submissions + 1
        stamp = iso(WALL_AT_START + self.scheduler.now)
        new = replace(job.spec, uid=Uid(f"{name}-{number}"), submitted_at=stamp)
        spec = Put(self.keys.spec(name), codec.encode(new))
        intent = Put(self.keys.intent(name), codec.encode(Intent(new.uid)))
        if self.etcd.down or self.etcd.memory.out_of_space:
            self.scheduler.after(OPERATOR_S, lambda: self.submit(name))
            return
        job.submissions, job.spec = number, new
        self.scheduler.log("OPERATOR", "submits", job=name, uid=job.spec.uid)
        self.etcd.apply(lambda etcd: etcd.txn(Txn(success=(spec, intent))))

    def _operate(self) -> None:
        """While faults strike, a job that is over is submitted again: there is always something to break."""
        if not self.faults.raging:
            return
        for name, job in self.jobs.items():
            status = self.checks.history(name).status
            over = status is not None and status.phase in TERMINAL_PHASES and status.uid == job.spec.uid
            if over and job.submissions < job.shape.submissions_max:
                self.submit(name)
        self.scheduler.after(OPERATOR_S, self._operate)

    def ask(self, name: JobName, wanted: Wanted, token: str = "") -> bool:
        """Change what is wanted of a job; False if it cannot be now."""
        before = self.intent(name)
        if before is None or self.etcd.down or self.etcd.memory.out_of_space:
            return False
        if before.wanted is Wanted.CANCEL:
            return False
        token = token or before.checkpoint_token
        paused = before.paused and wanted is Wanted.RUN
        return self._want(name, replace(before, wanted=wanted, checkpoint_token=token, paused=paused))

    def scale(self, name: JobName, low: int, high: int) -> bool:
        """Want other sizes of a job; False if that cannot be said now."""
        before = self.intent(name)
        if before is None or self.etcd.down or self.etcd.memory.out_of_space:
            return False
        at = iso(WALL_AT_START + self.scheduler.now)
        return self._want(name, replace(before, nnodes_min=low, nnodes_max=high, at=at))

    def spec_now(self, name: JobName) -> JobSpec:
        """The newest submission's, with the sizes that its operator wants now."""
        spec, intent = self.jobs[name].spec, self.intent(name)
        if intent is None or intent.uid != spec.uid or not intent.nnodes_min:
            return spec
        return replace(spec, nnodes_min=intent.nnodes_min, nnodes_max=intent.nnodes_max)

    def intent(self, name: JobName) -> Intent | None:
        found = self.etcd.memory._live.get(self.keys.intent(name))
        return None if found is None else codec.decode(Intent, found.value)

    def _want(self, name: JobName, intent: Intent) -> bool:
        put = Put(self.keys.intent(name), codec.encode(intent))
        self.etcd.apply(lambda etcd: etcd.txn(Txn(success=(put,))))
        return True

    def resume(self, name: JobName) -> None:
        """Want a suspended job to go on, as soon as that can be said."""
        before = self.intent(name)
        if before is None or before.wanted is not Wanted.SUSPEND:
            return
        if not self.ask(name, Wanted.RUN):
            self.scheduler.after(OPERATOR_S, lambda: self.resume(name))

    def pause(self, name: JobName) -> bool:
        """Want a job to stand still; False if that cannot be said now."""
        before = self.intent(name)
        if before is None or self.etcd.down or self.etcd.memory.out_of_space:
            return False
        return before.wanted is Wanted.RUN and self._want(name, replace(before, paused=True))

    def unpause(self, name: JobName) -> None:
        """Want a paused job to go on, as soon as that can be said."""
        before = self.intent(name)
        if before is None or not before.paused:
            return
        if self.etcd.down or self.etcd.memory.out_of_space:
            self.scheduler.after(OPERATOR_S, lambda: self.unpause(name))
        else:
            self._want(name, replace(before, paused=False))

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

    def rot(self, job: JobName, seq: int, rng: random.Random) -> None:
        """Flip a byte of, or lose, one blob of a committed checkpoint."""
        record = self.checks.history(job).commits[seq]
        folder = f"{record.uid}/blobs/{seq:020d}/{record.attempt:06d}-{record.nonce}/"
        keys = [key for key in sorted(self.store._blobs) if folder in key and key.endswith(".st")]
        if not keys:
            return
        key = rng.choice(keys)
        self.rotten[job, seq] = None
        self.checks.damaged.add(key)
        self.scheduler.log("FAULTS", "blob rot", seq=seq, key=key[-24:])
        data, crc = self.store._blobs[key]
        if rng.random() < 0.3:
            del self.store._blobs[key]
        else:
            self.store._blobs[key] = (data[:-1] + bytes([data[-1] ^ 1]), crc)

    # The run.

    def run(self) -> Result:
        scheduler, storms = self.scheduler, self.schedule.storms
        self._look_at = 0.0
        settled_s = calm_s = 0.0
        vacuous = ""
        with determinism(scheduler, self.schedule):
            try:
                for number, storm in enumerate(storms):
                    before = self._successes()
                    scheduler.run(storm.start, self._after_each, self._failed)
                    self.faults.begin(storm)
                    self._operate()
                    scheduler.run(storm.end, self._after_each, self._failed)
                    if self._failed():
                        break
                    if self._successes() == before:
                        vacuous = vacuous or f"nothing succeeded in the storm until {storm.end:.0f} s"
                    if number + 1 < len(storms) or self.schedule.ends_calm:
                        self.faults.calm()
                        before = self._successes()
                        settled_s = max(settled_s, Calm(self).run(self._after_each))
                        if number + 1 < len(storms) and self._successes() == before:
                            vacuous = vacuous or f"nothing succeeded in the calm after {storm.end:.0f} s"
                if self.schedule.ends_calm and not self._failed():
                    calm_s = self._end()
            finally:
                scheduler.close()
        if storms and not self.faults.recorded:
            vacuous = "nothing was struck"
        return self._result(calm_s, settled_s, vacuous)

    def _end(self) -> float:
        """All faults are over: every job ends well, and nothing is left behind."""
        scheduler, checks = self.scheduler, self.checks
        since = self.schedule.storms[-1].end if self.schedule.storms else 0.0
        limit = since + CALM_S_MAX + 0.6 * sum(job.total_steps for job in self.jobs.values())
        scheduler.run(
            limit, self._after_each, lambda: self._failed() or self._now_and_then(checks.job_is_over)
        )
        calm_s = scheduler.now - since
        if not self._failed():
            scheduler.run(
                scheduler.now + CLEAN_S_MAX,
                self._after_each,
                lambda: self._failed() or self._now_and_then(lambda: not checks.left_behind()),
            )
        if not self._failed():
            checks.at_the_end()
        if self.webhooks is not None and not self._failed():
            self._tell(self.webhooks)
        return calm_s

    def _tell(self, hooks: Webhooks) -> None:
        """Whatever became of its receiver, it hears of everything."""
        self.scheduler.run(
            self.scheduler.now + TOLD_S_MAX * (1 + self.schedule.shape.clock_drift),
            self._after_each,
            lambda: self._failed() or self._now_and_then(lambda: not hooks.behind()),
        )
        if not self._failed() and (sentence := hooks.behind()):
            hooks.bad(sentence)

    def _failed(self) -> bool:
        return bool(self.checks.violations)

    def _now_and_then(self, question: Callable[[], bool]) -> bool:
        if self.scheduler.now < self._look_at:
            return False
        self._look_at = self.scheduler.now + LOOK_S
        return question()

    def _after_each(self) -> None:
        scheduler = self.scheduler
        if scheduler.events > EVENTS_SPARE + EVENTS_PER_S_MAX * scheduler.now:
            self.checks.bad(
                f"{scheduler.events} events in {scheduler.now:.0f} s: something repeats without end"
            )

    def _successes(self) -> int:
        """Commits, attempts and submissions so far: what a run has to show."""
        histories = self.checks.jobs.values()
        commits = sum(len(history.commits) for history in histories)
        attempts = sum(int(history.status.attempt) for history in histories if history.status is not None)
        return commits + attempts + sum(job.submissions for job in self.jobs.values())

    def _result(self, calm_s: float, settled_s: float, vacuous: str) -> Result:
        checks = self.checks
        memory = self.etcd.memory
        state = "|".join(
            f"{kv.key}@{kv.mod_revision}" for kv in sorted(memory._live.values(), key=lambda kv: kv.key)
        )
        text = f"{self.scheduler.now!r}/{memory.revision}/{state}"
        strikes = tuple(self.faults.recorded)
        return Result(
            self.seed,
            checks.violations,
            self.scheduler.now,
            self.scheduler.events,
            sum(history.status.attempt for history in checks.jobs.values() if history.status is not None),
            sum(len(history.commits) for history in checks.jobs.values()),
            checks.auditor.terms,
            replace(self.schedule, strikes=strikes),
            hashlib.sha256(text.encode()).hexdigest()[:16],
            calm_s,
            vacuous,
            settled_s,
        )


def _spec(job: JobShape) -> JobSpec:
    return JobSpec(
        JobName(job.name),
        Uid(""),
        Entry(EntryKind.SCRIPT, "/train.py"),
        nnodes_min=job.nnodes_min,
        nnodes_max=job.nnodes_max,
        nproc_per_node=job.nproc,
        checkpoint=CheckpointPolicy(
            every_steps=job.every_steps,
            every_seconds=job.every_seconds,
            keep_last=job.keep_last,
            timeout_s=job.timeout_s,
        ),
        isolation_grace_s=job.isolation_grace_s,
        reschedule_grace_s=job.reschedule_grace_s,
        restarts=RestartPolicy(max_restarts=10_000),
        shutdown_grace_s=5.0,
        priority=job.priority,
        spares=job.spares,
        grow_cooldown_s=job.grow_cooldown_s,
        hang=HangPolicy(timeout_s=job.hang_s),
        nonfinite=NonFinitePolicy(NonFiniteAction(job.nonfinite), back=job.back),
        failure_rules=tuple(RULES[name] for name in job.rules),
    )


@lru_cache(8192)
def _decoded(kind: type[Any], data: bytes | str, bytes_max: int) -> Any:
    return _DECODE(kind, data, bytes_max=bytes_max)


def _decode(kind: type[Any], data: bytes | str, *, bytes_max: int = codec.RECORD_BYTES_MAX) -> Any:
    return _decoded(kind, data, bytes_max)


_DECODE = codec.decode
_NAMES: dict[type[Any], tuple[str, ...]] = {}


def _replace(value: Any, /, **changes: Any) -> Any:
    """``dataclasses.replace`` at half the price: a tenth of a run is spent on it."""
    kind = type(value)
    names = _NAMES.get(kind)
    if names is None:
        names = _NAMES[kind] = tuple(field.name for field in dataclasses.fields(kind) if field.init)
    for name in names:
        if name not in changes:
            changes[name] = getattr(value, name)
    return kind(**changes)


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
def determinism(scheduler: Scheduler, schedule: Schedule) -> Iterator[None]:
    """Replace the last sources of real time and chance for the time of a run."""
    swaps: list[tuple[Any, str, Any]] = [
        (work, "secrets", _Secrets(scheduler)),
        (lease, "secrets", _Secrets(scheduler)),
        (probe, "secrets", _Secrets(scheduler)),
        # Looked at ten times a second nothing new is found, and most of a run is spent on it.
        (lease, "LOOK_S", 0.4),
        (mirror, "_POLL_S", 1.0),
        (mirror, "PAGE_KEYS", schedule.shape.page_keys),
        (reporter, "SESSION_POLL_S", 0.5),
        (consult, "POLL_S", 1.0),
        # Each record is read by every replica and by the checks: values never change.
        (codec, "decode", _decode),
        (dataclasses, "replace", _replace),
        (tenacity.nap, "time", _Nap(scheduler)),
        # Its deadline is of real time, which does not pass here.
        (reading, "_ATTEMPTS_MAX", 5),
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
    return play(swarm.calm(seed) if calm else swarm.draw(seed), trace=trace, prepare=prepare)


def play(
    schedule: Schedule, *, trace: bool = False, prepare: Callable[[Cluster], None] | None = None
) -> Result:
    """Run a schedule to its end and return what was found."""
    lines: list[str] = []
    cluster = Cluster(schedule, lines.append if trace else None)
    if prepare is not None:
        prepare(cluster)
    result = cluster.run()
    result.trace = lines
    return result
