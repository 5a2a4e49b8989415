"""What a rank owes its agent, message by message, without socket or threads."""

import threading
from dataclasses import replace

import pytest

from dtrain.protocol.errors import ErrorCode, Refused, TimedOut
from dtrain.protocol.ids import Seq, Step
from dtrain.protocol.ranklink import Begin, Durable, Outcome, Sealed, StopRank, Welcome
from dtrain.trainer.session import Session


@pytest.fixture
def session() -> Session:
    session = Session(0, lambda: None)
    session.handle(Welcome(True, True))
    session.restored(10)
    return session


def begin(seq: int, step: int) -> Begin:
    return Begin(Seq(seq), "n", Step(step))


def sealed(seq: int, step: int) -> Sealed:
    return Sealed(Seq(seq), "n", Step(step), "/p", 0, 1, 1, 1)


def outcome(seq: int, *, final: bool = False) -> Outcome:
    return Outcome(Seq(seq), committed=True, final=final)


def test_a_snapshot_is_due_at_its_step_and_only_there(session: Session) -> None:
    session.handle(begin(1, 12))
    assert session.complete(11) is None
    assert session.complete(12) == begin(1, 12)


def test_an_order_for_a_completed_step_is_late_at_once(session: Session) -> None:
    session.handle(begin(1, 10))
    problem = session.report().problem
    assert problem is not None
    assert (problem.seq, problem.late, problem.step) == (1, True, 10)


def test_a_skipped_target_is_late_at_the_next_boundary(session: Session) -> None:
    session.handle(begin(1, 11))
    assert session.complete(12) is None
    problem = session.report().problem
    assert problem is not None
    assert problem.late


def test_repeated_messages_change_nothing(session: Session) -> None:
    session.handle(begin(1, 11))
    order = session.complete(11)
    assert order is not None
    session.handle(begin(1, 11))  # while the copy runs
    assert session.report().problem is None
    session.keep(sealed(1, 11))
    session.handle(begin(1, 11))
    assert session.report().problem is None
    session.handle(outcome(1))
    session.handle(outcome(1))
    session.handle(begin(1, 11))
    assert (session.report().sealed, session.report().problem) == (None, None)


def test_an_abort_during_the_copy_frees_the_slot(session: Session) -> None:
    session.handle(begin(1, 11))
    assert session.complete(11) is not None
    session.handle(outcome(1))
    session.keep(sealed(1, 11))
    assert session.report().sealed is None


def test_an_outcome_overtaken_by_the_next_order_is_in_time(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.keep(sealed(1, 11))
    session.handle(begin(2, 13))
    assert session.report().problem is None
    session.handle(outcome(1))
    session.complete(12)
    assert session.complete(13) == begin(2, 13)


def test_a_slot_whose_outcome_is_not_known_takes_no_other_snapshot(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.keep(sealed(1, 11))
    session.handle(begin(2, 12))
    assert session.complete(12) is None
    report = session.report()
    assert report.sealed == sealed(1, 11)
    assert report.problem is not None
    assert (report.problem.seq, report.problem.late) == (2, False)


def test_an_older_outcome_does_not_thaw_a_newer_snapshot(session: Session) -> None:
    session.handle(begin(2, 11))
    session.complete(11)
    session.keep(sealed(2, 11))
    session.handle(outcome(1))
    assert session.report().sealed == sealed(2, 11)


def test_the_end_waits_for_the_slot_then_seals_then_waits_for_the_final_outcome(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.keep(sealed(1, 11))
    session.handle(begin(2, 12))
    session.complete(12)  # busy: refused
    session.handle(outcome(1))
    session.handle(outcome(2))
    session.handle(begin(3, 12))  # late: 12 is completed and its end not yet announced
    problem = session.report().problem
    assert problem is not None
    assert problem.late
    session.handle(outcome(3))
    session._last_step = 12
    session.handle(begin(4, 12))
    assert session.await_end(12) == begin(4, 12)
    session.keep(sealed(4, 12))
    session.handle(outcome(4, final=True))
    assert session.await_end(12) is None
    assert session.report().phase == "DONE"


def test_a_target_beyond_the_end_is_given_up(session: Session) -> None:
    session.handle(begin(1, 20))
    session.handle(outcome(0, final=True))
    assert session.await_end(12) is None
    problem = session.report().problem
    assert problem is not None
    assert "training ended at step 12" in problem.message


def held(session: Session) -> threading.Thread:
    """A rank that has sealed checkpoint 1 and stays at its step, for half a minute at most."""
    order = replace(begin(1, 11), hold_s=30.0)
    session.handle(order)
    assert session.complete(11) == order
    session.keep(sealed(1, 11))
    thread = threading.Thread(target=lambda: session.await_outcome(Seq(1), order.hold_s), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    return thread


@pytest.mark.parametrize("end", [outcome(1), Outcome(Seq(1), False, False), StopRank("over")])
def test_a_rank_that_holds_stays_until_the_outcome_or_its_end(
    session: Session, end: Outcome | StopRank
) -> None:
    thread = held(session)
    session.handle(begin(1, 11))
    thread.join(0.1)
    assert thread.is_alive()
    session.handle(end)
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_rank_does_not_hold_for_ever(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.keep(sealed(1, 11))
    session.await_outcome(Seq(1), 0.05)
    assert session.is_held(Seq(1))


def test_a_snapshot_that_was_aborted_before_it_was_sealed_holds_nobody(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.handle(Outcome(Seq(1), False, False))
    session.keep(sealed(1, 11))
    session.await_outcome(Seq(1), 30.0)


# Saves that the script asks for --------------------------------------------------------


@pytest.fixture
def asking(session: Session) -> Session:
    session.handle(Welcome(True, True, save_timeout_s=60.0))
    return session


def asked(seq: int, step: int) -> Begin:
    return Begin(Seq(seq), "n", Step(step), asked=True)


def aborted(seq: int, why: str) -> Outcome:
    return Outcome(Seq(seq), committed=False, final=False, why=why)


def test_a_save_is_asked_for_sealed_and_answered(asking: Session) -> None:
    ask = asking.request(10)
    assert asking.report().save_at == 10
    assert asking.granted(ask) is None
    asking.handle(asked(1, 10))
    assert asking.granted(ask) == asked(1, 10)
    asking.keep(sealed(1, 10))
    assert (asking.report().sealed, asking.report().save_at) == (sealed(1, 10), 10)
    asking.handle(outcome(1))
    asking.await_answer(ask, durable=False)
    report = asking.report()
    assert (report.save_at, report.sealed, report.problem) == (None, None, None)


def test_an_aborted_save_is_refused_with_its_reason(asking: Session) -> None:
    ask = asking.request(10)
    asking.handle(asked(1, 10))
    asking.keep(sealed(1, 10))
    asking.handle(aborted(1, "the store is full"))
    with pytest.raises(Refused, match="checkpoint 1 of step 10 is aborted: the store is full") as caught:
        asking.await_answer(ask, durable=False)
    assert caught.value.code is ErrorCode.CHECKPOINT_ABORTED


def test_an_order_for_what_another_rank_saves_waits_for_this_ranks_script(asking: Session) -> None:
    asking.handle(asked(1, 11))
    assert asking.complete(11) is None  # not sealed without the script
    assert asking.report().problem is None
    assert asking.granted(asking.request(11)) == asked(1, 11)


def test_a_rank_that_passes_the_step_refuses_it_at_once(asking: Session) -> None:
    asking.handle(asked(1, 11))
    asking.complete(11)
    asking.complete(12)
    problem = asking.report().problem
    assert problem is not None
    assert "did not save step 11" in problem.message
    asking.handle(asked(2, 11))  # it is past it already
    problem = asking.report().problem
    assert problem is not None
    assert problem.seq == 2


def test_a_save_from_another_thread_may_be_behind_training(asking: Session) -> None:
    asking.intend(11)
    asking.complete(13)
    asking.handle(asked(1, 11))
    asking.complete(14)
    assert asking.report().problem is None
    assert asking.granted(asking.request(11)) == asked(1, 11)


def test_another_ranks_step_is_refused_and_its_abort_answers_the_own_save(asking: Session) -> None:
    ask = asking.request(10)
    asking.handle(asked(1, 11))
    problem = asking.report().problem
    assert problem is not None
    assert "saves step 10" in problem.message
    asking.handle(aborted(1, "ranks 0 asked for step 10, ranks 1 asked for step 11"))
    with pytest.raises(Refused, match="ranks 1 asked for step 11"):
        asking.granted(ask)
    assert asking.report().save_at is None


def test_the_outcome_of_another_checkpoint_answers_nothing_but_is_known_to_the_next_report(
    asking: Session,
) -> None:
    asking.handle(begin(1, 12))
    ask = asking.request(10)
    assert asking.report().settled == 0
    asking.handle(aborted(1, "the script saves step 10 itself"))
    assert asking.granted(ask) is None
    report = asking.report()
    assert (report.save_at, report.settled) == (10, 1)


def test_a_slot_that_is_held_is_waited_for(asking: Session) -> None:
    asking.handle(begin(1, 11))
    asking.complete(11)
    asking.keep(sealed(1, 11))
    ask = asking.request(11)
    asking.handle(asked(2, 11))
    assert asking.granted(ask) is None
    asking.handle(outcome(1))
    assert asking.granted(ask) == asked(2, 11)


def test_durable_is_told_before_committed(asking: Session) -> None:
    ask = asking.request(10)
    asking.handle(asked(1, 10))
    asking.keep(sealed(1, 10))
    ask.wants_durable = True
    assert asking.report().wants_durable == 1
    asking.handle(Durable(Seq(1)))
    asking.await_answer(ask, durable=True)
    assert asking.report().save_at == 10  # its outcome is still to come


def test_a_save_that_is_given_up_no_longer_holds_the_others(asking: Session) -> None:
    ask = asking.request(10)
    asking.handle(asked(1, 10))
    asking.withdraw(ask)
    report = asking.report()
    assert report.save_at is None
    assert report.problem is not None
    assert report.problem.seq == 1


def test_the_end_of_training_refuses_what_others_save(asking: Session) -> None:
    asking.handle(asked(1, 10))
    asking.handle(outcome(0, final=True))
    asking.await_end(10)
    problem = asking.report().problem
    assert problem is not None
    assert "training ended at step 10" in problem.message


def test_without_a_store_or_with_an_older_agent_a_save_is_refused(session: Session) -> None:
    with pytest.raises(Refused, match="older release"):
        session.ask_save(10)
    session.handle(Welcome(True, checkpoints=False, save_timeout_s=60.0))
    with pytest.raises(Refused, match="no checkpoint store"):
        session.ask_save(10)


def test_no_leader_ends_the_wait_in_bounded_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.trainer.session.ANSWER_SLACK_S", 0.0)
    session.handle(Welcome(True, True, save_timeout_s=0.05))
    with pytest.raises(TimedOut, match="no coordinator opened a checkpoint of step 10"):
        session.ask_save(10)
    assert session.report().save_at is None
