"""Goodput: every second of a job in one category, whoever led, and what each of them counts as."""

from dataclasses import replace

import pytest
from tests.support.builders import EPOCH, JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.ledger import Turn, advance
from dtrain.coordinator.core.stamps import iso
from dtrain.protocol.ids import AgentName, Step
from dtrain.protocol.job import Intent, JobPhase, Wanted
from dtrain.protocol.ledger import Ledger, counters, goodput
from dtrain.protocol.snapshot import FailureKind, RankState, Timing, WorkerPhase


def ledger_of(stage: Stage) -> Ledger:
    assert stage.status.ledger is not None
    return stage.status.ledger


def spent(stage: Stage) -> dict[str, float]:
    """Seconds by category as a reader sees them now."""
    found = goodput(ledger_of(stage), EPOCH + stage.now)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    assert found.wall_s == pytest.approx(stage.now - BEGAN + AHEAD_S)
    return dict(found.seconds)


BEGAN = Stage(make_spec()).now
AHEAD_S = 5.0
"""Between the submission and the first decision."""


def submitted(*, store: str = "s3://b", every_steps: int = 0) -> Stage:
    """A job that was submitted while nobody led."""
    spec = replace(make_spec(store=store, every_steps=every_steps), submitted_at=iso(EPOCH + BEGAN - AHEAD_S))
    return Stage(spec)


def training(*, store: str = "s3://b", every_steps: int = 0, sdk: bool = True) -> Stage:
    """A job whose ranks are about to make their first step."""
    stage = submitted(store=store, every_steps=every_steps).join("a", "b")
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING
    stage.after(6).report("a", WorkerPhase.READY)
    stage.decide()
    stage.after(4).report("b", WorkerPhase.READY)
    stage.decide()
    stage.after(3).everyone(WorkerPhase.RESTORING, lambda rank: replace(rank, sdk=sdk))
    stage.decide()
    stage.after(2).everyone(WorkerPhase.TRAINING, lambda rank: replace(rank, sdk=sdk), restored=True)
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    return stage


START = {"idle.queued": 5.0, "restart.prepare": 10.0, "restart.rendezvous": 3.0, "restart.restore": 2.0}


def pace(step: int, *, step_s: float = 1.0, held_s: float = 0.0) -> object:
    def change(rank: RankState) -> RankState:
        timing = Timing(step_s) if step_s else None
        return replace(rank, step=Step(step), timing=timing, held_s=held_s)

    return change


def steps(stage: Stage, step: int, *, step_s: float = 1.0, held_s: float = 0.0) -> None:
    """All ranks show that they have completed ``step``."""
    stage.everyone(WorkerPhase.TRAINING, pace(step, step_s=step_s, held_s=held_s))  # type: ignore[arg-type]
    stage.decide()


def write(stage: Stage) -> None:
    """Make a leader that has seen all of it write the status."""
    seen = stage.pace
    stage.change_leader()
    stage.pace = seen
    stage.decide()
    assert stage.last.writes


def test_a_start_is_divided_by_what_the_machines_showed() -> None:
    stage = training()
    assert spent(stage) == START


def test_the_first_step_ends_the_warm_up() -> None:
    stage = training()
    steps(stage.after(8), 2)
    stage.after(10)
    steps(stage, 12)
    write(stage)
    assert spent(stage) == START | {"restart.warm_up": 6.0, "productive": 12.0}


def test_a_ledger_costs_no_write() -> None:
    stage = training(store="")
    for step in range(1, 50):
        steps(stage.after(5), step)
        assert not stage.last.writes


def test_what_is_not_written_yet_is_told_to_any_reader() -> None:
    stage = training(store="", sdk=False)
    assert ledger_of(stage).doing == "productive"
    found = spent(stage.after(1000))
    # It joins nothing and restores nothing.
    assert found == {
        "idle.queued": 5.0,
        "restart.prepare": 10.0,
        "restart.rendezvous": 5.0,
        "productive": 1000.0,
    }


def test_steps_that_are_done_again_are_lost_work() -> None:
    stage = training(every_steps=10)
    steps(stage.after(1), 1)
    steps(stage.after(7), 8)
    target = stage.opened.step
    steps(stage.after(target - 8), target)
    stage.checkpoint()
    kept = float(target)
    steps(stage.after(7), target + 7)
    stage.fail("a")
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.restore is not None
    assert stage.status.restore.step == target
    found = spent(stage)
    assert found["productive"] == pytest.approx(kept, abs=0.01)
    assert found["lost_work"] == pytest.approx(7.0, abs=0.01)
    assert goodput(ledger_of(stage), EPOCH + stage.now).unsaved_s == 0.0


def test_without_a_checkpoint_all_is_lost() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.fail("a")
    stage.decide()
    assert spent(stage) == START | {"lost_work": 10.0}


def test_a_checkpoint_that_is_given_up_takes_back_what_it_had_saved() -> None:
    stage = training(every_steps=10)
    steps(stage.after(1), 1)
    for step_s in (1, 3):
        while not stage.of("open"):
            steps(stage.after(step_s), stage.pace.step + 1, step_s=step_s)
        while stage.pace.step < stage.opened.step:
            steps(stage.after(step_s), stage.pace.step + 1, step_s=step_s)
        stage.checkpoint()
    older, newer = stage.commits
    stage.fail("a")
    stage.decide()
    took = older.step + 3.0 * (newer.step - older.step)
    assert spent(stage)["productive"] == pytest.approx(took, abs=0.01)
    stage.everyone(WorkerPhase.READY)
    stage.decide()
    stage.find_damage("a", newer.seq)
    stage.decide()
    assert stage.status.restore is not None
    assert stage.status.restore.step == older.step
    assert spent(stage)["productive"] == pytest.approx(older.step, abs=0.01)
    assert spent(stage)["lost_work"] == pytest.approx(took - older.step, abs=0.01)


def test_the_time_until_an_agent_is_called_lost_is_detection() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.after(12)
    stage.lose("b")
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    # One more step may have been under way.
    assert spent(stage) == START | {"productive": 11.0, "restart.detection": 11.0}
    assert ledger_of(stage).doing == "idle.waiting"


def test_a_failure_that_an_agent_saw_is_detected_from_then_on() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.after(4)
    stage.fail("b", at=EPOCH + stage.now - 3)
    stage.decide()
    assert spent(stage) == START | {"lost_work": 11.0, "restart.detection": 3.0}


def test_an_agents_clock_that_is_wrong_takes_no_more_than_there_was() -> None:
    for skew_s in (-1e6, 1e6):
        stage = training()
        steps(stage.after(1), 1)
        steps(stage.after(9), 10)
        stage.after(4)
        stage.fail("b", at=EPOCH + stage.now + skew_s)
        stage.decide()
        found = spent(stage)
        assert found["lost_work"] + found.get("restart.detection", 0.0) == 14.0
        assert found["lost_work"] >= 10.0


def test_a_hang_is_a_stall_from_its_last_step_on_whatever_was_written_meanwhile() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    write(stage.after(100))
    stage.change_leader()
    stage.after(40)
    stage.decide()
    stage.after(10).fail("a", kind=FailureKind.HANG, exit_code=None)
    stage.decide()
    assert spent(stage) == START | {"lost_work": 10.0, "stall.hang": 150.0}


def test_what_checkpoints_hold_ranks_for_is_a_stall() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 8, held_s=2.5)
    write(stage)
    assert spent(stage) == START | {"productive": 7.5, "stall.checkpoint": 2.5}
    steps(stage.after(10), 15, held_s=4.0)
    write(stage)
    assert spent(stage) == START | {"productive": 16.0, "stall.checkpoint": 4.0}


def test_waiting_for_the_last_checkpoint_is_a_stall_and_what_the_script_does_after_it_is_not() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.end_training(10)
    stage.decide()
    stage.after(3)
    stage.checkpoint()
    assert stage.commits[-1].final
    stage.after(20)
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED
    assert spent(stage) == START | {"productive": 30.0, "stall.checkpoint": 3.0}


def test_the_value_freezes_at_the_terminal_write() -> None:
    stage = training(store="")
    steps(stage.after(1), 1)
    stage.after(9).exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED
    before = ledger_of(stage)
    assert not before.doing
    stage.after(1000)
    stage.workers.clear()
    stage.until_quiet()
    stage.change_leader()
    stage.until_quiet()
    assert ledger_of(stage) == before
    assert goodput(before, EPOCH + stage.now) == goodput(before, EPOCH)
    swept = replace(stage.status, swept=True)
    assert advance(stage.status, swept, Turn(stage.now, EPOCH + stage.now)) == before


def test_a_cancelled_job_keeps_what_its_newest_checkpoint_has() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.want(Wanted.CANCEL)
    stage.decide()
    assert ledger_of(stage).doing == "restart.stopping"
    stage.after(2)
    for name in ("a", "b"):
        stage.report(name, WorkerPhase.IDLE)
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
    assert spent(stage) == START | {"lost_work": 10.0, "restart.stopping": 2.0}


def test_suspended_time_is_idle_and_no_step_is_lost_over_it() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.want(Wanted.SUSPEND)
    stage.decide()
    target = int(stage.opened.step)
    steps(stage.after(target - 10), target)
    stage.after(4)
    stage.checkpoint()
    assert stage.status.stopping
    stage.after(2)
    for name in ("a", "b"):
        stage.report(name, WorkerPhase.IDLE, saving=())
    stage.decide()
    assert stage.phase is JobPhase.SUSPENDED
    stage.after(500)
    wanted = START | {
        "productive": float(target),
        "stall.checkpoint": 4.0,
        "restart.stopping": 2.0,
        "idle.suspended": 500.0,
    }
    assert spent(stage) == wanted
    found = goodput(ledger_of(stage), EPOCH + stage.now)
    assert found.ratio == pytest.approx(target / (stage.now - BEGAN + AHEAD_S - 505))


def test_paused_time_is_idle_and_what_ranks_tell_of_it_afterwards_is_not_counted_again() -> None:
    stage = training()
    steps(stage.after(1), 1)
    steps(stage.after(9), 10)
    stage.write(KEYS.intent(JOB), Intent(stage.spec.uid, paused=True))
    stage.decide()
    target = int(stage.opened.step)
    steps(stage.after(target - 10), target)
    stage.after(4)
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.status.held
    assert ledger_of(stage).doing == "idle.paused"
    stage.after(500)
    stage.write(KEYS.intent(JOB), Intent(stage.spec.uid))
    stage.decide()
    assert not stage.status.held
    stage.forget_outcomes()
    steps(stage.after(1), target + 1, held_s=504.0)
    steps(stage.after(9), target + 10, held_s=504.0)
    write(stage)
    wanted = START | {"productive": target + 10.0, "stall.checkpoint": 4.0, "idle.paused": 500.0}
    assert spent(stage) == wanted


def test_what_passed_while_nobody_led_is_found_by_the_steps() -> None:
    stage = training()
    steps(stage.after(1), 1)
    stage.change_leader()
    stage.after(3600)
    steps(stage, 3601)
    stage.decide()
    assert spent(stage) == START | {"productive": 3601.0}


@pytest.mark.parametrize("apart", [False, True])
def test_a_failure_while_nobody_led_is_detection_from_when_its_agent_saw_it(apart: bool) -> None:
    stage = training(every_steps=10)
    steps(stage.after(1), 1)
    steps(stage.after(7), 8)
    target = stage.opened.step
    steps(stage.after(target - 8), target)
    stage.checkpoint()
    failed_at = EPOCH + stage.now + 4
    stage.change_leader()
    stage.after(604)
    # The step is seen with the failure, or a write before it.
    stage.everyone(WorkerPhase.TRAINING, pace(target + 4))  # type: ignore[arg-type]
    if apart:
        write(stage)
    stage.fail("b", at=failed_at)
    stage.decide()
    found = spent(stage)
    assert found["productive"] == pytest.approx(target, abs=0.01)
    assert found["lost_work"] == pytest.approx(4.0, abs=0.01)
    assert found["restart.detection"] == pytest.approx(600.0, abs=0.01)


@pytest.mark.parametrize("ahead_s", [-3600.0, -5.0, 5.0, 3600.0])
def test_a_leader_whose_clock_differs_makes_no_time_negative(ahead_s: float) -> None:
    stage = training(store="")
    steps(stage.after(1), 1)
    elapsed = stage.now
    stage.wall_offset_s = ahead_s
    stage.change_leader()
    stage.decide()
    for step in range(2, 6):
        steps(stage.after(10), step)
        stage.wall_offset_s = ahead_s if step % 2 else 0.0
        before = ledger_of(stage)
        stage.change_leader()
        stage.decide()
        assert ledger_of(stage).until_ms >= before.until_ms
    total = (ledger_of(stage).until_ms - ledger_of(stage).began_ms) / 1000
    # The greatest difference shifts it once, however often leaders change.
    assert total == pytest.approx(AHEAD_S + elapsed - BEGAN + 40 + max(0.0, ahead_s), abs=10.0 + 1e-6)


def test_a_leader_whose_clock_is_behind_counts_on_with_its_monotonic_one() -> None:
    stage = training(store="")
    stage.wall_offset_s = -3600.0
    stage.change_leader()
    stage.decide()
    before = ledger_of(stage).until_ms
    steps(stage.after(50), 5)
    stage.fail("a")
    stage.decide()
    assert ledger_of(stage).until_ms == before + 50_000


def test_a_ledger_that_a_former_release_left_open_at_the_end_is_closed() -> None:
    stage = training(store="")
    stage.after(5).exit_all()
    stage.decide()
    left = replace(stage.status, ledger=replace(ledger_of(stage), doing="productive"))
    closed = advance(left, replace(left, swept=True), Turn(stage.now, EPOCH + stage.now))
    assert closed == ledger_of(stage)


@pytest.mark.parametrize("set_by_s", [-7200.0, -90.0, 90.0, 7200.0])
def test_a_clock_that_is_set_while_its_leader_leads_changes_nothing(set_by_s: float) -> None:
    stage = training(every_steps=10)
    stage.after(100)
    while not stage.of("open"):
        steps(stage.after(1), stage.pace.step + 1)
    stage.wall_offset_s = set_by_s
    steps(stage.after(stage.opened.step - stage.pace.step), int(stage.opened.step))
    stage.checkpoint()
    stage.fail("a")
    stage.decide()
    ledger = ledger_of(stage)
    assert (ledger.until_ms - ledger.began_ms) / 1000 == pytest.approx(stage.now - BEGAN + AHEAD_S)


def test_a_job_of_an_older_release_is_counted_from_first_sight() -> None:
    stage = training(store="")
    old = replace(stage.status, ledger=None)
    stage.write(KEYS.status(JOB), old)
    steps(stage.after(10), 5)
    write(stage)
    ledger = ledger_of(stage)
    assert ledger.began_ms == ledger.until_ms == round(1000 * (EPOCH + stage.now))
    steps(stage.after(10), 15)
    write(stage)
    assert ledger_of(stage).spent == {"productive": 10_000}


def test_counters_only_rise_while_steps_come_and_go() -> None:
    stage = training(every_steps=10)
    shown = counters(ledger_of(stage))
    for turn in range(1, 8):
        for _ in range(12):
            steps(stage.after(1), stage.pace.step + 1)
            if stage.of("open") and stage.pace.step >= stage.opened.step:
                stage.checkpoint()
        if turn % 2:
            write(stage)
            unsaved, shown = (
                goodput(ledger_of(stage), EPOCH + stage.now).unsaved_s,
                counters(ledger_of(stage)),
            )
            stage.fail("a")
            stage.decide()
            lost = counters(ledger_of(stage))
            assert lost["lost_work"] - shown["lost_work"] == pytest.approx(unsaved)
            assert all(lost[name] >= seconds for name, seconds in shown.items())
            stage.everyone(WorkerPhase.READY)
            stage.decide()
            restored = stage.status.restore.step if stage.status.restore else 0
            stage.everyone(
                WorkerPhase.TRAINING,
                lambda rank, at=restored: replace(rank, step=at, sdk=True),
                restored=True,
            )
            stage.decide()
        now = counters(ledger_of(stage))
        assert all(now[name] >= seconds for name, seconds in shown.items())
        shown = now
    assert shown["productive"] > 0
    assert shown["lost_work"] > 0


def test_a_new_submission_of_a_name_begins_anew() -> None:
    stage = training(store="")
    stage.after(5).exit_all()
    stage.decide()
    stage.workers.clear()
    stage.after(100)
    spec = replace(stage.spec, uid=type(stage.spec.uid)("u2"), submitted_at=iso(EPOCH + stage.now))
    stage.write(KEYS.spec(JOB), spec)
    stage.after(7)
    stage.until_quiet()
    assert stage.status.uid == "u2"
    assert ledger_of(stage).spent == {"idle.queued": 7000}


def test_the_record_stays_small_however_many_checkpoints_there_are() -> None:
    stage = training(every_steps=2)
    for step in range(1, 120):
        steps(stage.after(1), step)
        if stage.of("open") and step >= stage.opened.step:
            stage.checkpoint()
    assert len(stage.commits) >= 3
    assert len(ledger_of(stage).marks) <= 12


def test_waiting_for_machines_is_idle_and_the_pause_after_fruitless_attempts_is_not() -> None:
    stage = training()
    for _ in range(3):
        stage.fail("a")
        stage.decide()
        if stage.phase is JobPhase.RECOVERING:
            break
        stage.everyone(WorkerPhase.READY)
        stage.decide()
        stage.everyone(WorkerPhase.TRAINING, restored=True)
        stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert ledger_of(stage).doing == "restart.between"
    stage.lose("b")
    stage.after(60)
    stage.decide()
    assert ledger_of(stage).doing == "idle.waiting"
    assert AgentName("b") not in stage.agents
