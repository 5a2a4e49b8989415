"""Failures, losses, budgets, and what never counts as one."""

from dataclasses import replace

import pytest
from tests.support.builders import EPOCH, Stage, make_spec

from dtrain.coordinator.core.failures import backoff_s, root_cause
from dtrain.protocol.commands import Prepare, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank
from dtrain.protocol.job import JobPhase, Wanted
from dtrain.protocol.snapshot import Failure, FailureKind, StuckProcess, WorkerPhase


def running(**spec: object) -> Stage:
    return Stage(make_spec(**spec)).join("a", "b").run()  # type: ignore[arg-type]


def test_failed_rank_starts_the_next_attempt_in_one_transaction() -> None:
    stage = running()
    stage.fail("b")
    decisions = stage.decisions
    stage.decide()
    assert stage.decisions == decisions + 1
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert len(stage.status.restarts) == 1
    assert stage.receivers(Prepare) == ["a", "b"]
    assert stage.status.failure is not None
    assert stage.status.failure.rank == 1
    assert EventReason.RANK_EXITED in stage.reasons_of_events()


def test_slow_survivors_are_not_waited_for() -> None:
    stage = running()
    stage.fail("a")
    stage.decide()
    assert stage.workers[AgentName("b")].value.attempt == 1
    assert stage.phase is JobPhase.STARTING


def test_ranks_keep_their_machines() -> None:
    stage = Stage(make_spec(nodes=(3, 3))).join("b", "c", "d").run()
    assert [m.agent for m in stage.status.members] == ["b", "c", "d"]
    stage.join("a")
    stage.lose("c")
    stage.decide()
    assert [m.agent for m in stage.status.members] == ["b", "a", "d"]


def test_job_shrinks_at_once_on_loss() -> None:
    stage = Stage(make_spec(nodes=(1, 2))).join("a", "b").run()
    stage.lose("b")
    stage.decide()
    assert [m.agent for m in stage.status.members] == ["a"]
    assert stage.status.restarts == ()


def test_lost_agent_without_spare_leaves_the_job_recovering_with_a_reason() -> None:
    stage = running()
    stage.lose("b")
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert stage.status.members == ()
    assert stage.status.reason == "waiting for 1 of 2 agents with 1 free slot"
    assert [(d.agent, d.command.release) for d in stage.commands(Stop)] == [("a", False)]
    assert not stage.decide().writes
    stage.join("c")
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING
    assert [m.agent for m in stage.status.members] == ["a", "c"]


def test_agent_missing_since_the_change_of_leader_gets_one_ttl() -> None:
    stage = running()
    stage.change_leader()
    stage.lose("b", seen=False)
    stage.until_quiet()
    assert stage.phase is JobPhase.RUNNING
    assert stage.last.wake_at == stage.took_office_at + 10.0
    stage.after(10.0).decide()
    assert stage.phase is JobPhase.RECOVERING


def test_agent_that_goes_with_the_old_leader_is_given_one_ttl_to_return() -> None:
    """etcd stood still: its first act is to end the leases of the leader and of all agents."""
    stage = running()
    stage.lose("b")
    lost_at = dict(stage.lost_at)
    stage.change_leader()
    stage.lost_at.update(lost_at)  # a standby saw it go
    stage.until_quiet()
    stage.lose("a")  # and the new leader another one
    stage.until_quiet()
    assert stage.phase is JobPhase.RUNNING
    assert stage.last.wake_at == stage.took_office_at + 10.0
    stage.after(1.0).join("a", "b", incarnation="i2")
    stage.report("a", WorkerPhase.TRAINING)
    stage.report("b", WorkerPhase.TRAINING)
    stage.after(60.0).until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


def test_agent_that_goes_later_is_lost_at_once() -> None:
    stage = running()
    stage.change_leader()
    stage.until_quiet()
    stage.after(10.0).lose("b")
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING


def test_nothing_is_lost_under_the_brake() -> None:
    stage = running()
    stage.lose("b")
    stage.brake = "5 of 12 agents vanished"
    stage.after(100.0).until_quiet()
    assert stage.phase is JobPhase.RUNNING
    stage.brake = ""
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING


def test_the_brake_leaves_one_event_with_the_jobs_it_is_about() -> None:
    stage = running()
    stage.brake = "5 of 12 agents vanished"
    stage.until_quiet()
    assert EventReason.MASS_LOSS not in stage.reasons_of_events(), "its machines are all there"
    stage.lose("b")
    stage.after(1.0).until_quiet()
    stage.after(30.0).until_quiet()
    assert stage.reasons_of_events().count(EventReason.MASS_LOSS) == 1
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


def test_a_job_that_is_over_does_not_hear_of_the_brake() -> None:
    stage = running()
    stage.exit_all()
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED
    stage.brake = "5 of 12 agents vanished"
    stage.lose("b")
    stage.until_quiet()
    assert EventReason.MASS_LOSS not in stage.reasons_of_events()


def test_losses_in_a_row_are_waited_out() -> None:
    stage = running()
    stage.lose("b")
    stage.losses_settle_at = stage.now + 4.0
    stage.until_quiet()
    assert stage.phase is JobPhase.RUNNING
    assert stage.last.wake_at == stage.losses_settle_at
    stage.after(4.0).decide()
    assert stage.phase is JobPhase.RECOVERING


def test_a_job_may_ask_that_an_agent_is_waited_for() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.lose("b")
    lost_at = stage.now
    stage.after(59.0).until_quiet()
    assert stage.phase is JobPhase.RUNNING
    assert stage.last.wake_at == lost_at + 60.0
    stage.after(1.0).decide()
    assert stage.phase is JobPhase.RECOVERING


def test_an_agent_that_drained_is_not_waited_for() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.join("c")
    stage.drain("b", grace_s=30.0)
    stage.until_quiet()
    stage.lose("b")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.restarts == ()


def test_one_that_drained_in_a_former_life_is_waited_for_as_any_other() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.drain("b")
    stage.lose("b")
    stage.join("b")
    stage.report("b", WorkerPhase.TRAINING)
    stage.lose("b")
    stage.after(59.0).until_quiet()
    assert stage.phase is JobPhase.RUNNING


def test_an_agent_that_is_back_within_the_grace_costs_nothing() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.lose("b")
    stage.after(40.0).until_quiet()
    stage.join("b", incarnation="i2")
    stage.report("b", WorkerPhase.TRAINING)
    stage.after(100.0).until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


def test_ranks_that_fail_because_a_machine_is_gone_cost_no_restart() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.lose("b")
    stage.until_quiet()
    failure = Failure(FailureKind.COLLECTIVE, "Connection closed by peer", rank=Rank(0), at=EPOCH)
    stage.report("a", WorkerPhase.ERROR, failure=failure)
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert stage.status.restarts == ()
    assert stage.status.failure is not None
    assert stage.status.failure.kind is FailureKind.ISOLATED
    assert "the session of agent b ended" in stage.status.failure.message


def test_what_agents_and_ranks_report_under_the_brake_calls_nobody_lost() -> None:
    """Found by simulation seed 26, and by an outage of etcd that outlasted the grace."""
    stage = running()
    stage.brake = "5 of 12 agents vanished"
    stage.lose("b")
    stage.until_quiet()
    failure = Failure(FailureKind.COLLECTIVE, "Connection closed by peer", rank=Rank(0), at=EPOCH)
    stage.report("a", WorkerPhase.ERROR, failure=failure)
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert stage.status.failure is not None
    assert stage.status.failure.kind is FailureKind.ISOLATED
    assert stage.status.restarts == ()


def test_a_cause_of_its_own_is_charged_although_a_machine_is_gone() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.lose("b")
    stage.until_quiet()
    stage.fail("a")
    stage.decide()
    assert len(stage.status.restarts) == 1


def test_a_new_leader_that_did_not_see_the_agent_go_grants_the_whole_grace() -> None:
    stage = running(reschedule_grace_s=60.0)
    stage.change_leader()
    stage.lose("b", seen=False)
    stage.after(59.0).until_quiet()
    assert stage.phase is JobPhase.RUNNING
    stage.after(1.5).decide()
    assert stage.phase is JobPhase.RECOVERING


def test_ranks_that_their_agent_has_ended_say_why_and_cost_no_restart() -> None:
    stage = running()
    stage.report("b", WorkerPhase.IDLE, note="the ranks were ended: etcd could not be reached for 600 s")
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.restarts == ()
    assert stage.status.failure is not None
    assert "could not be reached for 600 s" in stage.status.failure.message


def test_a_process_that_cannot_be_killed_keeps_the_machine_out_and_costs_no_restart() -> None:
    stage = running()
    stage.join("c")
    stage.fail("a")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    used = stage.status.restarts
    stuck = (StuckProcess(201, Rank(1), "nfs_wait"),)
    failure = Failure(FailureKind.UNKILLABLE, "rank 1 (pid 201) on b cannot be killed", at=EPOCH)
    stage.report("b", WorkerPhase.ERROR, failure=failure, stuck=stuck)
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 3)
    assert sorted(m.agent for m in stage.status.members) == ["a", "c"]
    assert stage.status.restarts == used
    assert EventReason.PROCESS_UNKILLABLE in stage.reasons_of_events()


def test_a_machine_with_a_problem_is_not_used_by_any_job_until_it_is_well() -> None:
    stage = Stage(make_spec()).join("a", "b")
    view = stage.agents[AgentName("b")]
    stage.agents[AgentName("b")] = replace(
        view, node=replace(view.node, problem="a process cannot be killed")
    )
    stage.until_quiet()
    assert stage.phase is JobPhase.QUEUED
    assert "1 with a process that cannot be killed" in stage.status.reason
    stage.join("b")
    stage.until_quiet()
    assert stage.phase is JobPhase.STARTING


def test_restarted_agent_that_adopts_its_ranks_is_no_loss() -> None:
    stage = running()
    stage.join("b", incarnation="i2")
    stage.until_quiet()
    assert stage.phase is JobPhase.RUNNING
    stage.after(5.0)
    stage.report("b", WorkerPhase.TRAINING)
    stage.after(60.0).until_quiet()
    assert (stage.phase, stage.status.attempt) == (JobPhase.RUNNING, 1)


def test_restarted_agent_that_says_nothing_is_lost_after_one_ttl() -> None:
    stage = running()
    stage.join("b", incarnation="i2")
    stage.decide()
    assert stage.last.wake_at == stage.now + 10.0
    stage.after(10.0).decide()
    assert stage.status.attempt == 2
    assert stage.status.restarts == ()


def test_agents_that_all_have_forgotten_their_ranks_are_lost_after_one_ttl() -> None:
    stage = running()
    for name in [str(member.agent) for member in stage.status.members]:
        stage.join(name, incarnation="i2")
        del stage.workers[AgentName(name)]
    stage.decide()
    assert stage.status.attempt == 1
    stage.after(10.0).decide()
    assert stage.status.attempt == 2
    assert stage.status.restarts == ()


def test_agent_that_reports_no_ranks_any_more_ends_the_attempt() -> None:
    stage = running()
    stage.report("b", WorkerPhase.IDLE)
    stage.decide()
    assert stage.status.attempt == 2


def test_budget_spent_fails_the_job() -> None:
    stage = running(max_restarts=1)
    stage.step(3)
    stage.fail("a")
    stage.run(step=5)
    stage.fail("a", message="boom")
    stage.decide()
    assert stage.phase is JobPhase.FAILED
    assert stage.status.reason == "rank 0 on a: boom; the budget of 1 restart is spent"
    assert EventReason.BUDGET_EXHAUSTED in stage.reasons_of_events()
    assert EventReason.JOB_FAILED in stage.reasons_of_events()


def test_old_restarts_do_not_count() -> None:
    stage = running(max_restarts=1, window_s=60.0)
    for step in range(2, 8):
        stage.step(step)
        stage.fail("a")
        stage.after(61.0).run(step=step)
    assert stage.phase is JobPhase.RUNNING


def test_a_commit_gives_the_budget_back() -> None:
    stage = running(max_restarts=1, store="s3://b", every_steps=10)
    for step in (8, 18, 28, 38):
        stage.step(step)
        stage.decide()
        stage.checkpoint()
        stage.fail("b")
        stage.run(step=step + 2)
    assert len(stage.status.restarts) == 1
    assert stage.status.restore is not None
    assert stage.status.restore.step == 40


def test_exit_code_93_fails_the_job_at_once() -> None:
    stage = running()
    stage.fail("a", exit_code=93, message="exited with 93")
    stage.decide()
    assert stage.phase is JobPhase.FAILED
    assert EventReason.DO_NOT_RETRY in stage.reasons_of_events()


def test_cause_comes_before_consequence_and_then_the_earlier_one() -> None:
    stage = running()
    stage.fail("a", kind=FailureKind.COLLECTIVE, message="gloo: peer closed", at=EPOCH + 1)
    stage.fail("b", kind=FailureKind.SIGNAL, message="killed by SIGKILL", at=EPOCH + 2)
    stage.decide()
    assert stage.status.failure is not None
    assert stage.status.failure.message == "killed by SIGKILL"
    assert EventReason.RANK_SIGNALED in stage.reasons_of_events()
    early, late = Failure(FailureKind.EXIT, "x", at=1.0), Failure(FailureKind.EXIT, "y", at=2.0)
    assert root_cause([late, early]) is early


def test_failure_reported_by_an_agent_that_has_gone_still_counts() -> None:
    stage = running()
    stage.fail("b", kind=FailureKind.SIGNAL, message="killed by SIGKILL")
    stage.lose("b")
    stage.decide()
    assert stage.status.failure is not None
    assert stage.status.failure.message == "killed by SIGKILL"


def test_a_member_done_does_not_hide_anothers_failure() -> None:
    stage = running()
    stage.report("a", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.fail("b")
    stage.decide()
    assert stage.status.attempt == 2


def test_member_that_finished_and_left_is_not_lost() -> None:
    stage = running()
    stage.report("a", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.lose("a")
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    stage.report("b", WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.decide()
    assert stage.phase is JobPhase.SUCCEEDED


def test_attempts_that_get_nowhere_are_slowed_down() -> None:
    stage = Stage(make_spec(max_restarts=100)).join("a", "b")
    pauses = []
    for _ in range(6):
        stage.run()
        stage.fail("a")
        begun = stage.now
        stage.decide()
        while stage.phase is JobPhase.RECOVERING:
            assert stage.last.wake_at is not None
            stage.now = max(stage.now, stage.last.wake_at)
            stage.decide()
        pauses.append(stage.now - begun)
    assert pauses == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0]
    assert backoff_s(50) == 30.0


def test_damaged_checkpoint_sends_all_ranks_to_the_one_before_without_budget() -> None:
    stage = running(max_restarts=0, store="s3://b", every_steps=10)
    for step in (8, 18):
        stage.step(step)
        stage.decide()
        stage.checkpoint()
    first, second = stage.commits
    stage.lose("b")
    stage.decide()
    stage.join("b", incarnation="i2")
    stage.until_quiet()
    assert stage.status.restore is not None
    assert stage.status.restore.seq == second.seq
    stage.everyone(WorkerPhase.READY)
    stage.decide()
    stage.find_damage("b", second.seq)
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 3)
    assert stage.status.restore.seq == first.seq
    assert list(stage.of("bad")) == [second.seq]
    assert stage.status.restarts == ()
    assert EventReason.CHECKPOINT_QUARANTINED in stage.reasons_of_events()


def test_evidence_about_another_checkpoint_changes_nothing() -> None:
    stage = running(store="s3://b", every_steps=10)
    stage.step(8)
    stage.decide()
    stage.checkpoint()
    stage.fail("a")
    stage.run(step=10)
    snapshot = stage.workers[AgentName("a")].value
    stage.find_damage("a", 7)
    bad = stage.workers[AgentName("a")].value.bad
    stage.put_snapshot(replace(snapshot, bad=bad))
    assert not stage.decide().writes


@pytest.mark.parametrize("phase", [WorkerPhase.READY, WorkerPhase.TRAINING])
def test_cancel_stops_all_ranks_before_the_job_counts_as_cancelled(phase: WorkerPhase) -> None:
    stage = Stage().join("a", "b")
    stage.decide()
    stage.everyone(phase)
    stage.want(Wanted.CANCEL)
    stage.decide()
    assert stage.phase is JobPhase.CANCELLING
    assert [(d.agent, d.command.release) for d in stage.commands(Stop)] == [("a", False), ("b", False)]
    stage.report("a", WorkerPhase.IDLE)
    stage.decide()
    assert stage.receivers(Stop) == ["b"]
    stage.report("b", WorkerPhase.IDLE)
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
    stage.decide()
    assert [(d.agent, d.command.release) for d in stage.commands(Stop)] == [("a", True), ("b", True)]


def test_cancel_does_not_wait_for_a_silent_agent_for_ever() -> None:
    stage = running()
    stage.want(Wanted.CANCEL)
    stage.decide()
    stage.after(60.0).decide()
    assert stage.phase is JobPhase.CANCELLED


def test_cancel_between_attempts_ends_the_job() -> None:
    stage = running()
    stage.lose("b")
    stage.decide()
    stage.want(Wanted.CANCEL)
    stage.decide()
    assert stage.phase is JobPhase.CANCELLED
