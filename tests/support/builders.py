"""Values for tests of the coordinator's core, and a stage on which its decisions take effect."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.coordinator.core import invariants, pace, stragglers
from dtrain.coordinator.core.decisions import Decision, Directed, PutRecord, Work
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.queue import Queue
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.core.views import (
    AgentView,
    FleetView,
    Inspection,
    JobView,
    Moment,
    Pace,
    Sightings,
    Stored,
    SweepFound,
    Verdict,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, OpenRecord
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import (
    AgentName,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import (
    PLACED_PHASES,
    CheckpointPolicy,
    Entry,
    EntryKind,
    Intent,
    JobPhase,
    JobSpec,
    JobStatus,
    Member,
    RestartPolicy,
    Wanted,
)
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import (
    BadBlob,
    Draining,
    DurablePart,
    Failure,
    FailureKind,
    NodeRecord,
    RankState,
    SaveProblem,
    WorkerPhase,
    WorkerSnapshot,
)

CLUSTER = ClusterName("test")
JOB = JobName("job")
KEYS = Keys(CLUSTER)
EPOCH = 1_800_000_000.0
"""Wall time at which every stage begins."""


def make_spec(
    *,
    uid: str = "u1",
    nodes: tuple[int, int] = (2, 2),
    nproc: int = 1,
    store: str = "",
    every_steps: int = 0,
    every_seconds: float = 0.0,
    keep_last: int = 3,
    keep_every_steps: int = 0,
    max_restarts: int = 3,
    window_s: float = 3600.0,
    reschedule_grace_s: float = 0.0,
    grow_cooldown_s: float = 60.0,
) -> JobSpec:
    """A valid job of ``nodes`` machines."""
    return JobSpec(
        JOB,
        Uid(uid),
        Entry(EntryKind.SCRIPT, "train.py"),
        nodes[0],
        nodes[1],
        nproc,
        checkpoint=CheckpointPolicy(
            store, every_steps, every_seconds, keep_last, keep_every_steps=keep_every_steps
        ),
        restarts=RestartPolicy(max_restarts, window_s),
        reschedule_grace_s=reschedule_grace_s,
        grow_cooldown_s=grow_cooldown_s,
    )


def make_node(name: str, *, slots: int = 8, incarnation: str = "i1") -> NodeRecord:
    """An agent's node record."""
    return NodeRecord(AgentName(name), Incarnation(incarnation), f"{name}:7001", f"{name}.example", slots)


def make_rank(
    rank: int,
    *,
    phase: WorkerPhase = WorkerPhase.TRAINING,
    step: int = 0,
    last_step: int | None = None,
    exit_code: int | None = None,
    sdk: bool = True,
    save_at: int | None = None,
) -> RankState:
    """One rank's state."""
    return RankState(
        Rank(rank),
        1000 + rank,
        phase,
        Step(step),
        None if last_step is None else Step(last_step),
        exit_code,
        sdk=sdk,
        save_at=None if save_at is None else Step(save_at),
    )


@dataclass
class _Cell:
    value: Any
    mod: int
    create: int
    seen_at: float


@dataclass
class Stage:
    """etcd, the fleet and one leader in a few dictionaries: plan, apply, look.

    ``decide`` runs ``plan`` once and applies what it wrote, after checking what
    every decision must meet. Commands and work have no effect by themselves: the
    test plays the agents and the store.
    """

    spec: JobSpec = field(default_factory=make_spec)
    now: float = 1000.0
    revision: int = 10
    term: Term = Term(5)
    took_office_at: float = 0.0
    agent_ttl_s: float = 10.0
    default_store: str = ""
    brake: str = ""
    losses_settle_at: float = 0.0
    cells: dict[str, _Cell] = field(default_factory=dict)
    agents: dict[AgentName, AgentView] = field(default_factory=dict)
    lost_at: dict[AgentName, float] = field(default_factory=dict)
    left: set[AgentName] = field(default_factory=set)
    cordoned: set[AgentName] = field(default_factory=set)
    used: dict[AgentName, int] = field(default_factory=dict)
    unreachable: dict[AgentName, float] = field(default_factory=dict)
    workers: dict[AgentName, Stored[WorkerSnapshot]] = field(default_factory=dict)
    departed: dict[AgentName, WorkerSnapshot] = field(default_factory=dict)
    verdicts: dict[tuple[Seq, str], Verdict] = field(default_factory=dict)
    collected: set[Seq] = field(default_factory=set)
    pinned: set[Seq] = field(default_factory=set)
    inspections: dict[tuple[Seq, str, str, int], Inspection] = field(default_factory=dict)
    scrub_interval_s: float = 0.0
    cordon_s: float = 0.0
    queue: Queue = Queue()
    withheld: str = ""
    swept_found: SweepFound = SweepFound()
    store_ok: bool | None = True
    store_problem: str = ""
    swept_at: float | None = None
    swept_former: set[Uid] = field(default_factory=set)
    step_rate: float = 0.0
    sightings: Sightings = Sightings()
    pace: Pace = Pace()
    wall_offset_s: float = 0.0
    """By how much this leader's wall clock is ahead."""
    last: Decision = field(default_factory=Decision)
    decisions: int = 0
    history: list[JobPhase] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.write(KEYS.spec(JOB), self.spec)
        self.write(KEYS.intent(JOB), Intent(self.spec.uid))

    # Records.

    def write(self, key: str, value: Any) -> None:
        """Put a record as its writer would."""
        self.revision += 1
        self._put(key, value)

    def _put(self, key: str, value: Any) -> None:
        old = self.cells.get(key)
        # What cannot be encoded and read back cannot be decided.
        value = codec.decode(type(value), codec.encode(value))
        if old is None:
            self.cells[key] = _Cell(value, self.revision, self.revision, self.now)
        else:
            # A rewrite does not restart the time a checkpoint may take.
            seen_at = old.seen_at if "/open/" in key else self.now
            self.cells[key] = _Cell(value, self.revision, old.create, seen_at)

    def of(self, kind: str) -> dict[int, Stored[Any]]:
        """Records of a kind by seq."""
        found = {}
        for key in sorted(self.cells):
            parsed = KEYS.parse(key)
            if parsed is not None and parsed.kind == kind:
                cell = self.cells[key]
                found[int(parsed.seq)] = Stored(cell.value, cell.mod, cell.create, cell.seen_at)
        return found

    def orders(self) -> dict[str, Stored[Any]]:
        """Requests of operators by id."""
        found = {}
        for key, cell in self.cells.items():
            parsed = KEYS.parse(key)
            if parsed is not None and parsed.kind == "order":
                found[parsed.name] = Stored(cell.value, cell.mod, cell.create, cell.seen_at)
        return found

    @property
    def status(self) -> JobStatus:
        value = self.cells[KEYS.status(JOB)].value
        assert isinstance(value, JobStatus)
        return value

    @property
    def phase(self) -> JobPhase:
        return self.status.phase

    @property
    def commits(self) -> list[CommitRecord]:
        return [stored.value for stored in self.of("checkpoint").values()]

    @property
    def opened(self) -> OpenRecord:
        (stored,) = self.of("open").values()
        assert isinstance(stored.value, OpenRecord)
        return stored.value

    @property
    def events(self) -> list[EventRecord]:
        return [stored.value for _, stored in sorted(self.of("event").items())]

    def reasons_of_events(self) -> list[EventReason]:
        return [event.reason for event in self.events]

    # Views.

    def view(self) -> JobView:
        """What the leader's mirror would show."""
        single = {
            kind: next(iter(self.of(kind).values()), None) for kind in ("spec", "intent", "status", "latest")
        }
        return JobView(
            JOB,
            spec=single["spec"],
            intent=single["intent"],
            status=single["status"],
            latest=single["latest"],
            open=tuple(self.of("open").values()),
            commits=tuple(self.of("checkpoint").values()),
            bad={Seq(seq): stored.value for seq, stored in self.of("bad").items()},
            garbage=tuple(self.of("garbage").values()),
            pinned=frozenset(self.pinned),
            verified={Seq(seq): stored for seq, stored in self.of("verified").items()},
            orders=self.orders(),
            inspections=dict(self.inspections),
            swept_found=self.swept_found,
            events=tuple(sorted(self.of("event"))),
            workers=dict(self.workers),
            departed=dict(self.departed),
            verdicts=dict(self.verdicts),
            collected=frozenset(self.collected),
            swept_at=self.swept_at,
            swept_former=frozenset(self.swept_former),
            store_ok=self.store_ok,
            store_problem=self.store_problem,
            step_rate=self.step_rate,
            sightings=self._sightings(),
            pace=self._pace(),
        )

    def _sightings(self) -> Sightings:
        stored = next(iter(self.of("status").values()), None)
        if stored is not None:
            of = (stored.value.uid, stored.value.attempt)
            shown = [one.value for one in self.workers.values() if (one.value.uid, one.value.attempt) == of]
            self.sightings = stragglers.observe(self.sightings, stored.value, shown, self.now)
        return self.sightings

    def _pace(self) -> Pace:
        stored = next(iter(self.of("status").values()), None)
        if stored is not None and stored.value.phase in PLACED_PHASES:
            self.pace = pace.observe(self.pace, stored.value, self.workers.values())
        return self.pace

    def fleet(self) -> FleetView:
        """The machines as the leader sees them."""
        written = {p.agent for key in self.cells if (p := KEYS.parse(key)) and p.kind == "cordon"}
        return FleetView(
            CLUSTER,
            ReplicaId("c1"),
            self.term,
            self.took_office_at,
            dict(self.agents),
            dict(self.lost_at),
            frozenset(self.cordoned) | written,
            dict(self.used),
            dict(self.unreachable),
            self.brake,
            self.agent_ttl_s,
            self.default_store,
            self.losses_settle_at,
            frozenset(self.left),
            self.scrub_interval_s,
            {
                parsed.agent: Stored(cell.value, cell.mod, cell.create, cell.seen_at)
                for key, cell in self.cells.items()
                if (parsed := KEYS.parse(key)) and parsed.kind == "suspicion"
            },
            self.cordon_s,
            self.queue,
            self.withheld,
        )

    # Deciding.

    def decide(self, *, sound: bool = True) -> Decision:
        """Plan once and apply the writes as one transaction; not ``sound``: the records contradict."""
        self.decisions += 1
        moment = Moment(self.now, EPOCH + self.now + self.wall_offset_s, f"{self.decisions:016x}")
        decision = plan(self.view(), self.fleet(), moment)
        check_decision(decision)
        self._apply(decision)
        self.last = decision
        broken = invariants.check(self.view())
        assert not (broken and sound), broken
        return decision

    def until_quiet(self) -> Decision:
        """Decide until nothing is written any more."""
        for _ in range(20):
            if not self.decide().writes:
                return self.last
        raise AssertionError(f"plan writes for ever: {[w.key for w in self.last.writes]}")

    def _apply(self, decision: Decision) -> None:
        for guard in decision.guards:
            assert self._mod(guard.key) == guard.mod_revision, guard
        for rule in decision.absent:
            seqs = {KEYS.pins(JOB, seq) for seq in self.pinned}
            assert rule.prefix not in seqs, rule
        for write in decision.writes:
            assert write.expect_mod is None or self._mod(write.key) == write.expect_mod, write
        if not decision.writes:
            return
        self.revision += 1
        for write in decision.writes:
            if isinstance(write, PutRecord):
                self._put(write.key, write.value)
            else:
                self.cells.pop(write.key, None)
        phase = self.status.phase
        if not self.history or self.history[-1] is not phase:
            self.history.append(phase)
        current = (self.status.uid, self.status.attempt)
        self.departed = {a: s for a, s in self.departed.items() if (s.uid, s.attempt) == current}

    def _mod(self, key: str) -> int:
        for agent, stored in self.workers.items():
            if key == KEYS.worker(agent, JOB):
                return stored.mod_revision
        cell = self.cells.get(key)
        return 0 if cell is None else cell.mod

    def after(self, seconds: float) -> "Stage":
        """Let time pass."""
        self.now += seconds
        return self

    def commands(self, kind: type | None = None) -> list[Directed]:
        """Commands of the last decision."""
        return [d for d in self.last.commands if kind is None or isinstance(d.command, kind)]

    def receivers(self, kind: type) -> list[str]:
        """Who gets a command of this kind by the last decision."""
        return [directed.agent for directed in self.commands(kind)]

    def work(self, kind: type) -> list[Work]:
        """Work of a kind that the last decision asks for."""
        return [work for work in self.last.work if isinstance(work, kind)]

    @property
    def said(self) -> str:
        """What the last decision said."""
        return "; ".join(reason.text for reason in self.last.reasons)

    # The world.

    def join(self, *names: str, slots: int = 8, incarnation: str = "i1") -> "Stage":
        """Agents begin a session."""
        for name in names:
            node = make_node(name, slots=slots, incarnation=incarnation)
            self.agents[AgentName(name)] = AgentView(node, self.now)
            self.lost_at.pop(AgentName(name), None)
            self.left.discard(AgentName(name))
        return self

    def lose(self, name: str, *, seen: bool = True) -> None:
        """An agent's session ends; ``seen``: by this leader."""
        agent = AgentName(name)
        view = self.agents.pop(agent, None)
        snapshot = self.workers.pop(agent, None)
        if seen:
            self.lost_at[agent] = self.now
            if view is not None and view.draining_at is not None:
                self.left.add(agent)
            if snapshot is not None:
                self.departed[agent] = snapshot.value

    def drain(self, *names: str, grace_s: float = 60.0) -> None:
        """Agents are told to end, and say so."""
        for name in names:
            view = self.agents[AgentName(name)]
            node = replace(view.node, draining=Draining("SIGTERM", grace_s=grace_s))
            self.agents[AgentName(name)] = replace(view, node=node, draining_at=self.now)

    def member(self, name: str) -> Member:
        return next(member for member in self.status.members if member.agent == name)

    def report(
        self,
        name: str,
        phase: WorkerPhase,
        change: Callable[[RankState], RankState] = lambda r: r,
        **fields: Any,
    ) -> WorkerSnapshot:
        """An agent writes its snapshot of the current attempt."""
        agent = AgentName(name)
        member = self.member(name)
        ranks: tuple[RankState, ...] = ()
        old = self.workers.get(agent)
        fresh = old is None or old.value.attempt != self.status.attempt
        if phase not in (WorkerPhase.STARTING, WorkerPhase.READY, WorkerPhase.IDLE):
            before = {} if fresh or old is None else {rank.rank: rank for rank in old.value.ranks}
            ranks = tuple(
                change(replace(before.get(Rank(r), make_rank(r)), phase=phase))
                for r in range(member.first_rank, member.first_rank + member.nproc)
            )
        base: dict[str, Any] = (
            {}
            if fresh or old is None
            else {
                "saving": old.value.saving,
                "durable": old.value.durable,
                "problems": old.value.problems,
                "restored": old.value.restored,
                "rendezvous": old.value.rendezvous,
                "command": old.value.command,
            }
        )
        if member.node_rank == 0:
            base["rendezvous"] = f"{name}.example:29500"
        node = self.agents[agent].node
        snapshot = WorkerSnapshot(
            agent, self.status.uid, node.incarnation, self.status.attempt, phase, ranks, **{**base, **fields}
        )
        self.put_snapshot(snapshot)
        return snapshot

    def put_snapshot(self, snapshot: WorkerSnapshot) -> None:
        self.revision += 1
        self.workers[snapshot.agent] = Stored(snapshot, self.revision, self.revision, self.now)

    def everyone(
        self, phase: WorkerPhase, change: Callable[[RankState], RankState] = lambda r: r, **fields: Any
    ) -> None:
        """All members report the same phase."""
        for member in self.status.members:
            self.report(member.agent, phase, change, **fields)

    def run(self, *, step: int = 0, sdk: bool = True) -> "Stage":
        """Bring the job from wherever it is to RUNNING, the ranks at ``step``."""
        self.until_quiet()
        assert self.phase is JobPhase.STARTING, (self.phase, self.said)
        self.everyone(WorkerPhase.READY)
        self.decide()
        self.everyone(WorkerPhase.RESTORING)
        self.everyone(WorkerPhase.TRAINING, lambda r: replace(r, step=Step(step), sdk=sdk), restored=True)
        self.decide()
        assert self.phase is JobPhase.RUNNING, self.said
        return self

    def step(self, step: int) -> None:
        """All ranks reach a step."""
        self.everyone(WorkerPhase.TRAINING, lambda r: replace(r, step=Step(step)))

    def end_training(self, step: int) -> None:
        """All ranks announce their last step and wait."""
        self.everyone(WorkerPhase.TRAINING, lambda r: replace(r, step=Step(step), last_step=Step(step)))

    def exit_all(self) -> None:
        """All ranks exit with 0."""
        self.everyone(WorkerPhase.DONE, lambda r: replace(r, exit_code=0), saving=())

    def accept(self, record: OpenRecord | None = None) -> None:
        """All members have taken BEGIN_CHECKPOINT on."""
        record = record or self.opened
        for member in self.status.members:
            snapshot = self.workers[member.agent].value
            self.put_snapshot(replace(snapshot, saving=(*snapshot.saving, record.seq)))

    def durable(self, *names: str, record: OpenRecord | None = None) -> None:
        """Members (all by default) report their parts of the open checkpoint durable."""
        record = record or self.opened
        for member in self.status.members:
            if names and member.agent not in names:
                continue
            snapshot = self.workers[member.agent].value
            parts = tuple(
                make_part(record, rank) for rank in range(member.first_rank, member.first_rank + member.nproc)
            )
            saving = snapshot.saving if record.seq in snapshot.saving else (*snapshot.saving, record.seq)
            self.put_snapshot(replace(snapshot, saving=saving, durable=(*snapshot.durable, *parts)))

    def verify(self, *, ok: bool = True, retry: bool = False, problem: str = "") -> None:
        """The store's worker answers about the open checkpoint."""
        record = self.opened
        self.verdicts[record.seq, record.nonce] = Verdict(
            record.seq,
            record.nonce,
            ok,
            problem,
            retry,
            f"manifests/{record.seq}",
            100,
            "d" * 64,
            4096,
            self.now,
        )

    def forget_outcomes(self) -> None:
        """Agents have freed all slots."""
        for stored in list(self.workers.values()):
            self.put_snapshot(replace(stored.value, saving=(), durable=(), problems=()))

    def checkpoint(self) -> CommitRecord:
        """Take the open checkpoint through to its commit."""
        record = self.opened
        self.accept(record)
        self.durable(record=record)
        self.decide()
        self.verify()
        self.decide()
        self.forget_outcomes()
        assert self.commits[-1].seq == record.seq, self.said
        return self.commits[-1]

    def fail(
        self,
        name: str,
        *,
        kind: FailureKind = FailureKind.EXIT,
        message: str = "exited with 1",
        exit_code: int | None = 1,
        rank: int | None = None,
        at: float = 0.0,
    ) -> None:
        """A rank of a member fails."""
        first = self.member(name).first_rank if rank is None else Rank(rank)
        failure = Failure(
            kind,
            message,
            AgentName(name),
            self.status.attempt,
            first,
            1,
            exit_code,
            at=at or EPOCH + self.now,
        )
        self.report(name, WorkerPhase.ERROR, failure=failure)

    def problem(self, name: str, *, late: bool = False, message: str = "no space") -> None:
        """A rank has no part in the open checkpoint."""
        snapshot = self.workers[AgentName(name)].value
        problem = SaveProblem(
            self.opened.seq, self.member(name).first_rank, late, Step(self.opened.step + 1), message
        )
        self.put_snapshot(replace(snapshot, problems=(*snapshot.problems, problem)))

    def find_damage(self, name: str, seq: int) -> None:
        """A restoring member finds a bad chunk in the store."""
        bad = BadBlob(Seq(seq), "blobs/x.st", 3, "aa", "bb", self.member(name).first_rank, "chunk 3 differs")
        self.report(name, WorkerPhase.ERROR, bad=bad)

    def want(self, wanted: Wanted = Wanted.RUN, *, token: str = "", nnodes: tuple[int, int] = (0, 0)) -> None:
        """An operator changes the intent."""
        at = iso(EPOCH + self.now)
        self.write(KEYS.intent(JOB), Intent(self.spec.uid, wanted, token, "ann", at, *nnodes))

    def warm(self, *names: str, warm: bool = True) -> None:
        """Launchers on machines that are no members have imported everything, or are about to."""
        for name in names:
            agent = AgentName(name)
            incarnation = self.agents[agent].node.incarnation
            idle = WorkerSnapshot(agent, self.status.uid, incarnation, self.status.attempt, WorkerPhase.IDLE)
            self.put_snapshot(replace(idle, warm=warm))

    def change_leader(self) -> None:
        """Another replica takes office; what the old one saw for itself is gone."""
        self.revision += 1
        self.term = Term(self.revision)
        self.took_office_at = self.now
        self.lost_at.clear()
        self.left.clear()
        self.departed.clear()
        self.verdicts.clear()
        self.collected.clear()
        self.unreachable.clear()
        self.swept_at = None
        self.swept_former.clear()
        self.sightings = Sightings()
        self.pace = Pace()
        for cell in self.cells.values():
            cell.seen_at = self.now
        self.agents = {
            name: AgentView(view.node, self.now, None if view.draining_at is None else self.now)
            for name, view in self.agents.items()
        }
        self.workers = {name: replace(stored, seen_at=self.now) for name, stored in self.workers.items()}


def make_part(record: OpenRecord, rank: int, **changes: Any) -> DurablePart:
    """One rank's durable part of an open checkpoint."""
    part = DurablePart(
        record.seq, record.attempt, record.step, Rank(rank), record.nonce, f"rank/{rank}", "e" * 64, 1024
    )
    return replace(part, **changes)


def check_decision(decision: Decision) -> None:
    """What every decision must meet, whatever it decides."""
    keys = [write.key for write in decision.writes]
    assert len(keys) == len(set(keys)), keys
    assert len(keys) <= 100
    assert len(keys) + len(decision.guards) + len(decision.absent) <= 120
    assert decision.reasons, "a decision without a reason"
    assert all(reason.text for reason in decision.reasons)
    # Deletes without a compare of their own ride on a compare of the status.
    if keys:
        guarded = {guard.key for guard in decision.guards} | {
            write.key for write in decision.writes if write.expect_mod is not None
        }
        assert KEYS.status(JOB) in guarded
    assert not {guard.key for guard in decision.guards} & set(keys)
