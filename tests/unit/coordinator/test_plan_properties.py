"""What holds for every decision, whatever the world does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.builders import CLUSTER, JOB, KEYS, Stage, check_decision, make_node, make_spec

from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.core.views import (
    AgentView,
    Damage,
    FleetView,
    Inspection,
    JobView,
    Moment,
    Stored,
    Verdict,
)
from dtrain.protocol.checkpoint import (
    CommitRecord,
    Garbage,
    Latest,
    OpenRecord,
    Order,
    OrderKind,
    Quarantine,
)
from dtrain.protocol.commands import Prepare, Start, Stop
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    Incarnation,
    Rank,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import (
    TERMINAL_PHASES,
    Intent,
    JobPhase,
    JobStatus,
    Member,
    RestorePoint,
    Wanted,
)
from dtrain.protocol.snapshot import (
    BadBlob,
    DurablePart,
    Failure,
    FailureKind,
    RankState,
    SaveProblem,
    WorkerPhase,
    WorkerSnapshot,
)

AGENTS = ("a", "b", "c")

# A random world ---------------------------------------------------------------------


def advance(stage: Stage, name: str) -> None:
    """An agent obeys the last decision's command to it, or its ranks take a step."""
    agent = AgentName(name)
    for directed in stage.last.commands:
        if directed.agent != agent:
            continue
        match directed.command:
            case Prepare() if agent in {m.agent for m in stage.status.members}:
                stage.report(name, WorkerPhase.READY)
                return
            case Start():
                stage.report(name, WorkerPhase.TRAINING, restored=True)
                return
            case Stop(release=True):
                stage.workers.pop(agent, None)
                return
            case Stop() if agent in stage.workers:
                snapshot = stage.workers[agent].value
                stage.put_snapshot(replace(snapshot, phase=WorkerPhase.IDLE, saving=()))
                return
            case _:
                pass
    if agent in stage.workers and stage.workers[agent].value.phase is WorkerPhase.TRAINING:
        snapshot = stage.workers[agent].value
        ranks = tuple(replace(rank, step=Step(rank.step + 3)) for rank in snapshot.ranks)
        stage.put_snapshot(replace(snapshot, ranks=ranks))


def save(stage: Stage, name: str) -> None:
    if stage.of("open") and is_member(stage, name) and stage.opened.attempt == stage.status.attempt:
        stage.durable(name)


def is_member(stage: Stage, name: str) -> bool:
    snapshot = stage.workers.get(AgentName(name))
    return (
        AgentName(name) in stage.agents
        and name in {m.agent for m in stage.status.members}
        and snapshot is not None
        and snapshot.value.attempt == stage.status.attempt
    )


def crash(stage: Stage, name: str) -> None:
    if is_member(stage, name):
        stage.fail(name)


def finish(stage: Stage, name: str) -> None:
    if is_member(stage, name) and stage.workers[AgentName(name)].value.phase is WorkerPhase.TRAINING:
        stage.report(name, WorkerPhase.TRAINING, lambda r: replace(r, last_step=Step(60), step=Step(60)))


def leave(stage: Stage, name: str) -> None:
    if is_member(stage, name):
        last = [rank.last_step for rank in stage.workers[AgentName(name)].value.ranks]
        if last and all(step is not None for step in last):
            stage.report(name, WorkerPhase.DONE, lambda r: replace(r, exit_code=0), saving=())


def damage(stage: Stage, name: str) -> None:
    if is_member(stage, name) and stage.status.restore is not None:
        stage.find_damage(name, stage.status.restore.seq)


def problem(stage: Stage, name: str, late: bool) -> None:
    if stage.of("open") and is_member(stage, name):
        stage.problem(name, late=late)


def verify(stage: Stage, ok: bool) -> None:
    if stage.of("open"):
        stage.verify(ok=ok)


def chosen_commit(stage: Stage, name: str) -> CommitRecord | None:
    commits = stage.commits
    return commits[AGENTS.index(name) % len(commits)] if commits else None


def ask_to_delete(stage: Stage, name: str) -> None:
    if commit := chosen_commit(stage, name):
        order = Order(stage.spec.uid, OrderKind.DELETE, commit.seq)
        stage.write(KEYS.order(JOB, f"o{stage.revision}"), order)


def read_whole(stage: Stage, name: str, damage: Damage | None = None) -> None:
    if commit := chosen_commit(stage, name):
        stage.inspections[commit.seq, "all", "", 0] = Inspection(stage.now, damage)


ACTIONS: dict[str, Callable[[Stage, str], Any]] = {
    "advance": advance,
    "advance more": advance,
    "save": save,
    "join": lambda stage, name: stage.join(name, incarnation=f"i{stage.revision}"),
    "lose": lambda stage, name: stage.lose(name),
    "vanish": lambda stage, name: stage.lose(name, seen=False),
    "crash": crash,
    "finish": finish,
    "leave": leave,
    "damage": damage,
    "late": lambda stage, name: problem(stage, name, True),
    "fail to save": lambda stage, name: problem(stage, name, False),
    "verify": lambda stage, _name: verify(stage, True),
    "refuse": lambda stage, _name: verify(stage, False),
    "wait": lambda stage, _name: stage.after(3.0),
    "wait long": lambda stage, _name: stage.after(130.0),
    "new leader": lambda stage, _name: stage.change_leader(),
    "checkpoint": lambda stage, _name: stage.want(token=f"t{stage.revision}"),
    "cancel": lambda stage, name: stage.want(Wanted.CANCEL) if name == "c" else None,
    "brake on": lambda stage, _name: setattr(stage, "brake", "many agents vanished"),
    "brake off": lambda stage, _name: setattr(stage, "brake", ""),
    "ask to delete": ask_to_delete,
    "read whole": read_whole,
    "rot": lambda stage, name: read_whole(stage, name, Damage("b", 0, "x", "y")),
    "free slots": lambda stage, _name: stage.forget_outcomes(),
    "unreachable": lambda stage, name: stage.unreachable.__setitem__(AgentName(name), stage.now),
    "cordon": lambda stage, name: stage.cordoned.symmetric_difference_update({AgentName(name)}),
}

moves = st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.sampled_from(AGENTS)), max_size=60)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves, st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 3)]), st.booleans())
def test_records_stay_sound_whatever_happens(
    chosen: list[tuple[str, str]], nodes: tuple[int, int], store: bool
) -> None:
    spec = make_spec(nodes=nodes, store="s3://b" if store else "", every_steps=10, keep_last=1)
    stage = Stage(spec).join(*AGENTS)
    stage.decide()
    for move, name in chosen:
        before = stage.status
        latest = stage.of("latest")
        ACTIONS[move](stage, name)
        stage.decide()  # checks the decision and the invariants
        after = stage.status
        assert after.attempt - before.attempt in (0, 1)
        assert after.seq_last >= before.seq_last
        assert after.event_last >= before.event_last
        if latest:
            assert stage.of("latest")[0].value.seq >= latest[0].value.seq
        if before.phase in TERMINAL_PHASES:
            assert after.phase is before.phase
            assert after.attempt == before.attempt


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves)
def test_job_ends_once_the_faults_stop(chosen: list[tuple[str, str]]) -> None:
    stage = Stage(make_spec(store="s3://b", every_steps=10, max_restarts=1000)).join(*AGENTS)
    stage.decide()
    for move, name in chosen:
        ACTIONS[move](stage, name)
        stage.decide()
    stage.brake = ""
    stage.cordoned.clear()
    stage.unreachable.clear()
    for name in AGENTS:
        if AgentName(name) not in stage.agents:
            stage.join(name, incarnation="last")
    for _ in range(400):
        for name in AGENTS:
            if AgentName(name) in stage.agents:
                advance(stage, name)
                finish(stage, name)
                snapshot = stage.workers.get(AgentName(name))
                if stage.of("open") and not (snapshot is not None and snapshot.value.problems):
                    save(stage, name)
                if any(getattr(d.command, "final", False) and d.agent == name for d in stage.last.commands):
                    leave(stage, name)
        verify(stage, True)
        stage.after(1.0).decide()
        if stage.phase in TERMINAL_PHASES:
            break
        for agent, stored in list(stage.workers.items()):
            told = {getattr(d.command, "seq", None) for d in stage.last.commands if d.agent == agent}
            kept = tuple(seq for seq in stored.value.saving if seq not in told)
            stage.put_snapshot(replace(stored.value, saving=kept))
    assert stage.phase in (JobPhase.SUCCEEDED, JobPhase.CANCELLED), (stage.phase, stage.said)


@settings(max_examples=60, deadline=None)
@given(moves)
def test_deciding_again_without_news_writes_nothing_more(chosen: list[tuple[str, str]]) -> None:
    stage = Stage(make_spec(store="s3://b", every_steps=10, keep_last=1)).join(*AGENTS)
    for move, name in [("wait", "a"), *chosen]:
        stage.until_quiet()
        ACTIONS[move](stage, name)
    stage.until_quiet()


# Random views -----------------------------------------------------------------------

names = st.sampled_from(AGENTS).map(AgentName)
uids = st.sampled_from([Uid("u1"), Uid("u2")])
small = st.integers(0, 4)
instants = st.floats(900, 1100)


def stored(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Stored[Any]]:
    return st.builds(Stored, values, st.integers(1, 50), st.integers(1, 50), instants)


failures = st.builds(
    Failure,
    st.sampled_from(FailureKind),
    st.just("broke"),
    rank=st.none() | small.map(Rank),
    exit_code=st.sampled_from([None, 1, 93, -9]),
    at=st.floats(0, 10),
)
parts = st.builds(
    DurablePart,
    small.map(Seq),
    small.map(Attempt),
    small.map(Step),
    small.map(Rank),
    st.sampled_from(["n1", "n2"]),
    st.just("m"),
    st.just("d"),
    st.just(1),
)
ranks = st.builds(
    RankState,
    small.map(Rank),
    st.just(1),
    st.sampled_from(WorkerPhase),
    small.map(Step),
    st.none() | small.map(Step),
    st.sampled_from([None, 0, 1, 93]),
    sdk=st.booleans(),
)
snapshots = st.builds(
    WorkerSnapshot,
    names,
    uids,
    st.sampled_from(["i1", "i2"]).map(Incarnation),
    small.map(Attempt),
    st.sampled_from(WorkerPhase),
    st.lists(ranks, max_size=3).map(tuple),
    st.none(),
    st.lists(small.map(Seq), max_size=2, unique=True).map(tuple),
    st.lists(parts, max_size=3).map(tuple),
    st.lists(
        st.builds(SaveProblem, small.map(Seq), small.map(Rank), st.booleans(), small.map(Step), st.just("x")),
        max_size=1,
    ).map(tuple),
    st.none() | failures,
    st.none()
    | st.builds(
        BadBlob, small.map(Seq), st.just("b"), st.just(0), st.just("x"), st.just("y"), small.map(Rank)
    ),
    st.sampled_from(["", "a:1"]),
    st.booleans(),
    seq_over=st.sampled_from([0, 0, 4, 9]).map(Seq),
)


@st.composite
def members(draw: Callable[..., Any]) -> tuple[Member, ...]:
    chosen = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    return tuple(
        Member(name, i, Rank(i), 1, draw(st.sampled_from(["i1", "i2"]))) for i, name in enumerate(chosen)
    )


restores = st.none() | st.builds(RestorePoint, small.map(Seq), small.map(Step), st.just("m"), st.just("d"))
statuses = st.builds(
    JobStatus,
    st.integers(1, 9).map(Term),
    uids,
    st.sampled_from(JobPhase),
    st.just("because"),
    st.integers(1, 4).map(Attempt),
    members(),
    restores,
    st.lists(st.floats(0, 3000), max_size=4).map(tuple),
    st.just(Seq(5)),
    st.sampled_from(["", "t"]),
    st.just(300),
    st.sampled_from(["", "s3://b"]),
    final_tries=small,
    late_saves=small,
    failed_saves=small,
    fruitless=small,
    charge=st.booleans(),
    since=st.sampled_from(["", "2027-01-15T08:16:40.000Z", "yesterday"]),
)
opens = st.builds(
    OpenRecord,
    st.integers(1, 9).map(Term),
    uids,
    st.just(Seq(0)),
    st.integers(1, 4).map(Attempt),
    small.map(Step),
    st.sampled_from(["n1", "n2"]),
    st.integers(1, 3),
    st.just(60.0),
    st.booleans(),
)
commits = st.builds(
    CommitRecord,
    st.just(Term(1)),
    uids,
    st.just(Seq(0)),
    small.map(Step),
    st.integers(1, 4).map(Attempt),
    st.just("n1"),
    st.just(2),
    st.just(1),
    st.just("m"),
    st.just(1),
    st.just("d"),
    final=st.booleans(),
)
garbage = st.builds(Garbage, st.just(Term(1)), st.just(Seq(0)), st.just("m"), st.just("d"))


def by_seq(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[int, Stored[Any]]]:
    return st.dictionaries(small, stored(values), max_size=3).map(
        lambda found: {
            seq: replace(cell, value=replace(cell.value, seq=Seq(seq))) for seq, cell in sorted(found.items())
        }
    )


@st.composite
def views(draw: Callable[..., Any]) -> JobView:
    open_by, commit_by, garbage_by = draw(by_seq(opens)), draw(by_seq(commits)), draw(by_seq(garbage))
    # A number is one of open, committed and garbage.
    commit_by = {seq: cell for seq, cell in commit_by.items() if seq not in open_by}
    garbage_by = {seq: cell for seq, cell in garbage_by.items() if seq not in {*open_by, *commit_by}}
    spec = make_spec(
        nodes=draw(st.sampled_from([(1, 1), (1, 2), (2, 3)])),
        store=draw(st.sampled_from(["", "s3://b"])),
        every_steps=draw(st.sampled_from([0, 1, 10])),
        every_seconds=draw(st.sampled_from([0.0, 5.0])),
        max_restarts=draw(st.integers(0, 2)),
    )
    snapshot_by = draw(st.dictionaries(names, snapshots, max_size=3))
    verdicts = st.builds(
        Verdict, small.map(Seq), st.sampled_from(["n1", "n2"]), st.booleans(), st.just("no"), st.booleans()
    )
    return JobView(
        JOB,
        spec=draw(stored(st.just(spec))),
        intent=draw(
            st.none()
            | stored(st.builds(Intent, uids, st.sampled_from(Wanted), st.sampled_from(["", "t", "t2"])))
        ),
        status=draw(st.none() | stored(statuses)),
        open=tuple(open_by.values()),
        commits=tuple(commit_by.values()),
        latest=draw(st.none() | stored(st.builds(Latest, st.just(Term(1)), small.map(Seq), small.map(Step)))),
        bad={
            seq: Quarantine(Term(1), seq, "b", 0, "x", "y")
            for seq in draw(st.sets(small.map(Seq), max_size=2))
        },
        garbage=tuple(garbage_by.values()),
        pinned=draw(st.frozensets(small.map(Seq), max_size=1)),
        events=draw(st.sampled_from([(), tuple(range(1, 10)), tuple(range(60, 301))])),
        workers={
            name: Stored(replace(snapshot, agent=name), 7, 7, draw(instants))
            for name, snapshot in snapshot_by.items()
        },
        departed={
            name: replace(snapshot, agent=name)
            for name, snapshot in draw(st.dictionaries(names, snapshots, max_size=1)).items()
            if name not in snapshot_by
        },
        verdicts={(verdict.seq, verdict.nonce): verdict for verdict in draw(st.lists(verdicts, max_size=3))},
        collected=draw(st.frozensets(small.map(Seq), max_size=2)),
        swept_at=draw(st.none() | instants),
        unknown=draw(st.none() | st.just((Seq(6), Seq(8)))),
        store_ok=draw(st.sampled_from([None, True, False])),
        step_rate=draw(st.sampled_from([0.0, 0.5, 1000.0])),
    )


fleets = st.builds(
    FleetView,
    st.just(CLUSTER),
    st.just(ReplicaId("c1")),
    st.sampled_from([Term(5), Term(9)]),
    instants,
    st.dictionaries(names, st.just(None), max_size=3).map(
        lambda found: {name: AgentView(make_node(name, slots=2), 1000.0) for name in found}
    ),
    st.dictionaries(names, instants, max_size=2),
    st.frozensets(names, max_size=1),
    st.dictionaries(names, st.integers(0, 2), max_size=2),
    st.dictionaries(names, instants, max_size=2),
    st.sampled_from(["", "many agents vanished"]),
    st.just(10.0),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(views(), fleets, instants)
def test_plan_answers_every_view(job: JobView, fleet: FleetView, now: float) -> None:
    decision = plan(job, fleet, Moment(now, 2000.0, "0123456789abcdef"))
    check_decision(decision)
    assert decision.wake_at is None or decision.wake_at >= now
    assert decision == plan(job, fleet, Moment(now, 2000.0, "0123456789abcdef"))
    if job.status is not None and job.status.value.phase in TERMINAL_PHASES:
        assert job.spec is not None
        for write in decision.writes:
            value = getattr(write, "value", None)
            if isinstance(value, JobStatus) and value.uid == job.status.value.uid:
                assert value.phase is job.status.value.phase
    for directed in decision.commands:
        assert directed.agent in fleet.agents
        assert directed.command.header.term == fleet.term
