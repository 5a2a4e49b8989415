"""Cut off from etcd: states, whom to believe, and how long ranks go on."""

from dataclasses import replace
from typing import Any

import pytest

from dtrain.agent.core.events import (
    Consulted,
    CoordinatorsRead,
    RankReported,
    ReplicaAnswer,
    SessionSeen,
    Standing,
)
from dtrain.agent.core.isolation import GRACE_S_LEAST, STALE_S, grace_s, to_ask
from dtrain.agent.core.state import JobState, LinkState, Pace, Scope
from dtrain.agent.launching import ClearBelow, Cleared, Quit
from dtrain.protocol.ids import Attempt, Rank, Seq, Step, Uid
from dtrain.protocol.job import CheckpointPolicy
from dtrain.protocol.ranklink import Report, StopRank
from dtrain.protocol.snapshot import FailureKind, WorkerPhase

from .core_builder import JOB, Table, sealed

TTL_S = 10.0
GRACE_S = 200.0


class Machine(Table):
    """A table whose guardian renewed the lease for the last time when ``lose_etcd`` was called."""

    def __init__(self, grace: float = GRACE_S, **more: Any) -> None:
        super().__init__(**more)
        self.grace = grace
        self.deadline = float("inf")

    def spec(self, uid: str = "u1", **more: Any) -> Any:
        return super().spec(uid, **{"isolation_grace_s": self.grace, "shutdown_grace_s": 30.0, **more})

    def see(self, seconds: float = 0.0, *, lease: int = 1, deadline: float | None = None) -> LinkState:
        """Time passes, then the guardian's page is read."""
        self.now += seconds
        until = self.deadline if deadline is None else deadline
        self.feed(SessionSeen(lease, TTL_S, until))
        return self.state.link.state

    def lose_etcd(self) -> None:
        self.deadline = self.now + 0.7 * TTL_S

    def isolated(self) -> "Machine":
        self.training()
        self.lose_etcd()
        self.see(6.0)
        assert self.see(1.5) is LinkState.ISOLATED
        return self

    def steps(self, first: int, last: int, each_s: float) -> None:
        """All ranks complete these steps, reporting each."""
        for at in range(first, last + 1):
            self.now += each_s
            for rank in range(self.nproc):
                self.rank_report(rank + 1, at=at)

    def hear(self, *answers: ReplicaAnswer) -> None:
        self.feed(Consulted(answers))

    @property
    def ending(self) -> bool:
        return self.job.stopping is not None


def answer(
    age_s: float = 1.0, *, attempt: int = 1, current: bool = True, member: bool = True, uid: str = "u1"
) -> ReplicaAnswer:
    standing = Standing(JOB, Uid(uid), Attempt(1), current, Attempt(attempt), member)
    return ReplicaAnswer(age_s, (standing,))


# States ---------------------------------------------------------------------------------


def test_a_machine_whose_renewals_fail_is_suspect_then_isolated() -> None:
    table = Machine().training()
    table.lose_etcd()
    assert table.see(5.0) is LinkState.OK
    assert table.see(0.6) is LinkState.SUSPECT
    assert table.see(1.3) is LinkState.SUSPECT
    assert table.see(0.2) is LinkState.ISOLATED
    assert table.job.phase is WorkerPhase.TRAINING
    assert not table.ending


def test_a_renewal_in_time_ends_the_suspicion() -> None:
    table = Machine().training()
    table.lose_etcd()
    assert table.see(6.0) is LinkState.SUSPECT
    table.lose_etcd()
    assert table.see() is LinkState.OK
    assert table.job.note == ""


def test_a_lease_that_is_lost_and_replaced_at_once_isolates_nobody() -> None:
    table = Machine().training()
    assert table.see(0.1, deadline=0.0) is LinkState.SUSPECT
    assert table.see(1.0, deadline=0.0) is LinkState.SUSPECT
    assert table.see(0.1, deadline=table.now + 7.0) is LinkState.OK


def test_a_lease_that_is_lost_and_not_replaced_isolates() -> None:
    table = Machine().training()
    table.see(0.1, deadline=0.0)
    assert table.see(1.6, deadline=0.0) is LinkState.ISOLATED


def test_a_machine_that_was_suspended_first_gets_to_try_again() -> None:
    table = Machine().training()
    table.lose_etcd()
    # The clock counts the sleep: the deadline is long past when the agent looks again.
    assert table.see(3600.0) is LinkState.SUSPECT
    assert not table.ending
    table.lose_etcd()
    assert table.see(0.5) is LinkState.OK
    assert table.job.phase is WorkerPhase.TRAINING


def test_a_machine_that_comes_back_goes_on_and_says_for_how_long_it_was_away() -> None:
    table = Machine().isolated()
    table.now += 42.0
    table.lose_etcd()
    assert table.see() is LinkState.OK
    assert table.job.phase is WorkerPhase.TRAINING
    assert "44 s; the ranks went on" in table.snapshot.note
    assert not table.launcher_orders()


def test_an_agent_without_ranks_ends_nothing() -> None:
    table = Machine().prepared()
    table.lose_etcd()
    table.see(6.0)
    table.see(3600.0)
    table.tick(GRACE_S)
    assert table.job.phase is WorkerPhase.READY
    assert to_ask(table.state) == ()


# The grace ------------------------------------------------------------------------------


def test_ranks_go_on_within_the_grace_and_are_ended_in_order_after_it() -> None:
    table = Machine().isolated()
    over_at = table.deadline + GRACE_S
    table.tick(over_at - table.now - 0.1)
    assert not table.ending
    table.tick(0.2)
    assert [order for order in table.launcher_orders() if isinstance(order, ClearBelow)] == [
        ClearBelow(Attempt(2), 30.0)
    ]
    assert table.messages(StopRank)
    assert "isolation_grace" in table.snapshot.note
    table.report(Cleared(Attempt(2)))
    assert table.snapshot.phase is WorkerPhase.IDLE
    assert table.snapshot.failure is None


def test_ranks_that_a_leader_starts_during_an_isolation_get_a_grace_of_their_own() -> None:
    """etcd is back, and its leader is faster than this machine's guardian."""
    table = Machine().isolated()
    table.tick(GRACE_S)
    table.report(Cleared(Attempt(2)))
    table.training(2)
    assert table.state.link.state is LinkState.ISOLATED
    assert not table.ending
    table.tick(GRACE_S - 0.1)
    assert not table.ending
    table.tick(0.2)
    assert table.ending


def test_the_grace_ends_by_the_clock_alone() -> None:
    table = Machine().isolated()
    assert table.last.wake_at == pytest.approx(table.deadline + GRACE_S)


def test_a_sealed_snapshot_outlives_the_ranks_of_an_isolated_machine() -> None:
    table = Machine().training()
    table.command(table.begin(1))
    table.rank_report(1, at=10, sealed=sealed())
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.tick(GRACE_S)
    assert table.ending
    table.report(Cleared(Attempt(2)))
    assert not any(isinstance(order, Quit) for order in table.launcher_orders())
    assert [one.seq for one in table.job.saving] == [Seq(1)]
    assert table.job.rank(Rank(0)).sealed is not None  # type: ignore[union-attr]


def test_an_agent_that_restarts_does_not_start_the_grace_anew() -> None:
    table = Machine().isolated()
    table.now += 150.0
    table.restart()
    table.see(0.1)
    table.see(2.0)
    assert table.state.link.since == table.deadline


def test_ranks_that_are_being_stopped_are_not_stopped_again() -> None:
    table = Machine().isolated()
    table.command(table.stop())
    table.tick(GRACE_S)
    assert "isolation_grace" not in table.job.note


@pytest.mark.parametrize(
    ("policy", "pace", "expected"),
    [
        (CheckpointPolicy(), Pace(), GRACE_S_LEAST),
        (CheckpointPolicy(every_seconds=60.0), Pace(), GRACE_S_LEAST),
        (CheckpointPolicy(every_seconds=1800.0), Pace(), 3600.0),
        (CheckpointPolicy(every_steps=1000), Pace(steps=10, seconds=20.0), 4000.0),
        (CheckpointPolicy(every_steps=1000), Pace(), GRACE_S_LEAST),
        (CheckpointPolicy(every_steps=1000, every_seconds=900.0), Pace(steps=10, seconds=20.0), 1800.0),
    ],
)
def test_without_a_grace_of_its_own_a_job_gets_two_checkpoint_intervals(
    policy: CheckpointPolicy, pace: Pace, expected: float
) -> None:
    assert grace_s(Table().spec(checkpoint=policy), pace) == expected


# Silence --------------------------------------------------------------------------------


def test_isolated_ranks_that_complete_no_steps_are_ended() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 2.0)
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    entered = table.now
    table.tick(59.0)
    assert not table.ending
    table.tick(1.5)
    assert table.now - entered > 60.0
    assert table.ending
    assert "no step was completed" in table.job.note


def test_ranks_that_complete_steps_are_not_ended() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 2.0)
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.steps(6, 40, 30.0)
    assert not table.ending


def test_a_job_with_long_steps_is_given_the_time_they_take() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 50.0)
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.tick(490.0)
    assert not table.ending
    table.tick(20.0)
    assert table.ending


def test_a_rare_long_step_counts_too() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 1.0)
    table.steps(6, 6, 200.0)
    table.steps(7, 300, 1.0)
    assert table.job.pace.longest_s == pytest.approx(200.0)


def test_steps_reported_together_count_as_many() -> None:
    table = Machine().training()
    table.rank_report(1, at=10)
    table.now += 5.0
    table.rank_report(1, at=20)
    assert table.job.pace.longest_s == pytest.approx(0.5)
    assert table.job.pace.steps == 10


def test_ranks_that_wait_for_the_end_of_training_are_not_silent() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 1.0)
    for connection in (1, 2):
        table.rank_report(connection, at=5, last_step=Step(5))
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.tick(1000.0)
    assert not table.ending


def test_ranks_that_are_held_at_a_step_are_not_silent() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 1.0)
    table.command(replace(table.begin(at=5), hold_s=1e6))
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.tick(5000.0)
    assert not table.ending


def test_how_long_ranks_were_held_is_no_pace() -> None:
    table = Machine(grace=10_000.0).training()
    table.steps(1, 5, 1.0)
    longest_s = table.job.pace.longest_s
    table.command(replace(table.begin(at=5), hold_s=1e6))
    table.tick(5000.0)
    table.command(table.confirm())
    table.steps(6, 9, 1.0)
    assert table.job.pace.longest_s == longest_s


def test_ranks_that_restore_are_not_silent() -> None:
    table = Machine(grace=10_000.0).forked()
    for rank in range(2):
        table.rank_report(table.hello(rank), WorkerPhase.RESTORING)
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.tick(1000.0)
    assert not table.ending


def test_a_script_without_steps_has_the_grace_alone() -> None:
    table = Machine(grace=1000.0).forked()
    table.lose_etcd()
    table.see(6.0)
    table.see(1.5)
    table.tick(900.0)
    assert not table.ending
    table.tick(100.0)
    assert table.ending


def test_silence_counts_from_when_the_isolation_was_noticed() -> None:
    table = Machine(grace=100_000.0).training()
    table.steps(1, 5, 1.0)
    table.lose_etcd()
    # The whole machine stood still: its ranks could not complete a step either.
    table.see(7200.0)
    table.see(1.6)
    table.tick(30.0)
    assert not table.ending


def test_silence_is_no_reason_while_etcd_answers() -> None:
    table = Machine().training()
    table.steps(1, 5, 1.0)
    table.tick(10_000.0)
    assert not table.ending


# What coordinators say ------------------------------------------------------------------


@pytest.mark.parametrize("age_s", [0.5, 3600.0, -1.0])
def test_a_newer_attempt_ends_the_ranks_at_once_however_old_the_news(age_s: float) -> None:
    table = Machine().isolated()
    table.hear(answer(age_s, attempt=2))
    assert table.ending
    assert "attempt 2 has begun elsewhere" in table.job.note


@pytest.mark.parametrize(
    ("what", "why"),
    [({"current": False}, "the job is over"), ({"member": False}, "attempt 1 is over")],
)
def test_a_job_that_went_on_without_this_machine_ends_its_ranks(what: Any, why: str) -> None:
    table = Machine().isolated()
    table.hear(answer(**what))
    assert table.ending
    assert why in table.job.note


def test_a_current_attempt_goes_on() -> None:
    table = Machine().isolated()
    table.now += 10.0
    table.hear(answer(1.0), answer(2.0))
    assert not table.ending
    assert table.state.link.scope is Scope.ALONE


@pytest.mark.parametrize(("current", "attempt"), [(False, 0), (True, 0)])
def test_a_mirror_that_has_not_heard_of_the_attempt_yet_is_not_believed(current: bool, attempt: int) -> None:
    table = Machine().isolated()
    table.hear(answer(0.1, attempt=attempt, current=current, member=False))
    assert not table.ending


def test_stale_mirrors_mean_that_etcd_is_down_for_all() -> None:
    table = Machine().isolated()
    table.now += STALE_S
    table.hear(answer(STALE_S + 5), answer(-1.0))
    assert table.state.link.scope is Scope.ALL
    table.hear(answer(STALE_S + 5), answer(1.0))
    assert table.state.link.scope is Scope.ALONE


def test_a_mirror_that_last_heard_of_etcd_when_we_did_proves_nothing_yet() -> None:
    table = Machine().isolated()
    table.hear(answer(1.4))
    assert table.state.link.scope is Scope.UNKNOWN


def test_nobody_who_answers_proves_nothing() -> None:
    table = Machine().isolated()
    table.hear()
    assert table.state.link.scope is Scope.UNKNOWN
    assert not table.ending


def test_an_answer_about_an_earlier_attempt_ends_nothing() -> None:
    table = Machine().isolated()
    other = Standing(JOB, Uid("u1"), Attempt(0), True, Attempt(1), True)
    table.hear(ReplicaAnswer(1.0, (other,)))
    assert not table.ending


def test_an_answer_that_comes_when_etcd_is_back_is_left_to_the_leader() -> None:
    table = Machine().isolated()
    table.lose_etcd()
    table.see()
    table.hear(answer(attempt=2))
    assert not table.ending


def test_a_suspect_machine_believes_coordinators_too() -> None:
    table = Machine().training()
    table.lose_etcd()
    assert table.see(6.0) is LinkState.SUSPECT
    table.hear(answer(attempt=2))
    assert table.ending


# Whom to ask ----------------------------------------------------------------------------


def test_addresses_are_remembered_sorted_once_and_bounded() -> None:
    table = Machine()
    table.feed(CoordinatorsRead(("b:1", "a:1", "b:1", "", "x" * 300, *(f"n{i}:1" for i in range(50)))))
    assert table.state.coordinators[:2] == ("a:1", "b:1")
    assert len(table.state.coordinators) == 16
    assert len(table.last.journal) == 1
    table.feed(CoordinatorsRead(table.state.coordinators))
    assert table.last.journal == ()


# Endings that are not the end of training -----------------------------------------------


def test_ranks_that_are_told_to_end_and_exit_with_0_have_not_finished_training() -> None:
    table = Machine().isolated()
    table.hear(answer(attempt=2))
    table.ended(0, 0)
    table.ended(1, 0)
    assert table.snapshot.phase is not WorkerPhase.DONE
    table.report(Cleared(Attempt(2)))
    assert table.snapshot.phase is WorkerPhase.IDLE


def test_ranks_whose_peers_go_while_all_are_isolated_have_not_failed() -> None:
    table = Machine().isolated()
    error = '{"message": {"message": "RuntimeError: Connection closed by peer [10.0.0.2]:1"}}'
    table.ended(0, 1, error=error)
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert table.snapshot.failure is not None
    assert table.snapshot.failure.kind is FailureKind.ISOLATED
    # A cause of its own is still what counts.
    table.ended(1, -11)
    assert table.snapshot.failure.kind is FailureKind.SIGNAL


def test_the_pace_is_not_written_to_the_journal() -> None:
    table = Machine().training()
    table.rank_report(1, at=1)
    for step in range(2, 12):
        table.now += 1.0
        table.feed(RankReported(1, Report(WorkerPhase.TRAINING, Step(step))))
    assert table.last.journal == ()
    journaled: JobState = table.journaled[JOB]
    assert journaled.pace == Pace()
