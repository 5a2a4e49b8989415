"""Tables and descriptions, as people read them."""

from dataclasses import replace

from tests.unit.cli.fakes import (
    JOB,
    KEYS,
    NOW,
    TERM,
    Seq,
    Step,
    at,
    failure,
    fleet,
    item,
    reading,
    running_job,
    snapshot,
    spec,
    status,
)

from dtrain.cli import records
from dtrain.cli.records import Cluster
from dtrain.cli.render import checkpoints, describe, failures, lists
from dtrain.cli.render.table import Table, When
from dtrain.protocol import codec
from dtrain.protocol.cluster import Blame, Suspicion
from dtrain.protocol.ids import AgentName, Attempt, JobName, Rank, Uid
from dtrain.protocol.job import Condition, Intent, JobPhase, RestorePoint, Wanted
from dtrain.protocol.ledger import Ledger
from dtrain.protocol.snapshot import (
    Draining,
    FailureKind,
    NodeRecord,
    Stack,
    StackKind,
    Stall,
    Timing,
    WorkerSnapshot,
)


def job_table(cluster: Cluster, *, wide: bool = False) -> Table:
    return lists.jobs([job.row(NOW) for job in cluster.jobs.values()], When(NOW), wide=wide)


def agent_table(cluster: Cluster) -> Table:
    return lists.agents([agent.row for agent in cluster.agents.values()], When(NOW))


def test_get_jobs() -> None:
    cluster = records.group(reading(*running_job()))
    assert job_table(cluster).lines() == [
        "NAME     PHASE     STEP   PROGRESS   ETA   GOODPUT   ATTEMPT   RANKS   LAST-CKPT     AGE    REASON",
        "digits   RUNNING   45     –          –     –         3         4/4     4 (step 40)   1h1m   "
        "all 4 ranks train",
    ]
    assert job_table(cluster, wide=True).rows[0][10:15] == ("u1", "a1,a2", "1/10", "–", "0")


def test_a_job_no_leader_has_seen_is_queued_and_says_so() -> None:
    cluster = records.group(reading(item(KEYS.spec(JOB), spec())))
    assert job_table(cluster).rows == (
        ("digits", "QUEUED", "0", *"–––", "0", "0/4", "–", "1h1m", "waiting for a leader to look at it"),
    )


def test_snapshots_of_older_attempts_do_not_count() -> None:
    items = [*running_job(attempt=4, step=40)]
    cluster = records.group(reading(*items))
    assert job_table(cluster).rows[0][2:8] == ("40", *"–––", "4", "0/4")


def test_get_agents() -> None:
    cluster = records.group(reading(*running_job(), *fleet()))
    assert agent_table(cluster).lines() == [
        "NAME   STATUS     SLOTS   JOBS     VERSION   SINCE   REASON",
        "a1     Ready      2/2     digits   0.1.0     2h",
        "a2     Cordoned   2/4     digits   –         10s     bad memory",
    ]


def test_an_agent_that_was_told_to_end_is_draining() -> None:
    items = [*running_job(), *fleet()]
    key = KEYS.node(AgentName("a1")).removeprefix(KEYS.root)
    place = next(place for place, found in enumerate(items) if found.key == key)
    node = codec.decode(NodeRecord, items[place].value)
    told = replace(node, draining=Draining("SIGTERM", grace_s=60.0))
    items[place] = replace(items[place], value=codec.encode(told))
    row = agent_table(records.group(reading(*items))).rows[0]
    assert row[:2] == ("a1", "Draining")
    assert row[-1] == "SIGTERM: it waits for at most 60 s for its jobs to move"


def test_an_agent_without_a_lease_is_lost() -> None:
    cluster = records.group(reading(*[i for i in fleet() if "cordons" in i.key]))
    assert agent_table(cluster).rows[0][:3] == (
        "a2",
        "Lost",
        "–",
    )


def test_get_coordinators() -> None:
    cluster = records.group(reading(*fleet()))
    assert lists.coordinators(cluster, {"c1": 0.25, "c2": None}, When(NOW)).lines() == [
        "NAME   ROLE      TERM   ADDRESS   VERSION   MIRROR-AGE   SINCE",
        "c1     leader    7      h1:7070   0.1.0     250ms        1m",
        "c2     standby   –      h2:7070   0.1.0     –            1m",
    ]


def test_get_checkpoints_combines_every_kind_of_record() -> None:
    job = records.group(reading(*running_job())).jobs["digits"]
    assert checkpoints.checkpoints(job, When(NOW)).lines() == [
        "SEQ   STEP   ATTEMPT   WORLD   SIZE     STATE       PINNED   VERIFIED   AGE",
        "2     –      –         –       –        Deleting                        –",
        "3     30     2         4       1.2 GB   Bad                             41s",
        "4*    40     2         4       1.2 GB   Committed   yes      7s         41s",
        "5     50     3         4       –        Open                            2s",
    ]


def test_the_checkpoint_an_attempt_restored_counts_as_pinned() -> None:
    items = running_job(restore=RestorePoint(Seq(3), Step(30), "m", "d"))
    lines = {
        line.seq: line for line in checkpoints.checkpoint_lines(records.group(reading(*items)).jobs["digits"])
    }
    assert lines[3].pinned


def test_get_events_is_in_order_of_time() -> None:
    job = records.group(reading(*running_job())).jobs["digits"]
    assert lists.events([("digits", e) for e in job.events.values()], When(NOW)).lines() == [
        "TIME    TYPE      REASON           OBJECT              COUNT   MESSAGE",
        "1m20s   Warning   RankSignaled     job/digits rank/3   1       SIGKILL",
        "1m10s   Normal    AttemptStarted   job/digits          1       attempt 3 begins",
    ]


def test_describe_job_opens_with_the_answer() -> None:
    condition = Condition("Placed", "True", "Members", "on a1, a2", at(60))
    also = ("rank 0 on a1: connection closed by peer", "rank 2 on a2: connection closed by peer")
    cause = failure(step=Step(431), also=also)
    job = records.group(reading(*running_job(failure=cause, conditions=(condition,)))).jobs["digits"]
    lines = describe.job(job, NOW)
    assert lines[:10] == [
        f"digits  RUNNING  attempt 3  restarts 1/10 in 1h  since {at(65)} (1m5s)",
        "  all 4 ranks train",
        "Root cause of attempt 2   rank 3 on a2, pid 4711: SIGKILL, out of memory (at step 431)",
        "    | step 431 loss=0.213",
        "    | Killed",
        "    + 2 more failed with it: rank 0 on a1: connection closed by peer; ...",
        "  dtrain: attempt 3 begins",
        "",
        "Checkpoints   latest 4 (step 40, 41s old, 1.2 GB), 5 open (step 50), 3 bad",
        "Step          45",
    ]
    assert describe.job(job, NOW, whole=True)[5:7] == [f"    + {line}" for line in also]
    start = lines.index("Ranks")
    assert lines[start + 1 : start + 3] == [
        "  RANK   AGENT   PID   STATE      STEP   STEP/OWN/DATA   EXIT   METRICS",
        "  0      a1      100   TRAINING   46     –                      loss=0.25",
    ]
    assert "  Placed   True     Members   " + at(60) + "   on a1, a2" in lines


def test_describe_job_says_how_far_it_is_and_where_its_time_went() -> None:
    ledger = Ledger(
        round((NOW - 100) * 1000),
        round((NOW - 5) * 1000),
        "productive",
        {"productive": 85_000, "restart": 10_000},
    )
    items = running_job(ledger=ledger)
    for place, one in enumerate(items):
        if "/workers/" in one.key:
            found = codec.decode(WorkerSnapshot, one.value)
            ranks = tuple(
                replace(rank, steps_total=Step(200), timing=Timing(0.5, 0.1, 0.1)) for rank in found.ranks
            )
            items[place] = replace(one, value=codec.encode(replace(found, ranks=ranks)))
    job = records.group(reading(*items)).jobs["digits"]
    lines = describe.job(job, NOW)
    assert "Step          45 of 200 (22%), 1m17s left at its recent pace" in lines
    assert "Goodput       90.0%   productive 1m30s  lost 0s  restart 10s  stall 0s  idle 0s" in lines
    assert job_table(records.group(reading(*items))).rows[0][3:6] == ("22%", "1m17s", "90.0%")


def test_describe_job_says_what_the_headlines_are_made_of() -> None:
    spent = {
        "idle.queued": 100_000,
        "restart.prepare": 8_000,
        "restart.restore": 2_000,
        "productive": 600_000,
        "lost_work": 30_000,
        "idle.of_a_newer_release": 20_000,
    }
    until_ms = round(1000 * NOW) - 240_000
    ledger = Ledger(until_ms - 760_000, until_ms, "productive", spent, saved_ms=600_000)
    job = records.group(reading(*running_job(ledger=ledger))).jobs["digits"]
    lines = describe.job(job, NOW)
    start = next(place for place, line in enumerate(lines) if line.startswith("Goodput"))
    assert lines[start : start + 3] == [
        "Goodput       93.3%   productive 14m  lost 30s  restart 10s  stall 0s  idle 2m",
        "              restart: prepare 8s, restore 2s; idle: queued 1m40s, of-a-newer-release 20s",
        "              4m of it in no checkpoint yet",
    ]


def test_slow_ranks_and_numbers_that_are_not_finite_are_said_first_and_shown_with_their_rank() -> None:
    told = (
        Condition("NonFinite", "False", "Finite", "all numbers have been finite since step 9", at(60)),
        Condition("Straggling", "True", "SlowRank", "rank 1 on a1 needs 180 ms", at(60)),
    )
    job = records.group(reading(*running_job(conditions=told))).jobs["digits"]
    assert job.reason == "all 4 ranks train; rank 1 on a1 needs 180 ms"
    agent, state = job.ranks[1]
    sick = replace(state, timing=Timing(0.2, 0.0105, 0.18), nonfinite=("norm",), metrics={"loss": 0.5})
    job.workers[agent] = replace(job.workers[agent], ranks=(sick,))
    row = next(row for row in describe.rank_table(job).rows if row[0] == "1")
    assert row[5:] == ("200/180/10.5 ms", "", "norm=not-finite loss=0.5")


def test_a_job_whose_steps_stand_still_does_not_look_as_if_it_trained() -> None:
    cluster = records.group(reading(*running_job()))
    job = cluster.jobs["digits"]
    stalls = tuple(Stall(Rank(rank), Step(45), 5.0) for rank in (0, 1))
    job.workers["a1"] = replace(job.workers["a1"], stalls=stalls)
    words = "all 4 ranks train; ranks 0, 1 completed no step after step 45"
    assert job_table(cluster).rows[0][-1] == words
    works = Stack(Rank(3), StackKind.CODE, "look (train.py:9)", "d", moving=True)
    job.workers["a2"] = replace(job.workers["a2"], stacks=(works,))
    assert job.reason == f"{words}; rank 3 is at work in look (train.py:9)"
    # Of a job that restarts what its former ranks did says nothing.
    ended = records.group(reading(*running_job(phase=JobPhase.RECOVERING))).jobs["digits"]
    ended.workers["a1"] = replace(ended.workers["a1"], stalls=stalls)
    assert ended.reason == "all 4 ranks train"


def test_stacks_are_told_with_their_number_their_age_and_the_command_that_shows_them() -> None:
    job = records.group(reading(*running_job())).jobs["digits"]
    assert not any("stacks" in line.lower() for line in describe.job(job, NOW))
    where = "spin (train.py:7)"
    one = replace(job.workers["a1"], dumps=2, dumped_at=NOW - 12)
    stands = Stack(Rank(3), StackKind.CODE, where, "stacks.3.x", moving=False)
    other = replace(job.workers["a2"], dumps=1, dumped_at=NOW - 70, stacks=(stands,))
    job.workers |= {"a1": one, "a2": other}
    lines = describe.job(job, NOW)
    start = next(index for index, line in enumerate(lines) if line.startswith("Stacks"))
    assert lines[start : start + 3] == [
        "Stacks        of 4 ranks, collected 2 times, the last time 12s ago: "
        "dtrain logs digits --stacks --attempt 3",
        "  RANK   AGENT   DOES   WHERE",
        "  3      a2      code   spin (train.py:7)",
    ]
    # Those of an attempt before are where its end is told.
    hang = failure(kind=FailureKind.HANG, signal=None, message="this rank waits for data", attempt=Attempt(2))
    job = records.group(reading(*running_job(failure=hang))).jobs["digits"]
    assert "    stacks of all ranks: dtrain logs digits --stacks --attempt 2" in describe.job(job, NOW)


def test_all_that_failed_with_the_first_are_counted_though_few_are_named() -> None:
    named = tuple(f"rank {n} on a1: connection closed by peer" for n in range(8))
    card = failures.failure_card(failure(also=(*named, "248 more")))
    assert card[-1].startswith("    + 256 more failed with it: rank 0 on a1: ")


def test_checkpoints_that_training_was_rolled_back_past_are_marked() -> None:
    job = records.group(reading(*running_job(passed_over=(Seq(4),)))).jobs["digits"]
    notes = {line.seq: line.note for line in checkpoints.checkpoint_lines(job)}
    assert notes[4] == "training was rolled back past it"
    (line,) = [line for line in describe.job(job, NOW) if line.startswith("Checkpoints")]
    assert "4 rolled back past" in line
    assert "passed over" not in line  # once is enough


def test_a_member_without_a_snapshot_is_shown_as_silent() -> None:
    items = [i for i in running_job() if "a2/workers" not in i.key]
    job = records.group(reading(*items)).jobs["digits"]
    assert [row[3] for row in describe.rank_table(job).rows] == [
        "TRAINING",
        "TRAINING",
        "no report",
        "no report",
    ]


def test_what_is_wanted_is_shown_until_it_is_so() -> None:
    intent = item(KEYS.intent(JOB), Intent(spec().uid, Wanted.CANCEL, by="me@here"))
    job = records.group(reading(*running_job(), intent)).jobs["digits"]
    assert "  wanted: cancel (by me@here)" in describe.job(job, NOW)


def test_describe_agent() -> None:
    cluster = records.group(reading(*running_job(), *fleet()))
    lines = describe.agent(cluster.agents["a2"], NOW)
    assert lines[:2] == ["a2  Cordoned  since 10s", "  cordoned: bad memory (by ops)"]
    assert "Job digits   attempt 3   TRAINING" in lines


def test_what_speaks_against_a_machine_is_shown_with_it() -> None:
    found = Blame(JobName("digits"), Uid("u1"), Attempt(2), FailureKind.SIGNAL, NOW - 90)
    agent = AgentName("a2")
    cluster = records.group(reading(*fleet(), item(KEYS.suspicion(agent), Suspicion(TERM, agent, (found,)))))
    lines = describe.agent(cluster.agents["a2"], NOW)
    start = lines.index("Attempts ended because of it")
    assert lines[start + 1] == "  1m30s ago   attempt 2 of digits: signal"


def test_failures_are_titled_by_who_and_how() -> None:
    assert failures.failure_title(failure(message="SIGKILL")) == "rank 3 on a2, pid 4711: SIGKILL"
    exited = failure(kind=FailureKind.EXIT, signal=None, exit_code=3, message="", pid=None)
    assert failures.failure_title(exited) == "rank 3 on a2: exit code 3"
    lost = failure(kind=FailureKind.AGENT_LOST, rank=None, pid=None, signal=None, message="its lease expired")
    assert failures.failure_title(lost) == "agent a2: its lease expired"


def test_lines_are_cut_to_the_width_and_never_otherwise() -> None:
    table = Table(("A", "B"), (("x", "y" * 100),))
    assert [len(line) for line in table.lines(20)] == [5, 20]
    assert table.lines(20)[1].endswith("…")
    assert len(table.lines()[1]) == 104


def test_an_old_mirror_is_said() -> None:
    assert lists.stale_line(9.9) == ""
    assert lists.stale_line(12.3) == "mirror is 12s old: etcd unreachable"


def test_json_has_the_fields_of_the_records() -> None:
    job = records.group(reading(*running_job())).jobs["digits"].as_json()
    assert (job["v"], job["kind"], job["name"]) == (1, "Job", "digits")
    assert set(job) == {
        *(
            "v",
            "kind",
            "name",
            "spec",
            "status",
            "latest",
            "checkpoints",
            "open",
            "bad",
            "garbage",
            "pins",
            "verified",
        ),
        *("events", "workers"),
    }
    assert job["status"]["phase"] == "RUNNING"
    assert job["checkpoints"]["4"]["step"] == 40
    assert job["workers"]["a1"]["ranks"][0]["step"] == 46


def test_a_record_of_a_newer_version_hides_nothing_else() -> None:
    items = running_job()
    newer = type(items[1])(items[1].key, b'{"v":2,"phase":"X"}', 1, 1)
    job = records.group(reading(items[0], newer, *items[2:])).jobs["digits"]
    assert job.status is None
    assert job.raw["status"] == {"v": 2, "phase": "X"}


def test_a_spent_budget_is_told_from_other_failures() -> None:
    from tests.unit.cli.fakes import event

    from dtrain.protocol.events import EventReason

    def ended(*more: object) -> records.Job:
        items = [item(KEYS.status(JOB), status(JobPhase.FAILED)), *more]
        return records.group(reading(*items)).jobs["digits"]  # type: ignore[arg-type]

    assert ended().exit_code == 20
    assert ended(item(KEYS.event(JOB, 9), event(9, EventReason.BUDGET_EXHAUSTED, "x", 1))).exit_code == 22
    assert snapshot("a1", 0, 1).attempt == 3


def test_a_problem_that_several_replicas_see_is_one_line() -> None:
    found = {"c2": ("etcd is full", "its certificate ends"), "c1": ("etcd is full",), "c3": ()}
    assert lists.problem_lines(found) == [
        "PROBLEM (c1, c2): etcd is full",
        "PROBLEM (c2): its certificate ends",
    ]
