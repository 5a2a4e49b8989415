"""From submission to the first step."""

from dataclasses import replace

from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.decisions import ProbeStore
from dtrain.coordinator.core.queue import Place, Queue, Waiting
from dtrain.protocol.commands import Prepare, Start, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, JobName, Uid
from dtrain.protocol.job import Intent, JobPhase, Wanted
from dtrain.protocol.snapshot import WorkerPhase


def test_new_job_is_queued_with_a_reason_and_an_event() -> None:
    stage = Stage()
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    assert stage.said.endswith("waiting for 2 of 2 agents with 1 free slot")
    assert stage.reasons_of_events() == [EventReason.JOB_SUBMITTED]
    assert not stage.decide().writes


def test_job_starts_at_once_when_all_machines_are_there() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert [m.agent for m in stage.status.members] == ["a", "b"]
    assert stage.receivers(Prepare) == ["a", "b"]
    assert [d.command.serve_store for d in stage.commands(Prepare)] == [True, False]
    assert stage.commands()[0].address == "a:7001"


def test_prepare_is_repeated_until_the_agent_is_ready_in_this_attempt() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.report("a", WorkerPhase.READY)
    stage.report("b", WorkerPhase.STARTING)
    stage.decide()
    assert stage.receivers(Prepare) == ["b"]
    assert "1 of 2 agents ready; waiting for b" in stage.said


def test_start_goes_out_only_when_all_are_ready_and_the_rendezvous_is_known() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.report("b", WorkerPhase.READY)
    stage.report("a", WorkerPhase.READY, rendezvous="")
    assert not stage.decide().commands
    stage.report("a", WorkerPhase.READY)
    stage.decide()
    assert stage.receivers(Start) == ["a", "b"]
    assert {d.command.rendezvous for d in stage.commands(Start)} == {"a.example:29500"}
    stage.report("a", WorkerPhase.RESTORING)
    stage.decide()
    assert stage.receivers(Start) == ["b"]


def test_running_needs_every_rank_restored() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(WorkerPhase.READY)
    stage.decide()
    stage.report("a", WorkerPhase.TRAINING, restored=True)
    stage.report("b", WorkerPhase.TRAINING)
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    stage.report("b", WorkerPhase.TRAINING, restored=True)
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    assert EventReason.ALL_RANKS_TRAINING in stage.reasons_of_events()


def test_progress_alone_is_never_written() -> None:
    stage = Stage().join("a", "b").run()
    for step in range(1, 5):
        stage.after(2.0).step(step)
        assert not stage.decide().writes


def test_the_same_view_gives_the_same_decision_whoever_decides() -> None:
    one, other = Stage().join("a", "b"), Stage().join("b", "a")
    one.decide()
    other.decide()
    assert one.status.members == other.status.members


def test_fewer_than_wanted_start_after_the_join_window() -> None:
    stage = Stage(make_spec(nodes=(1, 3))).join("a")
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    assert stage.last.wake_at == stage.now + 2.0
    stage.after(2.0).decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.world_size == 1


def test_a_full_or_cordoned_agent_gets_no_ranks() -> None:
    stage = Stage(make_spec(nproc=4)).join("a", "b", "c", "d")
    stage.used[AgentName("b")] = 5
    stage.cordoned.add(AgentName("c"))
    stage.decide()
    assert [m.agent for m in stage.status.members] == ["a", "d"]
    assert [m.first_rank for m in stage.status.members] == [0, 4]


def test_agents_that_cannot_help_are_named_in_the_reason() -> None:
    stage = Stage().join("a", "b", "c")
    stage.used[AgentName("b")] = 8
    stage.cordoned.add(AgentName("c"))
    stage.decide()
    assert "waiting for 1 of 2 agents with 1 free slot (1 without 1 free slot, 1 cordoned)" in stage.said


def test_machines_that_are_held_back_for_another_job_are_named_as_such() -> None:
    stage = Stage().join("a", "b", "c", slots=1)
    stage.used[AgentName("c")] = 1
    first = JobName("first")
    stage.queue = Queue(
        {JOB: Place(1, False)},
        {JOB: Waiting(JOB, 0, 0.0, 0.0, 2, 2, 1)},
        {first: {AgentName("b"): 1}},
        turns={first: 0, JOB: 1},
    )
    stage.decide()
    assert stage.status.reason == (
        "waiting for 1 of 2 agents with 1 free slot (1 without 1 free slot, b is held back for first)"
    )


def test_machines_that_are_too_small_are_not_called_full() -> None:
    stage = Stage(make_spec(nproc=4)).join("a", slots=2).join("b", slots=4).join("c", slots=4)
    stage.used[AgentName("b")] = 1
    stage.decide()
    assert stage.status.reason == (
        "waiting for 1 of 2 agents with 4 free slots (1 without 4 free slots, 1 with fewer slots in all)"
    )


def test_nothing_is_placed_under_the_brake() -> None:
    stage = Stage(brake="5 of 12 agents vanished").join("a", "b")
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    assert "brake" in stage.status.reason
    assert "5 of 12" in stage.said
    assert "5 of 12" not in stage.status.reason
    stage.brake = ""
    stage.decide()
    assert stage.phase is JobPhase.STARTING


def test_job_waits_for_a_store_that_answers() -> None:
    stage = Stage(make_spec(store="s3://b"), store_ok=None).join("a", "b")
    stage.decide()
    assert stage.phase is JobPhase.QUEUED
    assert stage.work(ProbeStore) == [ProbeStore(JOB, "s3://b")]
    stage.store_ok, stage.store_problem = False, "no such bucket"
    stage.decide()
    assert "not usable" in stage.status.reason
    assert "no such bucket" in stage.said
    assert stage.last.wake_at == stage.now + 5.0
    for _ in range(3):
        assert not stage.after(5.0).decide().writes
        assert stage.work(ProbeStore)
    assert stage.reasons_of_events().count(EventReason.STORE_UNAVAILABLE) == 1
    stage.store_ok = True
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.store == "s3://b"


def test_default_store_is_fixed_at_the_first_start() -> None:
    stage = Stage(default_store="file:///a").join("a", "b").run()
    stage.default_store = "file:///other"
    stage.fail("a")
    stage.decide()
    assert stage.status.attempt == 2
    assert stage.status.store == "file:///a"


def test_unreachable_member_is_replaced_without_using_the_budget() -> None:
    stage = Stage(make_spec(max_restarts=0)).join("a", "b", "c")
    stage.decide()
    stage.report("a", WorkerPhase.READY)
    stage.after(1.0).unreachable[AgentName("b")] = stage.now
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.attempt == 2
    assert [m.agent for m in stage.status.members] == ["a", "c"]
    assert stage.status.restarts == ()
    assert EventReason.PREPARE_TIMEOUT in stage.reasons_of_events()


def test_single_unreachable_agent_is_tried_again_after_a_rest() -> None:
    stage = Stage(make_spec(nodes=(1, 1))).join("a")
    stage.decide()
    stage.after(1.0).unreachable[AgentName("a")] = stage.now
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert "not answering" in stage.status.reason
    wake_at = stage.last.wake_at
    assert wake_at is not None
    stage.after(wake_at - stage.now).decide()
    stage.after(5.0).until_quiet()
    assert stage.status.attempt >= 2


def test_silent_member_is_replaced_ten_seconds_after_others_are_ready() -> None:
    stage = Stage().join("a", "b", "c")
    stage.decide()
    stage.report("a", WorkerPhase.READY)
    stage.after(9.0).decide()
    assert stage.status.attempt == 1
    stage.after(1.0).decide()
    assert [m.agent for m in stage.status.members] == ["a", "c"]


def test_member_that_imports_torch_slowly_gets_two_minutes() -> None:
    stage = Stage().join("a", "b", "c")
    stage.decide()
    stage.report("a", WorkerPhase.READY)
    stage.report("b", WorkerPhase.STARTING)
    stage.after(119.0).decide()
    assert stage.status.attempt == 1
    stage.after(1.0).decide()
    assert stage.status.attempt == 2


def test_cancel_of_a_queued_job_ends_it_at_once() -> None:
    stage = Stage()
    stage.decide()
    stage.want(Wanted.CANCEL)
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
    assert stage.status.finished_at


def test_cancel_of_another_submission_is_not_meant() -> None:
    stage = Stage().join("a", "b")
    stage.write(KEYS.intent(JOB), Intent(Uid("old"), Wanted.CANCEL))
    stage.decide()
    assert stage.phase is JobPhase.STARTING


def test_strangers_that_hold_ranks_are_released() -> None:
    stage = Stage().join("a", "b", "c")
    stage.decide()
    stage.report("a", WorkerPhase.READY)
    stray = replace(stage.workers[AgentName("a")].value, agent=AgentName("c"), incarnation="i1")
    stage.put_snapshot(stray)
    stage.decide()
    (directed,) = stage.commands(Stop)
    assert (directed.agent, directed.command.release) == ("c", True)


def test_name_used_again_starts_afresh_with_numbers_that_go_on() -> None:
    stage = Stage(make_spec(store="s3://b", every_steps=10)).join("a", "b").run()
    stage.step(8)
    stage.decide()
    stage.checkpoint()
    before = stage.status
    stage.want(Wanted.CANCEL)
    stage.decide()
    stage.workers.clear()
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
    stage.spec = make_spec(uid="u2", store="s3://c")
    stage.write(KEYS.spec(JOB), stage.spec)
    stage.store_ok = True
    stage.until_quiet()
    assert stage.status.uid == "u2"
    assert stage.phase is JobPhase.STARTING
    assert stage.status.attempt > before.attempt
    assert stage.status.seq_last >= before.seq_last
    assert stage.status.restore is None
    assert not stage.commits
    assert not stage.of("latest")
    (garbage,) = (stored.value for stored in stage.of("garbage").values())
    assert garbage.store == "s3://b"
    assert stage.reasons_of_events()[0] is EventReason.JOB_SUBMITTED


def test_old_job_with_much_history_is_cleared_in_batches() -> None:
    stage = Stage(make_spec(store="s3://b", every_steps=1, keep_last=60)).join("a", "b").run()
    for step in range(1, 40):
        stage.step(step * 10)
        stage.decide()
        stage.checkpoint()
    stage.want(Wanted.CANCEL)
    stage.decide()
    stage.workers.clear()
    stage.until_quiet()
    stage.write(KEYS.spec(JOB), make_spec(uid="u2"))
    stage.until_quiet()
    assert stage.status.uid == "u2"
    assert len(stage.of("garbage")) == 39
    assert len(stage.events) == 2


def test_agent_that_restarts_after_ready_is_prepared_again_before_any_start() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(WorkerPhase.READY)
    stage.join("b", incarnation="i2")
    stage.decide()
    assert stage.receivers(Prepare) == ["b"]
    assert not stage.commands(Start)
    stage.report("b", WorkerPhase.READY)
    stage.decide()
    assert stage.receivers(Start) == ["a", "b"]


def test_machine_that_loses_its_ranks_while_others_restore_is_not_let_in_again() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(WorkerPhase.RESTORING)
    stage.lose("b")
    stage.join("b", incarnation="i2")
    stage.departed.clear()
    stage.decide()
    assert not stage.commands()
    stage.after(10.0).decide()
    assert stage.status.attempt == 2


def test_attempt_whose_ranks_have_run_is_not_prepared_again_once_no_agent_remembers_them() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(WorkerPhase.READY)
    stage.decide()
    stage.report("b", WorkerPhase.RESTORING)
    for name in ("a", "b"):
        stage.lose(name)
        stage.join(name, incarnation="i2")
    stage.decide()
    assert not stage.commands(), "b's rank may live on: it must not meet another one of its number"
    stage.after(10.0).decide()
    assert stage.status.attempt == 2
    assert stage.receivers(Prepare) == ["a", "b"]


def test_agents_that_forget_an_attempt_before_any_start_are_prepared_again() -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(WorkerPhase.READY)
    for name in ("a", "b"):
        stage.lose(name)
        stage.join(name, incarnation="i2")
    stage.decide()
    assert stage.receivers(Prepare) == ["a", "b"]
    assert stage.status.attempt == 1


def test_ranks_that_an_agent_ended_before_training_began_are_not_waited_for() -> None:
    stage = Stage().join("a", "b", "c")
    stage.decide()
    stage.report("a", WorkerPhase.READY)
    stage.report("b", WorkerPhase.IDLE, note="the ranks were ended: etcd could not be reached")
    stage.decide()
    assert stage.status.attempt == 2
    assert stage.status.failure is not None
    assert stage.status.failure.message == "the ranks were ended: etcd could not be reached"
    assert not stage.status.restarts


def test_conditions_tell_programs_where_the_job_stands() -> None:
    def status_of(kind: str) -> str:
        return next(c.status for c in stage.status.conditions if c.type == kind)

    stage = Stage(make_spec(store="s3://b", every_steps=10))
    stage.decide()
    assert (status_of("Accepted"), status_of("Placed"), status_of("Finished")) == ("True", "False", "False")
    stage.join("a", "b").run(step=8)
    assert (status_of("Placed"), status_of("RanksReady"), status_of("Checkpointed")) == (
        "True",
        "True",
        "False",
    )
    placed = next(c.last_transition for c in stage.status.conditions if c.type == "Placed")
    stage.after(5.0).decide()
    stage.checkpoint()
    assert status_of("Checkpointed") == "True"
    assert next(c.last_transition for c in stage.status.conditions if c.type == "Placed") == placed
    stage.exit_all()
    stage.decide()
    assert (status_of("Finished"), status_of("RanksReady")) == ("True", "False")
