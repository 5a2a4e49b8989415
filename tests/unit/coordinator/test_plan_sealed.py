"""An attempt ends while a checkpoint of it lies sealed in memory, and is being uploaded."""

from collections.abc import Callable
from dataclasses import replace

from tests.support.builders import Stage, make_spec

from dtrain.protocol.commands import Prepare, Stop
from dtrain.protocol.ids import Seq
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import RankState, WorkerPhase

Change = Callable[[RankState], RankState]


def saving() -> Stage:
    """A checkpoint of a and b is committed, the next one is under way."""
    stage = Stage(make_spec(store="s3://b", every_steps=100)).join("a", "b").run(step=90)
    stage.step_rate = 10.0
    stage.until_quiet()
    stage.checkpoint()
    stage.step(190)
    stage.until_quiet()
    assert stage.opened.seq == 2
    stage.accept()
    return stage


def at(seq: int, code: int | None = None) -> Change:
    return lambda rank: replace(rank, sealed=Seq(seq), exit_code=code)


def fails(stage: Stage, name: str, seq: int) -> None:
    """A rank is killed, having sealed ``seq`` last; its snapshot says so."""
    stage.fail(name, exit_code=-9)
    failure = stage.workers[stage.member(name).agent].value.failure
    stage.report(name, WorkerPhase.ERROR, at(seq, -9), failure=failure)


def test_what_all_ranks_have_sealed_is_waited_for_and_restored() -> None:
    stage = saving()
    stage.report("a", WorkerPhase.TRAINING, at(2))
    members = stage.status.members
    fails(stage, "b", 2)
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert "is sealed and being uploaded" in stage.said
    assert stage.receivers(Stop) == ["a"], "what still runs of it need not go on meanwhile"
    for member in members:
        snapshot = stage.workers[member.agent].value
        stage.put_snapshot(replace(snapshot, durable=(part(stage, member.first_rank),)))
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.restore is not None
    assert stage.status.restore.seq == 2
    assert stage.receivers(Prepare) == ["a", "b"]


def part(stage: Stage, rank: int) -> object:
    from tests.support.builders import make_part

    return make_part(stage.opened, rank)


def test_a_rank_that_ended_before_it_had_sealed_is_not_waited_for() -> None:
    stage = saving()
    stage.report("a", WorkerPhase.TRAINING, at(2))
    fails(stage, "b", 1)
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.restore is not None
    assert stage.status.restore.seq == 1


def test_before_anybody_has_come_to_that_step_nothing_is_waited_for() -> None:
    stage = saving()
    stage.report("a", WorkerPhase.TRAINING, at(1))
    fails(stage, "b", 1)
    stage.decide()
    assert stage.phase is JobPhase.STARTING


def test_a_survivor_that_has_not_said_so_yet_is_waited_for_until_it_has_ended() -> None:
    stage = saving()
    fails(stage, "b", 2)
    members = stage.status.members
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    stage.workers[members[0].agent] = replace(
        stage.workers[members[0].agent],
        value=replace(stage.workers[members[0].agent].value, phase=WorkerPhase.IDLE),
    )
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert not stage.of("open")


def test_a_part_that_lay_on_a_lost_machine_is_not_waited_for() -> None:
    stage = saving()
    stage.report("a", WorkerPhase.TRAINING, at(2))
    stage.report("b", WorkerPhase.TRAINING, at(2))
    stage.join("c")
    stage.lose("b")
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert not stage.of("open")


def test_a_part_that_cannot_be_uploaded_is_not_waited_for() -> None:
    stage = saving()
    stage.report("a", WorkerPhase.TRAINING, at(2))
    stage.problem("a")
    fails(stage, "b", 2)
    stage.decide()
    assert stage.phase is JobPhase.STARTING


def test_it_is_waited_for_no_longer_than_its_steps_would_take_again() -> None:
    stage = saving()
    stage.report("a", WorkerPhase.TRAINING, at(2))
    repeated = stage.opened.step - stage.commits[-1].step
    fails(stage, "b", 2)
    stage.decide()
    stage.decide()
    assert stage.last.wake_at == stage.now + repeated / stage.step_rate
    stage.after(repeated / stage.step_rate)
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.restore is not None
    assert stage.status.restore.seq == 1
