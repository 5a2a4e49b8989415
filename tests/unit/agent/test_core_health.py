"""Processes that SIGKILL does not end."""

from dtrain.agent.core.decisions import EnsureLauncher, ProbeProcesses, PublishHealth
from dtrain.agent.core.events import LauncherStarted, ProcessesProbed
from dtrain.agent.core.health import STUCK_AFTER_S
from dtrain.agent.launching import Cleared, LauncherEnded, LauncherState, ProcessId, Unkilled
from dtrain.protocol.ids import Attempt, Rank, Uid
from dtrain.protocol.snapshot import FailureKind, StuckProcess, WorkerPhase

from .core_builder import JOB, Table

STUCK = ProcessId(201, 1, "boot")
SENTENCE = (
    "rank 1 (pid 201) on node-a cannot be killed: it waits in the kernel (nfs_wait_bit); "
    "is a device or NFS hung?"
)


def probed(table: Table, *alive: ProcessId, waits_in: str = "nfs_wait_bit") -> None:
    table.feed(ProcessesProbed(JOB, Uid("u1"), alive, (waits_in,) * len(alive)))


def health(table: Table) -> list[str]:
    return [action.problem for action in table.wanted(PublishHealth)]


def stuck() -> Table:
    """A rank of attempt 1 that the launcher could not kill for attempt 2."""
    table = Table().training()
    table.command(table.prepare(2))
    table.report(Cleared(Attempt(2), (STUCK.pid,), (Unkilled(STUCK, Rank(1)),)))
    return table


def test_a_rank_that_cannot_be_killed_ends_the_new_attempt_here_at_once() -> None:
    table = stuck()
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert table.snapshot.failure is not None
    assert table.snapshot.failure.kind is FailureKind.UNKILLABLE
    assert table.snapshot.stuck == (StuckProcess(201, Rank(1)),)


def test_the_kernel_function_is_named_once_it_is_known() -> None:
    table = stuck()
    table.tick(2.0)
    assert [probe.processes for probe in table.wanted(ProbeProcesses)] == [(STUCK,)]
    probed(table, STUCK)
    assert table.snapshot.stuck == (StuckProcess(201, Rank(1), "nfs_wait_bit"),)
    assert health(table) == [f"job train: {SENTENCE}"]


def test_the_machine_is_blocked_before_the_leader_learns_that_the_attempt_is_over() -> None:
    table = stuck()
    kinds = [type(action).__name__ for action in table.last.actions]
    assert kinds.index("PublishHealth") < kinds.index("WriteSnapshot")


def test_where_it_waits_is_not_written_again_each_time_it_changes() -> None:
    table = stuck()
    probed(table, STUCK)
    probed(table, STUCK, waits_in="something_else")
    assert table.last.actions == ()


def test_the_machine_is_free_again_once_the_process_is_gone() -> None:
    table = stuck()
    probed(table, STUCK)
    probed(table)
    assert table.snapshot.stuck == ()
    assert health(table) == [""]
    assert table.job.leftovers == ()


def test_a_process_is_looked_for_rarely_once_it_is_given_up_on() -> None:
    table = stuck()
    table.tick()
    assert table.last.wake_at == table.now + 2.0


def test_no_rank_is_started_beside_a_process_that_lives() -> None:
    table = stuck()
    table.command(table.prepare(3))
    table.report(Cleared(Attempt(3), (STUCK.pid,), (Unkilled(STUCK, Rank(1)),)))
    assert table.snapshot.phase is WorkerPhase.ERROR
    probed(table)
    table.command(table.prepare(4))
    table.prepared(4)
    assert table.snapshot.phase is WorkerPhase.READY


def test_what_a_dead_launcher_leaves_is_given_time_and_then_named() -> None:
    table = Table(serve_store=False).training()
    table.report(LauncherEnded(-9))
    table.command(table.prepare(2))
    (wanted,) = table.wanted(EnsureLauncher)
    assert wanted.job == JOB
    table.feed(LauncherStarted(JOB, Uid("u1"), ProcessId(300, 1, "boot")))
    table.report(LauncherState(ProcessId(300, 1, "boot"), ready=True))
    table.report(Cleared(Attempt(2)))
    probed(table, STUCK)
    assert table.snapshot.phase is WorkerPhase.STARTING
    assert health(table) == []
    table.now += STUCK_AFTER_S
    probed(table, STUCK)
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert table.snapshot.failure is not None
    assert table.snapshot.failure.message == SENTENCE


def test_a_job_that_is_released_stays_known_until_nothing_of_it_lives() -> None:
    table = stuck()
    table.command(table.stop(2, release=True))
    table.report(LauncherEnded(0))
    assert JOB in table.state.jobs
    probed(table)
    assert JOB not in table.state.jobs
    assert health(table) == [""]


def test_a_launcher_of_an_older_version_names_pids_alone() -> None:
    table = Table().training()
    table.command(table.prepare(2))
    table.report(Cleared(Attempt(2), (4711,)))
    assert table.snapshot.failure is not None
    assert "pid 4711" in table.snapshot.failure.message


def test_a_restarted_agent_finds_out_anew() -> None:
    table = stuck()
    table.restart()
    assert table.job.leftovers == (STUCK,)
    probed(table, STUCK)
    table.now += STUCK_AFTER_S
    probed(table, STUCK)
    assert [one.pid for one in table.snapshot.stuck] == [STUCK.pid]
