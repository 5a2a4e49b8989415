"""PREPARE to the end of an attempt, as the core decides it."""

import json
from dataclasses import replace

import pytest

from dtrain.agent.core.decisions import (
    DeleteSnapshot,
    DropConnection,
    EnsureLauncher,
    ForgetJob,
    JournalTerm,
    KillLauncher,
    WriteSnapshot,
)
from dtrain.agent.core.events import LauncherStarted, SessionRenewed
from dtrain.agent.core.fingerprint import STARTUP_S
from dtrain.agent.core.torch_env import base_env
from dtrain.agent.launching import (
    ClearBelow,
    Cleared,
    ForkRanks,
    LauncherEnded,
    LauncherReady,
    LauncherState,
    ProcessId,
    Quit,
    ServeStore,
    SignalRanks,
    StoreReady,
    Unkilled,
)
from dtrain.protocol.ids import Attempt, Incarnation, Rank, Step, Uid
from dtrain.protocol.ranklink import StopRank, Welcome
from dtrain.protocol.snapshot import FailureKind, Timing, WorkerPhase

from .core_builder import JOB, LAUNCHER, RESTORE, Table


def test_a_command_of_another_cluster_is_refused() -> None:
    table = Table()
    prepare = table.prepare()
    foreign = replace(prepare, header=replace(prepare.header, cluster="prod"))
    answer = table.command(foreign).answer
    assert answer is not None
    assert not answer.accepted
    assert not table.state.jobs


def test_a_lower_term_is_refused() -> None:
    table = Table().prepared()
    answer = table.command(table.prepare(2, term=4)).answer
    assert answer is not None
    assert not answer.accepted
    assert table.job.attempt == 1


def test_a_higher_term_is_refused_until_it_is_confirmed() -> None:
    table = Table().prepared()
    answer = table.command(table.prepare(2, term=6), confirmed=False).answer
    assert answer is not None
    assert not answer.accepted
    assert table.state.term == 5
    assert table.command(table.prepare(2, term=6)).answer == type(answer)(True)
    assert JournalTerm(6) in table.last.journal


def test_a_lower_attempt_is_refused() -> None:
    table = Table().prepared(2)
    answer = table.command(table.prepare(1)).answer
    assert answer is not None
    assert not answer.accepted


def test_a_repeated_command_is_accepted_has_no_second_effect_and_is_answered_by_a_snapshot() -> None:
    table = Table().training()
    table.command(table.prepare(1))
    assert table.last.answer is not None
    assert table.last.answer.accepted
    assert not table.last.journal
    assert [type(action) for action in table.last.actions] == [WriteSnapshot]
    assert table.written().urgent


def test_the_journal_precedes_every_effect_of_a_command() -> None:
    table = Table()
    table.command(table.prepare())
    (write,) = table.journal()
    assert write.ids == ("u1-1-prepare",)
    assert write.job.prepare is not None


def test_prepare_starts_a_launcher_clears_and_opens_the_store() -> None:
    table = Table()
    table.command(table.prepare())
    (ensure,) = table.wanted(EnsureLauncher)
    assert len(ensure.settings.folder) < 60
    assert table.launcher_orders() == [ClearBelow(Attempt(1), 0.0), ServeStore(Attempt(1), "10.0.0.1", 2)]
    assert table.job.phase is WorkerPhase.STARTING


def test_ready_needs_a_warm_launcher_a_clear_machine_and_the_store() -> None:
    table = Table()
    table.command(table.prepare())
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    table.report(LauncherState(LAUNCHER, ready=True))
    table.report(Cleared(Attempt(1)))
    assert table.snapshot.phase is WorkerPhase.STARTING
    table.report(StoreReady(Attempt(1), 29500))
    assert table.snapshot.phase is WorkerPhase.READY
    assert table.snapshot.rendezvous == "10.0.0.1:29500"
    assert table.written().urgent


@pytest.mark.parametrize("last", ["warm", "clear", "store"])
def test_ready_waits_for_whatever_comes_last(last: str) -> None:
    reports = {
        "warm": LauncherState(LAUNCHER, ready=True),
        "clear": Cleared(Attempt(1)),
        "store": StoreReady(Attempt(1), 29500),
    }
    table = Table()
    table.command(table.prepare())
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    for name, report in reports.items():
        if name != last:
            table.report(report)
    assert table.job.phase is WorkerPhase.STARTING
    table.report(reports[last])
    assert table.job.phase is WorkerPhase.READY


def test_an_old_attempts_clearing_does_not_make_a_new_one_ready() -> None:
    table = Table(serve_store=False).prepared()
    table.command(table.prepare(2))
    table.report(Cleared(Attempt(1)))
    assert table.job.phase is WorkerPhase.STARTING


def test_processes_that_cannot_be_killed_are_named() -> None:
    table = Table()
    table.command(table.prepare())
    table.report(Cleared(Attempt(1), (4711,), (Unkilled(ProcessId(4711, 9, "boot"), Rank(1)),)))
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert table.snapshot.failure is not None
    assert table.snapshot.failure.kind is FailureKind.UNKILLABLE
    assert "rank 1 (pid 4711) on node-a cannot be killed" in table.snapshot.failure.message


def test_a_store_that_cannot_be_opened_ends_the_attempt() -> None:
    table = Table()
    table.command(table.prepare())
    table.report(StoreReady(Attempt(1), 0, "no such address"))
    assert table.snapshot.failure is not None
    assert "no such address" in table.snapshot.failure.message


def test_a_frozen_launcher_is_killed_and_another_one_prepares() -> None:
    table = Table().prepared()
    table.command(table.prepare(2))
    assert table.last.wake_at is not None
    table.tick(31)
    assert [kill.process for kill in table.wanted(KillLauncher)] == [LAUNCHER]
    table.report(LauncherEnded(-9))
    assert table.job.phase is WorkerPhase.STARTING
    assert table.wanted(EnsureLauncher)


def test_start_before_ready_is_refused() -> None:
    table = Table()
    table.command(table.prepare())
    answer = table.command(table.start()).answer
    assert answer is not None
    assert not answer.accepted


def test_start_forks_ranks_with_torchruns_environment() -> None:
    table = Table().prepared()
    table.command(table.start())
    (fork,) = [order for order in table.launcher_orders() if isinstance(order, ForkRanks)]
    env = fork.ranks[1].env
    assert env["RANK"] == "1"
    assert env["LOCAL_RANK"] == "1"
    assert env["WORLD_SIZE"] == "2"
    assert env["LOCAL_WORLD_SIZE"] == "2"
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "29500")
    assert env["TORCHELASTIC_RUN_ID"] == "train-u1"
    assert env["TORCHELASTIC_RESTART_COUNT"] == "0"
    assert env["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert env["TORCHELASTIC_ERROR_FILE"] == "/logs/train-u1/attempt_1/1/error.json"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["DTRAIN_AGENT_SOCKET"] == "/run/ranks.sock"
    assert "secret" not in env.values()
    assert table.snapshot.phase is WorkerPhase.RESTORING


def test_a_machine_may_have_another_number_of_ranks_than_others() -> None:
    table = Table()
    prepare = replace(table.prepare(), nproc=3, first_rank=Rank(4), world_size=7, node_rank=1, nnodes=2)
    table.command(prepare)
    (ensure,) = table.wanted(EnsureLauncher)
    assert ensure.settings.nproc == 3
    table.feed(LauncherStarted(JOB, Uid("u1"), LAUNCHER))
    for message in (LauncherState(LAUNCHER, ready=False), Cleared(Attempt(1)), StoreReady(Attempt(1), 29500)):
        table.report(message)
    table.report(LauncherReady())
    table.command(table.start())
    (fork,) = [order for order in table.launcher_orders() if isinstance(order, ForkRanks)]
    assert [launch.rank for launch in fork.ranks] == [4, 5, 6]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    assert [fork.ranks[2].env[name] for name in names] == ["6", "2", "7", "3", "1", "2"]
    # A number that etcd forgot and gave out again to another size is another attempt.
    assert not table.command(replace(prepare, nproc=2)).answer.accepted  # type: ignore[union-attr]


def test_the_base_environment_keeps_the_users_and_drops_the_agents() -> None:
    env = base_env({"HOME": "/root", "DTRAIN_USER": "u", "ETCDCTL_USER": "u", "CUDA_VISIBLE_DEVICES": "0"})
    assert env == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0"}


def test_the_group_trains_when_its_slowest_rank_does() -> None:
    table = Table().forked()
    first, second = table.hello(0), table.hello(1)
    table.rank_report(first)
    table.rank_report(second, WorkerPhase.RESTORING)
    assert table.snapshot.phase is WorkerPhase.RESTORING
    assert not table.snapshot.restored
    table.rank_report(second)
    assert table.snapshot.phase is WorkerPhase.TRAINING
    assert table.snapshot.restored


def test_progress_is_not_urgent_but_the_first_step_and_the_last_one_are() -> None:
    """Without a step there seems to be nothing that a pause could lose."""
    table = Table().training()
    table.rank_report(1, at=1, metrics={"loss": 0.5})
    assert table.written().urgent
    table.rank_report(1, at=5, metrics={"loss": 0.4})
    assert not table.written().urgent
    table.rank_report(1, at=6, last_step=6)
    assert table.written().urgent


def test_a_metric_that_is_no_number_does_not_reach_the_snapshot() -> None:
    table = Table().training()
    table.rank_report(1, metrics={"loss": float("inf"), "lr": 0.1})
    assert table.snapshot.ranks[0].metrics == {"lr": 0.1}


def test_step_times_are_progress_and_the_first_number_that_is_not_finite_is_urgent() -> None:
    table = Table().training()
    table.rank_report(1, at=1)
    table.rank_report(1, at=5, timing=Timing(0.2, 0.1, 0.15), section="evaluate", beats=3)
    assert not table.written().urgent
    assert table.snapshot.ranks[0].timing == Timing(0.2, 0.1, 0.15)
    table.rank_report(1, at=6, nonfinite=("loss",), nonfinite_seen={"loss": Step(5)})
    assert table.written().urgent
    table.rank_report(1, at=7, nonfinite=(), nonfinite_seen={"loss": Step(6)})
    assert not table.written().urgent
    state = table.snapshot.ranks[0]
    assert (state.nonfinite, state.nonfinite_seen) == ((), {"loss": 6})


def test_of_many_numbers_that_are_not_finite_those_that_matter_are_told() -> None:
    table = Table().training()
    names = (*(f"grad/{number}" for number in range(40)), "loss")
    table.rank_report(1, nonfinite=names, nonfinite_seen=dict.fromkeys(names, Step(1)))
    state = table.snapshot.ranks[0]
    assert state.nonfinite[0] == "loss"
    assert next(iter(state.nonfinite_seen)) == "loss"
    assert len(state.nonfinite) == len(state.nonfinite_seen) == 8


def test_a_rank_hears_which_numbers_must_be_finite() -> None:
    table = Table().forked()
    table.hello(0)
    assert [message.finite for message in table.messages(Welcome)] == [("loss",)]


def test_a_plain_script_counts_as_training_after_a_second() -> None:
    table = Table().forked()
    assert table.last.wake_at == pytest.approx(table.now + 1.0)
    table.tick(1.0)
    assert table.snapshot.phase is WorkerPhase.TRAINING
    assert table.snapshot.restored
    assert not table.snapshot.ranks[0].sdk


def test_a_script_that_restores_is_never_taken_for_a_plain_one() -> None:
    table = Table().forked(restore=RESTORE)
    table.tick(60.0)
    assert table.snapshot.phase is WorkerPhase.RESTORING


def test_a_slow_import_is_corrected_by_hello() -> None:
    table = Table().forked()
    table.tick(1.0)
    table.hello(0)
    assert table.snapshot.phase is WorkerPhase.RESTORING


def test_the_group_is_done_when_every_rank_exited_with_zero() -> None:
    table = Table().training()
    table.ended(0, 0)
    assert table.snapshot.phase is WorkerPhase.TRAINING
    table.ended(1, 0)
    assert table.snapshot.phase is WorkerPhase.DONE


def test_a_failed_rank_ends_its_neighbours_at_once() -> None:
    table = Table().training()
    table.ended(1, -11)
    assert table.launcher_orders() == [SignalRanks(Attempt(1), 9)]
    assert table.snapshot.phase is WorkerPhase.ERROR
    failure = table.snapshot.failure
    assert failure is not None
    assert (failure.kind, failure.signal, failure.rank) == (FailureKind.SIGNAL, 11, 1)
    assert "SIGSEGV" in failure.message
    table.ended(0, -9)
    assert table.snapshot.failure == failure


def test_an_exception_is_told_from_error_json() -> None:
    table = Table().training()
    error = json.dumps({"message": {"message": "ValueError: bad batch", "extraInfo": {"timestamp": "1"}}})
    table.ended(0, 1, error=error, tail="x" * 5000)
    failure = table.snapshot.failure
    assert failure is not None
    assert (failure.kind, failure.message) == (FailureKind.EXCEPTION, "ValueError: bad batch")
    assert len(failure.log_tail) == 2048


@pytest.mark.parametrize(
    ("sdk", "after_s", "known"),
    [(True, 1e6, True), (False, STARTUP_S - 1, True), (False, STARTUP_S + 1, False)],
)
def test_an_error_is_known_again_only_where_its_step_says_something(
    sdk: bool, after_s: float, known: bool
) -> None:
    """Without the SDK all steps are 0: two outages hours apart would be the same error of the script."""
    table = Table().forked()
    if sdk:
        table.rank_report(table.hello(0))
    table.now += after_s
    table.ended(0, 1, error=json.dumps({"message": {"message": "ValueError: bad batch"}}))
    failure = table.snapshot.failure
    assert failure is not None
    assert bool(failure.fingerprint) is known


def test_the_cause_replaces_its_consequence() -> None:
    table = Table().training()
    peer = json.dumps({"message": {"message": "RuntimeError: Connection closed by peer [10.0.0.2]"}})
    table.ended(0, 1, error=peer)
    assert not table.launcher_orders()
    table.ended(1, 1, error=json.dumps({"message": "KeyError: 'x'"}))
    failure = table.snapshot.failure
    assert failure is not None
    assert failure.rank == 1


def test_survivors_of_an_aborted_collective_are_killed_after_a_moment() -> None:
    table = Table().training()
    table.ended(0, 1, error=json.dumps({"message": "NCCL error: remote process exited"}))
    assert table.last.wake_at is not None
    table.now = table.last.wake_at
    table.tick()
    assert table.launcher_orders() == [SignalRanks(Attempt(1), 9)]
    failure = table.snapshot.failure
    table.ended(1, -9)
    assert table.snapshot.failure == failure


def test_a_lost_launcher_ends_the_attempt() -> None:
    table = Table().training()
    table.report(LauncherEnded(-9, "out of memory"))
    failure = table.snapshot.failure
    assert failure is not None
    assert "launcher" in failure.message
    assert all(rank.exit_code == -9 for rank in table.snapshot.ranks)


def test_a_newer_prepare_kills_the_older_attempts_ranks_without_grace() -> None:
    table = Table().training()
    table.command(table.prepare(2))
    assert ClearBelow(Attempt(2), 0.0) in table.launcher_orders()
    assert not table.snapshot.ranks
    assert table.snapshot.attempt == 2


def test_a_zombie_rank_is_sent_away() -> None:
    table = Table().training()
    table.command(table.prepare(2))
    table.hello(0, attempt=1)
    (welcome,) = table.messages(Welcome)
    assert not welcome.accepted
    assert table.wanted(DropConnection)


def test_a_zombie_rank_is_sent_away_from_a_running_attempt() -> None:
    table = Table().training().training(2)
    table.hello(0, attempt=1)
    (welcome,) = table.messages(Welcome)
    assert not welcome.accepted
    assert "attempt 1 is over" in welcome.why
    assert table.wanted(DropConnection)
    assert table.snapshot.phase is WorkerPhase.TRAINING


def test_the_end_of_an_older_attempts_rank_is_not_the_new_ones_failure() -> None:
    table = Table().training()
    table.forked(2)
    table.ended(0, -9, attempt=1)
    assert table.snapshot.failure is None


def test_a_new_submission_waits_until_the_old_launcher_is_gone() -> None:
    table = Table().training()
    table.command(table.prepare(1, uid="u2"))
    assert Quit(0.0) in table.launcher_orders()
    table.feed(LauncherStarted(JOB, Uid("u2"), LAUNCHER))
    table.report(LauncherState(LAUNCHER, ready=True), uid="u2")
    table.report(Cleared(Attempt(1)), uid="u2")
    table.report(StoreReady(Attempt(1), 1), uid="u2")
    assert table.snapshot.phase is WorkerPhase.STARTING
    table.report(LauncherEnded(0), uid="u1")
    assert table.snapshot.phase is WorkerPhase.READY


def test_a_late_prepare_of_an_earlier_submission_is_refused() -> None:
    table = Table()
    table.command(table.prepare(1, uid="u2", submitted_at="2026-01-02"))
    answer = table.command(table.prepare(9, uid="u1", submitted_at="2026-01-01")).answer
    assert answer is not None
    assert not answer.accepted


def test_stop_asks_then_clears_and_ends_in_idle() -> None:
    table = Table().training()
    table.command(table.stop())
    assert ClearBelow(Attempt(2), 30.0) in table.launcher_orders()
    assert len(table.messages(StopRank)) == 2
    table.ended(0, -15)
    table.ended(1, -15)
    table.report(Cleared(Attempt(2)))
    assert table.snapshot.phase is WorkerPhase.IDLE
    assert table.snapshot.failure is None


def test_stop_of_an_older_attempt_is_accepted_and_spares_the_current_one() -> None:
    table = Table().training(2)
    answer = table.command(table.stop(1)).answer
    assert answer is not None
    assert answer.accepted
    assert not table.launcher_orders()


def test_a_prepare_that_a_stop_overtook_is_refused() -> None:
    table = Table().training()
    table.command(table.stop(3))
    answer = table.command(table.prepare(2)).answer
    assert answer is not None
    assert not answer.accepted


def test_release_forgets_the_job_once_its_launcher_is_gone() -> None:
    table = Table().training()
    table.command(table.stop(release=True))
    assert Quit(30.0) in table.launcher_orders()
    assert JOB in table.state.jobs
    table.report(LauncherEnded(0))
    assert JOB in table.state.jobs  # its ranks must be seen to be gone
    (probe,) = [action for action in table.tick(0.1).actions if type(action).__name__ == "ProbeProcesses"]
    from dtrain.agent.core.events import ProcessesProbed

    table.feed(ProcessesProbed(JOB, Uid("u1"), ()))
    assert probe.processes
    assert JOB not in table.state.jobs
    assert ForgetJob(JOB) in table.last.journal
    assert DeleteSnapshot(JOB) in table.last.actions


def test_a_stop_that_comes_late_does_not_take_a_release_back() -> None:
    table = Table().training()
    table.command(table.stop(release=True))
    table.command(table.stop())
    table.report(LauncherEnded(0))
    table.tick(0.1)
    from dtrain.agent.core.events import ProcessesProbed

    table.feed(ProcessesProbed(JOB, Uid("u1"), ()))
    assert JOB not in table.state.jobs
    assert DeleteSnapshot(JOB) in table.last.actions


def test_a_launcher_that_ignores_stop_is_killed() -> None:
    table = Table().training()
    table.command(table.stop(grace_s=5.0))
    table.tick(15.5)
    assert table.wanted(KillLauncher)
    table.report(LauncherEnded(-9))
    table.tick(0.1)
    assert table.snapshot.failure is None


def test_a_new_session_republishes_everything_and_leaves_the_ranks_alone() -> None:
    table = Table().training()
    table.feed(SessionRenewed(2, Incarnation("life-1b")))
    assert [type(action) for action in table.last.actions] == [WriteSnapshot]
    assert table.written().urgent
    assert table.written().snapshot.incarnation == "life-1b"
