"""The auditor accepts a good history and names what is wrong with handmade bad ones, rule by rule."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dtrain.protocol import codec
from dtrain.protocol.audit import VIOLATIONS_KEPT, Auditor, Change
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord
from dtrain.protocol.events import EventReason, EventRecord, EventType
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.job import (
    PLACED_PHASES,
    TERMINAL_PHASES,
    Condition,
    JobPhase,
    JobStatus,
    Member,
    RestorePoint,
    Tally,
)
from dtrain.protocol.keys import Keys
from dtrain.protocol.ledger import Ledger
from dtrain.protocol.phases import PHASE_CHANGES
from dtrain.protocol.snapshot import (
    CommandOutcome,
    DurablePart,
    Failure,
    FailureKind,
    NodeRecord,
    RankState,
    WorkerPhase,
    WorkerSnapshot,
)

KEYS = Keys(ClusterName("c"))
JOB, UID, AGENT, OTHER = JobName("j"), Uid("u1"), AgentName("a"), AgentName("b")
TERM = 10
MEMBERS = (Member(AGENT, 0, Rank(0), 2), Member(OTHER, 1, Rank(2), 2))


def status(
    phase: JobPhase = JobPhase.RUNNING, attempt: int = 1, seq_last: int = 1, term: int = TERM, uid: Uid = UID
) -> JobStatus:
    members = MEMBERS if phase in PLACED_PHASES | TERMINAL_PHASES else ()
    return JobStatus(
        Term(term), uid, phase, attempt=Attempt(attempt), seq_last=Seq(seq_last), members=members
    )


def opened(seq: int = 1, attempt: int = 1, step: int = 5, nonce: str = "n", term: int = TERM) -> OpenRecord:
    return OpenRecord(Term(term), UID, Seq(seq), Attempt(attempt), Step(step), nonce, 2, 60.0)


def commit(seq: int = 1, attempt: int = 1, step: int = 5, nonce: str = "n", term: int = TERM) -> CommitRecord:
    return CommitRecord(Term(term), UID, Seq(seq), Step(step), Attempt(attempt), nonce, 2, 9, "m", 9, "d")


def latest(seq: int = 1, step: int = 5) -> Latest:
    return Latest(Term(TERM), Seq(seq), Step(step))


def garbage(seq: int = 1, digest: str = "d") -> Garbage:
    return Garbage(Term(TERM), Seq(seq), "m", digest)


def snapshot(
    attempt: int = 1, *pids: int, command: str = "", term: int = TERM, first: int = 0
) -> WorkerSnapshot:
    kind = "Stop" if command.startswith("stop") else "Start"
    return WorkerSnapshot(
        AGENT,
        UID,
        Incarnation("i"),
        Attempt(attempt),
        WorkerPhase.TRAINING,
        ranks=tuple(RankState(Rank(first + i), pid, WorkerPhase.TRAINING) for i, pid in enumerate(pids)),
        command=CommandOutcome(command, kind, True, term=Term(term)) if command else None,
    )


def part(seq: int = 1, digest: str = "d") -> DurablePart:
    return DurablePart(Seq(seq), Attempt(1), Step(5), Rank(0), "n", "m", digest, 9)


class History:
    """One agent, one job, one leader; ``write`` is one revision."""

    def __init__(self) -> None:
        self.auditor = Auditor(ClusterName("c"))
        self.revision = TERM
        self.auditor.feed(TERM, [Change(KEYS.leader, b"{}", TERM)])
        self.node()

    def node(self, incarnation: str = "i", create: int = 0) -> "History":
        self.revision += 1
        record = NodeRecord(AGENT, Incarnation(incarnation), "h:1", "h", 2)
        change = Change(KEYS.node(AGENT), codec.encode(record), create or self.revision)
        self.auditor.feed(self.revision, [change])
        return self

    def write(self, seq: int = 1, **records: Any) -> "History":
        places = {
            "spec": KEYS.spec(JOB),
            "status": KEYS.status(JOB),
            "open": KEYS.open(JOB, Seq(seq)),
            "checkpoint": KEYS.checkpoint(JOB, Seq(seq)),
            "latest": KEYS.latest(JOB),
            "garbage": KEYS.garbage(JOB, Seq(seq)),
            "bad": KEYS.bad(JOB, Seq(seq)),
            "event": KEYS.event(JOB, seq),
            "pin": f"{KEYS.pins(JOB, Seq(seq))}r1",
            "worker": KEYS.worker(AGENT, JOB),
            "node": KEYS.node(AGENT),
            "leader": KEYS.leader,
        }
        self.revision += 1
        self.auditor.feed(
            self.revision,
            [
                Change(
                    places[name],
                    record if record is None or isinstance(record, bytes) else codec.encode(record),
                    self.revision if name == "leader" and isinstance(record, bytes) else 0,
                )
                for name, record in records.items()
            ],
        )
        return self

    def running(self) -> "History":
        return (
            self.write(status=status(JobPhase.QUEUED, 0, 0))
            .write(status=status(JobPhase.STARTING))
            .write(status=status())
        )

    def committed(self, seq: int = 1, step: int = 5) -> "History":
        if seq == 1:
            self.running()
        self.write(seq, status=status(seq_last=seq), open=opened(seq, step=step))
        return self.write(seq, checkpoint=commit(seq, step=step), latest=latest(seq, step), open=None)

    def broken(self) -> set[str]:
        return {violation.invariant for violation in self.auditor.violations}


def test_commits_and_a_retirement_are_a_good_history() -> None:
    history = History().committed().committed(2, 9)
    history.write(checkpoint=None, garbage=garbage()).write(garbage=None)
    assert not history.auditor.violations
    assert (history.auditor.commits, history.auditor.terms, history.auditor.attempts) == (2, 1, 1)


def test_a_settled_checkpoint_may_be_committed_in_the_revision_that_ends_its_attempt() -> None:
    history = History().running().write(open=opened())
    history.write(status=status(JobPhase.RECOVERING), checkpoint=commit(), latest=latest(), open=None).write(
        status=status(JobPhase.STARTING, 2)
    )
    assert not history.auditor.violations


def test_an_agent_may_restart_beside_its_ranks_and_come_back_with_a_new_session() -> None:
    history = History().running().write(worker=snapshot(1, 70, 71, command="start.1"))
    again = replace(snapshot(1, 70, 71, command="start.1"), incarnation=Incarnation("i2"))
    history.node("i2", create=TERM + 1).write(worker=again)
    history.write(worker=None, node=None).node("i3")
    # Its disk is new as well: the same commands are taken on once more.
    history.write(worker=replace(snapshot(1, 80, 81, command="start.1"), incarnation=Incarnation("i3")))
    assert not history.auditor.violations


def test_a_stopped_agent_may_show_old_ranks_under_the_attempt_that_stops_them() -> None:
    history = History().running().write(worker=snapshot(1, 70, 71))
    history.write(status=status(JobPhase.RECOVERING)).write(status=status(JobPhase.STARTING, 2))
    history.write(worker=snapshot(2, 70, 71, command="stop.2"))
    assert not history.auditor.violations


def test_a_name_submitted_again_clears_what_the_former_job_left() -> None:
    history = History().write(spec=b'{"uid":"u1"}').committed().write(status=status(JobPhase.SUCCEEDED))
    history.write(spec=b'{"uid":"u2"}').write(latest=None, checkpoint=None, garbage=garbage())
    history.write(status=status(JobPhase.QUEUED, uid=Uid("u2")))
    assert not history.auditor.violations


BRAKE = (Condition("Degraded", "True", "BrakeOn", "3 of 4 agents vanished"),)
LOST = Failure(FailureKind.AGENT_LOST, "agent a is gone")
RESTORE = RestorePoint(Seq(1), Step(5), "m", "d")

BAD: dict[str, tuple[str, Callable[[History], object]]] = {
    "a record of a term that does not lead": ("I1", lambda h: h.write(status=status(term=9))),
    "a record of a term to come": ("I1", lambda h: h.write(status=status(term=99))),
    "a record while nobody leads": ("I1", lambda h: h.write(leader=None).write(status=status())),
    "a deletion while nobody leads": ("I1", lambda h: h.committed().write(leader=None).write(open=None)),
    "an event of an old term": (
        "I1",
        lambda h: h.write(
            event=EventRecord(Term(9), 1, EventType.NORMAL, EventReason.ATTEMPT_STARTED, "began")
        ),
    ),
    "a leader key that was overwritten": ("I2", lambda h: h.write(leader=status())),
    "a leader beside another": ("I2", lambda h: h.write(leader=b"{}")),
    "a commit that disappears without a tombstone": (
        "I3",
        lambda h: h.committed().committed(2).write(checkpoint=None),
    ),
    "a commit that disappears under another's tombstone": (
        "I3",
        lambda h: h.committed().committed(2).write(checkpoint=None, garbage=garbage(digest="other")),
    ),
    "the newest commit retired": (
        "I3",
        lambda h: h.committed().write(checkpoint=None, garbage=garbage()),
    ),
    "a pinned commit retired": (
        "I3",
        lambda h: h.committed().committed(2).write(pin=b"{}").write(checkpoint=None, garbage=garbage()),
    ),
    "a commit retired that the attempt restores from": (
        "I3",
        lambda h: (
            h.committed()
            .committed(2)
            .write(status=replace(status(seq_last=2), restore=RESTORE))
            .write(checkpoint=None, garbage=garbage())
        ),
    ),
    "an attempt that begins from what training was rolled back past": (
        "I5",
        lambda h: (
            h.committed()
            .committed(2)
            .write(status=status(JobPhase.RECOVERING, seq_last=2))
            .write(
                status=replace(
                    status(JobPhase.STARTING, 2, seq_last=2), restore=RESTORE, passed_over=(Seq(1), Seq(2))
                )
            )
        ),
    ),
    "a commit written twice": (
        "I3",
        lambda h: h.committed().write(open=opened()).write(checkpoint=commit(), open=None),
    ),
    "a commit that changes": ("I3", lambda h: h.committed().write(checkpoint=commit(step=6))),
    "an acknowledged commit that is not there": (
        "I3",
        lambda h: h.running().write(
            event=EventRecord(
                Term(TERM), 1, EventType.NORMAL, EventReason.CHECKPOINT_COMMITTED, "done", "checkpoint/1"
            )
        ),
    ),
    "latest going back": ("I4", lambda h: h.committed().committed(2).write(latest=latest(1))),
    "latest pointing at nothing": ("I4", lambda h: h.write(latest=latest(3))),
    "latest of another step": ("I4", lambda h: h.committed().write(latest=latest(1, 6))),
    "latest deleted": ("I4", lambda h: h.committed().write(latest=None)),
    "a commit that latest does not follow": (
        "I4",
        lambda h: (
            h.committed()
            .write(2, status=status(seq_last=2), open=opened(2))
            .write(2, checkpoint=commit(2), open=None)
        ),
    ),
    "an attempt that skips a number": (
        "I5",
        lambda h: h.write(status=status(attempt=1)).write(status=status(JobPhase.STARTING, attempt=3)),
    ),
    "an attempt that goes back": (
        "I5",
        lambda h: (
            h.running().write(status=status(JobPhase.STARTING, 2)).write(status=status(JobPhase.STARTING, 1))
        ),
    ),
    "a first attempt that is not the first": ("I5", lambda h: h.write(status=status(attempt=2))),
    "forgotten checkpoint numbers": ("I5", lambda h: h.committed().write(status=status(seq_last=0))),
    "a checkpoint number opened twice": (
        "I5",
        lambda h: h.running().write(open=opened()).write(open=None).write(open=opened()),
    ),
    "an open checkpoint that becomes another": (
        "I5",
        lambda h: h.running().write(open=opened()).write(open=opened(nonce="other")),
    ),
    "a commit without an intent": (
        "I5",
        lambda h: h.running().write(checkpoint=commit(), latest=latest()),
    ),
    "a commit of another step than was opened": (
        "I5",
        lambda h: h.running().write(open=opened(step=4)).write(checkpoint=commit(step=5), open=None),
    ),
    "a commit that leaves its intent behind": (
        "I5",
        lambda h: h.running().write(open=opened()).write(checkpoint=commit(), latest=latest()),
    ),
    "a zombie's commit": (
        "I5",
        lambda h: (
            h.running()
            .write(open=opened())
            .write(status=status(JobPhase.STARTING, attempt=2))
            .write(checkpoint=commit(), latest=latest(), open=None)
        ),
    ),
    "two attempts that can commit": (
        "I5",
        lambda h: (
            h.running()
            .write(open=opened())
            .write(2, status=status(JobPhase.STARTING, 2, 2), open=opened(2, attempt=2))
        ),
    ),
    "a checkpoint open after the end": (
        "I5",
        lambda h: h.running().write(open=opened()).write(status=status(JobPhase.SUCCEEDED)),
    ),
    "an agent back at an older attempt": (
        "I6",
        lambda h: (
            h.running()
            .write(status=status(JobPhase.STARTING, 2))
            .write(worker=snapshot(2))
            .write(worker=snapshot(1))
        ),
    ),
    "an attempt that was never decided": ("I6", lambda h: h.running().write(worker=snapshot(2))),
    "an agent that obeys an older term": (
        "I6",
        lambda h: (
            h.running()
            .write(leader=None)
            .write(leader=b"{}")
            .write(worker=snapshot(1, command="prepare.1", term=15))
            .write(worker=snapshot(1, command="start.1", term=TERM))
        ),
    ),
    "an agent that obeys a forged term": (
        "I6",
        lambda h: h.running().write(worker=snapshot(1, command="start.1", term=1_000_000)),
    ),
    "ranks that another machine was given": (
        "I6",
        lambda h: h.running().write(worker=snapshot(1, 70, 71, first=2)),
    ),
    "two sets of ranks in one": (
        "I6",
        lambda h: h.running().write(
            worker=replace(
                snapshot(1), ranks=tuple(RankState(Rank(0), pid, WorkerPhase.TRAINING) for pid in (70, 71))
            )
        ),
    ),
    "a former life that reports": (
        "I6",
        lambda h: h.running().node("i2", create=TERM + 1).write(worker=snapshot(1)),
    ),
    "a report without a session": ("I6", lambda h: h.running().write(node=None).write(worker=snapshot(1))),
    "a command taken on twice": (
        "I7",
        lambda h: (
            h.running()
            .write(worker=snapshot(1, command="prepare.1"))
            .write(worker=snapshot(1, command="start.1"))
            .write(worker=snapshot(1, command="prepare.1"))
        ),
    ),
    "a start that forked twice": (
        "I7",
        lambda h: h.running().write(worker=snapshot(1, 70, 71)).write(worker=snapshot(1, 70, 99)),
    ),
    "a part of a checkpoint taken twice": (
        "I7",
        lambda h: (
            h.running()
            .write(open=opened())
            .write(worker=replace(snapshot(1), durable=(part(),)))
            .write(worker=replace(snapshot(1), durable=(part(digest="other"),)))
        ),
    ),
    "a machine declared lost under the brake": (
        "I9",
        lambda h: h.running().write(
            status=replace(status(JobPhase.RECOVERING), failure=LOST, conditions=BRAKE)
        ),
    ),
    "an attempt placed under the brake": (
        "I9",
        lambda h: (
            h.running()
            .write(status=status(JobPhase.RECOVERING))
            .write(status=replace(status(JobPhase.STARTING, 2), conditions=BRAKE))
        ),
    ),
    "a job that leaves a terminal phase": (
        "phase",
        lambda h: (
            h.running().write(status=status(JobPhase.SUCCEEDED)).write(status=status(JobPhase.STARTING, 2))
        ),
    ),
    "a suspended job that keeps its machines": (
        "phase",
        lambda h: (
            h.running()
            .write(status=status(JobPhase.SUSPENDING))
            .write(status=replace(status(JobPhase.SUSPENDED), members=MEMBERS))
        ),
    ),
    "a suspended job that runs again without having waited": (
        "phase",
        lambda h: (
            h.running()
            .write(status=status(JobPhase.SUSPENDING))
            .write(status=status(JobPhase.SUSPENDED))
            .write(status=status(JobPhase.STARTING, 2))
        ),
    ),
    "a checkpoint open although the job is suspended": (
        "I5",
        lambda h: (
            h.running()
            .write(status=status(JobPhase.SUSPENDING), open=opened())
            .write(status=status(JobPhase.SUSPENDED))
        ),
    ),
    "a job paused at what is not committed": (
        "I5",
        lambda h: h.committed().write(status=replace(status(seq_last=2), held=Seq(2))),
    ),
    "a job paused at a checkpoint of an attempt before": (
        "I5",
        lambda h: (
            h.committed()
            .write(status=status(JobPhase.STARTING, 2))
            .write(status=replace(status(attempt=2), held=Seq(1)))
        ),
    ),
    "a pause that outlives the ranks it holds": (
        "I5",
        lambda h: (
            h.committed()
            .write(status=replace(status(), held=Seq(1)))
            .write(status=replace(status(JobPhase.SUSPENDING), held=Seq(1)))
        ),
    ),
    "a machine that is given more ranks than it has slots": (
        "slots",
        lambda h: h.write(status=replace(status(), members=(Member(AGENT, 0, Rank(0), 3),))),
    ),
    "time that does not add up": (
        "ledger",
        lambda h: h.running().write(status=replace(status(), ledger=Ledger(0, 10, "productive", {"x": 9}))),
    ),
    "time that goes back": (
        "ledger",
        lambda h: (
            h.running()
            .write(status=replace(status(), ledger=Ledger(0, 10, "productive", {"x": 10})))
            .write(status=replace(status(), ledger=Ledger(0, 9, "productive", {"x": 9})))
        ),
    ),
    "time that passes after the end of a job": (
        "ledger",
        lambda h: (
            h.running()
            .write(status=replace(status(JobPhase.FAILED), ledger=Ledger(0, 10, "", {"x": 10})))
            .write(status=replace(status(JobPhase.FAILED), ledger=Ledger(0, 11, "", {"x": 11})))
        ),
    ),
    "a job replaced while it runs": ("phase", lambda h: h.running().write(status=status(uid=Uid("u2")))),
    "a status that is deleted": ("phase", lambda h: h.running().write(status=None)),
    "a record that is no JSON": ("readable", lambda h: h.write(latest=b"nonsense")),
}


@pytest.mark.parametrize("name", BAD)
def test_the_auditor_names(name: str) -> None:
    invariant, build = BAD[name]
    history = History()
    assert not history.auditor.violations
    build(history)
    assert history.broken() == {invariant} | (history.broken() & ALSO.get(name, set()))


ALSO = {
    "the newest commit retired": {"I4"},
    "a commit written twice": {"I5"},
    "a commit that changes": {"I4", "I5"},
    "a commit of another step than was opened": {"I4"},
    "two sets of ranks in one": {"I7"},
}
"""What else a history breaks that cannot break its rule alone."""


def test_every_rule_has_a_bad_history() -> None:
    assert {invariant for invariant, _ in BAD.values()} == {
        *(f"I{number}" for number in (1, 2, 3, 4, 5, 6, 7, 9)),
        "phase",
        "slots",
        "ledger",
        "readable",
    }


def test_violations_are_bounded_and_counted() -> None:
    history = History()
    for _ in range(VIOLATIONS_KEPT + 5):
        history.write(garbage=replace(garbage(), term=Term(3)))
    assert len(history.auditor.violations) == VIOLATIONS_KEPT
    assert history.auditor.violations_more == 5


def test_a_breach_that_stays_is_told_once() -> None:
    history = History().running().write(open=opened()).write(status=status(JobPhase.STARTING, 2))
    for _ in range(3):
        history.write(status=status(JobPhase.STARTING, 2))
    assert len(history.auditor.violations) == 1


def seeded(*changes: Change) -> Auditor:
    auditor = Auditor(ClusterName("c"))
    auditor.begin_at(40, [Change(KEYS.leader, b"{}", 30), *changes])
    return auditor


def held(key: str, record: Any) -> Change:
    return Change(key, codec.encode(record), 31)


def test_an_audit_that_begins_late_judges_from_there_on_alone() -> None:
    auditor = seeded(
        held(KEYS.status(JOB), status(attempt=7, seq_last=9, term=20)),
        held(KEYS.checkpoint(JOB, Seq(9)), commit(9, attempt=6, term=20)),
        held(KEYS.latest(JOB), latest(9)),
    )
    assert not auditor.violations
    assert auditor.begun_at == 40
    auditor.feed(41, [held(KEYS.status(JOB), status(JobPhase.STARTING, attempt=8, seq_last=9, term=30))])
    assert not auditor.violations
    auditor.feed(42, [held(KEYS.status(JOB), status(JobPhase.STARTING, attempt=10, seq_last=9, term=30))])
    auditor.feed(43, [Change(KEYS.checkpoint(JOB, Seq(9)), None)])
    assert {violation.invariant for violation in auditor.violations} == {"I5", "I3", "I4"}


def test_what_a_late_audit_begins_with_is_checked_as_it_is() -> None:
    assert seeded(held(KEYS.latest(JOB), latest(9))).violations[0].invariant == "I4"


def test_a_gap_hides_what_happened_in_it_but_not_what_went_back() -> None:
    history = History().committed().committed(2, 9)
    good = [
        Change(KEYS.leader, b"{}", 90),
        held(KEYS.status(JOB), status(attempt=4, seq_last=5, term=90)),
        held(KEYS.checkpoint(JOB, Seq(5)), commit(5, attempt=3)),
        held(KEYS.latest(JOB), latest(5)),
    ]
    history.auditor.begin_at(100, good)
    assert not history.auditor.violations
    history.auditor.begin_at(
        200,
        [
            held(KEYS.status(JOB), status(attempt=3, seq_last=5)),
            held(KEYS.checkpoint(JOB, Seq(4)), commit(4)),
            held(KEYS.latest(JOB), latest(4)),
        ],
    )
    assert history.broken() == {"I4", "I5"}


RAISED = 1_000_000_000


def restored(auditor: Auditor, seq_last: int = 1) -> Auditor:
    """etcd holds a backup of attempt 1, its revisions raised; the agent runs attempt 3."""
    node = NodeRecord(AGENT, Incarnation("i"), "h:1", "h", 2)
    records = [
        Change(KEYS.node(AGENT), codec.encode(node), 12),
        Change(KEYS.status(JOB), codec.encode(status(seq_last=seq_last)), 13),
        Change(KEYS.worker(AGENT, JOB), codec.encode(snapshot(3, 7, 8, command="start.3", term=40)), 14),
    ]
    auditor.begin_at(RAISED + 14, records)
    auditor.feed(RAISED + 15, [Change(KEYS.leader, b"{}", RAISED + 15)])
    return auditor


def test_what_was_decided_after_a_backup_is_not_held_against_the_etcd_restored_from_it() -> None:
    lived = History().running().write(open=opened()).write(checkpoint=commit(), latest=latest(), open=None)
    lived.write(status=status(attempt=2)).write(status=status(attempt=3, seq_last=4))
    lived.write(worker=snapshot(3, 7, 8, command="start.3"))
    assert not lived.auditor.violations
    for auditor in (lived.auditor, Auditor(ClusterName("c"))):
        restored(auditor)
        term = RAISED + 15
        auditor.feed(term + 1, [Change(KEYS.status(JOB), codec.encode(status(attempt=3, term=term)))])
        auditor.feed(term + 2, [Change(KEYS.worker(AGENT, JOB), codec.encode(snapshot(3, 7, 8)))])
        assert not auditor.violations, auditor.violations


def test_after_a_restoration_no_attempt_may_be_skipped_that_no_agent_has_shown() -> None:
    auditor = restored(Auditor(ClusterName("c")))
    auditor.feed(RAISED + 16, [Change(KEYS.status(JOB), codec.encode(status(attempt=4, term=RAISED + 15)))])
    assert [violation.invariant for violation in auditor.violations] == ["I5"]


def test_after_a_restoration_agents_obey_only_what_is_decided() -> None:
    auditor = restored(Auditor(ClusterName("c")))
    told = snapshot(9, 7, 8, command="start.9", term=RAISED + 15)
    auditor.feed(RAISED + 16, [Change(KEYS.worker(AGENT, JOB), codec.encode(told))])
    assert "I6" in [violation.invariant for violation in auditor.violations]


def test_every_phase_has_a_way_out_unless_it_is_terminal() -> None:
    assert set(PHASE_CHANGES) == set(JobPhase)
    assert {phase for phase, exits in PHASE_CHANGES.items() if not exits} == TERMINAL_PHASES


def test_slots_are_free_again_when_a_job_is_suspended_and_not_before() -> None:
    other = JobName("other")
    members = (Member(AGENT, 0, Rank(0), 2),)
    theirs = replace(status(), uid=Uid("u2"), members=members)

    def beside(phase: JobPhase) -> set[str]:
        history = History().running().write(status=status(JobPhase.SUSPENDING))
        history.write(status=status(phase))
        change = Change(KEYS.status(other), codec.encode(theirs), history.revision + 1)
        history.auditor.feed(history.revision + 1, [change])
        return history.broken()

    assert beside(JobPhase.SUSPENDED) == set()
    assert beside(JobPhase.SUSPENDING) == {"slots"}


def counted(tally: Tally, attempt: int = 1, phase: JobPhase = JobPhase.RUNNING) -> JobStatus:
    return replace(status(phase, attempt), tally=tally)


def test_counts_that_rise_with_what_they_count_are_a_good_history() -> None:
    history = History().write(status=status(JobPhase.QUEUED, 0, 0))
    history.write(status=counted(Tally({"first": 1}), phase=JobPhase.STARTING))
    history.write(status=counted(Tally({"first": 1}, 1, 64, {"late": 1})))
    history.write(status=counted(Tally({"first": 1}, 1, 64, {"late": 1}), phase=JobPhase.RECOVERING))
    again = Tally({"first": 1, "signal": 1}, 2, 128, {"late": 1})
    history.write(status=counted(again, 2, JobPhase.STARTING))
    # A release that keeps no counts takes over, and gives it back.
    history.write(status=status(attempt=2)).write(status=counted(Tally(commits=1), 2))
    assert not history.auditor.violations


@pytest.mark.parametrize(
    "later",
    [
        Tally({"first": 1}, 1, 64),
        Tally({"signal": 1}, 2, 64),
        Tally({"first": 1}, 2, 63),
        Tally({"first": 1}, 2, 64, {"rank": 1}),
        Tally({"first": 1, "signal": 1}, 2, 64, {"late": 1}),
    ],
    ids=["commits", "attempts", "bytes", "aborts", "an attempt that was not"],
)
def test_a_count_that_falls_or_rises_on_its_own_is_found(later: Tally) -> None:
    before = Tally({"first": 1}, 2, 64, {"late": 1})
    history = History().write(status=status(JobPhase.QUEUED, 0, 0))
    history.write(status=counted(before, phase=JobPhase.STARTING)).write(status=counted(before))
    assert not history.auditor.violations
    assert history.write(status=counted(later)).broken() == {"tally"}
