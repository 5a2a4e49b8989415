"""Checkpoints and restores, as the core decides them."""

from dataclasses import replace

from dtrain.agent.launching import LauncherEnded
from dtrain.agent.transferring import (
    CancelUpload,
    Fetch,
    Fetched,
    FetchFailed,
    ReleaseFetch,
    TransferEnded,
    Upload,
    Uploaded,
    UploadFailed,
)
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import Begin, Durable, Outcome, RestoreFailed, RestorePlan, Welcome
from dtrain.protocol.snapshot import BadBlob, FailureKind, SaveProblem, WorkerPhase

from .core_builder import JOB, RESTORE, Table, part, sealed


def test_begin_reaches_every_rank_and_the_snapshot() -> None:
    table = Table().training()
    table.command(table.begin())
    assert table.messages(Begin) == [Begin(Seq(1), "n1", Step(10))] * 2
    assert table.snapshot.saving == (1,)
    assert table.written().urgent


def test_a_sealed_snapshot_is_uploaded_once() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    (upload,) = table.transfer_orders()
    assert isinstance(upload, Upload)
    assert (upload.rank, upload.world, upload.sealed) == (0, 2, sealed())
    table.rank_report(1, sealed=sealed())
    assert not table.transfer_orders()


def test_what_a_rank_has_sealed_is_shown_but_not_written_for_its_own_sake() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    assert [rank.sealed for rank in table.snapshot.ranks] == [1, 0]
    assert not table.written().urgent
    table.ended(1, -9)
    assert [rank.sealed for rank in table.written().snapshot.ranks] == [1, 0]
    assert table.written().urgent


def test_a_snapshot_sealed_for_another_intent_is_not_uploaded() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed(nonce="other"))
    assert not table.transfer_orders()


def test_a_durable_part_is_published_at_once() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.transfer(Uploaded(JOB, part(0)))
    assert table.snapshot.durable == (part(0),)
    assert table.written().urgent
    assert table.journal()


def test_a_part_of_an_older_attempt_is_not_published() -> None:
    table = Table().training(2)
    table.command(table.begin(attempt=2))
    table.transfer(Uploaded(JOB, part(0, attempt=1)))
    assert not table.snapshot.durable


def test_a_failed_upload_is_a_problem_and_training_goes_on() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.transfer(UploadFailed(JOB, Seq(1), Rank(0), "access denied"))
    assert [problem.message for problem in table.snapshot.problems] == ["access denied"]
    assert table.snapshot.phase is WorkerPhase.TRAINING
    table.rank_report(1, sealed=sealed())
    assert not table.transfer_orders()


def test_a_late_rank_says_so_in_the_snapshot() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(2, problem=SaveProblem(Seq(1), Rank(0), True, Step(12), "passed step 10"))
    assert [(one.rank, one.late) for one in table.snapshot.problems] == [(1, True)]


def test_a_plain_script_cannot_take_part_and_says_why() -> None:
    table = Table().forked()
    table.tick(1.0)
    table.command(table.begin())
    assert len(table.snapshot.problems) == 2
    assert "dtrain.trainer" in table.snapshot.problems[0].message


def test_uploads_are_repeated_after_the_transfer_process_died_but_not_for_ever() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    for _ in range(2):
        table.transfer(TransferEnded(-9))
        assert len(table.transfer_orders()) == 1
    table.transfer(TransferEnded(-9))
    assert not table.transfer_orders()
    assert len(table.snapshot.problems) == 1


def test_confirm_frees_the_slot_and_the_snapshot() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.transfer(Uploaded(JOB, part(0)))
    table.command(table.confirm(final=True))
    assert table.messages(Outcome) == [Outcome(Seq(1), committed=True, final=True)] * 2
    assert not table.transfer_orders()
    assert (table.snapshot.saving, table.snapshot.durable) == ((), ())


def test_abort_cancels_the_upload() -> None:
    table = Table().training()
    table.command(table.begin())
    table.command(table.abort())
    assert table.transfer_orders() == [CancelUpload(JOB, table.job.uid, Seq(1))]
    assert table.messages(Outcome)[0].why == "timeout"


def test_a_begin_that_its_abort_overtook_is_not_revived() -> None:
    table = Table().training()
    table.command(table.abort())
    table.command(table.begin())
    assert not table.messages(Begin)
    assert not table.snapshot.saving


def test_a_rank_that_missed_begin_hears_it_when_it_reconnects() -> None:
    table = Table().training()
    table.command(table.begin())
    table.hello(0)
    assert table.messages(Begin) == [Begin(Seq(1), "n1", Step(10))]


def test_a_rank_that_missed_the_outcome_hears_it_after_its_report() -> None:
    table = Table().training()
    table.command(table.begin())
    table.command(table.confirm())
    table.rank_report(1, sealed=sealed())
    assert table.messages(Outcome) == [Outcome(Seq(1), committed=True, final=False)]
    assert not table.transfer_orders()


def test_a_sealed_snapshot_survives_its_rank() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.ended(0, -9)
    table.transfer(Uploaded(JOB, part(0)))
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert table.snapshot.durable == (part(0),)


def test_stop_keeps_durable_parts_for_the_leader_to_settle() -> None:
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    table.transfer(Uploaded(JOB, part(0)))
    table.command(table.stop())
    assert table.snapshot.durable == (part(0),)


def test_a_new_attempt_cancels_only_what_cannot_have_been_committed() -> None:
    table = Table().training()
    table.command(table.begin())
    table.command(table.begin(seq=2, nonce="n2"))
    for rank in range(2):
        table.transfer(Uploaded(JOB, part(rank)))
    table.command(table.prepare(2))
    assert table.transfer_orders() == [CancelUpload(JOB, table.job.uid, Seq(2))]
    assert table.snapshot.saving == ()


def test_the_fetch_begins_with_the_fork_and_its_plan_reaches_waiting_ranks() -> None:
    table = Table().prepared()
    table.command(table.start(restore=RESTORE))
    (fetch,) = table.transfer_orders()
    assert isinstance(fetch, Fetch)
    assert (fetch.seq, fetch.manifest) == (7, "manifests/7.json.gz")
    connection = table.hello(0)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    assert not table.messages(RestorePlan)
    plan = RestorePlan(Seq(7), Step(70), "/proc/1/fd/3", 0, 10)
    table.transfer(Fetched(fetch.id, plan))
    assert table.messages(RestorePlan) == [plan]
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    assert not table.messages(RestorePlan)
    other = table.hello(1)
    table.rank_report(other, WorkerPhase.RESTORING, wants_restore=True)
    assert table.messages(RestorePlan) == [plan]
    table.rank_report(connection)
    assert not table.transfer_orders()
    table.rank_report(other)
    assert table.transfer_orders() == [ReleaseFetch(fetch.id)]


def test_without_a_restore_point_ranks_start_from_scratch() -> None:
    table = Table().forked()
    table.rank_report(table.hello(0), WorkerPhase.RESTORING, wants_restore=True)
    assert table.messages(RestorePlan) == [RestorePlan(None)]


def test_a_damaged_checkpoint_is_reported_with_its_evidence() -> None:
    table = Table().forked(restore=RESTORE)
    bad = BadBlob(Seq(7), "blob", 3, "aa", "bb", Rank(0))
    table.transfer(FetchFailed(table.job.restore.id, "chunk 3 differs", bad))
    assert table.snapshot.bad == bad
    assert table.snapshot.phase is WorkerPhase.ERROR
    assert table.snapshot.failure is not None
    assert table.snapshot.failure.kind is FailureKind.RESTORE


def test_a_rank_that_cannot_load_ends_the_attempt() -> None:
    table = Table().forked(restore=RESTORE)
    table.rank_report(
        table.hello(0), WorkerPhase.RESTORING, restore_failed=RestoreFailed(Seq(7), "shape differs")
    )
    assert table.snapshot.failure is not None
    assert table.snapshot.failure.message == "shape differs"


def test_a_fetch_is_repeated_after_the_transfer_process_died() -> None:
    table = Table().forked(restore=RESTORE)
    table.transfer(TransferEnded(1))
    assert [type(order) for order in table.transfer_orders()] == [Fetch]
    table.transfer(TransferEnded(1))
    table.transfer(TransferEnded(1))
    assert table.snapshot.phase is WorkerPhase.ERROR


def test_a_fetch_nobody_waits_for_is_let_go() -> None:
    table = Table().forked(restore=RESTORE)
    fetch_id = table.job.restore.id
    table.report(LauncherEnded(-9))
    assert ReleaseFetch(fetch_id) in table.transfer_orders()
    table.transfer(Fetched(fetch_id, RestorePlan(Seq(7))))
    assert table.transfer_orders() == [ReleaseFetch(fetch_id)]


# Saves that scripts ask for -------------------------------------------------------------


def test_a_ranks_wish_is_published_at_once() -> None:
    table = Table().training()
    table.rank_report(1, at=10, save_at=Step(10))
    assert [rank.save_at for rank in table.snapshot.ranks] == [10, None]
    assert table.written().urgent


def test_an_order_that_the_script_asked_for_says_so_to_the_ranks() -> None:
    table = Table().training()
    table.command(replace(table.begin(), asked=True))
    assert table.messages(Begin) == [Begin(Seq(1), "n1", Step(10), asked=True)] * 2
    (saved,) = table.job.saving
    assert saved.asked


def test_a_wish_that_crossed_an_outcome_is_not_published() -> None:
    table = Table().training()
    table.rank_report(1, at=10, save_at=Step(10))
    table.command(replace(table.begin(), asked=True))
    table.command(table.abort())
    assert table.snapshot.ranks[0].save_at is None
    table.rank_report(1, at=10, save_at=Step(10))  # said before it heard of the abort
    assert table.snapshot.ranks[0].save_at is None
    table.rank_report(1, at=10, save_at=Step(10), settled=Seq(1))  # it asks anew
    assert table.snapshot.ranks[0].save_at == 10


def test_a_rank_that_comes_back_hears_of_the_newest_outcome() -> None:
    table = Table().training()
    table.command(table.begin(seq=2))
    table.command(table.confirm(2))
    table.command(table.abort(1))  # late
    table.hello(0)
    assert [outcome.seq for outcome in table.messages(Outcome)] == [2]


def test_durable_is_told_once_to_a_rank_that_waits_for_it() -> None:
    table = Table().training()
    table.command(replace(table.begin(), asked=True))
    table.rank_report(1, sealed=sealed())
    table.transfer(Uploaded(JOB, part(0)))
    assert not table.messages(Durable)
    table.rank_report(1, sealed=sealed(), wants_durable=Seq(1))
    assert table.messages(Durable) == [Durable(Seq(1))]
    table.rank_report(1, sealed=sealed(), wants_durable=Seq(1))
    assert not table.messages(Durable)


def test_ranks_hear_how_long_a_save_may_take() -> None:
    table = Table().forked()
    table.hello(0)
    (welcome,) = table.messages(Welcome)
    assert welcome.save_timeout_s == 300.0
