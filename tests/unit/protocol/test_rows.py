"""Rows of lists, from records alone."""

from dataclasses import replace

from dtrain.protocol import codec, labels, summaries
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.ids import AgentName, Attempt, Incarnation, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import Entry, EntryKind, JobPhase, JobSpec, JobStatus, Member
from dtrain.protocol.ledger import Ledger
from dtrain.protocol.rows import JobRow
from dtrain.protocol.snapshot import (
    Draining,
    NodeRecord,
    RankState,
    Stack,
    StackKind,
    Stall,
    Timing,
    WorkerPhase,
    WorkerSnapshot,
)
from dtrain.protocol.summaries import Part

NOW = 1_800_000_000.0
UID = Uid("u1")
A1 = AgentName("a1")
SPEC = JobSpec(
    JobName("digits"), UID, Entry(EntryKind.SCRIPT, "train.py"), 2, 2, 2, submitted_at="2027-01-15T08:00:00Z"
)
STATUS = JobStatus(
    Term(7),
    UID,
    JobPhase.RUNNING,
    "all 4 ranks train",
    Attempt(3),
    (Member(A1, 0, Rank(0), 4),),
    step=Step(40),
)
SNAPSHOT = WorkerSnapshot(
    A1,
    UID,
    Incarnation("i"),
    Attempt(3),
    WorkerPhase.TRAINING,
    tuple(
        RankState(
            Rank(rank),
            100,
            WorkerPhase.TRAINING,
            Step(45 + rank),
            timing=Timing(took, 0.1, 0.1),
            steps_total=Step(100),
            exit_code=1 if rank == 3 else None,
        )
        for rank, took in enumerate((0.2, 0.2, 0.2, 9.0))
    ),
)


def row(status: JobStatus | None = STATUS, *snapshots: WorkerSnapshot, spec: JobSpec = SPEC) -> JobRow:
    parts = {str(number): summaries.part_of(codec.to_json(one)) for number, one in enumerate(snapshots)}
    latest = Latest(Term(7), Seq(4), Step(40))
    return summaries.job_row("digits", spec, status, intent=None, latest=latest, parts=parts, now=NOW)


def test_a_row_tells_the_step_that_all_have_completed_and_who_still_runs() -> None:
    found = row(STATUS, SNAPSHOT)
    assert (found.step, found.steps_total, found.ranks, found.world_size) == (45, 100, 3, 4)
    assert (found.latest_seq, found.latest_step, found.attempt) == (4, 40, 3)
    assert found.reason == "all 4 ranks train"


def test_the_time_left_follows_the_usual_rank_not_the_odd_one() -> None:
    found = row(STATUS, SNAPSHOT)
    assert (found.eta_s, found.step_s) == ((100 - 45) * 0.2, 0.2)


def test_the_time_left_is_not_known_without_an_end_without_times_or_while_nothing_trains() -> None:
    silent = replace(SNAPSHOT, ranks=tuple(replace(one, steps_total=Step(0)) for one in SNAPSHOT.ranks))
    untimed = replace(SNAPSHOT, ranks=tuple(replace(one, timing=None) for one in SNAPSHOT.ranks))
    restarting = replace(STATUS, phase=JobPhase.RECOVERING)
    found = (row(STATUS, silent), row(STATUS, untimed), row(restarting, SNAPSHOT))
    assert [one.eta_s for one in found] == [None, None, None]
    assert [one.step_s for one in found] == [0.2, None, None]


def test_snapshots_of_other_attempts_and_submissions_do_not_count() -> None:
    found = row(STATUS, replace(SNAPSHOT, attempt=Attempt(2)), replace(SNAPSHOT, uid=Uid("u0")))
    assert (found.step, found.ranks, found.steps_total) == (40, 0, 0)


def test_a_job_that_no_leader_has_seen_is_queued() -> None:
    found = row(None)
    assert (found.phase, found.reason) == (JobPhase.QUEUED, "waiting for a leader to look at it")
    assert found.world_size == 4


def test_goodput_is_of_now() -> None:
    ledger = Ledger(int((NOW - 10) * 1000), int((NOW - 5) * 1000), "productive", {"restart": 5000})
    assert row(replace(STATUS, ledger=ledger)).goodput == 0.5


def test_ranks_that_stand_still_are_named_beside_the_leaders_sentence() -> None:
    stalls = tuple(Stall(Rank(rank), Step(45), 5.0) for rank in range(6))
    works = Stack(Rank(3), StackKind.CODE, "look (train.py:9)", "d", moving=True)
    found = row(STATUS, replace(SNAPSHOT, stalls=stalls, stacks=(works,)))
    assert found.reason == (
        "all 4 ranks train; ranks 0, 1, 2, 3 and 2 more completed no step after step 45; "
        "rank 3 is at work in look (train.py:9)"
    )


def test_what_is_read_of_a_stored_snapshot_is_what_the_record_says() -> None:
    assert summaries.part(codec.encode(SNAPSHOT)) == Part("u1", 3, 3, 45, 100, (0.2, 0.2, 0.2, 9.0))


def test_a_damaged_snapshot_is_passed_over() -> None:
    for damaged in (b"", b"[]", b"{}", b'{"uid":"u","attempt":1,"ranks":[3]}', b"\xff", b'{"uid":1}'):
        assert summaries.part(damaged) is None


def test_the_queue_goes_by_priority_and_by_how_long_each_has_waited() -> None:
    def waiting(name: str, minutes: int, priority: int = 0) -> JobRow:
        return JobRow(name, submitted_at=f"2027-01-15T08:{minutes:02}:00Z", priority=priority)

    found = summaries.in_queue(
        [
            waiting("late", 5),
            waiting("early", 0),
            waiting("urgent", 9, priority=1),
            JobRow("runs", JobPhase.RUNNING),
        ]
    )
    assert {one.name: one.queue for one in found} == {"late": 3, "early": 2, "urgent": 1, "runs": 0}


def test_the_list_sorts_its_queue_as_the_leader_does() -> None:
    from dtrain.coordinator.core import queue

    assert summaries.QUEUE_AGING_S == queue.AGING_S


def test_a_machine_says_why_it_is_not_simply_ready() -> None:
    node = NodeRecord(A1, Incarnation("i"), "h:1", "h", 4)
    cordon = Cordon(A1, "bad memory", "ops")
    part = summaries.part_of(codec.to_json(SNAPSHOT))

    def standing(node: NodeRecord | None, cordon: Cordon | None = None) -> tuple[str, str]:
        found = summaries.agent_row("a1", node, cordon, {"digits": part})
        return found.status, found.reason

    assert standing(node) == ("Ready", "")
    assert standing(node, cordon) == ("Cordoned", "bad memory")
    assert standing(None) == ("Lost", "")
    assert standing(replace(node, problem="pid 7 does not die")) == ("Blocked", "pid 7 does not die")
    told = replace(node, draining=Draining("SIGTERM", grace_s=60.0))
    assert standing(told) == ("Draining", "SIGTERM: it waits for at most 60 s for its jobs to move")
    assert summaries.agent_row("a1", node, None, {"digits": part}).busy == 3


def test_a_row_has_the_labels_of_its_job() -> None:
    assert row(spec=replace(SPEC, labels={"team": "vision"})).labels == {"team": "vision"}


def test_labels_are_what_a_selector_can_name() -> None:
    assert not labels.problem({"team": "vision", "org/cost-center": "17.b", "flag": ""})
    for wrong in ({"": "x"}, {"a b": "x"}, {"a": "x=y"}, {"a": "x" * 64}, {"-a": "x"}):
        assert labels.problem(wrong)
    assert labels.problem({f"l{number}": "" for number in range(labels.LABELS_MAX + 1)})


def test_rows_survive_the_wire() -> None:
    found = row(STATUS, SNAPSHOT)
    assert codec.decode(JobRow, codec.encode(found)) == found
