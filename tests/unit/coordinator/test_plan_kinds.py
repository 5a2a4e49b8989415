"""Machines of two releases that cut checkpoints differently: who trains with whom during an upgrade."""

from dataclasses import replace

from tests.support.builders import Stage, make_spec

from dtrain.coordinator.core.placement import JOIN_WINDOW_S
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import JobPhase

OLD, NEW = "0.1.0", "0.2.0"


def runs(stage: Stage, **versions: str) -> Stage:
    """Have each machine run that release."""
    for name, version in versions.items():
        view = stage.agents[AgentName(name)]
        stage.agents[AgentName(name)] = replace(view, node=replace(view.node, version=version))
    return stage


def members(stage: Stage) -> list[str]:
    return sorted(str(member.agent) for member in stage.status.members)


def mixed() -> Stage:
    """A job that had to take one machine of each, and trains."""
    stage = Stage(make_spec()).join("a", "c")
    runs(stage, a=NEW, c=OLD)
    return stage.run(step=40)


def test_a_job_gets_machines_of_one_release_where_there_are_enough() -> None:
    stage = Stage(make_spec()).join("a", "b", "c")
    runs(stage, a=OLD, b=NEW, c=NEW).until_quiet()
    assert members(stage) == ["b", "c"]
    stage = Stage(make_spec()).join("a", "b", "c")
    runs(stage, a=OLD, b=OLD, c=NEW).until_quiet()
    assert members(stage) == ["a", "b"]
    assert EventReason.MIXED_RELEASES not in stage.reasons_of_events()


def test_it_takes_both_rather_than_wait_and_says_that_nothing_can_be_saved() -> None:
    stage = mixed()
    stage.decide()
    assert (stage.phase, members(stage)) == (JobPhase.RUNNING, ["a", "c"])
    assert "nothing can be saved: the ranks are of two releases (a 0.2.0, c 0.1.0)" in stage.status.reason
    assert stage.reasons_of_events().count(EventReason.MIXED_RELEASES) == 1


def test_it_goes_on_with_one_release_as_soon_as_there_are_enough_and_pays_no_restart() -> None:
    stage = mixed()
    stage.decide()
    runs(stage.join("b"), b=NEW)
    stage.until_quiet()
    assert (stage.status.attempt, members(stage)) == (2, ["a", "b"])
    assert stage.status.restarts == ()
    told = [event.message for event in stage.events if event.reason is EventReason.MIXED_RELEASES]
    assert told[-1] == "going on with machines of one release (a, b) to save again"


def test_ranks_keep_their_release_when_their_agent_is_replaced_beside_them() -> None:
    stage = Stage(make_spec()).join("a", "b")
    runs(stage, a=OLD, b=OLD).run(step=40)
    runs(stage, a=NEW)
    stage.decide()
    assert (stage.status.attempt, stage.phase) == (1, JobPhase.RUNNING)
    assert stage.status.reason == "training on 2 ranks"


def test_nothing_moves_while_the_brake_is_on() -> None:
    stage = mixed()
    runs(stage.join("b"), b=NEW)
    stage.brake = "many agents vanished together"
    stage.decide()
    assert (stage.status.attempt, members(stage)) == (1, ["a", "c"])


def test_a_job_does_not_grow_by_a_machine_that_it_could_not_save_with() -> None:
    stage = Stage(make_spec(nodes=(2, 3), store="s3://b")).join("a", "b")
    runs(stage, a=OLD, b=OLD).until_quiet()
    stage.after(JOIN_WINDOW_S).run(step=40)
    runs(stage.join("c"), c=NEW).after(600).decide()
    assert stage.status.joining == ()
    # Its ranks are replaced with the attempt: what the machines run by then counts.
    runs(stage, a=NEW, b=NEW).decide()
    assert stage.status.joining == ("c",)
