"""What an agent tells of its ranks' bytes on their way: never less than before, and nothing is decided."""

from dtrain.agent.core.moving import RATE_S
from dtrain.agent.transferring import (
    Fetched,
    FetchMoved,
    Moved,
    PartMoved,
    Supplied,
    TransferEnded,
    Uploaded,
)
from dtrain.protocol import codec
from dtrain.protocol.ids import Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import ChunkSpan, Have, Need, RestorePlan
from dtrain.protocol.snapshot import Transfer, TransferKind, WorkerPhase, WorkerSnapshot

from .core_builder import JOB, RESTORE, Table, part, sealed


def saving() -> Table:
    """Two ranks with 64 bytes each; only the first has sealed."""
    table = Table().training()
    table.command(table.begin())
    table.rank_report(1, sealed=sealed())
    return table


def tell(table: Table, *done: int, seconds: float = 1.0, uid: str = "u1", seq: int = 1) -> Transfer:
    table.now += seconds
    parts = (PartMoved(JOB, Uid(uid), Seq(seq), Rank(rank), size) for rank, size in enumerate(done))
    table.transfer(Moved(tuple(parts)))
    (found,) = table.snapshot.transfers
    return found


def test_the_whole_is_unknown_until_every_rank_has_sealed() -> None:
    table = saving()
    assert not table.snapshot.transfers
    assert tell(table, 10) == Transfer(TransferKind.SAVE, Seq(1), Step(10), 10, 0, 0.0)
    table.rank_report(2, sealed=sealed())
    assert tell(table, 20, 4) == Transfer(TransferKind.SAVE, Seq(1), Step(10), 24, 128, 14.0)


def test_the_rate_is_of_the_last_seconds_and_falls_to_none() -> None:
    table = saving()
    tell(table, 10)
    assert tell(table, 30, seconds=2.0).bytes_per_s == 10.0
    assert tell(table, 30, seconds=2.0).bytes_per_s == 5.0
    assert tell(table, 30, seconds=RATE_S).bytes_per_s == 0.0


def test_what_is_told_never_becomes_less_and_a_durable_part_counts_as_a_whole() -> None:
    table = saving()
    table.rank_report(2, sealed=sealed())
    tell(table, 40, 8)
    table.transfer(TransferEnded(1))
    assert tell(table, 1, 1).done_bytes == 48
    table.transfer(Uploaded(JOB, part(0)))
    assert table.snapshot.transfers[0].done_bytes == 72
    assert tell(table, 64, 9).done_bytes == 73
    table.transfer(Uploaded(JOB, part(1)))
    assert table.snapshot.transfers == (Transfer(TransferKind.SAVE, Seq(1), Step(10), 128, 128, 0.0),)


def test_bytes_alone_are_never_urgent_and_never_journaled() -> None:
    table = saving()
    tell(table, 10)
    assert not table.written().urgent
    assert not table.journal()
    tell(table, 20)
    assert not table.written().urgent
    assert not table.journal()


def test_a_settled_checkpoint_moves_no_more() -> None:
    table = saving()
    tell(table, 10)
    table.command(table.abort())
    assert not table.snapshot.transfers
    table.transfer(Moved((PartMoved(JOB, Uid("u1"), Seq(1), Rank(0), 20),)))
    assert not table.snapshot.transfers
    assert not table.job.courses


def test_uploads_of_another_submission_are_not_taken_for_this_ones() -> None:
    table = saving()
    table.transfer(Moved((PartMoved(JOB, Uid("old"), Seq(1), Rank(0), 20),)))
    assert not table.snapshot.transfers


def restoring() -> tuple[Table, str]:
    table = Table().forked(restore=RESTORE)
    fetch_id = table.job.restore.id
    plan = RestorePlan(Seq(7), Step(70), "/proc/1/fd/3", 0, 10, on_demand=True, token="t1")
    table.transfer(Fetched(fetch_id, plan))
    for rank in range(2):
        table.hello(rank)
    return table, fetch_id


def fetched(table: Table, fetch_id: str, done: int, total: int) -> tuple[Transfer, ...]:
    table.now += 1.0
    table.transfer(Moved(fetches=(FetchMoved(fetch_id, done, total),)))
    return table.snapshot.transfers


def need(table: Table, connection: int) -> None:
    wanted = Need("t1", 1, (ChunkSpan(0, 0, 2),))
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True, need=wanted)


def test_a_restore_is_told_until_the_first_step_though_its_bytes_were_let_go_before() -> None:
    table, fetch_id = restoring()
    kind, seq, step = TransferKind.RESTORE, Seq(7), Step(70)
    assert fetched(table, fetch_id, 10, 50) == (Transfer(kind, seq, step, 10, 0, 0.0),)
    need(table, 1)
    need(table, 2)
    assert fetched(table, fetch_id, 30, 100) == (Transfer(kind, seq, step, 30, 100, 20.0),)
    assert not table.written().urgent
    table.transfer(Supplied(fetch_id, Rank(0), Have("t1", 1), {"store": 60}))
    assert table.snapshot.transfers == (Transfer(kind, seq, step, 60, 100, 20.0),)
    for connection in (1, 2):
        table.rank_report(connection, WorkerPhase.TRAINING, at=70)
    assert table.job.restore.released
    assert table.snapshot.transfers == (Transfer(kind, seq, step, 100, 100, 0.0),)
    table.rank_report(1, WorkerPhase.TRAINING, at=71)
    assert not table.snapshot.transfers


def test_a_restore_of_another_attempt_is_not_taken_for_this_ones() -> None:
    table, _ = restoring()
    assert fetched(table, "another", 10, 50) == ()


def test_an_older_release_says_nothing_and_is_read() -> None:
    table = saving()
    tell(table, 10)
    document = codec.to_json(table.snapshot)
    assert codec.from_json(WorkerSnapshot, document) == table.snapshot
    del document["transfers"]
    assert codec.from_json(WorkerSnapshot, document).transfers == ()
