"""Machines that are kept ready: which they are, what they are told, who takes a lost one's place."""

from dataclasses import replace
from typing import Any

from tests.support.builders import Stage, make_spec

from dtrain.protocol.commands import Prepare, Stop, Warm
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import WorkerPhase, WorkerSnapshot


def training(*others: str, spares: int = 1, **more: Any) -> Stage:
    """A job on a and b, and machines that came later."""
    spec = replace(make_spec(**more), spares=spares)
    stage = Stage(spec).join("a", "b").run(step=40).join(*others)
    stage.decide()
    return stage


def idle(stage: Stage, name: str, *, warm: bool) -> None:
    agent = AgentName(name)
    stage.put_snapshot(
        WorkerSnapshot(
            agent,
            stage.status.uid,
            stage.agents[agent].node.incarnation,
            stage.status.attempt,
            WorkerPhase.IDLE,
            warm=warm,
        )
    )


def test_as_many_as_asked_for_are_warmed_once_the_job_trains() -> None:
    stage = training("c", "d")
    assert stage.receivers(Warm) == ["c"]
    assert training("c", "d", spares=2).receivers(Warm) == ["c", "d"]
    assert training("c", "d", spares=0).receivers(Warm) == []


def test_nothing_is_imported_beside_an_attempt_that_starts() -> None:
    stage = Stage(replace(make_spec(), spares=1)).join("a", "b", "c")
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING
    assert stage.receivers(Warm) == []


def test_the_order_says_how_many_ranks_and_is_the_same_each_time() -> None:
    stage = training("c", nproc=2)
    (first,) = stage.commands(Warm)
    stage.decide()
    assert stage.commands(Warm) == [first]
    assert first.command.nproc == 2  # type: ignore[union-attr]


def test_a_warm_machine_is_left_alone_and_not_released() -> None:
    stage = training("c")
    idle(stage, "c", warm=True)
    stage.decide()
    assert stage.receivers(Warm) == []
    assert stage.receivers(Stop) == []


def test_a_machine_that_imports_is_not_released_either() -> None:
    stage = training("c")
    idle(stage, "c", warm=False)
    stage.decide()
    assert stage.receivers(Stop) == []


def test_a_warm_machine_is_kept_before_one_that_is_not() -> None:
    stage = training("d")
    idle(stage, "d", warm=True)
    stage.join("c")
    stage.decide()
    assert stage.receivers(Warm) == []
    assert stage.receivers(Stop) == []


def test_a_machine_that_is_a_spare_no_more_is_released() -> None:
    stage = training("c", "d")
    idle(stage, "c", warm=True)
    stage.cordoned.add(AgentName("c"))
    stage.decide()
    assert stage.receivers(Stop) == ["c"]
    assert stage.receivers(Warm) == ["d"]


def test_a_spare_is_not_reserved_another_job_may_have_its_slots() -> None:
    stage = training("c")
    idle(stage, "c", warm=True)
    stage.used[AgentName("c")] = 8
    stage.decide()
    assert stage.receivers(Stop) == ["c"]


def test_one_that_was_released_is_warmed_again_in_the_next_attempt_only() -> None:
    stage = training("c", store="s3://b")
    idle(stage, "c", warm=True)
    gone = stage.workers.pop(AgentName("c"))
    stage.departed[AgentName("c")] = gone.value
    stage.decide()
    assert stage.receivers(Warm) == []
    stage.fail("b")
    stage.run(step=50)
    stage.decide()
    assert stage.receivers(Warm) == ["c"]


def test_another_machine_is_warmed_instead_of_one_that_was_released() -> None:
    stage = training("c", "d")
    idle(stage, "c", warm=True)
    stage.departed[AgentName("c")] = stage.workers.pop(AgentName("c")).value
    stage.decide()
    assert stage.receivers(Warm) == ["d"]


def test_a_spare_that_does_not_answer_for_a_moment_keeps_what_it_has() -> None:
    stage = training("c", "d")
    idle(stage, "c", warm=True)
    stage.unreachable[AgentName("c")] = stage.now
    stage.decide()
    assert stage.receivers(Stop) == []
    assert stage.receivers(Warm) == ["d"]


def test_the_warm_machine_takes_the_place_of_a_lost_one() -> None:
    stage = training("c", "d", "e", store="s3://b")
    idle(stage, "d", warm=True)
    stage.decide()
    stage.lose("b")
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert [(one.agent, one.node_rank) for one in stage.status.members] == [("a", 0), ("d", 1)]
    assert stage.receivers(Prepare) == ["a", "d"]
    assert stage.receivers(Stop) == []


def test_the_same_for_the_machine_of_rank_0() -> None:
    stage = training("c", "d", store="s3://b")
    idle(stage, "d", warm=True)
    stage.lose("a")
    stage.decide()
    assert [(one.agent, one.node_rank) for one in stage.status.members] == [("d", 0), ("b", 1)]


def test_a_machine_whose_launcher_died_gives_way_to_a_warm_one() -> None:
    """Its next launcher would have to import everything first."""
    stage = training("c", store="s3://b")
    idle(stage, "c", warm=True)
    stage.fail("b")
    stage.decide()
    assert [one.agent for one in stage.status.members] == ["a", "c"]


def test_a_machine_whose_launcher_lives_keeps_its_place() -> None:
    stage = training("c", store="s3://b")
    idle(stage, "c", warm=True)
    stage.fail("b")
    snapshot = stage.workers[AgentName("b")].value
    stage.put_snapshot(replace(snapshot, warm=True))
    stage.decide()
    assert [one.agent for one in stage.status.members] == ["a", "b"]


def test_what_a_former_life_of_the_agent_had_warmed_counts_for_nothing() -> None:
    stage = training("c", "d", store="s3://b")
    idle(stage, "d", warm=True)
    stage.join("d", incarnation="i2")
    stage.lose("b")
    stage.decide()
    assert [one.agent for one in stage.status.members] == ["a", "c"]


def test_a_machine_that_comes_back_becomes_the_spare() -> None:
    stage = training("c", store="s3://b")
    idle(stage, "c", warm=True)
    stage.lose("b")
    stage.run(step=50)
    stage.join("b", incarnation="i2")
    stage.decide()
    assert stage.receivers(Warm) == ["b"]


def test_the_end_of_the_job_releases_its_spares() -> None:
    stage = training("c")
    idle(stage, "c", warm=True)
    stage.exit_all()
    stage.until_quiet()
    assert stage.phase is JobPhase.SUCCEEDED
    assert "c" in stage.receivers(Stop)
