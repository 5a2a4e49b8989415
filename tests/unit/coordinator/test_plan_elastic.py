"""Jobs that change their size: at once when they lose machines, else at a checkpoint that ranks hold at."""

from dataclasses import replace

import pytest
from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.elastic import SILENT_S, WARM_S
from dtrain.coordinator.core.placement import JOIN_WINDOW_S, UNREACHABLE_REST_S
from dtrain.coordinator.core.queue import Place, Queue, Waiting
from dtrain.protocol.commands import AbortCheckpoint, ConfirmCheckpoint, Prepare, Stop, Warm
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, JobName, Uid
from dtrain.protocol.job import Intent, JobPhase, Member, Wanted
from dtrain.protocol.package import Package
from dtrain.protocol.snapshot import FailureKind, WorkerPhase


def training(*members: str, nodes: tuple[int, int] = (1, 2), sdk: bool = True, **spec: object) -> Stage:
    """A job whose ranks train on ``members``, at step 40."""
    spec = {"store": "s3://b", **spec}
    stage = Stage(make_spec(nodes=nodes, **spec)).join(*members)  # type: ignore[arg-type]
    stage.until_quiet()
    return stage.after(JOIN_WINDOW_S).run(step=40, sdk=sdk)


def hold(stage: Stage) -> int:
    """Take the open checkpoint to its commit; return its number."""
    seq = stage.opened.seq
    assert stage.opened.hold_s > 0
    stage.accept()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert stage.commits[-1].seq == seq
    return seq


def agents(stage: Stage) -> list[str]:
    return [member.agent for member in stage.status.members]


def grow(stage: Stage, *names: str) -> None:
    """Machines come, get ready, and join."""
    stage.join(*names).decide()
    stage.warm(*names)
    stage.after(JOIN_WINDOW_S).decide()
    hold(stage)


# Growing ---------------------------------------------------------------------------


def test_a_machine_that_comes_free_imports_first_while_training_goes_on() -> None:
    stage = training("a")
    stage.join("b").decide()
    assert stage.receivers(Warm) == ["b"]
    assert (stage.status.joining, stage.phase) == (("b",), JobPhase.RUNNING)
    assert not stage.of("open")
    stage.warm("b", warm=False)
    stage.after(JOIN_WINDOW_S).decide()
    assert not stage.of("open")
    assert not stage.receivers(Stop)
    assert "b is getting ready to join" in stage.said


def test_once_it_is_warm_the_job_grows_at_a_checkpoint_that_ranks_hold_at() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b")
    stage.after(JOIN_WINDOW_S).decide()
    assert stage.opened.step > 40
    assert "growing from 1 to 2 agents: b will join" in stage.status.reason
    seq = hold(stage)
    assert (stage.phase, stage.status.attempt, agents(stage)) == (JobPhase.STARTING, 2, ["a", "b"])
    assert stage.status.restore is not None
    assert stage.status.restore.seq == seq
    assert (stage.status.restarts, stage.status.failure, stage.status.joining) == ((), None, ())
    # Nobody is told that it may go on: its steps would be done twice.
    assert not stage.commands(ConfirmCheckpoint)
    assert stage.receivers(Prepare) == ["a", "b"]
    assert EventReason.GROWING in stage.reasons_of_events()


def test_machines_that_come_one_after_the_other_join_together() -> None:
    stage = training("a", nodes=(1, 4))
    stage.join("b").decide()
    stage.warm("b")
    stage.decide()
    assert not stage.of("open")
    assert "waiting a moment for more agents than b to join" in stage.said
    stage.after(JOIN_WINDOW_S - 0.5).join("c").decide()
    assert not stage.of("open")
    stage.after(1.0).decide()
    assert not stage.of("open")
    assert stage.status.joining == ("b", "c")
    stage.warm("c")
    stage.after(JOIN_WINDOW_S).decide()
    hold(stage)
    assert agents(stage) == ["a", "b", "c"]


def test_nobody_waits_for_more_machines_than_it_may_have() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b")
    stage.decide()
    assert stage.opened.hold_s > 0
    stage.join("c")
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_a_checkpoint_that_is_under_way_is_none_to_grow_at() -> None:
    """Its ranks go on at once: what they have done since would be done twice."""
    stage = training("a", every_steps=50)
    stage.step(48)
    stage.decide()
    first = stage.opened
    assert first.hold_s == 0
    stage.join("b").decide()
    stage.warm("b")
    stage.after(JOIN_WINDOW_S).decide()
    stage.checkpoint()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)
    stage.step(first.step + 5)
    stage.decide()
    assert stage.opened.seq == first.seq + 1
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_who_comes_while_the_checkpoint_is_taken_does_not_join_unprepared() -> None:
    stage = training("a", nodes=(1, 3))
    stage.join("b").decide()
    stage.warm("b")
    stage.after(JOIN_WINDOW_S).decide()
    assert stage.opened.hold_s > 0
    stage.join("c")
    hold(stage)
    assert agents(stage) == ["a", "b"]


@pytest.mark.parametrize(("shown", "patience_s"), [(False, SILENT_S), (True, WARM_S)])
def test_an_agent_that_never_becomes_warm_joins_after_a_while(shown: bool, patience_s: float) -> None:
    stage = training("a")
    stage.join("b").decide()
    if shown:
        stage.warm("b", warm=False)
    stage.after(patience_s - 1.0).decide()
    assert not stage.of("open")
    assert stage.last.wake_at is not None
    stage.after(1.5).decide()
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_whoever_comes_later_makes_nobody_wait_anew() -> None:
    stage = training("a", nodes=(1, 3))
    stage.join("b").decide()
    stage.after(SILENT_S - 1.0).join("c").decide()
    stage.after(1.5).decide()
    assert stage.opened.hold_s > 0


def test_one_that_does_not_get_ready_holds_up_no_other() -> None:
    stage = training("a", nodes=(1, 3))
    stage.join("b", "c").decide()
    stage.warm("b")
    stage.warm("c", warm=False)
    stage.after(WARM_S + 1.0).decide()
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_it_does_not_grow_again_before_its_cooldown_is_over() -> None:
    stage = training("a", nodes=(1, 3), grow_cooldown_s=60.0)
    grow(stage, "b")
    stage.run(step=60)
    stage.join("c").decide()
    stage.warm("c")
    stage.after(JOIN_WINDOW_S).decide()
    assert not stage.of("open")
    assert "cooldown" in stage.said
    assert stage.last.wake_at is not None
    stage.after(61.0).decide()
    hold(stage)
    assert agents(stage) == ["a", "b", "c"]


def test_a_machine_lost_and_found_joins_again_without_a_cooldown() -> None:
    stage = training("a", "b")
    stage.lose("b")
    stage.after(1.0).decide()
    stage.run(step=50)
    stage.join("b", incarnation="i2").decide()
    stage.warm("b")
    stage.after(JOIN_WINDOW_S).decide()
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_a_change_of_leader_starts_no_wait_again() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.after(SILENT_S - 1.0).decide()
    stage.change_leader()
    stage.until_quiet()
    stage.after(JOIN_WINDOW_S).until_quiet()
    assert stage.opened.hold_s > 0


def test_a_checkpoint_that_fails_is_taken_again_later_and_training_goes_on() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b")
    stage.decide()
    first = stage.opened
    stage.accept()
    stage.problem("a", message="no space")
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    assert stage.receivers(AbortCheckpoint) == ["a"]
    stage.forget_outcomes()
    stage.decide()
    assert not stage.of("open")
    stage.after(10.0).decide()
    assert stage.opened.seq == first.seq + 1
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_while_no_checkpoint_succeeds_ranks_are_held_for_one_ever_more_seldom() -> None:
    stage = training("a")
    timeout_s = stage.spec.checkpoint.timeout_s
    stage.join("b").decide()
    stage.warm("b")
    stage.decide()
    pauses: list[float] = []
    for _ in range(3):
        stage.accept()
        stage.after(timeout_s).decide()  # ranks stand still all the while
        stage.forget_outcomes()
        failed_at = stage.now
        while not stage.of("open"):
            stage.after(10.0)
            stage.step(40)
            stage.decide()
        pauses.append(stage.now - failed_at)
    assert pauses == pytest.approx([10.0, timeout_s, 2 * timeout_s], abs=11.0)


@pytest.mark.parametrize("spec", [{"sdk": False}, {"store": ""}])
def test_a_job_that_cannot_be_saved_does_not_grow(spec: dict[str, object]) -> None:
    stage = training("a", **spec)  # type: ignore[arg-type]
    stage.join("b").decide()
    stage.after(WARM_S).decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)
    assert not stage.receivers(Warm)
    assert "cannot be checkpointed" in stage.said


def test_a_job_whose_training_has_ended_does_not_grow() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b")
    stage.end_training(50)
    stage.decide()
    assert stage.opened.final
    assert stage.opened.hold_s == 0
    assert EventReason.GROWING not in stage.reasons_of_events()


@pytest.mark.parametrize("how", ["cordon", "busy", "drain", "brake", "full"])
def test_machines_that_may_not_be_used_are_none_to_grow_by(how: str) -> None:
    stage = training("a")
    stage.join("b", slots=0 if how == "full" else 8)
    if how == "cordon":
        stage.cordoned.add(AgentName("b"))
    if how == "busy":
        stage.used[AgentName("b")] = 8
    if how == "drain":
        stage.drain("b")
    if how == "brake":
        stage.brake = "many vanished"
    stage.decide()
    assert stage.status.joining == ()
    assert not stage.commands(Warm)


def claimed(job: str, **slots: int) -> Queue:
    """Somebody else waits, and these slots are kept for it."""
    name = JobName(job)
    claim = {AgentName(agent): count for agent, count in slots.items()}
    waiting = Waiting(name, 0, 0.0, 0.0, len(slots), len(slots), 8)
    return Queue({name: Place(1, False)}, {name: waiting}, {name: claim}, turns={name: 0}, changes_at=1e6)


def test_a_machine_that_is_kept_for_a_job_that_waits_is_none_to_grow_by() -> None:
    stage = training("a", nodes=(1, 3))
    stage.queue = claimed("big", b=8)
    stage.join("b", slots=8).join("c", slots=8).decide()
    assert stage.status.joining == ("c",)
    assert stage.receivers(Warm) == ["c"]
    assert stage.last.wake_at is not None
    # Once nobody waits for it any more it may be had.
    stage.queue = Queue()
    stage.decide()
    assert stage.status.joining == ("b", "c")


def test_a_claim_that_comes_while_a_machine_gets_ready_takes_it_back() -> None:
    stage = training("a")
    stage.join("b", slots=8).decide()
    stage.warm("b")
    stage.queue = claimed("big", b=8)
    stage.after(JOIN_WINDOW_S).decide()
    assert stage.status.joining == ()
    assert not stage.of("open")
    assert stage.receivers(Stop) == ["b"]


def test_a_claim_on_other_slots_of_a_machine_keeps_nobody_from_growing() -> None:
    stage = training("a")
    stage.queue = claimed("big", b=7)
    stage.join("b", slots=8).decide()
    assert stage.status.joining == ("b",)


def test_a_joining_machine_that_goes_is_forgotten_and_its_checkpoint_is_one_like_any_other() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b")
    stage.decide()
    stage.accept()
    stage.lose("b")
    stage.decide()
    assert stage.status.joining == ()
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert (stage.phase, stage.status.attempt, len(stage.commits)) == (JobPhase.RUNNING, 1, 1)
    assert stage.receivers(ConfirmCheckpoint) == ["a"]


def test_one_that_does_not_answer_for_a_moment_keeps_what_it_has_and_is_waited_for() -> None:
    stage = training("a", nodes=(1, 3))
    stage.join("b", "c").decide()
    stage.warm("b", "c")
    stage.unreachable[AgentName("c")] = stage.now
    stage.after(JOIN_WINDOW_S).decide()
    assert (stage.status.joining, stage.receivers(Stop)) == (("b", "c"), [])
    assert not stage.of("open")
    stage.unreachable.clear()
    stage.decide()
    hold(stage)
    assert agents(stage) == ["a", "b", "c"]


def test_but_not_for_long() -> None:
    stage = training("a", nodes=(1, 3))
    stage.join("b", "c").decide()
    stage.warm("b", "c")
    stage.after(SILENT_S + UNREACHABLE_REST_S)
    stage.unreachable[AgentName("c")] = stage.now
    stage.decide()
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_what_a_joining_machine_shows_is_left_alone_until_it_is_not_wanted() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b", warm=False)
    stage.decide()
    assert not stage.receivers(Stop)
    stage.used[AgentName("b")] = 8
    stage.decide()
    assert stage.receivers(Stop) == ["b"]


def test_a_machine_that_was_to_join_a_job_is_let_go_of_when_it_is_suspended() -> None:
    stage = training("a")
    stage.join("b").decide()
    stage.warm("b")
    stage.want(Wanted.SUSPEND)
    stage.decide()
    hold(stage)
    stage.report("a", WorkerPhase.IDLE, saving=())
    stage.decide()
    assert (stage.phase, stage.status.joining) == (JobPhase.SUSPENDED, ())
    assert stage.receivers(Stop) == ["a", "b"]


# Shrinking -------------------------------------------------------------------------


def test_what_another_submission_left_there_goes_before_the_machine_joins() -> None:
    stage = training("a").join("b")
    stage.warm("b")
    former = replace(stage.workers[AgentName("b")].value, uid=Uid("u0"))
    stage.put_snapshot(former)
    stage.decide()
    stage.after(JOIN_WINDOW_S).decide()
    assert stage.status.joining == ("b",)
    assert not stage.of("open"), "a launcher of another submission is none that could fork at once"
    (stop,) = stage.commands(Stop)
    assert (stop.agent, stop.command.header.uid) == ("b", "u0")
    del stage.workers[AgentName("b")]
    stage.decide()
    assert stage.receivers(Warm) == ["b"]


def test_so_does_what_an_attempt_that_went_on_without_it_left_there() -> None:
    """Nobody would have it import: it waited for two minutes, and with it the others that join."""
    stage = training("a")
    stage.fail("a")
    stage.run(step=50)
    stage.join("b")
    stage.warm("b", warm=False)
    idle = stage.workers[AgentName("b")].value
    stage.put_snapshot(replace(idle, phase=WorkerPhase.STARTING, attempt=Attempt(1)))
    stage.decide()
    assert stage.receivers(Stop) == ["b"]
    assert stage.status.joining == ("b",)
    del stage.workers[AgentName("b")]
    stage.decide()
    assert stage.receivers(Warm) == ["b"]


def test_a_machine_that_is_back_before_its_former_life_has_ended_is_not_taken_for_warm() -> None:
    stage = training("a", "b")
    stage.unreachable[AgentName("b")] = stage.now
    stage.fail("a", kind=FailureKind.COLLECTIVE)
    stage.decide()
    stage.run(step=40)
    assert agents(stage) == ["a"]
    # Something answers there again; what is known of it is its former life's.
    stage.unreachable.clear()
    stage.after(UNREACHABLE_REST_S + JOIN_WINDOW_S).decide()
    assert not stage.of("open")
    stage.lose("b")
    stage.join("b", incarnation="i2").decide()
    assert "b" in stage.receivers(Warm)


def test_a_job_that_loses_a_machine_goes_on_at_once_with_the_others() -> None:
    stage = training("a", "b", "c", nodes=(1, 3))
    stage.lose("b")
    stage.after(0.1).decide()
    assert (stage.phase, stage.status.attempt, agents(stage)) == (JobPhase.STARTING, 2, ["a", "c"])


def test_it_waits_for_no_machine_that_has_to_import_first() -> None:
    stage = training("a", "b", "c", nodes=(1, 3))
    stage.join("d")
    stage.lose("b")
    stage.decide()
    assert agents(stage) == ["a", "c"]


def test_but_it_takes_one_that_is_warm() -> None:
    stage = training("a", "b", nodes=(1, 2))
    stage.join("d")
    stage.warm("d")
    stage.lose("b")
    stage.decide()
    assert agents(stage) == ["a", "d"]


def test_a_job_that_has_too_few_machines_left_takes_any() -> None:
    stage = training("a", "b", nodes=(2, 3))
    stage.join("d")
    stage.lose("b")
    stage.decide()
    assert agents(stage) == ["a", "d"]


def test_one_that_does_not_start_is_left_out() -> None:
    stage = training("a", "b", nodes=(1, 2))
    stage.fail("a")
    stage.decide()
    assert agents(stage) == ["a", "b"]
    stage.report("a", WorkerPhase.READY)
    stage.unreachable[AgentName("b")] = stage.now
    stage.after(20.0).decide()
    assert (stage.status.attempt, agents(stage)) == (3, ["a"])


# Ranks -----------------------------------------------------------------------------


def test_machines_keep_their_ranks_over_sizes() -> None:
    stage = training("a", "b", "c", nodes=(1, 3))
    stage.lose("a")
    stage.decide()
    assert agents(stage) == ["c", "b"]  # b stays rank 1; c takes the place that is free
    stage.run(step=50)
    grow(stage, "d")
    assert agents(stage) == ["c", "b", "d"]


def test_each_machine_gets_as_many_ranks_as_it_has_slots() -> None:
    stage = Stage(make_spec(nodes=(3, 3), nproc=0)).join("a", slots=2).join("b", slots=1).join("c", slots=4)
    stage.until_quiet()
    assert [(m.agent, m.first_rank, m.nproc) for m in stage.status.members] == [
        ("a", 0, 2),
        ("b", 2, 1),
        ("c", 3, 4),
    ]
    prepared = [d.command for d in stage.commands(Prepare)]
    stage.decide()
    prepared = [d.command for d in stage.commands(Prepare)]
    assert [(p.first_rank, p.ranks_here, p.world_size) for p in prepared] == [  # type: ignore[union-attr]
        (0, 2, 7),
        (2, 1, 7),
        (3, 4, 7),
    ]


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"nproc_per_node": 0}, "nproc_per_node: auto"),
        ({"package": Package("d" * 64, "a" * 16, "s3://b", 1, 1, 1)}, "packed working directories"),
    ],
)
def test_an_agent_that_would_start_no_rank_gets_none(changes: dict[str, object], lacking: str) -> None:
    spec = replace(make_spec(nodes=(1, 2)), **changes)  # type: ignore[arg-type]
    stage = Stage(spec).join("a", "b", slots=2)
    for name, view in stage.agents.items():
        stage.agents[name] = replace(view, node=replace(view.node, version="0.1.0"))
    stage.until_quiet()
    assert stage.phase is JobPhase.QUEUED
    assert f"(2 of a release without {lacking})" in stage.status.reason
    stage.agents[AgentName("a")] = replace(
        stage.agents[AgentName("a")], node=replace(stage.agents[AgentName("a")].node, version="0.2.0")
    )
    stage.after(JOIN_WINDOW_S).until_quiet()
    assert agents(stage) == ["a"]


def test_a_machine_of_which_others_use_a_part_has_no_room_for_a_job_that_takes_it_whole() -> None:
    stage = Stage(make_spec(nodes=(1, 2), nproc=0)).join("a", "b", slots=2)
    stage.used[AgentName("a")] = 1
    stage.until_quiet()
    stage.after(JOIN_WINDOW_S).until_quiet()
    assert agents(stage) == ["b"]


def test_unequal_machines_keep_their_order_over_sizes() -> None:
    stage = Stage(make_spec(nodes=(1, 3), nproc=0, store="s3://b"))
    stage.join("a", slots=2).join("b", slots=1).join("c", slots=4).run(step=5)
    stage.lose("a")
    stage.decide()
    assert stage.status.members == (
        Member(AgentName("c"), 0, 0, 4, "i1"),  # type: ignore[arg-type]
        Member(AgentName("b"), 1, 4, 1, "i1"),  # type: ignore[arg-type]
    )


# Scaling by hand ----------------------------------------------------------------------


def test_a_job_scaled_down_leaves_its_last_machines_at_a_checkpoint() -> None:
    stage = training("a", "b", "c", nodes=(3, 3))
    stage.want(nnodes=(1, 2))
    stage.decide()
    assert "shrinking from 3 to 2 agents: c will leave" in stage.status.reason
    seq = hold(stage)
    assert (stage.phase, stage.status.attempt, agents(stage)) == (JobPhase.STARTING, 2, ["a", "b"])
    assert stage.status.restore is not None
    assert stage.status.restore.seq == seq
    assert stage.receivers(Stop) == ["c"]
    assert not stage.commands(ConfirmCheckpoint)
    assert EventReason.SHRINKING in stage.reasons_of_events()
    stage.run(step=60)
    stage.decide()
    assert not stage.of("open")


def test_a_member_that_did_not_answer_once_stays_all_the_same() -> None:
    stage = training("a", "b", "c", nodes=(3, 3))
    stage.unreachable[AgentName("a")] = stage.now
    stage.after(UNREACHABLE_REST_S).want(nnodes=(1, 2))
    stage.decide()
    hold(stage)
    assert agents(stage) == ["a", "b"]


def test_shrinking_begins_no_cooldown() -> None:
    stage = training("a", "b", "c", nodes=(3, 3))
    stage.want(nnodes=(1, 2))
    stage.decide()
    hold(stage)
    assert stage.status.grown_at == ""


def test_a_job_scaled_up_grows_at_once() -> None:
    stage = training("a", nodes=(1, 2))
    grow(stage, "b")
    stage.run(step=60)
    stage.join("c").decide()
    assert not stage.commands(Warm)
    stage.after(1.0).want(nnodes=(1, 3))
    stage.decide()
    stage.warm("c")
    stage.after(JOIN_WINDOW_S).decide()
    hold(stage)
    assert agents(stage) == ["a", "b", "c"]


def test_a_job_below_its_new_least_goes_on_until_there_are_enough() -> None:
    stage = training("a", nodes=(1, 2))
    stage.join("b")
    stage.want(nnodes=(3, 4))
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    assert "1 more are needed" in stage.said
    assert stage.status.joining == ()
    stage.join("c").decide()
    stage.warm("b", "c")
    stage.after(JOIN_WINDOW_S).decide()
    hold(stage)
    assert agents(stage) == ["a", "b", "c"]


@pytest.mark.parametrize("sdk", [True, False])
def test_a_job_that_cannot_be_saved_is_scaled_at_its_next_restart(sdk: bool) -> None:
    stage = training("a", "b", nodes=(2, 2), sdk=sdk, store="s3://b" if not sdk else "")
    stage.want(nnodes=(1, 1))
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)
    assert "on 1 agent after its next restart" in stage.said
    stage.fail("b")
    stage.decide()
    assert agents(stage) == ["a"]


def test_bounds_of_another_submission_or_that_are_none_do_not_count() -> None:
    stage = training("a", nodes=(1, 1))
    stage.want(nnodes=(3, 2))
    stage.join("b").decide()
    assert stage.status.joining == ()
    stage.write(KEYS.intent(JOB), Intent(Uid("u0"), nnodes_min=1, nnodes_max=2))
    stage.decide()
    assert stage.status.joining == ()


def test_a_queued_job_is_placed_by_its_new_bounds() -> None:
    stage = Stage(make_spec(nodes=(4, 4))).join("a", "b")
    stage.until_quiet()
    assert stage.phase is JobPhase.QUEUED
    stage.want(nnodes=(2, 2))
    stage.until_quiet()
    assert agents(stage) == ["a", "b"]


def test_a_drained_machine_comes_before_any_change_of_size() -> None:
    stage = training("a", "b", nodes=(1, 3))
    stage.join("c").decide()
    stage.warm("c")
    stage.drain("b")
    stage.decide()
    hold(stage)
    assert agents(stage) == ["a", "c"]


def test_nothing_is_changed_while_a_member_is_not_seen() -> None:
    stage = training("a", "b", nodes=(1, 3))
    stage.join("c").decide()
    stage.warm("c")
    stage.losses_settle_at = stage.now + 5.0
    stage.lose("b")
    stage.after(JOIN_WINDOW_S).decide()
    assert stage.phase is JobPhase.RUNNING
    assert not stage.of("open")
    # Who is ready to join stays so, and joins once it is known how many there are.
    assert stage.status.joining == ("c",)
    assert not stage.receivers(Stop)
