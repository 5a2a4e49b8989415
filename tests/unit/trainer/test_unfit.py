"""A state that a number speaks against is no checkpoint, by whatever path."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.trainer.fake_agent import FakeAgent

from dtrain import trainer
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Seq, Step
from dtrain.protocol.ranklink import Begin, Outcome, Sealed, Welcome
from dtrain.trainer.numbers import STEPS_KEPT, Unfit
from dtrain.trainer.session import Session

NAN = ("loss",)


@pytest.fixture
def session() -> Session:
    session = Session(0, lambda: None)
    session.handle(Welcome(True, True, save_timeout_s=30.0, finite=("loss",)))
    session.restored(10)
    return session


def begin(seq: int, step: int, *, asked: bool = False) -> Begin:
    return Begin(Seq(seq), "n", Step(step), asked=asked)


def sealed(seq: int, step: int) -> Sealed:
    return Sealed(Seq(seq), "n", Step(step), "/p", 0, 1, 1, 1)


def refused(session: Session, seq: int) -> bool:
    report = session.report()
    problem = report.problem
    return problem is not None and problem.seq == seq and problem.unfit and not problem.late


def test_a_step_after_which_a_number_is_not_finite_is_not_even_copied(session: Session) -> None:
    session.handle(begin(1, 11))
    session.set_nonfinite(NAN, NAN)
    assert session.complete(11) is None
    assert refused(session, 1)
    problem = session.report().problem
    assert problem is not None
    assert problem.message == "loss is not finite at step 11"


def test_once_it_is_finite_again_snapshots_are_taken(session: Session) -> None:
    session.set_nonfinite(NAN, NAN)
    session.complete(11)
    session.set_nonfinite((), ())
    session.handle(begin(1, 12))
    assert session.complete(12) == begin(1, 12)
    session.keep(sealed(1, 12))
    assert session.report().sealed == sealed(1, 12)
    assert session.report().nonfinite == ()
    assert session.report().nonfinite_seen == {"loss": 10}


def test_a_copy_that_was_made_all_the_same_is_not_handed_on(session: Session) -> None:
    session.handle(begin(1, 11))
    assert session.complete(11) is not None
    session.set_nonfinite(NAN, NAN)  # reported between the boundary and the seal
    session.keep(sealed(1, 11))
    assert session.report().sealed is None
    assert refused(session, 1)


def test_a_number_computed_from_what_was_just_sealed_withdraws_it(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.keep(sealed(1, 11))
    session.set_nonfinite(NAN, NAN)
    assert refused(session, 1)
    assert session.report().sealed == sealed(1, 11)  # its slot is read until the outcome comes
    session.handle(Outcome(Seq(1), committed=False, final=False))
    assert session.report().sealed is None
    assert session.report().problem is None


def test_one_of_a_later_step_does_not(session: Session) -> None:
    session.handle(begin(1, 11))
    session.complete(11)
    session.keep(sealed(1, 11))
    session.complete(12)
    session.set_nonfinite(NAN, NAN)
    assert session.report().problem is None


def test_a_copy_that_ends_behind_training_counts_for_the_step_it_was_taken_at(session: Session) -> None:
    session.handle(begin(1, 11))
    order = session.complete(11)
    assert order is not None
    session.taking(order)
    session.set_nonfinite(NAN, NAN)
    session.set_nonfinite((), ())
    session.complete(12)
    session.keep(sealed(1, 11))
    assert refused(session, 1)
    assert session.report().sealed is None


def test_other_numbers_forbid_nothing(session: Session) -> None:
    session.set_nonfinite(("norm",), ("norm",))
    session.handle(begin(1, 11))
    assert session.complete(11) is not None
    assert session.report().nonfinite == ("norm",)


def test_the_end_of_training_is_no_exception(session: Session) -> None:
    session.set_nonfinite(NAN, NAN)
    session.complete(11)
    done = threading.Thread(target=session.await_end, args=(11,))
    done.start()
    session.handle(begin(1, 11))
    while not refused(session, 1):
        pass
    session.handle(Outcome(Seq(1), committed=False, final=True))
    done.join(10)
    assert not done.is_alive()


def test_the_book_of_steps_is_bounded() -> None:
    unfit = Unfit()
    for step in range(2 * STEPS_KEPT):
        unfit.report(NAN, NAN, step)
    assert unfit.against(2 * STEPS_KEPT - 1, NAN)
    assert not unfit.against(STEPS_KEPT - 2, NAN)


def test_a_script_that_saves_such_a_state_is_told_so(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        agent.finite = ("loss",)
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for step in run.steps(3):
            run.report(loss=float("nan") if step == 1 else 1.0)
            if step == 1:
                with pytest.raises(Refused, match="loss is not finite at step 2") as caught:
                    run.save(2)
                assert caught.value.code is ErrorCode.CHECKPOINT_ABORTED
    assert [fetch.step for fetch in agent.committed] == [3]


def test_only_the_same_number_takes_it_back(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        agent.finite = ("loss",)
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for step in run.steps(3):
            if step == 0:
                run.report(loss=float("nan"), lr=0.1)
            if step == 1:
                run.report(lr=0.1)
                with pytest.raises(Refused, match="loss is not finite at step 2"):
                    run.save(2)
            if step == 2:
                run.report(loss=1.0)
    assert [fetch.step for fetch in agent.committed] == [3]


def test_sections_are_shown_while_they_last_and_are_signs_of_life(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for _ in run.steps(1):
            with run.section("evaluate"):
                beats = agent.wait_report(lambda report: report.section == "evaluate").beats
            last = agent.wait_report(lambda report: not report.section and report.beats > 1)
            assert last.beats > beats


def test_waiting_for_data_is_no_section_in_which_no_step_is_expected(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for step in run.steps(20):
            with run.section("data"):
                time.sleep(0.01)
            if step == 19:
                found = agent.wait_report(lambda report: report.timing is not None)
        assert not any(report.section for report in agent.reports)
        assert found.timing is not None
        assert found.timing.data_s >= 0.01


def test_what_dcp_saves_is_judged_by_the_step_it_was_taken_at(session: Session) -> None:
    session.handle(begin(1, 11, asked=True))
    session.intend(11)
    session.complete(11)
    session.set_nonfinite(NAN, NAN)  # computed from it, while the save goes on behind training
    session.complete(12)
    ask = session.request(11)
    order = session.granted(ask)
    assert order is not None
    session.keep(sealed(1, 11))
    assert refused(session, 1)
    assert session.report().sealed is None
