"""Ranks that are persistently slower than the others."""

from dataclasses import replace

from tests.support.builders import Stage, make_spec

from dtrain.coordinator.core.stragglers import FINE_AFTER_S, NAMED_AFTER_S
from dtrain.protocol.events import EventReason
from dtrain.protocol.job import Condition
from dtrain.protocol.snapshot import Timing, WorkerPhase

USUAL = Timing(step_s=0.2, data_s=0.01, own_s=0.08)
SLOW = Timing(step_s=0.2, data_s=0.01, own_s=0.18)


def times(stage: Stage, **found: Timing) -> None:
    for name, timing in found.items():
        stage.report(name, WorkerPhase.TRAINING, lambda rank, timing=timing: replace(rank, timing=timing))
    stage.until_quiet()


def straggling(stage: Stage) -> Condition | None:
    return next((one for one in stage.status.conditions if one.type == "Straggling"), None)


def running() -> Stage:
    stage = Stage(make_spec(nodes=(3, 3))).join("a", "b", "c").run()
    times(stage, a=USUAL, b=USUAL, c=USUAL)
    return stage


def test_a_rank_that_stays_slow_is_named_and_cleared_once_it_keeps_up() -> None:
    stage = running()
    times(stage, b=SLOW)
    assert straggling(stage) is None
    stage.after(NAMED_AFTER_S).until_quiet()
    assert stage.status.stragglers == (1,)
    told = straggling(stage)
    assert told is not None
    assert (told.status, told.reason) == ("True", "SlowRank")
    assert told.message == "rank 1 on b needs 180 ms per step of its own, others 80 ms"
    assert (stage.events[-1].reason, stage.events[-1].object) == (EventReason.STRAGGLER, "rank/1")
    times(stage, b=USUAL)
    stage.after(FINE_AFTER_S).until_quiet()
    assert stage.status.stragglers == ()
    told = straggling(stage)
    assert told is not None
    assert told.status == "False"
    assert stage.events[-1].message == "rank 1 keeps up with the others again"


def test_a_slow_disk_shows_as_waiting_for_data() -> None:
    stage = running()
    times(stage, c=Timing(step_s=0.2, data_s=0.1, own_s=0.17))
    stage.after(NAMED_AFTER_S).until_quiet()
    told = straggling(stage)
    assert told is not None
    assert told.reason == "SlowData"
    assert told.message.endswith("as it waits for data")


def test_a_rank_that_is_slow_now_and_then_is_not_named() -> None:
    stage = running()
    for _ in range(3):
        times(stage, b=SLOW)
        stage.after(NAMED_AFTER_S - 1)
        times(stage, b=USUAL)
        stage.after(2)
    assert straggling(stage) is None


def test_nor_is_it_while_another_one_is_slow_all_the_time() -> None:
    stage = Stage(make_spec(nodes=(5, 5))).join(*"abcde").run()
    times(stage, a=USUAL, b=USUAL, c=SLOW, d=USUAL, e=USUAL)
    for _ in range(3):
        times(stage, b=SLOW)
        stage.after(NAMED_AFTER_S - 1).until_quiet()
        times(stage, b=USUAL)
        stage.after(2).until_quiet()
    times(stage, b=SLOW)
    stage.until_quiet()
    assert stage.status.stragglers == (2,)


def test_between_the_two_bounds_nothing_changes() -> None:
    between = replace(USUAL, own_s=0.11)
    stage = running()
    times(stage, b=between)
    stage.after(NAMED_AFTER_S).until_quiet()
    assert stage.status.stragglers == ()
    times(stage, b=SLOW)
    times(stage, b=between)
    stage.after(NAMED_AFTER_S).until_quiet()
    assert stage.status.stragglers == (1,)
    stage.after(10 * FINE_AFTER_S).until_quiet()
    assert stage.status.stragglers == (1,)


def test_what_costs_the_step_nothing_is_not_worth_a_word() -> None:
    stage = running()
    times(stage, b=Timing(step_s=1.0, data_s=0.0, own_s=0.17))
    stage.after(2 * NAMED_AFTER_S).until_quiet()
    assert straggling(stage) is None


def test_of_two_ranks_the_other_one_is_the_measure() -> None:
    stage = Stage(make_spec()).join("a", "b").run()
    times(stage, a=USUAL, b=SLOW)
    stage.after(NAMED_AFTER_S).until_quiet()
    assert stage.status.stragglers == (1,)


def test_a_new_leader_clears_what_its_predecessor_named() -> None:
    stage = running()
    times(stage, b=SLOW)
    stage.after(NAMED_AFTER_S).until_quiet()
    times(stage, b=USUAL)
    stage.change_leader()
    stage.until_quiet()
    assert stage.status.stragglers == (1,)
    stage.after(FINE_AFTER_S).until_quiet()
    assert stage.status.stragglers == ()


def test_the_next_attempt_begins_without_names() -> None:
    stage = running()
    times(stage, b=SLOW)
    stage.after(NAMED_AFTER_S).until_quiet()
    stage.fail("a")
    stage.until_quiet()
    assert (stage.status.attempt, stage.status.stragglers) == (2, ())
    told = straggling(stage)
    assert told is not None
    assert told.status == "False"
