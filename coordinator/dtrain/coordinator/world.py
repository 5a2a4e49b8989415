"""What this replica knows: etcd's records decoded, and what it saw for itself.

Fed by changes of the mirror and by local facts, read as views. Standbys keep it
too, so that a new leader decides from what it saw before it won. A record that
cannot be decoded makes its own job untouchable, never the others.

Not thread-safe: the driver owns it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from dtrain.coordinator.core import elastic, releases
from dtrain.coordinator.core.decisions import InspectCheckpoint
from dtrain.coordinator.core.placement import UNREACHABLE_REST_S
from dtrain.coordinator.core.queue import Machine, Running, Waiting
from dtrain.coordinator.core.stamps import parse_iso
from dtrain.coordinator.core.views import (
    NO_QUEUE,
    AgentView,
    FleetView,
    Inspection,
    JobView,
    Stored,
    SweepFound,
    Verdict,
)
from dtrain.coordinator.known import (
    NOTHING_SWEPT,
    NUMBERED,
    SINGLE,
    Cell,
    KnownJob,
    T,
    is_current,
    moved,
    pace_of,
    read,
    sightings,
    step_rate,
    uid_of,
)
from dtrain.coordinator.line import Line
from dtrain.coordinator.losses import Losses
from dtrain.coordinator.slots import Slots
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import (
    CommitRecord,
    Garbage,
    Latest,
    OpenRecord,
    Order,
    Quarantine,
    Verification,
)
from dtrain.protocol.cluster import Cordon, ReplicaRecord, Suspicion
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import AgentName, ClusterName, JobName, ReplicaId, Seq, Term, Uid, parse_name
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobPhase, JobSpec, JobStatus, Wanted
from dtrain.protocol.keys import Keys, Parsed
from dtrain.protocol.snapshot import NodeRecord, WorkerSnapshot
from dtrain.storage.etcd.mirror import Change

AGENT_RENEWALS_PER_S = 700.0
AGENT_TTL_S_MAX = 120.0

_WAITING_PHASES = frozenset({JobPhase.QUEUED, JobPhase.STARTING, JobPhase.RECOVERING})


class World:
    """The state behind the views; ``touched`` collects jobs that deserve a look."""

    def __init__(
        self,
        cluster: ClusterName,
        replica: ReplicaId,
        *,
        agent_ttl_s: float = 10.0,
        default_store: str = "",
        scrub_interval_s: float = 0.0,
        cordon_s: float = 0.0,
    ) -> None:
        self.cluster = cluster
        self.replica = replica
        self.default_store = default_store
        self._scrub_interval_s = scrub_interval_s
        self._cordon_s = cordon_s
        self._agent_ttl_s = agent_ttl_s
        self._keys = Keys(cluster)
        self._jobs: dict[JobName, KnownJob] = {}
        self._agents: dict[AgentName, AgentView] = {}
        self._agents_shared = False
        self._losses = Losses()
        self._cordons: dict[AgentName, Cordon | None] = {}
        """None: it is there, and cannot be read."""
        self._suspicions: dict[AgentName, Stored[Suspicion]] = {}
        self._versions: dict[ReplicaId, str] = {}
        """What the coordinators run."""
        self._unreachable: dict[AgentName, float] = {}
        self._slots = Slots()
        self._waiting: set[JobName] = set()
        self._line = Line()
        self._queue_seen = NO_QUEUE
        self._now = 0.0
        self._heard_at: float | None = None
        self._touched: set[JobName] = set()
        self.problems: list[str] = []
        """Sentences about records outside of jobs that cannot be used; the driver logs them."""

    # What comes in.

    def apply(self, changes: Iterable[Change], now: float) -> None:
        """Take over changes of the mirror, in order."""
        self._heard_at = self._now = now
        for change in changes:
            parsed = self._keys.parse(change.key)
            if parsed is None:
                continue
            match parsed.kind:
                case "node":
                    self._node_changed(parsed.agent, change, now)
                case "cordon":
                    self._cordon_changed(parsed.agent, change, now)
                case "suspicion":
                    self._suspicion_changed(parsed.agent, change, now)
                case "coordinator":
                    self._replica_changed(ReplicaId(parsed.name), change)
                case "leader":
                    pass
                case _:
                    self._job_changed(parsed, change, now)

    def _replica_changed(self, replica: ReplicaId, change: Change) -> None:
        before = releases.withheld(self._versions)
        self._versions.pop(replica, None)
        if change.after is not None:
            try:
                self._versions[replica] = codec.decode(ReplicaRecord, change.after.value).version
            except DtrainError as error:
                self.problems.append(f"the record of coordinator {replica} cannot be read: {error.message}")
        if before and not releases.withheld(self._versions):
            self._touched |= self._jobs.keys()

    def heard(self, at: float) -> None:
        """The mirror was known to be complete at ``at``."""
        self._heard_at = at if self._heard_at is None else max(self._heard_at, at)

    def record_verdict(self, job: JobName, verdict: Verdict) -> None:
        """Remember what verifying an open checkpoint found."""
        known = self._jobs.get(job)
        if known is not None and verdict.seq in known.numbered.get("open", {}):
            known.verdicts[verdict.seq, verdict.nonce] = verdict
            self._touched.add(job)

    def record_collected(self, job: JobName, seq: Seq) -> None:
        """Remember that a tombstone's blobs are gone."""
        known = self._jobs.get(job)
        if known is not None and seq in known.numbered.get("garbage", {}):
            known.collected.add(seq)
            self._touched.add(job)

    def record_inspection(self, job: JobName, work: InspectCheckpoint, found: Inspection) -> None:
        """Remember what reading a committed checkpoint again found."""
        known = self._jobs.get(job)
        if known is not None and work.seq in known.numbered.get("checkpoint", {}):
            known.inspections[work.seq, work.depth, work.blob, work.chunk] = found
            self._touched.add(job)

    def record_swept(
        self, job: JobName, uid: Uid, began_at: float, found: SweepFound = NOTHING_SWEPT
    ) -> None:
        """Remember that orphans of a submission were looked for, whatever came of it."""
        if (known := self._jobs.get(job)) is not None:
            if known.status is None or known.status.uid == uid:
                known.swept_at = began_at
                known.swept_found = found
            else:
                known.swept_former.add(uid)
            self._touched.add(job)

    def record_unknown(self, job: JobName, found: tuple[Seq, Seq] | None) -> None:
        """Remember numbers of checkpoints that only the store knows."""
        known = self._jobs.get(job)
        if known is None or found is None:
            return
        before = known.unknown or found
        known.unknown = (min(found[0], before[0]), max(found[1], before[1]))
        self._touched.add(job)

    def record_probe(self, job: JobName, problem: str, now: float) -> None:
        """Remember whether the job's store answered."""
        if (known := self._jobs.get(job)) is not None:
            known.store_ok, known.store_problem, known.store_probed_at = not problem, problem, now
            self._touched.add(job)
            self._note_line(job)

    def record_reached(self, agent: AgentName, reached: bool, now: float) -> None:
        """Remember whether an agent answered the newest command."""
        if reached and agent not in self._unreachable:
            return
        if reached:
            del self._unreachable[agent]
        else:
            # The newest failure counts: the first may be older than the attempt, or
            # than our own sight of its record, and would say nothing about its PREPARE.
            self._unreachable[agent] = now
        self._touch_fleet(agent)

    def reserve(self, job: JobName, status: JobStatus | None) -> None:
        """Count the slots of a status whose commit is in flight; None: the outcome is known.

        Else two jobs decided in the same moment would take the same slots: each
        commit is guarded by its own job's records only.
        """
        if status is None:
            self._slots.reserved.pop(job, None)
        else:
            self._slots.reserved[job] = status
        self._count_slots(job)

    def forget_local(self) -> None:
        """Drop what only a former leadership of this replica can have known."""
        self._unreachable.clear()
        self._slots.reserved.clear()
        for job in sorted(self._jobs):
            self._count_slots(job)

    # What goes out.

    def take_touched(self) -> list[JobName]:
        """Return and forget the jobs that deserve a look, in order of name."""
        touched = sorted(self._touched)
        self._touched.clear()
        return touched

    def jobs(self) -> list[JobName]:
        """Return the names of all jobs in order."""
        return sorted(self._jobs)

    def job_view(self, name: JobName) -> JobView:
        """Return everything known of one job; an unknown one is empty."""
        job = self._jobs.get(name)
        if job is None:
            return JobView(name)
        workers: dict[AgentName, Stored[WorkerSnapshot]] = {}
        for agent in sorted(job.workers):
            key = self._keys.worker(agent, name)
            stored = read(job, key, job.workers[agent], WorkerSnapshot)
            if stored is not None:
                workers[agent] = stored
        garbage = self._records(job, "garbage", Garbage)
        return JobView(
            name,
            spec=self._record(job, "spec", JobSpec),
            intent=self._record(job, "intent", Intent),
            status=self._record(job, "status", JobStatus),
            open=self._records(job, "open", OpenRecord),
            commits=self._records(job, "checkpoint", CommitRecord),
            latest=self._record(job, "latest", Latest),
            bad={stored.value.seq: stored.value for stored in self._records(job, "bad", Quarantine)},
            garbage=garbage,
            pinned=frozenset(job.pins),
            verified={stored.value.seq: stored for stored in self._records(job, "verified", Verification)},
            orders=dict(job.orders),
            inspections=dict(job.inspections),
            events=tuple(sorted(job.events)),
            workers=workers,
            departed=dict(sorted(job.departed.items())),
            verdicts=dict(job.verdicts),
            collected=frozenset(job.collected),
            swept_at=job.swept_at,
            swept_found=job.swept_found,
            swept_former=frozenset(job.swept_former),
            unknown=job.unknown,
            store_ok=job.store_ok,
            store_problem=job.store_problem,
            store_probed_at=job.store_probed_at,
            step_rate=step_rate(job, workers.values()),
            sightings=sightings(job, workers.values()),
            pace=pace_of(job, workers.values()),
            quarantined=self.quarantine(name),
        )

    def quarantine(self, name: JobName) -> str:
        """Return why a job cannot be decided about, or ""."""
        job = self._jobs.get(name)
        ours = [] if job is None else [key for key in job.broken if self._concerns(job, key)]
        return job.broken[min(ours)] if job is not None and ours else ""

    def _concerns(self, job: KnownJob, key: str) -> bool:
        # An agent writes under every job's name: only a member's snapshot may hold up a job.
        parsed = self._keys.parse(key)
        if parsed is None or parsed.kind != "worker" or job.status is None:
            return True
        return any(member.agent == parsed.agent for member in job.status.members)

    def fleet_view(self, name: JobName, now: float, *, term: Term, took_office_at: float) -> FleetView:
        """Return the machines as the given job should see them."""
        self._agents_shared = True
        self._now = now
        queue, changed = self._line.queue(now, self._machines)
        self._touched |= changed - {name}
        if queue is not self._queue_seen:
            if queue.claimed() != self._queue_seen.claimed():
                # What nobody claims any more a running job may grow onto.
                self._touched |= {job for job in self._waiting if self._line.runs(job)} - {name}
            self._queue_seen = queue
        return FleetView(
            cluster=self.cluster,
            replica=self.replica,
            term=term,
            took_office_at=took_office_at,
            agents=self._agents,
            lost_at=dict(self._losses.lost_at),
            left=frozenset(self._losses.left),
            cordoned=frozenset(self._cordons),
            used=self._slots.of_others(name),
            unreachable=dict(self._unreachable),
            brake=self.brake(now),
            losses_settle_at=self._losses.settle_at(now, self._agents, ttl_s=self.agent_ttl_s),
            agent_ttl_s=self.agent_ttl_s,
            default_store=self.default_store,
            scrub_interval_s=self._scrub_interval_s,
            suspicions=dict(self._suspicions),
            withheld=releases.withheld(self._versions),
            cordon_s=self._cordon_s,
            queue=queue,
        )

    @property
    def agent_ttl_s(self) -> float:
        """TTL of agents' leases: stretched with the fleet, so that renewals stay bounded."""
        stretched = 3 * len(self._agents) / AGENT_RENEWALS_PER_S
        return min(max(self._agent_ttl_s, stretched), max(self._agent_ttl_s, AGENT_TTL_S_MAX))

    def brake(self, now: float) -> str:
        """Return why nothing may be declared lost now, or ""."""
        return self._losses.brake(now, self._agents, heard_at=self._heard_at, ttl_s=self.agent_ttl_s)

    def lost_count(self) -> int:
        """Return how many agents vanished within the last hour without a word, and are not back."""
        return self._losses.count()

    def brake_changes_at(self, now: float) -> float | None:
        """Return when the brake may change by time alone, or None."""
        return self._losses.changes_at(now, heard_at=self._heard_at, ttl_s=self.agent_ttl_s)

    def tidy(self, now: float) -> None:
        """Forget losses that no decision asks for any more."""
        self._losses.forget(now, self._slots.used.keys(), ttl_s=self.agent_ttl_s)
        for agent in [name for name in self._unreachable if name not in self._agents]:
            del self._unreachable[agent]

    # One change at a time.

    def _node_changed(self, agent: AgentName, change: Change, now: float) -> None:
        if self._agents_shared:
            self._agents, self._agents_shared = dict(self._agents), False
        known = self._agents.get(agent)
        if change.after is None:
            if known is not None:
                del self._agents[agent]
                self._losses.note_gone(agent, now, drained=known.node.draining is not None)
            self._unreachable.pop(agent, None)
        else:
            try:
                node = codec.decode(NodeRecord, change.after.value)
            except DtrainError as error:
                # Unreadable is not gone: nothing is placed there, nothing is called lost.
                self.problems.append(f"agent {agent} cannot be used: {error.message}")
                return
            same = known is not None and known.node.incarnation == node.incarnation
            seen_at = known.seen_at if known is not None and same else now
            self._agents[agent] = self._seen(agent, AgentView(node, seen_at), known, now)
            self._losses.note_present(agent, now)
            if not same:
                self._unreachable.pop(agent, None)
        self._touch_fleet(agent)

    def _seen(self, agent: AgentName, view: AgentView, known: AgentView | None, now: float) -> AgentView:
        """The view with what says that its jobs are to go on elsewhere; counted from when that began."""
        cordon = self._cordons.get(agent)
        vacating = cordon if cordon is not None and cordon.drain else None
        draining_at = None
        if view.node.draining is not None or vacating is not None:
            draining_at = now
            # Its own end is nearer than an operator's wish: its patience counts from when it said so.
            same = known is not None and (known.node.draining is None) == (view.node.draining is None)
            if known is not None and known.draining_at is not None and same:
                draining_at = known.draining_at
        return replace(view, draining_at=draining_at, vacating=vacating)

    def _cordon_changed(self, agent: AgentName, change: Change, now: float) -> None:
        # Its presence decides; a cordon that cannot be read still keeps ranks away.
        if change.after is None:
            self._cordons.pop(agent, None)
        else:
            try:
                self._cordons[agent] = codec.decode(Cordon, change.after.value)
            except DtrainError as error:
                self._cordons[agent] = None
                self.problems.append(f"the cordon of {agent} cannot be read: {error.message}")
        if (known := self._agents.get(agent)) is not None:
            if self._agents_shared:
                self._agents, self._agents_shared = dict(self._agents), False
            self._agents[agent] = self._seen(agent, known, known, now)
        self._touch_fleet(agent)

    def _suspicion_changed(self, agent: AgentName, change: Change, now: float) -> None:
        self._suspicions.pop(agent, None)
        if change.after is None:
            return
        try:
            value = codec.decode(Suspicion, change.after.value)
        except DtrainError as error:
            # What it said is lost; the next blame writes it anew.
            self.problems.append(f"the suspicion of {agent} cannot be read: {error.message}")
            value = Suspicion(Term(0), agent)
        kv = change.after
        self._suspicions[agent] = Stored(value, kv.mod_revision, kv.create_revision, now)

    def _job_changed(self, parsed: Parsed, change: Change, now: float) -> None:
        job = self._jobs.get(parsed.job)
        if job is None:
            if change.after is None or not self._may_name_a_job(parsed.job):
                return
            job = self._jobs[parsed.job] = KnownJob(parsed.job)
        match parsed.kind:
            case "worker":
                known = job.workers.get(parsed.agent)
                self._worker_changed(job, parsed.agent, change, now)
                if known is not None and change.after is not None and moved(known.kv, change.after):
                    return
            case "pin":
                readers = job.pins.setdefault(parsed.seq, set())
                (readers.discard if change.after is None else readers.add)(parsed.name)
                if not readers:
                    del job.pins[parsed.seq]
            case "order":
                self._order_changed(job, parsed.name, change, now)
            case "event":
                (job.events.discard if change.after is None else job.events.add)(parsed.seq)
            case kind if kind in SINGLE:
                self._single_changed(job, kind, change, now)
            case kind:
                self._numbered_changed(job, kind, parsed.seq, change, now)
        # Events are the leader's own notes: nothing is decided from them.
        if parsed.kind != "event":
            self._touched.add(job.name)
        if job.is_empty():
            del self._jobs[job.name]
            self._line.put(job.name, None)

    def _may_name_a_job(self, name: JobName) -> bool:
        try:
            parse_name(name, "job")
        except DtrainError as error:
            self.problems.append(f"a job's records are left alone: {error.message}")
            return False
        return True

    def _order_changed(self, job: KnownJob, order_id: str, change: Change, now: float) -> None:
        job.orders.pop(order_id, None)
        if change.after is None:
            return
        try:
            order = codec.decode(Order, change.after.value)
        except DtrainError as error:
            # Of a newer release, perhaps: no reason to leave the whole job alone.
            self.problems.append(f"a request about {job.name} is left alone: {error.message}")
            return
        job.orders[order_id] = Stored(order, change.after.mod_revision, change.after.create_revision, now)

    def _single_changed(self, job: KnownJob, kind: str, change: Change, now: float) -> None:
        before = job.single.get(kind)
        job.broken.pop(change.key, None)
        if change.after is None:
            job.single.pop(kind, None)
        elif before is None or before.kv.mod_revision != change.after.mod_revision:
            job.single[kind] = Cell(change.after, now)
        cell = job.single.get(kind)
        stored = None if cell is None else read(job, change.key, cell, SINGLE[kind])
        if kind == "status":
            job.status = None if stored is None else stored.value
            self._forget_older_attempts(job)
            self._count_slots(job.name)
        if (
            kind == "spec"
            and stored is not None
            and before is not None
            and uid_of(before) != stored.value.uid
        ):
            # A name used again is another job: nothing found out about the old one holds.
            job.verdicts.clear()
            job.collected.clear()
            job.inspections.clear()
            job.swept_at = job.store_ok = job.store_probed_at = job.unknown = None
            job.store_problem = ""
        self._note_waiting(job)

    def _numbered_changed(self, job: KnownJob, kind: str, seq: Seq, change: Change, now: float) -> None:
        cells = job.numbered.setdefault(kind, {})
        before = cells.get(seq)
        job.broken.pop(change.key, None)
        if change.after is None:
            cells.pop(seq, None)
            if kind == "open":
                job.verdicts = {of: verdict for of, verdict in job.verdicts.items() if of[0] != seq}
            if kind == "garbage":
                job.collected.discard(seq)
            if kind == "checkpoint":
                job.inspections = {of: seen for of, seen in job.inspections.items() if of[0] != seq}
            return
        # When a checkpoint was last read whole is what its newest revision says.
        same = (
            kind != "verified"
            and before is not None
            and before.kv.create_revision == change.after.create_revision
        )
        # A rewrite (another leader's term, a report copied in) does not restart the time allowed.
        cells[seq] = Cell(change.after, before.seen_at if before is not None and same else now)
        read(job, change.key, cells[seq], NUMBERED[kind])

    def _worker_changed(self, job: KnownJob, agent: AgentName, change: Change, now: float) -> None:
        job.broken.pop(change.key, None)
        if change.after is not None:
            job.workers[agent] = Cell(change.after, now)
            return
        cell = job.workers.pop(agent, None)
        stored = None if cell is None else read(job, change.key, cell, WorkerSnapshot)
        job.broken.pop(change.key, None)
        if stored is not None and is_current(stored.value, job.status):
            job.departed[agent] = stored.value

    def _forget_older_attempts(self, job: KnownJob) -> None:
        job.departed = {agent: last for agent, last in job.departed.items() if is_current(last, job.status)}

    # Reading records.

    def _record(self, job: KnownJob, kind: str, of: type[T]) -> Stored[T] | None:
        cell = job.single.get(kind)
        return None if cell is None else read(job, f"{self._keys.job(job.name)}{kind}", cell, of)

    def _records(self, job: KnownJob, kind: str, of: type[T]) -> tuple[Stored[T], ...]:
        found = []
        for seq, cell in sorted(job.numbered.get(kind, {}).items()):
            stored = read(job, cell.kv.key, cell, of)
            if stored is not None and stored.value.seq == seq:
                found.append(stored)
            elif stored is not None:
                job.broken[cell.kv.key] = f"{cell.kv.key} holds another number's record"
        return tuple(found)

    # Slots.

    def _count_slots(self, name: JobName) -> None:
        job = self._jobs.get(name)
        decided = job.status if job is not None else None
        changed, freed = self._slots.count(name, (decided, self._slots.reserved.get(name)))
        if not changed:
            return
        self._line.machines_changed()
        self._note_line(name)
        if freed:
            self._touched |= self._waiting

    def _note_waiting(self, job: KnownJob) -> None:
        spec = job.single.get("spec")
        waits = spec is not None and (
            job.status is None
            or job.status.phase in _WAITING_PHASES
            or job.status.uid != uid_of(spec)
            or self._may_grow(job, job.status)
        )
        (self._waiting.add if waits else self._waiting.discard)(job.name)
        self._note_line(job.name)

    # The queue.

    def _note_line(self, name: JobName) -> None:
        job = self._jobs.get(name)
        self._line.put(name, None if job is None else self._in_line(job))

    def _in_line(self, job: KnownJob) -> Waiting | Running | None:
        """What the job is to others: one that has machines, or wants some."""
        spec = self._record(job, "spec", JobSpec)
        if used := self._slots.of(job.name):
            return self._as_running(job, None if spec is None else spec.value, used)
        intent, status = self._record(job, "intent", Intent), job.status
        if spec is None or ("status" in job.single and status is None):
            return None
        of, wanted = (
            spec.value,
            None if intent is None or intent.value.uid != spec.value.uid else intent.value,
        )
        if status is not None and status.uid != of.uid:
            if status.phase not in TERMINAL_PHASES:
                return None
            status = None
        if status is not None and status.phase not in (JobPhase.QUEUED, JobPhase.RECOVERING):
            return None
        if wanted is not None and wanted.wanted is not Wanted.RUN:
            return None
        attempt = 0 if status is None else status.attempt
        if job.store_ok is False or (
            of.checkpoint.await_import and not attempt and not job.numbered.get("checkpoint")
        ):
            return None
        restarts = status is not None and status.phase is JobPhase.RECOVERING
        store = of.checkpoint.store or self.default_store
        since = parse_iso(of.submitted_at if status is None or not attempt else status.since) or 0.0
        known = self._line.waits(job.name)
        same = known is not None and (known.since, known.restarts) == (since, restarts)
        return Waiting(
            job.name,
            of.priority,
            since,
            known.seen_at if known is not None and same else self._now,
            (0 if wanted is None else wanted.nnodes_min) or of.nnodes_min,
            (0 if wanted is None else wanted.nnodes_max) or of.nnodes_max,
            of.nproc_per_node,
            restarts=restarts,
            after="" if status is None else status.preempted_by,
            ready=restarts or not store or bool(job.store_ok),
        )

    def _as_running(self, job: KnownJob, spec: JobSpec | None, used: Mapping[AgentName, int]) -> Running:
        status = self._slots.reserved.get(job.name) or job.status
        known = self._line.runs(job.name)
        return Running(
            job.name,
            0 if spec is None else spec.priority,
            self._now if known is None else known.since,
            used,
            leaving=status is not None and status.phase not in (JobPhase.STARTING, JobPhase.RUNNING),
            saves=status is not None and bool(status.store),
            made_room=status is not None and bool(status.preempted_by),
        )

    def _machines(self) -> tuple[dict[AgentName, Machine], float | None]:
        """The machines that ranks may be placed on, and when one that did not answer is tried again."""
        found, instants = {}, []
        for name, view in self._agents.items():
            if name in self._cordons or view.draining_at is not None or view.node.problem:
                continue
            since = self._unreachable.get(name)
            if since is not None and view.seen_at <= since and self._now < since + UNREACHABLE_REST_S:
                instants.append(since + UNREACHABLE_REST_S)
                continue
            slots = view.node.slots
            found[name] = Machine(slots, slots - self._slots.used.get(name, 0))
        return found, min(instants, default=None)

    def _may_grow(self, job: KnownJob, status: JobStatus) -> bool:
        spec = self._record(job, "spec", JobSpec)
        return spec is not None and elastic.may_grow(spec.value, self._record(job, "intent", Intent), status)

    def _touch_fleet(self, agent: AgentName) -> None:
        self._line.machines_changed()
        self._touched |= self._waiting
        for name, job in self._jobs.items():
            status = job.status
            if agent in job.workers or (
                status is not None
                and status.phase not in TERMINAL_PHASES
                and any(member.agent == agent for member in status.members)
            ):
                self._touched.add(name)
