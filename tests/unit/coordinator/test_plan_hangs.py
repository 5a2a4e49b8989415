"""When a job is called hung, when it is not, and who is named."""

from dataclasses import replace

import pytest
from tests.support.builders import Stage, make_spec

from dtrain.coordinator.core.hangs import AGAIN_S, Suspect, who
from dtrain.protocol.commands import DumpStacks
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank, Step
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import FailureKind, Stack, StackKind, Stall, WorkerPhase

IN_REDUCE = "all_reduce (distributed_c10d.py:1)"


def running() -> Stage:
    return Stage(make_spec()).join("a", "b").run(step=41)


def stall(stage: Stage, *ranks: int, step: int = 41, deadline_s: float = 2.0) -> None:
    """These ranks stand still; the others train on."""
    for member in stage.status.members:
        own = [r for r in range(member.first_rank, member.first_rank + member.nproc) if r in ranks]
        stalls = tuple(Stall(Rank(r), Step(step), deadline_s) for r in own)
        stage.report(member.agent, WorkerPhase.TRAINING, lambda r: replace(r, step=Step(step)), stalls=stalls)


def dump(stage: Stage, kinds: dict[int, StackKind], *, step: int = 41) -> None:
    """The agents answer the newest order for stacks; whoever is not named waits in a collective."""
    ids = {directed.command.header.id for directed in stage.commands(DumpStacks)}
    assert len(ids) == 1
    for member in stage.status.members:
        old = stage.workers[member.agent].value
        stacks = []
        for one in old.stalls:
            kind = kinds.get(one.rank, StackKind.COLLECTIVE)
            where = IN_REDUCE if kind is StackKind.COLLECTIVE else "read (data.py:7)"
            stacks.append(Stack(one.rank, kind, where, next(iter(ids)), one.step))
        stage.put_snapshot(replace(old, stacks=tuple(stacks)))


def all_ranks(stage: Stage) -> range:
    return range(stage.status.world_size)


def test_ranks_that_all_stand_still_are_asked_for_their_stacks_and_the_one_behind_is_named() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.decide()
    assert stage.receivers(DumpStacks) == ["a", "b"]
    assert stage.phase is JobPhase.RUNNING
    dump(stage, {1: StackKind.DATA})
    stage.decide()
    failure = stage.status.failure
    assert failure is not None
    assert (failure.kind, failure.rank, failure.step) == (FailureKind.HANG, 1, 41)
    assert "waits for data, in read (data.py:7)" in failure.message
    assert EventReason.HANG_FOUND in stage.reasons_of_events()
    assert (stage.status.attempt, len(stage.status.restarts)) == (2, 1)


def test_one_rank_that_goes_on_is_enough() -> None:
    stage = running()
    stall(stage, *list(all_ranks(stage))[1:])
    stage.decide()
    assert stage.receivers(DumpStacks) == []


def test_progress_after_the_stacks_were_asked_for_takes_it_back() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.decide()
    dump(stage, {})
    stage.step(42)
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


def test_stacks_of_an_earlier_standstill_prove_nothing() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.decide()
    dump(stage, {})
    # The same ranks at the same step, but their machines have given them longer since.
    old = {agent: stored.value.stacks for agent, stored in stage.workers.items()}
    stall(stage, *all_ranks(stage), deadline_s=300.0)
    for agent, stacks in old.items():
        stage.put_snapshot(replace(stage.workers[agent].value, stacks=stacks))
    stage.decide()
    assert stage.status.attempt == 1
    assert stage.receivers(DumpStacks) == ["a", "b"]


def test_a_machine_that_is_not_there_keeps_the_job_from_being_called_hung() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.lose("b", seen=False)
    stage.decide()
    assert stage.receivers(DumpStacks) == []


def test_what_an_agent_said_in_its_former_life_proves_nothing() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.join("b", incarnation="i2").decide()
    assert stage.receivers(DumpStacks) == []


def test_nobody_is_called_hung_under_the_brake() -> None:
    stage = running()
    stage.brake = "2 of 2 agents vanished together"
    stall(stage, *all_ranks(stage))
    stage.decide()
    assert stage.receivers(DumpStacks) == []


def test_ranks_that_wait_for_the_last_checkpoint_are_no_reason_to_wait() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    last = stage.workers[AgentName("b")].value
    ended = replace(last.ranks[-1], last_step=Step(41))
    stalls = tuple(one for one in last.stalls if one.rank != ended.rank)
    stage.put_snapshot(replace(last, ranks=(*last.ranks[:-1], ended), stalls=stalls))
    stage.decide()
    assert stage.receivers(DumpStacks) == ["a"]


def test_the_decision_holds_only_if_no_snapshot_has_changed() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.decide()
    dump(stage, {0: StackKind.CODE})
    decision = stage.decide()
    guarded = {guard.key: guard.mod_revision for guard in decision.guards}
    for agent, stored in stage.workers.items():
        key = next(key for key in guarded if f"agents/{agent}/workers/" in key)
        assert guarded[key] == stored.mod_revision


def test_all_in_a_collective_again_get_longer_than_before() -> None:
    stage = running()
    stall(stage, *all_ranks(stage))
    stage.decide()
    dump(stage, {})
    stage.decide()
    assert stage.status.attempt == 2
    stage.run(step=30)
    stall(stage, *all_ranks(stage))
    stage.decide()
    dump(stage, {})
    stage.decide()
    assert stage.status.attempt == 2
    stage.after(AGAIN_S + 0.1).decide()
    assert stage.status.attempt == 3


def stack(rank: int, kind: StackKind, *, step: int = 5, collective: str = "", where: str = "x") -> Suspect:
    return Suspect(AgentName("a"), Stack(Rank(rank), kind, where, "d", Step(step), collective))


C, D = StackKind.COLLECTIVE, StackKind.DATA


@pytest.mark.parametrize(
    ("suspects", "rank"),
    [
        ([stack(0, D), stack(1, C, step=4), stack(2, C)], 1),
        ([stack(0, C), stack(1, C), stack(2, D)], 2),
        ([stack(0, C), stack(1, StackKind.CODE), stack(2, StackKind.STOPPED)], 2),
        ([stack(0, C, collective="9 sum"), stack(1, C, collective="10 sum")], 0),
        ([stack(0, C, collective="10 sum"), stack(1, C, collective="9 sum")], 1),
        ([stack(0, C, collective="10"), stack(1, C), stack(2, C, where="barrier")], 2),
        ([stack(0, C), stack(1, C)], 0),
    ],
    ids=["lowest step", "not in a collective", "stopped", "number", "by number", "odd one out", "nobody"],
)
def test_the_rank_that_the_others_wait_for_is_named(suspects: list[Suspect], rank: int) -> None:
    assert who(suspects).stack.rank == rank


def test_nobody_is_called_hung_while_a_coordinator_could_not_read_it() -> None:
    stage = running()
    stage.withheld = "coordinator c1 runs dtrain 0.1.0"
    stall(stage, *all_ranks(stage))
    stage.decide()
    assert stage.receivers(DumpStacks) == []
    assert stage.phase is JobPhase.RUNNING
