"""A spare machine: a launcher is kept ready, and the next attempt finds it."""

from dataclasses import replace

from dtrain.agent.core.decisions import EnsureLauncher
from dtrain.agent.core.events import DrainAsked, LauncherStarted
from dtrain.agent.core.warming import AGAIN_S
from dtrain.agent.launching import ClearBelow, Cleared, LauncherEnded, LauncherReady, LauncherState, Quit
from dtrain.protocol.commands import Warm
from dtrain.protocol.ids import Attempt, Uid
from dtrain.protocol.snapshot import WorkerPhase

from .core_builder import JOB, LAUNCHER, Table


def order(table: Table, attempt: int = 1, uid: str = "u1") -> Warm:
    return Warm(table.head(attempt, "warm", uid=uid), table.spec(uid, preload=("numpy",)), 2)


def warmed(table: Table) -> Table:
    """Until everything is imported."""
    table.command(order(table))
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    table.report(LauncherState(LAUNCHER, ready=False))
    table.report(LauncherReady())
    return table


def accepted(table: Table) -> bool:
    assert table.last.answer is not None
    return table.last.answer.accepted


def test_a_launcher_imports_ahead_and_the_snapshot_says_when_it_is_done() -> None:
    table = Table(serve_store=False)
    table.command(order(table))
    (ensure,) = table.wanted(EnsureLauncher)
    assert (ensure.settings.preload, ensure.settings.nproc) == (("numpy",), 2)
    assert table.launcher_orders() == []
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.IDLE, False)
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    table.report(LauncherReady())
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.IDLE, True)
    assert table.written().urgent


def test_prepare_finds_the_warm_launcher_and_starts_no_other() -> None:
    table = warmed(Table(serve_store=False))
    table.command(table.prepare(2))
    assert table.wanted(EnsureLauncher) == []
    assert table.launcher_orders() == [ClearBelow(Attempt(2), 0.0)]
    table.report(Cleared(Attempt(2)))
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.READY, False)


def test_prepare_while_it_still_imports_waits_for_that_launcher() -> None:
    table = Table(serve_store=False)
    table.command(order(table))
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    table.command(table.prepare(2))
    assert table.wanted(EnsureLauncher) == []
    table.report(Cleared(Attempt(2)))
    assert table.snapshot.phase is WorkerPhase.STARTING
    table.report(LauncherReady())
    assert table.snapshot.phase is WorkerPhase.READY


def test_prepare_of_the_very_attempt_it_was_warmed_in_is_obeyed() -> None:
    """An etcd restored from a backup gives a number out again."""
    table = warmed(Table(serve_store=False))
    table.command(table.prepare(1))
    assert accepted(table)
    assert table.job.phase is WorkerPhase.STARTING


def test_it_is_refused_where_ranks_are() -> None:
    table = Table().training()
    table.command(order(table))
    assert not accepted(table)
    assert table.job.phase is WorkerPhase.TRAINING


def test_it_is_refused_beside_another_submission_while_draining_and_for_an_older_attempt() -> None:
    table = warmed(Table())
    table.command(order(table, uid="u2"))
    assert not accepted(table)
    table.command(replace(order(table), header=table.head(0, "late")))
    assert not accepted(table)
    draining = Table()
    draining.feed(DrainAsked("spot notice", draining.now, "2026-01-01T00:00:00Z", 30.0))
    draining.command(order(draining))
    assert not accepted(draining)


def test_a_late_one_does_not_bring_a_released_job_back() -> None:
    table = Table(serve_store=False).prepared(2)
    table.command(table.stop(2, release=True))
    table.report(LauncherEnded(0))
    table.command(order(table, attempt=1))
    assert not accepted(table)
    assert not table.state.jobs


def test_a_released_machine_is_warmed_again_in_the_next_attempt() -> None:
    table = warmed(Table())
    table.command(table.stop(1, release=True))
    assert table.launcher_orders() == [Quit(30.0)]
    assert not table.snapshot.warm
    table.report(LauncherEnded(0))
    assert not table.state.jobs
    table.command(order(table))
    assert not accepted(table)
    table.command(order(table, attempt=2))
    assert accepted(table)
    assert table.wanted(EnsureLauncher)


def test_ranks_that_were_stopped_leave_a_warm_launcher() -> None:
    table = Table().training()
    table.command(table.stop(1))
    table.report(Cleared(Attempt(2)))
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.IDLE, True)


def test_what_an_earlier_attempt_left_in_the_books_is_not_told_of_the_next_one() -> None:
    """A restarted agent never heard how its stopped ranks had ended."""
    table = Table().training()
    table.command(table.begin())
    table.command(table.stop(1))
    table.report(Cleared(Attempt(2)))
    table.command(order(table, attempt=3))
    assert accepted(table)
    snapshot = table.snapshot
    assert (snapshot.attempt, snapshot.ranks, snapshot.saving, snapshot.warm) == (3, (), (), True)


def test_ranks_that_failed_leave_a_warm_launcher_unless_it_is_what_failed() -> None:
    table = Table().training()
    table.ended(1, -9)
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.ERROR, True)
    table.report(LauncherEnded(-9))
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.ERROR, False)


def test_what_the_launcher_warns_of_is_shown() -> None:
    table = Table()
    table.command(order(table))
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    table.report(LauncherReady("ranks are started by exec instead of fork: mine runs 1 more thread"))
    assert table.snapshot.warning == "ranks are started by exec instead of fork: mine runs 1 more thread"


def test_a_launcher_that_ends_by_itself_is_started_again_but_not_at_once() -> None:
    table = warmed(Table())
    table.report(LauncherEnded(1, "MemoryError"))
    assert table.wanted(EnsureLauncher) == []
    assert (table.snapshot.phase, table.snapshot.warm) == (WorkerPhase.IDLE, False)
    assert "MemoryError" in table.snapshot.note
    assert table.last.wake_at == table.now + AGAIN_S
    table.tick(AGAIN_S - 1)
    assert table.wanted(EnsureLauncher) == []
    table.tick(1.0)
    assert len(table.wanted(EnsureLauncher)) == 1


def test_a_restarted_agent_takes_its_warm_launcher_up() -> None:
    table = warmed(Table())
    table.restart()
    assert not table.snapshot.warm
    table.report(LauncherState(LAUNCHER, ready=True))
    assert table.snapshot.warm


def test_a_restarted_agent_whose_warm_launcher_is_gone_starts_another() -> None:
    table = warmed(Table())
    table.restart()
    table.report(LauncherEnded(None))
    table.tick(AGAIN_S)
    assert table.wanted(EnsureLauncher)
