"""What ranks need of a checkpoint, as the core passes it on: asked for once, answered to whoever is there."""

from dataclasses import replace

from dtrain.agent.launching import LauncherEnded
from dtrain.agent.transferring import (
    Demand,
    Fetch,
    Fetched,
    FetchFailed,
    KeepManifest,
    KeptBlob,
    ReleaseFetch,
    Supplied,
    TransferEnded,
    Uploaded,
)
from dtrain.protocol.commands import ConfirmCheckpoint
from dtrain.protocol.ids import Attempt, Rank, Seq, Step, Uid
from dtrain.protocol.ranklink import BlobPlace, ChunkSpan, Have, Held, Hello, Need, RestorePlan
from dtrain.protocol.snapshot import WorkerPhase

from .core_builder import JOB, RESTORE, RankConnected, Table, part, sealed

CHUNKS = (ChunkSpan(0, 0, 2),)
PLACE = Held(0, BlobPlace("/proc/1/fd/3", 4096, 64), shared=True)


def plan(token: str = "t1") -> RestorePlan:
    return RestorePlan(Seq(7), Step(70), "/proc/1/fd/3", 0, 10, on_demand=True, token=token)


def hello(table: Table, rank: int, *, demands: bool = True) -> int:
    table.connections += 1
    who = Hello(1, JOB, Uid("u1"), Attempt(1), Rank(rank), rank, 200 + rank, demands)
    table.feed(RankConnected(table.connections, who))
    return table.connections


def restoring() -> tuple[Table, str]:
    """Forked, and the checkpoint's manifest is there."""
    table = Table().forked(restore=RESTORE)
    fetch_id = table.job.restore.id
    table.transfer(Fetched(fetch_id, plan()))
    return table, fetch_id


def needs(table: Table, connection: int, number: int = 1, token: str = "t1", *, again: bool = False) -> None:
    need = Need(token, number, CHUNKS, again=again)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True, need=need)


def supply(table: Table, fetch_id: str, rank: int = 0, number: int = 1, token: str = "t1") -> Have:
    have = Have(token, number, (PLACE,))
    table.transfer(Supplied(fetch_id, Rank(rank), have, {"arena": 60, "store": 4}))
    return have


def test_a_need_is_passed_on_once_and_answered_once() -> None:
    table, fetch_id = restoring()
    connection = hello(table, 0)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    assert table.messages(RestorePlan) == [plan()]
    needs(table, connection)
    assert table.transfer_orders() == [Demand(fetch_id, Rank(0), Need("t1", 1, CHUNKS))]
    needs(table, connection)
    assert not table.transfer_orders()
    have = supply(table, fetch_id)
    assert table.messages(Have) == [have]
    needs(table, connection)
    assert not table.messages(Have)
    needs(table, connection, 2, again=True)
    (demand,) = table.transfer_orders()
    assert demand.need.again
    table.transfer(Supplied(fetch_id, Rank(0), Have("t1", 2, good=False)))
    assert table.messages(Have) == [Have("t1", 2, good=False)]


def test_a_rank_that_reconnects_is_told_again_without_another_demand() -> None:
    table, fetch_id = restoring()
    needs(table, hello(table, 0))
    have = supply(table, fetch_id)
    connection = hello(table, 0)
    needs(table, connection)
    assert (table.messages(RestorePlan), table.messages(Have)) == ([plan()], [have])
    assert not table.transfer_orders()


def test_an_answer_to_something_older_is_not_passed_on() -> None:
    table, fetch_id = restoring()
    connection = hello(table, 0)
    needs(table, connection, 1)
    needs(table, connection, 2)
    assert [type(order) for order in table.transfer_orders()] == [Demand]
    supply(table, fetch_id, number=1)
    assert not table.messages(Have)
    assert table.messages(Have) == [] != [supply(table, fetch_id, number=2)] == table.messages(Have)


def test_after_the_transfer_process_died_everything_is_said_again() -> None:
    table, fetch_id = restoring()
    connection = hello(table, 0)
    needs(table, connection)
    table.transfer(TransferEnded(1))
    (fetch,) = table.transfer_orders()
    assert isinstance(fetch, Fetch)
    needs(table, connection)  # it has not heard of it yet
    assert not table.transfer_orders()
    table.transfer(Fetched(fetch_id, plan("t2")))
    assert table.messages(RestorePlan) == [plan("t2")]
    assert not table.transfer_orders(), "the need is of a plan that is over"
    needs(table, connection, 2, "t2")
    assert [order.need.plan for order in table.transfer_orders()] == ["t2"]
    assert (
        table.messages(Have) == [] != [supply(table, fetch_id, number=2, token="t2")] == table.messages(Have)
    )


def test_after_the_agent_died_ranks_say_again_what_they_need() -> None:
    table, fetch_id = restoring()
    needs(table, hello(table, 0))
    table.restart()
    connection = hello(table, 0)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    table.transfer(Fetched(fetch_id, plan("t2")))
    assert table.messages(RestorePlan) == [plan("t2")]
    needs(table, connection, 2, "t2")
    assert [type(order) for order in table.transfer_orders()] == [Demand]


def test_a_rank_of_an_older_release_gets_everything_in_copies() -> None:
    table, fetch_id = restoring()
    connection = hello(table, 0, demands=False)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    assert not table.messages(RestorePlan)
    (demand,) = table.transfer_orders()
    assert (demand.private, demand.need.whole) == (True, True)
    places = (Held(0, BlobPlace("/m", 0, 5)), Held(1, BlobPlace("/m", 4096, 5)))
    table.transfer(Supplied(fetch_id, Rank(0), Have("t1", 0, places)))
    (told,) = table.messages(RestorePlan)
    assert (told.blobs, told.on_demand) == (tuple(held.place for held in places), False)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    assert not table.messages(RestorePlan)


def test_damage_that_a_demand_finds_ends_the_attempt() -> None:
    table, fetch_id = restoring()
    needs(table, hello(table, 0))
    table.transfer(FetchFailed(fetch_id, "chunk 1 differs"))
    assert table.snapshot.phase is WorkerPhase.ERROR


def test_where_the_bytes_came_from_is_said_and_counted() -> None:
    table, fetch_id = restoring()
    connections = [hello(table, rank) for rank in range(2)]
    for rank, connection in enumerate(connections):
        needs(table, connection)
        supply(table, fetch_id, rank)
    assert dict(table.state.restored) == {"arena": 60, "store": 4}
    for connection in connections:
        table.rank_report(connection)
    assert table.transfer_orders() == [ReleaseFetch(fetch_id)]
    assert table.snapshot.note == (
        "restored checkpoint 7: 0.0 MB from snapshots in memory here, 0.0 MB from the store"
    )


# What stays on the machine ------------------------------------------------------------


def kept(number: int, offset: int = 0, path: str = "/proc/100/fd/9") -> KeptBlob:
    return KeptBlob(f"blob-{number}", path, offset, 64)


def saved(seq: int = 1, *, blob: KeptBlob) -> Table:
    table = Table().training()
    table.command(table.begin(seq=seq))
    table.rank_report(1, sealed=sealed(seq))
    table.transfer(Uploaded(JOB, part(0, seq), (blob,)))
    return table


def fetched_next(table: Table) -> Fetch:
    table.prepared(2)
    table.command(table.start(2, RESTORE))
    (fetch,) = [order for order in table.transfer_orders() if isinstance(order, Fetch)]
    return fetch


def test_the_next_attempt_knows_what_lies_in_the_arenas() -> None:
    fetch = fetched_next(saved(blob=kept(1)))
    assert (fetch.kept, fetch.ranks, fetch.world) == ((kept(1),), (0, 1), 2)


def test_so_does_a_restarted_agent() -> None:
    table = saved(blob=kept(1))
    table.restart()
    assert fetched_next(table).kept == (kept(1),)


def test_a_newer_snapshot_in_the_same_place_replaces_the_older() -> None:
    table = saved(blob=kept(1))
    table.transfer(Uploaded(JOB, part(1), (kept(2, path="/proc/100/fd/10"),)))
    table.transfer(Uploaded(JOB, part(0, 2), (kept(3, 32),)))
    assert {blob.key for blob in table.job.kept} == {"blob-2", "blob-3"}


def test_arenas_end_with_their_launcher() -> None:
    table = saved(blob=kept(1))
    table.report(LauncherEnded(-9))
    assert table.job.kept == ()


def test_a_committed_manifest_is_fetched_for_the_next_restart() -> None:
    table = saved(blob=kept(1))
    command = replace(table.confirm(), manifest="m.json.gz", digest="d" * 64)
    assert isinstance(command, ConfirmCheckpoint)
    table.command(command)
    assert table.transfer_orders() == [KeepManifest("s3://bucket", "m.json.gz", "d" * 64)]


def test_a_commit_of_which_nothing_is_held_here_is_not_looked_at() -> None:
    table = Table().training()
    table.command(replace(table.confirm(), manifest="m.json.gz", digest="d" * 64))
    assert not table.transfer_orders()
