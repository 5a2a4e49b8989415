"""What must hold after every event of a run, and what must be left at its end.

Numbers as in ``docs/guarantees.md``. A claim that does not hold is written down and ends the run.
"""

import gzip
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtrain.agent.core import invariants as agent_invariants
from dtrain.agent.core import isolation
from dtrain.agent.core.state import AgentState, LinkState
from dtrain.coordinator.core import invariants
from dtrain.coordinator.core.decisions import Decision, PutRecord
from dtrain.protocol import codec
from dtrain.protocol.audit import Auditor, Change
from dtrain.protocol.checkpoint import CommitRecord, Latest, Manifest, Quarantine
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import Attempt, JobName, Seq
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, JobPhase, JobSpec, JobStatus
from dtrain.protocol.snapshot import Failure, FailureKind, NodeRecord, StackKind
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Event, prefix_end
from tests.sim.timekeeping import Timekeeper
from tests.sim.training import SimRank, weights_at
from tests.sim.transfer import HEAD_BYTES, TENSOR

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.coordinator import Coordinator, Replica
    from tests.sim.machine import Machine, SimAgent

ISOLATION_SLACK_S = 20.0
"""Beyond the graces: until the launcher is killed, and clocks that drift."""

HUNG_LATELY_S = 15.0
"""Before a decision: a rank that goes on while it is made does not undo it."""

YOUNG_S = 0.5
"""An attempt so young has told of no step yet: without one, nothing is saved before it ends."""

MIRROR_SAMPLED = 16
"""One in so many changes of a mirror is compared with etcd at its revision."""


@dataclass
class History:
    """What etcd has said of one job so far."""

    status: JobStatus | None = None
    latest: int = 0
    final_tries: int = 0
    at_sweep: frozenset[str] = frozenset()
    """Blobs that were there when the last sweep was done: what comes later is a zombie's."""
    commits: dict[int, CommitRecord] = field(default_factory=dict)
    """Every commit ever, by seq."""


class Checks:
    """Collects violations; the run stops at the first."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self.violations: list[str] = []
        self.auditor = Auditor(cluster.name)
        self.jobs: dict[JobName, History] = {}
        self.damaged: set[str] = set()
        """Blobs that a fault has damaged or deleted at rest."""
        self.went_back = False
        """etcd was restored from an older snapshot: whoever notices must stop."""
        self._raised = False
        self._forgetful: set[str] = set()
        self._journal_full_at: dict[str, float] = {}
        self._gone_at: dict[str, tuple[int, float]] = {}
        """Revision and instant at which the session ended of an agent that has none now and did not drain."""
        self._draining: set[str] = set()
        self._sick: set[tuple[str, int, int]] = set()
        """Submission, attempt and step in which a rank's loss was not finite."""
        self._sick_at_end: set[str] = set()
        self._done: dict[str, tuple[int, int]] = {}
        """The newest attempt of each submission that has made a step, and its last one."""
        self._first_at: dict[str, float] = {}
        """When the newest attempt of each submission had made its first step."""
        self._began: dict[str, float] = {}
        self._left: dict[str, tuple[int, int]] = {}
        """The attempt that each submission has left as planned, and the step that it goes on from."""
        self.time = Timekeeper(cluster, self.bad)
        self._mirror_changes = 0
        self._audited = 0
        self._terms: dict[str, int] = {}
        self._attempts: dict[tuple[str, str], int] = {}

    def bad(self, what: str) -> None:
        self.violations.append(f"at {self._cluster.scheduler.now:.3f} s: {what}")
        self._cluster.scheduler.log("CHECKS", what)

    def bug(self, where: str, error: BaseException) -> None:
        lines = traceback.format_exception(error)
        self.bad(f"{where} died of {type(error).__name__}: {error}\n{''.join(lines[-6:])}")

    def etcd_went_back(self, name: str, error: DtrainError) -> bool:
        """A mirror says that etcd is not the one it was; whether that is so."""
        if not self.went_back:
            self.bug(f"{name}/alarm", error)
        return self.went_back

    def etcd_was_raised(self, memory: MemoryEtcd) -> None:
        """etcd was restored from a snapshot with raised revisions: another history, for the same agents."""
        self._raised = True
        root, revision = self._cluster.keys.root, memory.revision
        records = list(memory._at(root, prefix_end(root), 0))
        self.auditor.begin_at(revision, [Change(kv.key, kv.value, kv.create_revision) for kv in records])
        for history in self.jobs.values():
            history.status, history.latest = None, 0
        for kv in records:
            place = self._cluster.keys.parse(kv.key)
            if place is not None and place.kind == "status":
                self.history(place.job).status = codec.decode(JobStatus, kv.value)
            elif place is not None and place.kind == "latest":
                self.history(place.job).latest = codec.decode(Latest, kv.value).seq

    def name_taken(self, replica: "Replica", error: DtrainError) -> bool:
        """A replica says that another one has its name; whether there was one lately."""
        cluster = self._cluster
        known = replica.name in cluster.twin_names
        if not known:
            self.bug(f"{replica.name}/taken", error)
        return known

    def journal_lost(self, machine: str) -> None:
        """Its agent begins anew: what it had promised to remember, it cannot."""
        self._forgetful.add(machine)
        self._terms.pop(machine, None)
        for place in [place for place in self._attempts if place[0] == machine]:
            del self._attempts[place]

    # etcd's history.

    def on_revision(self, revision: int, events: Sequence[Event]) -> None:
        changes = [
            Change(
                event.kv.key,
                None if event.kind == "delete" else event.kv.value,
                event.kv.create_revision,
            )
            for event in events
        ]
        if self.went_back:
            # Two histories: no auditor can make one of them. Agents and the store are still watched.
            return
        self.auditor.feed(revision, changes)
        for violation in self.auditor.violations[self._audited :]:
            if violation.invariant in ("I6", "I7") and violation.message.split()[0] in self._forgetful:
                continue
            self.bad(f"auditor: {violation}")
        self._audited = len(self.auditor.violations)
        for change in changes:
            place = self._cluster.keys.parse(change.key)
            match place.kind if place else "":
                case "node":
                    assert place is not None
                    self._node(str(place.agent), revision, change.value)
                case "status" if change.value is not None:
                    assert place is not None
                    self._status(place.job, codec.decode(JobStatus, change.value))
                case "spec" if change.value is not None:
                    self.time.submitted(codec.decode(JobSpec, change.value).uid)
                case "latest":
                    assert place is not None
                    latest = 0 if change.value is None else codec.decode(Latest, change.value).seq
                    self.history(place.job).latest = latest
                case "checkpoint" if change.value is not None:
                    assert place is not None
                    self._commit(place.job, codec.decode(CommitRecord, change.value))
                case "event" if change.value is not None and not self._raised:
                    told = codec.decode(EventRecord, change.value)
                    if told.reason is EventReason.ETCD_RESTORED:
                        self.bad(f"a false alarm: {told.message}")
                case "bad" if change.value is not None:
                    assert place is not None
                    self._put_aside(place.job, codec.decode(Quarantine, change.value))
                case "checkpoint":
                    assert place is not None
                    self._gone(place.job, place.seq)
                    if place.seq == self.history(place.job).latest:
                        self._newest_gone(place.job, place.seq)

    def _node(self, name: str, revision: int, value: bytes | None) -> None:
        if value is None:
            if name not in self._draining:
                self._gone_at[name] = revision, self._cluster.scheduler.now
            return
        self._gone_at.pop(name, None)
        drains = codec.decode(NodeRecord, value).draining is not None
        (self._draining.add if drains else self._draining.discard)(name)

    def _newest_gone(self, job: JobName, seq: int) -> None:
        """I3: only a new submission of the name may retire the newest checkpoint of the old one."""
        record, uid = self.jobs[job].commits[seq], self._cluster.last_uid(job)
        if record.uid == uid:
            self.bad(f"I3: checkpoint {seq} was the newest and is gone")

    def _put_aside(self, job: JobName, record: Quarantine) -> None:
        """Only what is damaged is quarantined, whoever has reported it."""
        if record.blob not in self.damaged:
            self.bad(f"checkpoint {record.seq} of {job} is put aside for {record.blob}, which is whole")

    def _gone(self, job: JobName, seq: Seq) -> None:
        """Invariant 16: the newest good one stays, whatever retention and operators want."""
        commits, bad = self.jobs[job].commits, [*self._cluster.bad_seqs(job), *self._passed_over(job)]
        record = commits[seq]
        good = [s for s in self._cluster.committed_seqs(job) if s not in bad and commits[s].uid == record.uid]
        if record.uid == self._cluster.last_uid(job) and seq not in bad and max(good, default=0) < seq:
            self.bad(f"checkpoint {seq} of {job} was the newest good one and is gone")

    def read(self, job: JobName, seq: Seq) -> None:
        """A reader that has held its pin all the time finds every blob."""
        record, store = self.jobs[job].commits[seq], self._cluster.store
        held = store._blobs.get(record.manifest)
        if held is None:
            self.bad(f"checkpoint {seq} of {job} is pinned and its manifest is gone")
            return
        for blob in codec.decode(Manifest, gzip.decompress(held[0])).blobs:
            if blob.key not in store._blobs and blob.key not in self.damaged:
                self.bad(f"checkpoint {seq} of {job} is pinned and has lost {blob.key}")

    def history(self, job: JobName) -> "History":
        return self.jobs.setdefault(job, History())

    def _status(self, job: JobName, status: JobStatus) -> None:
        history = self.history(job)
        before, history.status = history.status, status
        if before is None or before.attempt != status.attempt or before.phase != status.phase:
            self._cluster.scheduler.log(
                "JOB", status.phase, job=job, attempt=status.attempt, step=status.step, reason=status.reason
            )
        if before is not None and status.attempt > before.attempt:
            self._check_restore(job, status)
            self._check_planned(job, before, status)
        if status.phase in PLACED_PHASES:
            self._check_slots()
        history.final_tries = max(history.final_tries, status.final_tries)
        if status.swept and (before is None or not before.swept):
            history.at_sweep = frozenset(self._cluster.store._blobs)

    def _check_planned(self, job: JobName, before: JobStatus, status: JobStatus) -> None:
        """No step is done twice over a change of size, a move or a pause, unless something has failed."""
        began, self._began[status.uid] = (
            self._began.get(status.uid, 0.0),
            self._cluster.scheduler.now,
        )
        self._left.pop(status.uid, None)
        if before.uid != status.uid or status.failure != before.failure:
            return
        if self._cluster.faults.harm_until >= began or self._raised or self.went_back:
            return
        if self._cluster.scheduler.now - self._first_at.get(status.uid, 0.0) < YOUNG_S:
            return
        step = 0 if status.restore is None else int(status.restore.step)
        self._left[status.uid] = int(before.attempt), step
        attempt, done = self._done.get(status.uid, (0, 0))
        if attempt == before.attempt and done > step:
            self.bad(
                f"attempt {status.attempt} of {job} repeats steps {step + 1} to {done}, and nothing has"
                f" failed: {status.reason}"
            )

    def _check_slots(self) -> None:
        """No machine is given more ranks than it has slots, whichever jobs they are of."""
        used: dict[str, int] = {}
        for history in self.jobs.values():
            status = history.status
            if status is not None and status.phase in PLACED_PHASES:
                for member in status.members:
                    used[member.agent] = used.get(member.agent, 0) + member.nproc
        for name, count in used.items():
            slots = self._cluster.machines[name].slots
            if count > slots:
                self.bad(f"{name} has {slots} slots and is given {count} ranks")

    def _passed_over(self, job: JobName) -> tuple[Seq, ...]:
        """What training was rolled back past: no longer what an attempt may begin from."""
        status = self.jobs[job].status
        return () if status is None else status.passed_over

    def _check_restore(self, job: JobName, status: JobStatus) -> None:
        """G6: a new attempt starts from the newest checkpoint that is good."""
        if status.attempt in self.auditor._agents.forgotten(job, status.uid):
            return  # it trains already: a restored etcd had forgotten it
        bad = [*self._cluster.bad_seqs(job), *status.passed_over]
        mine = [s for s in self._cluster.committed_seqs(job) if self.jobs[job].commits[s].uid == status.uid]
        newest = max((seq for seq in mine if seq not in bad), default=None)
        found = None if status.restore is None else int(status.restore.seq)
        if found != newest:
            self.bad(
                f"G6: attempt {status.attempt} of {job} restores {found}, the newest good one is {newest}"
            )

    def _commit(self, job: JobName, record: CommitRecord) -> None:
        """G2: every part from one attempt and one step, durable, and together the true state."""
        self.history(job).commits[int(record.seq)] = record
        if (record.uid, int(record.attempt), int(record.step)) in self._sick:
            self.bad(f"checkpoint {record.seq} of {job} is of step {record.step}, whose loss was not finite")
        self._cluster.scheduler.log(
            "JOB", "COMMIT", job=job, seq=record.seq, step=record.step, attempt=record.attempt
        )
        store = self._cluster.store
        fault, store.fault = store.fault, lambda _operation, _key: None
        try:
            manifest = codec.decode(Manifest, gzip.decompress(store.get(record.manifest)))
            state = bytearray(64)
            blobs = [store.get(blob.key) for blob in manifest.blobs]
            for data in blobs:
                head = json.loads(data[:HEAD_BYTES])
                found = (head["uid"], head["seq"], head["attempt"], head["step"])
                if found != (record.uid, record.seq, record.attempt, record.step):
                    self.bad(f"G2: checkpoint {record.seq} holds a part of {found}")
            for chunk in manifest.tensors[TENSOR].chunks:
                state[chunk.o[0] : chunk.o[0] + chunk.len] = blobs[chunk.b][chunk.off : chunk.off + chunk.len]
            damaged = any(blob.key in self.damaged for blob in manifest.blobs)
            if bytes(state) != weights_at(record.step) and not damaged:
                self.bad(f"G9: checkpoint {record.seq} is not the state after step {record.step}")
        except (DtrainError, ValueError, KeyError, OSError) as error:
            if not self.damaged:
                self.bad(f"G2: checkpoint {record.seq} was committed and cannot be read: {error!r}")
        finally:
            store.fault = fault

    # Coordinators.

    def driver_moved(self, coordinator: "Coordinator") -> None:
        driver = coordinator.driver
        if not driver.leads or (driver._revision == coordinator.checked_at and driver._now % 1.0 < 0.9):
            return
        coordinator.checked_at = driver._revision
        for job in driver.world.jobs():
            for sentence in invariants.check(driver.world.job_view(job)):
                self.bad(f"{coordinator.replica.name} sees job {job} broken: {sentence}")

    def driver_said(self, coordinator: "Coordinator", event: str, fields: dict[str, Any]) -> None:
        if event == "plan failed":
            self.bad(f"{coordinator.replica.name}: plan failed: {fields}")
        if event == "record unusable":
            self.bad(f"{coordinator.replica.name}: {fields}")
        if event == "work failed" and "died" in str(fields.get("problem", "")):
            self.bad(f"{coordinator.replica.name}: {fields}")

    def deciding(self, coordinator: "Coordinator", job: JobName, decision: Decision) -> None:
        """I9: nobody is declared lost under the brake, nor before the job's grace is over.

        Judged as it is decided: by the next attempt the machine may have come back and gone again.
        """
        world = coordinator.driver.world
        view = world.job_view(job)
        if view.status is None or view.spec is None:
            return
        for write in decision.writes:
            if not isinstance(write, PutRecord) or not isinstance(write.value, JobStatus):
                continue
            new, old = write.value, view.status.value
            if not (self._raised or self.went_back or old.phase in TERMINAL_PHASES):
                self.time.told(job, new)
            hang = new.failure is not None and new.failure.kind is FailureKind.HANG
            if hang and new.failure != old.failure and new.failure is not None:
                self._hang_is_planted(job, new.failure)
            if new.failure is None or new.failure.kind is not FailureKind.AGENT_LOST:
                continue
            if new.failure == old.failure:
                continue
            if world.brake(coordinator.now()):
                self.bad(f"I9: an agent is declared lost under the brake: {new.reason}")
            name = str(new.failure.agent)
            if self.went_back or name in world._agents or name not in self._gone_at:
                # The grace is for a session that has ended: one that is there shows what it has. Who
                # drained has said that it does not come back.
                continue
            revision, since = self._gone_at[name]
            away_s, grace_s = self._cluster.scheduler.now - since, view.spec.value.reschedule_grace_s
            # A mirror that lags knows of an earlier absence.
            if away_s < 0.85 * grace_s and coordinator.driver._revision >= revision:
                self.bad(
                    f"I9: {name} was called lost {away_s:.1f} s after its session,"
                    f" the grace is {grace_s:.0f} s"
                )

    def _hang_is_planted(self, job: JobName, failure: Failure) -> None:
        """Whatever is slow, cut off or asleep, nobody is called hung but who is."""
        lately = self._cluster.scheduler.now - HUNG_LATELY_S
        hung = {
            rank.rank: rank.hung
            for machine in self._cluster.machines.values()
            for launcher in machine.launchers.values()
            for rank in launcher.ranks
            if launcher.job == job and rank.attempt == failure.attempt
            if rank.hung or 0.0 <= lately <= rank.hung_at
        }
        if not hung:
            self.bad(f"job {job} is called hung and is not: {failure.message}")
        elif failure.rank not in hung and StackKind.COLLECTIVE not in hung.values():
            # One that hangs in a collective looks like those that wait for it.
            self.bad(f"rank {failure.rank} of job {job} is called hung, those that are: {sorted(hung)}")

    def mirror_at(self, name: str, mirror: Mirror, revision: int) -> None:
        """I8: a mirror is etcd at its revision."""
        self._mirror_changes += 1
        memory = self._cluster.etcd.memory
        if self._mirror_changes % MIRROR_SAMPLED or revision < memory.compacted:
            return
        root = self._cluster.keys.root
        truth = {kv.key: kv.mod_revision for kv in memory._at(root, prefix_end(root), revision)}
        copy = {kv.key: kv.mod_revision for kv in mirror.prefix(root)}
        if truth != copy:
            wrong = sorted(key for key in truth.keys() | copy.keys() if truth.get(key) != copy.get(key))
            self.bad(f"I8: the mirror of {name} at {revision} is wrong about {wrong[:3]}")

    # Agents and ranks.

    def agent_stepped(self, agent: "SimAgent", state: AgentState) -> None:
        try:
            agent_invariants.check(state)
        except DtrainError as error:
            self.bad(f"{agent.machine.name}: {error.message}")
        name = agent.machine.name
        if state.term < self._terms.get(name, 0):
            self.bad(f"I6: {name} went back to term {state.term}")
        self._terms[name] = state.term
        for job in state.jobs.values():
            place = (name, job.uid)
            if job.attempt < self._attempts.get(place, 0):
                self.bad(f"I6: {name} went back to attempt {job.attempt} of {job.name}")
            self._attempts[place] = job.attempt
        self._check_grace(agent, state)

    def _check_grace(self, agent: "SimAgent", state: AgentState) -> None:
        """Ranks on a machine that is cut off end when their grace is over, not later."""
        name, now = agent.machine.name, self._cluster.scheduler.now
        if agent.machine.journal.failing:
            # What an agent cannot write down it does not do, ending ranks included.
            self._journal_full_at[name] = now
        if state.link.state is not LinkState.ISOLATED or now - self._journal_full_at.get(name, -1e9) < 40.0:
            return
        for job in state.jobs.values():
            if job.prepare is None or not job.alive:
                continue
            away_s = agent.clock.monotonic() - max(state.link.since, job.started_at)
            spec = job.prepare.spec
            limit_s = isolation.grace_s(spec, job.pace) + spec.shutdown_grace_s + ISOLATION_SLACK_S
            if away_s > limit_s:
                self.bad(
                    f"isolation: ranks of {job.name} live {away_s:.0f} s after {agent.machine.name} was cut"
                )

    def forking(self, machine: "Machine", job: JobName, attempt: Attempt) -> None:
        """I6: no machine runs two sets of ranks of a job."""
        for launcher in machine.launchers.values():
            for rank in launcher.ranks:
                if launcher.job == job and rank.alive and not launcher.stray:
                    other = f"rank {rank.rank} of attempt {rank.attempt}"
                    self.bad(f"I6: {machine.name} forks attempt {attempt} beside {other}")

    def restored(self, rank: SimRank, step: int, state: bytes) -> None:
        if state != weights_at(step):
            self.bad(f"G9: rank {rank.rank} of attempt {rank.attempt} restored a wrong state of step {step}")

    def sick(self, rank: SimRank, step: int) -> None:
        """The rank's loss is not finite in ``step``."""
        uid = rank.launcher.uid
        self._sick.add((uid, int(rank.attempt), step))
        if step >= rank.total_steps:
            self._sick_at_end.add(uid)

    def stepped(self, rank: SimRank, step: int) -> None:
        uid, attempt = rank.launcher.uid, int(rank.attempt)
        self.time.stepped(uid, attempt, step)
        before = self._done.get(uid, (0, 0))
        self._done[uid] = max(before, (attempt, step))
        if attempt > before[0]:
            self._first_at[uid] = self._cluster.scheduler.now
        if self._left.get(uid, (0, 0))[0] == attempt and step > self._left[uid][1]:
            self.bad(f"rank {rank.rank} of {uid} does step {step} in attempt {attempt}, which is over")
        if step != rank.step + 1:
            self.bad(f"rank {rank.rank} of attempt {rank.attempt} went from step {rank.step} to {step}")

    def saved(self, rank: SimRank, step: int) -> None:
        """G2: what a script was told to be saved is committed."""
        if step not in {record.step for record in self.history(rank.launcher.job).commits.values()}:
            self.bad(f"rank {rank.rank} of attempt {rank.attempt} was told that step {step} is committed")

    def finished(self, rank: SimRank) -> None:
        if rank.session.stop_reason is None and rank.state != weights_at(rank.total_steps):
            self.bad(f"G9: rank {rank.rank} of attempt {rank.attempt} ends with other weights")

    def began(self, rank: SimRank, step: int) -> None:
        """The rank's attempt has its state of ``step``."""
        self.time.began(rank.launcher.uid, int(rank.attempt), step)

    # The end.

    def job_is_over(self) -> bool:
        """Every submission has reached its end."""
        return all(
            (status := self.history(job).status) is not None
            and status.phase in TERMINAL_PHASES
            and status.uid == self._cluster.last_uid(job)
            for job in self._cluster.jobs
        )

    def left_behind(self) -> list[str]:
        """What is still there although the job is over and all is calm; empty: nothing."""
        cluster = self._cluster
        left = []
        for kv in cluster.etcd.memory._at(cluster.keys.root, prefix_end(cluster.keys.root), 0):
            if kv.key.startswith(cluster.keys.webhook("")):
                continue  # how far receivers have been told outlives every job
            place = cluster.keys.parse(kv.key)
            if place is None or place.kind in ("worker", "open", "garbage", "pin", "order"):
                left.append(f"key {kv.key}")
        left += self.leases_wrong()
        named = self._named_blobs()
        # A probe whose deletion failed is nobody's to find; it is a few bytes.
        blobs = [key for key in sorted(cluster.store._blobs) if not key.startswith("dtrain-probe/")]
        # Orphans of an earlier submission whose name was used again before the last sweep stay.
        roots = tuple(f"{cluster.name}/{job}/{cluster.last_uid(job)}/" for job in cluster.jobs)
        known = frozenset[str]().union(*(history.at_sweep for history in self.jobs.values()))
        left += [
            f"blob {key}" for key in blobs if key not in named and key.startswith(roots) and key in known
        ]
        for machine in cluster.machines.values():
            left += [
                f"launcher of {launcher.job} on {machine.name}" for launcher in machine.launchers.values()
            ]
        return left

    def leases_wrong(self) -> list[str]:
        """I11: one lease for each guardian that lives, and no other."""
        cluster = self._cluster
        leases = len(cluster.etcd.memory.leases().keys() - cluster.record_leases)
        expected = sum(1 for r in cluster.replicas.values() if r.guardian) + sum(
            1 for m in cluster.machines.values() if m.powered
        )
        return [f"{leases} leases instead of {expected}"] if leases != expected else []

    def _named_blobs(self) -> set[str]:
        cluster = self._cluster
        named = set()
        for job in cluster.jobs:
            for seq in cluster.committed_seqs(job):
                record = self.jobs[job].commits[seq]
                named.add(record.manifest)
                prefix = f"{record.uid}/blobs/{seq:020d}/{record.attempt:06d}-{record.nonce}/"
                # The ranks' own manifests stay beside their blobs.
                named |= {key for key in cluster.store._blobs if prefix in key}
        return named

    def at_the_end(self) -> None:
        """After the calm: success, exactness, and nothing left behind."""
        for job in self._cluster.jobs:
            history = self.history(job)
            status, uid = history.status, self._cluster.last_uid(job)
            ends = {JobPhase.SUCCEEDED}
            ends |= {JobPhase.CANCELLED} if uid in self._cluster.cancelled else set()
            ends |= {JobPhase.FAILED} if uid in self._cluster.may_fail else set()
            if status is None or status.phase not in ends or status.uid != uid:
                what = "never began" if status is None else f"is {status.phase} ({status.reason})"
                self.bad(f"I10: job {job} {what} long after the faults have stopped")
                return
            final = [c for c in history.commits.values() if c.final and c.uid == uid]
            if uid in self._sick_at_end:
                continue
            if status.phase is JobPhase.SUCCEEDED and not final and not history.final_tries:
                self.bad(f"job {job} succeeded without a checkpoint of its end")
        for sentence in self.left_behind():
            self.bad(f"I11: left behind: {sentence}")
