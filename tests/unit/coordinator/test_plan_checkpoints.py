"""The checkpoint transaction, from its intent to its outcome."""

from dataclasses import replace

from tests.support.builders import JOB, KEYS, Stage, make_part, make_spec

from dtrain.coordinator.core.decisions import Guard, VerifyCheckpoint
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.commands import AbortCheckpoint, BeginCheckpoint, ConfirmCheckpoint, Start
from dtrain.protocol.events import EventReason, EventType
from dtrain.protocol.ids import AgentName, Seq, Step, Term
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import WorkerPhase


def running(**spec: object) -> Stage:
    spec = {"store": "s3://b", "every_steps": 10, **spec}
    return Stage(make_spec(**spec)).join("a", "b").run()  # type: ignore[arg-type]


def with_open(**spec: object) -> Stage:
    stage = running(**spec)
    stage.step(8)
    stage.decide()
    assert stage.opened.step == 10
    return stage


def test_intent_is_written_before_any_command() -> None:
    stage = running()
    stage.step(8)
    decision = stage.decide()
    assert KEYS.open(JOB, stage.opened.seq) in {write.key for write in decision.writes}
    assert stage.receivers(BeginCheckpoint) == ["a", "b"]
    command = stage.commands(BeginCheckpoint)[0].command
    assert (command.seq, command.step, command.nonce) == (1, 10, stage.opened.nonce)
    # A number that was ever committed is not given out again, whatever status says.
    assert Guard(KEYS.checkpoint(JOB, Seq(1)), 0) in decision.guards
    assert stage.status.seq_last == 1


def test_no_checkpoint_before_it_is_due_nor_without_store_or_sdk() -> None:
    early = running()
    early.step(7)
    assert not early.decide().writes
    without = Stage(make_spec(every_steps=10)).join("a", "b").run(step=9)
    assert not without.decide().writes
    plain = Stage(make_spec(store="s3://b", every_steps=10)).join("a", "b").run(step=9, sdk=False)
    assert not plain.decide().writes


def test_target_step_allows_for_rate_and_age_of_the_report() -> None:
    stage = running(every_steps=100)
    stage.step_rate = 20.0
    stage.step(70)
    stage.after(1.0).decide()
    # 70 + 20 * 1 s old + 20 * 0.5 s latency + 2 steps = 102: the next multiple is 200.
    assert stage.opened.step == 200


def test_a_fast_job_is_looked_at_again_in_time_for_its_multiple() -> None:
    stage = running(every_steps=100)
    stage.step_rate = 20.0
    stage.step(40)
    stage.decide()
    assert stage.last.wake_at is not None
    assert 0 < stage.last.wake_at - stage.now < 2.0
    stage.now = stage.last.wake_at
    stage.decide()
    assert stage.opened.step == 100


def test_operators_token_gets_one_checkpoint_and_is_answered_by_its_commit() -> None:
    stage = running(every_steps=0)
    stage.step(5)
    stage.want(token="t1")
    stage.decide()
    assert (stage.opened.step, stage.opened.token) == (7, "t1")
    stage.checkpoint()
    assert stage.status.token_done == "t1"
    stage.until_quiet()
    assert not stage.of("open")


def test_checkpoints_by_time() -> None:
    stage = running(every_steps=0, every_seconds=60.0)
    stage.step(5)
    stage.decide()
    assert stage.last.wake_at is not None
    assert abs(stage.last.wake_at - stage.now - 60.0) < 0.01
    stage.after(60.01).decide()
    stage.checkpoint()
    stage.after(30.0).until_quiet()
    assert not stage.of("open")
    stage.after(31.0).decide()
    assert stage.of("open")


def test_begin_is_repeated_until_the_agent_shows_the_checkpoint() -> None:
    stage = with_open()
    stage.decide()
    assert stage.receivers(BeginCheckpoint) == ["a", "b"]
    snapshot = stage.workers[AgentName("a")].value
    stage.put_snapshot(replace(snapshot, saving=(stage.opened.seq,)))
    stage.decide()
    assert stage.receivers(BeginCheckpoint) == ["b"]


def test_only_one_checkpoint_is_open_at_once() -> None:
    stage = with_open()
    stage.step(50)
    stage.want(token="now")
    stage.decide()
    assert len(stage.of("open")) == 1


def test_commit_needs_every_rank_and_a_good_verdict() -> None:
    stage = with_open()
    record = stage.opened
    stage.durable("a")
    stage.verify()
    stage.decide()
    assert not stage.commits
    stage.durable("b")
    stage.verdicts.clear()
    stage.decide()
    (work,) = stage.work(VerifyCheckpoint)
    assert isinstance(work, VerifyCheckpoint)
    assert [part.rank for part in work.parts] == [0, 1]
    assert not stage.commits
    stage.verify()
    stage.decide()
    (commit,) = stage.commits
    assert (commit.seq, commit.step, commit.attempt, commit.nonce) == (
        record.seq,
        record.step,
        record.attempt,
        record.nonce,
    )
    assert commit.term == stage.term
    assert stage.of("latest")[0].value.seq == record.seq
    assert not stage.of("open")
    assert EventReason.CHECKPOINT_COMMITTED in stage.reasons_of_events()


def test_commit_is_guarded_by_open_record_latest_and_absence() -> None:
    stage = with_open()
    record = stage.of("open")[1]
    stage.durable()
    stage.verify()
    decision = stage.decide()
    expected = {write.key: write.expect_mod for write in decision.writes}
    assert expected[KEYS.open(JOB, record.value.seq)] == record.mod_revision
    assert expected[KEYS.checkpoint(JOB, record.value.seq)] == 0
    assert expected[KEYS.latest(JOB)] == 0


def test_parts_of_a_zombie_are_not_counted() -> None:
    stage = with_open()
    record = stage.opened
    stage.durable("a")
    snapshot = stage.workers[AgentName("b")].value
    for wrong in ({"nonce": "other"}, {"step": Step(9)}, {"attempt": 7}, {"seq": 9}, {"rank": 5}):
        stage.put_snapshot(replace(snapshot, durable=(replace(make_part(record, 1), **wrong),)))
        stage.decide()
        assert not stage.work(VerifyCheckpoint)
    assert "1 of 2 ranks durable" in stage.said


def test_agents_are_told_until_their_slot_is_free() -> None:
    stage = with_open()
    stage.durable()
    stage.verify()
    stage.decide()
    assert stage.receivers(ConfirmCheckpoint) == ["a", "b"]
    stage.decide()
    assert stage.receivers(ConfirmCheckpoint) == ["a", "b"]
    stage.forget_outcomes()
    assert not stage.decide().commands


def test_retired_checkpoint_is_confirmed_not_aborted() -> None:
    stage = with_open()
    commit = stage.checkpoint()
    stage.cells.clear()
    stage = with_open(keep_last=1)
    commit = stage.checkpoint()
    stage.step(18)
    stage.decide()
    stage.checkpoint()
    stage.until_quiet()
    assert commit.seq in stage.of("garbage")
    snapshot = stage.workers[AgentName("a")].value
    stage.put_snapshot(replace(snapshot, saving=(commit.seq,)))
    stage.decide()
    assert stage.receivers(ConfirmCheckpoint) == ["a"]


def test_late_rank_aborts_quietly_and_the_next_try_has_more_slack() -> None:
    stage = running(every_steps=0)
    stage.step(5)
    stage.want(token="t")
    stage.decide()
    assert stage.opened.step == 7
    stage.accept()
    stage.problem("b", late=True)
    stage.decide()
    assert not stage.of("open")
    event = stage.events[-1]
    assert (event.reason, event.type) == (EventReason.CHECKPOINT_ABORTED, EventType.NORMAL)
    assert stage.receivers(AbortCheckpoint) == ["a", "b"]
    stage.step(20)
    stage.decide()
    assert stage.opened.step == 24
    stage.forget_outcomes()
    stage.problem("a", late=True)
    stage.decide()
    stage.step(40)
    stage.decide()
    assert stage.opened.step == 48
    assert stage.opened.token == "t"


def test_failed_save_never_stops_training_and_is_retried_after_a_pause() -> None:
    stage = with_open()
    stage.accept()
    stage.problem("b", message="disk full")
    stage.decide()
    assert stage.phase is JobPhase.RUNNING
    assert not stage.of("open")
    assert stage.events[-1].type is EventType.WARNING
    assert "disk full" in stage.events[-1].message
    stage.forget_outcomes()
    stage.until_quiet()
    assert not stage.of("open")
    assert stage.last.wake_at == stage.now + 5.0
    stage.after(5.0).decide()
    assert stage.of("open")
    assert stage.opened.seq == 2
    stage.accept()
    stage.problem("b")
    stage.decide()
    stage.forget_outcomes()
    stage.after(9.0).until_quiet()
    assert not stage.of("open")
    stage.after(1.0).decide()
    assert stage.of("open")


def test_checkpoint_that_takes_too_long_is_aborted() -> None:
    stage = with_open()
    stage.durable("a")
    stage.decide()
    assert stage.last.wake_at is not None
    stage.after(300.0).decide()
    assert not stage.of("open")
    assert "ranks 1 are not durable within 300 s" in stage.events[-1].message


def test_refused_verdict_aborts_and_a_silent_store_is_asked_again() -> None:
    stage = with_open()
    stage.durable()
    stage.verify(ok=False, retry=True)
    stage.decide()
    assert not stage.work(VerifyCheckpoint)
    stage.after(2.0).decide()
    assert stage.work(VerifyCheckpoint)
    assert stage.of("open")
    stage.verify(ok=False, problem="object loader differs between ranks 0 and 1")
    stage.decide()
    assert not stage.of("open")
    assert "loader differs" in stage.events[-1].message


def test_complete_checkpoint_survives_the_death_of_its_ranks() -> None:
    stage = with_open()
    record = stage.opened
    stage.durable()
    stage.fail("b")
    stage.decide()
    assert stage.phase is JobPhase.RECOVERING
    assert stage.work(VerifyCheckpoint)
    assert stage.status.charge
    stage.verify()
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.restore is not None
    assert stage.status.restore.seq == record.seq
    assert len(stage.status.restarts) == 1
    assert EventReason.CHECKPOINT_SETTLED in stage.reasons_of_events()


def test_verified_checkpoint_is_settled_in_the_transaction_that_starts_the_attempt() -> None:
    stage = with_open()
    stage.durable()
    stage.verify()
    stage.fail("b")
    stage.decide()
    assert (stage.phase, stage.status.attempt) == (JobPhase.STARTING, 2)
    assert stage.status.restore is not None


def test_incomplete_checkpoint_is_deleted_before_the_next_attempt() -> None:
    stage = with_open()
    stage.durable("a")
    stage.fail("b")
    stage.decide()
    assert stage.phase is JobPhase.STARTING
    assert not stage.of("open")
    assert stage.status.restore is None


def test_settling_is_bounded() -> None:
    stage = with_open()
    stage.durable()
    stage.fail("b")
    stage.until_quiet()
    assert stage.phase is JobPhase.RECOVERING
    stage.after(15.0).decide()
    assert stage.phase is JobPhase.STARTING
    assert stage.status.restore is None


def test_parts_of_a_lost_machine_are_kept_and_still_make_a_commit() -> None:
    stage = with_open()
    record = stage.opened
    stage.durable()
    stage.lose("b")
    stage.decide()
    assert [part.rank for part in stage.opened.reports] == [1]
    stage.change_leader()
    stage.until_quiet()
    assert stage.phase is JobPhase.RECOVERING
    (work,) = stage.work(VerifyCheckpoint)
    assert isinstance(work, VerifyCheckpoint)
    assert [part.rank for part in work.parts] == [0, 1]
    stage.verify()
    stage.decide()
    assert [commit.seq for commit in stage.commits] == [record.seq]


def test_next_attempt_restores_the_newest_commit() -> None:
    stage = with_open()
    commit = stage.checkpoint()
    stage.fail("a")
    stage.decide()
    stage.everyone(WorkerPhase.READY)
    stage.decide()
    assert {d.command.restore for d in stage.commands(Start)} == {stage.status.restore}
    assert stage.status.restore is not None
    assert (stage.status.restore.seq, stage.status.restore.digest) == (commit.seq, commit.digest)


def test_latest_never_moves_back() -> None:
    stage = with_open()
    record = stage.opened
    stage.durable()
    stage.verify()
    stage.write(KEYS.latest(JOB), Latest(Term(1), Seq(record.seq + 5), Step(3)))
    decision = stage.decide(sound=False)
    assert KEYS.latest(JOB) in {guard.key for guard in decision.guards}
    assert stage.of("latest")[0].value.seq == record.seq + 5
    assert [commit.seq for commit in stage.commits] == [record.seq]


def test_no_retry_storm_when_ranks_pass_the_target_forever() -> None:
    stage = running(every_steps=0)
    stage.want(token="t")
    step = 5
    for _ in range(5):
        stage.step(step)
        stage.decide()
        stage.problem("a", late=True)
        stage.decide()
        stage.forget_outcomes()
        step += 10
    assert stage.status.late_saves == 5
    stage.step(step)
    stage.decide()
    assert stage.opened.step == step + 2 * 2**5
    stage.checkpoint()
    assert stage.status.late_saves == 4


def test_checkpoint_that_cannot_be_taken_is_explained() -> None:
    stage = Stage(make_spec()).join("a", "b").run(step=5)
    stage.want(token="t")
    stage.decide()
    assert "cannot be taken: it has no store" in stage.said
    assert not stage.last.writes


# Saves that scripts ask for -------------------------------------------------------------


def saving(stage: Stage, **steps: int | None) -> Stage:
    """The ranks of these members stand at step 20 and save a step, or none."""
    for name, step in steps.items():
        wish = None if step is None else Step(step)
        stage.report(name, WorkerPhase.TRAINING, lambda r, w=wish: replace(r, step=Step(20), save_at=w))  # type: ignore[misc]
    return stage


def test_a_save_of_the_script_opens_exactly_its_step_even_where_nothing_is_due() -> None:
    stage = saving(running(every_steps=0), a=20, b=20)
    stage.decide()
    assert (stage.opened.step, stage.opened.asked) == (20, True)
    assert stage.receivers(BeginCheckpoint) == ["a", "b"]
    command = stage.commands(BeginCheckpoint)[0].command
    assert isinstance(command, BeginCheckpoint)
    assert command.asked
    stage.checkpoint()
    assert [record.step for record in stage.commits] == [20]


def test_the_first_that_asks_starts_the_clock_for_the_others() -> None:
    stage = saving(running(every_steps=0), a=20, b=None)
    stage.decide()
    stage.accept()
    stage.after(stage.opened.timeout_s - 1.0).decide()
    assert stage.of("open")
    stage.after(2.0).decide()
    assert not stage.of("open")
    command = stage.commands(AbortCheckpoint)[0].command
    assert isinstance(command, AbortCheckpoint)
    assert "ranks 0 asked for step 20, ranks 1 asked for none (at step 20)" in command.why
    assert stage.status.late_saves == 0


def test_ranks_that_save_different_steps_are_refused_by_name() -> None:
    stage = saving(running(every_steps=0), a=20, b=21)
    stage.decide()
    stage.accept()
    stage.problem("a", late=True, message="its script saves step 20")
    stage.decide()
    assert not stage.of("open")
    for directed in stage.commands(AbortCheckpoint):
        assert isinstance(directed.command, AbortCheckpoint)
        assert "ranks 0 asked for step 20, ranks 1 asked for step 21" in directed.command.why
    # No slack would help: the step is the script's.
    assert stage.status.late_saves == 0


def test_a_checkpoint_that_waits_for_a_later_step_makes_way() -> None:
    stage = with_open()
    stage.accept()
    saving(stage, a=9, b=9)
    stage.decide()
    assert not stage.of("open")
    assert stage.status.failed_saves == 0
    stage.forget_outcomes()
    stage.decide()
    assert (stage.opened.seq, stage.opened.step, stage.opened.asked) == (2, 9, True)


def test_a_checkpoint_that_is_being_stored_is_followed_to_its_end_first() -> None:
    stage = with_open()
    stage.step(10)
    stage.durable("a")
    saving(stage, a=11, b=11)
    stage.decide()
    assert stage.opened.seq == 1
    stage.durable("b")
    stage.decide()
    stage.verify()
    stage.decide()
    assert [record.seq for record in stage.commits] == [1]
    stage.decide()
    assert not stage.of("open")  # agents have not heard of it: what they show may be answered by it
    stage.forget_outcomes()
    stage.decide()
    assert (stage.opened.seq, stage.opened.step) == (2, 11)


def test_a_save_is_not_delayed_by_earlier_failures_and_answers_the_operator_too() -> None:
    stage = running(every_steps=0)
    stage.step(5)
    stage.want(token="t1")
    stage.decide()
    stage.problem("a")
    stage.decide()
    assert stage.status.failed_saves == 1
    saving(stage, a=20, b=20).decide()
    assert (stage.opened.step, stage.opened.asked, stage.opened.token) == (20, True, "t1")


def test_a_rank_without_the_sdk_does_not_leave_the_others_waiting() -> None:
    stage = saving(running(every_steps=0), a=20)
    stage.report("b", WorkerPhase.TRAINING, lambda r: replace(r, sdk=False))
    stage.decide()
    assert stage.opened.asked  # its agent says at once that it cannot take part


def test_ranks_that_have_ended_ask_for_nothing() -> None:
    stage = saving(running(every_steps=0), a=20, b=20)
    stage.everyone(WorkerPhase.DONE, lambda r: replace(r, exit_code=0))
    stage.decide()
    assert not stage.of("open")


def test_a_new_leader_goes_on_with_what_the_script_saves() -> None:
    stage = saving(running(every_steps=0), a=20, b=20)
    stage.decide()
    stage.accept()
    stage.change_leader()
    stage.decide()
    assert stage.opened.asked
    stage.durable()
    stage.decide()
    stage.verify()
    stage.decide()
    assert [record.step for record in stage.commits] == [20]
