"""Told to end: what an agent waits for, and for how long at most."""

from dataclasses import replace

import pytest

from dtrain.agent.core.decisions import PublishDraining
from dtrain.agent.core.draining import ANSWER_SHARE
from dtrain.agent.core.events import DrainAsked, SessionSeen
from dtrain.agent.core.state import LinkState
from dtrain.agent.launching import Cleared
from dtrain.agent.transferring import Uploaded
from dtrain.protocol.ids import Attempt
from dtrain.protocol.ranklink import Begin
from dtrain.protocol.snapshot import Draining, WorkerPhase

from .core_builder import Table, part, sealed

GRACE_S = 60.0
SINCE = "2026-01-01T00:00:00Z"


def drained(table: Table, *, ago_s: float = 0.0) -> Table:
    table.feed(DrainAsked("SIGTERM", table.now - ago_s, SINCE, GRACE_S))
    return table


def over(table: Table) -> str:
    assert table.state.drain is not None
    return table.state.drain.over


def test_it_says_so_once_and_goes_on() -> None:
    table = drained(Table().training())
    assert table.wanted(PublishDraining) == [PublishDraining(Draining("SIGTERM", SINCE, GRACE_S))]
    assert not over(table)
    assert table.job.phase is WorkerPhase.TRAINING
    assert not table.launcher_orders()
    drained(table)
    assert not table.wanted(PublishDraining)


def test_a_machine_without_ranks_has_nothing_to_wait_for() -> None:
    assert "no ranks" in over(drained(Table()))


def test_ranks_that_are_done_are_not_waited_for() -> None:
    table = Table().training()
    for rank in range(table.nproc):
        table.ended(rank, 0)
    assert table.job.phase is WorkerPhase.DONE
    assert "no ranks" in over(drained(table))


@pytest.mark.parametrize("way", ["prepared", "forked", "training"])
def test_an_attempt_that_is_here_in_any_form_is_waited_for(way: str) -> None:
    table = Table()
    getattr(table, way)()
    assert not over(drained(table))


def test_the_wait_is_over_when_the_leader_has_moved_the_job() -> None:
    table = drained(Table().training())
    table.command(table.stop(grace_s=5.0))
    assert not over(table)
    for rank in range(table.nproc):
        table.ended(rank, -15)
    table.report(Cleared(Attempt(2)))
    assert table.job.phase is WorkerPhase.IDLE
    assert "no ranks" in over(table)


def test_without_a_leader_the_wait_is_a_share_of_the_grace() -> None:
    table = drained(Table().training())
    table.tick(ANSWER_SHARE * GRACE_S - 0.1)
    assert not over(table)
    assert table.last.wake_at is not None
    table.tick(0.2)
    assert "no coordinator" in over(table)


def test_any_command_shows_that_there_is_a_leader() -> None:
    table = drained(Table().training())
    table.tick(15.0)
    table.command(table.confirm())
    table.tick(15.0)
    assert not over(table)
    table.tick(6.0)
    assert "no coordinator" in over(table)


def test_a_leader_that_has_answered_is_trusted_for_the_whole_grace() -> None:
    table = drained(Table().training())
    table.command(replace(table.begin(), hold_s=54.0))
    assert table.messages(Begin)[0].hold_s == 54.0
    table.tick(GRACE_S - 0.1)
    assert not over(table)
    table.tick(0.2)
    assert "grace of 60 s" in over(table)


def test_an_upload_under_way_is_no_silence_of_the_leader() -> None:
    table = Table().training()
    table.command(table.begin())
    for connection in (1, 2):
        table.rank_report(connection, at=10, sealed=sealed())
    drained(table)
    for _ in range(5):
        table.tick(10.0)
        assert not over(table)
    for rank in range(table.nproc):
        table.transfer(Uploaded(table.job.name, part(rank)))
    table.tick(9.0)
    assert not over(table)
    table.tick(2.0)
    assert over(table)


def test_a_machine_that_is_cut_off_from_etcd_waits_for_nobody() -> None:
    table = drained(Table().training())
    table.feed(SessionSeen(1, 10.0, table.now - 1.0))
    table.now += 2.0
    table.feed(SessionSeen(1, 10.0, table.now - 3.0))
    assert "etcd" in over(table)


def test_nothing_new_is_prepared_and_what_is_here_may_go_on() -> None:
    table = drained(Table().prepared())
    assert table.last.actions
    answer = table.command(table.prepare(2)).answer
    assert answer is not None
    assert (answer.accepted, answer.message) == (False, "this agent is draining")
    assert table.job.attempt == 1
    answer = table.command(table.start()).answer
    assert answer is not None
    assert answer.accepted


def test_a_successor_counts_from_when_the_former_life_was_told() -> None:
    table = drained(Table().training(), ago_s=GRACE_S - 5.0)
    table.command(replace(table.begin(), hold_s=5.0))
    table.tick(4.0)
    assert not over(table)
    table.tick(1.1)
    assert "grace" in over(table)


def test_a_rank_that_connects_again_is_told_to_hold_again() -> None:
    table = Table().training()
    table.command(replace(table.begin(), hold_s=9.0))
    table.hello(0)
    assert table.messages(Begin) == [Begin(*_begin(), hold_s=9.0)]


def _begin() -> tuple[int, str, int]:
    return 1, "n1", 10


def test_a_wish_with_less_time_shortens_the_first_one_and_one_with_more_changes_nothing() -> None:
    table = drained(Table().training())
    table.tick(10.0)
    table.feed(DrainAsked("AWS: terminate", table.now, "2026-01-01T00:00:10Z", 20.0))
    assert table.wanted(PublishDraining) == [PublishDraining(Draining("AWS: terminate", SINCE, 30.0))]
    table.feed(DrainAsked("SIGTERM", table.now, "2026-01-01T00:00:10Z", GRACE_S))
    assert not table.wanted(PublishDraining)
    table.command(replace(table.begin(), hold_s=18.0))
    table.tick(19.9)
    assert not over(table)
    table.tick(0.2)
    assert "grace of 30 s" in over(table)


def test_ranks_on_a_machine_that_goes_are_not_ended_before_it_does() -> None:
    table = Table().training()
    table.feed(DrainAsked("AWS: terminate", table.now, SINCE, GRACE_S, stays=True))
    table.tick(GRACE_S / 2)
    table.feed(SessionSeen(1, 10.0, table.now - 1.0))
    table.now += 2.0
    table.feed(SessionSeen(1, 10.0, table.now - 3.0))
    assert table.state.link.state is LinkState.ISOLATED
    assert not over(table), "a leader may be found, or etcd be reached, until the machine goes"
    table.tick(GRACE_S / 2)
    assert "grace of 60 s" in over(table)


def test_an_agent_that_is_told_to_end_after_a_notice_waits_for_nobody_s_answer() -> None:
    table = Table().training()
    table.feed(DrainAsked("AWS: terminate", table.now, SINCE, GRACE_S, stays=True))
    table.tick(25.0)
    table.feed(DrainAsked("SIGTERM", table.now, SINCE, 90.0))
    assert not table.wanted(PublishDraining)
    table.tick(ANSWER_SHARE * GRACE_S - 0.1)
    assert not over(table)
    table.tick(0.2)
    assert "no coordinator" in over(table)
