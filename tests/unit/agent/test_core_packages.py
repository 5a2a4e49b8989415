"""A packed working directory is there before anything is started in it, and goes with the job."""

from dataclasses import replace

from dtrain.agent.core.decisions import EnsureLauncher
from dtrain.agent.core.events import LauncherStarted, TransferReported
from dtrain.agent.core.packages import UNPACK_TRIES_MAX
from dtrain.agent.core.warming import AGAIN_S
from dtrain.agent.launching import Cleared, ForkRanks, LauncherEnded, LauncherReady, LauncherState
from dtrain.agent.transferring import DropTree, TransferEnded, Unpack, Unpacked, UnpackFailed
from dtrain.protocol.commands import Prepare, Warm
from dtrain.protocol.ids import Attempt, JobName, Uid
from dtrain.protocol.package import Package
from dtrain.protocol.snapshot import FailureKind, WorkerPhase

from .core_builder import JOB, LAUNCHER, Table

PACKAGE = Package("d" * 64, "a" * 16, "s3://bucket", 100, 3, 200, "/src/digits")


def table() -> Table:
    made = Table(serve_store=False)
    made.state = replace(made.state, machine=replace(made.state.machine, tree_dir="/trees"))
    return made


def prepare(table: Table, attempt: int = 1, uid: str = "u1") -> Prepare:
    command = table.prepare(attempt, uid=uid)
    return replace(command, spec=replace(command.spec, package=PACKAGE))


def orders(table: Table) -> list[object]:
    return table.transfer_orders()


def unpacked(table: Table, uid: str = "u1") -> None:
    table.feed(TransferReported(Unpacked(JOB, Uid(uid), "/trees/x")))


def test_it_is_unpacked_first_and_ranks_start_there() -> None:
    agent = table()
    agent.command(prepare(agent))
    (order,) = orders(agent)
    assert isinstance(order, Unpack)
    assert (order.package, order.tree, order.keep) == (PACKAGE, f"{JOB}-u1", (f"{JOB}-u1",))
    assert agent.wanted(EnsureLauncher) == []
    agent.tick(1.0)
    assert orders(agent) == [], "asked once"
    unpacked(agent)
    (ensure,) = agent.wanted(EnsureLauncher)
    assert ensure.settings.working_dir == f"/trees/{JOB}-u1"
    agent.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    agent.report(LauncherState(LAUNCHER, ready=True))
    agent.report(Cleared(Attempt(1)))
    assert agent.snapshot.phase is WorkerPhase.READY
    agent.command(agent.start(1))
    (fork,) = [order for order in agent.launcher_orders() if isinstance(order, ForkRanks)]
    assert fork.working_dir == f"/trees/{JOB}-u1"


def test_the_next_attempt_finds_it_with_the_launcher_and_without() -> None:
    agent = table()
    agent.command(prepare(agent))
    unpacked(agent)
    agent.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    agent.report(LauncherReady())
    agent.command(prepare(agent, 2))
    assert orders(agent) == []
    agent.report(LauncherEnded(1))
    agent.command(prepare(agent, 3))
    assert orders(agent) == []
    assert len(agent.wanted(EnsureLauncher)) == 1


def test_a_restarted_agent_asks_again_before_it_starts_a_launcher() -> None:
    agent = table()
    agent.command(prepare(agent))
    unpacked(agent)
    agent.restart()
    assert not agent.job.unpacked
    agent.tick()
    agent.tick(1.0)
    assert agent.wanted(EnsureLauncher) == []
    unpacked(agent)
    assert len(agent.wanted(EnsureLauncher)) == 1


def test_a_damaged_package_ends_the_attempt_for_good() -> None:
    agent = table()
    agent.command(prepare(agent))
    agent.feed(TransferReported(UnpackFailed(JOB, Uid("u1"), "its SHA-256 is another", hopeless=True)))
    failure = agent.snapshot.failure
    assert failure is not None
    assert (failure.kind, failure.hopeless) == (FailureKind.PREPARE, True)
    assert "SHA-256" in failure.message
    assert agent.snapshot.phase is WorkerPhase.ERROR
    assert agent.wanted(EnsureLauncher) == []


def test_a_store_that_is_away_ends_this_attempt_and_the_next_tries_again() -> None:
    agent = table()
    agent.command(prepare(agent))
    agent.feed(TransferReported(UnpackFailed(JOB, Uid("u1"), "the store does not answer")))
    failure = agent.snapshot.failure
    assert failure is not None
    assert not failure.hopeless
    agent.command(prepare(agent, 2))
    assert len(orders(agent)) == 1


def test_an_order_that_ended_with_its_process_is_given_again_but_not_for_ever() -> None:
    agent = table()
    agent.command(prepare(agent))
    for _ in range(UNPACK_TRIES_MAX - 1):
        agent.feed(TransferReported(TransferEnded(-9)))
        assert len(orders(agent)) == 1
    agent.feed(TransferReported(TransferEnded(-9)))
    assert orders(agent) == []
    assert agent.snapshot.phase is WorkerPhase.ERROR


def test_the_report_of_an_earlier_submission_means_nothing() -> None:
    agent = table()
    agent.command(prepare(agent, uid="u0"))
    agent.command(replace(prepare(agent, 1, uid="u1")))
    assert len(orders(agent)) == 1
    unpacked(agent, uid="u0")
    assert agent.wanted(EnsureLauncher) == []
    unpacked(agent, uid="u1")
    assert len(agent.wanted(EnsureLauncher)) == 1


def test_a_spare_has_it_too_and_tries_again_later() -> None:
    agent = table()
    spec = replace(agent.spec("u1"), package=PACKAGE)
    agent.command(Warm(agent.head(1, "warm"), spec, 2))
    assert len(orders(agent)) == 1
    agent.feed(TransferReported(UnpackFailed(JOB, Uid("u1"), "the disk is full")))
    assert (agent.job.phase, agent.job.failure) == (WorkerPhase.IDLE, None)
    assert "the disk is full" in agent.job.note
    assert orders(agent) == []
    agent.tick(AGAIN_S + 1)
    assert len(orders(agent)) == 1
    unpacked(agent)
    assert len(agent.wanted(EnsureLauncher)) == 1


def test_it_goes_when_the_job_has_left_the_machine() -> None:
    agent = table()
    agent.command(prepare(agent))
    unpacked(agent)
    agent.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    agent.report(LauncherReady())
    agent.command(agent.stop(1, release=True))
    assert DropTree(f"{JOB}-u1") not in orders(agent), "the launcher still is in it"
    agent.report(LauncherEnded(0))
    assert JobName(JOB) not in agent.state.jobs
    assert orders(agent) == [DropTree(f"{JOB}-u1")]
