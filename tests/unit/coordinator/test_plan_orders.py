"""What operators ask about checkpoints, and what the scrubber finds: answered in the records, once."""

from typing import Any

import pytest
from tests.support.builders import JOB, KEYS, Stage
from tests.unit.coordinator.test_plan_retention import running, seqs

from dtrain.coordinator.core.decisions import InspectCheckpoint, NoKeysUnder, SweepOrphans
from dtrain.coordinator.core.scrubbing import FIRST_S, LOOK_S, RETRY_S
from dtrain.coordinator.core.views import Damage, Inspection, SweepFound
from dtrain.protocol.checkpoint import Order, OrderKind, Quarantine
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Rank, Seq, Term, Uid
from dtrain.protocol.job import Wanted

DAY_S = 86_400.0
DAMAGE = Damage("blob-x", 3, "aa", "bb", Rank(1), "tensor model.w")


def order(stage: Stage, kind: OrderKind, seq: int = 0, **more: Any) -> None:
    uid = more.pop("uid", stage.spec.uid)
    stage.write(KEYS.order(JOB, f"o{seq}"), Order(uid, kind, Seq(seq), **more))


def quiet(stage: Stage) -> Stage:
    """Let retention end."""
    stage.until_quiet()
    return stage


def test_a_checkpoint_is_deleted_on_request_unless_somebody_begins_to_read_it() -> None:
    stage = quiet(running(3, 3))
    order(stage, OrderKind.DELETE, 2, by="ops")
    decision = stage.decide()
    assert decision.absent == (NoKeysUnder(KEYS.pins(JOB, Seq(2))),)
    assert seqs(stage) == [1, 3]
    assert not stage.orders()
    assert "asked for by ops" in stage.events[-1].message
    assert stage.events[-1].reason is EventReason.CHECKPOINT_DELETED


@pytest.mark.parametrize("why", ["the newest", "pinned", "started from", "not damaged"])
def test_what_must_stay_is_refused_with_the_reason(why: str) -> None:
    stage = quiet(running(3, 3))
    seq = 3
    if why == "pinned":
        seq = 2
        stage.pinned.add(Seq(2))
    elif why == "started from":
        stage.fail("a")
        stage.run(step=30)
        stage.step(38)
        stage.decide()
        stage.checkpoint()
    elif why == "not damaged":
        seq = 2
        stage.write(KEYS.bad(JOB, Seq(3)), Quarantine(Term(1), Seq(3), "x", 0, "a", "b"))
    stage.until_quiet()
    order(stage, OrderKind.DELETE, seq)
    stage.until_quiet()
    assert seq in seqs(stage)
    assert not stage.orders()
    assert stage.events[-1].reason is EventReason.USER_REQUESTED
    assert why in stage.events[-1].message


def test_requests_about_what_is_gone_are_dropped() -> None:
    stage = quiet(running(3, 2))
    order(stage, OrderKind.DELETE, 9)
    order(stage, OrderKind.DELETE, 1, uid=Uid("another"))
    events = len(stage.events)
    stage.until_quiet()
    assert not stage.orders()
    assert (seqs(stage), len(stage.events)) == ([1, 2], events)


def test_a_report_of_damage_is_confirmed_by_the_leader_before_anything_is_put_aside() -> None:
    stage = quiet(running(3, 2))
    order(stage, OrderKind.INSPECT, 1, blob="blob-x", chunk=3)
    stage.decide()
    (work,) = stage.work(InspectCheckpoint)
    assert isinstance(work, InspectCheckpoint)
    assert (work.seq, work.depth, work.blob, work.chunk) == (1, "chunk", "blob-x", 3)
    key = (Seq(1), "chunk", "blob-x", 3)
    stage.inspections[key] = Inspection(stage.now, problem="the store is down")
    stage.decide()
    assert not stage.work(InspectCheckpoint), "it is not asked again at once"
    stage.after(10.0).decide()
    assert stage.work(InspectCheckpoint)
    stage.inspections[key] = Inspection(stage.now, DAMAGE)
    stage.until_quiet()
    assert stage.of("bad")[1].value.blob == "blob-x"
    assert not stage.orders()
    assert "tensor model.w" in stage.events[-1].message


def test_a_report_that_is_not_confirmed_costs_nothing() -> None:
    stage = quiet(running(3, 2))
    order(stage, OrderKind.INSPECT, 1, blob="blob-x", chunk=3)
    stage.inspections[Seq(1), "chunk", "blob-x", 3] = Inspection(stage.now)
    stage.until_quiet()
    assert not stage.of("bad")
    assert "reads right" in stage.events[-1].message


def test_a_store_that_never_answers_ends_the_report() -> None:
    stage = quiet(running(3, 2))
    order(stage, OrderKind.INSPECT, 1, blob="blob-x")
    stage.after(200.0).until_quiet()
    assert not stage.orders()
    assert not stage.of("bad")


def test_a_search_for_orphans_is_answered_by_one_that_began_after_the_request() -> None:
    stage = quiet(running(3, 1))
    stage.swept_at = stage.now
    stage.after(1.0)
    order(stage, OrderKind.COLLECT)
    stage.decide()
    assert stage.work(SweepOrphans)
    assert stage.orders(), "the search before it may have missed something"
    stage.swept_at, stage.swept_found = stage.now, SweepFound(4)
    stage.until_quiet()
    assert not stage.orders()
    assert "4 orphaned objects" in stage.events[-1].message


def test_a_job_that_has_ended_answers_too() -> None:
    stage = quiet(running(3, 2))
    stage.want(Wanted.CANCEL)
    stage.decide()
    stage.workers.clear()
    stage.until_quiet()
    order(stage, OrderKind.DELETE, 1)
    stage.until_quiet()
    assert seqs(stage) == [2]


# The scrubber ---------------------------------------------------------------------


def scrubbed(checkpoints: int) -> Stage:
    stage = running(9, 0)
    stage.scrub_interval_s = DAY_S
    for number in range(1, checkpoints + 1):
        stage.step(number * 10 - 2)
        stage.decide()
        stage.checkpoint()
    return quiet(stage)


def looked(stage: Stage) -> list[tuple[int, str]]:
    return [(work.seq, work.depth) for work in stage.work(InspectCheckpoint)]  # type: ignore[attr-defined]


def finish(stage: Stage, seq: int, depth: str, **found: Any) -> None:
    stage.inspections[Seq(seq), depth, "", 0] = Inspection(stage.now, **found)


def test_without_an_interval_nothing_is_read() -> None:
    stage = quiet(running(9, 2))
    stage.after(10 * DAY_S).decide()
    assert looked(stage) == []


def test_a_commit_is_looked_at_soon_and_once() -> None:
    stage = scrubbed(1)
    assert looked(stage) == []
    stage.after(LOOK_S).decide()
    assert looked(stage) == [(1, "heads")]
    finish(stage, 1, "heads", problem="the store is down")
    stage.decide()
    assert looked(stage) == []
    stage.after(RETRY_S).decide()
    assert (1, "heads") in looked(stage)
    finish(stage, 1, "heads")
    stage.decide()
    assert (1, "heads") not in looked(stage)


def test_the_newest_is_read_first_then_each_once_in_an_interval() -> None:
    stage = scrubbed(2)
    for seq in (1, 2):
        finish(stage, seq, "heads")
    stage.after(FIRST_S).decide()
    assert looked(stage) == [(2, "all")]
    finish(stage, 2, "all", bytes=7)
    stage.until_quiet()
    assert stage.of("verified")[2].value.bytes == 7
    assert looked(stage) == []
    stage.after(DAY_S - FIRST_S).decide()
    assert looked(stage) == [(1, "all")]
    finish(stage, 1, "all")
    stage.until_quiet()
    assert sorted(stage.of("verified")) == [1, 2]
    assert looked(stage) == []
    stage.after(FIRST_S).decide()
    assert looked(stage) == [(2, "all")]


def test_a_store_that_does_not_answer_is_asked_again_later() -> None:
    stage = scrubbed(1)
    finish(stage, 1, "heads")
    stage.after(FIRST_S)
    finish(stage, 1, "all", problem="the store is down")
    stage.decide()
    assert looked(stage) == []
    assert not stage.of("bad")
    stage.after(RETRY_S).decide()
    assert looked(stage) == [(1, "all")]


@pytest.mark.parametrize("depth", ["heads", "all"])
def test_damage_is_put_aside_and_never_read_again(depth: str) -> None:
    stage = scrubbed(2)
    finish(stage, 1, depth, damage=DAMAGE)
    decision = stage.decide()
    # Not if it is retired at that moment: then its blobs are rightly gone.
    assert KEYS.checkpoint(JOB, Seq(1)) in {guard.key for guard in decision.guards}
    bad = stage.of("bad")[1].value
    assert (bad.blob, bad.chunk, bad.expected, bad.found, bad.rank) == ("blob-x", 3, "aa", "bb", 1)
    assert stage.events[-1].reason is EventReason.CHECKPOINT_QUARANTINED
    stage.after(2 * DAY_S).until_quiet()
    assert all(seq != 1 for seq, _ in looked(stage))
