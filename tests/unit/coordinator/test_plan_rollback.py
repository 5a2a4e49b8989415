"""Going back past the newest checkpoints."""

from dataclasses import replace

from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.retention import Shelf, why_kept
from dtrain.coordinator.core.rollback import pass_over
from dtrain.coordinator.core.views import Moment
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Attempt, Seq, Step, Term, Uid


def committed(seq: int) -> CommitRecord:
    return CommitRecord(
        Term(5), Uid("u1"), Seq(seq), Step(10 * seq), Attempt(1), "n", 2, 1, f"m{seq}", 1, "d", None, False
    )


def draft_with(*seqs: int, passed: tuple[int, ...] = ()) -> Draft:
    stage = Stage(make_spec(store="memory://x")).join("a", "b").run()
    for seq in seqs:
        stage.write(KEYS.checkpoint(JOB, Seq(seq)), committed(seq))
    status = replace(stage.status, passed_over=tuple(Seq(seq) for seq in passed))
    return Draft(stage.view(), stage.fleet(), Moment(stage.now, 0.0, "n"), stage.spec, status)


def test_the_next_attempt_begins_further_back() -> None:
    draft = draft_with(1, 2, 3)
    assert pass_over(draft, 1)
    found = draft.newest_good()
    assert found is not None
    assert found.seq == 2
    assert [w.value.reason for w in draft.finish().writes if "/events/" in w.key] == [EventReason.ROLLED_BACK]  # type: ignore[union-attr]


def test_a_second_time_goes_further_back_still() -> None:
    draft = draft_with(1, 2, 3, passed=(3,))
    assert pass_over(draft, 1)
    assert draft.status.passed_over == (2, 3)
    found = draft.newest_good()
    assert found is not None
    assert found.seq == 1


def test_the_oldest_stays_however_far_is_asked_for() -> None:
    draft = draft_with(1, 2, 3)
    assert pass_over(draft, 9)
    assert draft.status.passed_over == (2, 3)


def test_with_one_checkpoint_or_none_there_is_nothing_to_go_back_to() -> None:
    for draft in (draft_with(), draft_with(1)):
        assert not pass_over(draft, 1)
        assert draft.status.passed_over == ()
        assert not draft.has_writes


def test_what_retention_has_removed_is_forgotten() -> None:
    draft = draft_with(2, 3, 4, passed=(1,))
    assert pass_over(draft, 1)
    assert draft.status.passed_over == (4,)


def test_one_passed_over_neither_pushes_out_a_good_one_nor_stays_for_ever() -> None:
    commits = tuple(committed(seq) for seq in (1, 2, 3))
    shelf = Shelf(commits, keep_last=1, passed_over={Seq(2), Seq(3)}, latest=Seq(3))
    assert set(why_kept(shelf)) == {1, 2, 3}
    newer = replace(shelf, commits=(*commits, committed(4)), latest=Seq(4))
    assert set(why_kept(newer)) == {4}
