"""What a rank owes its agent, message by message, without socket or threads."""

import threading
from dataclasses import replace

import pytest

from dtrain.protocol.ids import Seq, Step
from dtrain.protocol.ranklink import Begin, Outcome, Sealed, StopRank, Welcome
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
