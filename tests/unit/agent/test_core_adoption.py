"""A restarted agent finds its jobs again."""

from dtrain.agent.launching import (
    ClearBelow,
    ForkRanks,
    LauncherEnded,
    LauncherState,
    Quit,
    ServeStore,
    SignalRanks,
)
from dtrain.agent.transferring import Upload
from dtrain.protocol.ids import Attempt
from dtrain.protocol.ranklink import Begin
from dtrain.protocol.snapshot import WorkerPhase

from .core_builder import LAUNCHER, Table, part, sealed


def test_a_restarted_agent_converges_to_the_same_phase_under_its_new_incarnation() -> None:
    table = Table().training()
    table.restart()
    assert table.snapshot.phase is WorkerPhase.TRAINING
    table.report(LauncherState(LAUNCHER, True, table.live()))
    for rank in range(2):
        table.rank_report(table.hello(rank), at=40)
    assert table.snapshot.phase is WorkerPhase.TRAINING
    assert table.snapshot.incarnation == "life-2"
    assert [rank.step for rank in table.snapshot.ranks] == [40, 40]
    assert table.snapshot.restored


def test_a_known_command_is_still_known_after_a_restart() -> None:
    table = Table().training()
    table.restart()
    table.command(table.start())
    assert table.last.answer is not None
    assert table.last.answer.accepted
    assert not table.launcher_orders()


def test_ranks_that_ended_meanwhile_are_seen() -> None:
    table = Table().training()
    table.restart()
    table.report(LauncherState(LAUNCHER, True, table.live()))
    table.ended(0, 3)
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert SignalRanks(Attempt(1), 9) in table.launcher_orders()


def test_without_its_launcher_the_attempt_is_over() -> None:
    table = Table().training()
    table.restart()
    table.report(LauncherEnded(None))
    assert table.snapshot.phase is WorkerPhase.ERROR


def test_orders_lost_between_journal_and_launcher_are_given_again() -> None:
    table = Table()
    table.command(table.prepare())
    from dtrain.agent.core.events import LauncherStarted

    from .core_builder import JOB

    table.feed(LauncherStarted(JOB, table.job.uid, LAUNCHER))
    table.restart()
    table.report(LauncherState(LAUNCHER, True))
    assert [type(order) for order in table.launcher_orders()] == [ClearBelow, ServeStore]


def test_a_fork_lost_between_journal_and_launcher_is_ordered_again() -> None:
    table = Table().prepared()
    table.command(table.start())
    table.restart()
    table.report(LauncherState(LAUNCHER, True))
    assert [type(order) for order in table.launcher_orders()] == [ForkRanks]


def test_a_stop_under_way_is_carried_on() -> None:
    table = Table().training()
    table.command(table.stop(release=True))
    table.restart()
    table.report(LauncherState(LAUNCHER, True, table.live()))
    assert table.launcher_orders() == [Quit(0.0)]


def test_a_checkpoint_in_flight_goes_on() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.restart()
    table.report(LauncherState(LAUNCHER, True, table.live()))
    assert [type(order) for order in table.transfer_orders()] == [Upload]
    table.hello(1)
    assert len(table.messages(Begin)) == 1
    assert table.snapshot.saving == (1,)


def test_a_durable_part_is_not_uploaded_twice() -> None:
    from dtrain.agent.transferring import Uploaded

    from .core_builder import JOB

    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.transfer(Uploaded(JOB, part(0)))
    table.restart()
    table.tick()
    assert not table.transfer_orders()
    assert table.snapshot.durable == (part(0),)
