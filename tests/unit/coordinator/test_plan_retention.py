"""What is deleted, in which order, and what never is."""

from dataclasses import replace

from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.decisions import CollectGarbage, NoKeysUnder, SweepOrphans
from dtrain.coordinator.core.retention import Shelf, untouchable, why_kept
from dtrain.protocol.checkpoint import CommitRecord, Quarantine, Verification
from dtrain.protocol.events import EVENTS_KEPT, EventReason, EventRecord, EventType
from dtrain.protocol.ids import Attempt, Seq, Step, Term, Uid
from dtrain.protocol.job import Former, JobPhase, Wanted


def running(keep_last: int, checkpoints: int, keep_every_steps: int = 0) -> Stage:
    spec = make_spec(store="s3://b", every_steps=10, keep_last=keep_last, keep_every_steps=keep_every_steps)
    stage = Stage(spec).join("a", "b").run()
    for number in range(1, checkpoints + 1):
        stage.step(number * 10 - 2)
        stage.decide()
        stage.checkpoint()
    return stage


def seqs(stage: Stage) -> list[int]:
    return [commit.seq for commit in stage.commits]


def test_the_last_few_are_kept() -> None:
    stage = running(2, 5)
    stage.until_quiet()
    assert seqs(stage) == [4, 5]
    assert sorted(stage.of("garbage")) == [1, 2, 3]


def test_the_first_of_every_n_steps_is_kept_beyond_the_last_few() -> None:
    stage = running(1, 9, keep_every_steps=40)
    stage.until_quiet()
    assert [commit.step for commit in stage.commits] == [40, 80, 90]


def record(seq: int, step: int) -> CommitRecord:
    return CommitRecord(Term(1), Uid("u1"), Seq(seq), Step(step), Attempt(1), "n", 2, 10, "m", 1, "d")


def test_after_a_return_to_an_older_step_the_newer_of_two_alike_is_kept() -> None:
    commits = tuple(record(seq, step) for seq, step in [(1, 7), (2, 11), (3, 14), (4, 11), (5, 13), (6, 16)])
    kept = why_kept(Shelf(commits, 1, 10))
    assert sorted(kept) == [4, 6]
    # A step before the first multiple is of no multiple; the damaged one does not count.
    assert sorted(why_kept(Shelf(commits, 1, 10, bad={Seq(4)}))) == [2, 6]


def test_the_last_one_that_was_read_whole_is_spared_by_the_policy_alone() -> None:
    commits = tuple(record(seq, 10 * seq) for seq in range(1, 6))
    shelf = Shelf(commits, 2, verified={Seq(1), Seq(2)}, latest=Seq(5))
    assert sorted(why_kept(shelf)) == [2, 4, 5]
    assert sorted(untouchable(shelf)) == [5]
    assert sorted(why_kept(replace(shelf, bad={Seq(2)}))) == [1, 4, 5]


def test_a_record_of_having_been_read_goes_with_its_checkpoint() -> None:
    stage = running(1, 2)
    stage.write(KEYS.verified(JOB, Seq(2)), Verification(Term(1), Seq(2), "2027-01-01T00:00:00Z"))
    stage.write(KEYS.verified(JOB, Seq(1)), Verification(Term(1), Seq(1), "2027-01-01T00:00:00Z"))
    stage.until_quiet()
    assert sorted(stage.of("verified")) == [2]


def test_retiring_refuses_when_somebody_begins_to_read() -> None:
    stage = running(1, 2)
    decision = stage.decide()
    assert decision.absent == (NoKeysUnder(KEYS.pins(JOB, Seq(1))),)
    assert {write.key for write in decision.writes} == {
        KEYS.checkpoint(JOB, Seq(1)),
        KEYS.garbage(JOB, Seq(1)),
    }


def test_pinned_and_restored_ones_stay() -> None:
    stage = running(1, 1)
    stage.fail("a")
    stage.run(step=10)
    stage.pinned.add(Seq(2))
    for step in (18, 28, 38):
        stage.step(step)
        stage.decide()
        stage.checkpoint()
    stage.until_quiet()
    assert seqs(stage) == [1, 2, 4]
    stage.pinned.clear()
    stage.until_quiet()
    assert seqs(stage) == [1, 4]


def test_blobs_go_after_the_record_and_the_tombstone_goes_last() -> None:
    stage = running(1, 2)
    stage.decide()
    stage.decide()
    (work,) = stage.work(CollectGarbage)
    assert isinstance(work, CollectGarbage)
    assert (work.garbage.seq, work.store) == (1, "s3://b")
    assert stage.of("garbage")
    stage.collected.add(Seq(1))
    stage.until_quiet()
    assert not stage.of("garbage")


def test_damaged_ones_do_not_count_as_kept() -> None:
    stage = running(2, 3)
    stage.until_quiet()
    stage.write(KEYS.bad(JOB, Seq(3)), Quarantine(Term(1), Seq(3), "x", 0, "a", "b"))
    stage.until_quiet()
    assert seqs(stage) == [2, 3]
    stage.step(38)
    stage.decide()
    stage.checkpoint()
    stage.until_quiet()
    assert seqs(stage) == [2, 4]
    stage.collected |= {Seq(1), Seq(3)}
    stage.until_quiet()
    assert not stage.of("bad")


def test_orphans_are_swept_now_and_then() -> None:
    stage = running(2, 0)
    stage.took_office_at = stage.now
    stage.decide()
    assert not stage.work(SweepOrphans)
    assert stage.last.wake_at == stage.now + 600.0
    stage.after(600.0).decide()
    assert stage.work(SweepOrphans)
    stage.swept_at = stage.now
    assert not stage.decide().work


def test_a_name_that_is_used_again_at_once_is_still_swept_after() -> None:
    stage = running(2, 1)
    stage.want(Wanted.CANCEL)
    stage.decide()
    held = dict(stage.workers)
    stage.workers.clear()
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
    assert not stage.status.swept
    stage.workers.update(held)
    stage.spec = make_spec(uid="u2", store="s3://c")
    stage.write(KEYS.spec(JOB), stage.spec)
    stage.store_ok = True
    stage.until_quiet()
    former = Former(Uid("u1"), "s3://b")
    assert stage.status.unswept == (former,)
    assert not stage.work(SweepOrphans), "an agent may still upload something"
    for agent in held:
        stage.workers.pop(agent, None)
    stage.decide()
    assert [(work.uid, work.store) for work in stage.work(SweepOrphans)] == [(former.uid, former.store)]
    stage.swept_former.add(former.uid)
    stage.until_quiet()
    assert stage.status.unswept == ()
    assert not stage.work(SweepOrphans)


def test_retention_never_delays_a_commit() -> None:
    stage = running(1, 2)
    stage.step(28)
    stage.decide()
    stage.durable()
    stage.verify()
    stage.pinned.clear()
    decision = stage.decide()
    assert not decision.absent
    assert len(stage.commits) == 3


def test_event_ring_is_bounded() -> None:
    stage = Stage().join("a", "b").run()
    stage.write(KEYS.status(JOB), replace(stage.status, event_last=300))
    for seq in range(80, 301):
        event = EventRecord(Term(1), seq, EventType.NORMAL, EventReason.RANK_EXITED, "x")
        stage.write(KEYS.event(JOB, seq), event)
    for _ in range(30):
        stage.step(stage.status.attempt)
        stage.fail("a")
        stage.after(4000.0).run(step=stage.status.attempt)
    assert len(stage.events) == EVENTS_KEPT
    assert stage.events[-1].seq == stage.status.event_last
